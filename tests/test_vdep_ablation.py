"""The ablation's figures: differences are formed seed by seed, and only what its interval tells apart is called so."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
IMAGE = {"next": 1.0, "next, copied": 0.5, "own": 0.9, "spread": 0.1, "rank": 4.0}


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("vdep_ablation")


def leave(folder: Path, setting: str, captions: list[float], presence: list[float]) -> None:
    for seed, (nll, right) in enumerate(zip(captions, presence)):
        at = folder / f"seed-{seed}" / setting
        at.mkdir(parents=True)
        figures = {"tasks": {"Captions, NLL": nll, "Presence": right}, "image": IMAGE}
        (at / "figures.json").write_text(json.dumps(figures))


def test_differences_are_paired_and_judged_by_their_interval(ablation: Any, tmp_path: Path, monkeypatch: Any) -> None:
    leave(tmp_path, "llava", [1.0, 2.0, 3.0], [0.5, 0.6, 0.7])
    leave(tmp_path, "vdep", [0.9, 1.9, 2.9], [0.6, 0.5, 0.7])  # the seeds differ by ten times the effect
    leave(tmp_path, "shift-0", [1.0, 2.0], [0.5, 0.5])  # not all seeds are finished
    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    told = ["--collect", "--write", "--out", str(tmp_path), "--json", str(tmp_path / "a.json"), "--settings"]
    assert ablation.main([*told, "LLaVA", "VDEP", "shift 0"]) == 1
    result = json.loads((tmp_path / "a.json").read_text())
    assert [case["setting"] for case in result["cases"]] == ["LLaVA", "VDEP"]
    difference = result["cases"][1]["differences"]
    assert difference["Captions, NLL"]["value"] == pytest.approx(-0.1)
    assert difference["Captions, NLL"]["half_width"] == pytest.approx(0, abs=1e-9)
    assert difference["Presence"]["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    page = (tmp_path / "page.md").read_text()
    assert "- VDEP: better on Captions, NLL." in page
    assert "**-0.100 ± 0.000**" in page and "0.000 ± 0.248" in page and "**0.000" not in page
    assert result["cases"][0]["means"]["Captions, NLL"]["seeds"] == [1.0, 2.0, 3.0]


def test_settings_differ_from_the_recipe_in_what_they_say(ablation: Any) -> None:
    options = ablation.argparse.Namespace(pool=7, warm=1, align=1, steps=5)
    shared = {setting: ablation.stages(0, setting, options) for setting in ablation.SETTINGS}
    assert len({first.fingerprint() for first, _ in shared.values()}) == 1
    assert len({last.fingerprint() for _, last in shared.values()}) == len(ablation.SETTINGS)
    assert [term.name for term in shared["LLaVA"][1].stages[0].objectives] == ["lm"]
    assert all(last.stages[0].budget.steps == 5 for _, last in shared.values())
