"""What a file says twice, and what it says over several lines: read, or a fault that says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.faults import Fault
from isthmus.data.records import Records
from isthmus.types import DataError, Image, Role, Text, Turn

SAID = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "This."}]
TOLD = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "This."}]
OTHER = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    for name in "12":
        Pillow.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    return tmp_path


def pairs(*members: tuple[str, Any]) -> str:
    """An object with its members as they are given, twice or not."""
    return "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in members) + "}"


GOOD = pairs(("image", "1.png"), ("conversations", SAID))
DIFFERENT = {
    "a key": (pairs(("image", "1.png"), ("image", "2.png"), ("conversations", SAID)), "the key 'image' is there twice"),
    "a turn's": (
        f'{{"image": "1.png", "conversations": [{pairs(*SAID[0].items(), ("value", "x"))}]}}',
        "the key 'value' is there twice",
    ),
    "pictures": (pairs(("image", "1.png"), ("images", ["2.png"]), ("messages", TOLD)), "has 'image' and 'images'"),
    "what is said": (
        pairs(("image", "1.png"), ("conversations", SAID), ("messages", OTHER)),
        "has 'conversations' and 'messages'",
    ),
    "a caption's": (pairs(("image", "1.png"), ("images", ["2.png"]), ("caption", "x")), "has 'image' and 'images'"),
    "videos": (pairs(("video", "1.mp4"), ("videos", ["2.mp4"]), ("caption", "x")), "has 'video' and 'videos'"),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_two_that_differ_are_a_fault_with_its_line_and_the_rest_is_read(folder: Path, name: str, form: str) -> None:
    record, message = DIFFERENT[name]
    rows = [GOOD, record, GOOD]
    path = folder / ("data.jsonl" if form == "lines" else "data.json")
    path.write_text("\n".join(rows) if form == "lines" else "[" + ",\n".join(rows) + "]")
    found = list(formats.each(formats.Form(path)))
    assert [one.line for one in found] == [1, 2, 3]
    assert [isinstance(one, Fault) for one in found] == [False, True, False]
    assert isinstance(found[1], Fault) and message in found[1].message and found[1].remedy
    with pytest.raises(DataError, match="line 2"):
        Records(formats.Form(path))


SAME = {
    "a key": pairs(("image", "1.png"), ("image", "1.png"), ("conversations", SAID)),
    "an empty one behind": pairs(("image", "1.png"), ("image", None), ("conversations", SAID)),
    "an empty one before": pairs(("image", ""), ("image", "1.png"), ("conversations", SAID)),
    "names": pairs(("image", "1.png"), ("images", ["1.png"]), ("conversations", SAID)),
    "an empty list": pairs(("image", "1.png"), ("images", []), ("conversations", SAID)),
    "what is said": pairs(("image", "1.png"), ("conversations", SAID), ("messages", TOLD)),
}


@pytest.mark.parametrize("name", SAME)
def test_two_that_are_the_same_are_one_whichever_stands_last(folder: Path, name: str) -> None:
    path = folder / "data.jsonl"
    path.write_text(SAME[name])
    (sample,) = Records(formats.Form(path))
    turns = (Turn("user", (Image(folder / "1.png"), Text("Which?"))), Turn.say("assistant", "This."))
    assert sample.turns == turns == formats.load(path)[0].turns


def test_tables_and_columns_that_are_there_twice_are_faults(folder: Path) -> None:
    images = [{"id": 1, "file_name": "1.png"}]
    notes = [[{"id": number, "image_id": 1, "caption": "x"}] for number in (5, 6)]
    path = folder / "captions.json"
    path.write_text(pairs(("images", images), ("annotations", notes[0]), ("annotations", notes[1])))
    assert "the key 'annotations' is there twice" in formats.check(path)[-1].message
    path = folder / "captions.csv"
    path.write_text("image,caption,caption,,\n1.png,a,a,x,y\n1.png,a,b,,\n")
    (fault,) = formats.check(path)
    assert fault.line == 3 and "the key 'caption' is there twice" in fault.message


@pytest.mark.parametrize("empty", [[], {}, None])
def test_tables_that_are_there_twice_and_say_the_same_are_one(folder: Path, empty: Any) -> None:
    images, notes = [{"id": 1, "file_name": "1.png"}], [{"id": 5, "image_id": 1, "caption": "x"}]
    told = [("licenses", empty), ("licenses", empty), ("images", empty), ("images", images)]
    path = folder / "captions.json"
    path.write_text(pairs(*told, ("annotations", notes), ("annotations", notes), ("annotations", empty)))
    assert [sample.turns[1].text for sample in formats.load(path)] == ["x"]


# ---------------------------------------------------------------------------------------------- over several lines

PREFERRED = {"prompt": TOLD[:1], "completion": TOLD[1:], "images": ["1.png"]}


@pytest.mark.parametrize("record", [json.loads(GOOD), {"images": ["1.png"], "messages": TOLD}, PREFERRED])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_record_in_a_json_is_one_record(
    folder: Path, record: dict[str, Any], mark: str, indent: int | None
) -> None:
    path = folder / "one.json"
    path.write_text(mark + "\n" + json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    turns = (Turn("user", (Image(folder / "1.png"), Text("Which?"))), Turn.say("assistant", "This."))
    named = [] if "prompt" in record else ["llava" if "conversations" in record else "messages"]
    for format in (None, *named):
        form = formats.Form(path, options=formats.FileOptions.model_validate({"format": format}))
        for _ in range(2):  # read through, and then from its place
            (sample,) = Records(form)
            assert sample.turns == turns and sample.meta["line"] == 2


def test_a_folder_of_files_with_one_record_each_is_read(folder: Path) -> None:
    (folder / "rows").mkdir()
    for name in "ab":
        (folder / "rows" / f"{name}.json").write_text(json.dumps(json.loads(GOOD), indent=1))
    assert len(formats.load(folder / "rows", folder)) == 2


def test_what_is_wrong_with_the_one_record_is_told(folder: Path) -> None:
    path = folder / "one.json"
    path.write_text(json.dumps({"image": "1.png", "mesages": "x"}, indent=2))
    (fault,) = formats.check(path)
    assert "neither conversations nor messages" in fault.message
    path.write_text(json.dumps({"data": [json.loads(GOOD)]}, indent=2))
    (fault,) = formats.check(path)
    assert "tables of no known layout (they have data)" in fault.message and "in one array, [ … ]" in fault.remedy


@pytest.mark.parametrize("count", [1, 3])
def test_lines_that_are_spread_over_several_are_one_fault(folder: Path, count: int) -> None:
    path = folder / "data.jsonl"
    path.write_text("\n".join([json.dumps(json.loads(GOOD), indent=2)] * count))
    (fault,) = formats.check(path)
    assert fault.line == 1 and "goes over several lines" in fault.message and "[ ]" in fault.remedy
    path.write_text('{"image": \n' + GOOD)  # one that is damaged is another thing
    assert [one.line for one in formats.check(path)] == [1]


# ---------------------------------------------------------------------------------------------- newer words of OpenAI's


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_developer_speaks_as_the_system_did(folder: Path, role: Role) -> None:
    path = folder / "data.jsonl"
    first = {"role": role, "content": "Be brief."}
    path.write_text(json.dumps({"messages": [first, *TOLD], "images": ["1.png"]}))
    assert formats.load(path)[0].turns[0] == Turn.say("system", "Be brief.") == formats.turns([first])[0]


def test_parts_of_the_responses_api_are_read(folder: Path) -> None:
    asked = [{"type": "input_image", "image_url": "1.png"}, {"type": "input_text", "text": "Which?"}]
    said = [{"type": "output_text", "text": "This."}]
    path = folder / "data.jsonl"
    path.write_text(json.dumps({"messages": [dict(TOLD[0], content=asked), dict(TOLD[1], content=said)]}))
    turns = (Turn("user", (Image(folder / "1.png"), Text("Which?"))), Turn.say("assistant", "This."))
    assert formats.load(path)[0].turns == turns
