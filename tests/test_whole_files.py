"""Files that take their place whole: what a reader finds meanwhile, after a failure, and after a power cut."""

from __future__ import annotations

import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.files import replacing, sha256, sweep, write_text


def test_a_reader_finds_the_earlier_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text("earlier")
    with replacing(file) as part, part.open("w") as stream:
        stream.write("half of it")
        stream.flush()
        assert file.read_text() == "earlier"
    assert file.read_text() == "half of it" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_block_that_fails_or_writes_nothing_leaves_all_as_it_was(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "one").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / ("new" if folder else "one")) as part:
        inside = part / "inside" if folder else part
        inside.parent.mkdir(exist_ok=True)
        inside.write_text("half of it")
        raise KeyboardInterrupt
    for durable in (False, True):
        with replacing(tmp_path / "one", durable):
            pass
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("one", "earlier")]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "new") as part:
        part.mkdir()
        (part / "inside").write_text("text")
        assert not (tmp_path / "new").exists()
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")] == ["new", "new/inside"]


def test_many_may_write_the_same_file(tmp_path: Path) -> None:
    texts = [str(number) * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "one", text), texts * 8))
    assert (tmp_path / "one").read_text() in texts and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / "one.part").write_text("mine")
    for name in ("file", "folder"):
        child = os.fork()
        if not child:
            with replacing(tmp_path / name) as part:
                (part if name == "file" else part / "inside").parent.mkdir(exist_ok=True)
                (part if name == "file" else part / "inside").write_text("half of it")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 4
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".hidden", "one.part"]


def test_text_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its name afterwards, so that whoever has written a text finds it after a power cut."""
    file, seen = tmp_path / "one", []
    file.write_text("earlier")

    def fsync(descriptor: int) -> None:
        names = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append(("names" if names else os.pread(descriptor, 10, 0), file.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(file, "größer")
    assert seen == [("größer".encode(), "earlier"), ("names", "größer")]
    assert file.read_text(encoding="utf-8") == "größer"
    with replacing(file) as part:  # what can be made again waits for nothing
        part.write_text("cache")
    assert len(seen) == 2 and file.read_text() == "cache"


def test_the_hash_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's example
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
