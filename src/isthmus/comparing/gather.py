"""From the folders of finished runs to a comparison's numbers: predictions, logs and reports are read, none made."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from isthmus.comparing.outcome import Cell, Contrast, Cost, Drawn, Line, Machine, Points, Shown, Trained
from isthmus.comparing.plan import Job
from isthmus.comparing.settings import Setting
from isthmus.comparing.speed import Speed
from isthmus.config import Stage
from isthmus.costs import Costs
from isthmus.data.media import open_image
from isthmus.evaluation import answers, seeds
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.drawing import thin
from isthmus.evaluation.results import COLUMNS, Column, Runs, alike, file_of
from isthmus.evaluation.seeds import Gap, Level, Outcomes
from isthmus.evaluation.tasks import Cut, Task
from isthmus.planning import Plan
from isthmus.training.log import read_rows

KINDS = frozenset(
    ("x86_64", "AMD64", "i386", "i686", "aarch64", "arm64", "arm", "armv7l", "ppc64le", "riscv64", "s390x")
)
"""What stands for a processor whose model is not told: reports from Linux told none at first."""
SHOWN = 3
"""Items that are shown of each side of a contrast."""
Group = Mapping[str, Sequence[Job]]
"""The jobs of every joint, seed by seed in one order."""


@dataclass(frozen=True)
class Question:
    """One line of the table to come: a cut of a task."""

    task: Task
    cut: Cut
    first: bool
    """Whether it is its task's first, which the mean is over."""


def questions(tasks: Sequence[Task]) -> list[Question]:
    """The lines of the table, in order."""
    found = []
    for task in tasks:
        cuts = [cut for cut in task.cuts if any(cut.takes(item.kind) for item in task.items)]
        found += [Question(task, cut, cut is cuts[0]) for cut in cuts]
    return found


def predictions(folder: Path, task: Task) -> dict[Column, list[Prediction]]:
    """A run's answers to a task under every condition that was measured."""
    places = {column: file_of(folder / "predictions", task.name, column) for column in COLUMNS}
    return {column: answers.read(place)[1] for column, place in places.items() if place.is_file()}


# ---------------------------------------------------------------------------------------------- quality


Answers = Mapping[str, Mapping[str, Sequence[Runs]]]
"""By joint and task, seed by seed: predictions under every condition."""


def answers_of(group: Group, asked: Sequence[Question]) -> Answers:
    """All predictions of finished jobs.

    Raises:
        DataError: a file cannot be read.
    """
    tasks = {question.task.name: question.task for question in asked}.values()
    return {
        name: {task.name: [predictions(job.folder, task) for job in jobs] for task in tasks}
        for name, jobs in group.items()
    }


class Quality:
    """Makes the lines of the table from answers.

    Args:
        answered: of all joints to the same tasks under as many seeds.
        asked: the lines; those that a run has no items of are left out.
        baseline: the joint that all others are compared with.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """

    def __init__(
        self,
        answered: Answers,
        asked: Sequence[Question],
        baseline: str,
        seed: int = 0,
        draws: int = seeds.DRAWS,
    ):
        self.answers, self.baseline = answered, baseline
        self.asked = [question for question in asked if self._answered(question)]
        self.seed, self.draws = seed, draws

    @property
    def primary(self) -> list[Question]:
        """What the mean is over: each task's first line, of those that count right answers where there are any."""
        first = [question for question in self.asked if question.first]
        return [question for question in first if question.task.unit == "accuracy"] or first

    def line(self, asked: Sequence[Question]) -> Line:
        """One line: a question, or the mean over several."""
        one = asked[0]
        cells = {name: self._cell(name, asked) for name in self.answers}
        sample = [run for question in asked for run in self._runs(self.baseline, question, "after")[:1]]
        sizes = [self._chance(question) for question in asked]
        return Line(
            task=one.task.name if len(asked) == 1 else "mean",
            label=one.cut.label if len(asked) == 1 else f"mean over {len(asked)} tasks",
            unit=one.task.unit,
            items=sum(len(run.ids) for run in sample),
            clusters=sum(len(set(run.clusters)) for run in sample),
            cells=cells,
            chance=None if None in sizes else statistics.mean(size for size in sizes if size is not None),
            paired=all(cell.gap is None or cell.gap.paired for cell in cells.values()),
        )

    def _cell(self, name: str, asked: Sequence[Question]) -> Cell:
        one = asked[0]
        columns = [column for column in COLUMNS if all(self._has(name, question, column) for question in asked)]
        runs = {column: [self._runs(name, question, column) for question in asked] for column in columns}
        levels = {column: self._level(runs[column], one.task.unit) for column in columns}
        unscored = sum(run.unscored for task in runs["after"] for run in task)
        theirs = [self._runs(self.baseline, question, "after") for question in asked]
        looked = [self._runs(name, question, "after", "blind") for question in asked] if "blind" in runs else []
        return Cell(
            level=levels.pop("after"),
            others=levels,
            seen=self._gap(looked, runs["blind"], one.task.unit) if looked else None,
            gap=None if name == self.baseline else self._gap(runs["after"], theirs, one.task.unit),
            unscored=unscored,
            besides=self._besides(name, one) if len(asked) == 1 and not unscored else {},
        )

    def _besides(self, name: str, question: Question) -> dict[str, float]:
        """The task's further figures, the means over seeds, where it is the whole task that is asked."""
        runs = [each["after"] for each in self.answers[name][question.task.name]]
        ids = [item.prompt.id for item in question.task.items]
        if question.cut.kinds is not None or any([one.id for one in run] != ids for run in runs):
            return {}
        found = [question.task.totals(run) for run in runs]
        shared = [key for key in found[0] if all(key in each for each in found)]
        return {key: statistics.mean(each[key].value for each in found) for key in shared}

    def _level(self, tasks: Sequence[seeds.Runs], unit: str) -> Level:
        """With an interval over seeds that stays within what a share can be."""
        found = seeds.level(tasks, seed=self.seed, draws=self.draws)
        if unit != "accuracy" or found.low is None or found.high is None:
            return found
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))

    def _gap(self, ours: Sequence[seeds.Runs], theirs: Sequence[seeds.Runs], unit: str) -> Gap:
        """With an interval over seeds that stays within what a difference of shares can be."""
        found = seeds.gap(ours, theirs, seed=self.seed, draws=self.draws)
        if unit != "accuracy" or found.low is None or found.high is None:
            return found
        return replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))

    def _answered(self, question: Question) -> bool:
        """Whether every run has items of it."""
        return all(self._has(name, question, "after") for name in self.answers)

    def _has(self, name: str, question: Question, column: Column) -> bool:
        """Whether every run has items of it in this column; of those that are asked fewer there may be none."""
        return all(
            any(question.cut.takes(prediction.kind) for prediction in runs.get(column, ()))
            for runs in self.answers[name][question.task.name]
        )

    def _runs(self, name: str, question: Question, column: Column, like: Column | None = None) -> list[Outcomes]:
        """One run per seed; of the items that the column `like` has, too, which may have been asked fewer."""
        found = []
        for runs in self.answers[name][question.task.name]:
            told = runs[column] if like is None else alike(runs[column], runs[like])
            found.append(Outcomes.of([p for p in told if question.cut.takes(p.kind)], question.task.unit))
        return found

    def _chance(self, question: Question) -> float | None:
        sizes = [len(item.choices) for item in question.task.items if question.cut.takes(item.kind)]
        return statistics.mean(1 / size for size in sizes) if all(sizes) else None

    # ------------------------------------------------------------------------------------ item by item

    def contrast(self, name: str) -> Contrast:
        """What this joint had right and the baseline wrong under the first seed, and the other way round.

        Of tasks whose items are scored one by one; a share counts as right from a half on.
        """
        won: list[tuple[Question, int]] = []
        lost: list[tuple[Question, int]] = []
        count = 0
        asked = (each for each in self.primary if each.task.unit == "accuracy" and each.task.divisible)
        for question in asked:
            ours, theirs = (self.answers[each][question.task.name][0]["after"] for each in (name, self.baseline))
            for place, (a, b) in enumerate(zip(ours, theirs)):
                if question.cut.takes(a.kind) and a.id == b.id == question.task.items[place].prompt.id:
                    count += 1
                    won += [(question, place)] * (_had(a) is True and _had(b) is False)
                    lost += [(question, place)] * (_had(b) is True and _had(a) is False)
        dice = random.Random(f"{self.seed} {name}")
        drawn = [(name, place) for place in dice.sample(won, min(SHOWN, len(won)))]
        drawn += [(self.baseline, place) for place in dice.sample(lost, min(SHOWN, len(lost)))]
        shown = tuple(self._shown(name, question, place, right) for right, (question, place) in drawn)
        return Contrast(name, len(won), len(lost), count, shown)

    def _shown(self, name: str, question: Question, place: int, right: str) -> Shown:
        item = question.task.items[place]
        said = {
            each: self.answers[each][question.task.name][0]["after"][place].prediction or "(nothing)"
            for each in (name, self.baseline)
        }
        pictures = item.prompt.pictures
        picture = open_image(pictures[-1].source, item.prompt.id) if pictures else None
        return Shown(question.cut.label, item.words, item.answer, picture, said, right)


def _had(prediction: Prediction) -> bool | None:
    """Whether an answer is right, by half at least; None: not scored."""
    return None if prediction.right is None else prediction.right >= 0.5


# ---------------------------------------------------------------------------------------------- costs


def cost(size: Plan, picture: Costs, jobs: Sequence[Job], per_step: Sequence[float], speed: Speed | None) -> Cost:
    """A joint's costs: by structure, and the means over its runs' logs.

    Args:
        size: its parameters.
        picture: what one picture costs.
        per_step: operations of a step of each stage; where they are not known, those of the logs count.
    """
    steps = [[steps_of(job, stage) for stage in job.recipe.stages] for job in jobs]
    logs = [list(chain.from_iterable(stages)) for stages in steps]
    return Cost(
        parameters=size.whole,
        trained=size.trained,
        training=statistics.mean(
            sum(len(stage) * each for stage, each in zip(stages, per_step))
            if per_step
            else sum(row["operations"] for stage in stages for row in stage)
            for stages in steps
        ),
        seconds=statistics.mean(sum(row["seconds"] for row in log) for log in logs),
        samples=statistics.mean(sum(row["samples_per_second"] * row["seconds"] for row in log) for log in logs),
        memory=max((1e9 * row["memory_gb"] for log in logs for row in log), default=0.0),
        encoder=picture.encoder,
        joint=picture.joint,
        llm=picture.llm,
        cache=picture.cache,
        aside=picture.aside,
        positions=picture.positions,
        speed=speed,
    )


def steps_of(job: Job, stage: Stage) -> list[dict[str, Any]]:
    """The log's row of every step of a stage."""
    return [row for row in read_rows(job.folder / stage.name / "metrics.jsonl") if "loss" in row]


def trained(name: str, job: Job) -> Trained:
    """A finished run's provenance, from its report."""
    report = json.loads((job.folder / "report.json").read_text(encoding="utf-8"))
    return Trained(
        name,
        job.recipe.seed,
        str(job.folder),
        report["fingerprint"],
        report["data_hash"],
        report["revision"],
        {stage.name: len(steps_of(job, stage)) for stage in job.recipe.stages},
        validation(job),
        machine_of(job.folder / "report.json"),
    )


def machine_of(report: Path) -> Machine:
    """What a finished run was done on."""
    told = json.loads(report.read_text(encoding="utf-8"))["method"]["machine"]
    processor, threads, device = told.rsplit(", ", 2)
    return Machine(processor, int(threads.split()[0]), device)


def arithmetic_of(job: Job) -> str:
    """What a run's frozen parts computed in, whatever its recipe asked for."""
    return str(json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["dtype"])


def conditions(group: Group) -> Iterator[Setting]:
    """What the runs of every joint were done in and on, as they say themselves."""
    machines = {job.folder: machine_of(job.folder / "report.json") for jobs in group.values() for job in jobs}
    asked: dict[str, Callable[[Job], str]] = {
        "arithmetic": arithmetic_of,
        "machine": lambda job: f"{machines[job.folder].processor}, {machines[job.folder].device}",
        "threads": lambda job: str(machines[job.folder].threads),
    }
    near = {"machine": "the same, as far as the runs tell"} if _vague(machines.values()) else {}
    for name, of in asked.items():
        values = {own: _by_seed({job.recipe.seed: of(job) for job in jobs}) for own, jobs in group.items()}
        yield Setting(name, values, near.get(name, ""))


def _by_seed(values: Mapping[int, str]) -> str:
    """What all runs of a joint have, or which have what."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    told: dict[str, list[str]] = {}
    for seed, value in values.items():
        told.setdefault(value, []).append(str(seed))
    return " and ".join(f"{value} (seed {', '.join(seeds)})" for value, seeds in told.items())


def _vague(machines: Iterable[Machine]) -> bool:
    """Whether some tell no model of what they compute with, and nothing that is told speaks against one for all."""
    kinds, models, devices, accelerators = set[str](), set[str](), set[str](), set[str]()
    for machine in machines:
        device, _, accelerator = machine.device.partition(": ")
        (kinds if machine.processor in KINDS else models).add(machine.processor)
        devices.add(device)
        accelerators.add(accelerator)
    untold = bool(kinds) or ("" in accelerators and devices != {"cpu"})
    return untold and max(map(len, (kinds, models, devices, accelerators - {""}))) == 1


def method(group: Group) -> dict[str, str]:
    """What all runs were done on and in, a line each."""
    jobs = [job for each in group.values() for job in each]
    machines = [machine_of(job.folder / "report.json") for job in jobs]
    return {
        "machine": _counted([f"{each.processor}, {each.threads} threads, {each.device}" for each in machines]),
        "arithmetic": f"{_counted([*map(arithmetic_of, jobs)])} base parts, float32 for what trains",
    }


def _counted(told: Sequence[str]) -> str:
    """What all say, or how many say what."""
    counts = Counter(told)
    if len(counts) == 1:
        return told[0]
    return " and ".join(f"{value} ({number} of {len(told)} runs)" for value, number in counts.items())


def validation(job: Job) -> float | None:
    """The lowest validation loss of a run's last stage; None where it diverged or has none."""
    if job.diverged:
        return None
    rows = read_rows(job.folder / job.recipe.stages[-1].name / "metrics.jsonl")
    return min((row["validation_loss"] for row in rows if "validation_loss" in row), default=None)


# ---------------------------------------------------------------------------------------------- curves


def curves(group: Group) -> tuple[Drawn, ...]:
    """The losses of every stage by joint, the mean over its seeds as far as all of them came."""
    names = dict.fromkeys(stage.name for jobs in group.values() for stage in jobs[0].recipe.stages)
    return tuple(_drawn(stage, group) for stage in names)


def _drawn(stage: str, group: Group) -> Drawn:
    train, validated = dict[str, Points](), dict[str, Points]()
    for name, jobs in group.items():
        rows = [read_rows(job.folder / stage / "metrics.jsonl") for job in jobs]
        for kept, key in ((train, "loss"), (validated, "validation_loss")):
            lines = [[(row["step"], row[key]) for row in each if key in row] for each in rows]
            points = [
                (statistics.mean(step for step, _ in place), statistics.mean(loss for _, loss in place))
                for place in zip(*lines)
            ]
            if points:
                kept[name] = tuple(thin(points))
    return Drawn(stage, train, validated)
