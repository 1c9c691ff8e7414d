"""The figure about serving runs end to end at a tiny size, and tells no speed where answers differ."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "benchmarks"
SMALL = ["--tiny", "--repeats", "1", "--clients", "2", "--steps", "1", "--tokens", "4"]


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("serving")


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_both_servers_are_measured_on_the_same_answers(serving, tmp_path, capsys):
    file = tmp_path / "s.json"
    assert serving.main([*SMALL, "--peer", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["agreeing"] == {"isthmus": 1, "transformers": 1} and set(found["runs"]) == {"isthmus", "transformers"}
    for (run,) in found["runs"].values():
        assert [case["repeated"] for case in run["cases"]] == [False, True]
        assert all(case["requests_per_second"] > 0 < case["first_token"] <= case["whole"] for case in run["cases"])
        assert len(set(run["answers"])) > 1 and run["flipped"] == 0
    assert "| isthmus" in capsys.readouterr().out


def test_no_speed_is_told_where_answers_differ(serving, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "build", lambda folder, _: dict.fromkeys(("isthmus", "transformers"), folder))

    def measure(kind, model, options):
        return {"answers": [kind] * serving.CHECKED, "cases": [], "flipped": 0.0}

    monkeypatch.setattr(serving, "measure", measure)
    assert serving.main([*SMALL, "--peer", "--json", str(tmp_path / "s.json")]) == 1
    told = capsys.readouterr().out
    assert "transformers: 0% of 6 answers are ours; refused" in told and "| transformers" not in told
