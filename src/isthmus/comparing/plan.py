"""Which runs a comparison consists of: recipes, seeds and learning rates under one budget, and a folder for each run.

`runs/compare/NAME/plan.json` keeps the plan; each run lies in `RECIPE/seedN`, each trial of a rate in `RECIPE/rates`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from isthmus.comparing import budget, shown, sizing
from isthmus.comparing.budget import Amount
from isthmus.comparing.settings import named
from isthmus.comparing.sizing import RANK, Size
from isthmus.config import Budget, Engine, Frozen, Recipe, Source, TaskConfig, check
from isthmus.data.sets import content
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.measure import build, check_exchanges
from isthmus.experiment import data_hash
from isthmus.files import remove, write_text
from isthmus.recipes import BOOK
from isthmus.training.machine import arithmetic

TRIAL_SEED = 1_000_003
"""Rates are tried under a seed of their own, so that none of the seeds that count has chosen its rate."""
BEGUN = ("seed*/run.json", "rates/*/run.json")
"""What is in a recipe's folder where a run of it has begun."""
GRID = (1 / 3, 1.0, 3.0)
"""What the rates of a recipe's stages are multiplied by."""


@dataclass(frozen=True)
class Job:
    """One run: what to train, where, and what to call it."""

    recipe: Recipe
    folder: Path
    label: str
    trial: bool = False
    """Whether its losses are all that is wanted of it."""

    @property
    def finished(self) -> bool:
        """Whether its folder holds the report of this very recipe."""
        note = self.folder / "run.json"
        if not (self.folder / "report.json").is_file() or not note.is_file():
            return False
        return bool(json.loads(note.read_text())["fingerprint"] == self.recipe.fingerprint())

    @property
    def diverged(self) -> bool:
        """Whether it is known to end in a number that is not finite."""
        return (self.folder / "diverged").is_file()

    def lighten(self) -> None:
        """Delete what nobody reads of a run that is over: checkpoints, and the models of a trial.

        Checkpoints hold the optimizer's moments, so they are several times what a model takes.
        """
        over = ("checkpoints", "model") if self.trial else ("checkpoints",)
        for folder in (self.folder / stage.name / name for stage in self.recipe.stages for name in over):
            remove(folder)


class Common(Frozen):
    """What is made the same for all recipes."""

    eval: tuple[TaskConfig, ...]
    data: tuple[Source, ...] = ()
    """In place of that of stages that train by the language-model loss; empty leaves all as it is."""
    overrides: tuple[str, ...] = ()
    """Dotted assignments to every recipe, such as `encoder=./mine`."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What `dtype=auto` is in every run; None lets each ask its machine, as in comparisons that began so."""

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these things in place of its own.

        Raises:
            ConfigError: an override does not fit it.
        """
        changed = recipe.override(list(self.overrides)).but(eval=self.eval)
        if changed.dtype == "auto" and self.dtype is not None:
            changed = changed.but(dtype=self.dtype)
        if not self.data:
            return changed
        stages = tuple(
            stage.but(data=self.data) if "lm" in {term.name for term in stage.objectives} else stage
            for stage in changed.stages
        )
        return changed.but(stages=stages)


class Plan(Frozen):
    """A comparison before anything has run."""

    recipes: dict[str, Recipe]
    """As they were given; the first is the baseline unless it is named."""
    common: Common
    budget: str
    seeds: tuple[int, ...]
    baseline: str
    factors: tuple[float, ...] = GRID
    """Of the learning rates; none leaves each recipe its own."""
    share: float = 0.2
    """Of the budget, for each trial of a rate."""
    parameters: str | None = None
    """How many each recipe trains, see `sizing.parse`; None leaves each its own number."""
    sizes: dict[str, Size] = Field(default_factory=dict)
    """What each became for that."""

    @property
    def amount(self) -> Amount:
        return budget.parse(self.budget)

    def recipe(self, name: str) -> Recipe:
        """A recipe as it is compared, its budget still its own."""
        found = self.common.of(self.recipes[name]).but(name=name)
        return self.sizes[name].of(found) if name in self.sizes else found

    def run(self, folder: Path, name: str, seed: int, factor: float = 1.0, per_step: Sequence[float] = ()) -> Job:
        """One run that counts."""
        recipe = budget.apply(scaled(self.recipe(name), factor), self.amount, per_step).but(seed=seed)
        return Job(recipe, folder / name / f"seed{seed}", f"{name}, seed {seed}")

    def trial(self, folder: Path, name: str, factor: float, per_step: Sequence[float] = ()) -> Job:
        """One short run that tries a rate; nothing but its validation loss is measured, at its end at least."""
        amount = self.amount.times(self.share)
        short = budget.apply(scaled(self.recipe(name), factor), amount, per_step, least=True)
        *others, last = short.stages
        last = last.but(evaluate_every=last.evaluate_every or 1.0)
        short = short.but(stages=(*others, last), engine=short.engine.but(forecast=False), seed=TRIAL_SEED, eval=())
        place = folder / name / "rates" / f"x{factor:.3g}"
        return Job(short, place, f"{name}, rates × {factor:.3g}", trial=True)

    @property
    def command(self) -> str:
        """What makes this comparison, where its recipes are in the book: ready for a shell, rates and all.

        A comment tells of recipes that come from files, and of what can be chosen from Python alone: seeds other than
        the first ones, and settings of tasks.
        """
        words = ["isthmus", "compare", *self.recipes, "--budget", self.budget, "--seeds", str(len(self.seeds))]
        words += ["--baseline", self.baseline]
        if self.factors:
            words += ["--grid", ",".join(map(_fraction, self.factors)), "--share", repr(self.share)]
        else:
            words.append("--no-search")
        if self.parameters is not None:
            words += ["--parameters", self.parameters]
        fields = {name: size.by for name, size in self.sizes.items() if size.by != RANK}
        words += [word for name, field in fields.items() for word in ("--size", f"{name}={field}")]
        asked, comments = self.common.eval, []
        if own := [name for name, recipe in self.recipes.items() if name not in BOOK or BOOK[name]() != recipe]:
            comments.append(f"not in the book: {', '.join(own)}, see plan.json")
        if asked != self.recipes[self.baseline].eval:
            limits = {task.limit for task in asked}
            words += ["--tasks", ",".join(dict.fromkeys(task.name for task in asked))]
            words += [word for limit in limits if len(limits) == 1 and limit for word in ("--limit", str(limit))]
            if len(limits) > 1 or any(task != TaskConfig(name=task.name, limit=task.limit) for task in asked):
                comments.append("tasks with settings of their own, see plan.json")
        words += [word for source in self.common.data for word in ("--data", source.name)]
        words += [word for override in self.common.overrides for word in ("--set", override)]
        if self.seeds != tuple(range(len(self.seeds))):
            comments.append(f"seeds {', '.join(map(str, self.seeds))}")
        return shlex.join(words) + (f"  # {'; '.join(comments)}" if comments else "")

    def with_baseline(self, name: str | None, recipes: Collection[str] = ()) -> Plan:
        """With another baseline; None leaves it as it is.

        Args:
            recipes: that are still to come.

        Raises:
            ConfigError: there is no such recipe.
        """
        if name is not None and name not in {*self.recipes, *recipes}:
            there = ", ".join(self.recipes)
            raise ConfigError(f"no recipe is named {name!r}, which should be the baseline", f"there are {there}")
        return self if name is None else self.but(baseline=name)

    def with_dtype(self, device: torch.device, folder: Path) -> Plan:
        """With what that device takes `dtype=auto` for, unless a run in the folder has begun."""
        if begun(folder):
            return self
        dtype = str(arithmetic("auto", device)).removeprefix("torch.")
        return self.but(common=self.common.but(dtype=dtype))

    def with_recipes(self, recipes: Sequence[Recipe], folder: Path) -> Plan:
        """With these recipes beside its own, or in place of one of which nothing has begun in the folder.

        One that differs only in what a comparison puts its own in place of stays as it was planned.

        Raises:
            ConfigError: another recipe has such a name already.
        """
        added = {recipe.name: recipe for recipe in recipes}
        same = {
            name: self.recipes[name].but(engine=recipe.engine) for name, recipe in added.items() if self._has(recipe)
        }
        changed = [name for name in added if name in self.recipes and name not in same]
        if taken := [name for name in changed if begun(folder, name)]:
            raise ConfigError(
                f"{folder} compares another recipe named {taken[0]!r}",
                f"give the new one a `name` of its own, name another folder with --out, or delete "
                f"{folder / taken[0]} to begin anew with it",
            )
        added |= same
        again = self.sizes if self.parameters in changed else changed  # the others' sizes may follow from that one
        sizes = {name: size for name, size in self.sizes.items() if name not in again}
        return self.but(recipes=self.recipes | added, sizes=sizes)

    def _has(self, recipe: Recipe) -> bool:
        """Whether a recipe is planned under its name, apart from what a comparison does not take from it."""
        known = self.recipes.get(recipe.name)
        return known is not None and (known == recipe or self._asked(known) == self._asked(recipe))

    def _asked(self, recipe: Recipe) -> tuple[Recipe, list[float]]:
        """What of a recipe counts here: not its evaluation, seed, engine and length, but its stages' shares of that."""
        own = self.common.of(recipe).but(seed=0, engine=Engine())
        parts = [round(part, 9) for part in budget.shares(own, self.amount.unit)]
        return own.but(stages=tuple(stage.but(budget=Budget(steps=1)) for stage in own.stages)), parts

    @property
    def target(self) -> int:
        """Parameters that each recipe is to train, where they are to be equal.

        Raises:
            ConfigError: see `sizing.parse`.
        """
        assert self.parameters is not None  # its callers ask
        return sizing.parse(self.parameters, {name: self.recipe(name) for name in self.recipes})

    def with_sizes(self, fields: Mapping[str, str]) -> Plan:
        """With a size for every recipe that has none yet, where trained parameters are to be equal.

        Args:
            fields: what some recipes are sized by, see `Size.by`.

        Raises:
            ConfigError: a recipe cannot have that size, or has been sized by another field.
        """
        if fields and self.parameters is None:
            raise ConfigError("--size is told, and no --parameters", "say how many parameters each recipe is to train")
        for name, field in fields.items():
            if name not in self.recipes:
                raise ConfigError(
                    f"no recipe is named {name!r}, whose size is told", f"there are {', '.join(self.recipes)}"
                )
            if name in self.sizes and self.sizes[name].by != field:
                raise ConfigError(
                    f"{name} has been sized by {self.sizes[name].by}, not by {field}", "compare in another folder"
                )
        missing = [] if self.parameters is None else [name for name in self.recipes if name not in self.sizes]
        if not missing:
            return self
        target = self.target
        found = {name: sizing.solve(self.recipe(name), target, fields.get(name, RANK)) for name in missing}
        return self.but(sizes=self.sizes | found)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", self.model_dump_json(indent=1))

    def check_data(self, folder: Path) -> None:
        """Whether data and items are still those of the runs that have begun; `data.json` keeps what they are.

        Raises:
            ConfigError: something has changed.
            DataError: something cannot be read, or a task's pictures cannot be exchanged.
        """
        file, now = folder / "data.json", self._stamps()
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        changed = [what for what, digits in now.items() if known.get(what, digits) != digits]
        if changed and begun(folder):
            raise ConfigError(
                f"{changed[0]} is not what the runs in {folder} had",
                "put it back as it was, or compare in another folder",
            )
        for stale in folder.glob("*/operations.json") if changed else ():
            stale.unlink()
        write_text(file, json.dumps(known | now, indent=1))

    def _stamps(self) -> dict[str, str]:
        """What is trained on and what is asked, each with digits that change with its content, pictures apart."""
        seed, built = self.seeds[0], build(self.common.eval, self.seeds[0])
        check_exchanges(built)
        tasks = [task for task, _ in built]
        found: dict[str, str | None] = {"what is asked": data_hash(tasks)}
        found["what is asked about"] = shown.digits([item.prompt for task in tasks for item in task.items])
        for source in (source for name in self.recipes for stage in self.recipe(name).stages for source in stage.data):
            if named(source) not in found:
                found[named(source)] = content(source.but(weight=1.0), seed)
                found[f"what {named(source)} shows"] = shown.of(source, seed)
        return {what: digits for what, digits in found.items() if digits is not None}


def _fraction(factor: float) -> str:
    """1/3 rather than 0.3333, where that is the very same number."""
    near = Fraction(factor).limit_denominator(1000)
    return str(near) if float(near) == factor else repr(factor)


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with every learning rate multiplied."""
    stages = tuple(
        stage.but(
            lr=stage.lr * factor,
            train={glob: how if how.lr is None else how.but(lr=how.lr * factor) for glob, how in stage.train.items()},
        )
        for stage in recipe.stages
    )
    return recipe.but(stages=stages)


def begun(folder: Path, name: str | None = None) -> bool:
    """Whether a run of that recipe has begun in a comparison's folder, or any at all."""
    places = folder.glob("*") if name is None else [folder / name]
    return any(True for place in places for pattern in BEGUN for _ in place.glob(pattern))


def read(folder: Path) -> Plan | None:
    """The plan that a folder holds.

    Raises:
        DataError: it cannot be read.
    """
    file = folder / "plan.json"
    if not file.is_file():
        return None
    try:
        return check(Plan, json.loads(file.read_text(encoding="utf-8")), str(file))
    except (ValueError, ConfigError) as error:
        raise DataError(f"{file}: cannot be read ({error})", "name another folder with --out") from None


def extended(known: Plan, wanted: Plan, folder: Path) -> Plan:
    """What was planned before with the recipes and seeds that are new; all else has to be the same.

    Raises:
        ConfigError: a setting was another one, or see `Plan.with_recipes`.
    """
    fixed: dict[str, tuple[Any, Any]] = {
        "budget": (known.budget, wanted.budget),
        "baseline": (known.baseline, wanted.baseline),
        "grid of learning rates": (known.factors, wanted.factors),
        "share of the trials": (known.share, wanted.share),
        "evaluation": (known.common.eval, wanted.common.eval),
        "data": (known.common.data, wanted.common.data),
        "override": (known.common.overrides, wanted.common.overrides),
        "number of trained parameters": (known.parameters, wanted.parameters),
    }
    if other := [name for name, (before, now) in fixed.items() if before != now]:
        remedy = (
            f"name the one that all others are compared with: --baseline {known.baseline} as before, or another"
            if other == ["baseline"]
            else f"name another folder with --out, or name no recipe to go on with it as it was, or delete {folder} to "
            "begin anew"
        )
        raise ConfigError(f"{folder} holds a comparison with another {', '.join(other)}", remedy)
    both = known.with_recipes(list(wanted.recipes.values()), folder)
    return both.but(seeds=tuple(dict.fromkeys((*known.seeds, *wanted.seeds))))
