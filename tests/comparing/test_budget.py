"""What a budget is, how stages share it, and what a step costs of it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from isthmus import recipes
from isthmus.comparing import budget
from isthmus.comparing.budget import Amount, apply, dealt, parse, shares
from isthmus.config import Budget
from isthmus.forecast import Untraceable, forecast
from isthmus.recipes.llava import llava
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


@pytest.mark.parametrize(
    "text", ["", "10", "ten minutes", "0m", "5-epochs", "10M", "-3m", "10-", "3--steps", "1e400flops", "1e308h"]
)
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
    few = [Fraction(1, 50), Fraction(2, 25), Fraction(9, 10)]
    assert dealt(10, few) == [1, 1, 8]
    assert dealt(2, few) == [1, 1, 1]
    assert dealt(2, [Fraction(0), *few]) == [0, 1, 1, 1] and dealt(10, [*few, Fraction(0)]) == [1, 1, 8, 0]
    thirds = [Fraction(333, 1000), Fraction(333, 1000), Fraction(334, 1000)]
    for whole in (*range(3, 40), 10**300):
        assert sum(dealt(whole, thirds)) == whole


def test_counts_are_compared_in_samples(tmp_path: Path) -> None:
    """Eight steps of four samples, and one epoch over forty: 32 to 40."""
    recipe = toy(tmp_path)
    first, second = recipe.stages
    mixed = recipe.but(stages=(first, second.but(budget=Budget(epochs=1))))
    whole = shares(mixed)
    assert whole[0] / whole[1] == pytest.approx(32 / 40, rel=0.2)  # a share of the data is held out


def test_steps_are_shared_as_a_recipe_shares_its_own(tmp_path: Path) -> None:
    """Stages of unlike batches keep their shares of steps, and with them those of samples."""
    first, second = toy(tmp_path).stages
    stages = (first.but(batch_size=8, budget=Budget(steps=10)), second.but(batch_size=4, budget=Budget(steps=30)))
    recipe = toy(tmp_path).but(stages=stages)
    assert [stage.budget.steps for stage in apply(recipe, parse("40-steps")).stages] == [10, 30]
    assert [stage.budget.samples for stage in apply(recipe, parse("200-samples")).stages] == [80, 120]
    epochs = recipe.but(stages=[stage.but(budget=Budget(samples=40)) for stage in stages])
    assert [stage.budget.steps for stage in apply(epochs, parse("300-steps")).stages] == [100, 200]


def test_minutes_beside_counts_have_no_shares(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    first, second = recipe.stages
    lengths = (first.but(budget=Budget(minutes=1)), second.but(batch_size=8, budget=Budget(minutes=3)))
    off = first.but(name="off", budget=Budget(steps=0))
    for unit in ("steps", "samples"):
        assert shares(recipe.but(stages=(off, *lengths)), unit) == [0, 0.25, 0.75]
    with pytest.raises(ConfigError, match="some stages last minutes"):
        shares(recipe.but(stages=(first, second.but(budget=Budget(minutes=1)))))
    for none in ((), (first.but(budget=Budget(steps=0)), second.but(budget=Budget(steps=0)))):
        with pytest.raises(ConfigError, match="has no stage"):
            shares(recipe.but(stages=none))


def test_every_recipe_on_embedded_parts_can_share_a_budget() -> None:
    embedded = [build() for build in recipes.BOOK.values() if build().llm.architecture is None]
    assert len(embedded) > 20
    for recipe in embedded:
        assert sum(shares(recipe)) == pytest.approx(1), recipe.name


def test_operations_are_counted_once_whatever_is_computed_twice(tmp_path: Path) -> None:
    """`test_forecast.py` compares the count with real steps."""
    recipe = toy(tmp_path)
    twice = recipe.but(stages=tuple(stage.but(recompute=True) for stage in recipe.stages))
    ahead = [stage.flops for stage in forecast(recipe, torch.device("cpu"), 0).stages]
    again = [stage.flops for stage in forecast(twice, torch.device("cpu"), 0).stages]
    assert budget.operations(twice) == budget.operations(recipe) == ahead and again[-1] > 1.1 * ahead[-1] > 0


def test_what_cannot_be_counted_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*asked: object, **more: object) -> None:
        raise Untraceable("aten::item needs numbers")

    monkeypatch.setattr(budget, "forecast", refuse)
    with pytest.raises(ConfigError, match="cannot be counted: aten::item"):
        budget.operations(toy(tmp_path))


def test_operations_become_steps(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    first, second = apply(recipe, parse("1e12flops"), per_step=[1e9, 4e9]).stages
    share = shares(recipe)[0]
    assert (first.budget.steps, second.budget.steps) == (int(1e12 * share / 1e9), int(1e12 * (1 - share) / 4e9))


def test_steps_never_take_more_operations_than_were_given(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    only = recipe.but(stages=recipe.stages[:1])
    for asked, steps in (("1e9flops", 1), ("1.7e9flops", 1), ("2.3e9flops", 2), ("9.6e9flops", 9)):
        assert apply(only, parse(asked), per_step=[1e9]).stages[0].budget.steps == steps


def test_less_than_a_step_is_refused_with_the_least_that_is_enough(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    other, per_step = recipe.but(name="other"), [[2.34e7, 6.1e7], [9.87e7, 1e7]]
    with pytest.raises(ConfigError, match=r"1 MFLOP give some stage of toy, other less than one step\ngive") as told:
        budget.enough([recipe, other], parse("1M-flops"), per_step)
    least = parse(told.value.remedy.split()[4])
    for some, costs in zip((recipe, other), per_step):
        given = [least.value * share / cost for share, cost in zip(shares(some), costs)]
        assert min(given) >= 1 and [stage.budget.steps for stage in apply(some, least, costs).stages] == [
            int(steps) for steps in given
        ]
    with pytest.raises(ConfigError, match="less than one step"):
        apply(other, least.times(0.9), per_step[1])
    assert min(stage.budget.steps for stage in apply(other, least.times(0.1), per_step[1], least=True).stages) == 1


@pytest.mark.parametrize(
    ("unit", "least", "expected"),
    [
        ("steps", 49, [{"steps": 1}, {"steps": 48}]),
        ("samples", 3136, [{"samples": 64}, {"samples": 3072}]),
    ],
)
def test_a_step_or_a_batch_of_every_stage_is_the_least(tmp_path: Path, unit: str, least: int, expected: list) -> None:
    """Of stages of 3 and 144 steps; the float next to 1/49 lies below it, so that 49 of them are less than a step."""
    first, second = toy(tmp_path).stages
    lengths = (first.but(batch_size=64, budget=Budget(steps=3)), second.but(batch_size=64, budget=Budget(steps=144)))
    recipe = toy(tmp_path).but(stages=lengths)
    given = [stage.budget.model_dump(exclude_none=True) for stage in apply(recipe, parse(f"{least}-{unit}")).stages]
    assert given == expected
    for less in (1, least - 1):
        with pytest.raises(ConfigError, match="give some stage of toy less than one step") as told:
            apply(recipe, parse(f"{less}-{unit}"))
        assert told.value.remedy == f"give a budget of {least}-{unit} or more"
    assert apply(recipe, parse(f"1-{unit}"), least=True).stages[0].budget.model_dump(exclude_none=True) == {unit: 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3m", {"minutes": 3.0}),
        ("3-steps", {"steps": 3}),
        ("30-samples", {"samples": 30}),
        ("3e9flops", {"steps": 3}),
    ],
)
@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("own", [Budget(steps=6), Budget(samples=9), Budget(minutes=2)])
def test_a_stage_that_is_switched_off_stays_off(
    tmp_path: Path, text: str, expected: dict, off: int, own: Budget
) -> None:
    recipe = toy(tmp_path)
    lengths = [stage.but(budget=own) for stage in recipe.stages]
    lengths[off] = lengths[off].but(budget=Budget(steps=0))
    short = recipe.but(stages=lengths)
    given = [stage.budget.model_dump(exclude_none=True) for stage in apply(short, parse(text), [1e9, 1e9]).stages]
    assert given[off] == {"steps": 0} and given[1 - off] == expected
    assert shares(short)[off] == 0 and shares(short, "steps")[1 - off] == 1
    trial = apply(short, parse(text).times(1e-9), [1e9, 1e9], least=True).stages
    assert trial[off].budget == Budget(steps=0) and trial[1 - off].budget != Budget(steps=0)
