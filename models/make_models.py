"""Makes every file of this folder again: trains the digit classifiers and writes them as ONNX, with their data.

    python models/make_models.py [--only digits_vit] [--output FOLDER]

Needs the extra `models` (torch, scikit-learn). One thread and fixed seeds: the same machine and versions give the same
bytes; another processor may round otherwise, so weights may differ in their last digits.
"""

import argparse
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from networks import NETWORKS
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SEED = 2024
EVALUATION_SAMPLES = 450
CALIBRATION_SAMPLES = 256
BATCH = 64
OPSET = 17  # the first with LayerNormalization as one node


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a network learns; the learning rate is the peak of a one-cycle schedule."""

    epochs: int
    learning_rate: float
    weight_decay: float


RECIPES = {
    "digits_resnet": Recipe(epochs=40, learning_rate=4e-3, weight_decay=1e-2),
    "digits_mobile": Recipe(epochs=60, learning_rate=4e-3, weight_decay=1e-2),
    "digits_vit": Recipe(epochs=100, learning_rate=2e-3, weight_decay=0.3),
}


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8], multiples of 1/16 in [0, 1]; labels int64 [N]."""

    train_image: NDArray[np.float32]
    train_label: NDArray[np.int64]
    test_image: NDArray[np.float32]
    test_label: NDArray[np.int64]


def load_data() -> Digits:
    """scikit-learn's copy of the digits, split once and for all with every class in proportion."""
    raw = load_digits()
    image = (raw.images[:, None] / 16).astype(np.float32)
    label = raw.target.astype(np.int64)
    parts = train_test_split(image, label, test_size=EVALUATION_SAMPLES, random_state=SEED, stratify=label)
    train_image, test_image, train_label, test_label = parts
    return Digits(train_image, train_label, test_image, test_label)


def write_data(digits: Digits, folder: Path) -> None:
    """Writes the first training images for calibration (the split has shuffled them) and the whole test split."""
    np.savez_compressed(folder / "digits_calibration.npz", image=digits.train_image[:CALIBRATION_SAMPLES])
    np.savez_compressed(folder / "digits_evaluation.npz", image=digits.test_image, label=digits.test_label)


def shifted(image: Tensor) -> Tensor:
    """Each image moved by its own random -1, 0 or 1 pixels down and right, zeros moving in; half the images stay."""
    count = image.shape[0]
    offset = torch.randint(-1, 2, (count, 2)) * (torch.rand(count, 1) < 0.5)
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    row = (torch.arange(8) + 1 - offset[:, :1])[:, :, None]
    column = (torch.arange(8) + 1 - offset[:, 1:])[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, row, column][:, None]


def train(name: str, digits: Digits) -> nn.Module:
    """A trained network in eval mode; the same name always starts from the same random state."""
    torch.manual_seed(SEED)
    recipe = RECIPES[name]
    network = NETWORKS[name]()
    image, label = torch.from_numpy(digits.train_image), torch.from_numpy(digits.train_label)
    batches = len(label) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, epochs=recipe.epochs, steps_per_epoch=batches
    )
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(label))[: batches * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(network(shifted(image[chosen])), label[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def export(name: str, network: nn.Module) -> onnx.ModelProto:
    """The network as ONNX with a free batch size, its batch normalisations kept as nodes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is the one that can leave BatchNormalization unfolded at this opset.
        warnings.simplefilter("ignore", DeprecationWarning)
        # Said of networks still in training; this one is in eval mode, where folding constants changes no parameter.
        warnings.filterwarnings("ignore", "It is recommended that constant folding be turned off", UserWarning)
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 8, 8),),
            file,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            # The network is in eval mode already; PRESERVE leaves it there and, unlike EVAL, fuses nothing.
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    model = onnx.load_from_string(file.getvalue())
    model.graph.name = name
    for node in model.graph.node:
        node.doc_string = ""  # may hold the source paths of the machine that exported
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: onnx.ModelProto, digits: Digits) -> float:
    """Share of the test split that ONNX Runtime classifies rightly, 0 to 1."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": digits.test_image})
    return float(np.mean(np.argmax(logits, axis=1) == digits.test_label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(NETWORKS), help="make this model; may be repeated")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    digits = load_data()
    write_data(digits, arguments.output)
    for name in arguments.only or NETWORKS:
        network = train(name, digits)
        model = export(name, network)
        path = arguments.output / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        parameters = sum(weight.numel() for weight in network.parameters())
        share = accuracy(model, digits)
        print(f"{name}: {parameters:,} parameters, {path.stat().st_size:,} bytes, accuracy {share:.2%}", flush=True)


if __name__ == "__main__":
    main()
