"""False alarms and power of `isthmus compare`: one joint under several names, then one that is better by a known size.

Answers are drawn from a model of trainings (every name and seed has its own luck, every picture its own difficulty,
every pair of them its own interplay), and go through the code that compares real runs: lines, differences, Holm, words.
A comparison is a false alarm if one or more of its words are other than "not decided". With --real, tiny models are
really trained under many seeds, and the runs are dealt to two names at random again and again.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import harness
from isthmus.comparing import gather
from isthmus.comparing.compare import common_of, planned
from isthmus.comparing.engine import Here
from isthmus.comparing.gather import Answers, Quality
from isthmus.comparing.judge import judged
from isthmus.comparing.outcome import Line
from isthmus.config import TaskConfig
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.measure import build
from isthmus.evaluation.tasks import Choice, Cut, Item
from isthmus.training.toy import toy
from isthmus.types import Sample, Turn

LUCK = {"small": 0.02, "large": 0.5}
"""Standard deviation of a training's luck, in logits: half a point, and some twelve points of accuracy."""
INTERPLAY = 0.3
"""Of a training's luck with one picture, in logits."""
DIFFICULTY = 1.0
"""Of a picture, the same for all, in logits."""
CHOICES = ("yes", "no")


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


def words(answers: Answers, tasks: Sequence[Choice], seed: int, draws: int) -> list[str]:
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


def real(runs: int, repeats: int, steps: int, draws: int) -> dict[str, Any]:
    """Tiny models, trained for real under `runs` seeds, dealt to two names at random `repeats` times."""
    tasks = [TaskConfig(name="presence", limit=24, controls=()), TaskConfig(name="colour", limit=24, controls=())]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = toy(folder / "toy")
        recipe = recipe.but(stages=recipe.stages[:1])
        common = common_of([recipe], None, tasks, None, (), ())
        plan = planned([recipe], common, f"{steps}-steps", range(runs), None, (), 0.2)
        jobs = [plan.run(folder, recipe.name, seed) for seed in plan.seeds]
        Here(Console(quiet=True), torch.device("cpu"))(jobs, lambda job, outcome: None)
        built = [each for each, _ in build(plan.common.eval, plan.seeds[0])]
        asked = gather.questions(built)
        answers = gather.answers_of({recipe.name: jobs}, asked)[recipe.name]
    alarms = 0
    for number in range(repeats):
        order = random.Random(number).sample(range(runs), runs)
        dealt = {"one": order[: runs // 2], "two": order[runs // 2 : 2 * (runs // 2)]}
        chosen = {
            name: {each: [all_runs[place] for place in places] for each, all_runs in answers.items()}
            for name, places in dealt.items()
        }
        alarms += any(word != "not decided" for word in words(chosen, built, number, draws))  # type: ignore[arg-type]
    return {"runs": runs, "seeds": runs // 2, "steps": steps, "repeats": repeats, "any word": alarms / repeats}


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, 20, "steps of each real training")
    parser.set_defaults(repeats=100)
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--real", type=int, default=0, metavar="RUNS", help="also train so many tiny models for real")
    options = parser.parse_args(arguments)
    repeats, draws, shape = options.repeats, options.draws, (3, 60)
    if options.tiny:
        repeats, draws, shape = 4, 200, (2, 10)
    cases = [
        simulate(4, seeds, *shape, luck, gain, repeats, draws)
        for gain in (0.0, 1.0)
        for seeds in (2, 3, 5)
        for luck in LUCK.values()
    ]
    where = harness.machine()
    print(harness.in_words(where))
    print(f"4 names, {shape[0]} tasks of {2 * shape[1]} items, {repeats} comparisons each")
    heads = ["seeds", "luck, logits", "better by, logits", "any word", "last is better in the mean"]
    print(harness.table(heads, [_line(case) for case in cases]))
    found: dict[str, Any] = {"machine": where, "cases": cases}
    if options.real:
        found["real"] = real(options.real, repeats, options.steps, draws)
        print(f"{options.real} real trainings dealt to two names: {found['real']['any word']:.0%} false alarms")
    print(harness.save("compare_null", found, options))
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    return int(any(case["any word"] > allowed for case in cases if not case["gain"]))


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
