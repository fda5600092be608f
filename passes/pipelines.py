"""The pipelines of the compiler, as data."""

from __future__ import annotations

from lcpaq_onnx.manager.pass_base import RewritePass

from .rewrite.canonical_names import CanonicalNames
from .rewrite.fold_batch_norm import FoldBatchNorm
from .rewrite.fold_constants import FoldConstants
from .rewrite.inline_if import InlineIf
from .rewrite.insert_qdq import InsertQdq
from .rewrite.look_up_integers import LookUpIntegers
from .rewrite.pack_weights import PackWeights
from .rewrite.plain_products import PlainProducts
from .rewrite.quantize_biases import QuantizeBiases
from .rewrite.raise_opset import RaiseOpset
from .rewrite.remove_unused import RemoveUnused
from .rewrite.round_compensated import RoundCompensated
from .rewrite.round_nearest import RoundNearest
from .rewrite.separate_shared_biases import SeparateSharedBiases
from .rewrite.stamp_plan import StampPlan

__all__ = ["PREPARE", "QUANTIZE", "raise_to"]

PREPARE: tuple[RewritePass, ...] = (
    CanonicalNames(),  # first: notes and new names then say which node
    FoldConstants(),
    InlineIf(),
    FoldConstants(),  # what a branch computed from constants
    PlainProducts(),
    FoldBatchNorm(),
    SeparateSharedBiases(),
    RemoveUnused(),
)
"""Exposes weights and names everything; the model computes the same."""

QUANTIZE: tuple[RewritePass, ...] = (
    RoundCompensated(),
    RoundNearest(),
    LookUpIntegers(),
    QuantizeBiases(),
    InsertQdq(),
    PackWeights(),
    StampPlan(),
)
"""Applies a plan to a prepared model of the plan's opset; decides nothing."""


def raise_to(opset: int) -> tuple[RewritePass, ...]:
    """Raise a prepared model to ``opset``; constants that the converter adds are folded, its other nodes get names."""
    return (RaiseOpset(to=opset), FoldConstants(), CanonicalNames())
