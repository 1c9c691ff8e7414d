"""A stage that has not made a saved step binds nobody: what a refusal advises is followed in the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import small
import torch

from isthmus.config import Engine, Recipe, Stage
from isthmus.training.log import read_rows
from isthmus.training.loop import _Runner, run_stage
from isthmus.training.run import train
from isthmus.training.toy import toy, write_data
from isthmus.types import Batch, ConfigError, NotFinite

CPU = torch.device("cpu")
BURSTING = {"train": {"connectors.*": 1e39}, "warmup": 0, "save_every": 0.01}
"""A rate whose first update is no number in float32."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("place", [0, 1])
def test_a_refusal_in_the_first_step_of_a_stage_leaves_it_free(tmp_path: Path, place: int) -> None:
    made = toy(tmp_path / "toy")
    data = [write_data(tmp_path / name, 40) for name in ("one", "two")]
    short = {"budget": {"steps": 4}, "save_every": None}
    made = made.but(stages=[stage.but(data=[str(own)], **short) for stage, own in zip(made.stages, data)])
    stages = list(made.stages)
    stages[place] = stages[place].but(**BURSTING, budget={"steps": 6})
    with pytest.raises(NotFinite, match="lower the learning rate"):
        train(made.but(stages=stages), tmp_path / "run", CPU)
    file = data[place]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))  # its data may be mended, too
    for folder in ("run", "fresh"):
        assert train(made, tmp_path / folder, CPU) is not None
    run, fresh = ([losses(tmp_path / folder / name) for name in ("align", "tune")] for folder in ("run", "fresh"))
    assert run == fresh and [len(each) for each in run] == [4, 4]
    manifest = json.loads((tmp_path / "run" / stages[place].name / "manifest.json").read_text())
    assert manifest["steps"] == 4 and "changed" not in manifest


def test_a_stage_of_which_a_step_was_saved_stays_as_it_is(tmp_path: Path) -> None:
    made = toy(tmp_path / "toy")
    stage = made.stages[0].but(max_length=80)
    file = Path(stage.data[0].name)
    whole = file.read_text()
    one = made.but(stages=[stage])

    def stops(self: _Runner, state: object, *rest: object) -> None:
        real(self, state, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    real = _Runner._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Runner, "_save", stops)
        with pytest.raises(KeyboardInterrupt):
            train(one, tmp_path / "run", CPU)
    with pytest.raises(ConfigError, match=r"another recipe: stages\.align\.lr was"):
        train(made.but(stages=[stage.but(lr=0.5)]), tmp_path / "run", CPU)
    file.write_text("".join(whole.splitlines(keepends=True)[:-4]))
    with pytest.raises(ConfigError, match="has changed since stage align began"):
        train(one, tmp_path / "run", CPU)
    file.write_text(whole)
    assert train(one, tmp_path / "run", CPU) is not None


def test_minutes_are_counted_anew_until_a_step_is_saved(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([5, 3])
    monkeypatch.setattr(_Runner, "calibrate", lambda self: next(counts))

    def go(stage: Stage, after: int | None = None) -> int:
        vlm = small.build(recipe)

        class Stopped(small.Colours):
            def __call__(self, step: int, micro: int) -> Batch:
                if step == after:
                    raise KeyboardInterrupt
                return super().__call__(step, micro)

        return run_stage(vlm, stage, Stopped(vlm), tmp_path, console=small.quiet()).steps

    stage = small.stage(budget={"minutes": 1}, save_every=0.3)
    with pytest.raises(KeyboardInterrupt):
        go(stage, after=0)
    assert json.loads((tmp_path / "manifest.json").read_text())["steps"] == 5
    other = stage.but(budget={"minutes": 0.5})
    with pytest.raises(KeyboardInterrupt):
        go(other, after=2)
    assert (tmp_path / "checkpoints" / "step-0000001").is_dir()
    assert go(other) == 3  # a third count would find none
    with pytest.raises(ConfigError, match="of another run: budget.minutes was 0.5"):
        go(stage)


def test_several_processes_begin_anew_together(recipe: Recipe, tmp_path: Path) -> None:
    stage = small.stage(**BURSTING, budget={"minutes": 0.002})
    assert ranks.start(2, ranks.fail, recipe, stage, tmp_path, Engine(), ranks.Share, None) == [4, 4]
    assert (tmp_path / "manifest.json").is_file()
    mended = stage.but(train={"connectors.*": 1e-3}, save_every=None)
    assert ranks.start(2, ranks.learn, recipe, mended, tmp_path, Engine(), ranks.Share, None) == [0, 0]
    steps = json.loads((tmp_path / "manifest.json").read_text())["steps"]
    assert steps == len(losses(tmp_path)) and (tmp_path / "model").is_dir()
