"""Shares and means with percentile bootstrap intervals that resample whole clusters (concepts, pictures), not items.

Questions about one picture rise and fall together; resampling them one by one would claim more certainty than
there is (Cameron, Gelbach and Miller 2008, "Bootstrap-based improvements for inference with clustered errors").

Three states: an item is right, wrong or not scored. Where some are not scored, an estimate is a range: from all of
them wrong to all of them right, and the interval covers both ends. `str(estimate)` never prints one bare number then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from isthmus.types import DataError

Right: TypeAlias = float | None
"""How right an item is, from 0 (False) to 1 (True); None: not scored."""

DRAWS = 2000
LEVEL = 0.95
_BLOCK = 250
"""Draws that are made at once; bounds the memory of a test with thousands of clusters."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. `lowest` and `highest` differ from `value` only where items were not scored."""

    value: float
    low: float
    high: float
    lowest: float
    highest: float
    n: int
    clusters: int
    unscored: int = 0

    def __str__(self) -> str:
        interval = f"[{short(self.low)}, {short(self.high)}]"
        if self.unscored:
            return f"{short(self.lowest)}–{short(self.highest)} {interval} ({self.unscored} of {self.n} not scored)"
        return f"{short(self.value)} {interval}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def accuracy(right: Sequence[Right], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Share of right items; one cluster label per item.

    Raises:
        DataError: there is no item, or labels and items differ in number.
    """
    worst, best = _bounds(right)
    return _estimate(worst, best, np.ones(len(worst)), right, clusters, seed, draws)


def mean(
    totals: Sequence[float],
    clusters: Sequence[Hashable],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Sum of totals over sum of weights: NLL per token from each item's NLL and its number of tokens.

    Raises:
        DataError: there is no item, or the arguments differ in length.
    """
    top = np.asarray(totals, dtype=float)
    bottom = np.ones(len(top)) if weights is None else np.asarray(weights, dtype=float)
    return _estimate(top, top, bottom, [True] * len(top), clusters, seed, draws)


def difference(
    ours: Sequence[Right],
    theirs: Sequence[Right],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Accuracy of ours minus theirs on the same items in the same order: the paired difference from a control.

    Raises:
        DataError: there is no item, or the arguments differ in length.
    """
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} items are paired with {len(theirs)}", "compare two runs over the same items")
    our_worst, our_best = _bounds(ours)
    their_worst, their_best = _bounds(theirs)
    both = [None if a is None or b is None else a for a, b in zip(ours, theirs)]
    return _estimate(
        our_worst - their_best, our_best - their_worst, np.ones(len(our_worst)), both, clusters, seed, draws
    )


def macro(
    right: Sequence[Right],
    kinds: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Mean over kinds of the accuracy within each, so that a common kind does not drown a rare one.

    Raises:
        DataError: there is no item, or the arguments differ in length.
    """
    _check(len(right), clusters)
    _check(len(right), kinds)
    names, kind = np.unique(np.asarray([str(k) for k in kinds]), return_inverse=True)
    one_hot = np.eye(len(names))[kind]
    worst, best = _bounds(right)
    sizes, lowest, highest = (_per_cluster(one_hot * x[:, None], clusters) for x in (np.ones(len(kind)), worst, best))
    drawn = [np.nanmean(share, axis=1) for share in _resample([lowest, highest], sizes, seed, draws)]
    ends = [float((total.sum(0) / sizes.sum(0)).mean()) for total in (lowest, highest)]
    return _pack(drawn, ends, _scored(right, one_hot), right, len(sizes))


def by_kind(
    right: Sequence[Right], kinds: Sequence[str], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> Mapping[str, Estimate]:
    """Accuracy within each kind, in order of first appearance."""
    found: dict[str, Estimate] = {}
    for name in dict.fromkeys(kinds):
        chosen = [i for i, kind in enumerate(kinds) if kind == name]
        found[name] = accuracy([right[i] for i in chosen], [clusters[i] for i in chosen], seed=seed, draws=draws)
    return found


# ---------------------------------------------------------------------------------------------- how


def _estimate(
    worst: np.ndarray,
    best: np.ndarray,
    weights: np.ndarray,
    right: Sequence[Right],
    clusters: Sequence[Hashable],
    seed: int,
    draws: int,
) -> Estimate:
    """Ratio of sums with its interval, from the worst end's lower bound to the best end's upper bound."""
    _check(len(worst), clusters)
    _check(len(worst), weights)
    lowest, highest, sizes = (_per_cluster(x[:, None], clusters) for x in (worst, best, weights))
    drawn = [ratio[:, 0] for ratio in _resample([lowest, highest], sizes, seed, draws)]
    ends = [float(worst.sum() / weights.sum()), float(best.sum() / weights.sum())]
    scored = np.asarray([x is not None for x in right])
    value = float(worst[scored].sum() / weights[scored].sum()) if scored.any() else float("nan")
    return _pack(drawn, ends, value, right, len(sizes))


def _pack(drawn: list[np.ndarray], ends: list[float], value: float, right: Sequence[Right], clusters: int) -> Estimate:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn[0], tail), np.nanpercentile(drawn[1], 100 - tail)
    unscored = sum(x is None for x in right)
    return Estimate(value, float(low), float(high), ends[0], ends[1], len(right), clusters, unscored)


def _resample(totals: list[np.ndarray], sizes: np.ndarray, seed: int, draws: int) -> list[np.ndarray]:
    """totals and sizes [clusters, kinds] -> ratios [draws, kinds], all over the same resampled clusters."""
    random = np.random.default_rng(seed)
    count = len(sizes)
    blocks: list[list[np.ndarray]] = []
    for start in range(0, draws, _BLOCK):
        times = random.multinomial(count, np.full(count, 1 / count), size=min(_BLOCK, draws - start)).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):  # a kind may be absent from a draw
            blocks.append([times @ total / (times @ sizes) for total in totals])
    return [np.concatenate(parts) for parts in zip(*blocks)]


def _per_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """values [items, kinds] -> their sums [clusters, kinds]."""
    number: dict[Hashable, int] = {}
    index = [number.setdefault(cluster, len(number)) for cluster in clusters]
    sums = np.zeros((len(number), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _bounds(right: Sequence[Right]) -> tuple[np.ndarray, np.ndarray]:
    """The same items with those not scored all wrong, and all right."""
    return tuple(np.asarray([end if x is None else x for x in right], dtype=float) for end in (False, True))  # type: ignore[return-value]


def _scored(right: Sequence[Right], one_hot: np.ndarray) -> float:
    """Mean over kinds of the accuracy of scored items."""
    scored = np.asarray([x is not None for x in right])
    if not scored.any():
        return float("nan")
    hits = np.asarray([x or 0.0 for x in right], dtype=float)
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(hits[scored] @ one_hot[scored] / one_hot[scored].sum(0)))


def _check(items: int, labels: Iterable[Any]) -> None:
    count = len(list(labels))
    if items == 0:
        raise DataError("there is no item to take a mean of", "give the task more samples, or raise its limit")
    if items != count:
        raise DataError(f"{items} items have {count} labels", "give one cluster, kind and weight per item")


def short(value: float, digits: int = 3) -> str:
    """0.873 -> .873, -0.02 -> −.020, 1.0 -> 1.00, 2.314 -> 2.31"""
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    if not text.startswith("."):
        text = f"{abs(value):.2f}"
    return f"−{text}" if value < 0 and float(text) else text
