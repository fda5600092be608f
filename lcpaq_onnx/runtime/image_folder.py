"""Calibration from a folder of images, preprocessed as a small TOML file says (``preprocess.toml``).

::

    size = [224, 224]               # height, width fed to the model
    fit = "crop"                    # crop: cut the centre; stretch: resize to size; pad: keep all, fill the border
    resize = 256                    # with crop: the shorter side before it; left out: the least that covers size
    pad_value = 0                   # with pad: the border, 0..255
    interpolation = "bilinear"      # nearest, bilinear, bicubic, lanczos
    color_order = "RGB"             # RGB, BGR, GRAY
    layout = "NCHW"                 # NCHW, NHWC
    scale = 0.00392156862745098     # fed value = (pixel * scale - mean) / std; pixel 0..255; left out: 1/255
    mean = [0.485, 0.456, 0.406]    # per channel in color_order, or one number; left out: 0
    std = [0.229, 0.224, 0.225]     # the same; left out: 1
    images = "."                    # folder of the images, relative to this file

Only ``size`` is required. Images are taken in the order of their names, subfolders are not read, and EXIF rotation is
not applied, as in the usual training pipelines.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from lcpaq_onnx.errors import CalibrationError
from lcpaq_onnx.runtime.sample_sources import Sample, natural_order
from lcpaq_onnx.runtime.session import TensorSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SPEC_NAME", "ImageSource", "Preprocess", "open_images"]

SPEC_NAME = "preprocess.toml"
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Preprocess(BaseModel):
    """The schema of ``preprocess.toml``; the module's text explains the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: tuple[PositiveInt, PositiveInt]
    fit: Literal["crop", "stretch", "pad"] = "crop"
    resize: PositiveInt | None = None
    pad_value: int = Field(0, ge=0, le=255)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    color_order: Literal["RGB", "BGR", "GRAY"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    scale: PositiveFloat = 1 / 255
    mean: float | tuple[float, ...] = 0.0
    std: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    images: str = "."

    @model_validator(mode="after")
    def _agree(self) -> Preprocess:
        channels = 1 if self.color_order == "GRAY" else 3
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(f"{name} has {len(value)} values for {channels} channels ({self.color_order})")
        if self.resize is not None and (self.fit != "crop" or self.resize < max(self.size)):
            raise ValueError("resize is the shorter side before a crop: it needs fit = 'crop' and at least max(size)")
        return self

    def apply(self, image: Image.Image) -> np.ndarray:
        """The float32 array [1, C, H, W] or [1, H, W, C] that is fed for one image."""
        placed = self._place(image.convert("L" if self.color_order == "GRAY" else "RGB"))
        pixels = np.asarray(placed, np.float32).reshape(*self.size, -1)
        if self.color_order == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (pixels * np.float32(self.scale) - mean) / std
        axes = (2, 0, 1) if self.layout == "NCHW" else (0, 1, 2)
        return np.ascontiguousarray(values.transpose(axes)[None])

    def _place(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        method = _FILTERS[self.interpolation]
        if self.fit == "stretch":
            return image.resize((width, height), method)
        if self.fit == "pad":
            color = self.pad_value if image.mode == "L" else (self.pad_value,) * 3
            return ImageOps.pad(image, (width, height), method, color)
        if self.resize is None:
            return ImageOps.fit(image, (width, height), method)
        # Rounding as torchvision's Resize and CenterCrop do, so that their numbers come out.
        shorter, longer = sorted(image.size)
        scaled = int(self.resize * longer / shorter)
        image = image.resize((self.resize, scaled) if image.width <= image.height else (scaled, self.resize), method)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class ImageSource:
    """Images of a folder, decoded one at a time."""

    files: tuple[Path, ...]
    preprocess: Preprocess
    input: TensorSpec
    note: str = ""

    @property
    def description(self) -> str:
        return f"images {self.files[0].parent.name}"

    @property
    def count(self) -> int:
        return len(self.files)

    def samples(self) -> Iterator[Sample]:
        for path in self.files:
            yield Sample(f"'{path}'", {self.input.name: self._as_input(_read(path, self.preprocess), path)})

    def _as_input(self, values: np.ndarray, path: Path) -> np.ndarray:
        if self.input.dtype.kind not in "iu":
            return values
        if not np.array_equal(values, np.rint(values)):
            raise CalibrationError(
                f"'{path}': the model takes {self.input.dtype.name} and preprocessing gives fractions",
                hint=f"set scale = 1 and whole-number means in {SPEC_NAME}",
            )
        return values.astype(np.int64)  # whether they fit the input's type is checked like for any other data


def open_images(spec_path: Path, inputs: Sequence[TensorSpec]) -> ImageSource:
    """Read ``preprocess.toml`` and list its images.

    Raises CalibrationError: the file is malformed or has unknown keys, there are no images, or the model has more
    than one input.
    """
    preprocess = _read_spec(spec_path)
    if len(inputs) != 1:
        raise CalibrationError(
            f"images can feed a model with one input; this one has {[spec.name for spec in inputs]}",
            hint="preprocess them yourself into a folder of .npz files, one complete feed each",
        )
    folder = spec_path.parent / preprocess.images
    files = sorted((p for p in folder.glob("[!.]*") if p.suffix.lower() in _SUFFIXES), key=natural_order)
    if not files:
        raise CalibrationError(
            f"no images in '{folder}'",
            hint=f"put them there (subfolders are not read), or set images = \"folder\" in '{spec_path}'",
        )
    return ImageSource(tuple(files), preprocess, inputs[0])


def _read_spec(path: Path) -> Preprocess:
    try:
        return Preprocess.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        known = sorted(Preprocess.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        raise CalibrationError(
            f"'{path}': {key}: {problem['msg']}" if key else f"'{path}': {problem['msg']}",
            hint=f"did you mean '{near[0]}'?" if near and key not in known else f"the keys are {', '.join(known)}",
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CalibrationError(f"cannot read '{path}': {error}", hint="it must be a TOML file") from error


def _read(path: Path, preprocess: Preprocess) -> np.ndarray:
    try:
        with Image.open(path) as image:
            # Pillow clips wider pixels to 255 instead of scaling them.
            if image.mode[0] in "IF":
                raise CalibrationError(f"'{path}' has more than 8 bits per channel", hint="convert it to 8 bits")
            return preprocess.apply(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"cannot read image '{path}': {error}", hint="remove or replace it") from error
