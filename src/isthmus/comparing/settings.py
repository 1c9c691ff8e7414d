"""What is the same for all recipes of a comparison, and what is not: said beside every result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.config import LoRA, ObjectiveConfig, Recipe, Source, Stage, Train


@dataclass(frozen=True)
class Setting:
    """One thing that should be equal, and what each recipe has; equal ones have one value."""

    name: str
    values: Mapping[str, str]
    within: str = ""
    """How near values that are not alike are, where that counts as equal."""

    @property
    def matches(self) -> bool:
        return bool(self.within) or len(set(self.values.values())) == 1


def settings(recipes: Mapping[str, Recipe]) -> tuple[Setting, ...]:
    """Everything that a fair comparison keeps equal, and at last what trains, which often is each joint's own.

    What belongs to a stage is compared among the recipes that have a stage of that name.
    """
    whole = [Setting(name, {own: of(recipe) for own, recipe in recipes.items()}) for name, of in ASKED.items()]
    trains = Setting("what trains", {own: _trains(recipe) for own, recipe in recipes.items()})
    return (*whole, *_of_stages(recipes), trains)


def _of_stages(recipes: Mapping[str, Recipe]) -> Iterator[Setting]:
    names = dict.fromkeys(stage.name for recipe in recipes.values() for stage in recipe.stages)
    for name in names:
        owners = {own: stage for own, recipe in recipes.items() for stage in recipe.stages if stage.name == name}
        if len(owners) > 1:
            for asked, of in ASKED_OF_STAGES.items():
                yield Setting(f"{asked} of stage {name}", {own: of(stage) for own, stage in owners.items()})


def _trains(recipe: Recipe) -> str:
    """The globs of every stage and how they train, rates aside; stages that train the same are told together."""
    told: dict[str, list[str]] = {}
    for stage in recipe.stages:
        globs = ", ".join(f"`{glob}` ({_how(how)})" for glob, how in stage.train.items())
        told.setdefault(globs, []).append(stage.name)
    return "; ".join(f"{' and '.join(names)}: {globs}" for globs, names in told.items())


def _how(how: Train) -> str:
    mode = [f"LoRA of rank {how.mode.r}", *_options(how.mode)] if isinstance(how.mode, LoRA) else [how.mode]
    every = ", of biases and norms too" if how.decay_all else ""
    decay = [f"weight decay {how.weight_decay:g}{every}"] if how.weight_decay else []
    return ", ".join([*mode, *decay])


def _options(how: LoRA) -> Iterator[str]:
    """What of LoRA differs from its defaults, beside the rank."""
    for name, value in how.model_dump(exclude_defaults=True, exclude={"r"}).items():
        yield name if value is True else f"{name} {value:g}"


def _encoder(recipe: Recipe) -> str:
    return "; ".join(f"{kind}: {_told(config)}" for kind, config in recipe.encoders.items())


def _told(value: Any) -> str:
    """The fields of a part that differ from their defaults, without inlined architectures."""
    fields = value.model_dump(mode="json", exclude_defaults=True, exclude={"architecture"})
    source = fields.pop("source", value.source)
    rest = ", ".join(
        f"{name} {field if isinstance(field, str) else json.dumps(field)}" for name, field in fields.items()
    )
    return f"{source} ({rest})" if rest else str(source)


def _data(stage: Stage) -> str:
    mixing = f", sizes to the power {stage.mixing:g}" if stage.mixing else ""
    return ", ".join(f"{named(source)} × {source.weight:g}" for source in stage.data) + mixing


def named(what: Source | ObjectiveConfig) -> str:
    """A source or a term of the loss, with what differs from its defaults; its weight is told apart."""
    more = what.model_dump(mode="json", exclude_defaults=True, exclude={"name", "weight"})
    told = json.dumps(more, sort_keys=True).replace('"', "")[1:-1]
    return f"{what.name} ({told})" if told else what.name


def _rows(stage: Stage) -> str:
    media = "" if stage.max_media is None else f", {stage.max_media} media"
    after = ", learnt from the first picture on" if stage.after_media else ""
    return f"{stage.template}, {stage.max_length} tokens{media}, {stage.batching}, overlong: {stage.overlong}{after}"


def _schedule(stage: Stage) -> str:
    floor = f" to {stage.floor:g}" if stage.floor else ""
    betas = " and ".join(f"{beta:g}" for beta in stage.betas)
    return f"{stage.schedule}{floor}, warm-up {stage.warmup:g}, clip {stage.clip}, betas {betas}"


def _validated(stage: Stage) -> str:
    return "at its end" if stage.evaluate_every is None else f"after every {stage.evaluate_every:g} of it"


def _length(stage: Stage) -> str:
    return ", ".join(f"{value:g} {unit}" for unit, value in stage.budget.model_dump(exclude_none=True).items())


ASKED: Mapping[str, Callable[[Recipe], str]] = {
    "encoder and its features": _encoder,
    "LLM": lambda recipe: _told(recipe.llm),
    "starts with": lambda recipe: "its parts" if recipe.start is None else recipe.start,
    "system turn": lambda recipe: "the template's" if recipe.system is None else recipe.system or "none",
    "evaluation": lambda recipe: ", ".join(
        f"{task.name}{'' if task.limit is None else f' ({task.limit} items)'}" for task in recipe.eval
    ),
    "stages": lambda recipe: ", ".join(stage.name for stage in recipe.stages),
}
ASKED_OF_STAGES: Mapping[str, Callable[[Stage], str]] = {
    "data": _data,
    "length": _length,
    "samples per step": lambda stage: str(stage.batch_size),
    "template and batching": _rows,
    "schedule": _schedule,
    "loss": lambda stage: " + ".join(f"{term.weight:g} × {named(term)}" for term in stage.objectives),
    "validation": _validated,
}
