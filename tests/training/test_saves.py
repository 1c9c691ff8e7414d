"""Saves beside the training, and what a full disk, a read-only folder or an impatient person leave behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch

from isthmus.config import Engine, Recipe
from isthmus.training import checkpoint, curves, run
from isthmus.training.log import read_rows
from isthmus.training.loop import run_stage
from isthmus.training.run import Run
from isthmus.training.step import Step
from isthmus.training.toy import toy
from isthmus.types import Batch, IsthmusError, NotFinite


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The first stage of the toy: eight steps, saved after each."""
    made = toy(tmp_path_factory.mktemp("toy"))
    return made.but(stages=made.stages[:1])


def train(recipe: Recipe, folder: Path, **engine: object) -> bool:
    """Whether it was finished."""
    begun = Run(recipe.but(engine=engine), folder, torch.device("cpu"), small.quiet())
    model = begun.newborn()
    return begun.train(model, model.processor.look) is not None


def in_a_process(work: Callable[[], object]) -> int:
    """A forked process of its own group that works and exits with 0, or with 7 if one of our errors is raised."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in what they start behind `&`
        torch.set_num_threads(1)
        code = 0 if work() is not False else 5
    except IsthmusError:
        code = 7
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sound(folder: Path) -> list[int]:
    """The steps of the finished checkpoints, none of which may be damaged."""
    found = sorted((folder / "align" / "checkpoints").glob("step-*"))
    assert [checkpoint.damage(each) for each in found] == [None] * len(found)
    return [int(each.name[5:]) for each in found]


def until(there: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


def result(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "align" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def expected(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(recipe, folder)
    return result(folder)


def finishes_as(expected: dict[str, torch.Tensor], recipe: Recipe, folder: Path) -> None:
    assert train(recipe, folder)
    found = result(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


# ---------------------------------------------------------------------------------------------- beside the training


def test_what_is_written_beside_the_training_are_the_weights_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = small.build(small.parts(tmp_path / "parts"))
    seen: dict[int, torch.Tensor] = {}
    release, overlaps = threading.Event(), []
    name = "vlm." + next(name for name, _ in vlm.named_parameters() if name.startswith("connectors."))

    class Feed(small.Colours):
        def __call__(self, step: int, micro: int) -> Batch:
            seen[step] = dict(vlm.named_parameters())[name.removeprefix("vlm.")].detach().clone()
            if step == 3:  # the save after step 2 has not ended while step 3 was taken
                overlaps.append(not release.is_set())
                release.set()
            return super().__call__(step, micro)

    real = checkpoint.save_file

    def save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if not release.is_set():
            assert release.wait(60)
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    stage = small.stage(save_every=1 / 3)
    engine = Engine(save_async=True, keep=3)
    run_stage(vlm, stage, Feed(vlm), tmp_path / "run", steps=6, console=small.quiet(), engine=engine)
    assert overlaps == [True]
    for step in (2, 4):
        saved = tmp_path / "run" / "checkpoints" / f"step-{step:07d}"
        assert checkpoint.damage(saved) is None
        assert torch.equal(safetensors.torch.load_file(saved / checkpoint.WEIGHTS)[name], seen[step])
    assert not torch.equal(seen[2], seen[3])


def test_what_fails_beside_the_training_stops_it_at_the_next_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    real, calls = checkpoint.sync, []

    def sync(path: Path) -> None:
        calls.append(path)
        if "step-0000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", sync)
        with pytest.raises(IsthmusError, match=r"step-0000003: cannot be written \(No space left"):
            train(recipe, tmp_path, save_async=True)
    assert not any("step-0000005" in str(path) for path in calls)
    assert sound(tmp_path)[-1] in (2, 4) and not list((tmp_path / "align" / "checkpoints").glob(".*"))
    finishes_as(expected, recipe, tmp_path)


class Blank(small.Colours):
    """A picture of the fourth step is no numbers, or the step is interrupted."""

    error: BaseException | None = None

    def __call__(self, step: int, micro: int) -> Batch:
        batch = super().__call__(step, micro)
        if step == 3:
            if self.error is not None:
                raise self.error
            batch.media["image"].pixels.fill_(torch.nan)
        return batch


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("error", [None, ValueError("anything"), KeyboardInterrupt()], ids=repr)
def test_a_stage_that_fails_is_left_when_its_last_save_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, full: bool
) -> None:
    real = checkpoint._fill

    def fill(*arguments: object) -> None:
        time.sleep(0.5)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_fill", fill)
    vlm = small.build(small.parts(tmp_path / "parts"))
    feed, stage = Blank(vlm), small.stage(save_every=1 / 2)
    feed.error = error
    with pytest.raises(BaseException) as told:  # noqa: PT011 - its kind is looked at below
        run_stage(vlm, stage, feed, tmp_path, steps=6, console=small.quiet(), engine=Engine(save_async=True))
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    saved = tmp_path / "checkpoints" / "step-0000003"
    if full:
        assert isinstance(told.value, IsthmusError) and not saved.exists()
        assert f"{saved}: cannot be written (No space left on device)" in str(told.value)
    else:
        assert isinstance(told.value, type(error) if error else NotFinite) and checkpoint.damage(saved) is None
        assert error or "a checkpoint of step 3 is saved" in str(told.value)


@pytest.mark.parametrize("keep", [1, 4])
def test_so_many_checkpoints_stay(recipe: Recipe, tmp_path: Path, keep: int) -> None:
    assert train(recipe, tmp_path, keep=keep, save_async=keep == 4)
    assert sound(tmp_path) == list(range(9 - keep, 9))


# ---------------------------------------------------------------------------------------------- disks and people


@pytest.mark.parametrize("save_async", [False, True])
def test_a_disk_that_takes_no_more_bytes(
    recipe: Recipe, tmp_path: Path, save_async: bool, expected: dict[str, torch.Tensor]
) -> None:
    """The system's own limit on a file's size: writes beyond it fail as they do on a full disk."""

    def work() -> None:
        real = Step.scales

        def scales(self: Step, batches: list[Batch]) -> dict[str, float]:
            if (tmp_path / "align" / "checkpoints" / "step-0000003").is_dir():
                resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
            return real(self, batches)

        Step.scales = scales  # type: ignore[method-assign]  # in this process alone
        train(recipe, tmp_path, save_async=save_async)

    assert ended(in_a_process(work)) == 7
    assert sound(tmp_path)[-1] in (3, 4) and not list((tmp_path / "align" / "checkpoints").glob(".*"))
    finishes_as(expected, recipe, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "align").mkdir()
    (tmp_path / "align").chmod(0o555)
    try:
        with pytest.raises(IsthmusError, match="cannot be written"):
            train(recipe, tmp_path)
    finally:
        (tmp_path / "align").chmod(0o755)
    assert not list((tmp_path / "align").iterdir())


def test_a_disk_that_becomes_read_only(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *args: object, **more: object) -> None:
        if "step-0000003" in self.name:
            raise OSError(errno.EROFS, "Read-only file system")
        real(self, *args, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(IsthmusError, match=r"step-0000003: cannot be written \(Read-only file system\)"):
            train(recipe, tmp_path)
    assert sound(tmp_path) == [1, 2]
    finishes_as(expected, recipe, tmp_path)


def test_a_disk_that_has_no_room_for_the_picture(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    def draw(*unused: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(curves, "draw_curves", draw)
        with pytest.raises(IsthmusError, match=r"curves.png: cannot be written \(No space left"):
            train(recipe, tmp_path)
    assert sound(tmp_path)[-1] == 8
    finishes_as(expected, recipe, tmp_path)


@pytest.mark.parametrize("note", ["run.json", "align/machine.json", "align/manifest.json"])
def test_a_note_that_was_cut_is_made_again_or_named(
    recipe: Recipe, tmp_path: Path, note: str, expected: dict[str, torch.Tensor]
) -> None:
    assert train(recipe, tmp_path)
    shutil.rmtree(tmp_path / "align" / "model")
    file = tmp_path / note
    file.write_bytes(file.read_bytes()[:-20])
    if note != "align/machine.json":
        with pytest.raises(IsthmusError, match=f"{note} cannot be read") as told:
            train(recipe, tmp_path)
        if "delete it" not in told.value.remedy:
            return
        file.unlink()
    finishes_as(expected, recipe, tmp_path)


def test_a_disk_that_has_no_room_to_begin(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*unused: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "write_text", write)
    with pytest.raises(IsthmusError, match=r"run.json: cannot be written \(No space left"):
        train(recipe, tmp_path)


def test_what_kills_left_of_files_is_cleared_away(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "align" / ".model.part").mkdir(parents=True)
    for name in (".run.json.0a1b2c3d.part", "align/.metrics.jsonl.0a1b2c3d.part", "align/.model.part/config.json"):
        (tmp_path / name).write_text("half of it")
    Run(recipe, tmp_path, torch.device("cpu"), small.quiet())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["align", "run.json"]


def slow(recipe: Recipe, folder: Path, **engine: object) -> int:
    """A process that trains at no more than five steps a second."""

    def work() -> bool:
        real = Step.scales

        def scales(self: Step, batches: list[Batch]) -> dict[str, float]:
            time.sleep(0.2)
            return real(self, batches)

        Step.scales = scales  # type: ignore[method-assign]
        return train(recipe, folder, **engine)

    return in_a_process(work)


@pytest.mark.parametrize("engine", [{}, {"workers": 2, "save_async": True}])
def test_a_scheduler_that_ends_the_job_finds_it_saved_in_time(
    recipe: Recipe, tmp_path: Path, engine: dict[str, object], expected: dict[str, torch.Tensor]
) -> None:
    stages = [recipe.stages[0].but(save_every=None)]
    recipe = recipe.but(stages=stages)
    child = slow(recipe, tmp_path, **engine)
    metrics = tmp_path / "align" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.stat().st_size)
    began = time.monotonic()
    os.killpg(child, signal.SIGTERM)  # as SLURM does: to every process of the job
    assert ended(child) == 5
    assert time.monotonic() - began < 30
    (step,) = sound(tmp_path)
    assert 1 <= step < 8
    finishes_as(expected, recipe, tmp_path)


@pytest.mark.parametrize("save_async", [False, True])
def test_ctrl_c_twice(recipe: Recipe, tmp_path: Path, save_async: bool, expected: dict[str, torch.Tensor]) -> None:
    child = slow(recipe, tmp_path, save_async=save_async, workers=1)
    saves = tmp_path / "align" / "checkpoints"
    until(lambda: saves.is_dir() and any(saves.glob("step-*")))
    os.killpg(child, signal.SIGINT)
    time.sleep(0.03)
    os.killpg(child, signal.SIGINT)
    assert ended(child) in (5, 130)
    assert sound(tmp_path)
    finishes_as(expected, recipe, tmp_path)


def test_a_clock_that_jumps(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    """A day back and a day forth at every look: the time of day is written down, and decides nothing."""
    real, looks = time.time, iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 86_400 * (-1) ** next(looks))
        finishes_as(expected, recipe, tmp_path)
    told = [row["time"] for row in read_rows(tmp_path / "align" / "metrics.jsonl")]
    assert max(told) - min(told) > 86_400
    assert sound(tmp_path)[-1] == 8
