"""Quantize a model from Python: python examples/quantize_digits.py (run it in the project's root)."""

import lcpaq_onnx

quantized = lcpaq_onnx.quantize("models/digits_resnet.onnx", "models/digits_calibration.npz", budget="size<=0.3x")
quantized.save("digits_small.onnx")
for layer in quantized.plan.layers:
    print(f"{layer.name:24} {layer.format:5} {layer.size_bytes:6} bytes  {layer.reason}")
measured = quantized.report.measured
print(f"{measured.size_bytes} bytes, {measured.agreement:.1%} of decisions kept, passed: {quantized.report.passed}")
