"""Which part of the data is worth training on: small equal runs on equal pools, ranked against a random one.

Data-Juicer Sandbox, Chen et al. 2024, arXiv 2407.11784; official code: github.com/modelscope/data-juicer.

Every operator's numbers split the data in thirds; a third, cut to the common size, is a pool. The same small model is
trained with the same steps on each, over several seeds, and measured on the same samples. The best operators' pools are
then intersected and tried again.

Differs: pools share the seeds of their cuts, so that differences between pools are not those of chance in cutting;
many pools are compared, and the report says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any, TypeAlias

import numpy as np

from isthmus.types import DataError

RANDOM = "random"
LEAST = 8
"""Samples that a pool must have."""
Trial: TypeAlias = Callable[[np.ndarray, int], float]
"""Trains on samples of these numbers with a seed, and gives the loss on the fixed samples."""


@dataclass(frozen=True)
class Pool:
    """Some of the data, by number; `part` is which third of whose numbers, or `random`."""

    part: str
    numbers: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What training on a pool came to, over seeds."""

    part: str
    size: int
    losses: tuple[float, ...]
    change: float
    """Of the mean loss, relative to the random pool; below 0 is better."""

    @property
    def mean(self) -> float:
        return mean(self.losses)

    @property
    def deviation(self) -> float:
        """Over seeds; 0 for one."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


@dataclass(frozen=True)
class Report:
    """All pools of a round, the best first."""

    outcomes: tuple[Outcome, ...]

    @property
    def compared(self) -> int:
        """How many pools were compared with the random one: among many, some look good by chance."""
        return len(self.outcomes) - 1

    def told(self) -> dict[str, Any]:
        pools = [{**vars(one), "mean": one.mean, "deviation": one.deviation} for one in self.outcomes]
        return {"pools": pools, "compared": self.compared}


def pools(stats: Mapping[str, np.ndarray], seed: int = 0, size: int | None = None) -> list[Pool]:
    """Every operator's low, middle and high third and a random pool, all of one size.

    Operators that give most samples the same number split nothing, and are left out.

    Raises:
        DataError: too little data.
    """
    total = len(next(iter(stats.values()), ()))
    parts = {f"{name} {part}": numbers for name, values in stats.items() for part, numbers in thirds(values).items()}
    common = min([total, *map(len, parts.values())] if size is None else [size, total, *map(len, parts.values())])
    if common < LEAST:
        raise DataError(f"pools of {common} samples tell nothing", f"give at least {3 * LEAST} samples")
    parts[RANDOM] = np.arange(total)
    return [Pool(part, _cut(numbers, common, seed)) for part, numbers in parts.items()]


def thirds(values: np.ndarray) -> dict[str, np.ndarray]:
    """Which samples are in the low, the middle and the high third; sizes differ by one at most."""
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 3 or len(np.unique(values[known])) < 3:
        return {}
    order = known[np.argsort(values[known], kind="stable")]
    return dict(zip(("low", "middle", "high"), np.array_split(order, 3)))


def rank(found: Sequence[Pool], trial: Trial, seeds: Sequence[int], say: Callable[[str], None] = print) -> Report:
    """Train on every pool with every seed; the best first."""
    losses = {}
    for pool in found:
        losses[pool.part] = tuple(trial(pool.numbers, seed) for seed in seeds)
        say(f"{pool.part}: {mean(losses[pool.part]):.4f}")
    chance = mean(losses[RANDOM])
    outcomes = [Outcome(p.part, len(p.numbers), losses[p.part], mean(losses[p.part]) / chance - 1) for p in found]
    return Report(tuple(sorted(outcomes, key=lambda one: one.mean)))


def combined(report: Report, stats: Mapping[str, np.ndarray], most: int = 3) -> list[Pool]:
    """The next round: what the best pools of the best operators have in common, in every combination.

    Pools here are as large as they are and differ in size; cut them with `equal`.
    """
    best: dict[str, str] = {}
    for outcome in report.outcomes:
        operator = outcome.part.rpartition(" ")[0]
        if operator and outcome.change < 0:
            best.setdefault(operator, outcome.part)
    parts = [
        (part, set(thirds(stats[operator])[part.rpartition(" ")[2]].tolist()))
        for operator, part in list(best.items())[:most]
    ]
    joined = (
        Pool(
            " & ".join(part for part, _ in some), np.array(sorted(set.intersection(*(numbers for _, numbers in some))))
        )
        for count in range(2, len(parts) + 1)
        for some in combinations(parts, count)
    )
    return [pool for pool in joined if len(pool.numbers) >= LEAST]


def equal(found: Sequence[Pool], seed: int = 0) -> list[Pool]:
    """The same pools, all cut to the size of the smallest."""
    common = min(len(pool.numbers) for pool in found)
    return [Pool(pool.part, _cut(pool.numbers, common, seed)) for pool in found]


def _cut(numbers: np.ndarray, size: int, seed: int) -> np.ndarray:
    """So many of them, the same ones for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(numbers)[:size])
