"""Measuring a model: every task of a recipe under every condition that it asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from isthmus.config import TaskConfig
from isthmus.data.choices import ROUND
from isthmus.data.collate import Look
from isthmus.evaluation import fewshot, prose, tasks
from isthmus.evaluation.answers import CALIBRATED_RULE, Prediction
from isthmus.evaluation.controls import CONTROLS
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.results import Column
from isthmus.evaluation.score import BATCH, Scorer
from isthmus.evaluation.tasks import Free, Task
from isthmus.model import VLM
from isthmus.prepare.tags import Tagger
from isthmus.speakers.local import Local
from isthmus.types import ConfigError, Sample

Measured: TypeAlias = dict[str, tuple[Task, dict[Column, list[Prediction]]]]
"""Per task name: the task, and its predictions by column of the result table."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is measured, and how many of how many items are done."""


def build(configs: Sequence[TaskConfig], seed: int) -> list[tuple[Task, TaskConfig]]:
    """The tasks, with the items that the seed draws.

    Raises:
        ConfigError: two tasks have one name, under which predictions and rows are kept; or see `fewshot.build`.
    """
    built = [(_build(config, seed), config) for config in configs]
    names = [task.name for task, _ in built]
    if again := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"several tasks are named {', '.join(sorted(again))}: one would overwrite the other's predictions",
            "leave one out, or measure it into a folder of its own",
        )
    return built


def _build(config: TaskConfig, seed: int) -> Task:
    """One task, with tags beside its pictures where its options ask for them.

    Raises:
        ConfigError: a set that it names asks for tags, too; or see `build`.
    """
    if "tags" not in config.options:
        return fewshot.build(config, seed)
    if twice := [name for name in ("data", "of") if _tagged(config.options.get(name))]:
        raise ConfigError(
            f"task {config.name}: options.tags and options.{twice[0]}.tags would both put tags beside its pictures",
            "leave one of them out; options.tags are for questions and demonstrations alike",
        )
    rest = {name: value for name, value in config.options.items() if name != "tags"}
    tagger = Tagger.of(config.options["tags"], f"task {config.name}")
    return fewshot.build(config.but(options=rest), seed, tagger)


def _tagged(source: Any) -> bool:
    """Whether a set that options name asks for tags itself."""
    return bool(source.get("tags") if isinstance(source, Mapping) else getattr(source, "tags", None))


def measure(
    model: VLM,
    built: Sequence[tuple[Task, TaskConfig]],
    seed: int,
    folder: Path,
    *,
    column: Column = "after",
    look: Look | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> Measured:
    """Predictions of every task, and of its controls where `column` is `after`.

    Args:
        folder: where predictions are kept, below a folder named after the column; complete ones are reused.
        settings: what else the answers depend on, above all which weights these are.
        batch_size: prompts per forward.
    """
    scorer = Scorer(model, look, batch_size=batch_size)
    found: Measured = {}
    for task, config in built:
        speaker = Local(model, look, max_new_tokens=task.longest)
        scorer.reply = _reply(speaker)
        asked_so = {"dtype": str(model.dtype), "batch": batch_size, **_how(speaker, task), **(settings or {})}
        runs: dict[Column, list[Prediction]] = {}
        for name, (control, asked) in conditions(model, task, config, column).items():
            advance = advancing(f"{task.name} {name}", len(asked.items), progress)
            with arithmetic_of(model):
                runs[name] = tasks.run(
                    asked,
                    scorer,
                    control=control,
                    folder=folder / column,
                    settings=asked_so,
                    seed=seed,
                    advance=advance,
                )
        found[task.name] = task, runs
    return found


def some(task: Task, limit: int | None) -> Task:
    """The task with at most `limit` of its items, the same ones for every seed and in their order.

    It stays whole where scores depend on all items together, or an item is asked in several rounds.
    """
    whole = not task.divisible or any(ROUND in item.prompt.id for item in task.items)
    if limit is None or limit >= len(task.items) or whole:
        return task
    return replace(task, items=tuple(task.items[place] for place in drawn(len(task.items), limit)))


def check_exchanges(built: Sequence[tuple[Task, TaskConfig]]) -> None:
    """Whether the pictures of every task that asks for it can be exchanged: better now than after training.

    Raises:
        DataError: they cannot.
    """
    for task, config in built:
        if asked := controlled(task, config).get("shuffled"):
            CONTROLS["shuffled"]([item.prompt for item in asked.items], 0)


def rules(built: Sequence[tuple[Task, TaskConfig]]) -> str:
    """How items are scored, with the names of tasks where there are several rules."""
    names: dict[str, list[str]] = {}
    for task, _ in built:
        names.setdefault(task.rule, []).append(task.name)
    told = [*names] if len(names) < 2 else [f"{', '.join(of)}: {rule}" for rule, of in names.items()]
    if any(task.cosine for task, _ in built):
        told.append(CALIBRATED_RULE)
    return "; ".join(told)


def conditions(
    model: VLM, task: Task, config: TaskConfig, column: Column
) -> dict[Column, tuple[tasks.Control | None, Task]]:
    """What is measured of a task under `column`: by column of the table, the control and the items that are asked."""
    if column != "after":
        return {column: (None, some(task, config.baseline_limit))}
    found: dict[Column, tuple[tasks.Control | None, Task]] = {column: (None, task)}
    found |= {control: (control, asked) for control, asked in controlled(task, config).items()}
    if task.cosine and model.aligner.splices and has_media(task):  # elsewhere vectors are not in the words' space
        found["cosine"] = "cosine", task
    return found


def controlled(task: Task, config: TaskConfig) -> dict[tasks.Control, Task]:
    """The controls that a task is measured under, each with the items that it asks; none where no item has media."""
    return dict.fromkeys(config.controls, some(task, config.baseline_limit)) if has_media(task) else {}


def has_media(task: Task) -> bool:
    """Whether any item shows something."""
    return any(item.prompt.media for item in task.items)


def measure_alone(
    model: VLM,
    built: Sequence[tuple[Task, TaskConfig]],
    seed: int,
    folder: Path,
    *,
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> Measured:
    """Predictions of tasks on text by the model's LLM without a joint and before any training, as `before`.

    Raises:
        ConfigError: the LLM cannot be found.
        IsthmusError: its weights are not those that the model was trained on.
    """
    scorer = prose.alone(model, model.dtype, batch_size)
    settings = {"dtype": str(model.dtype), "batch": batch_size, "alone": model.config.llm}
    found: Measured = {}
    for task, _ in built:
        advance = advancing(f"{task.name} alone", len(task.items), progress)
        with arithmetic_of(model):
            told = tasks.run(task, scorer, folder=folder / "before", settings=settings, seed=seed, advance=advance)
        found[task.name] = task, {"before": told}
    return found


def merge(before: Measured, after: Measured) -> Measured:
    """Both measurements under one roof, columns in the table's order."""
    return {name: (task, {**before.get(name, (task, {}))[1], **runs}) for name, (task, runs) in after.items()}


def _how(speaker: Local, task: Task) -> dict[str, Any]:
    """How a task is asked: the hash of what writes prompts, how pictures are prepared, how replies are decoded."""
    processor = speaker.model.processor
    template = json.dumps([processor.template, processor.system, processor.chat_template]).encode()
    found: dict[str, Any] = {"template": hashlib.sha256(template).hexdigest()[:12]}
    if has_media(task):
        found["pictures"] = {"aspect": processor.aspect, **json.loads(processor.image_processor.to_json_string())}
    if isinstance(task, Free):
        found["decoding"] = speaker.decode
    return found


def _reply(speaker: Local) -> Callable[[Sequence[Sample]], list[str | None]]:
    def reply(samples: Sequence[Sample]) -> list[str | None]:
        return list(speaker.say_all(samples))

    return reply


def arithmetic_of(model: VLM) -> Any:
    """bfloat16 base parts and float32 joints meet under autocast, as they did in training."""
    if model.dtype == torch.bfloat16:
        return torch.autocast(model.device.type, torch.bfloat16)
    return nullcontext()


def advancing(what: str, total: int, progress: Progress | None) -> Callable[[int], None] | None:
    """Counts the items of one condition for `progress`."""
    if progress is None:
        return None
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, total)

    progress(what, 0, total)
    return advance
