"""Which of a task's items are asked: the same ones for every seed of a recipe, and in their order."""

from __future__ import annotations

from random import Random

SEED = 0
"""What items are drawn by: a recipe's seed changes the model that answers, never what it is asked."""


def drawn(items: int, limit: int) -> list[int]:
    """The places of `limit` of so many items, ascending."""
    return sorted(Random(SEED).sample(range(items), limit))
