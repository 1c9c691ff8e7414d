"""Files and folders of every kind give the same samples in passing and one by one; every planted fault is found."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from isthmus.config import Source
from isthmus.data import containers, formats, joined, jsons, layouts, records, tables, tars
from isthmus.data.faults import Wrong
from isthmus.data.formats import FileOptions, Form
from isthmus.data.media import open_image
from isthmus.data.mix import Mix
from isthmus.data.pictures import files
from isthmus.data.records import Records
from isthmus.data.sets import open_set, stamp
from isthmus.types import ConfigError, DataError, Image, Sample

SKIP = FileOptions(faults="skip")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def png(colour: int = 0, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", (4, 3), (colour % 256, 0, 0)).save(stream, kind)
    return stream.getvalue()


def said(question: str, answer: Any = "A fox.") -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def colours(samples: list[Sample]) -> list[int]:
    return [open_image(sample.media[0].source).getpixel((0, 0))[0] for sample in samples]


def one_by_one(path: Path, **options: Any) -> list[Sample]:
    """The samples as training reads them, twice: from reading everything, and from what is kept of that."""
    form = Form(path, options=FileOptions(**options))
    first, again = (list(map(found.__getitem__, range(len(found)))) for found in (Records(form), Records(form)))
    expected = formats.load(path, options=FileOptions(**options))
    assert first == again == expected
    return first


# ---------------------------------------------------------------------------------------------- planted faults


def plant(folder: Path) -> tuple[Path, dict[int, str]]:
    """A thousand rows, forty of them wrong in twenty ways; many of the others are odd but right."""
    dice = random.Random(4)
    (folder / "images").mkdir()
    for name, data in {
        "a.png": png(),
        "b.jpg": png(1, "JPEG"),
        "grey.gif": png(2, "GIF"),
        "cut.png": png()[:48],
        "empty.png": b"",
        "text.png": b"not a picture at all",
        "bomb.png": bomb(),
    }.items():
        (folder / "images" / name).write_bytes(data)
    Pillow.new("L", (1, 1)).save(folder / "images" / "one.bmp")
    regions = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    faults: list[Any] = [
        {"image": "a.png", "conversations": said("No marker")},
        {"image": "a.png", "conversations": said("<image><image>")},
        {"conversations": said("<image>")},
        {"image": "gone.png", "conversations": said("<image>")},
        {"image": "cut.png", "conversations": said("<image>")},
        {"image": "empty.png", "conversations": said("<image>")},
        {"image": "text.png", "conversations": said("<image>")},
        {"image": "bomb.png", "conversations": said("<image>")},
        {"image": "../out.png", "conversations": said("<image>")},
        {"image": "https://example.org/a.png", "conversations": said("<image>")},
        {"conversations": said("What?", "")},
        {"conversations": said("What?", None)},
        {"conversations": said("What?")[:1]},
        {"conversations": said("What?")[::-1]},
        {"conversations": [{"from": "narrator", "value": "x"}, *said("x")]},
        {"conversation": said("What?")},
        {"conversations": said("half \ud83d of a pair")},
        {"images": ["a.png"], "messages": regions, "objects": {"bbox": [[0, 0, 40, 3]]}},
        "not json {",
        '{"conversations": [',
    ]
    good: list[Any] = [
        {"image": "a.png", "conversations": said("<image>\nWhat?")},
        {"images": ["a.png", "b.jpg"], "conversations": said("<image> or <image>?")},
        {"image": "grey.gif", "conversations": said("<image>", "  spaced  ")},
        {"image": "one.bmp", "conversations": said("a < b > c <image")[:1] and said("<image>a < b > c <imag")},
        {"conversations": said("漢字 \u2028 naïve 🦊 <bbox > <video src=x>", "🦊")},
        {"conversations": [*said("What?"), *said("And?", "B")], "model": "x", "extra": [1]},
        {
            "messages": [
                {"role": "system", "content": ""},
                *({"role": r, "content": "x"} for r in ("user", "assistant")),
            ]
        },
        {"images": ["a.png"], "messages": regions, "objects": {"bbox": [[0, 0, 4.02, 3]]}},
    ]
    rows = [dice.choice(good) for _ in range(1000)]
    planted: dict[int, str] = {}
    for number, line in enumerate(dice.sample(range(1000), 40)):
        rows[line] = faults[number % len(faults)]
        planted[line + 1] = str(rows[line])
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path, planted


def bomb() -> bytes:
    """The header of a picture of 50 000 × 50 000."""
    data = bytearray(png())
    data[16:24] = (50_000).to_bytes(4) * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def test_forty_planted_faults_are_found_and_nothing_else(tmp_path: Path) -> None:
    path, planted = plant(tmp_path)
    found = [one for one in records.found(Form(path, tmp_path / "images")) if isinstance(one, formats.Fault)]
    assert [fault.line for fault in found] == sorted(planted)
    assert all(fault.message and fault.remedy and fault.file == str(path) for fault in found)


def test_training_can_skip_exactly_those_and_counts_them(tmp_path: Path) -> None:
    path, planted = plant(tmp_path)
    for _ in range(2):  # read, then from the index
        kept = Records(Form(path, tmp_path / "images", SKIP))
        assert (len(kept), kept.skipped) == (960, 40)
    assert not {kept[number].meta["line"] for number in range(960)} & planted.keys()
    source = Source(name=str(path), images=tmp_path / "images", options={"faults": "skip"}, split="test")
    assert len(open_set(source, 0)) == 960 and "40 faulty ones left out" in open_set(source, 0).card.source
    with pytest.raises(DataError, match="faults in all"):
        open_set(source.but(options={}), 0)


# ---------------------------------------------------------------------------------------------- tars


def tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_tars_are_read_in_place(tmp_path: Path, form: int) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    long = "p" * 90 + "/" + "n" * 120
    for shard in range(3):
        files = []
        for number in range(shard * 10, shard * 10 + 10):
            key = f"{long if number % 3 == 0 and form != tarfile.USTAR_FORMAT else 'f'}{number:05d}"
            files += [(f"{key}.png", png(number)), (f"{key}.txt", f"picture {number}".encode())]
        tar(shards / f"{shard:03d}.tar", files, form)
    samples = one_by_one(shards)
    assert colours(samples) == list(range(30))
    assert [sample.turns[1].text for sample in samples] == [f"picture {number}" for number in range(30)]
    assert sorted(path.name for path in shards.iterdir()) == ["000.tar", "001.tar", "002.tar"]


def test_a_tar_may_hold_records_with_several_pictures(tmp_path: Path) -> None:
    record = {"images": ["x.second.png", "first.png"], "conversations": said("<image> or <image>?")}
    files = [("d/x.first.png", png(1)), ("d/x.second.png", png(2)), ("d/x.json", json.dumps(record).encode())]
    notes = {"key": "y", "url": "http://x", "caption": "from the notes", "width": 4}
    files += [("d/y.json", json.dumps(notes).encode()), ("d/y.jpg", png(3, "JPEG"))]
    first, second = one_by_one(tar(tmp_path / "a.tar", files))
    assert [open_image(medium.source).getpixel((0, 0))[0] for medium in first.media] == [2, 1]
    assert second.turns[1].text == "from the notes" and len(second.media) == 1


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "", **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.pax_headers = kind, size, link, pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def hostile() -> dict[str, tuple[bytes, str]]:
    """Archives that try something, and what is said of it."""
    here = png()
    body = here + bytes(-len(here) % 512)
    damaged = bytearray(header("a.png", size=len(here)))
    damaged[148:156] = b"0000000\0"
    links = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "pipe": tarfile.FIFOTYPE,
    }
    return {
        "up": (header("../../up.png", size=len(here)) + body, "leads out"),
        "inside up": (header("a/../../up.png", size=len(here)) + body, "leads out"),
        "absolute": (header("/etc/evil.png", size=len(here)) + body, "leads out"),
        "backslash": (header("..\\evil.png", size=len(here)) + body, "leads out"),
        "up by pax": (header("ok.png", size=len(here), path="../up.png") + body, "leads out"),
        **{name: (header("a.png", kind, link="/etc/passwd"), "is a link") for name, kind in links.items()},
        "sparse": (header("a.png", tarfile.GNUTYPE_SPARSE, len(here)) + body, "sparse"),
        "twice": ((header("a.png", size=len(here)) + body) * 2, "twice"),
        "same but for case": (header("a.png", size=len(here)) + body + header("a.PNG", size=len(here)) + body, "twice"),
        "4 GB": (header("a.png", size=4 << 30) + body, "claims more"),
        "negative": (header("a.png", size=-1), "claims more"),
        "8 EB by pax": (header("a.png", size=0, size_=str(1 << 60)).replace(b"size_=", b"size= "), ""),
        "long name": (header("x", tarfile.GNUTYPE_LONGNAME, 1 << 20) + bytes(1 << 20), "longer than any name"),
        "checksum": (bytes(damaged) + body, "damaged here"),
        "noise": (random.Random(0).randbytes(5000), "damaged here"),
        "bomb": (b"".join(header(f"a.{n}") for n in range(400)), "too many files"),
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_tars_put_nothing_anywhere(tmp_path: Path, name: str) -> None:
    raw, message = hostile()[name]
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(raw + bytes(1024))
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    faults = formats.check(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(tmp_path.rglob("*")) == before
    assert peak < 20 << 20
    assert any(message in fault.message for fault in faults), faults


def test_an_empty_tar_and_a_cut_one(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("a.png", png()), ("a.txt", b"x"), ("b.png", png()), ("b.txt", b"y")])
    path.write_bytes(path.read_bytes()[: 512 * 5 + 10])
    assert "claims more" in formats.check(path)[-1].message or "neither" in formats.check(path)[-1].message
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no conversation"):
        formats.load(path)


def test_more_in_one_sample_than_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_BYTES", 100)
    path = tar(tmp_path / "a.tar", [("a.png", png(1)), ("a.txt", b"x" * 100)])
    assert "too large" in formats.check(path)[0].message


# ---------------------------------------------------------------------------------------------- tables


def test_parquet_and_saved_folders_bring_their_pictures_along(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "images": [[{"bytes": png(number), "path": None}] for number in range(20)],
        "texts": [[{"user": f"What {number}?", "assistant": f"{number}", "source": "x"}] for number in range(20)],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({key: datasets.Value("string") for key in ("user", "assistant", "source")}),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    for shard in range(2):
        made.shard(2, shard, contiguous=True).to_parquet(tmp_path / "parquet" / f"{shard}.parquet")
    for path in (tmp_path / "saved", tmp_path / "parquet", next((tmp_path / "saved").glob("*.arrow"))):
        samples = one_by_one(path)
        assert colours(samples) == list(range(20)) and samples[7].turns[1].text == "7"
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="not a table"):
        formats.load(broken)


def test_tables_of_different_columns_are_no_shards_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": ["x"], "answer": ["y"]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"caption": ["x"]}).to_parquet(tmp_path / "b.parquet")
    capfd.readouterr()
    with pytest.raises(ConfigError, match=r"b\.parquet has other columns than a\.parquet"):
        formats.load(tmp_path)
    datasets.Dataset.from_dict({"question": ["x"], "answer": [["y"]]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="cast"):
        formats.load(tmp_path)
    assert capfd.readouterr() == ("", "")  # the library says nothing of its own


def test_a_folder_of_splits_asks_which_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"x": [1]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"holds the splits train, test"):
        formats.load(tmp_path / "both")


def test_shards_of_several_splits_are_told_apart_by_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "parquet").mkdir(), (tmp_path / "lines").mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        rows = [{"conversations": said("x", f"{split} {n}")} for n in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
        (tmp_path / "lines" / f"my_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for folder in (tmp_path / "parquet", tmp_path / "lines"):
        source = Source(name=str(folder))
        with pytest.raises(ConfigError, match="train, validation"):
            open_set(source, 0)
        assert len(open_set(source.but(split="test"), 0)) == 5
        chosen = open_set(source.but(options={"rows": "validation"}), 0)
        assert [sample.turns[1].text for sample in chosen] == ["validation 0", "validation 1"]
        assert [sample.meta["line"] for sample in chosen] == [1, 2]
        assert all("validation" in Path(sample.meta["file"]).name for sample in chosen)


def test_a_folder_of_pictures_with_metadata_is_hugging_face_s(tmp_path: Path) -> None:
    for split, colour in (("train", 1), ("test", 2)):
        (tmp_path / "pool" / split).mkdir(parents=True)
        (tmp_path / "pool" / split / "a.png").write_bytes(png(colour))
        row = {"file_name": "a.png", "text": f"of {split}"}
        (tmp_path / "pool" / split / "metadata.jsonl").write_text(json.dumps(row))
    samples = one_by_one(tmp_path / "pool")
    assert [(one.turns[1].text, one.meta["split"]) for one in samples] == [("of test", "test"), ("of train", "train")]
    assert colours(samples) == [2, 1] and len({one.id for one in samples}) == 2
    assert colours(one_by_one(tmp_path / "pool", rows="train")) == [1]
    assert [one.turns[1].text for one in one_by_one(tmp_path / "pool" / "test")] == ["of test"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_ids_that_metadata_give_are_theirs_and_the_others_are_made(tmp_path: Path, kind: str) -> None:
    for split, names in (("test", ["t-1", None]), ("train", [None, "7"])):
        folder = tmp_path / "pool" / split
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png())
        rows = [{"file_name": "a.png", "text": "x", "id": name} for name in names]
        lines = {
            "jsonl": [json.dumps(row) for row in rows],
            "csv": ["file_name,text,id", *(f"a.png,x,{name or ''}" for name in names)],
        }
        (folder / f"metadata.{kind}").write_text("\n".join(lines[kind]) + "\n")
    first = 1 if kind == "jsonl" else 2
    expected = ["t-1", f"test/metadata:{first + 1}", f"train/metadata:{first}", "7"]
    assert [one.id for one in one_by_one(tmp_path / "pool")] == expected


def test_folders_that_do_not_say_what_is_meant_are_refused_with_what_to_name(tmp_path: Path) -> None:
    table = b'{"1": {"question": "?", "imageId": "1", "answer": "x"}}'

    def folder(name: str, *files: str) -> Path:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            splits = b'{"train": ["1"], "test": []}'
            path.write_bytes(png() if path.suffix == ".png" else splits if "splits" in file else table)
        return tmp_path / name

    refused = {
        folder("llava", "images/a.png", "annotations/train.json"): "name annotations/train.json",
        folder("hub", "README.md", "data/train-00000-of-00001.parquet"): "name data/train-00000-of-00001.parquet",
        folder("factory", "dataset_info.json", "mine.json"): "name one of these files",
        folder("gqa", "a.json", "b.json"): "have them read in turn",
        folder("scienceqa", "pid_splits.json", "problems.json"): "have them read in turn",
        folder("both", "a.png", "metadata.jsonl", "data.jsonl"): "the one that is meant",
    }
    for path, remedy in refused.items():
        with pytest.raises(ConfigError) as caught:
            formats.load(path)
        assert remedy in caught.value.remedy, path
    (fault,) = formats.check(folder("train", "train/a.png"))
    assert fault.message == "nothing is said of train/a.png"
    (tmp_path / "gqa" / "1.jpg").write_bytes(png(7, "JPEG"))
    assert [Path(one.meta["file"]).name for one in one_by_one(tmp_path / "gqa", format="gqa")] == ["a.json", "b.json"]


SAID = json.dumps({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]})
NOTES = json.dumps({"version": 1, "splits": {"train": {"num_examples": 1}}})
CLASSES = json.dumps(["cat", "dog"])
TABLE = json.dumps({"1": {"question": "?", "imageId": "1", "answer": "x"}})
CAPTION = "file_name,text\na.png,x\n"
LONG = json.dumps({"licenses": [{"name": "x" * 80} for _ in range(2000)]})[:-1]
"""The beginning of an object that tells nothing of what it holds."""
COCO = '"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]'
SCANS = json.dumps({"dataset_name": "docvqa", "data": [{"questionId": 1, "question": "?", "image": "a.png"}]})


def filled(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": SAID, "val.json": f"[{SAID}]"},
        {"train.jsonl": SAID, "val.json": SAID},
        {"train.jsonl": SAID, "val.json": f"{SAID}\n{SAID}"},
        {"train.jsonl": SAID, "notes.json": NOTES, "questions.json": TABLE},
        {"metadata.jsonl": json.dumps({"file_name": "a.png", "text": "x"}), "val.json": f"[{SAID}]"},
        {"metadata.csv": CAPTION, "val.json": f"[{SAID}]"},
        {"metadata.csv": CAPTION, "train.jsonl": SAID},
        {"train.jsonl": SAID, "val_v1.0.json": SCANS},
        {"train.jsonl": SAID, "val.json": json.dumps([{"imgname": "a.png", "query": "?", "label": "x"}])},
        {"train.jsonl": SAID, "captions.json": f"{LONG}, {COCO}}}"},
        {"train.jsonl": SAID, "captions.json": f"{{{COCO}, {LONG[1:]}}}"},
        {"train.jsonl": SAID, "one.json": f"{LONG}, {SAID[1:]}"},
        {"train.jsonl": SAID, "long.json": f"[{LONG}, {SAID[1:]}]"},
        {"train.jsonl": SAID, "long.json": f"[{SAID}, {LONG}}}]"},
        {"train.jsonl": SAID, "gqa.json": f"{TABLE[:-1]}, {LONG[1:]}}}"},
    ],
)
def test_files_of_two_kinds_that_both_hold_samples_are_refused(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        formats.load(filled(tmp_path / "data", files))
    assert caught.value.cause.endswith(f"holds {next(iter(files))} and {list(files)[-1]}")
    assert caught.value.remedy == "name the one that is meant"


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        ({"train.jsonl": SAID, "dataset_infos.json": NOTES, "classes.json": CLASSES}, "y"),
        ({"metadata.csv": CAPTION, "dataset_infos.json": NOTES}, "x"),
        ({"metadata.jsonl": json.dumps({"file_name": "a.png", "text": "x"}), "dataset_infos.json": NOTES}, "x"),
    ],
)
def test_notes_beside_samples_are_passed_over(tmp_path: Path, files: dict[str, str], answer: str) -> None:
    assert [one.turns[1].text for one in formats.load(filled(tmp_path / "data", files))] == [answer]


@pytest.mark.parametrize(
    "notes",
    [
        f"{LONG}}}",
        f"{LONG}, {NOTES[1:]}",
        f"[{NOTES}, {LONG}}}]",
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys((f"layer.{n}" for n in range(9999)), "x")}, indent=1),
        json.dumps([["x"] * 30_000]),
    ],
)
def test_long_notes_beside_samples_are_not_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: str
) -> None:
    def whole(path: Path) -> Any:
        raise AssertionError(f"{path} is read through")

    monkeypatch.setattr(jsons, "_text", whole)
    folder = filled(tmp_path / "data", {"train.jsonl": SAID, "notes.json": notes})
    assert len(notes) > jsons.HEAD and [one.turns[1].text for one in formats.load(folder)] == ["y"]


class Everything(dict[str, Any]):
    """A record in which every key is there but some."""

    def __init__(self, value: Any, missing: set[str]) -> None:
        super().__init__()
        self.value, self.missing = value, missing

    def __contains__(self, key: object) -> bool:
        return key not in self.missing

    def __getitem__(self, key: str) -> Any:
        return self.value

    def get(self, key: str, default: Any = None) -> Any:
        return self.value if key in self else default

    def values(self) -> Any:
        return [self.value]


@pytest.mark.parametrize("value", ["x", ["x"], [{"x": 1}], {"x": 1}, None])
def test_no_layout_is_without_the_words_that_files_are_searched_for(value: Any) -> None:
    written = (
        "conversations messages completion chosen task text texts text_list txt TEXT caption captions caption_str "
    )
    written += "question questions query regions qas objects videoid annotations sentences"
    words = set(written.split())
    assert all(joined.WORDS.fullmatch(f'"{word}"'.encode()) for word in words)

    def fitting(missing: set[str]) -> list[Any]:
        record = Everything(value, missing)
        known = [layout for layout in layouts.LAYOUTS.values() if layout.fits(record)]
        return known + [name for name, one in tables.TABLES.items() if one.fits(Everything(record, missing))]

    assert fitting(words) == [] and fitting(set())


def test_shards_with_an_index_beside_them_are_read(tmp_path: Path) -> None:
    """As img2dataset and `wids` leave them."""
    folder = filled(tmp_path / "data", {"00000_stats.json": NOTES, "index.json": f"[{SAID}]", "00000.parquet": "x"})
    tar(folder / "00000.tar", [("1.png", png()), ("1.txt", b"a fox")])
    assert [one.turns[1].text for one in formats.load(folder)] == ["a fox"]


def test_columns_are_renamed_under_flickr_s_own_heading_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    path = tmp_path / "flickr.csv"
    path.write_text("image_name| comment_number| comment\na.png| 0| Two dogs.\n")
    assert [(one.turns[1].text, one.media[0].source) for one in one_by_one(path)] == [("Two dogs.", tmp_path / "a.png")]
    path.write_text("image,caption,comment\na.png,a dog,checked twice\n")
    assert [one.turns[1].text for one in one_by_one(path)] == ["a dog"]
    path.write_text("image,image_name,caption\na.png,b.png,a dog\n")
    assert [one.media[0].source for one in one_by_one(path)] == [tmp_path / "a.png"]
    path.write_text("image_name,comment,caption\na.png,two dogs,a dog\n")
    assert "the key 'caption' is there twice" in formats.check(path)[0].message


def test_meta_of_a_user_s_own_may_say_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG cut")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"image": "a.png", "conversations": said("<image>"), "meta": {"file": "x.pdf"}}))
    (record,) = formats.each(Form(path))
    assert isinstance(record, formats.Record) and record.file == str(path) and record.sample.meta["file"] == "x.pdf"
    fault = records.damaged(record)
    assert fault is not None and fault.file == str(path)


@pytest.mark.parametrize(("name", "remedy"), [("a.json.gz", "unpack"), ("a.p", "pickle"), ("captions.txt", ".csv")])
def test_files_of_other_endings_are_refused_before_they_are_read(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\n\n")
    for read in (formats.check, lambda path: open_set(Source(name=str(path)), 0)):
        with pytest.raises(DataError, match="does not end in") as caught:
            read(tmp_path / name)
        assert remedy in caught.value.remedy


def test_shards_of_lines_and_joined_tables_are_read_one_by_one(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        lines = [json.dumps({"id": f"{shard}/{n}", "conversations": said("x", f"{shard} {n}")}) for n in range(4)]
        (shards / f"{shard}.jsonl").write_text("\n".join(lines))
    assert [sample.turns[1].text for sample in one_by_one(shards)] == [f"{s} {n}" for s in range(3) for n in range(4)]
    (tmp_path / "a.png").write_bytes(png())
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"a.png,number {n}\n" for n in range(9)))
    assert [sample.turns[1].text for sample in one_by_one(table)] == [f"number {n}" for n in range(9)]
    before = stamp([Source(name=str(table))], 0)
    table.write_text("image,caption\na.png,new\n")
    assert len(one_by_one(table)) == 1 and stamp([Source(name=str(table))], 0) != before


def test_half_of_a_surrogate_pair_in_a_table_is_kept_or_a_fault_by_its_id(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(png())
    book = {"imageURL": "a.jpg", "split": 1, "title": "half \ud83d, whole \U0001f98a", "questions": ["What?"]}
    books = tmp_path / "books.json"
    books.write_text(json.dumps({"a": book | {"answers": ["A fox."]}}))
    assert [one.meta["title"] for one in one_by_one(books)] == [book["title"]]
    notes = [{"id": n, "image_id": 1, "caption": said} for n, said in enumerate(["a fox", "half \ud83d", "a dog"])]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": notes}))
    with pytest.raises(DataError, match=r"\(1\): a text or id holds half a surrogate pair"):
        Records(Form(captions))
    for found in (Records(Form(captions, options=SKIP)), Records(Form(captions, options=SKIP))):
        assert found.skipped == 1 and [found[n].turns[1].text for n in range(2)] == ["a fox", "a dog"]
    captions.write_text(captions.read_text().replace('"id": 2', r'"id": "\ud83d"'))
    assert [fault.message[:17] for fault in formats.check(captions)] == ["a text or id hold"] * 2
    captions.write_text(captions.read_text().replace('"image_id": 1', r'"image_id": "\udc00"'))
    found = formats.check(captions)
    assert [fault.id for fault in found] == ["0", "1", r"\ud83d"] and r"the id \udc00" in found[0].message
    assert all(str(fault).encode() for fault in found)  # as `isthmus data check` prints them


def test_one_record_may_hold_several_samples(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "data.jsonl"
    rows = [{"id": n, "image": "a.png", "captions": [f"{n} a", f"{n} b"]} for n in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples = one_by_one(path)
    assert [sample.turns[1].text for sample in samples] == [f"{n} {which}" for n in range(5) for which in "ab"]
    assert samples[3].id == "1/1" and isinstance(samples[3].media[0], Image)


def test_a_faulty_sample_among_several_is_skipped_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": ["a cat", 5, "a dog"]}))
    for found in (Records(Form(path, options=SKIP)), Records(Form(path, options=SKIP))):
        assert found.skipped == 1 and len(found) == 2
        assert [found[number].turns[1].text for number in range(2)] == ["a cat", "a dog"]
    path.write_text(path.read_text().replace('"a dog"', "666666"))
    with pytest.raises(DataError, match="line 1 is not what it was"):
        found[1]


def test_pictures_and_their_texts_are_noticed_below_a_folder_and_beside_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "1.png").write_bytes(png())
    (folder / "notes.csv").write_text("of no use\n")
    source = Source(name=str(folder), split="test")
    stamps = [stamp([source], 0)]
    assert len(one_by_one(folder)) == 1
    (folder / "train" / "cat" / "2.png").write_bytes(png(1))
    stamps.append(stamp([source], 0))
    assert colours(one_by_one(folder)) == [0, 1]
    (folder / "train" / "cat" / "2.txt").write_text("a tabby")
    stamps.append(stamp([source], 0))
    assert [sample.turns[1].text for sample in one_by_one(folder)] == ["cat", "a tabby"]
    (folder / "notes.csv").write_text("of no more use\n")
    (folder / "train" / "cat" / "3.png").symlink_to("nowhere.png")
    assert len(set(stamps)) == 3 and stamp([source], 0) == stamps[-1]


def test_linked_folders_of_classes_are_read_and_links_back_are_not(tmp_path: Path) -> None:
    folder, pool = tmp_path / "pictures", tmp_path / "pool"
    (folder / "cat").mkdir(parents=True)
    (pool / "more").mkdir(parents=True)
    (folder / "cat" / "0.png").write_bytes(png())
    (pool / "1.png").write_bytes(png(1))
    for link in ("dog", "hound"):
        (folder / link).symlink_to(pool)
    for back, to in ((folder / "cat" / "up", tmp_path), (pool / "more" / "again", pool), (folder / "self", folder)):
        back.symlink_to(to)
    assert [sample.turns[1].text for sample in one_by_one(folder)] == ["cat", "dog", "hound"]
    assert [file.relative_to(folder).as_posix() for file in files(folder, "test")] == [
        "cat/0.png",
        "dog/1.png",
        "hound/1.png",
    ]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_a_table_without_a_line_is_refused_like_any_other(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="holds no conversation"):
        Records(Form(tmp_path / name))


def test_a_mark_in_a_name_is_flickr_s_only_with_a_number_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\na#1.png,hello\n")
    (tmp_path / "b.csv").write_text("#,image,caption\n1,b.png,hello\n")
    (tmp_path / "c.token").write_text("c.jpg#0\tone\nc.jpg#1\ttwo\n")
    found = {
        name: [record for _, record in containers.opened(tmp_path / name).scan()]
        for name in ("a.csv", "b.csv", "c.token")
    }
    images = {name: [record["image"] for record in records] for name, records in found.items()}
    assert images == {"a.csv": ["a#1.png"], "b.csv": ["b.png"], "c.token": ["c.jpg", "c.jpg"]}


def test_a_picture_s_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    strange = os.fsencode(tmp_path / "cat") + b"/caf\xe9.png"
    (tmp_path / "cat" / "plain.png").write_bytes(png())
    Path(os.fsdecode(strange)).write_bytes(png())
    found = [record for _, record in containers.opened(tmp_path).scan()]
    assert sum(isinstance(record, Wrong) and "not UTF-8" in str(record) for record in found) == 1 and len(found) == 2


# ---------------------------------------------------------------------------------------------- size


def many(path: Path, count: int) -> Path:
    with path.open("w") as stream:
        for number in range(count):
            stream.write(json.dumps({"id": number, "conversations": said(f"What is {number}?", str(number))}) + "\n")
    return path


def use(path: Path, count: int) -> int:
    """Peak bytes of Python while a file is opened, and read here and there."""
    tracemalloc.start()
    found = Records(Form(path))
    for number in range(0, count, count // 100):
        assert found[number].turns[1].text == str(number)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    small, large = (use(many(tmp_path / f"{count}.jsonl", count), count) for count in (1_000, 10_000))
    assert large - small < 10_000 * 8  # less than one number for each, though all of them were just read through


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_rows(tmp_path: Path) -> None:
    path = many(tmp_path / "million.jsonl", 1_000_000)
    Records(Form(path))
    assert use(path, 1_000_000) < 2 << 20  # from the index, which stays on the disk


# ---------------------------------------------------------------------------------------------- workers


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["tars", "parquet", "lines"])
def test_workers_decode_any_order_and_come_to_an_end(tmp_path: Path, kind: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):  # of different sizes, one of them smaller than the number of workers
        numbers = range(shard * 10, shard * 10 + (1, 7, 9)[shard])
        if kind == "tars":
            tar(shards / f"{shard}.tar", [file for n in numbers for file in ((f"{n}.png", png(n)), (f"{n}.txt", b"x"))])
        elif kind == "parquet":
            datasets = pytest.importorskip("datasets")
            rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "caption": ["x" for _ in numbers]}
            datasets.Dataset.from_dict(rows).to_parquet(shards / f"{shard}.parquet")
        else:
            for n in numbers:
                (shards / f"{n}.png").write_bytes(png(n))
            lines = [json.dumps({"image": f"{n}.png", "conversations": said("<image>x")}) for n in numbers]
            (shards / f"{shard}.jsonl").write_text("\n".join(lines))
    found = open_set(Source(name=str(shards), split="test"), 0)
    mix = Mix([found], [1.0], seed=3)
    order = [mix[draw][1] for draw in range(40)]
    loader = DataLoader(_Order(found, order), batch_size=4, num_workers=2, collate_fn=colours)
    assert [colour for batch in loader for colour in batch] == [colours([found[number]])[0] for number in order]
    assert sorted(colours(list(found))) == [0, *range(10, 17), *range(20, 29)]


class _Order:
    """A set in a given order."""

    def __init__(self, found: Any, order: list[int]) -> None:
        self.found, self.order = found, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, draw: int) -> Sample:
        return self.found[self.order[draw]]
