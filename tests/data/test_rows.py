"""`rows`: of splits that nobody asked for nothing is taken or told, whatever is wrong with it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.formats import FileOptions, Form
from isthmus.data.records import Records

GOOD = {"image": "a.png", "question": "How many?", "answers": ["3"]}
BAD: list[Any] = [
    {**GOOD, "answers": None},
    {**GOOD, "answers": True},
    {**GOOD, "meta": 3},
    {**GOOD, "image": "gone.png"},
    {"image": "a.png", "imgae": "a.png"},
    {"comment": "of no layout"},
    {**GOOD, "id": []},
    [GOOD],
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    Pillow.new("RGB", (4, 3)).save(tmp_path / "data/a.png")
    return tmp_path / "data"


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    return path


def counts(path: Path, rows: Any) -> tuple[int, int]:
    """Faults, and samples of the splits where there are none."""
    options = FileOptions(rows=rows)
    faults = len(formats.check(path, None, options))
    if faults:
        return faults, 0
    found = Records(Form(path, options=options))
    assert len(found) == len(formats.load(path, None, options)) and not found.skipped
    return 0, len([found[number] for number in range(len(found))])


def test_faults_of_a_file_that_was_not_asked_for_are_left_out(folder: Path) -> None:
    lines(folder / "test.jsonl", *BAD, "not json {")
    lines(folder / "validation.jsonl", GOOD)
    assert counts(folder, None) == (9, 0)
    assert counts(folder, "validation") == (0, 1)
    assert counts(folder, ("validation", "test")) == (9, 0)


def test_faults_of_records_that_say_their_split(folder: Path) -> None:
    told = [{**one, "split": "test"} for one in BAD if isinstance(one, dict)]
    meta = {**GOOD, "answers": None, "meta": {"split": "test"}}
    path = lines(folder / "all.jsonl", {**GOOD, "split": "val"}, *told, meta)
    assert counts(path, "val") == (0, 1)
    assert counts(path, "test") == (len(told) + 1, 0)
    assert counts(lines(path, {**GOOD, "split": "val"}, {**GOOD, "answers": None}), "val") == (1, 0)  # of which split?


def test_a_kind_of_medium_is_the_split_whatever_the_file_is_called(folder: Path) -> None:
    """SEED-Bench: the split of its rows is their `data_type`, not the file's name."""
    row = {"question": "?", "choice_a": "x", "choice_b": "y", "answer": "A", "question_type_id": 1, "image": "a.png"}
    image, video = ({**row, "data_type": kind, "question_id": kind} for kind in ("image", "video"))
    path = lines(folder / "test.jsonl", image, {**video, "answer": "Z"})
    assert counts(path, "image") == (0, 1) and counts(path, "video") == (1, 0)
    assert counts(lines(path, {**image, "answer": "Z"}, video), "image") == (1, 0)


def test_faults_of_tables_are_of_their_entry_s_split(folder: Path) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 1, "split": "train", "image": None}
    path = folder / "problems.json"
    path.write_text(json.dumps({"1": good, "2": {**good, "split": "test", "answer": 7}}))
    assert counts(path, "train") == (0, 1) and counts(path, "test") == (1, 0)
    book = {"imageURL": "x/a.png", "questions": ["?"], "answers": ["x"], "split": 1}
    path = folder / "dataset.json"
    path.write_text(json.dumps({"a": book, "b": {**book, "answers": ["x", "y"], "split": 3}}))
    assert counts(path, "train") == (0, 1) and counts(path, "test") == (1, 0)


def test_pictures_of_which_nothing_is_said_in_another_split(folder: Path) -> None:
    for name in ("train/cat/1.png", "test/2.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / "a.png").rename(folder / name) if "train" in name else (folder / name).write_bytes(
            (folder / "train/cat/1.png").read_bytes()
        )
    assert counts(folder, "train") == (0, 1) and counts(folder, None) == (1, 0)
    (folder / "train/metadata.jsonl").write_text(json.dumps({"file_name": "cat/1.png", "text": "a cat"}))
    lines(folder / "test/metadata.jsonl", {"file_name": "2.png"}, "not json {")
    assert counts(folder, "train") == (0, 1) and counts(folder, "test") == (2, 0)


def test_the_hub_s_docvqa_has_a_split_without_answers(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    rows = {"questionId": ["1"], "question": ["?"], "image": [held]}
    features = {"questionId": datasets.Value("string"), "question": datasets.Value("string"),
                "image": datasets.Image(), "answers": datasets.List(datasets.Value("string"))}  # fmt: skip
    for split, answers in (("test", None), ("validation", ["1/8/93", "1 8 93"])):
        table = datasets.Dataset.from_dict({**rows, "answers": [answers]}, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    assert counts(folder, "validation") == (0, 1)
    (fault,) = formats.check(folder)
    assert fault.message == "the question has no answer" and "rows: SPLIT" in fault.remedy


def test_mmbench_s_test_file_has_no_answers(folder: Path) -> None:
    cell = base64.b64encode((folder / "a.png").read_bytes()).decode()
    path = folder / "MMBench_TEST_EN.tsv"
    path.write_text(f"index\tquestion\tA\tB\timage\n1\tWhich?\ta cat\ta dog\t{cell}\n")
    (fault,) = formats.check(path)
    assert fault.message == "the question has no answer"
