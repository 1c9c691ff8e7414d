"""Exact resume in all combinations of workers, batching and moments: equal to the bit to a run left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import Line, equal, shaped, through

from isthmus.config import Recipe
from isthmus.training.toy import toy

MOMENTS = {
    "once, within a split step": [5],
    "twice": [3, 1],
    "on both sides of an epoch's edge": [7, 1],
    "in both stages": [5, 11],
}
"""Micro-batches, counted from each start, in front of which the run is killed. A stage has ten in five steps, is saved
after the second, the fourth and the fifth step, and begins its second epoch within the third."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two stages, the second under LoRA with dropout; 20 rows are two and a half steps."""
    recipe = toy(tmp_path_factory.mktemp("toy"), rows=20)
    changes = {"batch_size": 8, "budget": {"steps": 5}, "save_every": 0.4, "evaluate_every": 0.5, "max_length": 256}
    return recipe.but(stages=[stage.but(**changes) for stage in recipe.stages])


@pytest.fixture(scope="module")
def alone(pair: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Line]:
    """Runs without workers that nothing has happened to."""
    return functools.cache(
        lambda batching: through(shaped(pair, batching, 2, 0), tmp_path_factory.mktemp("whole") / "run")
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_all_combinations(
    pair: Recipe, alone: Callable[[str], Line], tmp_path: Path, workers: int, batching: str, moments: str
) -> None:
    found = through(shaped(pair, batching, 2, workers), tmp_path / "run", MOMENTS[moments])
    assert len(found.losses) == 10
    equal(found, alone(batching))
