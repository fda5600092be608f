"""Times of single operators in ONNX Runtime, one thread, without what stands around them.

ONNX Runtime's profiler adds 4 µs to every node, as much as many layers take, so kernels are timed by the clock: the
optimised model of a probe is taken apart, its own kernels (which may be ONNX Runtime's internal operators, in blocked
or channels-last layout) are put into models of one and of several copies, and the difference is divided. That leaves
out conversions and layout changes at the probe's ends, and what a session run costs; it includes the node's dispatch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from lcpaq_onnx.formats import QFormat
from lcpaq_onnx.graph.probe import Probe, build_probe

__all__ = ["Feeds", "Times", "conversion_ns_per_element", "dispatch_us", "kernel_times", "session_us"]

# What stands at the two ends of a probe but amortises over a chain of layers: conversions and layout changes.
_ENDS = frozenset({"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"})
_COPIES = 5
_WARM_UP = 2
_SECONDS_PER_PROBE = 0.4
_SESSION_RUN_US = 10.0

Array = npt.NDArray[np.generic]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Times:
    """``latency_us``: mean of the fastest quarter; ``spread_us``: what the median took more; ``integer``: whether the
    activations stayed integers from the first Q to the last DQ. Latency 0: the runtime left nothing to run."""

    latency_us: float
    spread_us: float
    integer: bool


def kernel_times(
    models: Sequence[onnx.ModelProto], repeats: int, only: str = "", without: frozenset[str] = frozenset()
) -> list[Times]:
    """Times of the models' own kernels, run alternately; or of all nodes of the one operator ``only``; ``without``
    names further operators not to count."""
    cores = [_core(model, only, without) for model in models]
    runs = [[_runner(core, 1), _runner(core, _COPIES)] for core in cores if core.nodes]
    samples: list[list[list[float]]] = [[[], []] for _ in runs]
    started = time.perf_counter()
    for repeat in range(_WARM_UP + repeats):
        for runners, sample in zip(runs, samples, strict=True):
            for run, seconds in zip(runners, sample, strict=True):
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
        if repeat > _WARM_UP + 10 and time.perf_counter() - started > _SECONDS_PER_PROBE:
            break
    slopes = iter([_slope(np.array(sample)[:, _WARM_UP:] * 1e6) for sample in samples])
    return [Times(*next(slopes), core.integer) if core.nodes else Times(0.0, 0.0, core.integer) for core in cores]


def _slope(sample_us: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Time of one copy and spread, from the sorted times of one copy (row 0) and several (row 1)."""
    ordered = np.sort(sample_us, axis=1)
    fastest = ordered[:, : max(1, ordered.shape[1] // 4)].mean(axis=1)
    # A disturbed run of the one copy makes the slope too small; a session run itself never costs more than this.
    latency = max((fastest[1] - fastest[0]) / (_COPIES - 1), (fastest[1] - _SESSION_RUN_US) / _COPIES)
    spread = (np.median(ordered[1]) - fastest[1]) / _COPIES
    return max(float(latency), 0.0), max(float(spread), 0.0)


@dataclass(frozen=True)
class _Core:
    """A probe's own kernels: ``feeds`` are the values that its ends pass in, ``outputs`` what they read."""

    nodes: list[onnx.NodeProto]
    model: onnx.ModelProto
    feeds: Feeds
    outputs: Feeds
    integer: bool


def _core(model: onnx.ModelProto, only: str, without: frozenset[str]) -> _Core:
    with tempfile.TemporaryDirectory() as folder:
        options = _options()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    rng = np.random.default_rng(0)
    fed: Feeds = {value.name: rng.uniform(0, 4, value.shape).astype(np.float32) for value in session.get_inputs()}
    nodes = [
        node for node in optimised.graph.node if (node.op_type == only if only else node.op_type not in _ENDS | without)
    ]
    names = [name for node in optimised.graph.node for name in node.output if name]
    everything = onnx.ModelProto()
    everything.CopyFrom(optimised)
    del everything.graph.output[:]
    everything.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    values = {**fed, **dict(zip(names, _session(everything).run(names, fed), strict=True))}
    made = {name for node in nodes for name in node.output}
    used = {name for node in nodes for name in node.input}
    conversions = sum(node.op_type == "DequantizeLinear" for node in optimised.graph.node)
    return _Core(
        nodes=nodes,
        model=optimised,
        feeds={name: values[name] for name in sorted(used & values.keys() - made)},
        outputs={name: values[name] for name in sorted(made - used)},
        integer=conversions == len(model.graph.output),
    )


def _runner(core: _Core, copies: int) -> Callable[[], None]:
    """A run of ``copies`` of the kernels side by side, on buffers bound once."""
    nodes = []
    made = {name for node in core.nodes for name in node.output}
    for copy in range(copies):
        for node in core.nodes:
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = f"{node.name}_{copy}"
            twin.input[:] = [f"{name}_{copy}" if name in made else name for name in node.input]
            twin.output[:] = [f"{name}_{copy}" if name else "" for name in node.output]
            nodes.append(twin)
    outputs = {f"{name}_{copy}": value for copy in range(copies) for name, value in core.outputs.items()}
    graph = helper.make_graph(nodes, "core", _infos(core.feeds), _infos(outputs), core.model.graph.initializer)
    model = helper.make_model(graph, opset_imports=core.model.opset_import, ir_version=core.model.ir_version)
    options = _options()
    # The kernels are chosen already; another round of optimisation would merge the copies.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in core.feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(value))
    return lambda: session.run_with_iobinding(binding)


def _infos(values: Feeds) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    ]


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])


def session_us(model: Path | onnx.ModelProto, feeds: Feeds, repeats: int = 100) -> float:
    """Fastest run of a whole model, by the clock."""
    if isinstance(model, Path):
        session = ort.InferenceSession(str(model), _options(), providers=["CPUExecutionProvider"])
    else:
        session = _session(model)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - started)
    return min(times) * 1e6


def conversion_ns_per_element(bits: int) -> dict[str, float]:
    """Slopes of QuantizeLinear and DequantizeLinear over their element count, uint activations, per tensor."""
    fmt = QFormat(bits=bits, signed=False, symmetric=False)
    sizes = np.array([2**14, 2**16, 2**18])
    # Tanh has no integer kernel: a Q and a DQ stand before it and behind it, two nodes of each in a core.
    probes = [build_probe(Probe(op="Tanh", inputs=[(int(size),)]), fmt, None) for size in sizes]
    slopes = {}
    for name in ("QuantizeLinear", "DequantizeLinear"):
        times = [kernel_times([probe], 200, only=name)[0].latency_us / 2 for probe in probes]
        slopes[name] = round(float(np.polyfit(sizes, times, 1)[0]) * 1000, 3)
    return slopes


def dispatch_us() -> float:
    """What one more tiny node costs: chains of many and few, by the clock."""
    few, many = 50, 1050
    feeds: Feeds = {"x": np.ones(8, np.float32)}
    slope = (session_us(_chain(many), feeds, 300) - session_us(_chain(few), feeds, 300)) / (many - few)
    return round(slope, 3)


def _chain(length: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Sign", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(length)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in ("x", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
