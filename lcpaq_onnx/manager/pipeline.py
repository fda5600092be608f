"""Pipelines as text: ``fold-batch-norm,insert-qdq{weights-only=true axes=1,2,3}`` to a tuple of steps and back.

A step is a rewriting pass, or an analysis: then it is computed, and ``--print-after`` prints it.
``parse_pipeline(pipeline_text(steps), registry) == steps``, so a line of a log is a runnable command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lcpaq_onnx.errors import PassError
from lcpaq_onnx.manager.analysis import AnyAnalysis
from lcpaq_onnx.manager.options import build, nearest_hint
from lcpaq_onnx.manager.pass_base import RewritePass
from lcpaq_onnx.manager.registry import Registry
from lcpaq_onnx.manager.spec_text import parse_specs

__all__ = ["Step", "check_names", "parse_pipeline", "pipeline_text", "stop_after"]

Step = RewritePass | AnyAnalysis


def parse_pipeline(text: str, registry: Registry) -> tuple[Step, ...]:
    """The steps that ``text`` spells. Raises PassError for bad syntax, an unknown name, or options that do not fit."""
    return tuple(build(registry.load(spec.name), spec) for spec in parse_specs(text))


def pipeline_text(steps: Iterable[Step]) -> str:
    """Inverse of ``parse_pipeline``."""
    return ",".join(map(str, steps))


def stop_after(steps: Sequence[Step], name: str) -> tuple[Step, ...]:
    """The steps up to the first one named ``name``. Raises PassError when there is none."""
    check_names(steps, [name])
    end = next(index for index, step in enumerate(steps) if step.name == name)
    return tuple(steps[: end + 1])


def check_names(steps: Iterable[Step], names: Iterable[str]) -> None:
    """Raises PassError for a name that no step has: a selector must not silently match nothing."""
    known = {step.name for step in steps}
    for name in names:
        if name not in known:
            raise PassError(f"no step of this pipeline is named '{name}'", hint=nearest_hint(name, known))
