"""Whatever is written is read again as it was, in every format."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image as Pillow
from pyarrow import parquet

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
        (Turn.say("user", Image(path), "\nWhat?"), Turn.say("assistant", 'naïve 漢字 \u2028 "x"\n<box>')),
        (
            Turn.say("system", "Be brief."),
            Turn.say("user", "one ", Image(jpeg.read_bytes()), " two ", Image(Pillow.new("RGB", (2, 2), "green"))),
            Turn.say(
                "assistant", "Here ", Box((0.1, 0.2, 1 / 3, 0.9), "the fox"), ", ", Box((0.0, 0.0, 1.0, 1.0)), "."
            ),
            Turn.say("user", "And?"),
            Turn.say("assistant", "No."),
        ),
        (
            Turn.say("user", "No picture"),
            Turn.say("assistant", "at all"),
            Turn.say("user", "?"),
            Turn.say("assistant", Text("as it is", given=True)),
        ),
    ]
    other = (Turn.say("assistant", "a ", Image(Pillow.new("RGB", (2, 2), "white")), Box((0.0, 0.0, 0.5, 0.5), "bear")),)
    meta = [{"kind": "x", "answers": ["naïve", "no"], "choices": {"A": "one"}, "route": 1}, {"score": None}, {}]
    return [
        Sample(said, f"s{number}", meta[number], other if number == 1 else None) for number, said in enumerate(turns)
    ]


def told(part: Part) -> Any:
    return open_image(part.source).getpixel((0, 0)) if isinstance(part, Image) else part


@pytest.mark.parametrize("to", writers.WRITERS)
def test_written_and_read_again(tmp_path: Path, to: Any) -> None:
    expected = made(tmp_path)
    name = {"llava": "out.json", "messages": "out.jsonl", "parquet": "out.parquet", "webdataset": "out"}[to]
    out = tmp_path / "there" / name
    assert writers.write(expected, out, to) == 3
    found = formats.load(out)
    ends, again = ([(*one.turns, *(one.pair or ())) for one in samples] for samples in (expected, found))
    assert [[(turn.role, list(map(told, turn.parts))) for turn in said] for said in again] == [
        [(turn.role, list(map(told, turn.parts))) for turn in said] for said in ends
    ]
    assert [len(one.pair or ()) for one in found] == [0, 1, 0]
    assert [one.id for one in found] == ["s0", "s1", "s2"]
    assert [dict(one.meta) for one in found] == [
        {**one.meta, "file": again.meta["file"], "line": again.meta["line"]} for one, again in zip(expected, found)
    ]
    with pytest.raises(ConfigError, match="there already"):
        writers.write(expected, out, to)


PLAIN = (Turn.say("user", "What?"), Turn.say("assistant", "This."))


@pytest.mark.parametrize("to", writers.WRITERS)
def test_meta_of_a_table_is_written_without_loss_or_refused_by_its_sample(tmp_path: Path, to: Any) -> None:
    """Parquet brings values that JSON has no word for; what is written says as much, as Python itself reads it."""
    told = {
        "when": datetime(2024, 2, 29, 23, 59, 58, 123456, timezone(timedelta(hours=2))),
        "day": date(1999, 12, 31),
        "hour": time(6, 30, 0, 5),
        "price": Decimal("1.10"),
    }
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    rows = [{"id": "a", "messages": said, "meta": told}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dated.parquet")
    out = tmp_path / f"out{next(ending for ending, kind in writers.ENDINGS.items() if kind == to)}"
    writers.write(formats.load(tmp_path / "dated.parquet"), out, to)
    (found,) = formats.load(out)
    assert found.turns == PLAIN and datetime.fromisoformat(found.meta["when"]) == told["when"]
    assert date.fromisoformat(found.meta["day"]) == told["day"]
    assert time.fromisoformat(found.meta["hour"]) == told["hour"]
    assert str(Decimal(found.meta["price"])) == "1.10"
    rows[0]["meta"] = {"deep": [{"raw": b"\xff"}]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bytes.parquet")
    assert formats.check(tmp_path / "bytes.parquet") == []
    with pytest.raises(DataError, match="sample a: its meta holds a value of type bytes"):
        writers.write(formats.load(tmp_path / "bytes.parquet"), tmp_path / "new" / out.name, to)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("to", writers.WRITERS)
def test_half_of_a_surrogate_pair_in_meta_is_read_again(tmp_path: Path, to: Any) -> None:
    meta = {"half \udc00": "half \ud83d, whole \U0001f98a, naïve \\ud83d"}
    out = tmp_path / f"out{next(ending for ending, kind in writers.ENDINGS.items() if kind == to)}"
    writers.write([Sample(PLAIN, "a", meta)], out, to)
    (found,) = formats.load(out)
    assert {key: value for key, value in found.meta.items() if key not in ("file", "line")} == meta
    if out.is_file() and to != "parquet":
        assert "naïve" in out.read_text(encoding="utf-8")  # other letters stay as they are


def test_parquet_refuses_half_of_a_surrogate_pair_in_its_own_columns(tmp_path: Path) -> None:
    picture, region = Image(Pillow.new("RGB", (2, 2))), Box((0.0, 0.0, 1.0, 1.0), "half \ud83d")
    half = Sample((Turn.say("user", picture, "Where?"), Turn.say("assistant", region)), "a")
    assert writers.write([half], tmp_path / "out.jsonl", "messages") == 1
    assert formats.load(tmp_path / "out.jsonl")[0].turns[1].parts == (region,)
    with pytest.raises(DataError, match="sample a: half a surrogate pair"):
        writers.write([half], tmp_path / "out.parquet", "parquet")


@pytest.mark.parametrize(("name", "to"), [("out", "parquet"), ("out.json", "messages"), ("out.jsonl", "llava")])
def test_a_name_that_would_not_be_read_again_is_refused(tmp_path: Path, name: str, to: Any) -> None:
    samples = made(tmp_path)
    with pytest.raises(ConfigError, match="would not be read again") as said:
        writers.write(samples, tmp_path / name, to)
    named = Path(said.value.remedy.removeprefix("name it "))
    assert writers.write(samples, named, to) == 3 and len(formats.load(named)) == 3


@pytest.mark.parametrize("to", writers.WRITERS)
@pytest.mark.parametrize("stop", [DataError("a picture is damaged", "remove it"), KeyboardInterrupt()])
def test_what_was_not_finished_leaves_nothing_behind(tmp_path: Path, to: Any, stop: BaseException) -> None:
    def until() -> Iterator[Sample]:
        yield from made(tmp_path)
        raise stop

    name = next(f"out{ending}" for ending, kind in writers.ENDINGS.items() if kind == to)
    with pytest.raises(type(stop)):
        writers.write(until(), tmp_path / "there" / name, to)
    assert list((tmp_path / "there").iterdir()) == []


def test_pictures_beside_a_file_replace_no_others(tmp_path: Path) -> None:
    first, second = (
        Sample((Turn.say("user", Image(Pillow.new("RGB", (2, 2), colour)), "?"), Turn.say("assistant", "x")))
        for colour in ("red", "blue")
    )
    writers.write([first], tmp_path / "out.json", "llava")
    with pytest.raises(ConfigError, match="out_files is there already"):
        writers.write([second], tmp_path / "out.jsonl", "messages")
    (found,) = formats.load(tmp_path / "out.json")
    assert told(found.media[0]) == (255, 0, 0) and sorted(file.name for file in tmp_path.iterdir()) == [
        "out.json",
        "out_files",
    ]


def test_tables_may_spell_conversations_out_as_json(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A fox."}]
    rows = [{"conversations": json.dumps(said), "meta": '{"route": 1}'}, {"conversations": "What?", "meta": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    good, bad = formats.each(formats.Form(tmp_path / "a.parquet"))
    assert isinstance(good, formats.Record) and good.sample.meta["route"] == 1
    assert [turn.text for turn in good.sample.turns] == ["What?", "A fox."]
    assert isinstance(bad, formats.Fault) and bad.message == "conversations is not a list"


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
        [
            "000000000.0.png",
            "000000000.json",
            "000000001.0.jpg",
            "000000001.1.png",
            "000000001.2.png",
            "000000001.json",
        ],
        ["000000002.json"],
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("<image>",), "the word <image>"),
        ((Grounding(),), "hold a grounding"),
        (("a <video> tag",), "the word <video>"),
        (("<bbox>",), "the word <bbox>"),
        (("<ref-object>",), "the word <ref-object>"),
        (("<img>a.png</img>",), "the word <img>a.png</img>"),
        ((Text("A form: ", given=True), "filled in"), "learnt in part"),
    ],
)
def test_what_files_cannot_say_is_refused(tmp_path: Path, parts: tuple[Part, ...], message: str) -> None:
    sample = Sample((Turn.say("user", "?"), Turn.say("assistant", *parts)), "odd")
    with pytest.raises(DataError, match=message):
        writers.write([sample], tmp_path / "out.jsonl", "messages")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "to", "better"), [("out.jsonl", "llava", "out.json"), ("out.tar", "webdataset", "out")]
)
def test_a_name_that_would_not_be_read_again_is_refused_with_one_that_would(
    tmp_path: Path, name: str, to: writers.To, better: str
) -> None:
    samples = made(tmp_path)
    with pytest.raises(ConfigError) as caught:
        writers.write(samples, tmp_path / name, to)
    assert caught.value.remedy == f"name it {tmp_path / better}"
    writers.write(samples, tmp_path / better, to)
    assert len(formats.load(tmp_path / better)) == 3


def test_a_survey_counts_by_hand(tmp_path: Path) -> None:
    writers.write(made(tmp_path), tmp_path / "out.jsonl", "messages")
    with (tmp_path / "out.jsonl").open("a") as stream:
        stream.write("{}\n")
    told = survey(formats.each(formats.Form(tmp_path / "out.jsonl")), tokens=len).told()
    assert {key: told[key] for key in ("samples", "faults", "turns", "without media", "boxes")} == {
        "samples": 3,
        "faults": 1,
        "turns": 11,
        "without media": 1,
        "boxes": 2,
    }
    assert told["media"] == {"image": 3} and told["width"] == {"least": 2, "median": 4, "95 %": 8, "greatest": 8}
    assert told["words of a question"]["greatest"] == 2 and told["tokens of a sample"]["least"] == len(
        "No pictureat all?as it is"
    )
