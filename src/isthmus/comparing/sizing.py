"""Equal trained parameters: one number of each recipe, such as LoRA's rank, is chosen until it trains as many as asked.

So are ways of adaptation compared at one size: each by its own width (He et al. 2022, arXiv 2110.04366). Everything is
counted on the meta device, before any weights are read.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from isthmus import planning
from isthmus.comparing import numbers
from isthmus.comparing.settings import Setting
from isthmus.config import Frozen, LoRA, Recipe
from isthmus.errors import ConfigError
from isthmus.evaluation.drawing import count

RANK = "rank"
"""The rank of all LoRA that a recipe's stages train."""
TOLERANCE = 0.05
"""How far from the number asked for is still equal."""
REACH = 64
"""Values in a row that a recipe refuses, after which no further one is tried."""
ROUND = 48
"""A value that most numbers of heads divide."""


class Size(Frozen):
    """How a recipe came to the number of parameters that it trains."""

    by: str = RANK
    """`RANK`, or a field of the recipe by its dotted name."""
    value: int | None = None
    """What the field became; None where the recipe had the size already."""
    trained: int
    """Parameters that any stage trains."""

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe in this size."""
        return recipe if self.value is None else resized(recipe, self.by, self.value)

    def __str__(self) -> str:
        how = "as it is" if self.value is None else f"{'LoRA of rank' if self.by == RANK else self.by} {self.value:,}"
        return f"{count(self.trained)}, {how}"


def parse(text: str, recipes: Mapping[str, Recipe]) -> int:
    """`6M`, or a recipe's name for as many as that one trains.

    Raises:
        ConfigError: it is neither.
    """
    if text in recipes:
        return planning.plan(recipes[text]).trained
    found = numbers.read(text, {"": 1})
    if found is None or not (number := round(found[0])):
        raise ConfigError(
            f"no number of parameters is written {text!r}, and no recipe has that name",
            f"write 500k or 6M, or name one of {', '.join(recipes)}",
        )
    return number


def resized(recipe: Recipe, by: str, value: int) -> Recipe:
    """The recipe with that field at that value; LoRA's alpha stays, as its authors keep it."""
    if by != RANK:
        return recipe.override([f"{by}={value}"])
    stages = tuple(
        stage.but(
            train={
                glob: how.but(mode=how.mode.but(r=value)) if isinstance(how.mode, LoRA) else how
                for glob, how in stage.train.items()
            }
        )
        for stage in recipe.stages
    )
    return recipe.but(stages=stages)


def solve(recipe: Recipe, target: int, by: str = RANK) -> Size:
    """The size in which a recipe trains nearest to `target` parameters; its own where that is near enough.

    Values that the recipe refuses, such as a width that its heads do not divide, are left out.

    Raises:
        ConfigError: it cannot come within `TOLERANCE`, or its parameters do not depend on the field.
    """
    own = planning.plan(recipe).trained
    if _near(own, target):
        return Size(by=by, trained=own)
    sizes = _Sizes(recipe, by)
    first = sizes.least()
    second = sizes.upward(first + 1)
    if second is None or sizes.trained(first) == sizes.trained(second):
        raise ConfigError(
            f"{recipe.name} trains {count(own)} parameters where {count(target)} are asked for, and "
            f"{by} does not change that",
            f"name a whole number of its recipe that does: --size {recipe.name}=aligner.options.NAME",
        )
    sign = 1 if sizes.trained(second) > sizes.trained(first) else -1  # a joint in every n-th layer shrinks

    def reached(value: int) -> bool:
        found = sizes.upward(value)
        return found is None or sign * sizes.trained(found) >= sign * target

    high = first
    while not reached(high):
        further = sizes.upward(2 * high)
        if further is not None and sizes.trained(further) == sizes.trained(high):
            break
        high = further or 2 * high
    value = first + bisect_left(range(first, high + 1), True, key=reached)
    around = [each for each in (sizes.downward(value - 1), sizes.upward(value)) if each is not None]
    value = min(around, key=lambda each: abs(sizes.trained(each) - target))
    if not _near(sizes.trained(value), target):
        raise ConfigError(
            f"{recipe.name} comes no nearer to {count(target)} trained parameters than "
            f"{count(sizes.trained(value))}, with {by} {value}",
            "ask for another number with --parameters, or name another field of it with --size",
        )
    return Size(by=by, value=value, trained=sizes.trained(value))


class _Sizes:
    """What a recipe trains at every value of a field, and which values it refuses."""

    def __init__(self, recipe: Recipe, by: str) -> None:
        self.recipe, self.by = recipe, by
        self._known: dict[int, int | ConfigError] = {}

    def trained(self, value: int) -> int:
        """Parameters that any stage trains.

        Raises:
            ConfigError: the value is refused.
        """
        found = self._planned(value)
        if isinstance(found, ConfigError):
            raise found
        return found

    def least(self) -> int:
        """The smallest value that is not refused.

        Raises:
            ConfigError: the first `REACH` are, as 1 is; or so is `ROUND`, in the same words: the field is meant.
        """
        first = self._planned(1)
        if not isinstance(first, ConfigError):
            return 1
        found = None if str(self._planned(ROUND)) == str(first) else self.upward(2)
        if found is None:
            raise first
        return found

    def upward(self, value: int) -> int | None:
        """The nearest value from this one on; None where `REACH` of them are refused."""
        return next(filter(self._taken, range(value, value + REACH)), None)

    def downward(self, value: int) -> int | None:
        """The same towards 1."""
        return next(filter(self._taken, range(value, max(0, value - REACH), -1)), None)

    def _taken(self, value: int) -> bool:
        return not isinstance(self._planned(value), ConfigError)

    def _planned(self, value: int) -> int | ConfigError:
        if value not in self._known:
            try:
                self._known[value] = planning.plan(resized(self.recipe, self.by, value)).trained
            except ConfigError as refusal:
                self._known[value] = refusal
        return self._known[value]


def _near(number: int, target: int) -> bool:
    return abs(number - target) <= TOLERANCE * target


def chosen(told: Sequence[str]) -> dict[str, str]:
    """`flamingo=aligner.options.inner` by recipe.

    Raises:
        ConfigError: one is written otherwise.
    """
    if wrong := [each for each in told if not re.fullmatch(r"[^=]+=[^=]+", each)]:
        raise ConfigError(f"no size is written {wrong[0]!r}", "write RECIPE=FIELD: flamingo=aligner.options.inner")
    return dict(each.split("=") for each in told)


def setting(sizes: Mapping[str, Size], target: int) -> Setting:
    """What the page says of it."""
    return Setting(
        "trained parameters",
        {name: str(size) for name, size in sizes.items()},
        f"within {TOLERANCE:.0%} of {count(target)}",
    )
