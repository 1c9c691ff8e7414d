"""What is found out before a comparison's runs: whether all of them can be done, and what its recipes compute."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from isthmus import planning
from isthmus.aligner import JOINTS
from isthmus.comparing import budget
from isthmus.comparing.engine import Engine
from isthmus.comparing.gather import machine_of
from isthmus.comparing.plan import BEGUN, Job, Plan
from isthmus.config import Recipe
from isthmus.costs import Costs, costs
from isthmus.errors import ConfigError, IsthmusError
from isthmus.files import read_note, write_text
from isthmus.objectives import TERMS


@dataclass(frozen=True)
class Place:
    """Where a comparison lies and what it runs on."""

    folder: Path
    device: torch.device
    console: Console


@dataclass(frozen=True)
class Counted:
    """What is known of a recipe by its structure."""

    per_step: list[float]
    """Operations of a step of each stage; none where they cannot be and need not be counted."""
    size: planning.Plan
    picture: Costs


def check_budgets(plan: Plan) -> None:
    """Before anything is counted.

    Raises:
        ConfigError: the budget cannot be read, or some recipe's stages cannot share it.
    """
    for name in plan.recipes:
        recipe = plan.recipe(name)
        budget.apply(recipe, plan.amount, [1.0] * len(recipe.stages))


def check_registered(plan: Plan) -> None:
    """Whether processes of their own find the classes that the recipes name.

    Raises:
        ConfigError: one is registered in this process alone.
    """
    for name in plan.recipes:
        recipe = plan.recipe(name)
        terms = [term.name for stage in recipe.stages for term in stage.objectives]
        for registry, asked in ((JOINTS, [recipe.aligner.name]), (TERMS, terms)):
            if own := [each for each in asked if each in registry.registered]:
                raise ConfigError(
                    f"{name}: the {registry.what} {own[0]!r} is registered in this process alone, "
                    "and each run is a process of its own",
                    'say engine="here", or install its class as an entry point (docs/adding_a_joint.md)',
                )


def counted(plan: Plan, place: Place) -> dict[str, Counted]:
    """What every recipe computes; whatever of it cannot be counted is told here, before anything is trained.

    Raises:
        ConfigError: a recipe cannot be built or counted, or the budget is less than a step of some stage.
    """
    per_step = operations(plan, place)
    if plan.amount.unit == "flops":
        budget.enough([plan.recipe(name) for name in plan.recipes], plan.amount, [*per_step.values()])
    return {
        name: Counted(per_step[name], planning.plan(plan.recipe(name)), _picture(plan.recipe(name)))
        for name in plan.recipes
    }


def _picture(recipe: Recipe) -> Costs:
    try:
        return costs(recipe)
    except (IsthmusError, OSError):
        raise
    except Exception as error:  # whatever a model stumbles over that has no numbers
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"what a picture costs {recipe.name} cannot be counted: {said}",
            "leave this recipe out, or change what of it cannot be counted",
        ) from None


def operations(plan: Plan, place: Place) -> dict[str, list[float]]:
    """What a step of every recipe's stages costs, counted once; nothing where it cannot be and need not be counted."""
    found = {}
    for name in plan.recipes:
        recipe, file = plan.recipe(name), place.folder / name / "operations.json"
        known = read_note(file)
        if known.get("recipe") != recipe.fingerprint():
            place.console.print(f"counting the operations of {name}", highlight=False)
            known = {"recipe": recipe.fingerprint(), "per_step": _counted(recipe, plan.amount.unit == "flops")}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(known))
        found[name] = known["per_step"]
    return found


def _counted(recipe: Recipe, needed: bool) -> list[float]:
    try:
        return budget.operations(recipe)
    except budget.Uncountable:
        if needed:
            raise
        return []


# ---------------------------------------------------------------------------------------------- machines


def check_machine(plan: Plan, place: Place, engine: Engine, per_step: Mapping[str, Sequence[float]]) -> None:
    """Whether what is missing would be done on threads and a device like those of what is there.

    More of them do more in a minute, so that it matters where the budget is in minutes.

    Raises:
        ConfigError: it would not.
    """
    if plan.amount.unit != "minutes" or not any(_missing(plan, place.folder, per_step)):
        return
    there = {machine_of(file) for file in _reports(place.folder)}
    if not there:
        return
    threads = engine.threads()
    others = [known for known in there if (known.threads, known.kind) != (threads, place.device.type)]
    if not others:
        return
    known = others[0]
    raise ConfigError(
        f"the runs in {place.folder} had {_told(known.threads, known.kind)}, and further ones would have "
        f"{_told(threads, place.device.type)}, which do another amount in {plan.amount}",
        f"set OMP_NUM_THREADS, --jobs and --device so that a run has {_told(known.threads, known.kind)}, or compare in "
        "another folder with --out",
    )


def _told(threads: int, kind: str) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'} on {kind}"


def _reports(folder: Path) -> Iterable[Path]:
    notes = (file for pattern in BEGUN for file in folder.glob(f"*/{pattern}"))
    return (report for note in notes if (report := note.with_name("report.json")).is_file())


def _missing(plan: Plan, folder: Path, per_step: Mapping[str, Sequence[float]]) -> Iterable[bool]:
    """Of every recipe, whether something of it is still to be done; nothing is where all its trials diverged."""
    for name in plan.recipes:
        trials = [plan.trial(folder, name, factor, per_step[name]) for factor in plan.factors]
        if not trials or not all(trial.diverged for trial in trials):
            runs = [plan.run(folder, name, seed, 1.0, per_step[name]) for seed in plan.seeds]
            yield not all(map(_over, [*trials, *runs]))


def _over(job: Job) -> bool:
    """Whether a job has ended, at whatever rate."""
    return job.diverged or (job.folder / "report.json").is_file()


# ---------------------------------------------------------------------------------------------- the baseline


def check_baseline(plan: Plan, place: Place, left_out: Mapping[str, str]) -> None:
    """Whether there is something to compare with.

    Raises:
        ConfigError: the baseline is left out.
    """
    if plan.baseline not in left_out:
        return
    lower = "lower its learning rates in a comparison in another folder, with --out"
    others = [name for name in plan.recipes if name not in left_out]
    command = shlex.join(["isthmus", "compare", "--baseline", *others[:1], "--out", str(place.folder)])
    raise ConfigError(
        f"{left_out[plan.baseline]}, and all others are compared with {plan.baseline}",
        f"`{command}` goes on with another baseline; or {lower}" if others else lower,
    )
