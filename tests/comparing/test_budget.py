"""What a budget is and how stages share it; operations against those that a run's own log counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isthmus import recipes
from isthmus.comparing import budget
from isthmus.comparing.budget import Amount, apply, dealt, parse, shares
from isthmus.config import Budget, Recipe
from isthmus.recipes.llava import llava
from isthmus.training.log import read_rows
from isthmus.training.run import Run
from isthmus.training.toy import toy
from isthmus.types import ConfigError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("10m", Amount(10, "minutes")),
        ("1.5h", Amount(90, "minutes")),
        ("2e15flops", Amount(2e15, "flops")),
        ("3P-flops", Amount(3e15, "flops")),
        ("50k-samples", Amount(50_000, "samples")),
        ("300-steps", Amount(300, "steps")),
    ],
)
def test_budgets_are_read_as_people_write_them(text: str, amount: Amount) -> None:
    assert parse(text) == amount


def test_operations_are_told_by_their_prefix() -> None:
    assert [str(parse(text)) for text in ("8e12flops", "1.5P-flops", "300flops")] == [
        "8 TFLOP",
        "1.5 PFLOP",
        "300 FLOP",
    ]


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "0m", "5-epochs", "10M", "-3m"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no budget is written"):
        parse(text)


def test_stages_keep_their_shares() -> None:
    recipe = llava()
    parts = shares(recipe)
    assert sum(parts) == pytest.approx(1)
    assert parts == pytest.approx([0.12, 0.06, 0.82])
    minutes = [stage.budget.minutes for stage in apply(recipe, parse("10m")).stages]
    assert minutes == pytest.approx([1.2, 0.6, 8.2])
    samples = [stage.budget.samples for stage in apply(recipe, parse("50k-samples")).stages]
    assert samples == [6000, 3000, 41_000]
    steps = [stage.budget.steps for stage in apply(recipe, parse("300-steps")).stages]
    assert steps == [36, 18, 246]


def test_every_stage_gets_something_and_all_is_dealt() -> None:
    assert dealt(10, [0.02, 0.08, 0.9]) == [1, 1, 8]
    assert dealt(2, [0.02, 0.08, 0.9]) == [1, 1, 1]
    for whole in range(3, 40):
        assert sum(dealt(whole, [0.333, 0.333, 0.334])) == whole


def test_counts_are_compared_in_samples(tmp_path: Path) -> None:
    """Eight steps of four samples, and one epoch over forty: 32 to 40."""
    recipe = toy(tmp_path)
    first, second = recipe.stages
    mixed = recipe.but(stages=(first, second.but(budget=Budget(epochs=1))))
    whole = shares(mixed)
    assert whole[0] / whole[1] == pytest.approx(32 / 40, rel=0.2)  # a share of the data is held out


def test_minutes_beside_counts_have_no_shares(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    first, second = recipe.stages
    with pytest.raises(ConfigError, match="some stages last minutes"):
        shares(recipe.but(stages=(first, second.but(budget=Budget(minutes=1)))))
    with pytest.raises(ConfigError, match="has no stage"):
        shares(recipe.but(stages=()))


def test_every_recipe_on_embedded_parts_can_share_a_budget() -> None:
    embedded = [build() for build in recipes.BOOK.values() if build().llm.architecture is None]
    assert len(embedded) > 20
    for recipe in embedded:
        assert sum(shares(recipe)) == pytest.approx(1), recipe.name


def logged(recipe: Recipe, folder: Path) -> list[float]:
    """Operations per step that a real run wrote down for its first steps, by stage."""
    run = Run(recipe, folder, torch.device("cpu"), Console(quiet=True))
    model = run.newborn()
    run.train(model, run.look(model))
    found = []
    for stage in recipe.stages:
        ceiling = json.loads((folder / stage.name / "machine.json").read_text())["operations_per_second"]
        rows = [row for row in read_rows(folder / stage.name / "metrics.jsonl") if "loss" in row][: budget.COUNTED]
        found.append(sum(row["mfu"] * row["seconds"] for row in rows) * ceiling / len(rows))
    return found


def test_operations_are_those_that_a_run_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    recipe = apply(toy(tmp_path / "toy").but(dtype="float32"), parse(f"{3 * budget.COUNTED}-steps"))
    assert budget.operations(recipe) == pytest.approx(logged(recipe, tmp_path / "run"), rel=1e-6)


def test_operations_become_steps(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    first, second = apply(recipe, parse("1e12flops"), per_step=[1e9, 4e9]).stages
    share = shares(recipe)[0]
    assert (first.budget.steps, second.budget.steps) == (int(1e12 * share / 1e9), int(1e12 * (1 - share) / 4e9))
