"""Several trainings beside several others: intervals and verdicts whose unit is the seed.

A joint trained again is another model, so that items of one run, however many, do not tell two joints apart. Two
questions are asked of every difference, and a verdict needs both answers:

- would other seeds say the same? Student's t over the paired differences of seeds. Two or three shares of few items
  may agree by chance, so that the error is never taken to be smaller than what the choice of items alone makes it;
- would other items? A bootstrap that draws seeds and, on its own, clusters of items (concepts, pictures) with
  replacement, the same clusters for all that is compared, and for tasks that share some (Owen 2007, "The pigeonhole
  bootstrap", for crossed factors). Where no draw is on the other side of 0, a normal distribution of their spread
  tells how far away that is, since so many draws tell no p-value below 2 / (1 + draws). Few clusters may agree by
  chance, too: p is never below that of a sign test in which all of them speak for one side, 1 with one cluster.
  Draws that hold no item of some task or run are left out; where that is half of them or more, p is 1.

The p-value of a difference is the larger of the two (an intersection-union test). Over many differences Holm (1979, "A
simple sequentially rejective multiple test procedure") keeps the chance of one or more false verdicts at 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.statistics import LEVEL, Ends, apart, critical, student, together, within
from isthmus.types import DataError

Verdict: TypeAlias = Literal["better", "worse", "not decided"]
DRAWS = 4000


@dataclass(frozen=True)
class Outcomes:
    """One run on one row of the table, item by item: 1 where right and 0 where wrong, or nats over tokens."""

    ids: tuple[str, ...]
    totals: tuple[float, ...]
    weights: tuple[float, ...]
    clusters: tuple[Hashable, ...]
    """None: there are no items to choose, such as for a figure of the whole run."""
    unscored: int = 0
    shares: bool = False
    """Whether totals are shares from 0 to 1, each of weight 1, whose intervals know what was not seen."""

    @classmethod
    def of(cls, predictions: Sequence[Prediction], unit: str) -> Outcomes:
        """From a run's predictions; what was not scored counts as wrong here, and is counted."""
        if unit == "accuracy":
            totals, weights = [float(p.right or 0) for p in predictions], [1.0] * len(predictions)
            unscored = sum(p.right is None for p in predictions)
        else:
            totals, weights = [-p.scores[-1] for p in predictions], [float(p.tokens) for p in predictions]
            unscored = 0
        ids, clusters = tuple(p.id for p in predictions), tuple(p.cluster for p in predictions)
        return cls(ids, tuple(totals), tuple(weights), clusters, unscored, shares=unit == "accuracy")

    @property
    def mean(self) -> float:
        return sum(self.totals) / sum(self.weights)


Runs: TypeAlias = Sequence[Outcomes]
"""One row's outcomes, one per seed."""


@dataclass(frozen=True)
class Level:
    """How good something is: the mean over its seeds with two intervals."""

    value: float
    each: tuple[float, ...]
    """By seed."""
    low: float | None
    high: float | None
    """Student's t over the seeds: where the mean of many more trainings lies. None with one seed."""
    items_low: float
    items_high: float
    """Bootstrap over seeds and clusters of items; of shares, at least as `statistics.within` knows from the items."""

    @property
    def ends(self) -> tuple[float, float]:
        """The interval that is shown: of either, what reaches further."""
        return wider(self.low, self.high, self.items_low, self.items_high)


@dataclass(frozen=True)
class Gap:
    """How much better something is than something else, seed by seed on the same items."""

    value: float
    each: tuple[float, ...]
    low: float | None
    high: float | None
    items_low: float
    items_high: float
    p_seeds: float | None
    """None with one seed."""
    p_items: float
    paired: bool
    """Whether both answered the same items under every seed."""

    @property
    def p(self) -> float:
        """Of the whole difference: the larger of the two; 1 with one seed."""
        return 1.0 if self.p_seeds is None else max(self.p_seeds, self.p_items)

    @property
    def ends(self) -> tuple[float, float]:
        """The interval that is shown: of either, what reaches further."""
        return wider(self.low, self.high, self.items_low, self.items_high)


def wider(low: float | None, high: float | None, items_low: float, items_high: float) -> tuple[float, float]:
    """From the lower of the lower ends to the higher of the higher ends; over items alone with one seed."""
    if low is None or high is None:
        return items_low, items_high
    return min(low, items_low), max(high, items_high)


def level(tasks: Sequence[Runs], *, seed: int = 0, draws: int = DRAWS) -> Level:
    """The mean over tasks (mostly one) of what was reached, over seeds.

    Raises:
        DataError: there is nothing, or tasks differ in their number of seeds.
    """
    _check(tasks)
    each = np.mean([[run.mean for run in runs] for runs in tasks], axis=0)
    drawn_DS = _whole(np.mean(_resample(tasks, seed, draws), 0), each)
    low, high = interval(each.tolist(), _by_items(drawn_DS))
    drawn = _percentiles(_over_seeds(drawn_DS, seed))
    seen = together([_seen(runs) for runs in tasks]) if _are_shares(tasks) else drawn
    return Level(float(each.mean()), tuple(each.tolist()), low, high, *wider(*seen, *drawn))


def gap(ours: Sequence[Runs], theirs: Sequence[Runs], *, seed: int = 0, draws: int = DRAWS) -> Gap:
    """Ours minus theirs, the mean over tasks (mostly one), the n-th seed of ours against the n-th of theirs.

    Raises:
        DataError: there is nothing, or the two differ in tasks or in their number of seeds.
    """
    _check([*ours, *theirs])
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} tasks are compared with {len(theirs)}", "compare runs over the same tasks")
    seeds = len(ours[0])
    each = np.mean(
        [[a.mean - b.mean for a, b in zip(mine, other, strict=True)] for mine, other in zip(ours, theirs)], axis=0
    )
    drawn = _resample([[*mine, *other] for mine, other in zip(ours, theirs)], seed, draws)
    drawn_DS = _whole(np.mean([ratios_DR[:, :seeds] - ratios_DR[:, seeds:] for ratios_DR in drawn], axis=0), each)
    differences_D, least = _over_seeds(drawn_DS, seed), _by_items(drawn_DS)
    low, high = interval(each.tolist(), least)
    items = _percentiles(differences_D)
    paired = all(a.ids == b.ids for mine, other in zip(ours, theirs) for a, b in zip(mine, other))
    if paired and _are_shares([*ours, *theirs]):
        items = wider(*items, *together([_seen(mine, other) for mine, other in zip(ours, theirs)]))
    return Gap(
        float(each.mean()),
        tuple(each.tolist()),
        low,
        high,
        *items,
        p_seeds=p_value(each.tolist(), least),
        p_items=1.0 if 2 * len(differences_D) <= draws else max(_p_items(differences_D), _least_p([*ours, *theirs])),
        paired=paired,
    )


def adjust(families: Sequence[Sequence[float]]) -> list[list[float]]:
    """p-values after Holm within each family; families share the level evenly, so that 5 % holds for all together."""
    share = sum(bool(family) for family in families)
    return [[min(1.0, share * p) for p in holm(family)] for family in families]


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: the n-th smallest times how many are not smaller, made monotone."""
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, (len(ps) - rank) * ps[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def verdict(difference: float, adjusted: float, higher: bool = True) -> Verdict:
    """In words; `higher` says whether more is better."""
    if adjusted > 1 - LEVEL or difference == 0:
        return "not decided"
    return "better" if (difference > 0) == higher else "worse"


# ---------------------------------------------------------------------------------------------- Student


def interval(values: Sequence[float], least: float = 0.0) -> tuple[float, float] | tuple[None, None]:
    """The 95 % t-interval of the mean, whose error is taken to be at least `least`; Nones with one value."""
    if len(values) < 2:
        return None, None
    mean, error = _mean_and_error(values, least)
    reach = critical(len(values) - 1) * error
    return mean - reach, mean + reach


def p_value(values: Sequence[float], least: float = 0.0) -> float | None:
    """Two-sided p of Student's test that the mean is 0, its error at least `least`; None with one value."""
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values, least)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return max(0.0, 1 - student(abs(mean) / error, len(values) - 1))


def _mean_and_error(values: Sequence[float], least: float) -> tuple[float, float]:
    array = np.asarray(values)
    return float(array.mean()), max(least, float(array.std(ddof=1) / math.sqrt(len(array))))


# ---------------------------------------------------------------------------------------------- bootstrap


def _resample(tasks: Sequence[Runs], seed: int, draws: int) -> list[np.ndarray]:
    """Means [draws, runs] of every task over resampled clusters, the same clusters for all runs in a draw.

    Tasks that share clusters, directly or through others, are resampled together: the same pictures tell of both.
    """
    found: dict[int, np.ndarray] = {}
    for members in _together(tasks):
        number: dict[Hashable, int] = {}
        for run in (run for task in members for run in tasks[task]):
            for cluster in run.clusters:
                number.setdefault(cluster, len(number))
        random = np.random.default_rng((seed, members[0]))
        times_DC = random.multinomial(len(number), np.full(len(number), 1 / len(number)), size=draws).astype(float)
        found |= {task: _ratios(tasks[task], number, times_DC) for task in members}
    return [found[task] for task in range(len(tasks))]


def _together(tasks: Sequence[Runs]) -> list[list[int]]:
    """Places of tasks in groups that share no cluster with each other."""
    groups: list[tuple[list[int], set[Hashable]]] = []
    for place, runs in enumerate(tasks):
        own = {cluster for run in runs for cluster in run.clusters}
        joined = [group for group in groups if not own.isdisjoint(group[1])]
        groups = [group for group in groups if group not in joined]
        members = sorted([place, *(member for group, _ in joined for member in group)])
        groups.append((members, own.union(*(clusters for _, clusters in joined))))
    return [members for members, _ in groups]


def _ratios(runs: Runs, number: dict[Hashable, int], times_DC: np.ndarray) -> np.ndarray:
    """Means [draws, runs] where cluster c counts `times_DC[:, c]` times."""
    tops_CR, sizes_CR = np.zeros((len(number), len(runs))), np.zeros((len(number), len(runs)))
    for column, run in enumerate(runs):
        index = [number[cluster] for cluster in run.clusters]
        np.add.at(tops_CR[:, column], index, run.totals)
        np.add.at(sizes_CR[:, column], index, run.weights)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold none of a run's clusters
        return times_DC @ tops_CR / (times_DC @ sizes_CR)


def _over_seeds(values_DS: np.ndarray, seed: int) -> np.ndarray:
    """Each draw's mean over as many seeds as there are, drawn with replacement."""
    seeds = values_DS.shape[1]
    times_DS = np.random.default_rng((seed, 1 << 20)).multinomial(seeds, np.full(seeds, 1 / seeds), len(values_DS))
    return (times_DS * values_DS).sum(1) / seeds


def _whole(values_DS: np.ndarray, each: np.ndarray) -> np.ndarray:
    """The draws that hold items of every task and run; what was measured where no draw does."""
    whole = values_DS[np.isfinite(values_DS).all(1)]
    return whole if len(whole) else each[None]


def _seen(ours: Runs, theirs: Runs | None = None) -> tuple[float, Ends]:
    """A task's share over all seeds, or its difference from others on the same items, and how far its items reach."""
    values = np.concatenate([run.totals for run in ours])
    clusters = [cluster for run in ours for cluster in run.clusters]
    if theirs is None:
        return float(values.mean()), within(values, clusters)
    values = values - np.concatenate([run.totals for run in theirs])
    return float(values.mean()), apart(values, clusters)


def _are_shares(tasks: Sequence[Runs]) -> bool:
    return all(run.shares for runs in tasks for run in runs)


def _least_p(tasks: Sequence[Runs]) -> float:
    """Two-sided p of the sign test if all clusters agree; 0 where there are no items to choose."""
    clusters = {cluster for runs in tasks for run in runs for cluster in run.clusters} - {None}
    return 2.0 ** (1 - len(clusters)) if clusters else 0.0


def _p_items(differences_D: np.ndarray) -> float:
    """Two-sided: how often a draw is on the other side of 0, or what a normal distribution says where none is."""
    beyond = int(min((differences_D <= 0).sum(), (differences_D >= 0).sum()))
    share = min(1.0, 2 * (1 + beyond) / (1 + len(differences_D)))
    spread = float(differences_D.std())
    if beyond:
        return share
    return min(share, math.erfc(abs(float(differences_D.mean())) / (spread * math.sqrt(2)))) if spread else 0.0


def _by_items(values_DS: np.ndarray) -> float:
    """The error of the mean over these very seeds that the choice of items alone makes."""
    return float(values_DS.mean(1).std())


def _percentiles(values_D: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values_D, [tail, 100 - tail])
    return float(low), float(high)


def _check(tasks: Sequence[Runs]) -> None:
    counts = {len(runs) for runs in tasks}
    if len(counts) != 1 or 0 in counts:
        raise DataError(
            f"runs of {sorted(counts) or 'no'} seeds are put together", "compare as many seeds on both sides, for all"
        )
