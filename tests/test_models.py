"""The models this repository ships: that they are what models/README.md says, and fit for the tests that use them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import NodeProto

MODELS = Path(__file__).parents[1] / "models"
DATA_FILES = ("digits_calibration.npz", "digits_evaluation.npz")
FILE_LIMIT_BYTES = 400_000
DATA_LIMIT_BYTES = 150_000


@dataclass(frozen=True)
class Promise:
    """How many nodes of each op a model holds: what its README row stands for."""

    name: str
    node_counts: dict[str, int]


PROMISES = (
    Promise("digits_resnet", {"Conv": 10, "BatchNormalization": 10, "Relu": 9, "Add": 4, "GlobalAveragePool": 1}),
    Promise("digits_mobile", {"Conv": 23, "BatchNormalization": 17, "HardSwish": 12, "HardSigmoid": 3, "Gemm": 1}),
    Promise("digits_vit", {"LayerNormalization": 7, "Softmax": 3, "Erf": 3, "MatMul": 24, "Conv": 1, "Gemm": 1}),
)
NAMES = tuple(promise.name for promise in PROMISES)
each_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def session(name: str) -> ort.InferenceSession:
    return ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])


def load(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / f"{name}.onnx")


def evaluation() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(MODELS / "digits_evaluation.npz") as data:
        return data["image"], data["label"]


def test_every_model_file_is_tested() -> None:
    assert sorted(path.stem for path in MODELS.glob("*.onnx")) == sorted(NAMES)


@each_model
def test_is_small_and_valid(name: str) -> None:
    assert (MODELS / f"{name}.onnx").stat().st_size <= FILE_LIMIT_BYTES
    onnx.checker.check_model(load(name), full_check=True)


@each_model
def test_takes_images_and_gives_logits_for_any_batch(name: str) -> None:
    graph = load(name).graph
    (image,), (logits,) = graph.input, graph.output
    assert (image.name, logits.name) == ("image", "logits")
    batch, *rest = image.type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [dim.dim_value for dim in rest] == [1, 8, 8]


@each_model
def test_holds_all_its_weights(name: str) -> None:
    assert not any(onnx.external_data_helper.uses_external_data(weight) for weight in load(name).graph.initializer)


@pytest.mark.parametrize("promise", PROMISES, ids=NAMES)
def test_has_the_ops_it_stands_for(promise: Promise) -> None:
    ops = [node.op_type for node in load(promise.name).graph.node]
    assert {op: ops.count(op) for op in promise.node_counts} == promise.node_counts


def test_mobile_has_depthwise_convolutions() -> None:
    graph = load("digits_mobile").graph
    channels = {weight.name: weight.dims[0] for weight in graph.initializer}

    def groups(node: NodeProto) -> int:
        return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)

    convs = [node for node in graph.node if node.op_type == "Conv"]
    depthwise = [node for node in convs if groups(node) > 1]
    assert len(depthwise) == 5
    assert all(groups(node) == channels[node.input[1]] for node in depthwise)


@each_model
def test_classifies_digits_it_never_saw(name: str) -> None:
    image, label = evaluation()
    (logits,) = session(name).run(["logits"], {"image": image})
    assert np.mean(logits.argmax(axis=1) == label) >= 0.96


@each_model
def test_batch_equals_single_runs(name: str) -> None:
    image = evaluation()[0][:7]
    (together,) = session(name).run(["logits"], {"image": image})
    alone = np.concatenate([session(name).run(["logits"], {"image": row[None]})[0] for row in image])
    # Kernels may sum in another order for another batch: some float32 roundings (6e-8 relative) of logits of size ~10.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", [*(f"{name}.onnx" for name in NAMES), *DATA_FILES])
def test_names_no_path_of_the_machine_that_made_it(file: str) -> None:
    content = (MODELS / file).read_bytes()
    assert not [path for path in (b"/tmp/", b"/work/", b"/root/", b"/home/", b"site-packages") if path in content]


def test_data_files_are_small_and_apart() -> None:
    assert sum((MODELS / file).stat().st_size for file in DATA_FILES) <= DATA_LIMIT_BYTES
    image, label = evaluation()
    with np.load(MODELS / "digits_calibration.npz") as data:
        calibration = data["image"]
    assert calibration.shape == (256, 1, 8, 8)
    assert image.shape == (450, 1, 8, 8)
    for array in (calibration, image):
        assert array.dtype == np.float32
        assert array.min() == 0
        assert array.max() == 1
        assert np.array_equal(array * 16, np.rint(array * 16))
    assert set(label.tolist()) == set(range(10))
    assert not {row.tobytes() for row in calibration} & {row.tobytes() for row in image}
