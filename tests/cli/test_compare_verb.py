"""`isthmus compare` as a person meets it: a finished folder is shown, a killed one goes on, faults are two lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comparing_runs import recipes, small
from isthmus.cli import app
from isthmus.cli.compare import factors_of
from isthmus.types import ConfigError

COMMAND = [sys.executable, "-m", "isthmus", "compare"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `isthmus WORDS`."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def written(folder: Path) -> list[str]:
    """Two recipes in files."""
    files = [folder / f"{recipe.name}.yaml" for recipe in recipes(folder)]
    for recipe, file in zip(recipes(folder), files):
        recipe.save(file)
    return [str(file) for file in files]


def test_a_finished_comparison_is_shown_and_published(embedded, monkeypatch, capsys, tmp_path) -> None:
    one, two = recipes(tmp_path)
    outcome = small(tmp_path, one, two, seeds=1, limit=3)
    out, page = str(tmp_path / "comparison"), tmp_path / "results" / "joints.md"
    assert run(monkeypatch, "compare", "--out", out, "--device", "cpu", "--publish", str(page)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert outcome.advice[0] in said and "compare.html" in said and "trained" in said
    assert page.read_text().startswith("# 2 joints compared")
    assert run(monkeypatch, "compare", "--out", out, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["one", "two"]
    assert run(monkeypatch, "compare", "--out", out, "--device", "cpu", "--baseline", "two", "--json") == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "two"
    assert run(monkeypatch, "compare", *written(tmp_path), "--out", out, "--budget", "5-steps", "--no-search") == 2
    assert "another budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["lava"], "no recipe named 'lava'; did you mean 'llava'"),
        (["llava", "--budget", "soon"], "no budget is written 'soon'"),
        (["llava", "--budget", "1e400flops"], "no budget is written '1e400flops'"),
        (["llava", "--budget", "16-steps"], "16 steps give some stage of llava less than one step"),
        (["llava", "--grid", "1,zero"], "no grid of factors is written '1,zero'"),
        (["llava", "--baseline", "demo"], "no recipe is named 'demo'"),
        (["llava", "--set", "sede=1"], "unknown key 'sede'; did you mean 'seed'"),
        (["llava", "--tasks", "namin"], "no task named 'namin'; did you mean 'naming'"),
        (["llava", "--tasks", "naming, exact"], "task exact asks about a file of yours"),
        ([], "holds no comparison to go on with"),
        (["--seeds", "5"], "--seeds is told, and no recipe"),
        (["--parameters", "6M"], "--parameters is told, and no recipe"),
        (["llava", "--parameters", "six"], "no number of parameters is written 'six', and no recipe has that name"),
        (["llava", "--size", "inner"], "no size is written 'inner'"),
        (["llava", "--size", "llava=seed"], "--size is told, and no --parameters"),
        (["--set", "seed=1"], "--set is told, and no recipe"),
    ],
)
def test_faults_are_said_before_anything_runs(monkeypatch, capsys, tmp_path, words, cause) -> None:
    assert run(monkeypatch, "compare", *words, "--out", str(tmp_path / "out"), "--device", "cpu") == 2
    assert cause in capsys.readouterr().err
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    "words", [[], ["--add", "llava"], ["llava", "--budget", "soon"], ["llava", "--budget", "1-steps"]]
)
def test_what_is_refused_for_itself_leaves_no_folder(monkeypatch, tmp_path, words) -> None:
    assert run(monkeypatch, "compare", *words, "--out", str(tmp_path / "out"), "--device", "cpu") == 2
    assert not (tmp_path / "out").exists()


def test_a_grid_is_read() -> None:
    assert factors_of("1/3, 1,3") == (1 / 3, 1.0, 3.0)
    for text in ("", "0", "-1,1", "1/0", "1e400", "1,1e-400"):
        with pytest.raises(ConfigError):
            factors_of(text)


# ---------------------------------------------------------------------------------------------- processes


def right(folder: Path) -> dict[str, list[bool]]:
    """What every run answered rightly, by file."""
    return {
        str(file.relative_to(folder)): [json.loads(line)["right"] for line in file.read_text().splitlines()[1:]]
        for file in sorted(folder.rglob("predictions/after/*.jsonl"))
    }


def wait_for(folder: Path, pattern: str) -> None:
    for _ in range(1200):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pattern} never came")


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_says_the_same(embedded, tmp_path) -> None:
    files, out = written(tmp_path), tmp_path / "killed"
    words = [*files, "--budget", "2-steps", "--seeds", "2", "--no-search", "--device", "cpu", "--out", str(out)]
    for moment in ("one/seed0/run.json", "one/seed0/report.json"):
        going = subprocess.Popen([*COMMAND, *words, "--jobs", "2"], stdout=subprocess.DEVNULL)
        wait_for(out, moment)
        going.kill()
        going.wait()
    first = (out / "one" / "seed0" / "report.json").stat().st_mtime_ns
    done = subprocess.run([*COMMAND, "--device", "cpu", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "one" / "seed0" / "report.json").stat().st_mtime_ns == first
    small(tmp_path, *recipes(tmp_path))  # uninterrupted, in this process
    assert right(out) == right(tmp_path / "comparison") and len(right(out)) == 4 * 2 * 3


@pytest.mark.slow
def test_interrupted_it_saves_and_exits_130(embedded, tmp_path) -> None:
    out = tmp_path / "stopped"
    words = [*written(tmp_path), "--budget", "4000-steps", "--seeds", "1", "--no-search", "--device", "cpu"]
    going = subprocess.Popen([*COMMAND, *words, "--out", str(out)], stdout=subprocess.PIPE, text=True)
    wait_for(out, "one/seed0/align/metrics.jsonl")
    os.kill(going.pid, signal.SIGINT)
    said, _ = going.communicate(timeout=60)
    assert going.returncode == 130 and "the same command goes on" in said
    assert list((out / "one" / "seed0" / "align" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(embedded, tmp_path) -> None:
    file = tmp_path / "broken.yaml"
    recipe = recipes(tmp_path)[0].but(name="broken")
    recipe.save(file)
    (Path(recipe.llm.source) / "model.safetensors").unlink()  # what a plan does not read
    words = [str(file), "--budget", "2-steps", "--seeds", "1", "--no-search", "--device", "cpu"]
    done = subprocess.run([*COMMAND, *words, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "broken, seed 0 ended with exit code" in done.stderr
    assert "seed0.log" in done.stderr
