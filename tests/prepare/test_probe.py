"""Pools are equal and complete, and probing finds planted noise: wrong captions make the worst pool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.data import formats
from isthmus.prepare import probe
from isthmus.training.toy import COLOURS, toy
from isthmus.training.trial import Trial
from isthmus.types import DataError


def test_thirds_are_equal_and_miss_nothing() -> None:
    values = np.array([5.0, 1.0, np.nan, 3.0, 2.0, 4.0, 0.0, 6.0])
    parts = probe.thirds(values)
    assert [parts[name].tolist() for name in ("low", "middle", "high")] == [[6, 1, 4], [3, 5], [0, 7]]
    assert probe.thirds(np.zeros(9)) == {} and probe.thirds(np.full(9, np.nan)) == {}
    dice = np.random.default_rng(0)
    made = probe.pools({"a": dice.random(100), "b": dice.random(100), "flat": np.ones(100)})
    assert {len(pool.numbers) for pool in made} == {33} and len(made) == 7
    again = probe.pools({"a": dice.random(100)}, size=20)
    assert {len(pool.numbers) for pool in again} == {20}
    with pytest.raises(DataError, match="tell nothing"):
        probe.pools({"a": dice.random(9)})


def test_ranking_and_the_next_round_against_a_known_truth() -> None:
    dice = np.random.default_rng(1)
    stats = {name: dice.random(300) for name in ("clean", "rich", "idle")}

    def trial(numbers: np.ndarray, seed: int) -> float:
        return 2 - stats["clean"][numbers].mean() - 0.5 * stats["rich"][numbers].mean() + 0.001 * seed

    first = probe.pools(stats)
    report = probe.rank(first, trial, (0, 1, 2), lambda told: None)
    assert report.outcomes[0].part == "clean high" and report.outcomes[-1].part == "clean low"
    assert report.compared == 9 and report.outcomes[0].deviation == pytest.approx(0.001)
    chance = next(one for one in report.outcomes if one.part == probe.RANDOM)
    assert chance.change == 0 and report.outcomes[0].change < 0 < report.outcomes[-1].change
    second = probe.combined(report, stats, most=2)
    assert [pool.part for pool in second] == ["clean high & rich high"]
    everything = probe.equal([*second, *(pool for pool in first if pool.part in ("clean high", probe.RANDOM))])
    assert probe.rank(everything, trial, (0,), lambda told: None).outcomes[0].part == "clean high & rich high"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wrong_captions_make_the_worst_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    recipe = toy(tmp_path, rows=72)
    file = Path(recipe.stages[-1].data[0].name)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = list(COLOURS)
    wrong = np.zeros(len(rows), bool)
    wrong[np.random.default_rng(5).permutation(len(rows))[: len(rows) // 3]] = True
    clean = [formats.load(file)[number] for number in range(8)]
    for number, row in enumerate(rows):
        if wrong[number]:
            right = names.index(row["conversations"][1]["value"])
            row["conversations"][1]["value"] = names[(right + 1 + number // 4 % 3) % len(names)]
    file.write_text("\n".join(map(json.dumps, rows)))
    samples = formats.load(file)
    told = np.random.default_rng(1).random(len(rows))
    stats = {"agreement": told - wrong, "chance": np.random.default_rng(2).random(len(rows))}
    stage = recipe.stages[-1].but(train={"connectors.*": 1e-2, "llm.*": 3e-3}, batching="shuffled", batch_size=8)
    trial = Trial(recipe.but(stages=(stage,)), samples.__getitem__, clean, 40, torch.device("cpu"))
    wanted = [pool for pool in probe.pools(stats) if pool.part in ("agreement low", "agreement high", "random")]
    report = probe.rank(wanted, trial, (0, 1), lambda told: None)
    assert report.outcomes[-1].part == "agreement low" and report.outcomes[-1].change > 0.2
    assert report.outcomes[0].part == "agreement high" and report.outcomes[0].change < 0
