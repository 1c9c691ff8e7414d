"""A recipe from its parts to its report: measured before, trained, measured after, written down."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from isthmus import cards, parts, storage
from isthmus.assets import packages
from isthmus.config import Recipe, Source, TaskConfig
from isthmus.data import sets
from isthmus.data.collate import Look
from isthmus.data.media import open_image
from isthmus.evaluation import answers
from isthmus.evaluation import report as reports
from isthmus.evaluation.measure import Measured, build, check_exchanges, conditions, measure, merge, rules
from isthmus.evaluation.results import Column, Credit, Curve, Generation, Part, Report, examples, headline, rows
from isthmus.evaluation.tasks import Task
from isthmus.files import read_note, write_text, writing
from isthmus.forecast import kept, was
from isthmus.model import VLM
from isthmus.planning import count
from isthmus.speakers.local import Local
from isthmus.training import locks, log
from isthmus.training.parallel import World
from isthmus.training.run import Run
from isthmus.types import Image

CPUS = Path("/proc/cpuinfo")
"""Where Linux tells of its processors; Python's `platform` knows no model there."""


@dataclass
class Clock:
    """How long each leg took, added up over interruptions."""

    file: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seconds = read_note(self.file)

    def add(self, leg: str, since: float) -> None:
        self.seconds[leg] = round(self.seconds.get(leg, 0.0) + time.perf_counter() - since, 1)
        with writing(self.file):
            write_text(self.file, json.dumps(self.seconds, indent=1))


def experiment(
    recipe: Recipe,
    folder: str | Path,
    device: torch.device | None = None,
    console: Console | None = None,
    world: World = World(),  # noqa: B008 - frozen
) -> Report | None:
    """Measure, train, measure again and write `report.html` and `report.json`; None if interrupted.

    It is what `isthmus train` does, from Python: `experiment(recipe, "runs/mine")`. What is finished is not done
    again: stages by their models, measurements by their prediction files. Of several processes in a started world the
    first one measures and reports; the others help to train, and return None.

    Args:
        device: where to train; None is an accelerator if there is one.
        console: where progress goes; None is standard output.
    """
    folder = Path(folder)
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with locks.alone(folder, world):
        return _done(Run(recipe, folder, device or torch.device("cpu"), console or Console(highlight=False), world))


def _done(run: Run) -> Report | None:
    """All of that, in a folder that nobody else works in."""
    recipe, folder, console, world = run.recipe, run.folder, run.console, run.world
    model = run.newborn()
    look = run.look(model)
    tasks = build(recipe.eval, recipe.seed)
    check_exchanges(tasks)
    start = time.perf_counter()
    run.fill(look, pictures(task for task, _ in tasks))
    if not world.main:
        run.train(model, look)
        return None
    clock = Clock(folder / "seconds.json")
    clock.add("encoding pictures for the evaluation", start)
    start = time.perf_counter()
    before = _measure(run, model, look, tasks, "before")
    clock.add("measuring before", start)
    if recipe.engine.forecast:
        was.plan(recipe, folder, run.device, console)
    start = time.perf_counter()
    trained = run.train(model, look)
    clock.add("training, with encoding its pictures", start)
    planned = was.compare(folder)
    if trained is None:
        return None
    if planned:
        console.print(was.table(planned))
    start = time.perf_counter()
    after = _measure(run, trained, look, tasks, "after")
    said = free_replies(trained, look, tasks)
    clock.add("measuring after", start)
    result = summarise(run, trained, tasks, merge(before, after), said, clock.seconds)
    reports.write(result, folder)
    if recipe.stages:
        cards.refresh(run.model_of(recipe.stages[-1]))
    return result


def pictures(tasks: Iterable[Task]) -> list[Image]:
    """Every picture that the tasks show."""
    return [picture for task in tasks for item in task.items for picture in item.prompt.pictures]


def _measure(run: Run, model: VLM, look: Look, tasks: list[tuple[Task, TaskConfig]], column: Column) -> Measured:
    """All tasks in one column of the table, with one bar for all."""
    weights = run.recipe.fingerprint()
    if column == "after" and run.recipe.stages:
        weights = storage.fingerprint(run.model_of(run.recipe.stages[-1]))
    with log.counting(run.console, f"measuring {column} training") as advance:
        each: dict[str, tuple[int, int]] = {}
        asked = [each for task, config in tasks for _, each in conditions(model, task, config, column).values()]
        planned = sum(len(each.items) for each in asked)

        def progress(what: str, done: int, total: int) -> None:
            each[what] = done, total
            advance(sum(done for done, _ in each.values()), planned)

        return measure(
            model,
            tasks,
            run.recipe.seed,
            run.folder / "predictions",
            column=column,
            look=look,
            settings={"weights": weights},
            progress=progress,
        )


def free_replies(model: VLM, look: Look, tasks: list[tuple[Task, TaskConfig]], each: int = 2) -> tuple[Generation, ...]:
    """The first pictures of every task, answered in the model's own words."""
    if not tasks:
        return ()
    speaker = Local(model, look, max_new_tokens=24)
    shown = [item for task, _ in tasks for item in task.items[:each] if item.prompt.pictures]
    replies = speaker.say_all([item.prompt for item in shown])
    found = []
    for item, reply in zip(shown, replies):
        picture = open_image(item.prompt.pictures[-1].source, item.prompt.id)
        found.append(Generation(item.words, reply, picture, item.answer))
    return tuple(found)


# ---------------------------------------------------------------------------------------------- the report


def summarise(
    run: Run,
    model: VLM,
    tasks: list[tuple[Task, TaskConfig]],
    measured: Measured,
    said: tuple[Generation, ...],
    seconds: dict[str, float],
) -> Report:
    """Everything that the report says."""
    recipe = run.recipe
    table = tuple(row for task, runs in measured.values() for row in rows(task, runs, recipe.seed))
    return Report(
        title=recipe.about or recipe.name,
        sentence="; ".join(
            f"{row.label} {headline(row.cells['before'])} → {headline(row.cells['after'])}"
            for row in table
            if row.unit == "accuracy" and "before" in row.cells  # some of a small share, that has none of a kind
        ),
        parts=parts_of(recipe, model),
        rows=table,
        curves=tuple(_curve(run.folder / stage.name, stage.name) for stage in recipe.stages),
        fingerprint=recipe.fingerprint(),
        data_hash=data_hash(task for task, _ in tasks),
        seed=recipe.seed,
        revision=f"isthmus {version('isthmus')}, code {kept.code(Path(__file__).parent)[:8]}",
        method={
            "rule": rules(tasks),
            "arithmetic": f"{run.dtype} base parts, float32 for what trains; the same in training and measuring",
            "machine": f"{processor()}, {torch.get_num_threads()} threads, {named(run.device)}",
            "software": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
        },
        seconds=seconds,
        examples=examples(measured, seed=recipe.seed),
        generations=said,
        credits=credits_of(recipe),
    )


def processor() -> str:
    """This machine's processor by its model, or by its kind where nothing tells the model."""
    lines = CPUS.read_text(errors="replace").splitlines() if CPUS.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def named(device: torch.device) -> str:
    """A device, an accelerator with its model: `cuda:0: NVIDIA H200`."""
    model = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(device) if model is None else f"{device}: {model(device)}"


def parts_of(recipe: Recipe, model: VLM) -> tuple[Part, ...]:
    """The model's parts with what was trained of each."""
    size = count(model)
    added = {name: number for name, number in size.items() if "grafts" in name}
    joint = sum(number for name, number in size.items() if name.startswith("connectors"))
    sources = {kind: " + ".join(each.source for each in (one, *one.also)) for kind, one in recipe.encoders.items()}
    found = [Part("encoder", kind, source, size[f"encoders.{kind}"]) for kind, source in sources.items()]
    found.append(Part("joint", recipe.aligner.name, "trained here", joint, joint))
    found.append(Part("llm", recipe.llm.source, recipe.llm.source, size["llm"]))
    found += [Part("adapter", name, "trained here", number, number) for name, number in added.items()]
    return tuple(found)


def data_hash(tasks: Iterable[Task]) -> str:
    """Twelve hex digits over every item's id, conversation with regions, choices and answer."""
    digest = hashlib.sha256()
    for task in tasks:
        for item in task.items:
            digest.update(f"{item.prompt.id}\n{answers.plain(item.prompt)}\n{item.choices}\n{item.answer}\n".encode())
    return digest.hexdigest()[:12]


def credits_of(recipe: Recipe) -> tuple[Credit, ...]:
    """Licences and authors of the data and of embedded models."""
    cards = {card.name: card for stage in recipe.stages for card in map(_card, stage.data)}
    found = [Credit(card.name, "data", card.licence, card.attribution) for card in cards.values()]
    used = {recipe.llm.source, recipe.encoder.source, *(one.source for one in recipe.encoder.also)}
    for name, package in {parts.EMBEDDED_LLM: packages.LLM, parts.EMBEDDED_ENCODER: packages.LITE}.items():
        if name in used:
            found.append(Credit(package.name, "model", package.licence, package.attribution))
    return tuple(found)


def _card(source: Source) -> sets.Card:
    return sets.open_set(source, 0).card


def _curve(folder: Path, stage: str) -> Curve:
    kept = log.read_rows(folder / "metrics.jsonl")
    return Curve(
        stage,
        tuple((row["step"], row["loss"]) for row in kept if "loss" in row),
        tuple((row["step"], row["validation_loss"]) for row in kept if "validation_loss" in row),
    )
