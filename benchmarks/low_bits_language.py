"""Transformers at 8 bits and below: a sentence encoder, and a decoder that runs whole texts and step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from assets_tasks import Assets, Feed
from claims import Claim
from curvature_part import Part
from judging import open_model
from low_bits_files import WIDTHS, Made, Recipe, Workshop, claim, joined, run_recipes

from lcpaq_onnx import Settings

__all__ = ["run_minilm", "run_stories"]

_SENTENCES = 128
_EVERYTHING = 1 << 20
# As long as the texts that judge: positions that were never seen have other keys.
_TEXTS, _TOKENS, _EVERY_STEP = 32, 256, 8
_CACHED = "stories260k_kv.onnx"
_FIRST_TOKEN = 1


def run_minilm(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """Spearman correlation with people's scores of pairs; the first pairs calibrate and the others judge."""
    task = assets.task("sentences", 32 if quick else _SENTENCES, 200 if quick else _EVERYTHING)
    shop = Workshop(assets, task, folder, timing_s=1.0 if quick else 3.0)

    def int8(made: Made) -> list[Claim]:
        return [claim(made, "Spearman lost", made.float_metric - made.metric, 0.005)]

    def four(made: Made) -> list[Claim]:
        return [
            claim(made, "Spearman lost", made.float_metric - made.metric, 0.01),
            claim(made, "size", made.size_ratio, 0.16, "float file"),
        ]

    recipes = [
        (Recipe("w8a8", weights=(8,), activations=(8, 32)), int8),
        (Recipe("4 bits", ("bits<=4",), WIDTHS), four),
    ]
    return run_recipes(shop, recipes)


def run_stories(assets: Assets, folder: Path, *, quick: bool) -> Part:
    """All texts that there are judge, so the float model writes those that calibrate: tokens drawn from its own
    predictions (after LLM-QAT, Liu et al. 2023).
    """
    task = assets.task("stories", 0, _EVERYTHING)
    decoder = CachedDecoder(task.model.with_name(_CACHED))
    written = [decoder.write(_TOKENS, np.random.default_rng(seed)) for seed in range(8 if quick else _TEXTS)]
    whole = replace(task, calibration=[{"input_ids": np.array([tokens], np.int64)} for tokens, _ in written])
    steps = [feed for _, feeds in written for feed in feeds[::_EVERY_STEP]]
    cached = replace(task, model=decoder.model, calibration=steps, evaluation=[written[0][1][-1]])
    timing_s = 1.0 if quick else 3.0

    def by_steps(model: Path) -> list[np.ndarray]:
        return [CachedDecoder(model).read(tokens) for tokens in task.labels]

    def claims_of(limit: float) -> Callable[[Made], list[Claim]]:
        return lambda made: [claim(made, "perplexity / float", made.metric / made.float_metric, limit)]

    # Weights alone: a step of decoding reads all of them for one row of activations.
    settings = Settings(loss=_divergence)
    recipes = [
        (Recipe("8 bits", weights=(8,), activations=(32,), settings=settings), claims_of(1.01)),
        (Recipe("4 bits", ("bits<=4",), WIDTHS, (32,), "error", settings), claims_of(1.05)),
    ]
    shops = [
        (Workshop(assets, whole, folder, timing_s=timing_s), ""),
        (Workshop(assets, cached, folder, timing_s=timing_s, answer=by_steps), "cached "),
    ]
    return joined(
        run_recipes(shop, [(replace(recipe, name=prefix + recipe.name), of) for recipe, of in recipes])
        for shop, prefix in shops
    )


def _divergence(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> np.ndarray:
    """KL divergence of what is expected next, in nats, a mean over positions: of each text. What a step adds to the
    caches is read by all later steps, so its squared error over its square counts as well.
    """
    p, q = (_log_softmax(outputs["logits"]) for outputs in (before, after))
    loss = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0).mean(axis=-1)
    for name in (name for name in before if name.startswith("present")):
        old, new = (outputs[name][..., -1, :].astype(np.float64) for outputs in (before, after))
        loss = loss + ((new - old) ** 2).sum() / (old**2).sum()
    return loss


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class CachedDecoder:
    """A decoder of one token at a time; ``past_…`` inputs take what the ``present_…`` outputs gave, along axis 3."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._session = open_model(model)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._empty = {
            spec.name: np.zeros(
                [size if isinstance(size, int) else int(at == 1) for at, size in enumerate(spec.shape)], np.float32
            )
            for spec in self._session.get_inputs()
            if spec.name.startswith("past")
        }

    def read(self, tokens: list[int]) -> np.ndarray:
        """Logits after each token: shape [1, tokens, vocabulary]."""
        cache, logits = self._empty, []
        for token in tokens:
            _, found, cache = self._step(token, cache)
            logits.append(found)
        return np.concatenate(logits, axis=1)

    def write(self, count: int, random: np.random.Generator) -> tuple[list[int], list[Feed]]:
        """A text of ``count`` tokens, each drawn from what the model expects, and the feed of every step."""
        cache, token = self._empty, _FIRST_TOKEN
        tokens: list[int] = []
        feeds: list[Feed] = []
        for _ in range(count):
            feed, logits, cache = self._step(token, cache)
            tokens.append(token)
            feeds.append(feed)
            weights = np.exp(logits[0, -1].astype(np.float64) - logits.max())
            token = int(random.choice(len(weights), p=weights / weights.sum()))
        return tokens, feeds

    def _step(self, token: int, cache: Feed) -> tuple[Feed, np.ndarray, Feed]:
        feed = {"input_ids": np.array([[token]], np.int64), **cache}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        return feed, found["logits"], {name: found[name.replace("past", "present", 1)] for name in self._empty}
