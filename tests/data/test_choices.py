"""Layouts of multiple choice, written as their authors publish them: TSV by pandas, Parquet by `datasets`, JSON."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.formats import FileOptions
from isthmus.data.media import open_image
from isthmus.types import Image, Sample, Video

ONE = FileOptions(instructions="one")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


def png(shade: int, side: int = 40) -> bytes:
    """A picture of noise, which no format makes small."""
    raw = BytesIO()
    Pillow.fromarray(np.random.default_rng(shade).integers(0, 256, (side, side, 3), np.uint8)).save(raw, "png")
    return raw.getvalue()


def cell(shade: int, side: int = 40) -> str:
    return base64.b64encode(png(shade, side)).decode()


def tsv(folder: Path, rows: list[dict[str, Any]], name: str = "asked.tsv") -> Path:
    path = folder / name
    pandas.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "asked.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def read(path: Path, **options: Any) -> list[Sample]:
    return formats.load(path, None, ONE.but(**options))


def shown(sample: Sample) -> list[Any]:
    return [np.asarray(open_image(part.source)) for part in sample.media if isinstance(part, Image)]


MMBENCH = {
    "question": 'Which is "red"?',
    "hint": 'Look\tat the\n"left" side.',
    "A": "a cat",
    "B": "a dog",
    "C": None,
    "D": None,
    "category": "object_localization",
    "l2-category": "finegrained_perception",
    "split": "dev",
}


def test_mmbench_with_pictures_in_base64_and_by_reference(tmp_path: Path) -> None:
    rows = [
        {"index": 241, **MMBENCH, "answer": "B", "image": cell(1, 260)},
        {"index": 1_000_241, **MMBENCH, "A": "a dog", "B": "a cat", "answer": "A", "image": "241"},
        {"index": 7, **MMBENCH, "hint": None, "C": "a fox", "answer": "C", "image": cell(2)},
    ]
    assert len(rows[0]["image"]) > 131_072  # longer than the csv module's own limit
    first, moved, other = read(tsv(tmp_path, rows))
    assert [sample.id for sample in (first, moved, other)] == ["241", "241#round-1", "7"]
    assert first.turns[0].text.startswith('Look\tat the\n"left" side.\nWhich is "red"?\nA. a cat\nB. a dog\n')
    assert [sample.turns[1].text for sample in (first, moved, other)] == ["B", "A", "C"]
    assert other.meta["choices"] == ["a cat", "a dog", "a fox"] and moved.meta["choices"] == ["a dog", "a cat"]
    assert first.meta["category"] == "object_localization" and first.meta["group"] == "finegrained_perception"
    assert isinstance(first.turns[0].parts[0], Image)
    for sample, shade, side in ((first, 1, 260), (moved, 1, 260), (other, 2, 40)):
        assert (shown(sample)[0] == np.asarray(Pillow.open(BytesIO(png(shade, side))))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "99"}, "names the row 99"),
        ({"image": "!" * 80}, "not base64"),
        ({"answer": "D"}, "'D' is none of 2 options"),
        ({"B": None}, "1 options"),
        ({"image": "['a', "}, "names the row"),
        ({"image": "[" + "x" * 80 + "]"}, "not base64"),
    ],
)
def test_faulty_rows_are_told_with_their_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"index": 1, **MMBENCH, "answer": "A", "image": cell(1)}
    (fault,) = formats.check(tsv(tmp_path, [good, {**good, "index": 2, **change}]))
    assert message in fault.message and fault.remedy
    assert fault.line == 4  # the first question has a line's end in its hint


def test_other_sets_in_the_same_form(tmp_path: Path) -> None:
    rows = [
        {"index": 0, "image": cell(1), "question": "Is it a cat? Please answer yes or no.", "answer": "Yes",
         "category": "existence"},
        {"index": 1, "image": "0", "question": "Is it a dog? Please answer yes or no.", "answer": "No",
         "category": "existence"},
        {"index": 2, "image": str([cell(2), cell(3)]), "question": "How many?", "answer": str(["2", "two", "2"]),
         "category": "count"},
    ]  # fmt: skip
    yes, no, several = read(tsv(tmp_path, rows))
    assert (yes.turns[1].text, no.turns[1].text, yes.meta["category"]) == ("Yes", "No", "existence")
    assert (shown(yes)[0] == shown(no)[0]).all() and len(shown(several)) == 2
    assert several.turns[1].text == "2" and several.meta["answers"] == ["2", "two", "2"]


def test_seed_bench_from_its_file_and_from_rows(tmp_path: Path) -> None:
    (tmp_path / "1454426_2591").write_bytes(png(1))
    entry = {
        "answer": "C",
        **{f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"))},
        "data_id": "1454426_2591",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    film = {**entry, "data_type": "video", "data_id": "v.webm", "question_id": "2", "question_type_id": 10}
    kinds = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps({"question_type": kinds, "questions": [entry, film]}, indent=1))
    (fault,) = formats.check(path)  # the videos are not there
    assert "no video v.webm" in fault.message
    for format in (None, "seed-bench"):
        (sample,) = read(path, format=format, rows=("image",))
        assert (sample.id, sample.turns[1].text, sample.meta["category"]) == ("101669", "C", "Instances Counting")
        assert len(shown(sample)) == 1 and "A. one\nB. two\nC. three\nD. four" in sample.turns[0].text
    row = {**entry, "image": [{"bytes": png(2), "path": None}]}
    (sample,) = read(parquet(tmp_path, [row]))
    assert sample.meta["category"] == "type 5" and len(shown(sample)) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_seed_bench_s_segments_are_stretches_of_videos(tmp_path: Path, whole: bool) -> None:
    """As in its DATASET.md: kind 10 has whole videos, kind 11 seconds, kind 12 frames, 15 a second."""
    film = {"question": "What next?", "choice_a": "x", "choice_b": "y", "answer": "A", "data_type": "video"}
    segments = {10: None, 11: [648.0, 658.0], 12: [18, 166]}
    names = {10: "94328.webm", 11: "P03/P03_24.MP4", 12: "P06/cam01/P06_cereals.avi"}
    rows = [
        {**film, "question_id": f"v{kind}", "question_type_id": kind, "data_id": names[kind]}
        | ({"segment": segment} if segment else {})
        for kind, segment in segments.items()
    ]
    for name in names.values():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps({"question_type": {"Action Prediction": 11}, "questions": rows} if whole else rows))
    found = read(path)
    videos = [next(part for part in sample.turns[0].parts if isinstance(part, Video)) for sample in found]
    assert [video.source for video in videos] == [tmp_path / name for name in names.values()]
    assert [video.span for video in videos] == [None, (648, 658), (18 / 15, 166 / 15)]
    assert found[1].meta["group"] == "video" and found[1].meta["split"] == "video"
    assert found[1].meta["category"] == ("Action Prediction" if whole else "type 11")
    rows[1]["segment"] = [658.0, 648.0]
    path.write_text(json.dumps(rows))
    (fault,) = formats.check(path)
    assert "no stretch of time: [658.0, 648.0]" in fault.message


def test_mmmu_puts_pictures_where_they_are_named(tmp_path: Path) -> None:
    held = {"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}
    row = {
        "id": "validation_Art_Theory_3",
        "question": "Compare <image 2> with this.",
        "options": "['<image 1>', \"it's equal\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        "subfield": "History",
        "image_1": held[0],
        "image_2": held[1],
    }
    free = {**row, "id": "validation_Math_1", "question": "How long?", "options": "[]", "answer": "['12', 'twelve']"}
    first, second = read(parquet(tmp_path, [row, {**free, "question_type": "open", "image_2": None}]))
    pictures = [np.asarray(Pillow.open(BytesIO(png(shade)))) for shade in (2, 1)]
    assert all((seen == true).all() for seen, true in zip(shown(first), pictures, strict=True))
    assert first.turns[0].text.startswith("Compare  with this.\nA. \nB. it's equal\n")
    assert (first.meta["category"], first.meta["group"]) == ("Art_Theory", "Art and Design")
    assert first.meta["choices"] == ["<image>", "it's equal"]
    assert (second.turns[1].text, second.meta["answers"], second.meta["open"]) == ("12", ["12", "twelve"], True)
    assert isinstance(second.turns[0].parts[0], Image) and "choices" not in second.meta


def test_scienceqa_as_rows(tmp_path: Path) -> None:
    row = {
        "image": {"bytes": png(1), "path": None},
        "question": "Which is a bird?",
        "choices": ["cat", "owl"],
        "answer": 1,
        "hint": "It flies.",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "biology",
        "category": "Classification",
    }
    with_picture, without = read(parquet(tmp_path, [row, {**row, "image": None, "hint": ""}]))
    assert (with_picture.turns[1].text, with_picture.meta["category"]) == ("B", "natural science")
    assert with_picture.turns[0].text.startswith("It flies.\nWhich is a bird?\nA. cat\nB. owl\n")
    assert len(shown(with_picture)) == 1 and not without.media


OPTIONS = ["face", "eye", "nose", "mouth"]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"options": OPTIONS, "answer": "2"}, "C"),  # AI2D's rows
        ({"choices": OPTIONS, "answer": "2"}, "C"),
        ({"options": OPTIONS, "answer": 0}, "A"),
        ({"options": OPTIONS, "answer": "nose"}, "C"),
        ({"options": OPTIONS, "answer": "b"}, "B"),
        ({"options": ["1", "2", "3", "4"], "answer": "2"}, "B"),  # the word, rather than the number of an option
        ({"options": ["1", "2", "3", "4"], "answer": 2}, "C"),
        ({"options": ["4", "5", "6", "7"], "answer": "2"}, "C"),
        ({"options": dict(zip("ABCD", OPTIONS)), "answer": "D"}, "D"),
        ({"options": dict(zip("badc", ("eye", "face", "mouth", "nose"))), "answer": "eye"}, "B"),
        ({"options": dict(zip("ABCDE", [*OPTIONS, None])), "answer": "A"}, "A"),  # as Parquet fills them up
        ({"options": str(OPTIONS), "answer": "1"}, "B"),
        ({"choices": [], "options": OPTIONS, "answer": "1"}, "B"),
        ({**dict(zip("ABCD", OPTIONS)), "E": None, "answer": "C"}, "C"),
        ({"A": 0, "B": 1, "c": "noted by hand", "answer": "B"}, "B"),
    ],
)
def test_options_as_rows(tmp_path: Path, given: dict[str, Any], right: str) -> None:
    (tmp_path / "0.png").write_bytes(png(1))
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "Which?", "image": "0.png", **given}))
    (sample,) = read(path)
    words = sample.meta["choices"]
    listed = "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", words))
    assert sample.turns[0].text == f"Which?\n{listed}\nAnswer with the letter of the right choice."
    assert sample.turns[1].text == right and len(words) == (2 if given.get("A") == 0 else 4)
    assert isinstance(sample.turns[0].parts[0], Image) and len(sample.media) == 1
    if "face" in words:
        assert words == OPTIONS


def test_several_pictures_of_a_question_with_options(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png(1))
    row = {"images": ["0.png", "1.png"], "options": OPTIONS, "answer": "eye"}
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(json.dumps({**row, "question": said}) for said in ("Which?", "In <image> or <image>?")))
    before, within = read(path)
    assert [type(part) for part in before.turns[0].parts[:2]] == [Image, Image]
    assert len(within.media) == 2 and isinstance(within.turns[0].parts[1], Image)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"label": ["A"], "text": ["face"]}, "answer": "A"}, "neither a list of texts nor"),
        ({"options": {"A": "face", "C": "nose"}, "answer": "A"}, "neither a list of texts nor"),
        ({"options": "A. face B. eye", "answer": "A"}, "neither a list of texts nor"),
        ({"options": [{"A": "face"}, {"B": "eye"}], "answer": "A"}, "neither a list of texts nor"),
        ({"options": ["face", None], "answer": "A"}, "neither a list of texts nor"),
        ({"options": ["face"], "answer": "A"}, "1 options"),
        ({"options": OPTIONS}, "the question has no answer"),
        ({"options": OPTIONS, "answer": "4"}, "'4' is none of 4 options"),
        ({"options": OPTIONS, "answer": "²"}, "'²' is none of 4 options"),
    ],
)
def test_options_are_never_passed_over(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "0.png").write_bytes(png(1))
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "Which?", "image": "0.png", **given}))
    (fault,) = formats.check(path)
    assert message in fault.message and fault.remedy
    if "neither" in message:  # as the remedy says
        (sample,) = read(path, format="question")
        assert "choices" not in sample.meta and sample.turns[1].text == "A"


def test_texts_in_brackets_are_lists_only_where_they_begin_so(tmp_path: Path) -> None:
    said = ["[illegible]", "[a] and [b]", "['a', 'b']", '["a"]', "[-1, 2]", "['a'] or ['b']", "[1] to [2]"]
    rows = [{"index": number, "question": "What?", "answer": one} for number, one in enumerate(said)]
    found = read(tsv(tmp_path, rows))
    answers = ["[illegible]", "[a] and [b]", "a", "a", "-1", "['a'] or ['b']", "[1] to [2]"]
    assert [sample.turns[1].text for sample in found] == answers
    assert [sample.meta.get("answers") for sample in found] == [None, None, ["a", "b"], None, ["-1", "2"], None, None]


def test_mme_and_pope_as_rows(tmp_path: Path) -> None:
    held = {"bytes": png(1), "path": None}
    asked = {"question_id": "code_reasoning/0020.png", "image": held, "question": "Is it? Please answer yes or no."}
    (mme,) = read(parquet(tmp_path, [{**asked, "answer": "Yes", "category": "code_reasoning"}]))
    assert (mme.turns[1].text, mme.meta["category"]) == ("Yes", "code_reasoning") and len(shown(mme)) == 1
    rows = [{"id": "0", "question_id": "1", "image_source": "COCO_val2014", **asked, "answer": "no",
             "category": "adversarial"}]  # fmt: skip
    (pope,) = read(parquet(tmp_path, rows))
    assert (pope.turns[1].text, pope.meta["category"]) == ("no", "adversarial")


@pytest.mark.parametrize("name", ["asked.jsonl", "asked.tsv"])
def test_an_index_beside_a_picture_s_path_changes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat.png").write_bytes(png(1))
    row = {"index": 3, "image": "cat.png", "question": "Is it a cat?", "answer": "Yes"}
    path = tmp_path / name
    path.write_text(json.dumps(row)) if path.suffix == ".jsonl" else tsv(tmp_path, [row], name)
    (sample,) = read(path)
    assert sample.turns[1].text == "Yes" and (shown(sample)[0] == np.asarray(Pillow.open(BytesIO(png(1))))).all()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "choice_a": "x", "choice_b": "y", "question_type_id": []},
        {"index": 1, "question": "?", "answer": "[]"},
        {"index": 1, "question": "?", "answer": "[1, {}]"},
    ],
)
def test_rows_that_nobody_publishes_are_faults(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps(row))
    (fault,) = formats.check(path)
    assert fault.line == 1 and fault.remedy
