"""`isthmus doctor` on machines that have nothing yet."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from isthmus.cli import house


def test_a_fresh_machine_has_no_folder_to_ask_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (asked.append(Path(folder)), usage(folder))[1])
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "cache" / "isthmus" / "home"))
    state, remark = house.examine()["disk"]
    assert asked == [tmp_path] and state in ("ok", "note")
    assert "GB free at" in remark and "cache/isthmus/home" in remark
