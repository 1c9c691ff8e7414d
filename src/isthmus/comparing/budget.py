"""One budget for every recipe: minutes, operations, samples or steps, shared by its stages as they share their own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from isthmus.config import Budget, Recipe, Stage
from isthmus.errors import ConfigError
from isthmus.forecast import Untraceable, forecast
from isthmus.training.run import mix_of

Unit: TypeAlias = Literal["minutes", "flops", "samples", "steps"]
UNITS: dict[str, tuple[Unit, float]] = {
    "m": ("minutes", 1),
    "min": ("minutes", 1),
    "minutes": ("minutes", 1),
    "h": ("minutes", 60),
    "flops": ("flops", 1),
    "samples": ("samples", 1),
    "steps": ("steps", 1),
}
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
WRITTEN = re.compile(r"(\d+\.?\d*(?:e\d+)?)([kMGTP]?)-?([a-z]+)")


@dataclass(frozen=True)
class Amount:
    """So much of something, for the training of one run."""

    value: float
    unit: Unit

    def __str__(self) -> str:
        if self.unit == "flops":
            prefix = max(
                (each for each in PREFIXES if PREFIXES[each] <= self.value), key=PREFIXES.__getitem__, default=""
            )
            return f"{self.value / PREFIXES[prefix]:.4g} {prefix}FLOP"
        return f"{self.value:,g} {self.unit}"

    def times(self, share: float) -> Amount:
        return Amount(self.value * share, self.unit)


def parse(text: str) -> Amount:
    """`10m`, `1.5h`, `2e15flops`, `50k-samples`, `300-steps`.

    Raises:
        ConfigError: it is none of these.
    """
    found = WRITTEN.fullmatch(text.strip())
    if found is None or found[3] not in UNITS or float(found[1]) == 0:
        raise ConfigError(f"no budget is written {text!r}", "write 10m, 2h, 2e15flops, 50k-samples or 300-steps")
    unit, size = UNITS[found[3]]
    return Amount(float(found[1]) * PREFIXES[found[2]] * size, unit)


def apply(recipe: Recipe, amount: Amount, per_step: Sequence[float] = (), least: bool = False) -> Recipe:
    """The recipe with its stages' budgets replaced by their shares of an amount.

    Args:
        per_step: what a step of each stage costs, see `operations`; only for an amount of operations.
        least: whether a stage whose share of operations is less than one step has one all the same, as trials do.

    Raises:
        ConfigError: see `shares`; or a stage's share of operations is less than one step.
    """
    parts = shares(recipe, amount.unit)
    if amount.unit == "minutes":
        budgets = [Budget(minutes=round(amount.value * part, 6)) for part in parts]
    elif amount.unit == "samples":
        budgets = [Budget(samples=max(1, round(amount.value * part))) for part in parts]
    elif amount.unit == "steps":
        budgets = [Budget(steps=steps) for steps in dealt(round(amount.value), parts)]
    else:
        if not least:
            enough([recipe], amount, [per_step])
        budgets = [Budget(steps=max(1, int(amount.value * part / cost))) for part, cost in zip(parts, per_step)]
    return recipe.but(stages=tuple(stage.but(budget=each) for stage, each in zip(recipe.stages, budgets)))


def enough(recipes: Sequence[Recipe], amount: Amount, per_step: Sequence[Sequence[float]]) -> None:
    """Whether an amount of operations has a step for every stage of some recipes.

    Raises:
        ConfigError: it has not; the remedy names the least that has.
    """
    needed = {
        recipe.name: max(cost / part for part, cost in zip(shares(recipe, amount.unit), costs, strict=True))
        for recipe, costs in zip(recipes, per_step, strict=True)
    }
    if short := [name for name, value in needed.items() if value > amount.value]:
        exponent = math.floor(math.log10(most := max(needed.values())))
        lead = math.ceil(most / 10 ** (exponent - 1)) / 10
        raise ConfigError(
            f"{amount} are less than one step of some stage of {', '.join(short)}",
            f"give a budget of {lead:g}e{exponent}flops or more",
        )


def shares(recipe: Recipe, unit: Unit = "samples") -> list[float]:
    """What part of a recipe's own budget each stage has: of its minutes, or else of its samples or its steps.

    Args:
        unit: of what is shared out. Steps go by steps, so that stages of unlike batches keep their shares of samples.

    Raises:
        ConfigError: there is no stage, or minutes stand beside counts.
    """
    lengths = [_length(recipe, stage) for stage in recipe.stages]
    if not lengths:
        raise ConfigError(f"{recipe.name} has no stage to train", "give it one under `stages`")
    if len({own for _, own in lengths}) > 1:
        raise ConfigError(
            f"{recipe.name}: some stages last minutes and others are counted, so that they have no shares",
            "give all stages minutes, or all of them steps, samples or epochs",
        )
    counted = [length for length, _ in lengths]
    if unit == "steps" and lengths[0][1] == "samples":
        counted = [length / stage.batch_size for length, stage in zip(counted, recipe.stages)]
    return [length / sum(counted) for length in counted]


def _length(recipe: Recipe, stage: Stage) -> tuple[float, Unit]:
    budget = stage.budget
    if budget.minutes is not None:
        return budget.minutes, "minutes"
    if budget.steps is not None:
        return float(budget.steps * stage.batch_size), "samples"
    if budget.samples is not None:
        return float(budget.samples), "samples"
    assert budget.epochs is not None  # a budget is one of four
    return budget.epochs * mix_of(stage, recipe.seed).mix.epoch_length, "samples"


def dealt(whole: int, parts: Sequence[float]) -> list[int]:
    """A whole number in shares of at least 1 each, which sum to it where it is large enough."""
    counts = [max(1, math.floor(whole * part)) for part in parts]
    places = range(len(parts))
    while sum(counts) < whole:
        counts[max(places, key=lambda place: whole * parts[place] - counts[place])] += 1
    while sum(counts) > max(whole, len(parts)):
        counts[max(places, key=counts.__getitem__)] -= 1
    return counts


# ---------------------------------------------------------------------------------------------- operations


class Uncountable(ConfigError):
    """A recipe that can be trained, whose steps cannot be counted without numbers."""


def operations(recipe: Recipe) -> list[float]:
    """Operations of an optimizer step of each stage, the mean over its first batches.

    They are counted product by product on a step without numbers, as `isthmus plan` counts them: what a joint leaves
    out costs nothing, and neither do features that a run reads from its cache, nor what is computed a second time to
    save memory.

    Raises:
        Uncountable: a step cannot be counted without numbers.
        ConfigError, DataError, IsthmusError: parts do not fit, or data are not there.
    """
    once = recipe.but(stages=tuple(stage.but(recompute=False) for stage in recipe.stages))
    try:
        return [stage.flops for stage in forecast(once, torch.device("cpu"), seconds=0.0).stages]
    except Untraceable as error:
        raise Uncountable(
            f"the operations of {recipe.name} cannot be counted: {error.cause}",
            "give the budget in samples, steps or minutes",
        ) from None
