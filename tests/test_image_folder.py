"""Images as calibration data: the numbers against Pillow and numpy by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lcpaq_onnx.errors import CalibrationError
from lcpaq_onnx.runtime.calibration import open_calibration
from lcpaq_onnx.runtime.session import TensorSpec

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
NCHW = [TensorSpec("pixels", np.dtype(np.float32), ("N", "C", "H", "W"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """img2 (48x32) and img10 (30x40) in colour, a grey one, and files that are no images."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / "img2.png")
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "img10.png")
    Image.fromarray(rng.integers(0, 256, (33, 33), np.uint8)).save(tmp_path / "img30.PNG")
    (tmp_path / "labels.csv").write_text("a")
    (tmp_path / "._img2.png").write_text("a")
    return tmp_path


def read(folder: Path, text: str, inputs: list[TensorSpec] = NCHW) -> list[np.ndarray]:
    (folder / "preprocess.toml").write_text(text)
    return [feed[inputs[0].name] for feed in open_calibration(folder, inputs)]


def images(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / name).convert("RGB") for name in ("img2.png", "img10.png", "img30.PNG")]


def test_resize_and_centre_crop_as_imagenet_does(folder: Path) -> None:
    found = read(
        folder,
        "size = [16, 16]\nresize = 20\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n",
    )
    for array, image, resized in zip(found, images(folder), [(30, 20), (20, 26), (20, 20)], strict=True):
        image = image.resize(resized, Image.Resampling.BILINEAR)
        left, top = round((resized[0] - 16) / 2), round((resized[1] - 16) / 2)
        pixels = np.asarray(image, np.float32)[top : top + 16, left : left + 16] / 255
        expected = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
        assert array.shape == (1, 3, 16, 16)
        np.testing.assert_allclose(array, expected, atol=1e-6)  # pixel * (1/255) and pixel / 255 differ in the last bit


def test_stretch_bgr_nhwc_in_pixel_units(folder: Path) -> None:
    found = read(
        folder,
        """size = [10, 12]
        fit = "stretch"
        interpolation = "bicubic"
        color_order = "BGR"
        layout = "NHWC"
        scale = 1
        mean = [104, 117, 123]""",
    )
    for array, image in zip(found, images(folder), strict=True):
        pixels = np.asarray(image.resize((12, 10), Image.Resampling.BICUBIC), np.float32)[..., ::-1]
        np.testing.assert_array_equal(array, (pixels - np.float32([104, 117, 123]))[None], strict=True)


def test_pad_and_cover(folder: Path) -> None:
    padded = read(folder, 'size = [24, 24]\nfit = "pad"\npad_value = 114\nscale = 1\n')
    assert padded[0].shape == (1, 3, 24, 24)
    assert (padded[0][0, :, [0, -1], :] == 114).all()  # 48x32 into 24x24: 24x16 with 4 rows above and below
    np.testing.assert_array_equal(
        padded[0][0, :, 4:20].transpose(1, 2, 0), images(folder)[0].resize((24, 16), Image.Resampling.BILINEAR)
    )
    covered = read(folder, "size = [24, 24]\nscale = 1\n")
    expected = ImageOps.fit(images(folder)[1], (24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(covered[1][0].transpose(1, 2, 0), expected)


def test_grey(folder: Path) -> None:
    found = read(folder, 'size = [33, 33]\nfit = "stretch"\ncolor_order = "GRAY"\nmean = 0.5\nstd = 0.5\n')
    expected = np.asarray(Image.open(folder / "img30.PNG"), np.float32) / 127.5 - 1
    assert found[2].shape == (1, 1, 33, 33)
    np.testing.assert_allclose(found[2][0, 0], expected, atol=1e-6)


def test_integer_inputs_take_whole_pixels(folder: Path) -> None:
    spec = [TensorSpec("p", np.dtype(np.uint8), ("N", 32, 48, 3))]
    text = 'size = [32, 48]\nfit = "stretch"\nlayout = "NHWC"\n'
    found = read(folder, text + "scale = 1", spec)
    np.testing.assert_array_equal(found[0][0], images(folder)[0], strict=False)
    assert found[0].dtype == np.uint8
    with pytest.raises(CalibrationError, match=r"takes uint8 and preprocessing gives fractions\n  try: set scale = 1"):
        read(folder, text, spec)
    with pytest.raises(CalibrationError, match="do not fit uint8"):
        read(folder, text + "scale = 1\nmean = 128", spec)


def test_spec_file_may_lie_elsewhere(folder: Path) -> None:
    spec = folder / "sub" / "eval.toml"
    spec.parent.mkdir()
    spec.write_text('size = [8, 8]\nimages = ".."')
    data = open_calibration(spec, NCHW)
    assert data.sample_count == 3
    assert len(list(data)) == 3
    spec.write_text("size = [8, 8]")
    with pytest.raises(CalibrationError, match="no images in"):
        open_calibration(spec, NCHW)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size = [8, 8]\nmeans = 1", r"means.*\n  try: did you mean 'mean'\?"),
        ("mean = 1", "size: Field required"),
        ("size = [8, 8]\nmean = [1, 2]", r"mean has 2 values for 3 channels \(RGB\)"),
        ("size = [8, 8]\nresize = 7", "resize is the shorter side"),
        ("size = [8, 8]\nstd = 0", "std"),
        ("size = [8, 8]\npad_value = 256", "pad_value"),
        ("size = [8, 8]\nlayout = 'CHWN'", "layout: Input should be 'NCHW' or 'NHWC'"),
        ("size = ", "cannot read .*preprocess.toml"),
    ],
)
def test_malformed_specs(folder: Path, text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read(folder, text)


def test_unreadable_images_and_unfit_models(folder: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"shape \[1, 3, 8, 8\] where the model takes pixels: float32\[N,3,9,9\]"
    ):
        read(folder, "size = [8, 8]", [TensorSpec("pixels", np.dtype(np.float32), ("N", 3, 9, 9))])
    with pytest.raises(CalibrationError, match="images can feed a model with one input"):
        read(folder, "size = [8, 8]", NCHW * 2)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "img1.png")
    with pytest.raises(CalibrationError, match="more than 8 bits"):
        read(folder, "size = [8, 8]")
    (folder / "img1.png").write_bytes((folder / "img2.png").read_bytes()[:300])
    with pytest.raises(CalibrationError, match=r"cannot read image .*img1\.png"):
        read(folder, "size = [8, 8]")
    (folder / "preprocess.toml").unlink()
    with pytest.raises(CalibrationError, match=r"images with preprocess\.toml"):
        open_calibration(folder, NCHW)
