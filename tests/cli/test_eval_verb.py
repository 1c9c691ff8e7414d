"""`isthmus eval` on the user's files: settings, and what alignment costs the LLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

import composed
from isthmus.cli.app import app
from isthmus.cli.options import short_name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval-verb") / "model"
    composed.stir(composed.model()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/demo/sft/model", "demo-sft"),
        ("/home/me/runs/compare/joints/llava/seed0/sft/model", "compare-joints-llava-seed0-sft"),
        ("org/model-7b", "org-model-7b"),
        ("../../elsewhere/mine", "elsewhere-mine"),
        ("/", "model"),
    ],
)
def test_models_are_told_apart_by_where_they_lie(model: str, name: str) -> None:
    assert short_name(model) == name


def test_a_folder_without_a_name_has_that_of_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/mine/sft/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs/mine/sft/model")
    assert short_name(".") == "mine-sft"


def measured(saved: Path, out: Path, *words: str) -> list[dict]:
    asked = ["eval", str(saved), *words, "--out", str(out), "--json", "--device", "cpu", "--controls", "none"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_settings_name_the_second_file(saved: Path, tmp_path: Path) -> None:
    Pillow.new("RGB", (32, 32)).save(tmp_path / "COCO_val2014_000000000007.jpg")
    asked = {"questions": [{"question_id": 70, "image_id": 7, "question": "How many?"}], "data_subtype": "val2014"}
    noted = {"question_id": 70, "image_id": 7, "multiple_choice_answer": "3", "answers": [{"answer": "3"}] * 10}
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": [noted]}))
    words = ["--tasks", "vqa", "--data", str(tmp_path / "questions.json"), "-s", "format=vqav2"]
    (row,) = measured(saved, tmp_path / "out", *words, "-s", f"beside={tmp_path / 'annotations.json'}")
    assert row["task"] == "vqa-questions" and row["n"] == 1


def test_settings_of_the_task_itself(saved: Path, tmp_path: Path) -> None:
    record = {"question": "Which?", "choices": ["cat", "owl", "dog"], "answer": 1}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record) + "\n")
    words = ["--tasks", "options", "--data", str(tmp_path / "asked.jsonl")]
    (once,) = measured(saved, tmp_path / "one", *words)
    (turned,) = measured(saved, tmp_path / "two", *words, "-s", "circular=true")
    assert once["n"] == 1 and not once["besides"]
    assert turned["n"] == 3 and "circular accuracy" in turned["besides"]


def test_a_setting_that_nothing_knows_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 1}) + "\n")
    words = ["eval", str(saved), "--tasks", "options", "--data", str(tmp_path / "asked.jsonl"), "-s", "circlar=true"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code != 0 and "circular" in f"{refused.output}{refused.exception}"


def test_text_is_measured_beside_the_llm_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The cat is here.\n\nThe dog is there.")
    asked = {"context": "One, two,", "choices": ["three", "a dog"], "answer": "three"}
    (tmp_path / "chosen.jsonl").write_text(json.dumps(asked) + "\n")
    texts = ["--text", str(tmp_path / "own.txt"), "--text", str(tmp_path / "chosen.jsonl")]
    nll, chosen = measured(saved, tmp_path / "out", *texts)
    assert (nll["unit"], chosen["unit"]) == ("nats per token", "accuracy")
    for row in (nll, chosen):
        assert row["cells"].keys() == {"before", "after"} and row["gains"]["before"]["value"] == 0
    words = ["eval", str(saved), *texts, "--out", str(tmp_path / "out"), "--device", "cpu"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "LLM alone" in shown.output and "lower is better" in shown.output


def test_an_endpoint_is_not_asked_for_raw_text(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The cat is here.")
    words = ["eval", "some", "--endpoint", "http://127.0.0.1:9/v1", "--text", str(tmp_path / "own.txt")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code != 0 and "--text" in f"{refused.output}{refused.exception}"


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (["--tasks", "exact"], "task exact asks about a file of yours", "--data FILE"),
        (["--tasks", "naming"], "task naming asks about embedded pictures", "leave --data away, or name how"),
        (["--tasks", "perplexity"], "task perplexity reads a text", "--text FILE"),
        (["--tasks", "exct"], "no task named 'exct'; did you mean 'exact'", "tasks are"),
    ],
)
def test_a_task_without_what_it_asks_about_is_told_so(
    words: list[str], cause: str, remedy: str, tmp_path: Path
) -> None:
    data = ["--data", str(tmp_path / "asked.json")] if words[1] == "naming" else []
    refused = CliRunner().invoke(app, ["eval", "some", *words, *data])
    assert refused.exit_code != 0
    assert cause in f"{refused.output}{refused.exception}" and remedy in f"{refused.output}{refused.exception}"


def test_an_unknown_control_is_told_before_anything_is_opened() -> None:
    refused = CliRunner().invoke(app, ["eval", "some", "--controls", "blind,blank"])
    assert "no control is called 'blank'" in str(refused.exception)
    assert getattr(refused.exception, "remedy", "") == "--controls is some of blind,shuffled, or none"


def test_names_may_stand_apart(saved: Path, tmp_path: Path) -> None:
    record = {"question": "Which?", "answer": "cat", "choices": ["cat", "owl"]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record) + "\n")
    words = ["--tasks", "exact, options,", "--data", str(tmp_path / "asked.jsonl")]
    assert [row["task"] for row in measured(saved, tmp_path / "out", *words)] == ["exact-asked", "options-asked"]


def test_three_questions_are_shown_with_reply_and_reference(saved: Path, tmp_path: Path) -> None:
    answers = [f"[b]{n}[/b]" for n in range(5)]
    records = [{"question": f"How many [{n}]?", "answer": told, "choices": answers} for n, told in enumerate(answers)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--tasks", "exact", "--data", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, ["eval", str(saved), *words, "--device", "cpu", "--controls", "none"])
    lines = [line for line in shown.output.splitlines() if "(reference: " in line]
    (kept,) = (tmp_path / "out").rglob("exact-asked*.jsonl")
    told = [json.loads(line) for line in kept.read_text().splitlines()][1:]
    assert len(lines) == 3 and len(told) == 5
    for n, line in enumerate(lines):
        assert line.startswith(f"How many [{n}]? A. [b]0[/b] ")
        assert line.endswith(f"  {told[n]['prediction']!r} (reference: {told[n]['answer']})")
