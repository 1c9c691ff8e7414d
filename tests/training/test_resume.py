"""Exact resume and safe saves: what was interrupted, killed or damaged ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch

from isthmus.config import Recipe, Stage
from isthmus.training import checkpoint, optimizer
from isthmus.training.log import read_rows
from isthmus.training.loop import Result, run_stage
from isthmus.training.run import Feed, Run
from isthmus.training.signals import interrupts
from isthmus.training.step import Step, held_out
from isthmus.training.toy import toy
from isthmus.types import Batch, ConfigError, IsthmusError

LORA = {"connectors.*": 1e-2, "llm.*": {"mode": {"r": 2, "dropout": 0.2}, "lr": 1e-2}}
"""Dropout, so that a step which does not seed itself is found out."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


class Interrupting(small.Colours):
    """Asks to stop while the batch of a certain step is being made."""

    stop_at: int | None = None
    signal: signal.Signals = signal.SIGINT

    def __call__(self, step: int, micro: int) -> Batch:
        if step == self.stop_at and micro == 0:
            signal.raise_signal(self.signal)
        return super().__call__(step, micro)


def go(recipe: Recipe, stage: Stage, folder: Path, stop_at: int | None = None, **more: Any) -> tuple[Result, Any]:
    vlm = small.build(recipe)
    feed = Interrupting(vlm, size=stage.batch_size, micros=stage.accumulate)
    feed.stop_at = stop_at
    feed.signal = more.pop("signal", signal.SIGINT)
    validate = held_out([small.Colours(vlm)(50, 0)]) if more.pop("validates", False) else None
    result = run_stage(vlm, stage, feed, folder, steps=6, validate=validate, console=small.quiet(), **more)
    return result, (vlm, feed)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_twice_equals_never_interrupted(recipe: Recipe, tmp_path: Path, accumulate: int) -> None:
    stage = small.stage(train=LORA, accumulate=accumulate, evaluate_every=0.34, save_every=0.5)
    whole, (expected, _) = go(recipe, stage, tmp_path / "whole", validates=True)
    assert whole.state == "done" and whole.at.step == 6

    first, _ = go(recipe, stage, tmp_path / "parts", stop_at=1, validates=True)
    assert (first.state, first.at.step, first.model) == ("interrupted", 2, None)
    second, (_, feed) = go(recipe, stage, tmp_path / "parts", stop_at=3, validates=True, signal=signal.SIGTERM)
    assert (second.state, second.at.step) == ("interrupted", 4)
    assert set(feed.asked) == {2, 3}  # nothing is replayed
    last, (found, _) = go(recipe, stage, tmp_path / "parts", validates=True)

    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    for name, tensor in small.weights(expected).items():
        assert torch.equal(tensor, small.weights(found)[name]), name
    same = ("step", "samples", "tokens", "loss", "best_step", "best_loss")
    assert [getattr(last.at, field) for field in same] == [getattr(whole.at, field) for field in same]
    moments = [tmp_path / run / "checkpoints" / "step-0000006" / checkpoint.MOMENTS for run in ("whole", "parts")]
    a, b = map(safetensors.torch.load_file, moments)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_second_interrupt_stops_at_once_and_damages_nothing(recipe: Recipe, tmp_path: Path) -> None:
    class Impatient(Interrupting):
        def __call__(self, step: int, micro: int) -> Batch:
            batch = super().__call__(step, micro)
            if step == self.stop_at:
                signal.raise_signal(signal.SIGINT)
            return batch

    before = signal.getsignal(signal.SIGINT)
    vlm = small.build(recipe)
    feed = Impatient(vlm)
    feed.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        run_stage(vlm, small.stage(save_every=0.5), feed, tmp_path, steps=6, console=small.quiet())
    assert signal.getsignal(signal.SIGINT) is before
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-0000003" and checkpoint.damage(saved) is None


def test_sigterm_of_a_scheduler_and_of_a_launcher_is_one_request(recipe: Recipe, tmp_path: Path) -> None:
    class Both(Interrupting):
        def __call__(self, step: int, micro: int) -> Batch:
            batch = super().__call__(step, micro)
            if step == self.stop_at:
                signal.raise_signal(signal.SIGTERM)
            return batch

    feed = Both(small.build(recipe))
    feed.stop_at, feed.signal = 2, signal.SIGTERM
    result = run_stage(feed.vlm, small.stage(), feed, tmp_path, steps=6, console=small.quiet())
    assert (result.state, result.at.step) == ("interrupted", 3)
    assert checkpoint.damage(tmp_path / "checkpoints" / "step-0000003") is None


def test_a_request_amid_a_line_that_is_being_printed_is_heard() -> None:
    def say(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with interrupts(say) as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", ["first file", "second file", "manifest"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    stage = small.stage(save_every=1 / 6)
    _, (expected, _) = go(recipe, stage, tmp_path / "whole")

    real_save, real_hash, written = checkpoint.save_file, checkpoint.sha256, []

    class Killed(BaseException):
        """Not an Exception, so that nothing tidies up: as after a power cut."""

    def save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
        written.append(file.name)
        if len(written) == {"first file": 5, "second file": 6}.get(at):
            file.write_bytes(b"half")
            raise Killed
        real_save(tensors, file)

    def sha256(file: Path) -> str:
        if at == "manifest" and len(written) == 6:
            raise Killed
        return real_hash(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        patch.setattr(checkpoint, "sha256", sha256)
        with pytest.raises(Killed):
            go(recipe, stage, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / ".step-0000003.part").is_dir()

    _, (found, feed) = go(recipe, stage, tmp_path / "run")
    assert min(feed.asked) == 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, tensor in small.weights(expected).items():
        assert torch.equal(tensor, small.weights(found)[name]), name


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe: Recipe, tmp_path: Path, harm: str) -> None:
    stage = small.stage(save_every=1 / 6)
    go(recipe, stage, tmp_path, stop_at=3)
    newest = tmp_path / "checkpoints" / "step-0000004"
    victim = newest / (checkpoint.MANIFEST if harm == "manifest" else checkpoint.WEIGHTS)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    match harm:
        case "flip":
            victim.write_bytes(content)
        case "truncate" | "manifest":
            victim.write_bytes(content[: len(content) // 2])
        case "delete":
            victim.unlink()
    said: list[str] = []
    saves = checkpoints(recipe, stage, tmp_path, said)
    assert saves.resume().step == 3
    assert len(said) == 1 and str(victim) in said[0]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]


def checkpoints(recipe: Recipe, stage: Stage, folder: Path, said: list[str]) -> checkpoint.Checkpoints:
    step = Step(small.build(recipe), stage.objectives)
    trained = optimizer.choose(step, stage)
    adamw = optimizer.adamw(trained, stage.betas)
    return checkpoint.Checkpoints(folder / "checkpoints", step, trained, adamw, said.append)


def test_the_last_two_and_the_best_are_kept_and_the_best_is_handed_over(recipe: Recipe, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0, 1.5])

    def validate(step: Any) -> float:
        seen.append(small.weights(step.vlm))
        return next(values)

    vlm = small.build(recipe)
    stage = small.stage(evaluate_every=1 / 6, save_every=1 / 6)
    result = run_stage(vlm, stage, small.Colours(vlm), tmp_path, steps=6, validate=validate, console=small.quiet())
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best-0000002", "step-0000005", "step-0000006"]
    assert (result.at.best_step, result.at.best_loss) == (2, 1.0)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in small.weights(vlm).items())
    assert any(not torch.equal(tensor, seen[5][name]) for name, tensor in small.weights(vlm).items())
    again = type(vlm).from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in small.weights(again).items())


def test_a_full_disk_is_said_in_two_lines_and_loses_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = small.stage(save_every=1 / 6)
    go(recipe, stage, tmp_path, stop_at=1)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")}

    def save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(IsthmusError) as error:
        go(recipe, stage, tmp_path)
    assert "step-0000003: cannot be written" in error.value.cause and "No space left" in error.value.cause
    assert "free some space" in error.value.remedy
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")} == before
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_file_where_the_folder_should_be(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(IsthmusError, match="cannot be written"):
        go(recipe, small.stage(), tmp_path / "run")


def test_the_folder_of_another_run_is_refused_with_the_difference(recipe: Recipe, tmp_path: Path) -> None:
    go(recipe, small.stage(), tmp_path, stop_at=1)
    with pytest.raises(ConfigError, match="of another run: lr was 0.001"):
        go(recipe, small.stage(lr=5e-4), tmp_path)
    with pytest.raises(ConfigError, match="of another run: seed was 0"):
        go(recipe, small.stage(), tmp_path, seed=1)


def test_minutes_become_steps_once(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    stage = small.stage(budget={"minutes": 0.02})
    first = run_stage(vlm, stage, small.Colours(vlm), tmp_path, console=small.quiet())
    assert first.steps == json.loads((tmp_path / "manifest.json").read_text())["steps"] >= 1
    shutil.rmtree(tmp_path / "checkpoints")

    class Untimed(small.Colours):
        def __call__(self, step: int, micro: int) -> Batch:
            if not self.asked:
                assert step == 0
            return super().__call__(step, micro)

    feed = Untimed(small.build(recipe))
    assert run_stage(feed.vlm, stage, feed, tmp_path, console=small.quiet()).steps == first.steps
    assert feed.asked == list(range(first.steps))  # no batch was spent on the clock


# ---------------------------------------------------------------------------------------------- whole recipes


@dataclass
class Line:
    """What a run of a recipe's stages amounts to."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    losses: list[tuple[str, int, float]]


def through(recipe: Recipe, folder: Path, stops: Sequence[int] = ()) -> Line:
    """All stages of a recipe from a folder's beginning to its end.

    `stops` are the micro-batches, counted over both stages, while which a run is killed: an exception that nothing
    of ours catches, so whatever was not saved is lost.
    """
    for stop in (*stops, None):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            if stop is not None:
                _kill_at(patch, stop)
            run = Run(recipe, folder, torch.device("cpu"), small.quiet())
            vlm = run.newborn()
            done = run.train(vlm, vlm.processor.look)
            assert stop is None, f"nothing was killed at {stop}"
    assert done is not None
    moments = {}
    for stage in recipe.stages:
        newest = max((folder / stage.name / "checkpoints").glob("step-*"))
        moments |= {
            f"{stage.name}/{key}": tensor
            for key, tensor in safetensors.torch.load_file(newest / checkpoint.MOMENTS).items()
        }
    told = [(stage.name, *row) for stage in recipe.stages for row in losses(folder / stage.name)]
    return Line(small.weights(done), moments, told)


class Killed(BaseException):
    """Not an Exception, so that nothing tidies up: as after a power cut."""


def _kill_at(patch: pytest.MonkeyPatch, stop: int) -> None:
    """Die in front of a micro-batch's forward; what came before it in its step is lost with it."""
    done = itertools.count()
    real = Step.forward

    def forward(self: Step, *args: Any) -> Any:
        if torch.is_grad_enabled() and next(done) == stop:
            raise Killed
        return real(self, *args)

    patch.setattr(Step, "forward", forward)


def equal(found: Line, expected: Line) -> None:
    assert found.losses == expected.losses
    for name in ("weights", "moments"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


CASES = {
    "once": ("bucketed", 2, 0, [5]),
    "in front of the first save": ("bucketed", 2, 0, [2]),
    "twice": ("shuffled", 1, 0, [3, 1]),
    "within a split step": ("bucketed", 4, 0, [9, 3]),
    "over the edge of an epoch": ("bucketed", 1, 0, [4, 2]),
    "within a packed window": ("packed", 2, 0, [5]),
    "one worker": ("bucketed", 2, 1, [5, 3]),
    "four workers": ("packed", 1, 4, [3]),
    "in the second stage": ("bucketed", 2, 0, [14]),
    "in both stages": ("packed", 2, 1, [5, 10]),
}
"""Batching, micro-batches, workers, and where each start is killed."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two stages of five steps of eight samples, the second under LoRA with dropout; 20 rows in a file are an epoch."""
    recipe = toy(tmp_path_factory.mktemp("toy"), rows=20)
    changes = {"batch_size": 8, "budget": {"steps": 5}, "save_every": 0.4, "evaluate_every": 0.5, "max_length": 256}
    return recipe.but(stages=[stage.but(**changes) for stage in recipe.stages])


@pytest.fixture(scope="module")
def uninterrupted(pair: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Line]:
    """Runs that were left alone, in one process without workers."""
    return functools.cache(
        lambda batching, accumulate: through(
            shaped(pair, batching, accumulate, 0), tmp_path_factory.mktemp("whole") / "run"
        )
    )


def shaped(recipe: Recipe, batching: str, accumulate: int, workers: int) -> Recipe:
    stages = [stage.but(batching=batching, accumulate=accumulate) for stage in recipe.stages]
    return recipe.but(stages=stages, engine={"workers": workers, "save_async": workers == 1})


BRIEFER = ("once", "one worker", "in the second stage")
"""Cases whose ways of stopping are those of others, each with one thing less."""


@pytest.mark.parametrize("case", [pytest.param(each, marks=[pytest.mark.slow] * (each in BRIEFER)) for each in CASES])
def test_a_killed_recipe_equals_one_left_alone(
    pair: Recipe, uninterrupted: Callable[[str, int], Line], tmp_path: Path, case: str
) -> None:
    batching, accumulate, workers, stops = CASES[case]
    found = through(shaped(pair, batching, accumulate, workers), tmp_path / "run", stops)
    expected = uninterrupted(batching, accumulate)
    assert len(expected.losses) == 10 and len({loss for *_, loss in expected.losses}) == 10
    equal(found, expected)


def test_resume_reads_no_batch_before_its_step(pair: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through(pair, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tune" / "model")
    newest = max((tmp_path / "run" / "tune" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    asked: list[int] = []
    real = Feed.__call__

    def call(self: Feed, step: int, micro: int) -> Batch:
        asked.append(step)
        return real(self, step, micro)

    monkeypatch.setattr(Feed, "__call__", call)
    through(pair, tmp_path / "run")
    assert set(asked) == {4}
