"""Whatever is written is read again as it was, in every format."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats, writers
from isthmus.data.media import open_image
from isthmus.data.survey import survey
from isthmus.types import Box, ConfigError, DataError, Grounding, Image, Part, Sample, Text, Turn


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


def made(folder: Path) -> list[Sample]:
    """Conversations with files, encoded bytes, open pictures, regions, system turns and odd characters."""
    path = folder / "pictures" / "a.png"
    path.parent.mkdir()
    Pillow.new("RGB", (8, 4), "red").save(path)
    jpeg = folder / "b.jpg"
    Pillow.new("RGB", (4, 4), "blue").save(jpeg)
    turns: list[tuple[Turn, ...]] = [
        (Turn.say("user", Image(path), "\nWhat?"), Turn.say("assistant", 'naïve 漢字 \u2028 "x"\n<bbox>')),
        (
            Turn.say("system", "Be brief."),
            Turn.say("user", "one ", Image(jpeg.read_bytes()), " two ", Image(Pillow.new("RGB", (2, 2), "green"))),
            Turn.say(
                "assistant", "Here ", Box((0.1, 0.2, 1 / 3, 0.9), "the fox"), ", ", Box((0.0, 0.0, 1.0, 1.0)), "."
            ),
            Turn.say("user", "And?"),
            Turn.say("assistant", "No."),
        ),
        (Turn.say("user", "No picture"), Turn.say("assistant", "at all")),
    ]
    return [Sample(said, f"s{number}", {"kind": "x"}) for number, said in enumerate(turns)]


def told(part: Part) -> Any:
    return open_image(part.source).getpixel((0, 0)) if isinstance(part, Image) else part


@pytest.mark.parametrize("to", writers.WRITERS)
def test_written_and_read_again(tmp_path: Path, to: Any) -> None:
    expected = made(tmp_path)
    name = {"llava": "out.json", "messages": "out.jsonl", "parquet": "out.parquet", "webdataset": "out"}[to]
    out = tmp_path / "there" / name
    assert writers.write(expected, out, to) == 3
    found = formats.load(out)
    assert [[(turn.role, list(map(told, turn.parts))) for turn in one.turns] for one in found] == [
        [(turn.role, list(map(told, turn.parts))) for turn in one.turns] for one in expected
    ]
    assert [one.id for one in found] == ["s0", "s1", "s2"]
    if to != "parquet":
        assert all(one.meta["kind"] == "x" for one in found)
    with pytest.raises(ConfigError, match="there already"):
        writers.write(expected, out, to)


def test_llava_files_are_what_other_tools_read(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    writers.write(made(tmp_path)[:1], out, "llava")
    (record,) = json.loads(out.read_text())
    assert record["image"] == "pictures/a.png" and record["conversations"][0] == {
        "from": "human",
        "value": "<image>\nWhat?",
    }


def test_tars_are_split_and_read_by_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "SHARD", 2)
    writers.write(made(tmp_path), tmp_path / "out", "webdataset")
    names = []
    for path in sorted((tmp_path / "out").iterdir()):
        with tarfile.open(path) as archive:
            names.append(archive.getnames())
    assert names == [
        ["000000000.0.png", "000000000.json", "000000001.0.jpg", "000000001.1.png", "000000001.json"],
        ["000000002.json"],
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("<image>",), "the word <image>"),
        ((Grounding(),), "hold a grounding"),
        ((Text("<bbox>"), Box((0, 0, 1, 1))), "<bbox>"),
    ],
)
def test_what_files_cannot_say_is_refused(tmp_path: Path, parts: tuple[Part, ...], message: str) -> None:
    sample = Sample((Turn.say("user", *parts), Turn.say("assistant", "x")), "odd")
    with pytest.raises(DataError, match=message):
        writers.write([sample], tmp_path / "out.jsonl", "messages")
    assert not list(tmp_path.iterdir())


def test_a_survey_counts_by_hand(tmp_path: Path) -> None:
    writers.write(made(tmp_path), tmp_path / "out.jsonl", "messages")
    with (tmp_path / "out.jsonl").open("a") as stream:
        stream.write("{}\n")
    told = survey(formats.Form(tmp_path / "out.jsonl"), tokens=len).told()
    assert {key: told[key] for key in ("samples", "faults", "turns", "without media", "boxes")} == {
        "samples": 3,
        "faults": 1,
        "turns": 9,
        "without media": 1,
        "boxes": 2,
    }
    assert told["media"] == {"image": 3} and told["width"] == {"least": 2, "median": 4, "95 %": 8, "greatest": 8}
    assert told["words of a question"]["greatest"] == 2 and told["tokens of a sample"]["least"] == len(
        "No pictureat all"
    )
