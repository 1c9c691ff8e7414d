"""The house table's script: two tiny joints, then a third one, and a page that says what it is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from comparing_runs import recipes

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("house_table")


@pytest.mark.slow
def test_the_table_grows_and_repeats_nothing(script, embedded, tmp_path) -> None:
    one, two = recipes(tmp_path)
    files = [tmp_path / f"{recipe.name}.yaml" for recipe in (one, two, two.but(name="three"))]
    for recipe, file in zip((one, two, two.but(name="three")), files):
        recipe.save(file)
    page, numbers = tmp_path / "results" / "joints.md", tmp_path / "joints.json"
    words = ["--tiny", "--budget", "2-steps", "--seeds", "1", "--items", "6", "--out", str(tmp_path / "out")]
    words += ["--page", str(page), "--json", str(numbers)]
    assert script.main([*map(str, files[:2]), *words]) == 0
    first = (tmp_path / "out/one/seed0/report.json").stat().st_mtime_ns
    assert page.read_text().startswith("# The house table: 2 joints")
    assert script.main([*map(str, files), *words, "--minutes", "0.0001"]) == 0
    assert page.read_text().startswith("# The house table: 2 joints")  # no time for the third
    assert script.main([*map(str, files), *words]) == 0
    assert (tmp_path / "out/one/seed0/report.json").stat().st_mtime_ns == first
    told = page.read_text()
    assert told.startswith("# The house table: 3 joints") and "| `three` |" in told and "](joints.html)" in told
    assert json.loads(numbers.read_text())["names"] == ["one", "two", "three"]
    assert (tmp_path / "results/joints.html").read_text().startswith("<!doctype html>")


def test_every_joint_of_the_table_can_take_part(script) -> None:
    from isthmus import recipes as book
    from isthmus.comparing.compare import check_budgets, common_of, planned

    options = script.options_of([])
    told = script.settings(options)
    joints = [book.named(name) for name in script.JOINTS]
    common = common_of(joints, None, told["tasks"], None, told["data"], told["overrides"])
    plan = planned(joints, common, "9k-samples", range(3), None, (1.0,), 0.25)
    check_budgets(plan)
    assert plan.baseline == script.JOINTS[0] and len(plan.recipes) == len(set(script.JOINTS)) >= 12
    for name in plan.recipes:
        recipe = plan.recipe(name)
        assert recipe.dtype == "bfloat16" and {task.limit for task in recipe.eval} == {200}
        asked = [stage.data for stage in recipe.stages if "lm" in {term.name for term in stage.objectives}]
        assert asked and all(list(data) == told["data"] for data in asked), name
