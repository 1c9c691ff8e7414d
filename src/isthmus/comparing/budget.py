"""One budget for every recipe: minutes, operations, samples or steps, shared by its stages as they share their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import torch

from isthmus.comparing import numbers
from isthmus.comparing.numbers import PREFIXES
from isthmus.config import Recipe, Stage
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
MOMENT = 1e-6
"""Minutes of a stage whose share is less: a run does a step in them all the same."""


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
    found = numbers.read(text, {name: size for name, (_, size) in UNITS.items()})
    if found is None:
        raise ConfigError(f"no budget is written {text!r}", "write 10m, 2h, 2e15flops, 50k-samples or 300-steps")
    value, name = found
    return Amount(value, UNITS[name][0])


def apply(recipe: Recipe, amount: Amount, per_step: Sequence[float] = (), least: bool = False) -> Recipe:
    """The recipe with its stages' budgets replaced by their shares of an amount; a stage of no length keeps none.

    Args:
        per_step: what a step of each stage costs, see `operations`; only for an amount of operations.
        least: whether a stage whose share is less than one step has one all the same, as trials do.

    Raises:
        ConfigError: see `shares`; or a stage's share is less than one step.
    """
    parts = _parts(recipe, amount.unit)
    if not least:
        _check({recipe.name: _needed(parts, _step(recipe, amount.unit, per_step))}, amount)
    counts: Sequence[float]
    if amount.unit == "minutes":
        counts = [max(MOMENT, round(amount.value * part, 6)) for part in parts]
    elif amount.unit == "samples":
        counts = [max(1, round(amount.value * part)) for part in parts]
    elif amount.unit == "steps":
        counts = dealt(round(amount.value), parts)
    else:
        counts = [max(1, int(amount.value * part / cost)) for part, cost in zip(parts, per_step, strict=True)]
    counted = "steps" if amount.unit == "flops" else amount.unit
    budgets = [{counted: count} if part else {"steps": 0} for part, count in zip(parts, counts)]
    return recipe.but(stages=tuple(stage.but(budget=each) for stage, each in zip(recipe.stages, budgets)))


def enough(recipes: Sequence[Recipe], amount: Amount, per_step: Sequence[Sequence[float]]) -> None:
    """Whether an amount has a step for every stage of some recipes, as far as that can be known without a clock.

    Args:
        per_step: what a step of each recipe's stages costs; only for an amount of operations.

    Raises:
        ConfigError: it has not; the remedy names the least that has.
    """
    unit = amount.unit
    _check(
        {
            recipe.name: _needed(_parts(recipe, unit), _step(recipe, unit, costs))
            for recipe, costs in zip(recipes, per_step, strict=True)
        },
        amount,
    )


def _check(needed: Mapping[str, float], amount: Amount) -> None:
    """What `enough` says, of recipes that need so much."""
    if short := [name for name, value in needed.items() if value > amount.value]:
        raise ConfigError(
            f"{amount} give some stage of {', '.join(short)} less than one step",
            f"give a budget of {_upward(max(needed.values()), amount.unit)} or more",
        )


def _needed(parts: Sequence[Fraction], costs: Sequence[float]) -> float:
    """How much gives every stage that has a part a step."""
    return max(cost / part for part, cost in zip(parts, costs, strict=True) if part)


def _step(recipe: Recipe, unit: Unit, per_step: Sequence[float]) -> Sequence[float]:
    """What a step of each stage takes of an amount; of minutes, nothing that is known."""
    if unit == "flops":
        return per_step
    return [{"minutes": 0, "samples": stage.batch_size, "steps": 1}[unit] for stage in recipe.stages]


def _upward(value: float, unit: Unit) -> str:
    """At least so much, as a budget is written; operations in two digits."""
    if unit != "flops":
        return f"{math.ceil(value)}-{unit}"
    exponent = math.floor(math.log10(value))
    return f"{math.ceil(value / 10 ** (exponent - 1)) / 10:g}e{exponent}flops"


def shares(recipe: Recipe, unit: Unit = "samples") -> list[float]:
    """What part of a recipe's own budget each stage has: of its minutes, or else of its samples or its steps.

    Args:
        unit: of what is shared out. Steps go by steps, so that stages of unlike batches keep their shares of samples.

    Raises:
        ConfigError: no stage has any length, or minutes stand beside counts.
    """
    return list(map(float, _parts(recipe, unit)))


def _parts(recipe: Recipe, unit: Unit) -> list[Fraction]:
    """`shares` without rounding, so that a budget of just enough is enough."""
    lengths = [_length(recipe, stage) for stage in recipe.stages]
    owns = {own for length, own in lengths if length}
    if not owns:
        raise ConfigError(f"{recipe.name} has no stage to train", "give it one under `stages`, of a step or more")
    if len(owns) > 1:
        raise ConfigError(
            f"{recipe.name}: some stages last minutes and others are counted, so that they have no shares",
            "give all stages minutes, or all of them steps, samples or epochs",
        )
    counted = [length for length, _ in lengths]
    if unit == "steps" and owns == {"samples"}:
        counted = [length / stage.batch_size for length, stage in zip(counted, recipe.stages)]
    return [length / sum(counted) for length in counted]


def _length(recipe: Recipe, stage: Stage) -> tuple[Fraction, Unit]:
    budget = stage.budget
    if budget.minutes is not None:
        return Fraction(budget.minutes), "minutes"
    if budget.steps is not None:
        return Fraction(budget.steps * stage.batch_size), "samples"
    if budget.samples is not None:
        return Fraction(budget.samples), "samples"
    assert budget.epochs is not None  # a budget is one of four
    return Fraction(budget.epochs) * mix_of(stage, recipe.seed).mix.epoch_length, "samples"


def dealt(whole: int, parts: Sequence[Fraction]) -> list[int]:
    """A whole number in shares of at least 1 each, but none for no part, which sum to it where it is large enough."""
    counts = [max(1, math.floor(whole * part)) if part else 0 for part in parts]
    places = [place for place, part in enumerate(parts) if part]
    while sum(counts) < whole:
        counts[max(places, key=lambda place: whole * parts[place] - counts[place])] += 1
    while sum(counts) > max(whole, len(places)):
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
