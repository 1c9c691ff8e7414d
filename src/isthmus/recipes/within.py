"""A recipe made to last a number of minutes: its stages keep their shares of the time."""

from __future__ import annotations

from isthmus.config import Budget, Recipe
from isthmus.errors import ConfigError


def within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with the budgets of its stages scaled to `minutes` in all.

    Raises:
        ConfigError: a stage has a budget of another kind, or there is no stage.
    """
    lengths = {stage.name: stage.budget.minutes or 0.0 for stage in recipe.stages}  # none has 0 minutes
    other = [name for name, length in lengths.items() if not length]
    if other or not lengths:
        cause = f"the budget of stage {other[0]} is not in minutes" if other else "there is no stage"
        raise ConfigError(
            f"{recipe.name} cannot be made to last {minutes:g} minutes: {cause}",
            "leave --minutes out and give every stage its own: 'stages.NAME.budget={minutes: 1}'",
        )
    share = minutes / sum(lengths.values())
    stages = tuple(stage.but(budget=Budget(minutes=round(share * lengths[stage.name], 6))) for stage in recipe.stages)
    return recipe.but(stages=stages)
