"""Whole small comparisons: what is done once stays done, what is added is added, and every number is a run's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

import composed
import page_checks
from comparing_runs import TASKS, recipes, small
from isthmus import planning
from isthmus.cli.compare import factors_of
from isthmus.comparing import checks, compare, page
from isthmus.comparing import plan as plans
from isthmus.comparing.advice import advice
from isthmus.comparing.engine import Here
from isthmus.comparing.judge import judged
from isthmus.comparing.outcome import Cell, Line, Machine, Outcome, Rates
from isthmus.comparing.plan import Common, Job, Plan, scaled
from isthmus.comparing.settings import Setting, settings
from isthmus.comparing.sizing import Size
from isthmus.comparing.table import markdown, tables
from isthmus.config import Recipe, Source, Stage, TaskConfig
from isthmus.costs import Costs, costs
from isthmus.evaluation import answers
from isthmus.evaluation.seeds import Gap, Level
from isthmus.experiment import processor
from isthmus.forecast.batches import draw
from isthmus.recipes.llava import llava
from isthmus.recipes.qwen_vl import qwen_vl
from isthmus.recipes.vdep import vdep
from isthmus.training.log import read_rows
from isthmus.training.toy import toy
from isthmus.types import ConfigError, DataError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparing")


@pytest.fixture(scope="module")
def finished(place: Path, embedded: None) -> Outcome:
    """Two joints, two seeds, a grid of two factors."""
    return small(place, *recipes(place), factors=(0.5, 2.0))


def times(folder: Path) -> dict[str, int]:
    """When each run's report and model were written."""
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.name == "report.json"}


def test_every_run_is_a_normal_run(finished: Outcome, place: Path) -> None:
    folder = place / "comparison"
    for name in ("one", "two"):
        for seed in (0, 1):
            assert json.loads((folder / name / f"seed{seed}" / "run.json").read_text())["recipe"]["seed"] == seed
            assert (folder / name / f"seed{seed}" / "align" / "model" / "config.json").is_file()
        assert len([*folder.glob(f"{name}/seed*/planned.json")]) == 2  # and of the trials nobody asks for a forecast
        assert [*folder.glob(f"{name}/rates/*/report.json")] and not [*folder.glob(f"{name}/rates/*/plan.json")]
    assert len(finished.runs) == 4 and len({run.fingerprint for run in finished.runs}) == 4
    assert {run.machine for run in finished.runs} == {Machine(processor(), torch.get_num_threads(), "cpu")}
    assert {run.data_hash for run in finished.runs if run.seed == 0} == {finished.runs[0].data_hash}


def test_the_table_holds_the_shares_of_right_answers(finished: Outcome, place: Path) -> None:
    shares = {}
    for name in ("one", "two"):
        for task in TASKS:
            files = [
                place / "comparison" / name / f"seed{s}" / "predictions/after" / f"{task.name}.jsonl" for s in (0, 1)
            ]
            right = [[bool(p.right) for p in answers.read(file)[1]] for file in files]
            shares[name, task.name] = sum(sum(each) / len(each) for each in right) / 2
    for line in finished.lines:
        for name, cell in line.cells.items():
            assert cell.level.value == pytest.approx(shares[name, line.task])
            assert set(cell.others) == {"before", "blind", "shuffled"} and cell.seen is not None
    one = [shares["one", task.name] for task in TASKS]
    assert finished.mean.cells["one"].level.value == pytest.approx(sum(one) / 2)
    gap = finished.mean.cells["two"].gap
    two = [shares["two", task.name] for task in TASKS]
    assert gap is not None and gap.value == pytest.approx((sum(two) - sum(one)) / 2) and gap.paired
    assert finished.mean.cells["one"].gap is None


def test_rates_are_tried_at_the_same_cost_for_all(finished: Outcome, place: Path) -> None:
    assert set(finished.rates) == {"one", "two"}
    assert not any(rates.alike for rates in finished.rates.values())  # one step teaches, too
    for name, rates in finished.rates.items():
        assert set(rates.losses) == {0.5, 2.0}
        assert rates.losses[rates.chosen] <= 1.1 * min(loss for loss in rates.losses.values() if loss is not None)
        used = json.loads((place / "comparison" / name / "seed0" / "run.json").read_text())["recipe"]["stages"][0]
        assert used["train"]["connectors.*"]["lr"] == pytest.approx(1e-2 * rates.chosen)
    trials = sorted((place / "comparison").glob("*/rates/*"))
    logs = [[row for row in read_rows(trial / "align" / "metrics.jsonl") if "loss" in row] for trial in trials]
    assert len(trials) == 4 and [len(rows) for rows in logs] == [1] * 4  # a fifth of two steps, and one at least
    assert len({round(rows[0]["samples_per_second"] * rows[0]["seconds"]) for rows in logs}) == 1
    assert not list((place / "comparison").glob("*/rates/*/predictions"))


def test_curves_and_memory_are_those_of_the_logs(finished: Outcome, place: Path) -> None:
    (drawn,) = finished.curves
    for name in ("one", "two"):
        rows = [read_rows(place / "comparison" / name / f"seed{seed}" / "align" / "metrics.jsonl") for seed in (0, 1)]
        steps = [[row for row in each if "loss" in row] for each in rows]
        means = [(float(a["step"]), (a["loss"] + b["loss"]) / 2) for a, b in zip(*steps)]
        assert list(drawn.train[name]) == [pytest.approx(point) for point in means] and len(means) == 2
        validated = [[row["validation_loss"] for row in each if "validation_loss" in row] for each in rows]
        assert drawn.validation[name][-1][1] == pytest.approx((validated[0][-1] + validated[1][-1]) / 2)
        assert finished.costs[name].memory == max(1e9 * row["memory_gb"] for each in steps for row in each)


def test_calling_again_trains_nothing_and_says_the_same(finished: Outcome, place: Path) -> None:
    before = times(place / "comparison")
    text = (place / "comparison" / "compare.json").read_text()
    small(place, *recipes(place), factors=(0.5, 2.0))
    assert times(place / "comparison") == before
    small(place)  # without naming them
    assert times(place / "comparison") == before
    assert (place / "comparison" / "compare.json").read_text() == text


@pytest.fixture
def copied(finished: Outcome, place: Path, tmp_path: Path) -> Path:
    """The finished comparison, to go on with."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.slow
def test_what_nobody_reads_of_finished_runs_is_deleted(finished: Outcome, place: Path) -> None:
    """Checkpoints are several times the models, and a comparison is many runs."""
    assert not list(place.rglob("checkpoints")) and not list(place.glob("comparison/*/rates/*/*/model"))
    assert list(place.glob("comparison/*/seed*/*/model")) and list(place.glob("comparison/*/rates/*/*/metrics.jsonl"))


def test_a_joint_is_added_without_repeating(finished: Outcome, copied: Path) -> None:
    before = times(copied / "comparison")
    more = small(copied, add=[recipes(copied)[1].but(name="three")])
    assert more.names == ("one", "two", "three") and more.seeds == (0, 1)
    assert times(copied / "comparison").items() >= before.items()
    assert more.lines[0].cells["one"].level == finished.lines[0].cells["one"].level
    with pytest.raises(ConfigError, match="another recipe named 'three'"):
        small(copied, add=[recipes(copied)[0].but(name="three")])


def test_other_data_in_the_same_folder_are_refused(copied: Path) -> None:
    file = copied / "comparison" / "data.json"
    kept = json.loads(file.read_text())
    assert "what is asked" in kept and len(kept) > 1
    for what in kept:
        file.write_text(json.dumps(kept | {what: "0"}))
        with pytest.raises(ConfigError, match=re.escape(f"{what} is not what the runs in")):
            small(copied)


def test_a_joint_whose_run_diverged_is_left_out(finished: Outcome, copied: Path) -> None:
    (copied / "comparison" / "two" / "seed1" / "report.json").unlink()
    (copied / "comparison" / "two" / "seed1" / "diverged").touch()
    small(copied, add=[recipes(copied)[1].but(name="three")])
    shown = json.loads((copied / "comparison" / "compare.json").read_text())
    assert shown["names"] == ["one", "three"]
    assert shown["left_out"] == {"two": "a loss or gradient of two, seed 1 was not finite"}
    assert shown["advice"][-1] == "two is left out: a loss or gradient of two, seed 1 was not finite."
    page = (copied / "comparison" / "compare.html").read_text()
    assert "two is left out" in page
    (copied / "comparison" / "one" / "seed0" / "report.json").unlink()
    (copied / "comparison" / "one" / "seed0" / "diverged").touch()
    with pytest.raises(ConfigError, match="and all others are compared with one"):
        small(copied)


def test_operations_of_a_run_are_those_counted_for_its_steps(finished: Outcome, place: Path) -> None:
    for name in ("one", "two"):
        (per_step,) = json.loads((place / "comparison" / name / "operations.json").read_text())["per_step"]
        steps = finished.runs[0].steps["align"]
        assert finished.costs[name].training == pytest.approx(steps * per_step)


@pytest.mark.slow
def test_a_seed_is_added_without_repeating(copied: Path, place: Path) -> None:
    before = times(copied / "comparison")
    wider = small(copied, *recipes(place), factors=(0.5, 2.0), seeds=3)
    assert wider.seeds == (0, 1, 2) and len(wider.runs) == 6
    assert times(copied / "comparison").items() >= before.items()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"budget": "3-steps"}, "another budget"),
        ({"factors": ()}, "another grid"),
        ({"limit": 3}, "another evaluation"),
        ({"overrides": ["dtype=bfloat16"]}, "another override"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(finished: Outcome, place: Path, changes, cause) -> None:
    with pytest.raises(ConfigError, match=cause):
        small(place, *recipes(place), **{"factors": (0.5, 2.0), **changes})


def test_another_baseline_trains_nothing_anew(finished: Outcome, copied: Path, place: Path) -> None:
    before, (one, two) = times(copied / "comparison"), recipes(place)
    turned = small(copied, baseline="two")
    was, now = finished.mean.cells["two"].gap, turned.mean.cells["one"].gap
    assert was is not None and now is not None and now.value == pytest.approx(-was.value)
    assert turned.baseline == "two" and turned.mean.cells["two"].gap is None
    with pytest.raises(ConfigError, match="another baseline") as told:  # none is named, and the first is no longer it
        small(copied, one, two, factors=(0.5, 2.0))
    assert "--baseline two as before" in told.value.remedy
    with pytest.raises(ConfigError, match="no recipe is named 'three'"):
        small(copied, baseline="three")
    assert small(copied, one, two, factors=(0.5, 2.0), baseline="one").mean.cells["two"].gap == was
    assert times(copied / "comparison") == before


def test_a_baseline_whose_trials_diverged_is_told_before_any_run(finished: Outcome, copied: Path) -> None:
    folder = copied / "comparison"
    for trial in (folder / "one" / "rates").glob("x*/"):
        (trial / "diverged").touch()
        (trial / "align" / "metrics.jsonl").unlink()
    shutil.move(folder / "two" / "seed1", copied / "kept")
    with pytest.raises(ConfigError, match="all trials of learning rates was not finite") as told:
        small(copied)
    assert f"`isthmus compare --baseline two --out {folder}`" in told.value.remedy
    assert not (folder / "two" / "seed1").exists()
    shutil.move(copied / "kept", folder / "two" / "seed1")
    turned = small(copied, baseline="two")
    assert turned.names == ("two",) and set(turned.left_out) == {"one"}


# ---------------------------------------------------------------------------------------------- before the runs


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons that end where their runs would begin."""
    monkeypatch.setattr(compare, "_carry_out", lambda *asked: None)
    monkeypatch.setattr(compare, "write", lambda outcome, folder: None)


@pytest.mark.usefixtures("unrun", "embedded")
def test_where_nothing_has_begun_another_request_takes_the_place(tmp_path: Path) -> None:
    one, two = recipes(tmp_path)
    folder = tmp_path / "comparison"
    small(tmp_path, one, two.but(name="three"))
    small(tmp_path, one.but(about="mended"), two, budget="3-steps", limit=3, baseline="two")
    plan = plans.read(folder)
    assert plan is not None and list(plan.recipes) == ["one", "two"] and plan.recipes["one"].about == "mended"
    assert (plan.budget, plan.baseline, {task.limit for task in plan.common.eval}) == ("3-steps", "two", {3})
    (folder / "one" / "seed0").mkdir()
    (folder / "one" / "seed0" / "run.json").touch()
    with pytest.raises(ConfigError, match="another budget, evaluation") as told:
        small(tmp_path, one.but(about="mended"), two, baseline="two")
    assert "another folder with --out" in told.value.remedy and f"delete {folder}" in told.value.remedy


@pytest.mark.usefixtures("unrun", "embedded")
def test_a_recipe_that_cannot_be_counted_does_not_stay_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = recipes(tmp_path)
    small(tmp_path, one)
    (tmp_path / "comparison" / "one" / "seed0").mkdir()
    (tmp_path / "comparison" / "one" / "seed0" / "run.json").touch()

    def counted(recipe: Recipe) -> Costs:
        if recipe.name == "two":
            raise RuntimeError("unknown device type\nand where that was")
        return costs(recipe)

    monkeypatch.setattr(checks, "costs", counted)
    with pytest.raises(ConfigError, match="what a picture costs two cannot be counted: unknown device type\nleave"):
        small(tmp_path, add=[two])
    plan = plans.read(tmp_path / "comparison")
    assert plan is not None and list(plan.recipes) == ["one"]
    small(tmp_path)


def test_what_a_comparison_puts_its_own_in_place_of_makes_no_other_recipe(tmp_path: Path) -> None:
    both = toy(tmp_path / "toy")
    first, second = both.stages
    one = both.but(name="one", stages=[first])
    known = {"one": one, "both": both.but(name="both")}
    plan = Plan(recipes=known, common=Common(eval=TASKS), budget="9-steps", seeds=(0,), baseline="one")
    for name in known:
        (tmp_path / name / "seed0").mkdir(parents=True)
        (tmp_path / name / "seed0" / "run.json").touch()
    longer = one.but(stages=[first.but(budget={"steps": 3 * first.budget.steps})])
    for same in (one.but(eval=()), one.but(seed=3), longer):
        assert plan.with_recipes([same], tmp_path) == plan
    twice = [stage.but(budget={"steps": 2 * stage.budget.steps}) for stage in both.stages]
    assert plan.with_recipes([known["both"].but(stages=twice)], tmp_path) == plan
    faster = plan.with_recipes([one.but(engine={"workers": 1})], tmp_path).recipes["one"]
    assert faster.engine.workers == 1 and faster.fingerprint() == one.fingerprint()
    for other in (
        one.but(dtype="bfloat16"),
        one.but(stages=[first.but(batch_size=2)]),
        known["both"].but(stages=[first, twice[1]]),
    ):
        with pytest.raises(ConfigError, match="another recipe named"):
            plan.with_recipes([other], tmp_path)


def test_runs_on_other_threads_are_listed_and_in_minutes_refused(finished: Outcome, copied: Path) -> None:
    folder, cpu = copied / "comparison", torch.device("cpu")
    assert {run.machine.threads for run in finished.runs if run.machine} == {torch.get_num_threads()}
    for report in (folder / "two").glob("*/*report.json"):
        told = json.loads(report.read_text())
        told["method"]["machine"] = "Some, Inc. processor, 7 threads, cuda:1"
        report.write_text(json.dumps(told))
    found = small(copied)
    listed = {setting.name: setting.values for setting in found.settings if not setting.matches}
    own = f"{processor()}, {torch.get_num_threads()} threads, cpu"
    both = f"{own} (2 of 4 runs) and Some, Inc. processor, 7 threads, cuda:1 (2 of 4 runs)"
    assert found.method["machine"] == both and f", {own}, float32; rounds" in found.method["timing"]
    assert listed["threads"] == {"one": str(torch.get_num_threads()), "two": "7"}
    assert listed["machine"]["two"] == "Some, Inc. processor, cuda:1"
    assert "machine and threads: the differences" in found.advice[-1]

    plan = plans.read(folder)
    assert plan is not None
    place, per_step = checks.Place(folder, cpu, Console()), {"one": [1.0], "two": [1.0]}
    here = Here(Console(), cpu)
    shutil.rmtree(folder / "one")
    (folder / "two" / "seed1" / "report.json").unlink()
    checks.check_machine(plan, place, here, per_step)  # as many steps on any machine
    minutes = plan.but(budget="10m", recipes={"two": plan.recipes["two"]}, baseline="two")
    with pytest.raises(ConfigError, match="had 7 threads on cuda, and further ones would have") as refused:
        checks.check_machine(minutes, place, here, per_step)
    assert "--jobs" in refused.value.remedy and "--out" in refused.value.remedy
    (folder / "two" / "seed1" / "diverged").touch()
    checks.check_machine(minutes, place, here, per_step)  # nothing is missing


def test_every_revision_of_the_code_is_on_the_page(finished: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"isthmus \S+, code [0-9a-f]{8}", finished.runs[0].revision)
    first, *rest = finished.runs
    shown = page.render(replace(finished, runs=(replace(first, revision="isthmus 0, code 1234"), *rest)))
    footer = shown.split("<footer>")[1]
    assert "isthmus 0, code 1234" in footer and rest[0].revision in footer


def test_lengths_that_follow_from_equal_operations_are_no_difference(tmp_path: Path, finished: Outcome) -> None:
    both = toy(tmp_path / "toy")
    first, second = both.stages
    shifted = both.but(stages=[first.but(budget={"steps": 9 * first.budget.steps}), second])
    for other, excused in ((both, True), (shifted, False)):
        known = {"one": both, "two": other.but(name="two")}
        plan = Plan(recipes=known, common=Common(eval=TASKS), budget="3e9flops", seeds=(0,), baseline="one")
        trained = {
            name: plan.run(tmp_path, name, 0, 1.0, [cost, cost]).recipe for name, cost in (("one", 3e6), ("two", 4e6))
        }
        found = {each.name: each for each in compare._excused(plan, known, settings(trained))}
        for stage in both.stages:
            length = found[f"length of stage {stage.name}"]
            assert length.matches == excused and len(set(length.values.values())) == 2  # both lengths are shown
        assert found["LLM"].matches and not found["LLM"].within


def test_a_budget_of_operations_that_is_not_met_is_said(finished: Outcome) -> None:
    cost = finished.costs["one"]
    trained = {"one": replace(cost, training=2.9e9), "two": replace(cost, training=1.76e9)}
    found = replace(finished, costs=trained, budget="3 GFLOP", operations=3e9)
    assert found.unmet == {"two": 1.76e9}
    assert any("3 GFLOP is not met: runs of two took 1.76 GFLOP" in sentence for sentence in advice(found))
    assert not any("is not met" in sentence for sentence in advice(replace(found, operations=None)))


def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path: Path) -> None:
    one, two = recipes(tmp_path)
    for some, options, cause in (
        ((one, two.but(name="one")), {}, "two recipes have one name"),
        ((one, two), {"baseline": "three"}, "no recipe is named 'three'"),
        ((one.but(eval=()), two), {}, "nothing would be measured"),
        ((one, two), {"budget": "soon"}, "no budget is written"),
        ((), {}, "holds no comparison"),
    ):
        with pytest.raises(ConfigError, match=cause):
            small(tmp_path, *some, **options)
    assert not (tmp_path / "comparison" / "plan.json").exists()


def own_questions(folder: Path, pictures: int) -> TaskConfig:
    """A task of four questions about so many pictures."""
    for number in range(pictures):
        composed.picture(number).source.save(folder / f"{number}.png")
    asked = [{"image": f"{n % pictures}.png", "question": f"What is {n}?", "answer": "a cat"} for n in range(4)]
    (folder / "asked.json").write_text(json.dumps(asked))
    return TaskConfig(name="exact", options={"data": {"name": str(folder / "asked.json")}})


def test_a_recipe_that_cannot_be_trained_is_told_first_and_can_be_mended(tmp_path: Path) -> None:
    one, two = recipes(tmp_path)
    wrong = two.but(aligner={"name": "llava", "options": {"projector": "liner"}})
    with pytest.raises(ConfigError, match="aligner llava: projector"):
        small(tmp_path, wrong, one, seeds=1, tasks=[own_questions(tmp_path, 2)])
    folder = tmp_path / "comparison"
    assert not list(folder.rglob("run.json")) and plans.read(folder) is None
    common = Common(eval=TASKS)
    plan = Plan(recipes={"one": one, "two": wrong}, common=common, budget="2-steps", seeds=(0,), baseline="one")
    mended = plan.with_recipes([two], folder)
    assert dict(mended.recipes) == {"one": one, "two": two}
    (folder / "two" / "seed0").mkdir(parents=True)
    (folder / "two" / "seed0" / "run.json").touch()  # it has begun
    with pytest.raises(ConfigError, match="another recipe named 'two'") as told:
        plan.with_recipes([two], folder)
    assert f"delete {folder / 'two'}" in told.value.remedy


def test_the_size_of_a_recipe_that_is_replaced_is_found_anew(tmp_path: Path) -> None:
    one, two = recipes(tmp_path)
    known = {"one": Size(trained=10), "two": Size(value=3, trained=10)}
    plan = Plan(
        recipes={"one": one, "two": two},
        common=Common(eval=TASKS),
        budget="2-steps",
        seeds=(0,),
        baseline="one",
        parameters="one",
        sizes=known,
    )
    assert plan.with_recipes([two.but(about="mended")], tmp_path).sizes == {"one": known["one"]}
    assert plan.with_recipes([one.but(about="mended")], tmp_path).sizes == {}  # the other was to be as large as it
    assert plan.with_recipes([one], tmp_path).sizes == known


def test_pictures_that_cannot_be_exchanged_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same picture"):
        small(tmp_path, *recipes(tmp_path), tasks=[own_questions(tmp_path, 1)])
    assert not (tmp_path / "comparison" / "plan.json").exists()


# ---------------------------------------------------------------------------------------------- equal terms


def test_settings_that_differ_are_said() -> None:
    found = {setting.name: setting for setting in settings({"a": llava(), "b": qwen_vl()})}
    assert found["LLM"].matches and found["evaluation"].matches
    other = {"a": llava(), "b": llava().but(llm="another", system="Be brief.")}
    told = {setting.name: setting.matches for setting in settings(other)}
    assert not told["LLM"] and not told["system turn"] and told["encoder and its features"]


def test_stages_are_compared_where_both_have_them() -> None:
    three, one = llava(), llava().but(stages=llava().stages[2:])
    found = {setting.name: setting for setting in settings({"a": three, "b": one})}
    assert not found["stages"].matches and found["data of stage sft"].matches
    assert not [name for name in found if name.endswith("stage warm")]
    other = llava().but(stages=[stage.but(batch_size=2) for stage in llava().stages])
    told = {setting.name for setting in settings({"a": three, "b": other}) if not setting.matches}
    assert told == {f"samples per step of stage {name}" for name in ("warm", "align", "sft")}
    loss = {"a": vdep(), "b": vdep().but(stages=[_weighing_half(stage) for stage in vdep().stages])}
    assert {setting.name for setting in settings(loss) if not setting.matches} == {"loss of stage sft"}


def _weighing_half(stage: Stage) -> Stage:
    terms = [term.but(weight=0.5) if term.name == "vdep" else term for term in stage.objectives]
    return stage.but(objectives=terms)


def test_every_joint_meets_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    """Though they put nine tokens, none or a few in a picture's place: samples of one picture each."""
    composed.picture(1).source.save(tmp_path / "a.png")
    told = [
        {"id": str(n), "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?" + " so" * n},
         {"from": "gpt", "value": "a cat"}]} for n in range(12)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(told))
    source = Source(name=str(tmp_path / "data.json"), images=str(tmp_path))
    stage = llava().stages[-1].but(data=(source,), batch_size=4, train={"connectors.*": {"lr": 1e-3}})
    met = []
    for joint in ("llava", "flamingo", "cogvlm", "qwen_vl"):
        recipe = composed.recipe("llama", joint).but(stages=(stage,))
        steps = draw(recipe, stage, planning.outline(recipe), 6).steps
        met.append([[sorted(batch.ids) for batch in step] for step in steps])
    assert met[0] == met[1] == met[2] == met[3] and len(met[0]) == 6 and met[0][0] != met[0][1]


def test_data_replace_those_of_language_stages_alone() -> None:
    mine = Source(name="mine.json")
    stages = Common(eval=(), data=(mine,)).of(llava()).stages
    assert [stage.data == (mine,) for stage in stages] == [False, True, True]  # `warm` does not run the LLM


def test_all_rates_of_a_recipe_are_scaled() -> None:
    before, after = llava(), scaled(llava(), 3)
    for old, new in zip(before.stages, after.stages):
        assert new.lr == pytest.approx(3 * old.lr)
        for glob, how in old.train.items():
            assert new.train[glob].lr == (None if how.lr is None else pytest.approx(3 * how.lr))


def test_trials_without_a_validation_loss_did_not_diverge(tmp_path: Path) -> None:
    recipe = recipes(tmp_path)[0]
    trials = {factor: Job(recipe, tmp_path / str(factor), "one, rates") for factor in (1.0, 3.0)}
    for job in trials.values():
        rows = job.folder / recipe.stages[-1].name / "metrics.jsonl"
        rows.parent.mkdir(parents=True)
        rows.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(ConfigError, match="one, rates: nothing was held out") as told:
        compare._chosen(trials)
    assert "--no-search" in told.value.remedy  # with --grid 1 there would be a trial, too


def test_trials_end_with_a_validation_whatever_the_recipe_says(tmp_path: Path) -> None:
    one = recipes(tmp_path)[0]
    quiet = one.but(stages=[stage.but(evaluate_every=None) for stage in one.stages])
    for recipe, every in ((one, one.stages[-1].evaluate_every), (quiet, 1.0)):
        common = Common(eval=TASKS)
        plan = Plan(recipes={"one": recipe}, common=common, budget="20-steps", seeds=(0,), baseline="one")
        assert plan.trial(tmp_path, "one", 1.0).recipe.stages[-1].evaluate_every == every
        assert plan.run(tmp_path, "one", 0).recipe.stages[-1].evaluate_every == recipe.stages[-1].evaluate_every


def test_of_losses_alike_the_rate_nearest_to_the_recipe_is_chosen() -> None:
    assert compare.chosen({1 / 3: 2.0, 1.0: 2.0, 3.0: None}).chosen == 1.0
    assert compare.chosen({1.0: 0.519, 3.0: 0.491}).chosen == 1.0  # better by less than a tenth
    assert compare.chosen({1.0: 0.549, 3.0: 0.491, 9.0: 0.48}).chosen == 3.0
    assert compare.chosen({1.0: -1.0, 3.0: -1.05, 9.0: 4.0}).chosen == 1.0
    assert not compare.chosen({1.0: 0.519, 3.0: 0.491, 9.0: 0.7}).at_edge  # beyond 1 lies nothing better
    assert compare.chosen({}).chosen == 1.0
    assert compare.chosen({1.0: None}) is None


def test_rates_that_the_trials_did_not_tell_apart_are_said(finished: Outcome) -> None:
    tried = {
        "alike": Rates({1.0: 2.5, 3.0: 2.5}, 1.0, 1),
        "short": Rates({1.0: 2.5, 3.0: 2.4, 9.0: 2.6}, 3.0, 9),
        "long": Rates({1.0: 2.5, 3.0: 2.4}, 3.0, 20),
        "none": Rates({1.0: 2.5, 3.0: None}, 1.0, 20),
    }
    said = advice(replace(finished, rates=tried, settings=(), left_out={}))[-3:]
    assert [sentence.split(" lie ")[0].split(" ended ")[0].split(" had ")[0] for sentence in said] == [
        "All learning rates that were tried for alike",
        "Trials of the learning rates of short",
        "The best learning rates",
    ]
    assert "None larger than 3 was tried for long. None smaller than 1 was tried for none. Widen" in said[2]
    assert "had 9 steps or fewer" in said[1] and all("Widen" in each or "Lengthen" in each for each in said)
    shown = page.render(replace(finished, rates=tried))
    assert shown.count("<small>all alike</small>") == 1 and shown.count("<small>at the edge</small>") == 2
    assert {rates.steps for rates in finished.rates.values()} == {1}  # a fifth of two steps, and one at least


def test_runs_that_ended_far_above_the_trial_of_their_rate_are_said(finished: Outcome) -> None:
    name = finished.names[0]
    count = len([run for run in finished.runs if run.name == name])
    (loss,) = {run.validation for run in finished.runs if run.name == name and run.seed == finished.seeds[0]}
    for trial, apart in ((loss / 1.4, ""), (loss / 1.6, f" of {count} runs of {name} came apart")):
        said = " ".join(advice(replace(finished, rates={name: Rates({1.0: trial, 3.0: None}, 1.0, 20)})))
        assert apart in said if apart else "came apart" not in said


def test_the_command_can_be_given_to_a_shell_as_it_stands() -> None:
    tasks = (TaskConfig(name="presence", limit=6), TaskConfig(name="counting", limit=6))
    common = Common(eval=tasks, data=(Source(name="my data.json"),), overrides=("system=It's $HOME; `x`",))
    one = llava().but(name="it's mine")
    plan = Plan(recipes={one.name: one}, common=common, budget="300-steps", seeds=(0, 1), baseline=one.name)
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {plan.command}"], capture_output=True, text=True).stdout
    words = said.splitlines()
    assert words[:3] == ["isthmus", "compare", "it's mine"] and words[words.index("--limit") + 1] == "6"
    assert words[words.index("--data") + 1] == "my data.json"
    assert words[words.index("--set") + 1] == "system=It's $HOME; `x`"
    assert factors_of(words[words.index("--grid") + 1]) == plan.factors == (1 / 3, 1.0, 3.0)
    assert plan.command.endswith("# not in the book: it's mine, see plan.json")
    assert plan.but(seeds=(3, 5)).command.endswith("; seeds 3, 5")
    book = plan.but(recipes={"llava": llava()}, baseline="llava")
    assert "#" not in book.command
    changed = plan.but(recipes={"llava": llava().but(seed=3)}, baseline="llava")
    assert changed.command.endswith("# not in the book: llava, see plan.json")


# ---------------------------------------------------------------------------------------------- words


def gap(value: float, p: float) -> Gap:
    return Gap(value, (value, value), value - 0.01, value + 0.01, value - 0.02, value + 0.02, p, p, True)


def line(task: str, gaps: dict[str, Gap | None], unscored: int = 0) -> Line:
    cells = {
        name: Cell(Level(0.5 + (found.value if found else 0), (0.5,), 0.4, 0.6, 0.4, 0.6), {}, gap(0.3, 0.001), found)
        for name, found in gaps.items()
    }
    first, *_ = cells
    return Line(task, task, "accuracy", 100, 50, {**cells, first: replace(cells[first], unscored=unscored)})


def outcome_with(finished: Outcome, *lines: Line, seeds: tuple[int, ...] = (0, 1, 2)) -> Outcome:
    """The finished comparison with other numbers in its table."""
    mean, rest = judged(lines[0], lines[1:] or lines)
    names = tuple(lines[0].cells)
    costs = dict.fromkeys(names, finished.costs["one"])
    found = replace(finished, names=names, baseline=names[0], seeds=seeds, mean=mean, lines=rest, costs=costs, rates={})
    return replace(found, advice=advice(found))


def test_with_one_seed_the_best_of_nats_is_the_lowest(finished: Outcome) -> None:
    told = line("captions", {"one": None, "two": gap(-0.1, 1.0)})
    for unit, said in (("nats per token", "two has the lowest captions, .400"), ("accuracy", "one has the highest")):
        assert said in outcome_with(finished, replace(told, unit=unit), seeds=(0,)).advice[0]


def test_further_figures_stand_on_the_page(finished: Outcome) -> None:
    task = line("captions", {"one": None, "two": gap(0.1, 1.0)})
    cells = {**task.cells, "one": replace(task.cells["one"], besides={"CIDEr & more": 1.25})}
    text = page.render(outcome_with(finished, replace(task, cells=cells)))
    assert page_checks.faults(text) == [] and "Further figures" not in page.render(finished)
    told = text.split("Further figures of the benchmarks")[1].split("<tbody>")[1].split("</tbody>")[0]
    assert re.sub("<[^>]*>", " ", told).split() == ["CIDEr", "&amp;", "more", "captions", "1.25", "·"]


def test_words_come_after_holm_over_both_families(finished: Outcome) -> None:
    mean = line("mean", {"a": None, "b": gap(0.1, 0.01), "c": gap(0.1, 0.03)})
    task = line("t", {"a": None, "b": gap(0.1, 0.01), "c": gap(-0.1, 0.001)})
    other = line("u", {"a": None, "b": gap(0.1, 0.2), "c": gap(0.1, 0.2)})
    found = outcome_with(finished, mean, task, other)
    assert [cell.adjusted for cell in found.mean.cells.values()] == [None, pytest.approx(0.04), pytest.approx(0.06)]
    assert [cell.verdict for cell in found.mean.cells.values()] == [None, "better", "not decided"]
    assert [cell.verdict for cell in found.lines[0].cells.values()] == [None, "not decided", "worse"]
    assert "Take b" in found.advice[0] and "c the data do not decide" in found.advice[0]
    assert any("c is worse than a in “t”" in sentence for sentence in found.advice)


def test_a_task_that_is_the_mean_is_tested_and_shown_once(finished: Outcome) -> None:
    only = line("t", {"one": None, "two": gap(0.1, 0.02)})
    part = line("t without yes/no", {"one": None, "two": gap(0.1, 0.02)})
    found = outcome_with(finished, only, only, part)
    assert [each.cells["two"].adjusted for each in (found.mean, *found.lines)] == [pytest.approx(0.04)] * 3
    assert [each.label for each in found.table] == ["t", "t without yes/no"]
    assert markdown(json.loads(json.dumps(found.plain()))).splitlines().count("| joint | t | t without yes/no |") == 1
    assert len(re.findall('<th scope="col"[^>]*>t<small>', page.render(found))) == 1


def test_items_that_were_not_scored_leave_it_open(finished: Outcome) -> None:
    found = outcome_with(finished, line("mean", {"a": None, "b": gap(0.4, 1e-6)}, unscored=1))
    assert found.mean.cells["b"].verdict == "not decided"
    assert "1 answers of a joint were not scored, which could decide it either way" in found.advice[0]


def test_names_of_tasks_that_have_commas_are_told_apart(finished: Outcome) -> None:
    lines = [line(task, {"a": None, "b": gap(-0.4, 1e-6)}) for task in ("mean", "easy-VQA, official test", "presence")]
    found = outcome_with(finished, *lines)
    assert "Task by task: b is worse than a in “easy-VQA, official test” and “presence”." in found.advice


def test_one_seed_is_said_to_decide_nothing(finished: Outcome) -> None:
    found = outcome_with(finished, line("mean", {"a": None, "b": gap(0.4, 1.0)}), seeds=(0,))
    assert found.advice[0].startswith("The data do not decide: every joint was trained once")


def test_what_is_worse_is_not_recommended(finished: Outcome) -> None:
    found = outcome_with(finished, line("mean", {"a": None, "b": gap(-0.4, 1e-6)}))
    assert found.advice[0] == "Keep a: no joint is better over all tasks. b is worse than a."


# ---------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Tags with their attributes; refuses unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_one_sound_file_that_can_be_read_aloud(finished: Outcome, place: Path) -> None:
    text = (place / "comparison" / "compare.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert page_checks.faults(text) == []
    assert parsed.open == [] and not {"script", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    assert all((image["src"] or "").startswith("data:image/") and image.get("alt") for image in parsed.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in parsed.all("svg"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) >= 6
    assert all(head.get("scope") in ("col", "row") for head in parsed.all("th"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and {"quality", "learning-rates", "do-the-settings-match"} <= set(ids)
    assert {each.get("aria-labelledby") for each in parsed.all("section")} <= set(ids)
    assert "url(" not in text and "@import" not in text and "http" not in text.split("Attribution")[0]
    assert [tag for tag, _ in parsed.tags].count("h1") == 1
    for run in finished.runs:
        assert run.fingerprint in text and run.data_hash in text


def test_what_is_near_enough_counts_as_a_match(finished: Outcome) -> None:
    near = Setting("trained parameters", {"one": "4.8 k, rank 6", "two": "5.1 k, rank 9"}, "within 5% of 5 k")
    shown = replace(finished, settings=(near, replace(near, name="other", within="")))
    row, other = page.render(shown).split('<th scope="row">trained parameters</th>')[1].split("<tr>")[:2]
    assert '<td class="match">within 5% of 5 k</td>' in row and "4.8 k, rank 6" in row and "5.1 k, rank 9" in row
    assert '<td class="differ">differs</td>' in other
    assert advice(shown)[-1].startswith("Settings differ in other:")
    assert "- trained parameters: within 5% of 5 k. `one`: 4.8 k, rank 6; `two`: 5.1 k" in markdown(shown.plain())


def test_names_are_shown_as_text(finished: Outcome) -> None:
    evil = replace(finished, title="<script>alert(1)</script>", about=dict.fromkeys(finished.names, "<b>&"))
    assert "script" not in {tag for tag, _ in Page(page.render(evil)).tags}


def test_the_json_has_what_the_page_has(finished: Outcome, place: Path) -> None:
    tree = json.loads((place / "comparison" / "compare.json").read_text())
    assert tree["names"] == ["one", "two"] and tree["mean"]["cells"]["two"]["verdict"] == "not decided"
    for name, cost in finished.costs.items():
        assert tree["costs"][name]["trained"] == cost.trained > 0
        assert tree["costs"][name]["speed"]["prefill"] > 0 and cost.training > 0 and cost.memory > 1e8
    assert {run["fingerprint"] for run in tree["runs"]} == {run.fingerprint for run in finished.runs}


def test_markdown_is_written_from_the_json(finished: Outcome, place: Path) -> None:
    text = markdown(json.loads((place / "comparison" / "compare.json").read_text()))
    assert text.startswith("# 2 joints compared") and finished.advice[0] in text
    row = next(row for row in text.splitlines() if row.startswith("| `two` |"))
    assert f"{finished.mean.cells['two'].level.value:.3f}".removeprefix("0") in row
    assert text.count("| `one` | ") == 4  # quality, cost and two runs


def test_names_with_bars_break_no_row(finished: Outcome) -> None:
    text = markdown(json.loads(json.dumps(finished.plain()).replace('"two"', '"a|b"')))
    rows = [row for row in text.splitlines() if "a\\|b" in row]
    assert len(rows) == 4  # quality, cost and two runs
    for row in rows:
        table = text[: text.index(row)].split("\n\n")[-1].splitlines()
        assert len(re.split(r"(?<!\\)\|", row)) == len(re.split(r"(?<!\\)\|", table[0]))


def test_the_terminal_shows_every_joint(finished: Outcome) -> None:
    quality, costs = tables(finished)
    assert quality.row_count == costs.row_count == 2 and len(quality.columns) == 2 + len(TASKS)
