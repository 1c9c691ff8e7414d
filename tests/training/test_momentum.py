"""The slow copy and the queue in training: a mean by hand, never trained, resumed to the bit, equal everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import safetensors.torch
import small
import torch
from test_resume import go, losses

import tiny
from isthmus.config import Engine, Recipe, Stage
from isthmus.model import VLM
from isthmus.recipes.albef import albef
from isthmus.training import checkpoint
from isthmus.training.log import read_rows
from isthmus.training.optimizer import choose
from isthmus.training.step import Step, held_out
from isthmus.types import ConfigError

SHAPE = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "contrast": 8, "positions": 32}
OPTIONS = {**SHAPE, "dropout": 0.1, "text": True, "vocabulary": tiny.VOCAB + 1}
DECAY, SIZE = 0.8, 10
SLOW = {"alpha": 0.4, "ramp": 4, "decay": DECAY}
ALBEF = [
    {"name": "itc", "options": {**SLOW, "queue": SIZE, "smoothing": 0.0, "temperature": (0.001, 0.5)}},
    "itm",
    {"name": "mlm", "options": SLOW},
]
TRAIN = {"connectors.*": 1e-2, "connectors.*.project.*": {"mode": "frozen"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts")).but(aligner={"name": "blip2", "options": OPTIONS})


def stage(objectives: list[Any] = ALBEF, **changes: Any) -> Stage:
    return small.stage(**{"train": TRAIN, "objectives": objectives, **changes})


def born(recipe: Recipe, objectives: list[Any] = ALBEF, **changes: Any) -> Step:
    """A step as the loop makes it."""
    chosen = stage(objectives, **changes)
    step = Step(small.build(recipe), chosen.objectives)
    choose(step, chosen)
    step.accompany()
    step.ready()
    return step


def saved(folder: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "checkpoints" / f"step-{step:07d}" / file)


def test_interrupted_twice_equals_never_interrupted(recipe: Recipe, tmp_path: Path) -> None:
    chosen = stage(evaluate_every=0.34)
    go(recipe, chosen, tmp_path / "whole", validates=True)
    for stop in (1, 3, None):
        _, (vlm, _) = go(recipe, chosen, tmp_path / "parts", stop_at=stop, validates=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.DRIFTING):
        whole, parts = saved(tmp_path / "whole", 6, file), saved(tmp_path / "parts", 6, file)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    drifting = saved(tmp_path / "whole", 6, checkpoint.DRIFTING)
    assert drifting["companions.momentum.updates"] == 6 and drifting["objectives.itc.queues.image.pushed"] == 24
    # neither what is handed over nor the best weights know of it
    handed = safetensors.torch.load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert not [name for name in handed if "momentum" in name or "queue" in name]
    assert not list((tmp_path / "whole" / "checkpoints").glob(f"best-*/{checkpoint.DRIFTING}"))


def follows(folder: Path, birth: VLM) -> None:
    """The saved slow copies are the mean that a hand computes from the saved weights."""
    mean = {f"vlm.{name}": p.double() for name, p in birth.named_parameters()}
    for step in range(1, 7):
        weights, drifting = saved(folder, step, checkpoint.WEIGHTS), saved(folder, step, checkpoint.DRIFTING)
        trained = [name for name in weights if name.startswith("vlm.connectors")]
        moved = []
        for name in trained:
            mean[name] = DECAY * mean[name] + (1 - DECAY) * weights[name].double()
            found = drifting[name.replace("vlm.", "companions.momentum.")].double()
            torch.testing.assert_close(found, mean[name], atol=1e-6, rtol=1e-5)
            moved.append((found - weights[name]).abs().max() > 1e-3)
    assert any(moved)  # it is not where the weights are


def test_the_slow_copy_is_the_mean_of_all_steps_also_when_they_are_split(recipe: Recipe, tmp_path: Path) -> None:
    chosen = stage([{"name": "mlm", "options": SLOW}], accumulate=2, save_every=1 / 6, train=SILENT)
    go(recipe, chosen, tmp_path, engine=Engine(keep=6))
    follows(tmp_path, small.build(recipe))


SILENT = {
    **TRAIN,
    **{f"connectors.*.heads.{part}*": {"mode": "frozen"} for part in ("picture", "text", "match", "temp")},
}
"""Without contrast and matching, their heads have no gradient."""


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_several_processes_keep_one_slow_copy_and_one_queue(recipe: Recipe, tmp_path: Path, parallel: str) -> None:
    """Beside each other, in the order of one process; what validation draws is the same, too."""
    recipe = recipe.but(aligner={"name": "blip2", "options": {**OPTIONS, "dropout": 0.0}})  # drawn by each for itself
    chosen = stage([*ALBEF[:2], "itg"], save_every=1 / 6)
    engine = Engine(keep=6, parallel=parallel)
    assert ranks.start(2, ranks.learn, recipe, chosen, tmp_path, engine) == [0, 0]
    follows(tmp_path, small.build(recipe))
    alone = tmp_path / "alone"
    ranks.learn(ranks.World(), recipe, chosen, alone, Engine(keep=6))
    rows = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path, alone))
    shown, wanted = ([row["validation_loss"] for row in each if "validation_loss" in row] for each in rows)
    assert shown == pytest.approx(wanted, rel=1e-4) and len(shown) == 1
    together, expected = (saved(folder, 6, checkpoint.DRIFTING) for folder in (tmp_path, alone))
    assert together.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_no_gradient_reaches_the_slow_copy_and_it_is_not_counted(recipe: Recipe) -> None:
    step = born(recipe)
    trained = [name for name, p in step.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if "companions" in name]
    batch = small.Colours(step.vlm)(0, 0)
    for _ in range(2):  # at the second, the copy has weight
        step(batch, step.scales([batch]))[0].backward()
        step.after_step()
    assert all(p.grad is None and not p.requires_grad for p in step.companions.parameters())
    assert not any(module.training for module in step.companions["momentum"].connectors.modules())
    queue = step.objectives["itc"].queues["image"]
    assert queue.pushed == 8 and not any(buffer.requires_grad for buffer in queue.buffers())


def test_without_weight_and_queue_there_is_no_copy_and_nothing_to_save(recipe: Recipe) -> None:
    step = born(recipe, ["itc", "itm", "mlm"])
    assert not len(step.companions) and step.drifting() == {}


def test_validation_and_unused_gradients_leave_the_queue_alone(recipe: Recipe) -> None:
    step = born(recipe)
    batch = small.Colours(step.vlm)(0, 0)
    step.eval()
    with torch.no_grad():
        step(batch, step.scales([batch]))
    step.after_step()
    assert step.objectives["itc"].queues["image"].pushed == 0
    step.ready()
    for _ in range(3):  # as calibration runs them
        step(batch, step.scales([batch]))
    assert step.objectives["itc"].queues["image"].pushed == 0


def test_while_weights_stand_still_validation_does(recipe: Recipe) -> None:
    step = born(recipe)
    batch, losses = small.Colours(step.vlm)(0, 0), []
    for _ in range(3):
        torch.manual_seed(0)
        losses.append(held_out([batch])(step))
        step.ready()
        step(batch, step.scales([batch]))
        step.after_step()  # the queue grows, and what the slow copy says gains weight
    assert step.companions["momentum"].updates == 3 and step.objectives["itc"].queues["image"].pushed == 12
    assert losses[0] == losses[1] == losses[2]


def test_only_a_slow_copy_follows_and_is_saved(recipe: Recipe) -> None:
    step = born(recipe)
    expected = set(step.drifting())
    step.companions["teacher"] = torch.nn.BatchNorm1d(3)
    step.after_step()
    assert step.companions["momentum"].updates == 1 and set(step.drifting()) == expected


def test_ddp_leaves_queues_where_they_are(recipe: Recipe, tmp_path: Path) -> None:
    assert ranks.start(2, ranks.queues, recipe, stage(), tmp_path) == [0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[0] * SIZE, [1] * SIZE]


def test_terms_that_want_different_copies_are_refused(recipe: Recipe) -> None:
    objectives = [{"name": name, "options": {"alpha": 0.4, "decay": d}} for name, d in (("itc", 0.9), ("mlm", 0.99))]
    with pytest.raises(ConfigError, match=r"0\.9.*0\.99"):
        born(recipe, objectives)
    with pytest.raises(ConfigError, match="no captions"):
        born(recipe.but(aligner={"name": "blip2", "options": SHAPE}), ["itc"])


@pytest.mark.parametrize("contrast", [True, False])
def test_every_tensor_that_albefs_first_stage_trains_has_a_gradient(recipe: Recipe, contrast: bool) -> None:
    first = albef(contrast=contrast).stages[0]
    step = born(recipe, list(first.objectives), train=first.train)
    batch = small.Colours(step.vlm)(0, 0)
    step(batch, step.scales([batch]))[0].backward()
    silent = {name for name, p in step.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not silent
