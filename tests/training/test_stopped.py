"""A run that is stopped where no step can be finished first: while pictures are encoded, and while steps are timed."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from test_saves import ended, in_a_process

from isthmus.config import Recipe
from isthmus.prepare import features
from isthmus.prepare.features import FeatureCache
from isthmus.training.loop import _Runner
from isthmus.training.run import train
from isthmus.training.toy import toy

PICTURES = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two steps of the toy."""
    made = toy(tmp_path_factory.mktemp("toy"))
    return made.but(stages=[made.stages[0].but(budget={"steps": 2}, save_every=None, evaluate_every=None)])


def trained(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> tuple[list[bytes], dict[str, torch.Tensor]]:
    """A run to its end: the files of its feature cache, and the weights."""
    patch.setenv("ISTHMUS_HOME", str(folder / "home"))
    patch.setattr(features, "CPU_BATCH", 1)
    assert train(recipe, folder / "run", torch.device("cpu")) is not None
    (rows,) = (folder / "home").rglob("rows.bin")
    model = safetensors.torch.load_file(folder / "run" / "align" / "model" / "model.safetensors")
    return [rows.read_bytes(), rows.with_name("index.txt").read_bytes()], model


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], dict[str, torch.Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        return trained(recipe, tmp_path_factory.mktemp("whole"), patch)


def stops_at(number: int, name: signal.Signals, real: Callable[..., object]) -> Callable[..., object]:
    """The function, but this process gets a signal when it is called for the third time, say, and has done its work."""
    calls = itertools.count(1)

    def function(*arguments: object) -> object:
        found = real(*arguments)
        if next(calls) == number:
            os.kill(os.getpid(), name)
        return found

    return function


CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}


@pytest.mark.parametrize(
    "name, at", [*((name, "encoded") for name in CODES), (signal.SIGKILL, "rows without names")], ids=str
)
def test_a_cache_that_was_half_filled_is_filled_to_the_bit(
    recipe: Recipe,
    whole: tuple[list[bytes], dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: signal.Signals,
    at: str,
) -> None:
    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if at == "encoded":
                patch.setattr(FeatureCache, "_encode", stops_at(3, name, FeatureCache._encode))
            else:
                patch.setattr(features, "os", SimpleNamespace(fsync=stops_at(3, name, os.fsync)))
            trained(recipe, tmp_path, patch)

    assert ended(in_a_process(work)) == CODES[name]
    (rows,) = (tmp_path / "home").rglob("rows.bin")
    names = rows.with_name("index.txt").read_text().split()
    assert len(names) in (1, 2) and not list(rows.parent.glob("filled-*"))
    encoded: list[int] = []
    real = FeatureCache._encode
    monkeypatch.setattr(FeatureCache, "_encode", lambda self, pixels: encoded.append(1) or real(self, pixels))
    files, model = trained(recipe, tmp_path, monkeypatch)
    assert len(encoded) == PICTURES - len(names)
    assert files == whole[0]
    assert model.keys() == whole[1].keys() and all(torch.equal(model[key], whole[1][key]) for key in model)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_steps_that_were_only_timed_leave_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: signal.Signals
) -> None:
    timed = recipe.but(stages=[recipe.stages[0].but(budget={"minutes": 0.005})])

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Runner, "_seconds", stops_at(3, name, _Runner._seconds))
            trained(timed, tmp_path, patch)

    assert ended(in_a_process(work)) == CODES[name]
    left = {path.name for path in (tmp_path / "run" / "align").iterdir()}
    assert left <= {"data.json", "machine.json"}
    trained(timed, tmp_path, monkeypatch)
    assert json.loads((tmp_path / "run" / "align" / "manifest.json").read_text())["steps"] >= 1
