"""Batch size changes no answer: of whole tasks, over every kind of task, with a margin that rounding cannot cross."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import composed
from isthmus.config import TaskConfig
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Choice, Cut, Generate, Item, Task, run
from isthmus.model import VLM
from isthmus.speakers.local import Local
from isthmus.types import Sample, Turn

MARGIN = 1e-4
WORDS = ("a cat", "the dog is here", "on the left", "three")


@pytest.fixture(scope="module")
def model() -> VLM:
    return composed.stir(composed.model())


def items() -> tuple[Item, ...]:
    """Prompts of many lengths, with no picture, one and two."""
    shown = [[composed.picture(number + k) for k in range(number % 3)] for number in range(14)]
    asked = ["What is it? " + "Look again. " * (number % 5) for number in range(14)]
    prompts = [Sample((Turn.say("user", *shown[n], asked[n]),), id=f"q{n}") for n in range(14)]
    return tuple(Item(prompt, WORDS[n % 4], WORDS, prompt.id, "") for n, prompt in enumerate(prompts))


def predictions(model: VLM, task: Task, batch_size: int) -> list[tuple[str | None, tuple[float, ...]]]:
    scorer = Scorer(model, reply=Local(model, max_new_tokens=10).say_all, batch_size=batch_size)
    return [(one.prediction, one.scores) for one in run(task, scorer)]


def tasks(folder: Path) -> list[Task]:
    path = folder / "asked.jsonl"
    records = [{"context": "The cat " * (1 + n % 7), "choices": WORDS, "answer": n % 4} for n in range(14)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    told = named("continuation")(TaskConfig(name="continuation", options={"text": str(path)}), 0)
    return [Choice("choice", items(), (Cut("c"),)), Generate("free", items(), (Cut("f"),)), told]


@pytest.mark.parametrize("number", range(3), ids=["choice", "free", "text"])
def test_no_answer_changes(model: VLM, number: int, tmp_path: Path) -> None:
    task = tasks(tmp_path)[number]
    alone = predictions(model, task, 1)
    assert len(set(alone)) > 1  # the items differ
    for batch_size in (3, 14):
        together = predictions(model, task, batch_size)
        for (said, scores), (also, others) in zip(alone, together, strict=True):
            assert others == pytest.approx(scores, abs=MARGIN / 4)
            *_, second, first = sorted(scores) if scores else (0.0, 1.0)
            assert also == said or first - second < MARGIN


def test_the_benchmark_counts_planted_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    flip_rate = importlib.import_module("flip_rate")

    def told(said: str, right: bool, *scores: float) -> Prediction:
        return Prediction("q", "t", None, "?", WORDS[:2], scores, said, WORDS[0], right, "c")

    alone = [told(WORDS[0], True, -1.0, -1.5), told(WORDS[0], True, -2.0, -2.125)]
    together = [told(WORDS[0], True, -1.0, -1.5), told(WORDS[1], False, -2.25, -2.125)]
    assert flip_rate.compare(alone, together) == {"flipped": 1, "right_changed": 1, "score_difference": 0.25}
    assert flip_rate.margin(alone) == 0.125 and flip_rate.margin([told("a", True)]) is None
