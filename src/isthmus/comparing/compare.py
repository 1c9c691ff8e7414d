"""Several recipes under one budget, several seeds each, to one table, `compare.json` and one page.

Everything lies in one folder, `runs/compare/NAME`: the plan, a normal run folder for every recipe and seed, and the
result. What is finished is never done again, so that the same call goes on after any interruption, and a call with more
recipes or seeds extends what is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from rich.console import Console

from isthmus.comparing import gather, page, sizing
from isthmus.comparing import plan as plans
from isthmus.comparing.advice import advice
from isthmus.comparing.budget import shares
from isthmus.comparing.checks import (
    Counted,
    Place,
    check_baseline,
    check_budgets,
    check_machine,
    check_registered,
    counted,
)
from isthmus.comparing.cluster import OnRay
from isthmus.comparing.engine import Engine, Here, Processes, locked
from isthmus.comparing.gather import Quality
from isthmus.comparing.judge import judged
from isthmus.comparing.outcome import Outcome, Rates
from isthmus.comparing.plan import GRID, Common, Job, Plan
from isthmus.comparing.settings import Setting, settings
from isthmus.comparing.speed import Speed, speeds, told
from isthmus.config import Recipe, Source, TaskConfig
from isthmus.errors import ConfigError
from isthmus.evaluation import catalogue
from isthmus.evaluation.measure import build, rules
from isthmus.experiment import credits_of
from isthmus.files import write_text
from isthmus.training import log
from isthmus.training.machine import arithmetic

CLOSE = 0.1
"""How far above the lowest loss of trials another counts as close to it, as a share."""
NOT_FINITE = "a loss or gradient of {} was not finite"


def compare(
    recipes: Sequence[Recipe] = (),
    *,
    out: Path | str,
    add: Sequence[Recipe] = (),
    budget: str = "10m",
    seeds: Sequence[int] | int = 3,
    baseline: str | None = None,
    factors: Sequence[float] = GRID,
    share: float = 0.2,
    parameters: str | None = None,
    sizes: Mapping[str, str] = MappingProxyType({}),
    tasks: Sequence[TaskConfig] | None = None,
    limit: int | None = None,
    data: Sequence[Source] = (),
    overrides: Sequence[str] = (),
    at_once: int = 1,
    engine: Literal["local", "ray", "here"] = "local",
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Outcome:
    """Train, measure and compare recipes on equal terms, or go on with it; writes `compare.json` and `compare.html`.

    Args:
        recipes: with different names; none goes on with those that are planned in `out`.
        out: the comparison's folder.
        add: recipes for a comparison that is planned there already, under its settings.
        budget: of each run, such as `10m`, `2e15flops`, `50k-samples` or `300-steps`.
        seeds: how many, or which.
        baseline: the name of the recipe that all others are compared with; the first by default. What is trained does
            not depend on it, so that another one can be named later.
        factors: what each recipe's learning rates are multiplied by in short trials; empty leaves them alone.
        share: of the budget, for each trial.
        parameters: that each recipe is to train: `6M`, or a recipe's name for as many as that one does.
        sizes: by which field a recipe comes to them, `{"flamingo": "aligner.options.inner"}`; LoRA's rank by default.
        tasks: what is measured; those of the baseline by default.
        limit: items of each task; the tasks' own by default.
        data: in place of that of all stages that train by the language-model loss.
        overrides: dotted assignments to every recipe.
        at_once: how many runs at a time.
        engine: `local` gives each run a process of this machine, `ray` one of a cluster; `here` does all in this very
            process, which is quicker for tiny models.

    Raises:
        ConfigError: recipes do not fit together, or `out` holds another comparison.
        IsthmusError: a run failed; what was finished is kept.
        KeyboardInterrupt: it was interrupted; the same call goes on.
    """
    place = Place(Path(out), torch.device(device), console or Console())
    wanted = plans.read(place.folder)
    if recipes:
        numbers = range(seeds) if isinstance(seeds, int) else seeds
        common = common_of(recipes, baseline, tasks, limit, data, overrides)
        wanted = planned(recipes, common, budget, numbers, baseline, factors, share, parameters)
    if wanted is None:
        raise ConfigError(f"{place.folder} holds no comparison to go on with", "name the recipes to compare")
    check_budgets(wanted)  # what can be refused without the folder is refused before the lock makes it
    with locked(place.folder, lambda text: place.console.print(text, soft_wrap=True)) as lock:
        plan = plans.read(place.folder)
        if plan is None or (recipes and not plans.begun(place.folder)):
            plan = wanted
        elif recipes:
            plan = plans.extended(plan.with_baseline(baseline, wanted.recipes), wanted, place.folder)
        plan = plan.with_recipes(add, place.folder).with_baseline(baseline)
        plan = plan.with_dtype(place.device, place.folder)
        check_budgets(plan)
        plan = plan.with_sizes(sizes)
        plan.check_data(place.folder)
        if engine != "here":
            check_registered(plan)
        structure = counted(plan, place)
        engines: dict[str, Callable[[], Engine]] = {
            "local": lambda: Processes(lock, place.console, str(place.device), at_once),
            "ray": lambda: OnRay(place.console, str(place.device), at_once),
            "here": lambda: Here(place.console, place.device),
        }
        chosen = engines[engine]()
        check_machine(plan, place, chosen, {name: each.per_step for name, each in structure.items()})
        plan.save(place.folder)
        outcome = _carry_out(plan, place, chosen, structure)
    write(outcome, place.folder)
    return outcome


def common_of(
    recipes: Sequence[Recipe],
    baseline: str | None,
    tasks: Sequence[TaskConfig] | None,
    limit: int | None,
    data: Sequence[Source],
    overrides: Sequence[str],
) -> Common:
    """What is made the same for all.

    Raises:
        ConfigError: nothing would be measured, a task is unknown, or the baseline is none of the recipes.
    """
    measured = tuple(tasks if tasks is not None else _named(recipes, baseline).eval)
    if not measured:
        raise ConfigError("the baseline names no task, so that nothing would be measured", "name some with --tasks")
    for task in measured:
        catalogue.named(task.name)
    if limit is not None:
        measured = tuple(task.but(limit=limit) for task in measured)
    return Common(eval=measured, data=tuple(data), overrides=tuple(overrides))


def planned(
    recipes: Sequence[Recipe],
    common: Common,
    amount: str,
    numbers: Sequence[int],
    baseline: str | None,
    factors: Sequence[float],
    share: float,
    parameters: str | None = None,
) -> Plan:
    """The plan of a comparison from what was asked for.

    Raises:
        ConfigError: two recipes have one name, or the baseline is none of them.
    """
    named = {recipe.name: recipe for recipe in recipes}
    if len(named) < len(recipes):
        raise ConfigError("two recipes have one name, under which their runs are kept", "give one another `name`")
    return Plan(
        recipes=named,
        common=common,
        budget=amount,
        seeds=tuple(numbers),
        baseline=_named(recipes, baseline).name,
        factors=tuple(factors),
        share=share,
        parameters=parameters,
    )


def _named(recipes: Sequence[Recipe], name: str | None) -> Recipe:
    """The recipe of that name; the first by default."""
    found = [recipe for recipe in recipes if name in (recipe.name, None)]
    if not found:
        there = ", ".join(recipe.name for recipe in recipes)
        raise ConfigError(f"no recipe is named {name!r}, which should be the baseline", f"there are {there}")
    return found[0]


def _carry_out(plan: Plan, place: Place, engine: Engine, structure: Mapping[str, Counted]) -> Outcome:
    """All that is missing, and then what it says."""
    costs = {name: each.per_step for name, each in structure.items()}
    rates = _rates(plan, place, engine, costs)
    left_out = {name: NOT_FINITE.format("all trials of learning rates") for name in plan.recipes if name not in rates}
    check_baseline(plan, place, left_out)
    group = {
        name: [plan.run(place.folder, name, seed, tried.chosen, costs[name]) for seed in plan.seeds]
        for name, tried in rates.items()
    }
    _run([job for jobs in zip(*group.values()) for job in jobs], place, engine, "runs")
    for name, jobs in group.items():
        if failed := [job.label for job in jobs if job.diverged]:
            left_out[name] = NOT_FINITE.format(", ".join(failed))
    check_baseline(plan, place, left_out)
    for name, why in left_out.items():
        place.console.print(f"{name} is left out: {why}", highlight=False)
    return _outcome(
        plan, place, {name: jobs for name, jobs in group.items() if name not in left_out}, rates, left_out, structure
    )


def _run(jobs: Sequence[Job], place: Place, engine: Engine, title: str) -> None:
    """Do the jobs that are not finished."""
    missing = []
    for job in jobs:
        if job.finished or job.diverged:
            job.lighten()  # it may have ended after its comparison was killed
        else:
            missing.append(job)
    if not missing:
        return
    done = len(jobs) - len(missing)
    with log.counting(place.console, f"{title} of {place.folder}") as progress:
        progress(done, len(jobs))

        def tell(job: Job, outcome: str) -> None:
            nonlocal done
            done += 1
            job.lighten()
            progress(done, len(jobs))
            place.console.print(f"{job.label}: {outcome} ({done} of {len(jobs)} {title})", highlight=False)

        engine(missing, tell)


# ---------------------------------------------------------------------------------------------- before the runs


def _rates(plan: Plan, place: Place, engine: Engine, costs: Mapping[str, list[float]]) -> dict[str, Rates]:
    """Each recipe's learning rates, by the lowest validation loss of short trials that cost all the same."""
    trials = {
        name: {factor: plan.trial(place.folder, name, factor, costs[name]) for factor in plan.factors}
        for name in plan.recipes
    }
    _run([job for jobs in trials.values() for job in jobs.values()], place, engine, "trials of learning rates")
    found = {name: _chosen(jobs) for name, jobs in trials.items()}
    return {name: tried for name, tried in found.items() if tried is not None}


def _chosen(trials: Mapping[float, Job]) -> Rates | None:
    """What a recipe's trials say, by factor.

    Raises:
        ConfigError: they ended well, and none has a validation loss.
    """
    lengths = [len(gather.steps_of(job, job.recipe.stages[-1])) for job in trials.values() if not job.diverged]
    losses = {factor: gather.validation(job) for factor, job in trials.items()}
    if lengths and not any(loss is not None for loss in losses.values()):
        raise ConfigError(
            f"{next(iter(trials.values())).label}: nothing was held out to choose a learning rate by",
            "lengthen max_length, so that held-out samples fit, or leave the rates as they are: --no-search",
        )
    return chosen(losses, min(lengths, default=0))


def chosen(losses: Mapping[float, float | None], steps: int = 0) -> Rates | None:
    """The factor nearest to 1 of those whose loss is within a tenth of the lowest; 1 where nothing was tried.

    None where all diverged. A trial is shorter than what it is for, and the longer the training, the lower the best
    learning rate (Bjorck et al. 2024, arXiv 2409.19913): what gains little in a trial may come apart in a run.
    """
    finite = {factor: loss for factor, loss in losses.items() if loss is not None}
    if not finite:
        return None if losses else Rates(losses, 1.0, steps)
    lowest = min(finite.values())
    close = [factor for factor, loss in finite.items() if loss - lowest <= CLOSE * abs(lowest)]
    return Rates(losses, min(close, key=lambda factor: abs(math.log(factor))), steps)


# ---------------------------------------------------------------------------------------------- after the runs


def _outcome(
    plan: Plan,
    place: Place,
    group: gather.Group,
    rates: Mapping[str, Rates],
    left_out: Mapping[str, str],
    structure: Mapping[str, Counted],
) -> Outcome:
    """All that was found, judged; `left_out` are recipes that are in no table, and why."""
    recipes = {name: jobs[0].recipe for name, jobs in group.items()}
    built = build(plan.common.eval, plan.seeds[0])
    tasks = [task for task, _ in built]
    asked = gather.questions(tasks)
    quality = Quality(gather.answers_of(group, asked), asked, plan.baseline)
    mean, lines = judged(quality.line(quality.primary), [quality.line([question]) for question in quality.asked])
    costs, timed = {}, _timed(plan, place, group)
    for name, jobs in group.items():
        known = structure[name]
        costs[name] = gather.cost(known.size, known.picture, jobs, known.per_step, timed[name])
    runs = tuple(gather.trained(name, job) for name, jobs in group.items() for job in jobs)
    asked_for = plan.amount.value if plan.amount.unit == "flops" else None
    found = Outcome(
        title=" · ".join(recipes) if len(recipes) < 6 else f"{len(recipes) - 1} joints beside {plan.baseline}",
        baseline=plan.baseline,
        names=tuple(recipes),
        about={name: recipe.about for name, recipe in recipes.items()},
        seeds=plan.seeds,
        budget=str(plan.amount),
        mean=mean,
        lines=lines,
        costs=costs,
        left_out=left_out,
        rates={name: tried for name, tried in rates.items() if tried.losses and name in recipes},
        share=plan.share,
        runs=runs,
        settings=(*_sizes(plan, recipes), *gather.conditions(group), *settings(recipes)),
        operations=asked_for,
        contrasts=tuple(found for name in recipes if name != plan.baseline and (found := quality.contrast(name)).items),
        curves=gather.curves(group),
        method={
            "command": plan.command,
            "rule": rules(built),
            **gather.method(group),
            "timing": told(timed),
            "software": ", ".join(f"{name} {version(name)}" for name in ("isthmus", "torch", "transformers")),
        },
        credits=tuple({credit.name: credit for recipe in recipes.values() for credit in credits_of(recipe)}.values()),
    )
    if asked_for is not None:
        found = replace(found, settings=tuple(_excused(plan, recipes, found.settings)))
    return replace(found, advice=advice(found))


def _timed(plan: Plan, place: Place, group: gather.Group) -> dict[str, Speed]:
    """How fast every joint's first model answers, in the arithmetic of the baseline's."""
    models = {name: jobs[0].folder / jobs[0].recipe.last.name / "model" for name, jobs in group.items()}
    dtype = arithmetic(gather.arithmetic_of(group[plan.baseline][0]), place.device)
    with log.counting(place.console, "timing answers") as progress:
        return speeds(
            models, dtype, place.device, {name: place.folder / name / "speed.json" for name in group}, progress
        )


def _excused(plan: Plan, names: Iterable[str], found: Iterable[Setting]) -> Iterator[Setting]:
    """Settings, with lengths that follow from the budget of operations as equal: of stages with like shares of it."""
    parts = dict[str, set[float]]()
    for recipe in map(plan.recipe, names):
        for stage, part in zip(recipe.stages, shares(recipe, "flops")):
            parts.setdefault(f"length of stage {stage.name}", set()).add(round(part, 6))
    for each in found:
        follows = not each.matches and len(parts.get(each.name, ())) == 1
        yield replace(each, within="equal budget of operations") if follows else each


def _sizes(plan: Plan, names: Iterable[str]) -> Iterator[Setting]:
    """How recipes came to train as many parameters as one another, where that was asked for."""
    if plan.parameters is not None:
        yield sizing.setting({name: plan.sizes[name] for name in names}, plan.target)


def write(outcome: Outcome, folder: Path) -> None:
    """`compare.json` and `compare.html`."""
    text = json.dumps(outcome.plain(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "compare.json", text)
    write_text(folder / "compare.html", page.render(outcome))
