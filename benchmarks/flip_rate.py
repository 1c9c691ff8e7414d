"""How many answers change when a real model is asked in batches of another size.

    python benchmarks/flip_rate.py MODEL [--steps ITEMS] [--json FILE]

Matrix products differ in their last bits with the shape of a batch. Every item is asked alone, and in batches of 4 and
16: the likeliest of easy-VQA's thirteen answers, and a free reply. Told are the answers that differ from those given
alone, by how much the log-probabilities differ, and the smallest margin between first and second choice.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch

import harness
import isthmus
from isthmus.config import TaskConfig
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.measure import arithmetic_of
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Cut, Generate, Task, run
from isthmus.model import VLM
from isthmus.speakers.local import Local

SIZES = (1, 4, 16)
WORDS = 12
"""The longest free reply in tokens."""


def tasks(count: int) -> tuple[Task, Task]:
    """The same questions with choices, and to be answered freely."""
    closed = named("easy-vqa")(TaskConfig(name="easy-vqa", limit=count), 0)
    return closed, Generate("easy-vqa-free", closed.items, (Cut("free"),))


def answers(model: VLM, task: Task, size: int) -> list[Prediction]:
    scorer = Scorer(model, reply=Local(model, max_new_tokens=WORDS).say_all, batch_size=size)
    with arithmetic_of(model):
        return run(task, scorer)


def compare(alone: list[Prediction], together: list[Prediction]) -> dict[str, float]:
    """How many answers changed, how many of them from right to wrong or back, and the largest change of a score."""
    pairs = list(zip(alone, together, strict=True))
    return {
        "flipped": sum(one.prediction != other.prediction for one, other in pairs),
        "right_changed": sum(one.right != other.right for one, other in pairs),
        "score_difference": max(
            (abs(a - b) for one, other in pairs for a, b in zip(one.scores, other.scores)), default=0.0
        ),
    }


def margin(predictions: list[Prediction]) -> float | None:
    """The smallest distance between an item's two likeliest choices."""
    ends = [sorted(one.scores)[-2:] for one in predictions if len(one.scores) > 1]
    return min((high - low for scores in ends for low, high in pairwise(scores)), default=None)


def main() -> int:
    parser = harness.parser(__doc__, 100, "items")
    parser.add_argument("model", help="a directory that `isthmus train` wrote")
    options = parser.parse_args()
    count = 4 if options.tiny else options.steps
    where, cases = harness.machine(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = isthmus.load(options.model, dtype)
        for task in tasks(count):
            alone = answers(model, task, SIZES[0])
            for size in SIZES[1:]:
                found = compare(alone, answers(model, task, size))
                cases.append({"dtype": str(dtype).removeprefix("torch."), "task": task.name, "batch": size,
                              "items": len(alone), "margin": margin(alone), **found})  # fmt: skip
    print(harness.in_words(where))
    header = ["dtype", "task", "batch", "answers that differ", "of", "largest score difference", "smallest margin"]
    rows = [
        [case["dtype"], case["task"], case["batch"], case["flipped"], case["items"], f"{case['score_difference']:.1e}",
         "" if case["margin"] is None else f"{case['margin']:.1e}"]
        for case in cases
    ]  # fmt: skip
    print(harness.table(header, rows))
    print(harness.save("flip_rate", {"machine": where, "cases": cases}, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
