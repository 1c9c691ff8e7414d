"""Shares and means with intervals whose unit is the whole cluster (concept, picture), not the item.

Questions about one picture rise and fall together; taking them one by one would claim more certainty than there is
(Cameron, Gelbach and Miller 2008, "Bootstrap-based improvements for inference with clustered errors"). A percentile
bootstrap draws clusters. It knows only what was seen: of 3 right answers, or of one picture, it is too sure. So each
end of an interval is the outer one of the bootstrap's and of a second interval that knows what was not seen:

- shares: Wilson's (1927), with as many observations as the clusters are worth (Korn and Graubard 1998, "Confidence
  intervals for proportions with small expected number of positive counts estimated from survey data");
- differences of shares, and means of shares: the shares' intervals put together (Newcombe 1998, method 10);
- other means: Student's t over the clusters. With one cluster there is none;
- other functions of sums (BLEU): Student's t over the figures without each cluster in turn (Tukey 1958, the jackknife).

Three states: an item is right, wrong or not scored. Where some are not scored, an estimate is a range: from all of
them wrong to all of them right, and the interval covers both ends. `str(estimate)` never prints one bare number then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np

from isthmus.types import DataError

Right: TypeAlias = float | None
"""How right an item is, from 0 (False) to 1 (True); None: not scored."""
Ends: TypeAlias = tuple[float, float]
"""The lower and the upper end of an interval."""

DRAWS = 2000
LEVEL = 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
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

    def through(self, rising: Callable[[float], float]) -> Estimate:
        """The same number on another scale; `rising` keeps the order of numbers."""
        return replace(
            self,
            value=rising(self.value),
            low=rising(self.low),
            high=rising(self.high),
            lowest=rising(self.lowest),
            highest=rising(self.highest),
        )


def accuracy(right: Sequence[Right], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Share of right items; one cluster label per item.

    Raises:
        DataError: there is no item, or labels and items differ in number.
    """
    worst, best = _bounds(right)
    return _estimate(worst, best, np.ones(len(worst)), right, clusters, seed, draws, _of_items(within))


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
    return _estimate(top, top, bottom, [True] * len(top), clusters, seed, draws, _student)


def of_sums(
    sums_NK: Sequence[Sequence[float]],
    figure: Callable[[Sequence[float]], float],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """A figure that depends on all items together: `figure` of what they sum up to, [K] from [items, K].

    Raises:
        DataError: there is no item, or the arguments differ in length.
    """
    _check(len(sums_NK), clusters)
    sums_CK = _per_cluster(np.asarray(sums_NK, dtype=float), clusters)
    whole_K, count = sums_CK.sum(0), len(sums_CK)
    value = figure(whole_K.tolist())
    (drawn_DK,) = _resample([sums_CK], np.ones((count, 1)), seed, draws)  # over the draw's clusters, which are as many
    drawn = np.asarray([figure(sums_K) for sums_K in (count * drawn_DK).tolist()])
    half = 0.0
    if count > 1:
        left_C = np.asarray([figure(sums_K) for sums_K in (whole_K - sums_CK).tolist()])
        half = critical(count - 1) * math.sqrt((count - 1) / count * ((left_C - left_C.mean()) ** 2).sum())
    return _pack([drawn] * 2, [(value - half, value + half)] * 2, [value] * 2, value, [True] * len(sums_NK), count)


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
    worst, best = our_worst - their_best, our_best - their_worst
    return _estimate(worst, best, np.ones(len(worst)), both, clusters, seed, draws, _of_items(apart))


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
    places = [np.flatnonzero(kind == number).tolist() for number in range(len(names))]
    reach = [
        together([(float(x[own].mean()), within(x[own], [clusters[place] for place in own])) for own in places])
        for x in (worst, best)
    ]
    return _pack(drawn, reach, ends, _scored(right, one_hot), right, len(sizes))


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
    reach: Callable[[np.ndarray, np.ndarray, Sequence[Hashable]], Ends],
) -> Estimate:
    """Ratio of sums with its interval, from the worst end's lower bound to the best end's upper bound.

    `reach(totals, weights, clusters)` is the second interval, which the bootstrap's is widened to.
    """
    _check(len(worst), clusters)
    _check(len(worst), weights)
    lowest, highest, sizes = (_per_cluster(x[:, None], clusters) for x in (worst, best, weights))
    drawn = [ratio[:, 0] for ratio in _resample([lowest, highest], sizes, seed, draws)]
    ends = [float(worst.sum() / weights.sum()), float(best.sum() / weights.sum())]
    scored = np.asarray([x is not None for x in right])
    value = float(worst[scored].sum() / weights[scored].sum()) if scored.any() else float("nan")
    reached = [reach(x, weights, clusters) for x in (worst, best)]
    return _pack(drawn, reached, ends, value, right, len(sizes))


def _pack(
    drawn: list[np.ndarray], reach: list[Ends], ends: list[float], value: float, right: Sequence[Right], clusters: int
) -> Estimate:
    tail = 100 * (1 - LEVEL) / 2
    low = min(reach[0][0], float(np.nanpercentile(drawn[0], tail)))
    high = max(reach[1][1], float(np.nanpercentile(drawn[1], 100 - tail)))
    return Estimate(value, low, high, ends[0], ends[1], len(right), clusters, sum(x is None for x in right))


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


# ---------------------------------------------------------------------------------------------- what was not seen


def within(values: np.ndarray, clusters: Sequence[Hashable]) -> Ends:
    """Where the mean of so many values from 0 to 1 may lie: Wilson's interval; 0 to 1 with one cluster.

    The values are worth p (1 - p) / v independent answers of right and wrong. v is their mean's variance over clusters,
    not below that over items, with Student's t for the normal quantile. They are worth no fewer than if all of a
    cluster's answers were the same, and just that many where no value differs: nothing is known of the variance then.
    """
    n, p = len(values), float(values.mean())
    sums, sizes = _sums(values, np.ones(n), clusters)
    if len(sizes) < 2:
        return 0.0, 1.0
    variance = max(_variance(sums, sizes, p), float(values.var()) / n)
    known = p * (1 - p) / variance * (NORMAL / _factor(sizes)) ** 2 if variance > 1e-15 else 0.0
    z = NORMAL**2 / max(known, _worth(sizes))
    half = math.sqrt(p * (1 - p) * z + z**2 / 4)
    return max(0.0, (p + z / 2 - half) / (1 + z)), min(1.0, (p + z / 2 + half) / (1 + z))


def apart(values: np.ndarray, clusters: Sequence[Hashable]) -> Ends:
    """The same of a mean of paired differences from -1 to 1: what speaks for one side less what speaks for the other.

    It reaches no less far than Student's t, since the two sides exclude each other.
    """
    ours, theirs = np.maximum(values, 0), np.maximum(-values, 0)
    (a, (a_low, a_high)), (b, (b_low, b_high)) = ((float(x.mean()), within(x, clusters)) for x in (ours, theirs))
    low, high = _student(values, np.ones(len(values)), clusters)
    low = min(low, a - b - math.hypot(a - a_low, b_high - b))
    return max(-1.0, low), min(1.0, max(high, a - b + math.hypot(a_high - a, b - b_low)))


def together(parts: Sequence[tuple[float, Ends]]) -> Ends:
    """The same of the mean of several figures, each over items of its own, from every one and its interval."""
    middle = sum(value for value, _ in parts) / len(parts)
    below = math.hypot(*(value - low for value, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - value for value, (_, high) in parts)) / len(parts)
    return middle - below, middle + above


def _of_items(
    reach: Callable[[np.ndarray, Sequence[Hashable]], Ends],
) -> Callable[[np.ndarray, np.ndarray, Sequence[Hashable]], Ends]:
    """For means over items that weigh alike."""
    return lambda values, weights, clusters: reach(values, clusters)


def _student(totals: np.ndarray, weights: np.ndarray, clusters: Sequence[Hashable]) -> Ends:
    """Student's t over clusters of a ratio of sums; the ratio alone with one cluster."""
    ratio = float(totals.sum() / weights.sum())
    sums, sizes = _sums(totals, weights, clusters)
    if len(sizes) < 2:
        return ratio, ratio
    half = _factor(sizes) * math.sqrt(_variance(sums, sizes, ratio))
    return ratio - half, ratio + half


def _sums(totals: np.ndarray, weights: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Of each cluster, the sum of its totals and that of its weights."""
    return _per_cluster(totals[:, None], clusters)[:, 0], _per_cluster(weights[:, None], clusters)[:, 0]


def _variance(sums: np.ndarray, sizes: np.ndarray, ratio: float) -> float:
    """Of a ratio of sums over clusters that were drawn: linearised."""
    count = len(sizes)
    return float(count / (count - 1) * ((sums - ratio * sizes) ** 2).sum() / sizes.sum() ** 2)


def _worth(sizes: np.ndarray) -> float:
    """How many clusters of one size have as steady a mean: all of them where they are alike, fewer where not."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _factor(sizes: np.ndarray) -> float:
    """How many standard errors an interval reaches: Student's t, by how many clusters of one size these are worth."""
    return critical(max(1, round(_worth(sizes)) - 1))


def student(t: float, freedom: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for number in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


@cache
def critical(freedom: int) -> float:
    """The t that a share `LEVEL` stays below in size, by bisection; from a thousand degrees on it hardly changes."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, min(freedom, 1000)) < LEVEL else (low, middle)
    return high


# ---------------------------------------------------------------------------------------------- items and clusters


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
