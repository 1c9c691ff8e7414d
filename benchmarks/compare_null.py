"""False alarms and power of `isthmus compare`: one joint under several names, then one that is better by a known size.

Answers are drawn from a model of trainings (every name and seed has its own luck, every picture its own difficulty,
every pair of them its own interplay), and go through the code that compares real runs: lines, differences, Holm, words.
A comparison is a false alarm if one or more of its words are other than "not decided".

With --real, two pools of tiny models are really trained, every model under a seed of its own: cut short, where much
hangs on the seed, and five times as long, where little does. Each comparison draws two disjoint sets of runs from one
pool and gives them to two names. Beside its words stand how often the two differ at all, and how often one run of each
would differ by its items, which is the usual mistake; and last, how often the longer training is called better.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import harness
from isthmus.comparing import gather
from isthmus.comparing.compare import common_of, planned
from isthmus.comparing.engine import Here
from isthmus.comparing.gather import Answers, Quality
from isthmus.comparing.judge import judged
from isthmus.comparing.outcome import Line
from isthmus.config import Recipe, Source, TaskConfig, Train
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.measure import build
from isthmus.evaluation.results import Runs
from isthmus.evaluation.seeds import Outcomes, gap
from isthmus.evaluation.tasks import Choice, Cut, Item, Task
from isthmus.training.toy import COLOURS, SIDE, toy
from isthmus.types import Sample, Turn

LUCK = {"small": 0.02, "large": 0.5}
"""Standard deviation of a training's luck, in logits: half a point, and some twelve points of accuracy."""
INTERPLAY = 0.3
"""Of a training's luck with one picture, in logits."""
DIFFICULTY = 1.0
"""Of a picture, the same for all, in logits."""
CHOICES = ("yes", "no")
STEPS, LONGER = 30, 5
"""Of a real training that is cut short, and how many times as long the others are, of which less hangs on the seed."""
TAUGHT, TESTED = 64, 48
"""Pictures of real trainings, and those that are asked about then."""
SPREAD, DARK = 60.0, 330
"""How far a picture's channels lie about its colour, and the sum of channels below which it is dark."""


def task(name: str, clusters: int, each: int) -> Choice:
    """`each` questions about each of so many pictures."""
    items = tuple(
        Item(Sample((Turn.say("user", "?"),), f"{name}-{picture}-{number}"), "yes", CHOICES, f"{picture}", "")
        for picture in range(clusters)
        for number in range(each)
    )
    return Choice(name, items, (Cut(name),))


def draw(
    dice: np.random.Generator, tasks: Sequence[Choice], names: Sequence[str], seeds: int, luck: float, gain: float = 0.0
) -> Answers:
    """Everybody's answers; the last name is better by `gain` logits."""
    found: dict[str, dict[str, list[Mapping[Any, list[Prediction]]]]] = {name: {} for name in names}
    lucks = {(name, seed): dice.normal(0, luck) for name in names for seed in range(seeds)}
    for one in tasks:
        hard = {item.cluster: dice.normal(0, DIFFICULTY) for item in one.items}
        for name in names:
            better = gain if name == names[-1] else 0.0
            found[name][one.name] = [
                {"after": _answers(dice, one, hard, lucks[name, seed] + better)} for seed in range(seeds)
            ]
    return found


def _answers(dice: np.random.Generator, one: Choice, hard: Mapping[str, float], level: float) -> list[Prediction]:
    whims = {cluster: dice.normal(0, INTERPLAY) for cluster in hard}
    return [
        Prediction(
            item.prompt.id,
            one.name,
            None,
            "",
            CHOICES,
            (),
            None,
            "yes",
            bool(dice.random() < 1 / (1 + math.exp(-(level + hard[item.cluster] + whims[item.cluster])))),
            item.cluster,
        )
        for item in one.items
    ]


def words(answers: Answers, tasks: Sequence[Task], seed: int, draws: int) -> list[str]:
    """The verdicts of a whole comparison, first those on the mean."""
    asked = gather.questions(tasks)
    quality = Quality(answers, asked, next(iter(answers)), seed, draws)
    mean, lines = judged(quality.line(quality.primary), [quality.line([question]) for question in asked])
    return [word for line in (mean, *lines) for word in _words(line)]


def _words(line: Line) -> list[str]:
    return [cell.verdict for cell in line.cells.values() if cell.verdict is not None]


def simulate(
    names: int, seeds: int, tasks: int, clusters: int, luck: float, gain: float, repeats: int, draws: int
) -> dict[str, Any]:
    """How often a comparison has a word, and how often the last name is called better in the mean."""
    asked = [task(f"task {number}", clusters, 2) for number in range(tasks)]
    called = [f"name {number}" for number in range(names)]
    alarms = found = 0
    for number in range(repeats):
        answers = draw(np.random.default_rng((seeds, number, round(1000 * luck))), asked, called, seeds, luck, gain)
        said = words(answers, asked, number, draws)
        alarms += any(word != "not decided" for word in said)
        found += said[names - 2] == "better"
    return {
        "names": names,
        "seeds": seeds,
        "tasks": tasks,
        "luck": luck,
        "gain": gain,
        "repeats": repeats,
        "any word": alarms / repeats,
        "last better": found / repeats,
    }


# ---------------------------------------------------------------------------------------------- really trained


@dataclass(frozen=True)
class Pool:
    """Runs of one recipe under as many seeds, and their answers by task, run by run."""

    tasks: Sequence[Task]
    answers: Mapping[str, Sequence[Runs]]

    @property
    def levels(self) -> list[float]:
        """Each run's share of right answers, the mean over tasks."""
        return [
            statistics.mean(statistics.mean(float(one.right or 0) for one in runs["after"]) for runs in each)
            for each in zip(*self.answers.values())
        ]

    @property
    def constant(self) -> float:
        """What always saying the commonest answer of each task would reach."""
        told = [Counter(item.answer for item in task.items) for task in self.tasks]
        return statistics.mean(max(each.values()) / each.total() for each in told)

    def of(self, places: Sequence[int]) -> dict[str, Sequence[Runs]]:
        return {name: [runs[place] for place in places] for name, runs in self.answers.items()}


def train(runs: int, steps: int) -> Pool:
    """As many tiny models, trained from the seeds 0, 1, 2 ..."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = _recipe(folder)
        common = common_of([recipe], None, None, None, (), ())
        plan = planned([recipe], common, f"{steps}-steps", range(runs), None, (), 0.2)
        jobs = [plan.run(folder, recipe.name, seed) for seed in plan.seeds]
        Here(Console(quiet=True), torch.device("cpu"))(jobs, lambda job, outcome: None)
        built = [each for each, _ in build(plan.common.eval, plan.seeds[0])]
        return Pool(built, gather.answers_of({recipe.name: jobs}, gather.questions(built))[recipe.name])


def _recipe(folder: Path) -> Recipe:
    """The toy, its joint and its LLM trained in one stage, and asked about pictures that it has not seen."""
    base = toy(folder / "toy")
    stage = base.stages[0].but(
        data=(Source(name=str(_shades(folder / "taught", TAUGHT))),),
        train={"connectors.*": Train(lr=1e-2), "llm.*": Train(lr=3e-3)},
        batch_size=8,
        accumulate=1,
        save_every=None,
        evaluate_every=None,
    )
    options = {"data": str(_shades(folder / "tested", TESTED)), "longest": 6}
    asked = TaskConfig(name="exact", controls=(), options=options)
    return base.but(stages=(stage,), eval=(asked,), engine=base.engine.but(forecast=False))


def _shades(folder: Path, count: int) -> Path:
    """Questions for the colour of pictures, each of one shade around one of the toy's colours, in two categories."""
    folder.mkdir()
    dice, lines = random.Random(folder.name), []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        shade = tuple(min(255, max(0, round(dice.gauss(middle, SPREAD)))) for middle in COLOURS[colour])
        Image.new("RGB", (SIDE, SIDE), shade).save(folder / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": colour}]
        meta = {"category": "dark" if sum(shade) < DARK else "light"}
        row = {"id": f"{number}", "image": f"{number}.png", "conversations": said, "meta": meta}
        lines.append(json.dumps(row) + "\n")
    file = folder / "shades.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def compared(one: Pool, two: Pool, seeds: int, repeats: int, draws: int) -> dict[str, Any]:
    """How often a comparison of `seeds` runs of either has a word, and how often the second is better in the mean.

    Of one pool twice, the two sets are disjoint.
    """
    told = better = differ = by_items = 0
    ours, theirs = one.levels, two.levels
    for number in range(repeats):
        dice = random.Random(number)
        first = dice.sample(range(len(ours)), seeds)
        second = dice.sample([run for run in range(len(theirs)) if one is not two or run not in first], seeds)
        answers = {"one": one.of(first), "two": two.of(second)}
        said = words(answers, one.tasks, number, draws)
        told += any(word != "not decided" for word in said)
        better += said[0] == "better"
        differ += not math.isclose(sum(ours[run] for run in first), sum(theirs[run] for run in second))
        by_items += _by_items(answers, number, draws) < 0.05
    found = {"any word": told, "better": better, "differ": differ, "by items": by_items}
    return {"seeds": seeds, "repeats": repeats} | {name: count / repeats for name, count in found.items()}


def _by_items(answers: Answers, seed: int, draws: int) -> float:
    """What the items of one run of each name say of the mean over tasks, as a p-value."""
    one, two = (
        [[Outcomes.of(runs[0]["after"], "accuracy")] for runs in answers[name].values()] for name in ("one", "two")
    )
    return gap(two, one, seed=seed, draws=draws).p_items


def real(runs: int, seeds: Sequence[int], steps: int, repeats: int, draws: int) -> dict[str, Any]:
    """Pools of so many runs, each compared with itself, and that of short trainings with that of long ones."""
    lengths = {"large": steps, "small": LONGER * steps}
    pools = {luck: train(runs, length) for luck, length in lengths.items()}
    return {
        "pools": {
            luck: {"steps": lengths[luck], "one answer": pool.constant, "right answers": pool.levels}
            for luck, pool in pools.items()
        },
        "null": [
            {"luck": luck} | compared(pool, pool, each, repeats, draws)
            for luck, pool in pools.items()
            for each in seeds
        ],
        "longer": [compared(pools["large"], pools["small"], each, repeats, draws) for each in seeds],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, STEPS, f"steps of a short real training; long ones have {LONGER} times as many")
    parser.set_defaults(repeats=100)
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--real", type=int, default=0, metavar="RUNS", help="really train so many tiny models per pool")
    options = parser.parse_args(arguments)
    repeats, draws, shape, seeds = options.repeats, options.draws, (3, 60), [3, 5]
    if options.tiny:
        repeats, draws, shape, seeds = 4, 200, (2, 10), [2]
    if 0 < options.real < (least := 2 * max(seeds)):
        parser.error(f"--real {options.real}: two sets of {max(seeds)} runs are drawn, so give {least} or more")
    cases = [
        simulate(4, each, *shape, luck, gain, repeats, draws)
        for gain in (0.0, 1.0)
        for each in (2, 3, 5)
        for luck in LUCK.values()
    ]
    where = harness.machine()
    print(harness.in_words(where))
    print(f"4 names, {shape[0]} tasks of {2 * shape[1]} items, {repeats} comparisons each")
    heads = ["seeds", "luck, logits", "better by, logits", "any word", "last is better in the mean"]
    print(harness.table(heads, [_line(case) for case in cases]))
    null = [case for case in cases if not case["gain"]]
    found: dict[str, Any] = {"machine": where, "cases": cases}
    if options.real:
        found["real"] = real(options.real, seeds, options.steps, repeats, draws)
        null += found["real"]["null"]
        _tell(options.real, found["real"])
    print(harness.save("compare_null", found, options))
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    return int(any(case["any word"] > allowed for case in null))


def _tell(runs: int, found: Mapping[str, Any]) -> None:
    """What real trainings gave, in tables."""
    pools = [
        [luck, str(pool["steps"]), f"{statistics.mean(pool['right answers']):.3f}", f"{_deviation(pool):.3f}"]
        for luck, pool in found["pools"].items()
    ]
    print(f"{runs} real trainings each")
    print(harness.table(["luck", "steps", "right answers", "standard deviation"], pools))
    shares = ["any word", "differ", "by items", "better"]
    cases = [*found["null"], *({"luck": "large and small"} | case for case in found["longer"])]
    rows = [[case["luck"], str(case["seeds"]), *(f"{case[name]:.0%}" for name in shares)] for case in cases]
    print(harness.table(["luck", "seeds", *shares], rows))


def _deviation(pool: Mapping[str, Any]) -> float:
    return statistics.stdev(pool["right answers"])


def _line(case: Mapping[str, Any]) -> list[str]:
    return [
        str(case["seeds"]),
        f"{case['luck']:g}",
        f"{case['gain']:g}",
        f"{case['any word']:.0%}",
        f"{case['last better']:.0%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
