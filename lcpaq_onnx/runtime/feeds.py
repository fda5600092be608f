"""Fitting the user's arrays to a model's inputs: names, types, shapes, finite values."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lcpaq_onnx.errors import CalibrationError
from lcpaq_onnx.runtime.session import TensorSpec

__all__ = ["Feed", "fit_feed", "match_names", "matching_note"]

Feed = dict[str, np.ndarray]


def match_names(available: Collection[str], inputs: Sequence[TensorSpec], where: str) -> dict[str, str]:
    """Input name -> name of the array that feeds it.

    Names must be equal; only a sole array may have any name, when the model has one input. Others are left out.
    Raises CalibrationError, naming ``where`` (the file or object), when an input has no array.
    """
    if len(inputs) == 1 and len(available) == 1:
        return {inputs[0].name: next(iter(available))}
    missing = [spec.name for spec in inputs if spec.name not in available]
    if not missing:
        return {spec.name: spec.name for spec in inputs}
    near = difflib.get_close_matches(missing[0], available, n=1)
    raise CalibrationError(
        f"{where} has no array for input {', '.join(map(repr, missing))}; it has {sorted(available) or 'none'}",
        hint=f"rename '{near[0]}' to '{missing[0]}'" if near else "name the arrays as the model's inputs",
    )


def matching_note(available: Collection[str], matched: Mapping[str, str]) -> str:
    """What a reader should know of the match: arrays left out, and one that is fed under another name."""
    notes = [f"'{array}' feeds '{name}'" for name, array in matched.items() if array != name]
    ignored = sorted(set(available) - set(matched.values()))
    return "; ".join(notes + [f"ignored: {', '.join(ignored)}"] * bool(ignored))


def fit_feed(arrays: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec], where: str) -> Feed:
    """The feed of one sample in the inputs' order and types. ``where`` names file and sample in errors.

    Raises CalibrationError for a missing input, a type that cannot be converted without a decision of the user, a
    rank or dimension that the model does not take, and for NaN or infinite values.
    """
    names = match_names(arrays.keys(), inputs, where)
    return {spec.name: _fit_array(arrays[names[spec.name]], spec, f"{where}, input '{spec.name}'") for spec in inputs}


def _fit_array(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    _check_shape(array, spec, where)
    fitted = array if array.dtype == spec.dtype else _cast(array, spec, where)
    if _is_float(spec.dtype) and not np.isfinite(fitted).all():
        bad = int(np.count_nonzero(~np.isfinite(fitted)))
        raise CalibrationError(
            f"{where}: {bad} of {fitted.size} values are NaN or infinite in {spec.dtype.name}",
            hint="drop or repair that sample; one such value spoils every range measured from it",
        )
    return fitted


def _check_shape(array: np.ndarray, spec: TensorSpec, where: str) -> None:
    if not spec.shape:  # a scalar or any rank, see TensorSpec
        return
    fits = array.ndim == len(spec.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
    )
    if fits:
        return
    hint = f"save arrays of shape [{', '.join('?' if d is None else str(d) for d in spec.shape)}]"
    if array.ndim == len(spec.shape) - 1:
        hint = "the batch axis is missing: feed x[None]"
    elif array.ndim == len(spec.shape) + 1:
        hint = "there is one axis too many: save each sample as one .npz file of a folder, without that axis"
    elif array.ndim == len(spec.shape) and array.shape[0] == 1 and isinstance(spec.shape[0], int) and spec.shape[0] > 1:
        hint = f"the model has a fixed batch of {spec.shape[0]}: save a folder of .npz files, each one complete feed"
    raise CalibrationError(f"{where}: shape {list(array.shape)} where the model takes {spec}", hint=hint)


def _cast(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Float to float and text to text; integer to integer when no value changes; all else is the user's decision."""
    if array.dtype.kind in "US" and spec.dtype.kind == "U":
        return array.astype(np.str_)
    if _is_float(array.dtype) and _is_float(spec.dtype):
        with np.errstate(over="ignore"):  # an overflow to infinity is reported as such
            return array.astype(spec.dtype)
    if array.dtype.kind in "iu" and spec.dtype.kind in "iu":
        cast = array.astype(spec.dtype)
        if np.array_equal(cast, array):
            return cast
        raise CalibrationError(
            f"{where}: values from {array.min()} to {array.max()} do not fit {spec.dtype.name}",
            hint="check that the array belongs to this input",
        )
    hint = f"convert them yourself: x.astype('{spec.dtype.name}')"
    if array.dtype.hasobject:
        hint = "save a plain numeric array; arrays of Python objects are never read"
    elif _is_float(spec.dtype) and array.dtype.kind in "iu":
        hint = f"apply the model's preprocessing first, e.g. (x / 255).astype('{spec.dtype.name}')"
    raise CalibrationError(f"{where}: {array.dtype.name} values where the model takes {spec.dtype.name}", hint=hint)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))  # ml_dtypes' floats are of kind V
