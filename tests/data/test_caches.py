"""What data leave behind is listed by age and removed by age or size; nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.app import app
from isthmus.data import caches
from isthmus.data.formats import Form
from isthmus.data.records import Records


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index, a copy with its index, a table and features, of 100 bytes a file, a day apart; and a model."""
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path))
    monkeypatch.setattr("time.time", lambda: 100 * caches.DAY)
    names = ["indexes/a.index", "indexes/b.index", "indexes/b.jsonl", "tables/t/x/y.arrow", "features/e/rows.bin"]
    for day, name in enumerate([*names, "models/llm/weights.safetensors"]):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (0, (90 + day) * caches.DAY))
    return tmp_path


def left(home: Path) -> set[str]:
    return {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()}


def test_oldest_first_and_what_belongs_together_together() -> None:
    found = caches.caches()
    assert [one.name for one in found] == ["indexes/a", "indexes/b", "tables/t/x", "features/e"]
    assert [one.size for one in found] == [100, 200, 100, 100]
    assert found[1].used == 92 * caches.DAY


@pytest.mark.parametrize(
    ("days", "keep", "going"),
    [
        (None, None, 0),
        (9, None, 1),
        (7.5, None, 2),
        (0, None, 4),
        (None, 500, 0),
        (None, 499, 1),
        (None, 150, 3),
        (9, 100, 3),
    ],
)
def test_age_and_size_choose(days: float | None, keep: int | None, going: int) -> None:
    found = caches.caches()
    assert caches.idle(found, days, keep) == found[:going]


def test_clean_removes_what_it_says_and_leaves_models(home: Path) -> None:
    before = left(home)
    assert CliRunner().invoke(app, ["data", "clean"]).exit_code == 0 and left(home) == before
    told = json.loads(CliRunner().invoke(app, ["data", "clean", "--days", "7.5", "--json"]).stdout)
    assert [row["removed"] for row in told] == [True, True, False, False]
    assert left(home) == {"tables/t/x/y.arrow", "features/e/rows.bin", "models/llm/weights.safetensors"}
    assert "removed" in CliRunner().invoke(app, ["data", "clean", "--keep", "0"]).stdout
    assert left(home) == {"models/llm/weights.safetensors"}


def test_an_index_that_is_used_is_young(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}))
    Records(Form(file))
    (index,) = set((home / "indexes").glob("*.index")) - {home / "indexes/a.index", home / "indexes/b.index"}
    os.utime(index, (0, 0))
    Records(Form(file))
    assert index.stat().st_mtime > 0
