"""What decisions do to the output together: the loss of a whole plan from the output changes of single ones.

A decision's embedding ``e`` holds, per sample, the change of the output in the loss' metric: ``½‖e‖²`` is the loss of
that change. Output changes add up to first order, so a plan loses ``½‖Σ e‖²`` = xᵀGx, where the plain sum over
decisions is the diagonal of G alone. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcpaq_onnx.errors import UsageError

__all__ = ["Entry", "Interactions", "interactions_of", "steadied_interactions"]

Entry = tuple[str, str]
"""A decision's name and the key of what was measured: ``w4`` for a layer's stored bits (``w4`` and ``w4a8`` round
alike), ``a8`` for an activation group."""

# Bounds the memory of the product: 400 entries of 128 numbers take 26 MB at a time.
_SAMPLES_AT_A_TIME = 64
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Interactions:
    """``gram[a, b]`` is half the mean over samples of ``e_a · e_b``; [entries, entries], symmetric, in units of loss.

    Raises UsageError when an entry is double or ``gram`` has another shape, is not finite or not symmetric.
    """

    entries: tuple[Entry, ...]
    gram: NDArray[np.float64]

    def __post_init__(self) -> None:
        count = len(self.entries)
        if len(self.row_of) < count:
            raise UsageError("an entry of the interactions is double", hint="measure each decision and width once")
        if self.gram.shape != (count, count):
            message = f"{count} entries need a square of interactions, not {self.gram.shape}"
            raise UsageError(message, hint="make them with interactions_of")
        if not (np.isfinite(self.gram).all() and np.array_equal(self.gram, self.gram.T)):
            message = "interactions are not finite or not symmetric"
            raise UsageError(message, hint="leave out entries whose outputs are not finite")

    @cached_property
    def row_of(self) -> dict[Entry, int]:
        """Row of ``gram`` by entry."""
        return {entry: row for row, entry in enumerate(self.entries)}

    def loss_of(self, chosen: Iterable[Entry]) -> float:
        """Predicted loss of all ``chosen`` together, >= 0. Raises UsageError on an entry without an embedding."""
        chosen = list(chosen)
        unknown = [entry for entry in chosen if entry not in self.row_of]
        if unknown:
            name, key = unknown[0]
            raise UsageError(f"'{name}' in {key} has no embedding", hint="count its loss from the error table")
        rows = [self.row_of[entry] for entry in chosen]
        # Changes that cancel can leave less than nothing by rounding.
        return max(float(self.gram[np.ix_(rows, rows)].sum()), 0.0)


def interactions_of(embeddings: Mapping[Entry, NDArray[np.float32]]) -> Interactions:
    """Interactions of all ``embeddings``, each [samples, numbers] of one shape, in their order.

    Products are float64: what is left after changes cancel is small. Raises UsageError on shapes that differ, on none
    or no sample, and on values that are not finite.
    """
    if not embeddings:
        return Interactions((), np.zeros((0, 0)))
    shapes = {embedding.shape for embedding in embeddings.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 2 or not shape[0]:
        listed = ", ".join(map(str, sorted(shapes)))
        raise UsageError(
            f"embeddings have shapes {listed}, not one [samples, numbers]",
            hint="embed the same samples for every entry",
        )
    unusable = next((entry for entry, embedding in embeddings.items() if not np.isfinite(embedding).all()), None)
    if unusable is not None:
        message = f"the embedding of '{unusable[0]}' in {unusable[1]} is not finite"
        raise UsageError(message, hint="leave the entry out")
    gram = np.zeros((len(embeddings), len(embeddings)))
    for start in range(0, shape[0], _SAMPLES_AT_A_TIME):
        parts = [e[start : start + _SAMPLES_AT_A_TIME].ravel() for e in embeddings.values()]
        slab = np.array(parts, np.float64)
        gram += slab @ slab.T
    gram *= 0.5 / shape[0]
    # Not every BLAS gives both triangles the same bits.
    return Interactions(tuple(embeddings), (gram + gram.T) / 2)


def steadied_interactions(embeddings: Mapping[Entry, NDArray[np.float32]]) -> Interactions:
    """``interactions_of``, the correlations of different decisions drawn to their mean by the noise of few samples.

    What is kept of a correlation's own part is how far the correlations that every other sample shows are those that
    the rest shows, stepped up to all samples by Spearman's and Brown's formula. Fewer than 4 samples show none.
    """
    whole = interactions_of(embeddings)
    names = np.array([name for name, _ in whole.entries])
    others = names[:, None] != names[None, :]
    if not others.any() or min(len(rows) for rows in embeddings.values()) < 4:
        return Interactions(whole.entries, np.diag(np.diagonal(whole.gram)))
    halves = [interactions_of({e: rows[first::2] for e, rows in embeddings.items()}) for first in (0, 1)]
    first, second = (_correlations(half.gram)[others] for half in halves)
    shared = max(float(np.cov(first, second, bias=True)[0, 1] / (first.var() + second.var() + _TINY) * 2), 0.0)
    kept = 2 * shared / (1 + shared)
    scale, correlations = np.sqrt(np.diagonal(whole.gram)), _correlations(whole.gram)
    drawn = kept * correlations + (1 - kept) * correlations[others].mean()
    gram = np.outer(scale, scale) * np.where(others, drawn, correlations)
    np.fill_diagonal(gram, np.diagonal(whole.gram))
    return Interactions(whole.entries, (gram + gram.T) / 2)


def _correlations(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.sqrt(np.diagonal(gram))
    product = np.outer(scale, scale)
    correlations: NDArray[np.float64] = np.divide(gram, product, out=np.zeros_like(gram), where=product > 0)
    return correlations
