"""Multiple choice on the user's own files: by letter or in words, circular as in MMBench, and MMMU's open questions.

MMBench: Liu et al. 2023, arXiv 2307.06281, official code open-compass/VLMEvalKit. MMMU: Yue et al. 2024, arXiv
2311.16502, official code MMMU-Benchmark/MMMU.

Differs: a reply that names no option is wrong; MMMU's code draws a random letter for it, MMBench's asks another LLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase

from isthmus.config import TaskConfig, check
from isthmus.data.choices import ROUND
from isthmus.evaluation import statistics
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.files import File, Scored, need, task_of
from isthmus.evaluation.metrics import open_answers, options
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import Builder, Cut, Item
from isthmus.types import ConfigError, DataError, Text, Turn


class Choices(File):
    """Options of multiple choice."""

    circular: bool = False
    """Ask each question once per option, the options moved by one place each time (MMBench)."""


class Options(Scored):
    """ScienceQA's, SEED-Bench's, MMBench's and MMMU's questions: one of several options, by letter or in words."""

    rule = (
        "the option that the free reply names, by its letter or in its words; several or none is wrong; "
        "without options, MMMU's rule for open answers"
    )

    def share(self, reply: str, item: Item) -> bool:
        if not item.choices:
            return open_answers.right(reply, item.references or (item.answer,))
        place = options.chosen(reply, item.choices)
        return place is not None and ascii_uppercase[place] == item.answer

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """Accuracy by group of categories; MMBench's figures, where questions were asked with options moved about."""
        groups = [str(item.prompt.meta.get("group", "")) for item in self.items]
        kinds = [item.kind for item in self.items]
        if not any(ROUND in prediction.id for prediction in predictions):
            return _shares(groups, [[prediction] for prediction in predictions], "accuracy")
        rounds: defaultdict[str, list[int]] = defaultdict(list)
        for place, prediction in enumerate(predictions):
            rounds[prediction.id.partition(ROUND)[0]].append(place)
        asked = [[predictions[place] for place in places] for places in rounds.values()]
        first = [places[0] for places in rounds.values()]
        name = "circular accuracy"
        return (
            {name: _circular(asked)}
            | _shares([groups[place] for place in first], asked, name)
            | _shares([kinds[place] for place in first], asked, name)
        )


def _shares(labels: Sequence[str], asked: Sequence[Sequence[Prediction]], name: str) -> dict[str, Estimate]:
    """The share of questions that were always answered rightly, per label, where there are several."""
    found: defaultdict[str, list[Sequence[Prediction]]] = defaultdict(list)
    for label, rounds in zip(labels, asked):
        found[label].append(rounds)
    return {f"{name}: {label}": _circular(found[label]) for label in sorted(found) if label and len(found) > 1}


def _circular(asked: Sequence[Sequence[Prediction]]) -> Estimate:
    """The share of questions, each in its rounds, with an interval over pictures."""
    right = options.circular([prediction.right is True for prediction in rounds] for rounds in asked)
    return statistics.accuracy(right, [rounds[0].cluster for rounds in asked])


def choices(task: TaskConfig, seed: int) -> Options:
    """`options`: ScienceQA, MMBench, SEED-Bench, MMMU; `choices` by letter.

    Raises:
        ConfigError: the options of a file that holds them in every order are to be moved again.
        DataError: an item has no choices and is not `open`, or shows none of them, or its answer is none of them.
    """
    how = check(Choices, task.options, "task options")
    built = task_of(Options, "options", task, how, seed)
    built = need(built, lambda item: item.choices or item.prompt.meta.get("open"), "choices")
    built = replace(
        built, items=tuple(item if item.prompt.meta.get("open") else _by_letter(item) for item in built.items)
    )
    moved = any(ROUND in item.prompt.id for item in built.items)
    if not how.circular and not moved:
        return built
    if moved and how.circular:
        raise ConfigError(f"{how.data.name} holds its questions with options moved about", "leave circular away")
    turned = built.items if moved else tuple(again for item in built.items for again in _rounds(item))
    return replace(built, items=turned, cuts=tuple(_in_every_order(cut) for cut in built.cuts))


def _in_every_order(cut: Cut) -> Cut:
    return replace(cut, label=f"{cut.label}, options in every order")


def _by_letter(item: Item) -> Item:
    """The item with its answer as a letter, which it is already in layouts of multiple choice.

    Raises:
        DataError: the answer is neither the letter of a choice nor one of the choices, or the prompt shows none.
    """
    letters = ascii_uppercase[: len(item.choices)]
    answer, listed = item.answer.strip(), item.prompt.meta.get("kind") == "choice"
    if not listed and not any(choice in turn.text for turn in item.prompt.turns for choice in item.choices):
        raise DataError(
            f"{item.prompt.id}: the question shows none of its choices",
            'write them into it, one a line, or write {"question": …, "options": […], "answer": …}',
        )
    if answer in item.choices and not listed:
        return replace(item, answer=letters[item.choices.index(answer)])
    if len(answer) == 1 and answer.upper() in letters:
        return replace(item, answer=answer.upper())
    raise DataError(
        f"{item.prompt.id}: the answer {answer[:40]!r} is none of the choices", "write its letter, or its words"
    )


def _rounds(item: Item) -> list[Item]:
    """The item once per option; the right letter moves with the options.

    Raises:
        DataError: the options do not stand in the question as `A. ...`, one a line.
    """
    given = item.choices
    answer, listing = given[ascii_uppercase.index(item.answer)] if given else "", options.listed(given)
    if not listing or listing not in item.prompt.turns[-1].text:
        raise DataError(f"{item.prompt.id}: the question does not list its options", "leave circular away")
    rounds = []
    for number, turned in enumerate(options.rotations(given)):
        turns = (*item.prompt.turns[:-1], _reworded(item.prompt.turns[-1], listing, options.listed(turned)))
        prompt = item.prompt.but(turns=turns, id=f"{item.prompt.id}{ROUND}{number}")
        letter = ascii_uppercase[turned.index(answer)]
        rounds.append(replace(item, prompt=prompt, answer=letter, choices=turned))
    return rounds


def _reworded(turn: Turn, old: str, new: str) -> Turn:
    parts = (Text(part.text.replace(old, new)) if isinstance(part, Text) else part for part in turn.parts)
    return replace(turn, parts=tuple(parts))


TASKS: dict[str, Builder] = {"options": choices}
