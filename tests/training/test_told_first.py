"""What a later stage cannot do is told before the first one trains, in the words in which the stage itself would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch

import composed
from isthmus.config import Recipe
from isthmus.training import combination
from isthmus.training.parallel import World
from isthmus.training.run import Run
from isthmus.training.toy import toy
from isthmus.types import ConfigError

CPU = torch.device("cpu")
CONTRASTIVE = [{"name": "contrastive", "weight": 0.1}, {"name": "lm"}]


def newborn(recipe: Recipe, folder: Path, world: World = World()) -> None:  # noqa: B008 - frozen
    run = Run(recipe, folder, CPU, small.quiet())
    run.world = world
    run.newborn()


@pytest.mark.parametrize(
    ("changes", "world", "said"),
    [
        ({"objectives": CONTRASTIVE, "accumulate": 2}, World(), "contrastive compares the samples of a batch"),
        ({"batch_size": 2}, World(0, 3), "batch_size 2 leaves some of 3 ranks without work"),
        ({"accumulate": 2}, World(2, 4, 2), "batch_size 4 leaves some of 4 ranks without work in one of 2"),
    ],
)
def test_a_second_stage_that_cannot_be_dealt_out(
    tmp_path: Path, changes: dict[str, Any], world: World, said: str
) -> None:
    made = toy(tmp_path / "toy")
    first, second = made.stages[0].but(accumulate=1), made.stages[1]
    with pytest.raises(ConfigError, match=f"^stage tune: {said}"):
        newborn(made.but(stages=[first, second.but(**changes)]), tmp_path / "run", world)
    newborn(made, tmp_path / "sound")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bloom", "builds its masks by itself"),
        ("lfm2", "carry a state along the whole row"),
        ("falcon_h1", "carry a state along the whole row"),
    ],
)
def test_an_llm_that_cannot_read_packed_rows(family: str, said: str) -> None:
    vlm = composed.model(family)

    def check(**changes: Any) -> None:
        stages = [small.stage(), small.stage(name="tune", **changes)]
        combination.check(composed.recipe(family).but(stages=stages), vlm, CPU)

    with pytest.raises(ConfigError, match=f"^stage tune: {family} .*{said}"):
        check(batching="packed")
    check(batching="bucketed")
    check(batching="packed", objectives=["contrastive"])  # the LLM does not run


def test_an_llm_that_can(tmp_path: Path) -> None:
    stages = [small.stage(batching="packed")]
    combination.check(composed.recipe("llama").but(stages=stages), composed.model("llama"), CPU)
