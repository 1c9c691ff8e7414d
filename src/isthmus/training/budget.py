"""How many steps a stage has, and after which of them something happens."""

from __future__ import annotations

import math

from isthmus.config import Budget


def steps_for(budget: Budget, batch_size: int, samples: int) -> int | None:
    """Steps of a budget over `samples` samples per epoch; None for minutes, which need a clock."""
    if budget.steps is not None:
        return budget.steps
    if budget.samples is not None:
        return math.ceil(budget.samples / batch_size)
    if budget.epochs is not None:
        return math.ceil(budget.epochs * samples / batch_size)
    return None


def marks(share: float | None, steps: int) -> set[int]:
    """The steps after which something happens every `share` of the way, and always at the end."""
    if not share:
        return {steps}
    inner = (round(steps * share * number) for number in range(1, math.ceil(1 / share)))
    return {mark for mark in inner if mark > 0} | {steps}
