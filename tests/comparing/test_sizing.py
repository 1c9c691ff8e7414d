"""Equal trained parameters: sizes agree with counts by hand, what cannot be equal is refused, and the page tells."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comparing_runs import recipes, small
from isthmus import planning
from isthmus.comparing import compare, sizing
from isthmus.comparing.plan import Plan
from isthmus.comparing.sizing import Size, parse, solve
from isthmus.comparing.table import markdown
from isthmus.config import LoRA, Recipe
from isthmus.training.toy import WIDTH, toy
from isthmus.types import ConfigError

LINEAR = WIDTH * WIDTH + WIDTH
"""LLaVA's first projector between a toy's encoder and LLM; LLaVA-1.5's has two of them."""
RANK = 2 * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + WIDTH // 2))
"""A rank of LoRA on queries, keys, values and outputs of two layers; keys and values are half as wide."""


@pytest.fixture
def joints(tmp_path: Path) -> tuple[Recipe, Recipe]:
    """LLaVA-1.5's and LLaVA's projector with LoRA of rank 2."""
    stages = toy(tmp_path / "toy").stages
    one, two = recipes(tmp_path)
    return one.but(stages=stages[1:]), two.but(stages=stages[1:])


def test_a_rank_is_solved_that_comes_nearest(joints: tuple[Recipe, Recipe]) -> None:
    one, two = joints
    assert [planning.plan(each).trained for each in joints] == [2 * LINEAR + 2 * RANK, LINEAR + 2 * RANK]
    target = 2 * LINEAR + 6 * RANK
    assert solve(one, target) == Size(value=6, trained=target)
    assert solve(two, target) == Size(value=8, trained=LINEAR + 8 * RANK)  # nine are 288 too many, eight 160 too few
    assert planning.plan(solve(two, target).of(two)).trained == LINEAR + 8 * RANK
    assert solve(one, planning.plan(one).trained + 1) == Size(trained=2 * LINEAR + 2 * RANK)  # near enough as it is


def test_any_whole_number_of_a_recipe_may_be_solved(tmp_path: Path) -> None:
    """A learnt prompt is a vector in each adapted layer."""
    recipe = toy(tmp_path)
    train: dict[str, Any] = {"connectors.*": {}, "llm.*.grafts.adapter.*": {}}
    joint = {"name": "llama_adapter", "options": {"lower": 1, "prompts": 4}}
    recipe = recipe.but(aligner=joint, stages=[recipe.stages[0].but(train=train)])
    own, field = planning.plan(recipe).trained, "aligner.options.prompts"
    found = solve(recipe, own + 100 * WIDTH, field)
    assert found == Size(by=field, value=104, trained=own + 100 * WIDTH)
    assert found.of(recipe).aligner.options["prompts"] == 104
    for by in ("rank", "seed"):  # there is no LoRA
        with pytest.raises(ConfigError, match=f"where 2.38 k are asked for, and {by} does not change that") as told:
            solve(recipe, 2 * own, by)
        assert "--size toy=aligner.options." in told.value.remedy
    with pytest.raises(ConfigError, match="unknown key 'promts'; did you mean 'prompts'"):
        solve(recipe, 2 * own, "aligner.options.promts")


def test_a_field_may_make_a_recipe_smaller(tmp_path: Path) -> None:
    """Of two gated blocks one is left: a norm and an attention of width 8, a feed-forward with its norm, two gates."""
    joint = {"name": "flamingo", "options": {"depth": 1, "heads": 1, "head_width": 8}}
    recipe = toy(tmp_path)
    recipe = recipe.but(aligner=joint, stages=[recipe.stages[0].but(train={"llm.*.grafts.gated.*": {}})])
    block = 2 * WIDTH + 4 * 8 * WIDTH + 2 * WIDTH + 2 * 4 * WIDTH * WIDTH + 2
    target = planning.plan(recipe).trained - block
    assert solve(recipe, target, "aligner.options.every") == Size(by="aligner.options.every", value=2, trained=target)


def test_widths_that_heads_do_not_divide_are_left_out(tmp_path: Path) -> None:
    """Of a Q-Former with four heads: every fourth width, and of these the nearest."""
    options = {"queries": 4, "layers": 1, "width": 16, "heads": 4, "inner": 32}
    recipe, stage = toy(tmp_path), toy(tmp_path).stages[0]
    joint = {"name": "blip2", "options": options}
    recipe = recipe.but(aligner=joint, stages=[stage.but(train={"connectors.*": {}})])
    field = "aligner.options.width"
    every = {w: planning.plan(recipe.override([f"{field}={w}"])).trained for w in range(48, 81, 4)}
    for target in (every[64] + (every[68] - every[64]) // 3, every[72] - 7):
        nearest = min(every, key=lambda width: abs(every[width] - target))
        assert solve(recipe, target, field) == Size(by=field, value=nearest, trained=every[nearest])


@pytest.mark.parametrize(("step", "first", "last"), [(1, 1, 2000), (12, 12, 1200), (48, 48, 480), (3, 1, 10)])
def test_the_nearest_value_is_found_among_those_that_are_not_refused(
    joints: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch, step: int, first: int, last: int
) -> None:
    """A thousand parameters per unit, in values from `first` to `last` that go by steps."""
    there = range(first, last + 1, step)

    def counted(recipe: Recipe) -> SimpleNamespace:
        if recipe.seed and recipe.seed not in there:
            raise ConfigError(f"not {recipe.seed}")
        return SimpleNamespace(trained=1000 * recipe.seed)

    monkeypatch.setattr(planning, "plan", counted)
    recipe = joints[0].but(seed=0)
    for value in (there[0], there[1], there[len(there) // 2], there[-1]):
        for target in (990 * value, 1000 * value, 1010 * value):
            nearest = min(there, key=lambda each: abs(1000 * each - target))
            assert solve(recipe, target, "seed") == Size(by="seed", value=nearest, trained=1000 * nearest)
    with pytest.raises(ConfigError, match=f"comes no nearer .* with seed {there[-1]}\n"):
        solve(recipe, 2000 * there[-1], "seed")


def test_what_cannot_be_as_small_is_refused(joints: tuple[Recipe, Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"comes no nearer to 2 k trained parameters than 2.56 k, with rank 1"):
        solve(joints[0], 2000)  # the projector and one rank


def test_what_stages_train_in_turns_is_counted_once_each(joints: tuple[Recipe, Recipe]) -> None:
    """The projector's first Linear, then its second one, then LoRA, then the first one again."""
    (stage,) = joints[0].stages
    lora = {glob: how for glob, how in stage.train.items() if glob.startswith("llm.")}
    turns: list[dict[str, Any]] = [{"connectors.*layers.0.*": {}}, {"connectors.*layers.2.*": {}}, lora]
    stages = [stage.but(name=f"turn-{n}", train=train) for n, train in enumerate([*turns, turns[0]])]
    plan = planning.plan(joints[0].but(stages=stages))
    assert [each.trained for each in plan.stages] == [LINEAR, LINEAR, 2 * RANK, LINEAR]
    assert plan.trained == 2 * LINEAR + 2 * RANK and plan.whole == plan.total + 2 * RANK


def test_numbers_are_read_as_people_write_them(joints: tuple[Recipe, Recipe]) -> None:
    named = {recipe.name: recipe for recipe in joints}
    assert [parse(text, named) for text in ("6M", "1.5k", "2e3", "two")] == [6e6, 1500, 2000, LINEAR + 2 * RANK]
    for text in ("", "0", "six", "6m", "-1", "6-", "1e400", "1e308M"):
        with pytest.raises(ConfigError, match="no number of parameters is written"):
            parse(text, named)
    assert sizing.chosen(["a=b.c"]) == {"a": "b.c"}
    for text in ("a", "a=", "=b", "a=b=c"):
        with pytest.raises(ConfigError, match="no size is written"):
            sizing.chosen([text])


@pytest.mark.slow
def test_a_comparison_trains_as_many_everywhere_and_says_so(
    joints: tuple[Recipe, Recipe], embedded: None, tmp_path: Path
) -> None:
    found = small(tmp_path, *joints, seeds=1, limit=2, parameters="5k")
    assert {name: cost.trained for name, cost in found.costs.items()} == {
        "one": 2 * LINEAR + 6 * RANK,
        "two": LINEAR + 9 * RANK,
    }
    run = json.loads((tmp_path / "comparison/two/seed0/run.json").read_text())["recipe"]
    assert run["stages"][0]["train"]["llm.*self_attn.*"]["mode"]["r"] == 9
    assert found.settings[0].name == "trained parameters" and "--parameters 5k" in found.method["command"]
    assert "within 5% of 5 k" in (tmp_path / "comparison/compare.html").read_text()
    assert "- trained parameters: within 5% of 5 k. `one`: 4.8 k" in markdown(found.plain())


def test_all_recipes_of_a_comparison_are_sized_before_it_begins(
    joints: tuple[Recipe, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = joints
    monkeypatch.setattr(compare, "_carry_out", lambda plan, *asked: plan)
    monkeypatch.setattr(compare, "write", lambda plan, folder: None)
    monkeypatch.setattr(Plan, "check_data", lambda plan, folder: None)
    settings: dict[str, Any] = {"out": tmp_path / "c", "budget": "2-steps", "factors": (), "parameters": "5k"}

    plan = compare.compare(joints, **settings)
    assert isinstance(plan, Plan)  # nothing ran
    assert plan.sizes == {
        "one": Size(value=6, trained=2 * LINEAR + 6 * RANK),
        "two": Size(value=9, trained=LINEAR + 9 * RANK),
    }
    assert plan == compare.compare(out=tmp_path / "c")  # as it was begun
    for job in (plan.run(tmp_path, "two", 0), plan.trial(tmp_path, "two", 3.0)):
        train = job.recipe.stages[0].train
        assert [how.mode.r for how in train.values() if isinstance(how.mode, LoRA)] == [9]
    (told,) = compare._sizes(plan, plan.recipes)
    assert told.matches and (told.name, told.within) == ("trained parameters", "within 5% of 5 k")
    assert told.values == {"one": "4.8 k, LoRA of rank 6", "two": "5.09 k, LoRA of rank 9"}

    begun = tmp_path / "c" / "one" / "seed0" / "run.json"
    begun.parent.mkdir()
    begun.touch()
    for other in (None, "6k"):
        with pytest.raises(ConfigError, match="another number of trained parameters"):
            compare.compare(joints, **{**settings, "parameters": other})
    with pytest.raises(ConfigError, match="one has been sized by rank, not by seed"):
        compare.compare(out=tmp_path / "c", sizes={"one": "seed"})
    more = compare.compare(out=tmp_path / "c", add=[two.but(name="three")])
    assert isinstance(more, Plan) and more.sizes == {**plan.sizes, "three": plan.sizes["two"]}


def test_sizes_that_mean_nothing_are_refused(joints: tuple[Recipe, Recipe]) -> None:
    common = compare.common_of(joints, None, None, None, (), ())
    plan = compare.planned(joints, common, "2-steps", (0,), None, (), 0.2)
    with pytest.raises(ConfigError, match="--size is told, and no --parameters"):
        plan.with_sizes({"one": "seed"})
    with pytest.raises(ConfigError, match="no recipe is named 'four', whose size is told"):
        plan.but(parameters="5k").with_sizes({"four": "seed"})
    sized = plan.but(parameters="one", sizes={"two": Size(by="aligner.options.inner", value=3, trained=1)})
    assert sized.command.partition("  # ")[0].endswith("--no-search --parameters one --size two=aligner.options.inner")
