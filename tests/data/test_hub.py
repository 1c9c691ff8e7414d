"""Data sets by the names that a hub gives them, from a cache as huggingface_hub lays it out; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from isthmus.cli.app import app
from isthmus.config import Source
from isthmus.data import hub, sets
from isthmus.types import ConfigError, DataError

RECORD = '{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one data set, at one revision, whose files are links as they are there."""
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "hub" / "datasets--some--asked-v1.5"
    snapshot = here / "snapshots" / "0123abc" / "data"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("0123abc")
    (here / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for split, lines in (("train", 3), ("test", 2)):
        (here / "blobs" / split).write_text(RECORD * lines)
        (snapshot / f"{split}.jsonl").symlink_to(here / "blobs" / split)
    return here


def test_a_name_is_what_the_cache_holds_of_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refused)
    source = Source(name="some/asked-v1.5/data", split="test", options={"rows": "test"})
    assert len(sets.open_set(source, 0)) == 2 and sets.here(source)
    done = CliRunner().invoke(app, ["data", "check", "some/asked-v1.5/data/train.jsonl"])
    assert done.exit_code == 0 and "no fault" in done.output
    assert hub.located("some/other") == Path("some/other")
    with pytest.raises(ConfigError, match="no data set is named 'some/other'") as error:
        sets.open_set(Source(name="some/other"), 0)
    assert "hf download --repo-type dataset" in error.value.remedy


def test_verbs_read_a_name_and_say_how_to_fetch_what_is_not_there(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(RECORD.replace("This.", "One two three four five six seven.") + RECORD)
    (cache / "blobs" / "test").write_text(RECORD.replace("This.", "One two three four five six seven."))
    held = ["--against", "some/asked-v1.5/data/test.jsonl", "-k", "same-text=..0"]
    done = CliRunner().invoke(app, ["data", "filter", "own.jsonl", "kept.jsonl", *held])
    assert done.exit_code == 0 and "1 of 2 samples" in done.output
    for words in (["check", "some/other"], ["filter", "own.jsonl", "more.jsonl", *held[2:], "--against", "some/other"]):
        error = CliRunner().invoke(app, ["data", *words]).exception
        assert isinstance(error, DataError) and error.remedy.endswith("hf download --repo-type dataset some/other")


def test_what_lies_on_the_disk_goes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "some" / "asked-v1.5").mkdir(parents=True)
    assert hub.located("some/asked-v1.5") == Path("some/asked-v1.5")
