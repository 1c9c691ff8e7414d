"""The script of the safety figures runs end to end, and what it counts as a failure can happen."""

from __future__ import annotations

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import media
from isthmus.types import DataError

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("fuzz_inputs")


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("hostile_pictures")


def test_damage_and_claims_end_in_a_picture_or_an_error_in_our_words(fuzz: Any) -> None:
    outcomes = [fuzz.look(data) for _, data in [*fuzz.mutated(300), *list(fuzz.headers())[::10]]]
    assert outcomes.count("read") > 20 and outcomes.count("refused") > 100
    assert [fuzz.look(data) for data in fuzz.seeds()] == ["read"] * len(fuzz.seeds())


def test_thirty_tars_leave_nothing_behind(fuzz: Any) -> None:
    outcomes = {name: fuzz.unpack(data) for name, data in fuzz.tars()}
    assert len(outcomes) == 30 and set(outcomes.values()) == {"refused"}


def test_bombs_are_not_unpacked(hostile: Any) -> None:
    texts = hostile.png(8, 8, more=hostile.chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1 << 20))) * 400)
    for data in (texts, hostile.png(50_000, 50_000), hostile.tiff(0xFFFF, 0xFFFF), hostile.webp(1 << 14, 1 << 14)):
        with pytest.raises(DataError):
            media.open_image(data)
    few = hostile.saved(Pillow.new("RGB", (3, 3)), "PNG")
    few = few[:33] + hostile.chunk(b"zTXt", b"C\0\0" + zlib.compress(b"fine")) * media.MOST_TEXTS + few[33:]
    assert media.open_image(few).size == (3, 3)


def test_damaged_videos_and_false_heads_end_in_frames_or_an_error_in_our_words(fuzz: Any) -> None:
    pytest.importorskip("av")
    assert [fuzz.watch(data) for data in fuzz.films()] == ["read"] * 5
    outcomes = [fuzz.watch(data) for _, data in fuzz.videos(60)]
    assert outcomes.count("read") > 5 and outcomes.count("refused") > 20
    claimed = {name: fuzz.watch(data) for name, data in fuzz.claims()}
    assert set(claimed.values()) == {"read", "refused"}  # some heads are told by what follows them, and harmless
    assert claimed["10 hours"] == claimed["a first frame of 16 383 a side"] == "refused"


def test_an_escape_or_another_error_breaks_the_promise(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"outcomes": {"refused": 3}, "slowest": [0.01, "x"], "more MiB": 1}
    assert fuzz.passed("tars", good)
    for wrong in ({"outcomes": {"escaped": 1}}, {"slowest": [9.0, "x"]}, {"more MiB": 4000}):
        assert not fuzz.passed("tars", {**good, **wrong})
    rehearsed = iter([True])
    monkeypatch.setattr(fuzz, "look", lambda data: next(rehearsed, False) or 1 / 0)
    found = fuzz.work("mutated", 3, Path())
    assert found["outcomes"]["other error"] and "ZeroDivisionError" in found["other errors"][0]


def test_the_committed_figures_are_of_all_items() -> None:
    kinds = json.loads((SCRIPTS / "results" / "fuzz_inputs.json").read_text())["kinds"]
    assert {kind: found["items"] for kind, found in kinds.items()} == {
        "mutated": 20_000,
        "headers": 300,
        "bombs": 19,
        "tars": 30,
        "videos": 2_000,
        "claims": 11,
    }
    assert all(found["passed"] and not found["other errors"] for found in kinds.values())
