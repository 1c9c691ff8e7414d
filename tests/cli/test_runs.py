"""`isthmus runs`: what is listed is what the folders hold, finished or not, and the picture has every curve."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.cli import app
from isthmus.cli.runs import read
from isthmus.recipes import BOOK
from isthmus.training.curves import COLOURS
from isthmus.training.locks import held


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `isthmus WORDS`."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def write(folder: Path, losses: dict[str, list[float]], done: tuple[str, ...] = ()) -> None:
    """A run of two stages as `isthmus train` leaves it; stages that have not begun have no folder."""
    recipe = {"name": "mine", "stages": [{"name": "align"}, {"name": "sft"}]}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"fingerprint": "0", "recipe": recipe}))
    for stage, values in losses.items():
        (folder / stage).mkdir()
        (folder / stage / "manifest.json").write_text(json.dumps({"run": {}, "steps": 40}))
        rows = [{"step": n, "loss": v, "tokens_per_second": 100.0 * n} for n, v in enumerate(values, start=1)]
        rows.insert(-1, {"step": len(values), "validation_loss": 9.5})
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in done:
        (folder / stage / "model").mkdir()


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write(tmp_path / "one", {"align": [4.0 - n / 20 for n in range(40)], "sft": [2.0, 1.5, 1.25]}, done=("align",))
    write(tmp_path / "deep" / "two", {"align": [3.0] * 40, "sft": [1.0] * 40}, done=("align", "sft"))
    return tmp_path


def test_states_steps_losses_and_speed(monkeypatch, capsys, two):
    assert run(monkeypatch, "runs", str(two), "--json") == 0
    found = {Path(each["folder"]).name: each for each in json.loads(capsys.readouterr().out)}
    assert found["one"]["state"] == "stopped" and found["two"]["state"] == "done"
    align, sft = found["one"]["stages"]
    assert (align["state"], align["step"], align["steps"]) == ("done", 40, 40)
    assert (sft["state"], sft["step"], sft["steps"], sft["loss"], sft["validation"]) == ("stopped", 3, 40, 1.25, 9.5)
    assert sft["tokens_per_second"] == 200.0


def test_a_trial_of_a_comparison_is_done_though_its_model_is_gone(tmp_path):
    write(tmp_path / "x3", {"align": [3.0] * 40, "sft": [1.0] * 40})
    assert read(tmp_path / "x3").state == "stopped"  # every step taken, and killed before anything was written
    (tmp_path / "x3" / "report.json").write_text("{}")
    assert read(tmp_path / "x3").state == "done"


def test_the_table_names_every_run_and_stage(monkeypatch, capsys, two):
    assert run(monkeypatch, "runs", str(two / "one")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("3/40" in line and "sft" in line and "stopped" in line and "1.2500" in line for line in lines)
    assert not any("two" in line for line in lines)


def test_a_run_that_has_not_begun(monkeypatch, capsys, tmp_path):
    write(tmp_path / "fresh", {})
    assert run(monkeypatch, "runs", str(tmp_path), "--json") == 0
    (fresh,) = json.loads(capsys.readouterr().out)
    assert fresh["state"] == "new" and [stage["steps"] for stage in fresh["stages"]] == [None, None]
    assert run(monkeypatch, "runs", str(tmp_path), "--plot", str(tmp_path / "no.png")) == 3
    assert "none of these runs has made a step" in capsys.readouterr().err


def test_the_picture_has_a_colour_per_stage(monkeypatch, capsys, two):
    file = two / "curves.png"
    assert run(monkeypatch, "runs", str(two / "one"), str(two / "deep"), "--plot", str(file)) == 0
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    for colour in COLOURS[:4]:
        wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
        assert (np.abs(pixels - wanted).max(-1) < 40).sum() > 40, colour


def test_runs_of_one_name_in_several_folders_have_curves_of_their_own(monkeypatch, two):
    drawn = []
    monkeypatch.setattr("isthmus.training.curves.draw_together", lambda curves, file: drawn.append(curves) or True)
    for joint in ("llava", "flamingo"):
        shutil.copytree(two / "one", two / "joints" / joint / "seed0")
    assert run(monkeypatch, "runs", str(two / "joints"), "--plot", str(two / "curves.png")) == 0
    assert {name.split(" ")[0] for name in drawn[0]} == {"flamingo/seed0", "llava/seed0"}


@pytest.mark.parametrize("text", ["{", "{}"])
def test_faults_are_named(monkeypatch, capsys, tmp_path, text):
    assert run(monkeypatch, "runs", str(tmp_path)) == 2
    assert "no runs in" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(text)
    assert run(monkeypatch, "runs", str(tmp_path)) == 3
    assert "its run.json cannot be read" in capsys.readouterr().err


def test_a_run_that_a_process_is_at_work_in_is_told_from_a_stopped_one(two):
    one = two / "one"
    with held(one / "lock", lambda: None):
        assert (read(one).state, [stage.state for stage in read(one).stages]) == ("training", ["done", "training"])
    assert (one / "lock").is_file() and read(one).state == "stopped"


def test_what_a_run_has_otherwise(monkeypatch, capsys, tmp_path):
    tree = (
        BOOK["llava"]().override(["stages.sft.lr=5e-4", "stages.sft.budget.steps=7", "seed=3"]).model_dump(mode="json")
    )
    write(tmp_path / "a", {})
    (tmp_path / "a/run.json").write_text(json.dumps({"recipe": tree}))
    for name, change in {"b": {}, "c": {"clip": 2.0}}.items():
        write(tmp_path / name, {})
        (tmp_path / name / "run.json").write_text(json.dumps({"recipe": mine(seed=len(change), **change)}))
    assert run(monkeypatch, "runs", *(str(tmp_path / name) for name in "abc"), "--json") == 0
    a, b, c = (each["differs"] for each in json.loads(capsys.readouterr().out))
    assert a == {"stages.sft.lr": 5e-4, "stages.sft.budget.steps": 7, "seed": 3}
    assert b == {} and c == {"stages.align.clip": 2.0, "seed": 1}
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "runs", str(tmp_path / "a")) == 0
    assert "  stages.sft.budget.steps=7 stages.sft.lr=0.0005 seed=3" in capsys.readouterr().out


def mine(seed: int, **fields: float) -> dict:
    return {"name": "mine", "about": str(seed), "stages": [{"name": "align", **fields}, {"name": "sft"}], "seed": seed}
