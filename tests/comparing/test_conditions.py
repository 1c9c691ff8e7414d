"""What runs were done in and on: their own notes are asked, and whatever differs among them is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from comparing_runs import TASKS, recipes, small
from isthmus.comparing import compare, gather
from isthmus.comparing import plan as plans
from isthmus.comparing.plan import Common, Job, Plan
from isthmus.comparing.settings import Setting
from isthmus.config import Recipe

HERE = "AMD EPYC 9654 96-Core Processor, 1 threads, cpu"
CPU = torch.device("cpu")


def group(folder: Path, **joints: Sequence[tuple[str, str]]) -> gather.Group:
    """Runs of which nothing but arithmetic and machine are known, seed by seed."""
    found = {}
    for name, runs in joints.items():
        found[name] = [
            Job(Recipe(name=name, seed=seed), folder / name / f"seed{seed}", name) for seed in range(len(runs))
        ]
        for job, (dtype, machine) in zip(found[name], runs):
            job.folder.mkdir(parents=True)
            (job.folder / "run.json").write_text(json.dumps({"dtype": dtype}))
            (job.folder / "report.json").write_text(json.dumps({"method": {"machine": machine}}))
    return found


def said(found: gather.Group) -> dict[str, Setting]:
    return {setting.name: setting for setting in gather.conditions(found)}


def test_one_run_in_other_arithmetic_is_said(tmp_path: Path) -> None:
    same, other = ("float32", HERE), ("bfloat16", HERE)
    found = group(tmp_path, one=[same, same], two=[same, other])
    row = said(found)["arithmetic"]
    assert not row.matches
    assert row.values == {"one": "float32", "two": "float32 (seed 0) and bfloat16 (seed 1)"}
    assert said(found)["machine"].matches and said(found)["threads"].matches
    told = gather.method(found)
    assert told["arithmetic"].startswith("float32 (3 of 4 runs) and bfloat16 (1 of 4 runs) base parts")
    assert told["machine"] == HERE
    alike = group(tmp_path / "alike", one=[other], two=[other])
    assert said(alike)["arithmetic"].matches and gather.method(alike)["arithmetic"].startswith("bfloat16 base parts")


@pytest.mark.parametrize(
    "other",
    [
        "AMD EPYC 9654 96-Core Processor, 2 threads, cpu",
        "Intel(R) Xeon(R) Platinum 8480+, 1 threads, cpu",
        "AMD EPYC 9654 96-Core Processor, 1 threads, cuda: NVIDIA H200",
        "AMD EPYC 9654 96-Core Processor, 1 threads, cuda: NVIDIA A100-SXM4-80GB",
    ],
)
def test_runs_on_other_hardware_differ(tmp_path: Path, other: str) -> None:
    base = other.replace("A100-SXM4-80GB", "H200") if "A100" in other else HERE
    found = group(tmp_path, one=[("float32", base)], two=[("float32", other)])
    assert [name for name, row in said(found).items() if not row.matches] == [
        "threads" if "2 thr" in other else "machine"
    ]
    assert other in gather.method(found)["machine"] and "1 of 2 runs" in gather.method(found)["machine"]
    assert gather.machine_of(found["two"][0].folder / "report.json").kind == other.split(", ")[2].split(":")[0]


@pytest.mark.parametrize(
    ("machines", "match", "near"),
    [
        (("x86_64, 1 threads, cpu", "x86_64, 1 threads, cpu"), True, True),
        (("x86_64, 1 threads, cpu", HERE), True, True),
        (("x86_64, 1 threads, cpu", "aarch64, 1 threads, cpu"), False, False),
        (("x86_64, 1 threads, cpu", "AMD EPYC, 1 threads, cuda: NVIDIA H200"), False, False),
        (("AMD EPYC, 1 threads, cuda", "AMD EPYC, 1 threads, cuda: NVIDIA H200"), True, True),
        ((HERE, HERE), True, False),
    ],
)
def test_reports_that_name_no_model_match_as_far_as_they_tell(
    tmp_path: Path, machines: tuple[str, str], match: bool, near: bool
) -> None:
    first, second = ([("float32", machine)] for machine in machines)
    row = said(group(tmp_path, one=first, two=second))["machine"]
    assert (row.matches, "as far as the runs tell" in row.within) == (match, near)


# ---------------------------------------------------------------------------------------------- one arithmetic for all


def answers(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """What the machine says, one time after another."""
    said = iter(dtypes)
    monkeypatch.setattr(plans, "arithmetic", lambda name, device: next(said))


@pytest.mark.usefixtures("embedded")
def test_auto_is_asked_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_carry_out", lambda *asked: None)
    monkeypatch.setattr(compare, "write", lambda outcome, folder: None)
    answers(monkeypatch, torch.float32, torch.bfloat16)  # and a third time would fail
    one, two = (recipe.but(dtype="auto") for recipe in recipes(tmp_path))
    folder = tmp_path / "comparison"
    for dtype in ("float32", "bfloat16"):  # nothing has begun yet
        small(tmp_path, one, two)
        plan = plans.read(folder)
        assert plan is not None and plan.common.dtype == dtype
    (folder / "one" / "seed0").mkdir(parents=True)
    (folder / "one" / "seed0" / "run.json").touch()
    small(tmp_path, one, two, one.but(name="three"), one.but(name="four", dtype="float32"), seeds=3)
    plan = plans.read(folder)
    assert plan is not None and list(plan.recipes) == ["one", "two", "three", "four"]
    jobs = [(job.recipe.name, job.recipe.dtype) for name in plan.recipes for job in jobs_of(plan, folder, name)]
    assert set(jobs) == {("one", "bfloat16"), ("two", "bfloat16"), ("three", "bfloat16"), ("four", "float32")}
    assert all(recipe.dtype == "auto" for recipe in (plan.recipes["one"], plan.recipes["two"]))


def jobs_of(plan: Plan, folder: Path, name: str) -> list[Job]:
    return [plan.trial(folder, name, 1.0), *(plan.run(folder, name, seed) for seed in plan.seeds)]


def test_a_comparison_that_began_with_auto_goes_on_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    one = recipes(tmp_path)[0].but(dtype="auto")
    plan = Plan(recipes={"one": one}, common=Common(eval=TASKS), budget="2-steps", seeds=(0,), baseline="one")
    plan.save(tmp_path)
    tree = json.loads((tmp_path / "plan.json").read_text())
    del tree["common"]["dtype"]  # as it was written then
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    (tmp_path / "one" / "seed0").mkdir(parents=True)
    (tmp_path / "one" / "seed0" / "run.json").touch()
    known = plans.read(tmp_path)
    assert known == plan and known.with_dtype(CPU, tmp_path) == plan
    assert known.run(tmp_path, "one", 0).recipe.fingerprint() == plan.run(tmp_path, "one", 0).recipe.fingerprint()
    assert known.recipe("one").dtype == "auto"
