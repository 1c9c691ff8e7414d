"""Entries of tables that are malformed: each is a fault with its line, and costs no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.faults import Fault
from isthmus.data.formats import FileOptions

Found = list[formats.Record | Fault]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.jpg", *(f"{number}.png" for number in range(4))):
        Pillow.new("RGB", (2, 2)).save(tmp_path / name)
    images = [{"id": 1, "file_name": "1.png", "width": 2, "height": 2}]
    regions = [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": regions}))
    return tmp_path


def flickr(number: int) -> dict[str, Any]:
    said = [{"raw": "x", "sentid": which} for which in range(2)]
    return {"imgid": number, "filename": "1.png", "sentences": said}


def book(number: int) -> dict[str, Any]:
    return {"imageURL": "1.png", "title": f"{number}", "questions": ["Who?", "What?"], "answers": ["x", "y"]}


def reference(number: int) -> dict[str, Any]:
    said = [{"sent": "x", "sent_id": which} for which in range(2)]
    return {"ref_id": number, "ann_id": 1, "image_id": 1, "sentences": said}


def question(number: int) -> dict[str, Any]:
    return {"imageId": "1", "question": "Who?", "answer": "x"}


TABLES = {"flickr": (flickr, 2), "ocr-vqa": (book, 2), "refcoco": (reference, 2), "gqa": (question, 1)}
"""What makes an entry, and how many samples it holds."""


def twice(entry: dict[str, Any]) -> str:
    return '{"score": 1, "score": 9, ' + json.dumps(entry)[1:]


def missing(entry: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in entry.items() if key not in ("sentences", "questions", "question")})


def uneven(entry: dict[str, Any]) -> str:
    return json.dumps({key: ["x"] if key == "answers" else value for key, value in entry.items()})


def other(entry: dict[str, Any]) -> str:
    return "5"


def read(folder: Path, layout: str, entries: list[str]) -> Found:
    """What a file of such entries holds, each in a line of its own."""
    keyed = layout in ("ocr-vqa", "gqa")
    text = ",\n".join(f'"{n}": {entry}' if keyed else entry for n, entry in enumerate(entries))
    path = folder / "table.json"
    path.write_text(
        f'{{"images": [{text}]}}' if layout == "flickr" else f"{{{text}}}" if keyed else f"[{text}]",
    )
    told = {"format": layout, "beside": folder / "instances.json" if layout == "refcoco" else None}
    return list(formats.each(formats.Form(path, options=FileOptions.model_validate(told))))


@pytest.mark.parametrize("bad", [(0, 1), (1, 2), (0, 3)])
@pytest.mark.parametrize("damage", [twice, missing, uneven, other])
@pytest.mark.parametrize("layout", TABLES)
def test_bad_entries_cost_themselves_alone(folder: Path, layout: str, damage: Any, bad: tuple[int, ...]) -> None:
    make, samples = TABLES[layout]
    if damage is uneven and layout != "ocr-vqa":
        pytest.skip("it has no two lists")
    found = read(folder, layout, [damage(make(n)) if n in bad else json.dumps(make(n)) for n in range(4)])
    faults = [one for one in found if isinstance(one, Fault)]
    assert sorted(fault.line for fault in faults) == [n + 1 for n in bad]
    assert all(fault.message and fault.remedy for fault in faults)
    lines = sorted(one.line for one in found if isinstance(one, formats.Record))
    assert lines == [n + 1 for n in range(4) if n not in bad for _ in range(samples)]


def test_a_layout_is_told_though_the_first_entry_is_bad(folder: Path) -> None:
    notes = ['{"id": 0, "image_id": 1, "caption": "x", "caption": "y"}', '{"id": 1, "image_id": 1, "caption": "z"}']
    path = folder / "captions.json"
    for between in (",", ",\n"):  # in a line of its own, or all in one
        path.write_text(
            f'{{"images": [{{"id": 1, "file_name": "1.png"}}],{between[1:]} "annotations": [{between.join(notes)}]}}'
        )
        fault, record = formats.each(formats.Form(path))
        assert isinstance(fault, Fault) and "the key 'caption' is there twice" in fault.message
        assert isinstance(record, formats.Record) and record.sample.turns[1].text == "z"


def test_a_table_that_is_there_twice_is_not_half_read(folder: Path) -> None:
    notes = [f'"annotations": [{{"id": {n}, "image_id": 1, "caption": "x"}}]' for n in range(2)]
    path = folder / "captions.json"
    path.write_text(f'{{"images": [{{"id": 1, "file_name": "1.png"}}], {", ".join(notes)}}}')
    (fault,) = formats.each(formats.Form(path, options=FileOptions(format="coco-captions")))
    assert isinstance(fault, Fault) and "the key 'annotations' is there twice" in fault.message
