"""One ONNX Runtime session with typed inputs and outputs, and errors that name the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import EncodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from lcpaq_onnx.errors import CalibrationError, ModelError, UsageError

__all__ = ["Session", "SessionOptions", "TensorSpec", "check_providers"]

# ONNX Runtime's own exceptions have no base class in common, and its bindings also raise the two built-in ones.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(c for c in vars(ort_state).values() if isinstance(c, type) and issubclass(c, Exception)),
)
_ORT_FATAL = 4
_PROTOBUF_LIMIT_BYTES = 2**31 - 1

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# ONNX Runtime's element type names that differ from numpy's and ml_dtypes'.
_DTYPES: dict[str, np.dtype] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": np.dtype(np.str_),
    "bool": np.dtype(np.bool_),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("int2", "uint2", "int4", "uint4")},
}
# Part of ONNX Runtime's message -> what the user can do about it. The first that matches wins.
_LOAD_HINTS = (
    ("is not a registered function/op", "custom operators cannot be run here; export with standard ONNX operators"),
    ("Could not find an implementation", "no kernel for that operator and type: lower the opset or update onnxruntime"),
    ("external", "put the external data files beside the model file, or pass their folder as base_dir"),
    ("protobuf parsing failed", "check that the file is a complete .onnx file and not, say, a Git LFS pointer"),
    ("Protobuf parsing failed", "check that the file is a complete .onnx file and not, say, a Git LFS pointer"),
    ("opset", "lower the model's opset with onnx.version_converter, or update onnxruntime"),
    ("IR version", "lower the model's ir_version, or update onnxruntime"),
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model as ONNX Runtime declares it.

    ``shape``: an int is a fixed dimension, a str a symbolic one, None an unknown one. ``()`` is a scalar *or* a tensor
    of unknown rank: ONNX Runtime does not tell them apart and checks neither. ``type_name`` is ONNX Runtime's text,
    ``tensor(float)``; when it is not a tensor (sequence, map, optional) ``dtype`` is ``object``.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    type_name: str = ""

    @property
    def is_tensor(self) -> bool:
        return self.dtype != np.dtype(object)

    def __str__(self) -> str:
        dims = ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype.name if self.is_tensor else self.type_name}[{dims}]"


@dataclass(frozen=True)
class SessionOptions:
    """How ONNX Runtime loads and runs a model.

    ``threads`` 0 leaves the number to ONNX Runtime. ``optimized_model_path`` makes it write the optimized graph there.
    ``disabled_optimizers`` are names of its graph transformers, ``config`` pairs of its session configuration keys.
    """

    optimization: Literal["all", "extended", "basic", "none"] = "all"
    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    disabled_optimizers: tuple[str, ...] = ()
    optimized_model_path: Path | None = None
    config: tuple[tuple[str, str], ...] = ()


class Session:
    """A loaded model: ``inputs`` that every run needs, ``overridable`` initializers a run may give, ``outputs``."""

    def __init__(
        self,
        model: onnx.ModelProto | bytes | Path,
        options: SessionOptions = SessionOptions(),
        *,
        base_dir: Path | None = None,
    ) -> None:
        """Load ``model``; a path is read by ONNX Runtime itself, so files above 2 GB and external data stay lazy.

        ``base_dir`` is the folder of the external data of a model given as proto or bytes (a path knows its own).
        Raises ModelError with ONNX Runtime's reason, UsageError for a provider that this build lacks.
        """
        if isinstance(model, Path) and base_dir is not None:
            raise UsageError("base_dir with a model path", hint="drop base_dir; external data lie beside the file")
        self._where = f"model '{model}'" if isinstance(model, Path) else "model"
        self._session = self._load(model, options, base_dir)
        self.inputs = tuple(_spec(arg) for arg in self._session.get_inputs())
        self.overridable = tuple(_spec(arg) for arg in self._session.get_overridable_initializers())
        self.outputs = tuple(_spec(arg) for arg in self._session.get_outputs())

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once; ``outputs`` None gives all of them, in the model's order.

        Raises CalibrationError when ``feed`` does not fit the inputs (names, types, shapes), ModelError when the run
        fails or an output asked for does not exist or is not a tensor that numpy can hold.
        """
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        self._check_names(feed, names)
        try:
            # asarray: a run also takes numpy scalars (np.float32(3)), which ONNX Runtime itself refuses.
            values = self._session.run(names, {name: np.asarray(value) for name, value in feed.items()})
        except ort_state.InvalidArgument as error:
            fed = ", ".join(f"{name}: {np.asarray(value).dtype}{list(np.shape(value))}" for name, value in feed.items())
            raise CalibrationError(
                f"{self._where} does not run on this feed ({fed}): {_reason(error)}",
                hint=f"the model takes {'; '.join(map(str, self.inputs))}",
            ) from error
        except _ORT_ERRORS as error:
            raise ModelError(
                f"{self._where} failed while running: {_reason(error)}",
                hint="check that the original model runs on this input in plain ONNX Runtime",
            ) from error
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, np.ndarray):
                raise ModelError(
                    f"output '{name}' of the {self._where} is a {type(value).__name__}, not a tensor",
                    hint="ask for the tensor outputs by name, or remove that output from the model",
                )
        return dict(zip(names, values, strict=True))

    def _load(
        self, model: onnx.ModelProto | bytes | Path, options: SessionOptions, base_dir: Path | None
    ) -> ort.InferenceSession:
        check_providers(options.providers)
        if isinstance(model, Path) and not model.is_file():
            raise ModelError(f"there is no model file '{model}'", hint="check the path")
        source = str(model) if isinstance(model, Path) else model if isinstance(model, bytes) else _serialize(model)
        try:
            return ort.InferenceSession(
                source,
                _native_options(options, base_dir),
                providers=list(options.providers),
                disabled_optimizers=set(options.disabled_optimizers),
                enable_fallback=0,  # else a failing provider is silently replaced by the CPU
            )
        except _ORT_ERRORS as error:
            reason = _reason(error)
            hint = next((hint for part, hint in _LOAD_HINTS if part in reason), "")
            raise ModelError(
                f"ONNX Runtime cannot load the {self._where}: {reason}",
                hint=hint or "run onnx.checker.check_model(path, full_check=True) on it",
            ) from error

    def _check_names(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str]) -> None:
        required, known = {s.name for s in self.inputs}, {s.name for s in (*self.inputs, *self.overridable)}
        missing, unknown = sorted(required - set(feed)), sorted(set(feed) - known)
        if missing or unknown:
            parts = [f"lacks {missing}"] * bool(missing) + [f"has unknown {unknown}"] * bool(unknown)
            raise CalibrationError(
                f"the feed of the {self._where} {' and '.join(parts)}", hint=f"the inputs are {sorted(required)}"
            )
        absent = sorted(set(outputs) - {s.name for s in self.outputs})
        if absent:
            raise ModelError(
                f"the {self._where} has no output {absent}", hint=f"it has {[s.name for s in self.outputs]}"
            )


def check_providers(providers: Collection[str]) -> None:
    """Raises UsageError for an execution provider that this build of ONNX Runtime lacks."""
    missing = sorted(set(providers) - set(ort.get_available_providers()))
    if missing:
        raise UsageError(
            f"this onnxruntime has no {', '.join(missing)}",
            hint=f"it has {', '.join(ort.get_available_providers())}; install the build that has the other",
        )


def _native_options(options: SessionOptions, base_dir: Path | None) -> ort.SessionOptions:
    native = ort.SessionOptions()
    native.graph_optimization_level = _LEVELS[options.optimization]
    native.intra_op_num_threads = options.threads
    # Errors come as exceptions; without this ONNX Runtime prints them to stderr as well.
    native.log_severity_level = _ORT_FATAL
    if options.optimized_model_path is not None:
        native.optimized_model_filepath = str(options.optimized_model_path)
    if base_dir is not None:
        native.add_session_config_entry("session.model_external_initializers_file_folder_path", str(base_dir))
    for key, value in options.config:
        native.add_session_config_entry(key, value)
    return native


def _serialize(model: onnx.ModelProto) -> bytes:
    """Bytes of a proto below protobuf's limit of 2 GB. Raises ModelError above it."""
    # Counted first: protobuf would fill 2 GB of memory before it refuses. Weights elsewhere than in initializers are
    # left to that refusal.
    inline_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    try:
        if inline_bytes <= _PROTOBUF_LIMIT_BYTES:
            return bytes(model.SerializeToString())
    except (EncodeError, ValueError) as error:
        reason = f": {error}"
    else:
        reason = f": {inline_bytes} bytes of weights, the limit is {_PROTOBUF_LIMIT_BYTES}"
    raise ModelError(
        f"the model in memory cannot be passed to ONNX Runtime{reason}",
        hint="save it with external data (onnx.save_model(…, save_as_external_data=True)) and give the path",
    )


def _spec(arg: ort.NodeArg) -> TensorSpec:
    element = arg.type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype(object)
    if arg.type.startswith("tensor("):
        dtype = _DTYPES[element] if element in _DTYPES else np.dtype(element)
    return TensorSpec(arg.name, dtype, tuple(arg.shape), arg.type)


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without its '[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : ', on one line."""
    text = " ".join(str(error).split())
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
