"""Kept predictions beside new ones: the same, of another model, of other questions, and scored by another rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import composed
from isthmus.cli.app import app
from isthmus.config import LoRA
from isthmus.types import DataError, IsthmusError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """Multiple choice by likelihood of raw text, and two free replies."""
    continued = [{"context": "One, two,", "choices": ["three", "a dog"], "answer": "three"}]
    continued += [{"context": "It is", "choices": ["here", "blue sea"], "answer": "here"}]
    (tmp_path / "chosen.jsonl").write_text("".join(json.dumps(one) + "\n" for one in continued))
    rows = [{"id": f"q{n}", "question": f"What is {n}?", "choices": ["a", "b"], "answer": 1} for n in range(2)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return ["--text", str(tmp_path / "chosen.jsonl"), "--tasks", "options", "--data", str(tmp_path / "asked.jsonl")]


def evaluated(model: Path, out: Path, *words: str) -> tuple[int, str, BaseException | None]:
    options = ["--out", str(out), "--device", "cpu", "--dtype", "float32", "--controls", "none"]
    done = CliRunner().invoke(app, ["eval", str(model), *words, *options])
    return done.exit_code, done.stdout, done.exception


def test_what_is_answered_otherwise_is_named(tmp_path: Path, asked: list[str]) -> None:
    one, other = composed.stir(composed.model()), composed.stir(composed.model())
    one.save_pretrained(tmp_path / "one")
    other.add_lora(["llm.*"], LoRA(r=4), "told")
    composed.stir(other).save_pretrained(tmp_path / "other")
    assert evaluated(tmp_path / "one", tmp_path / "kept", *asked)[0] == 0
    code, told, _ = evaluated(tmp_path / "one", tmp_path / "again", *asked, "--golden", str(tmp_path / "kept"))
    same = [
        line.split()[-6:] for line in told[told.index("beside what was kept") :].splitlines() if line.endswith(" 0 ")
    ]
    assert code == 0 and same == [["2", *"00000"]] * 3
    code, told, error = evaluated(
        tmp_path / "other", tmp_path / "third", *asked, "--golden", str(tmp_path / "kept"), "--json"
    )
    found = {(one["task"], one["column"]): one for one in json.loads(told)["golden"]}
    assert code == 1 and isinstance(error, IsthmusError) and "items are asked or answered otherwise" in error.cause
    assert set(found) == {
        ("options-asked", "after"),
        ("continuation-chosen", "before"),
        ("continuation-chosen", "after"),
    }
    assert found["continuation-chosen", "after"]["apart"] > 0.01
    replies = [
        {line["id"]: line["prediction"] for line in map(json.loads, path.read_text().splitlines()[1:])}
        for path in (tmp_path / name / "after" / "options-asked.jsonl" for name in ("kept", "third"))
    ]
    assert found["options-asked", "after"]["changed"] == [
        name for name in replies[0] if replies[0][name] != replies[1][name]
    ]


def test_other_questions_and_other_rules_are_told(tmp_path: Path, asked: list[str]) -> None:
    composed.stir(composed.model()).save_pretrained(tmp_path / "one")
    assert evaluated(tmp_path / "one", tmp_path / "kept", *asked)[0] == 0
    file = tmp_path / "asked.jsonl"
    file.write_text(file.read_text().replace("What is 1?", "Which is 1?"))
    code, _, error = evaluated(tmp_path / "one", tmp_path / "new", *asked, "--golden", str(tmp_path / "kept"))
    assert code == 1 and isinstance(error, IsthmusError) and error.cause.startswith("1 items are asked")
    kept = tmp_path / "kept" / "after" / "options-asked.jsonl"
    kept.write_text(kept.read_text().replace("several or none is wrong", "none is wrong"))
    _, _, error = evaluated(tmp_path / "one", tmp_path / "new", *asked, "--golden", str(tmp_path / "kept"))
    assert isinstance(error, DataError) and "scored by another rule" in error.cause
    kept.unlink()
    _, _, error = evaluated(tmp_path / "one", tmp_path / "new", *asked, "--golden", str(tmp_path / "kept"))
    assert isinstance(error, DataError) and "options-asked.jsonl" in error.cause
    _, _, error = evaluated(tmp_path / "one", tmp_path / "kept", *asked, "--golden", str(tmp_path / "kept"))
    assert isinstance(error, IsthmusError) and "is to be written and compared with" in error.cause


def test_an_answer_that_changed_is_told_by_each_of_the_items_that_share_an_id(tmp_path: Path, asked: list[str]) -> None:
    """Files that were put one behind the other count from 1 again, as POPE's do."""
    composed.stir(composed.model()).save_pretrained(tmp_path / "one")
    file = tmp_path / "asked.jsonl"
    file.write_text(file.read_text().replace('"q1"', '"q0"'))
    assert evaluated(tmp_path / "one", tmp_path / "kept", *asked)[0] == 0
    kept = tmp_path / "kept" / "after" / "options-asked.jsonl"
    assert evaluated(tmp_path / "one", tmp_path / "same", *asked, "--golden", str(tmp_path / "kept"))[0] == 0
    head, *rows = kept.read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["q0", "q0"]
    for place in range(2):
        other = [
            row if place != at else json.dumps(json.loads(row) | {"prediction": "x"}) for at, row in enumerate(rows)
        ]
        kept.write_text("\n".join([head, *other]) + "\n")
        out = tmp_path / f"again {place}"
        code, told, _ = evaluated(tmp_path / "one", out, *asked, "--golden", str(tmp_path / "kept"), "--json")
        found = {(one["task"], one["column"]): one for one in json.loads(told)["golden"]}["options-asked", "after"]
        assert code == 1 and found["changed"] == ["q0"] and found["others"] == []


def test_how_items_were_asked_is_kept_beside_them(tmp_path: Path, asked: list[str]) -> None:
    """The header of a file of predictions: weights, arithmetic, the template's hash, and how replies are decoded."""
    composed.stir(composed.model()).save_pretrained(tmp_path / "one")
    assert evaluated(tmp_path / "one", tmp_path / "kept", *asked)[0] == 0
    first = (tmp_path / "kept" / "after" / "options-asked.jsonl").read_text().splitlines()[0]
    settings = json.loads(first)["settings"]
    assert settings["decoding"]["do_sample"] is False and settings["decoding"]["max_new_tokens"] == 32
    assert len(settings["template"]) == len(settings["weights"]) == 12 and settings["dtype"] == "torch.float32"
