"""Training survives being killed, and the test that says so would notice if it did not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isthmus.config import Engine, Recipe
from isthmus.training import torture
from isthmus.training.toy import toy


def run(folder: Path, *options: str) -> dict:
    """`isthmus torture train` in an interpreter of its own, as a person starts it."""
    words = ["-m", "isthmus.cli.app", "torture", "train", "--out", str(folder), "--json", *options]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_three_kills(tmp_path: Path) -> None:
    found = torture.torture(3, tmp_path)
    assert (found.kills, found.survived, found.faults) == (3, 3, [])


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    found = run(tmp_path, "--times", "10")
    assert (found["kills"], found["survived"], found["faults"]) == (10, 10, [])
    assert found["in_saves"] >= 1


@pytest.mark.slow
def test_kills_of_two_ranks(tmp_path: Path) -> None:
    found = run(tmp_path, "--times", "2", "--ranks", "2", "--seed", "3")
    assert (found["kills"], found["survived"], found["faults"]) == (2, 2, [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_two_ranks(tmp_path: Path) -> None:
    found = run(tmp_path, "--times", "20", "--ranks", "2", "--seed", "7")
    assert (found["kills"], found["survived"], found["faults"]) == (20, 20, [])
    assert found["in_saves"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills(tmp_path: Path) -> None:
    found = run(tmp_path, "--times", "200", "--seed", "7")
    assert (found["kills"], found["survived"], found["faults"]) == (200, 200, [])
    assert found["in_saves"] >= 50


def test_a_run_that_went_otherwise_is_told_apart(tmp_path: Path) -> None:
    recipe = toy(tmp_path / "parts")
    recipe = recipe.but(stages=[recipe.stages[0].but(budget={"steps": 3}, save_every=1 / 3)])
    assert torture._start(recipe, tmp_path / "whole", Engine()).ends_well()
    whole = torture.contents(tmp_path / "whole", recipe)
    assert torture._differences(whole, torture.contents(tmp_path / "whole", recipe)) == []

    def other(name: str, change: Recipe) -> list[str]:
        assert torture._start(change, tmp_path / name, Engine(workers=1, save_async=True)).ends_well()
        return torture._differences(whole, torture.contents(tmp_path / name, change))

    assert other("same", recipe) == []
    told = other("seed", recipe.but(seed=1))
    assert "align row 2 differs" in told and "align/model/model.safetensors differs" in told
    assert any("optimizer.safetensors" in line for line in told)


def test_a_run_that_fails_by_itself_is_said_to(tmp_path: Path) -> None:
    recipe = toy(tmp_path / "parts")
    (tmp_path / "parts" / "data" / "data.jsonl").unlink()
    assert not torture._start(recipe, tmp_path / "run", Engine()).ends_well()
    assert "cannot be read" in (tmp_path / "run" / "error.txt").read_text()


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them would wait for minutes; the processes are forked, so they have the same patch."""
    recipe = toy(tmp_path / "parts")

    def train(self: torture.Run, *_: object) -> None:
        if self.world.main:
            time.sleep(200)
        raise RuntimeError("only this one fails")

    monkeypatch.setattr(torture.Run, "train", train)
    began = time.monotonic()
    assert not torture._start(recipe, tmp_path / "run", Engine(), ranks=2).ends_well()
    assert time.monotonic() - began < 100
    assert "only this one fails" in (tmp_path / "run" / "error-1.txt").read_text()
    assert not (tmp_path / "run" / "error.txt").exists()
