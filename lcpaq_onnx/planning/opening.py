"""From what a user gives, a model and data, to the bench where they are measured."""

from __future__ import annotations

from lcpaq_onnx.graph import graph_io
from lcpaq_onnx.graph.graph_io import Graph
from lcpaq_onnx.manager.analysis import Progress, SilentProgress
from lcpaq_onnx.planning.bench import Bench, Settings, SourceModel
from lcpaq_onnx.planning.replanning import prepare
from lcpaq_onnx.runtime.calibration import CalibrationData, Source, open_calibration
from lcpaq_onnx.runtime.resources import Resources
from lcpaq_onnx.runtime.session import Session, SessionOptions

__all__ = ["open_bench", "open_data"]


def open_data(source: Graph, calibration: Source, samples: int | None) -> CalibrationData:
    """Data for the model's inputs. Loading the model here also tells early when it cannot run."""
    session = Session(graph_io.to_proto(source), SessionOptions("basic"), base_dir=source.base_dir)
    return open_calibration(calibration, session.inputs, samples=samples)


def open_bench(
    source: Graph,
    calibration: Source,
    samples: int | None,
    settings: Settings,
    progress: Progress | None,
    resources: Resources,
) -> Bench:
    """The prepared model beside its data."""
    data = open_data(source, calibration, samples)
    identity = SourceModel(graph_io.content_sha256(source), graph_io.serialized_size(source))
    return Bench(prepare(source), identity, data, settings, progress or SilentProgress(), resources)
