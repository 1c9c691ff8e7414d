"""Questions with free answers: one, several, spelled lists, none; ChartQA and the competition's files as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.formats import FileOptions
from isthmus.types import ConfigError, Image, Sample

ONE = FileOptions(instructions="one")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "png/chart.png", "documents/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Pillow.new("RGB", (4, 3)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, tree: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, tree)) if name.endswith(".jsonl") else json.dumps(tree, indent=1))
    return path


def read(path: Path, **options: Any) -> list[Sample]:
    return formats.load(path, None, ONE.but(**options))


def row(**more: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "How many?", **more}


@pytest.mark.parametrize(
    ("given", "answer", "people"),
    [
        ({"answer": "a", "answers": ["b", "c"]}, "a", ["a", "b", "c"]),
        ({"answer": "c", "answers": ["b", "c"]}, "c", ["b", "c"]),
        ({"answer": 3, "answers": ["3", "three"]}, "3", ["3", "three"]),
        ({"answer": "", "answers": ["b"]}, "b", ["b"]),
        ({"answer": "a", "answers": [""]}, "a", None),
        ({"answer": ["b", "a"], "answers": ["a", "b"]}, "b", ["b", "a"]),
        ({"answer": None, "answers": "x"}, "x", ["x"]),
        ({"multiple_choice_answer": "a", "answers": [{"answer": "b"}, {"answer": "a"}]}, "a", ["b", "a"]),
        ({"answer": "['two', \"it's 2\", 'two']"}, "two", ["two", "it's 2", "two"]),
        ({"answer": "['14']"}, "14", None),
        ({"answer": "[illegible]"}, "[illegible]", None),
        ({"answer": "[12, 30]"}, "[12, 30]", None),
        ({"answer": "['a'] or ['b']"}, "['a'] or ['b']", None),
        ({"answer": "['a'"}, "['a'", None),
        ({"answer": 0}, "0", None),
    ],
)
def test_an_answer_and_answers(folder: Path, given: dict[str, Any], answer: str, people: list[str] | None) -> None:
    (sample,) = read(write(folder, [row(**given)]))
    assert (sample.turns[1].text, sample.meta.get("answers")) == (answer, people)


def test_lists_in_cells_are_lists(folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text("image,question,answer\na.png,How many?,\"['a', 'b', 'b']\"\na.png,How many?,[sic]\n")
    several, one = read(path)
    assert (several.turns[1].text, several.meta["answers"]) == ("b", ["a", "b", "b"])
    assert one.turns[1].text == "[sic]" and "answers" not in one.meta


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        ({}, "the question has no answer", "rows: SPLIT"),
        ({"answer": None, "answers": []}, "the question has no answer", "faults: skip"),
        ({"answer": " ", "answers": [None, ""]}, "the question has no answer", "faults: skip"),
        ({"answer": True}, "neither a text nor a number", "write a text"),
        ({"answers": {"text": ["x"]}}, "neither a text nor a number", "write a text"),
        ({"answer": ["a"], "answers": ["b", "c"]}, "two lists, which differ", "leave answer out"),
    ],
)
def test_questions_without_answers_and_with_two_sets_of_them(
    folder: Path, given: dict[str, Any], message: str, remedy: str
) -> None:
    (fault,) = formats.check(write(folder, [row(**given)]))
    assert message in fault.message and remedy in fault.remedy


# ---------------------------------------------------------------------------------------------- ChartQA


def test_chartqa_as_its_authors_and_the_hub_have_it(folder: Path) -> None:
    own = read(write(folder, [{"imgname": "chart.png", "query": "How many?", "label": "14"}]))
    hub = [{"image": "a.png", "query": "How many?", "label": ["14"], "human_or_machine": who} for who in (0, 1)]
    lmms = [row(type="human_test", answer="14"), row(type="augmented_test", answer=["1,400"])]
    found = [*own, *read(write(folder, hub)), *read(write(folder, lmms), format="chartqa")]
    assert own[0].media == (Image(folder / "png/chart.png"),)
    assert [sample.turns[0].text for sample in found] == ["How many? Answer in a word or two."] * 5
    assert [sample.turns[1].text for sample in found] == ["14"] * 4 + ["1,400"]
    categories = [None, "human", "machine", "human_test", "augmented_test"]
    assert [sample.meta.get("category") for sample in found] == categories
    assert all(len(sample.media) == 1 for sample in found)


def test_a_type_of_other_questions_is_no_category(folder: Path) -> None:
    (sample,) = read(write(folder, [row(type="counting", answer="3")]))
    assert "category" not in sample.meta
    (fault,) = formats.check(write(folder, [{"image": "a.png", "query": "How many?", "label": 3}]))
    assert "neither conversations nor messages" in fault.message


# ---------------------------------------------------------------------------------------------- DocVQA


def whole(*entries: dict[str, Any], name: str = "docvqa", split: str = "val") -> dict[str, Any]:
    return {"dataset_name": name, "dataset_version": "1.0", "dataset_split": split, "data": list(entries)}


DOCVQA = {
    "questionId": 49153,
    "question": "What is the ‘actual’ value per 1000?",
    "question_types": ["figure/diagram"],
    "image": "documents/b.png",
    "docId": 14465,
    "ucsf_document_id": "pybv0228",
    "ucsf_document_page_no": "81",
    "answers": ["0.28", "0.280"],
    "data_split": "val",
}
INFOGRAPHIC = {
    "questionId": 98313,
    "question": "Which service?",
    "image_local_name": "a.png",
    "image_url": "https://example.org/a.png",
    "ocr_output_file": "a.json",
    "answers": ["Twitter", "twitter inc"],
    "data_split": "val",
}
SCENE_TEXT = {
    "question": "What is the name of the street?",
    "file_path": "coco-text/a.png",
    "dataset": "coco-text",
    "file_name": "a.png",
    "question_id": 7,
    "answers": ["west"],
    "set_name": "val",
}


@pytest.mark.parametrize("format", [None, "docvqa"])
@pytest.mark.parametrize(
    ("entry", "name", "id", "picture", "answer"),
    [
        (DOCVQA, "docvqa", "49153", "documents/b.png", "0.28"),
        ({**DOCVQA, "image": "scans/a.png"}, "docvqa", "49153", "a.png", "0.28"),  # its folder is the pictures' own
        (INFOGRAPHIC, "infographicsVQA", "98313", "a.png", "Twitter"),
        (SCENE_TEXT, "ST-VQA", "7", "a.png", "west"),
    ],
)
def test_the_competition_s_files(
    folder: Path, entry: dict[str, Any], name: str, id: str, picture: str, answer: str, format: Any
) -> None:
    (sample,) = read(write(folder, whole(entry, name=name)), format=format)
    assert sample.id == id and sample.media == (Image(folder / picture),)
    assert sample.turns[0].text == f"{entry['question']} Answer in a word or two."
    assert sample.turns[1].text == answer and sample.meta["answers"] == entry["answers"]
    assert sample.meta["split"] == "val"


def test_the_competition_s_test_split_has_no_answers(folder: Path) -> None:
    kept = {key: value for key, value in DOCVQA.items() if key != "answers"} | {"data_split": "test"}
    path = write(folder, whole(kept, DOCVQA))
    (fault,) = formats.check(path)
    assert (fault.id, fault.message) == ("49153", "the question has no answer")
    assert [sample.id for sample in read(path, rows="val")] == ["49153"]
    with pytest.raises(ConfigError, match="has no rows of train") as caught:
        read(path, rows="train")
    assert caught.value.remedy == "it has test, val"
    textvqa = {"question": "what?", "image_id": "a", "question_id": 3, "set_name": "test"}
    (fault,) = formats.check(write(folder, {"dataset_name": "textvqa", "data": [textvqa]}))
    assert fault.message == "the question has no answer"
