"""Files read record by record: the same samples as when read whole, from an index that follows the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from isthmus import cards
from isthmus.config import Source
from isthmus.data import formats, records
from isthmus.data.formats import Form
from isthmus.data.indexes import LOTS, Chosen, Index
from isthmus.data.records import Records
from isthmus.data.sets import open_set, stamp
from isthmus.types import ConfigError, DataError, Sample


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def rows(count: int) -> list[dict]:
    words = ("naïve", "漢字", "\u2028 and", "plain")
    said = [
        [{"role": "user", "content": f"{words[n % 4]} {n}?"}, {"role": "assistant", "content": "so"}]
        for n in range(count)
    ]
    return [{"id": n, "messages": one} if n % 3 else {"messages": one} for n, one in enumerate(said)]


def write(folder: Path, form: str, count: int = 300) -> Path:
    """Records in every shape that a file may have: a mark of the byte order, blank lines, \\r\\n, indentation."""
    made = rows(count)
    lines = [json.dumps(row, ensure_ascii=bool(number % 2)) for number, row in enumerate(made)]
    text = {
        "lines": "\n".join(lines) + "\n",
        "marked": "\ufeff\n\n" + "\r\n".join(lines),
        "array": json.dumps(made, indent=1, ensure_ascii=False),
        "marked array": "\ufeff [" + " ,\n".join(lines) + "]",
    }[form]
    file = folder / ("data.json" if "array" in form else "data.jsonl")
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("form", ["lines", "marked", "array", "marked array"])
def test_one_by_one_is_what_all_at_once_is(tmp_path: Path, form: str) -> None:
    file = write(tmp_path, form)
    expected = formats.load(file)
    for _ in range(2):  # the second time from the index
        found = Records(Form(file), "all")
        assert len(found) == len(expected) == 300
        assert [found[number] for number in range(300)] == expected


def test_parts_are_disjoint_complete_and_follow_ids_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "lines")
    kept, held_out = (
        list(map(Records(Form(file), part).__getitem__, range(len(Records(Form(file), part)))))
        for part in ("kept", "held out")
    )
    ids = [{sample.id for sample in part} for part in (kept, held_out)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {sample.id for sample in formats.load(file)}
    assert 1 <= len(held_out) <= 20
    few = write(tmp_path, "array", 1)
    assert len(Records(Form(few), "kept")) == len(Records(Form(few), "held out")) == 1


def test_all_that_is_said_of_a_picture_is_held_out_or_none_of_it(tmp_path: Path) -> None:
    for number in range(200):
        Pillow.new("RGB", (1, 1), (number, 0, 0)).save(tmp_path / f"{number}.png")
    said = [{"image": f"{n % 200}.png", "caption": f"caption {n}"} for n in range(1000)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, said)))
    parts = [Records(Form(file), part) for part in ("kept", "held out")]
    pictures = [{part[n].media[0].source.name for n in range(len(part))} for part in parts]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 200
    assert 1 <= len(pictures[1]) <= 12 and len(parts[1]) == 5 * len(pictures[1])
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (file, *tmp_path.glob("*.png")):
        path.rename(moved / path.name)
    again = Records(Form(moved / file.name), "held out")
    assert {again[n].media[0].source.name for n in range(len(again))} == pictures[1]


def test_of_a_small_file_too_one_picture_is_held_out_but_of_a_handful(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    spared = [name for name in map(str, range(100)) if records._lot(Sample((), name), tmp_path) >= LOTS // 50]
    for count, held in ((30, 1), (9, 9)):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("\n".join(json.dumps({"id": name, "messages": said}) for name in spared[:count]))
        assert len(Records(Form(file), "held out")) == held
        assert len(Records(Form(file), "kept")) == (count - held or count)


def test_a_publisher_s_splits_are_chosen_or_refused(tmp_path: Path) -> None:
    names = ("train", "val", "test", "restval")
    file = tmp_path / "data.jsonl"
    made = [row | {"meta": {"split": names[number % 4]}} for number, row in enumerate(rows(400))]
    file.write_text("\n".join(map(json.dumps, made)))
    source = Source(name=str(file))
    assert len(open_set(source.but(split="test"), 0)) == 400
    assert "train, val, test, restval together" in open_set(source.but(split="test"), 0).card.source
    for split in ("train", "val"):  # the second time from the index
        with pytest.raises(ConfigError, match="holds the splits train, val, test, restval") as caught:
            open_set(source.but(split=split), 0)
        assert "rows: train" in caught.value.remedy
    for given, expected in (("train", {"train"}), (["train", "restval"], {"train", "restval"})):
        chosen = source.but(options={"rows": given})
        found = [sample for split in ("train", "val") for sample in open_set(chosen.but(split=split), 0)]
        assert len(found) == 100 * len(expected) and {sample.meta["split"] for sample in found} == expected
        assert stamp([chosen], 0) != stamp([source], 0)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no rows of trian") as caught:
            open_set(source.but(options={"rows": "trian"}), 0)
        assert caught.value.remedy == "it has restval, test, train, val"
    with pytest.raises(ConfigError, match="no rows of trian"):
        formats.check(file, None, formats.FileOptions(rows=("trian",)))


def test_a_user_s_file_has_three_splits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'testA'") as caught:
        open_set(Source(name=str(write(tmp_path, "lines")), split="testA"), 0)
    assert "train, val, test" in caught.value.remedy and "rows: testA" in caught.value.remedy


def test_a_second_opening_reads_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "lines")
    Records(Form(file), "all")
    monkeypatch.setattr(formats, "each", lambda *args: pytest.fail("read again"))
    source = Source(name=str(file), split="test")
    assert open_set(source, 0)[7].id == "7"


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, "lines")
    source = Source(name=str(file))
    old, before = Records(Form(file), "all"), stamp([source], 0)
    write(tmp_path, "lines", 200)
    assert len(Records(Form(file), "all")) == 200
    assert stamp([source], 0) != before != stamp([source], 1)
    with pytest.raises(DataError, match="line 300 is not what it was"):
        old[299]


def test_faults_are_said_every_time_and_never_kept(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path, "lines")
    with file.open("a") as stream:
        stream.write('{"id": "bad", "messages": []}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"line 301 \(bad\): there is no assistant turn"):
            Records(Form(file), "all")
    assert not list(home.rglob("*.index"))


@pytest.mark.parametrize("harm", ["cut", "emptied", "pickled"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, home: Path, harm: str) -> None:
    file = write(tmp_path, "lines")
    expected = Records(Form(file), "all")[5]
    (index,) = home.rglob("*.index")
    content = index.read_bytes()
    if harm == "pickled":
        with index.open("wb") as stream:
            np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    else:
        index.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    assert Records(Form(file), "all")[5] == expected
    assert index.read_bytes() == content


def test_pictures_are_found_from_where_they_were(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Pillow.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A fox."}]
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"image": "a.png", "conversations": said}) + "\n")
    assert Records(Form(file, tmp_path / "images"))[0] == formats.load(file, tmp_path / "images")[0]
    with pytest.raises(DataError, match="no picture"):
        Records(Form(file), "all")


def test_an_index_that_cannot_be_kept_is_done_without(tmp_path: Path, home: Path) -> None:
    home.mkdir()
    (home / "indexes").write_text("in the way")
    assert Records(Form(write(tmp_path, "lines")))[299].turns[0].text == "plain 299?"


@pytest.mark.parametrize("held", [[], [0], [3], [0, 1, 2], [1, 4, 8], [9], list(range(10))])
def test_the_numbers_of_a_part_are_those_of_a_list(held: list[int]) -> None:
    index = Index(np.zeros((10, 5), np.int64), np.array(held, np.int64), 0)
    parts = {"all": range(10), "kept": [n for n in range(10) if n not in held], "held out": held}
    for part, expected in parts.items():
        chosen = Chosen(index, part)  # type: ignore[arg-type]
        whole = list(range(10)) if len(held) in (0, 10) else list(expected)
        assert list(map(chosen.__getitem__, range(len(chosen)))) == whole and chosen[-1] == whole[-1]
        with pytest.raises(IndexError):
            chosen[len(chosen)]


def test_what_the_system_says_of_files_is_said_in_two_lines(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path, "lines")
    with pytest.raises(DataError, match="cannot be opened or kept"):
        Records(Form(Path("x" * 5000 + ".jsonl")))
    with pytest.raises(DataError, match="absent.json: cannot be opened or kept"):
        questions = tmp_path / "questions.json"
        questions.write_text('{"questions": [{"question_id": 1}]}')
        Records(Form(questions, options=formats.FileOptions(format="vqav2", beside=tmp_path / "absent.json")))
    found = Records(Form(file))
    file.unlink()
    with pytest.raises(DataError, match="data.jsonl: cannot be opened or kept"):
        found[3]


def test_a_copy_that_cannot_be_kept_is_said(tmp_path: Path, home: Path) -> None:
    home.mkdir()
    (home / "indexes").write_text("in the way")
    file = tmp_path / "data.csv"
    file.write_text("image,caption\n")
    with pytest.raises(DataError, match="indexes: cannot be opened or kept"):
        Records(Form(file))


def test_a_folder_that_is_called_otherwise_holds_something_else_and_one_that_moved_the_same(tmp_path: Path) -> None:
    """The folders of pictures are what they show."""
    folder = tmp_path / "pictures"
    (folder / "cat").mkdir(parents=True)
    Pillow.new("RGB", (2, 2)).save(folder / "cat" / "0.png")

    def told(folder: Path) -> list[str]:
        form = Form(folder)
        return [state(form, form.opened()) for state in (records.content, cards._content)]

    before = told(folder)
    (folder / "cat").rename(folder / "bird")
    assert not set(told(folder)) & set(before)
    (folder / "bird").rename(folder / "cat")
    assert told(folder.rename(tmp_path / "moved")) == before
    file = write(tmp_path, "lines", 3)
    assert told(file) == told(file.rename((tmp_path / "moved") / file.name))
