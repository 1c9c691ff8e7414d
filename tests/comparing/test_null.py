"""A joint compared with itself under other names is called better or worse in at most 5 % of all comparisons.

The simulation and the code that it goes through are those of benchmarks/compare_null.py.
"""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def null(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare_null")


@pytest.mark.parametrize("luck", [0.02, 0.5], ids=["little luck", "much luck"])
def test_false_alarms_are_rare(null: ModuleType, luck: float) -> None:
    """A hundred comparisons of two names over two tasks; 11 would come up once in a hundred at a true 5 %."""
    found = null.simulate(names=2, seeds=3, tasks=2, clusters=30, luck=luck, gain=0.0, repeats=100, draws=400)
    assert found["any word"] <= 0.10


def test_a_difference_of_known_size_is_found(null: ModuleType) -> None:
    """1.2 logits, some 25 points, with little luck and five seeds: nearly always."""
    found = null.simulate(names=2, seeds=5, tasks=2, clusters=30, luck=0.02, gain=1.2, repeats=20, draws=400)
    assert found["last better"] >= 0.9


def test_the_simulation_can_raise_alarms(null: ModuleType) -> None:
    """Items as the unit, which is the usual mistake, would be alarmed by luck: then the test above would fail."""
    import numpy as np

    from isthmus.evaluation import seeds
    from isthmus.evaluation.seeds import Outcomes

    asked = [null.task("t", 60, 2)]
    wrong = 0
    for number in range(40):
        answers = null.draw(np.random.default_rng(number), asked, ["a", "b"], 3, 0.5)
        a, b = ([Outcomes.of(run["after"], "accuracy") for run in answers[name]["t"]] for name in ("a", "b"))
        alone = seeds.gap([a[:1]], [b[:1]], draws=400)
        wrong += alone.p_items < 0.05
    assert wrong / 40 > 0.25


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runs", [12, pytest.param(36, marks=pytest.mark.slow)])
def test_false_alarms_are_rare_among_real_trainings(null: ModuleType, runs: int) -> None:
    """One recipe under two names, a hundred times, where seeds vary little and much, and others would be alarmed."""
    found = null.real(runs=runs, seeds=(3, 5), steps=null.STEPS, repeats=100, draws=400)
    levels = {luck: pool["right answers"] for luck, pool in found["pools"].items()}
    spread = {luck: statistics.stdev(each) for luck, each in levels.items()}
    assert spread["large"] > 0.06
    assert 0.005 < spread["small"] < spread["large"] / 2
    assert all(statistics.mean(levels[luck]) > pool["one answer"] + 0.05 for luck, pool in found["pools"].items())
    assert len(found["null"]) == 4
    for case in found["null"]:
        assert case["any word"] <= 0.10
        assert case["differ"] >= 0.7
        assert case["luck"] == "small" or case["by items"] > 0.25
    assert found["longer"][-1]["better"] >= 0.8


def test_the_script_runs(null: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "null.json"
    assert null.main(["--tiny", "--real", "4", "--steps", "1", "--json", str(file)]) in (0, 1)
    assert {"pools", "null", "longer"} == json.loads(file.read_text())["real"].keys()
