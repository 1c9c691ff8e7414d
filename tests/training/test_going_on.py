"""What may differ when a run goes on, what may not, and who may: memory, data, recipes, stages, locks, beginnings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console

from isthmus.cards import lineage
from isthmus.config import Recipe
from isthmus.data.mix import Batches
from isthmus.experiment import experiment
from isthmus.files import remove
from isthmus.training import locks, loop
from isthmus.training.log import read_rows
from isthmus.training.loop import run_stage
from isthmus.training.parallel import World
from isthmus.training.run import Run, mix_of, train
from isthmus.training.toy import toy
from isthmus.types import Batch, ConfigError, DataError, IsthmusError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def pair(tmp_path: Path) -> Recipe:
    """The toy with few steps and saves, on data of its own."""
    made = toy(tmp_path / "toy")
    return made.but(stages=[stage.but(budget={"steps": 4}, save_every=None) for stage in made.stages])


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


# ---------------------------------------------------------------------------------------------- memory


def test_one_llm_is_held_at_a_time_and_the_look_keeps_its_encoder(pair: Recipe, tmp_path: Path) -> None:
    run = Run(pair, tmp_path / "run", CPU, small.quiet())
    born = run.newborn()
    trained = run.train(born, look := run.look(born))
    assert trained is not None and not any(each.is_meta for each in trained.parameters())
    assert all(each.is_meta for each in born.llm.parameters())
    assert look.encoder is born.encoders["image"] and not any(each.is_meta for each in born.encoders.parameters())
    again = Run(pair, tmp_path / "run", CPU, small.quiet()).train(run.newborn(), look)  # finds both stages finished
    assert again is not None
    assert all(torch.equal(value, small.weights(trained)[name]) for name, value in small.weights(again).items())


class Failing(small.Colours):
    """Raises an error while the batch of a certain step is being made."""

    at, error = 3, BaseException()

    def __call__(self, step: int, micro: int) -> Batch:
        if step == self.at:
            raise self.error
        return super().__call__(step, micro)


def fails(recipe: Recipe, folder: Path, error: Exception, kind: type[Exception]) -> Exception:
    feed = Failing(small.build(recipe))
    feed.error = error
    with pytest.raises(kind) as found:
        run_stage(feed.vlm, small.stage(), feed, folder, steps=6, console=small.quiet())
    return found.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_memory_that_runs_out_loses_no_step_and_its_remedies_are_followed(
    recipe: Recipe, tmp_path: Path, error: Exception
) -> None:
    whole = small.build(recipe)
    run_stage(whole, small.stage(), small.Colours(whole), tmp_path / "whole", steps=6, console=small.quiet())
    found = fails(recipe, tmp_path / "run", error, IsthmusError)
    assert "memory ran out" in str(found) and "stages.align.accumulate" in str(found) and "recompute" in str(found)
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()

    vlm, said = small.build(recipe), io.StringIO()
    feed, console = small.Colours(vlm, micros=2), Console(file=said, width=200)
    run_stage(vlm, small.stage(accumulate=2, recompute=True), feed, tmp_path / "run", steps=6, console=console)
    assert min(feed.asked) == 3 and "accumulate is 2 from here on, and was 1" in said.getvalue()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_whatever_stops_a_step_before_its_update_the_steps_before_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    fails(recipe, tmp_path, ValueError("anything"), ValueError)
    assert (tmp_path / "checkpoints" / "step-0000003").is_dir()


def test_weights_that_moved_halfway_are_not_saved(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save would take the next step's weights for those of this one."""
    taken = []

    def after_step(self: Any) -> None:
        taken.append(1)
        if len(taken) == 3:
            raise IsthmusError("anything")

    monkeypatch.setattr(loop.Step, "after_step", after_step)
    vlm = small.build(recipe)
    with pytest.raises(IsthmusError, match="anything"):
        run_stage(vlm, small.stage(), small.Colours(vlm), tmp_path, steps=6, console=small.quiet())
    assert not (tmp_path / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------- recipes


def test_a_run_goes_on_under_what_changes_no_step_and_is_refused_by_name(pair: Recipe, tmp_path: Path) -> None:
    first, second = pair.stages
    folder = tmp_path / "run"
    assert train(pair.but(stages=[first]), folder, CPU) is not None
    eased = first.but(recompute=True, save_every=0.5, evaluate_every=None)
    assert train(pair.but(stages=[eased], about="said otherwise", eval=("presence",)), folder, CPU) is not None
    assert json.loads((folder / "run.json").read_text())["recipe"]["about"] == "said otherwise"
    assert train(pair.but(stages=[eased], about="nothing else", eval=("presence",)), folder, CPU) is not None
    assert json.loads((folder / "run.json").read_text())["recipe"]["about"] == "nothing else"
    with pytest.raises(ConfigError, match=r"another recipe: seed was 0; stages\.align\.lr was 0\.001"):
        train(pair.but(stages=[first.but(lr=0.5)], seed=1), folder, CPU)


def test_stages_are_added_to_a_run_as_if_they_had_been_there(pair: Recipe, tmp_path: Path) -> None:
    expected = train(pair, tmp_path / "whole", CPU)
    first, second = pair.stages
    train(pair.but(stages=[first]), tmp_path / "run", CPU)
    written = (tmp_path / "run" / "align" / "model" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="matches no parameter"):  # a stage that never began may be mended
        train(pair.but(stages=[first, second.but(train={"nowhere.*": 1e-3})]), tmp_path / "run", CPU)
    found = train(pair, tmp_path / "run", CPU)
    assert expected is not None and found is not None
    ours, theirs = small.weights(found), small.weights(expected)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and ours.keys() == theirs.keys()
    assert (tmp_path / "run" / "align" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert [stage.settings["name"] for stage in lineage(tmp_path / "run/tune/model").stages] == ["align", "tune"]


def test_a_run_begins_with_a_trained_model_as_if_both_were_one(pair: Recipe, tmp_path: Path) -> None:
    expected = train(pair, tmp_path / "whole", CPU)
    first, second = pair.stages
    train(pair.but(stages=[first]), tmp_path / "one", CPU)
    begun = pair.but(stages=[second], start=str(tmp_path / "one/align/model"))
    moved = tmp_path / "llm"
    (tmp_path / "toy" / "llm").rename(moved)  # a part is known by its weights
    (tmp_path / "toy" / "llm").symlink_to(moved)
    found = train(begun.but(llm=str(moved)), tmp_path / "two", CPU)
    assert expected is not None and found is not None
    ours, theirs = small.weights(found), small.weights(expected)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and ours.keys() == theirs.keys()
    known = json.loads((tmp_path / "two" / "run.json").read_text())["start"]
    card = (tmp_path / "two/tune/model/README.md").read_text()
    assert f"fingerprint {known}" in card and str(tmp_path) not in card

    other = begun.but(aligner={"name": "llava", "options": {"projector": "linear"}}, llm=str(moved))
    with pytest.raises(ConfigError, match=r"other parts than the recipe names: aligner\.options\.projector was"):
        train(other, tmp_path / "three", CPU)
    with (tmp_path / "one/align/model/manifest.json").open("a") as stream:
        stream.write("\n")
    with pytest.raises(ConfigError, match="is another model than the one that the run in"):
        train(begun.but(llm=str(moved)), tmp_path / "two", CPU)


# ---------------------------------------------------------------------------------------------- data


def late(folder: Path) -> Recipe:
    """A stage sample by sample, where a sample of the second window of steps is longer than 256 tokens."""
    made = toy(folder, rows=150)
    changes = {"batch_size": 1, "accumulate": 1, "max_length": 256, "evaluate_every": None, "budget": {"steps": 36}}
    recipe = made.but(stages=[made.stages[0].but(**changes, save_every=None)])
    data = mix_of(recipe.stages[0], recipe.seed)
    victim, file = data.sample(data.mix[33]).id, Path(recipe.stages[0].data[0].name)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (row,) = (row for row in rows if row["id"] == victim)
    row["conversations"][0]["value"] += " word" * 60
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return recipe


@pytest.mark.parametrize("change", [{"overlong": "drop"}, {"max_length": 1024}], ids=str)
def test_a_sample_that_is_too_long_is_dealt_with_when_it_comes(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = late(tmp_path / "toy")
    with pytest.raises(DataError, match="max_length is 256"):
        train(recipe, tmp_path / "run", CPU)
    planned = Batches(mix_of(recipe.stages[0], recipe.seed).mix, 1, "shuffled").window
    assert len(losses(tmp_path / "run" / "align")) == planned < 33
    mended = recipe.but(stages=[recipe.stages[0].but(**change)])
    assert train(mended, tmp_path / "run", CPU) is not None
    assert train(mended, tmp_path / "whole", CPU) is not None
    assert losses(tmp_path / "run" / "align") == losses(tmp_path / "whole" / "align")
    (key,) = change
    assert json.loads((tmp_path / "run/align/manifest.json").read_text())["changed"][0].startswith(f"{key} is ")
    assert f"{key} is {change[key]} from here on" in (tmp_path / "run/align/model/README.md").read_text()


def test_what_was_dropped_is_not_taken_up_halfway(pair: Recipe, tmp_path: Path) -> None:
    (stage, _) = pair.stages
    train(pair.but(stages=[stage.but(overlong="drop", max_length=256)]), tmp_path, CPU)
    with pytest.raises(ConfigError, match=r"stages\.align\.max_length was 256"):
        train(pair.but(stages=[stage.but(overlong="drop", max_length=512)]), tmp_path, CPU)


def test_data_that_change_on_the_way_are_refused_until_they_are_back(pair: Recipe, tmp_path: Path) -> None:
    (stage, _) = pair.stages
    recipe = pair.but(stages=[stage.but(save_every=0.5)])
    assert train(recipe, tmp_path / "run", CPU) is not None
    remove(tmp_path / "run/align/model")
    remove(tmp_path / "run/align/checkpoints/step-0000004")
    file = Path(stage.data[0].name)
    before = file.read_text()
    for changed in ("\n".join(before.splitlines()[:21]) + "\n", before.replace("Which", "Witch")):
        file.write_text(changed)
        with pytest.raises(ConfigError, match=r"data\.jsonl has changed since stage align began") as error:
            train(recipe, tmp_path / "run", CPU)
        assert "put the old file back" in error.value.remedy
    file.write_text(before)
    os.utime(file, (1, 1))
    assert train(recipe, tmp_path / "run", CPU) is not None


# ---------------------------------------------------------------------------------------------- one process at a time


def test_two_processes_do_not_share_a_folder(pair: Recipe, tmp_path: Path) -> None:
    with locks.alone(tmp_path / "run", World()):
        with pytest.raises(ConfigError, match="another process trains in"):
            train(pair, tmp_path / "run", CPU)
        with pytest.raises(ConfigError, match="another process trains in"):
            experiment(pair, tmp_path / "run", CPU, small.quiet())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    assert train(pair, tmp_path / "run", CPU) is not None


def test_a_lock_ends_with_its_process_even_where_a_worker_lives_on(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    holder = os.fork()
    if not holder:
        with locks.alone(tmp_path, World()):
            worker = os.fork()
            if not worker:
                time.sleep(30)
                os._exit(0)
            os.write(tell, str(worker).encode())
            time.sleep(30)
        os._exit(0)
    worker = int(os.read(ready, 20))
    try:
        with pytest.raises(ConfigError, match="another process"), locks.alone(tmp_path, World()):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locks.alone(tmp_path, World()):
            os.kill(worker, 0)  # still there
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
