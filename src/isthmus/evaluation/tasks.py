"""What is asked: items, how they are answered (choice, likelihood, free generation), and the demo's tasks by name.

A task asks each sample's last user turn and keeps the assistant's answer for the score. `run` measures one task under
one condition and keeps every prediction in a file, which a later run with the same fingerprint reuses (`keeping`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from isthmus import config
from isthmus.config import TaskConfig
from isthmus.data import boxes, sets
from isthmus.evaluation import answers, controls
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.keeping import Answered, Place
from isthmus.evaluation.score import COSINE_RULE, RULE, Question, Scorer, timed
from isthmus.evaluation.statistics import Estimate, accuracy
from isthmus.types import ConfigError, DataError, Sample

Control: TypeAlias = Literal["blind", "shuffled", "cosine"]
Advance: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """One question: a prompt that ends with the user's turn, and what is known of its answer."""

    prompt: Sample
    answer: str
    choices: tuple[str, ...]
    cluster: str
    kind: str
    references: tuple[str, ...] = ()
    """All that was said by people, where a score compares with several."""

    @property
    def question(self) -> Question:
        return Question(self.prompt, self.choices)

    @property
    def words(self) -> str:
        """What the last turn says, its regions spelled."""
        return boxes.UNMAPPED.spell(self.prompt.turns)[-1].text


@dataclass(frozen=True)
class Cut:
    """A row of the result table: all of a task's items, or those of some kinds."""

    label: str
    kinds: frozenset[str] | None = None

    def takes(self, kind: str) -> bool:
        return self.kinds is None or kind in self.kinds


@dataclass(frozen=True)
class Task(ABC):
    """Items and the way they are answered.

    Attributes:
        cuts: the rows that the task fills in a result table.
        cosine: whether the joint alone is measured too: of questions whose choices are names, drawn evenly.
        training: where demonstrations of such items come from, if there is such a set.
    """

    name: str
    items: tuple[Item, ...]
    cuts: tuple[Cut, ...]
    cosine: bool = False
    training: config.Source | None = None
    longest: int = field(default=24, kw_only=True)
    """Tokens of a free reply."""

    unit: ClassVar[Literal["accuracy", "nats per token"]] = "accuracy"
    divisible: ClassVar[bool] = True
    """Whether an item's score stays the same where fewer items are asked."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """In one sentence, how an item is scored."""

    @abstractmethod
    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        """One prediction per item, with the item's prompt replaced by that of `prompts`."""

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """Figures over all items that a benchmark reports besides, each with its interval; none as a rule."""
        return {}

    def joint_alone(self, scorer: Scorer, advance: Advance | None) -> list[Prediction]:
        """One prediction per item from the joint without the LLM, where the task has choices."""
        raise ConfigError(f"task {self.name!r} has no choices to compare pictures with", "leave out the cosine control")

    def _prediction(self, item: Item, prompt: Sample, **scored: Any) -> Prediction:
        return Prediction(
            id=prompt.id,
            task=self.name,
            control=None,
            prompt=answers.plain(prompt),
            answer=item.answer,
            cluster=item.cluster,
            kind=item.kind,
            **scored,
        )


@dataclass(frozen=True)
class Choice(Task):
    """The most likely of an item's choices is the answer."""

    @property
    def rule(self) -> str:
        return f"most likely choice; {RULE}"

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        found = scorer.likelihoods([Question(p, item.choices) for p, item in zip(prompts, self.items)], advance)
        return [
            self._chosen(item, prompt, scores.values, scores.seconds)
            for item, prompt, scores in zip(self.items, prompts, found)
        ]

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """Where names are drawn evenly, the share that is right once none is favoured (`answers.calibrated`)."""
        right = answers.calibrated(predictions) if self.cosine else None
        return {answers.CALIBRATED: accuracy(right, [item.cluster for item in self.items])} if right else {}

    def joint_alone(self, scorer: Scorer, advance: Advance | None) -> list[Prediction]:
        found = scorer.cosines([item.question for item in self.items], advance)
        return [
            self._chosen(item, item.prompt, scores.values, scores.seconds) for item, scores in zip(self.items, found)
        ]

    def _chosen(self, item: Item, prompt: Sample, scores: tuple[float, ...], seconds: float) -> Prediction:
        best, right = answers.choose(item.choices, scores, item.answer)
        return self._prediction(
            item, prompt, choices=item.choices, scores=scores, prediction=best, right=right, seconds=seconds
        )


@dataclass(frozen=True)
class Likelihood(Task):
    """How surprising the reference answer is: negative log-likelihood per token."""

    unit: ClassVar[Literal["accuracy", "nats per token"]] = "nats per token"

    @property
    def rule(self) -> str:
        return f"negative log-likelihood per token of the reference answer; {RULE}"

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        found = scorer.likelihoods([Question(p, (item.answer,)) for p, item in zip(prompts, self.items)], advance)
        return [
            self._prediction(
                item,
                prompt,
                choices=(),
                scores=scores.values,
                prediction=None,
                right=None,
                tokens=scores.tokens[0],
                seconds=scores.seconds,
            )
            for item, prompt, scores in zip(self.items, prompts, found)
        ]


@dataclass(frozen=True)
class Free(Task):
    """A free reply, scored by itself."""

    @abstractmethod
    def score(
        self, scorer: Scorer, item: Item, prompt: Sample, reply: str | None
    ) -> tuple[float | None, tuple[float, ...]]:
        """How right a reply is (None: not scored), and what `Prediction.scores` holds of it."""

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        """As in `Task`.

        Raises:
            ConfigError: the scorer has no `reply` function.
        """
        if scorer.reply is None:
            raise ConfigError(f"task {self.name!r} needs free replies", "give the scorer a `reply` function")
        found, order = dict[int, Prediction](), scorer.longest_first(prompts)
        for start in range(0, len(order), scorer.batch_size):
            places = order[start : start + scorer.batch_size]
            asked = [prompts[place] for place in places]
            replies = scorer.part.batch(places, partial(timed, scorer.reply, asked))
            for place, prompt, (reply, seconds) in zip(places, asked, replies, strict=True):
                right, scores = self.score(scorer, self.items[place], prompt, reply)
                said = {"prediction": reply, "right": right, "seconds": seconds}
                found[place] = self._prediction(self.items[place], prompt, choices=(), scores=scores, **said)
            if advance is not None:
                advance(len(places))
        return [found[place] for place in range(len(order))]


@dataclass(frozen=True)
class Generate(Free):
    """A free reply that is, or contains, the answer."""

    contains: bool = True

    @property
    def rule(self) -> str:
        how = "contains the answer as whole words" if self.contains else "equals the answer"
        return f"free reply {how}, after case, accents, punctuation, articles and number words are evened out"

    def score(
        self, scorer: Scorer, item: Item, prompt: Sample, reply: str | None
    ) -> tuple[bool | None, tuple[float, ...]]:
        return answers.match(reply, item.answer, contains=self.contains), ()


# ---------------------------------------------------------------------------------------------- one run


def run(
    task: Task,
    scorer: Scorer,
    *,
    control: Control | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[Prediction]:
    """Predictions of a task, or of one of its controls, one per item in the task's order.

    Args:
        folder: where predictions are kept as `<task>[.<control>].jsonl`; complete ones with the same fingerprint
            are read instead of asking the model, and an interrupted run goes on after its last batch.
        settings: all else that the answers depend on: weights, template, decoding, picture size, dtype.
        seed: of the shuffled control.

    Raises:
        ConfigError: the task does not have this control.
        DataError: an item cannot be rendered, or pictures cannot be exchanged.
    """
    prompts = [item.prompt for item in task.items]
    if control in controls.CONTROLS:
        prompts = controls.CONTROLS[control](prompts, seed)
    rule = COSINE_RULE if control == "cosine" else task.rule
    fingerprint = _fingerprint(task, prompts, control, rule, settings or {})
    place = Place(folder, f"{task.name}{'.' + control if control else ''}", fingerprint) if folder else None
    if place and (known := place.found()) is not None:
        if advance is not None:
            advance(len(known))
        return known
    scorer.part = Answered.of(place.part) if place else Answered()
    try:
        raw = task.joint_alone(scorer, advance) if control == "cosine" else task.predict(scorer, prompts, advance)
    finally:
        scorer.part = Answered()
    found = [replace(prediction, control=control) for prediction in raw]
    if place:
        place.keep(answers.Header(task.name, control, rule, fingerprint, len(found), dict(settings or {})), found)
    return found


def _fingerprint(
    task: Task, prompts: Sequence[Sample], control: Control | None, rule: str, settings: Mapping[str, Any]
) -> str:
    """Twelve hex digits that change with anything that the predictions depend on."""
    asked = [{**vars(item), "prompt": _told(prompt)} for prompt, item in zip(prompts, task.items)]
    canonical = json.dumps([task.name, control, rule, asked, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _told(prompt: Sample) -> list[Any]:
    """What of a prompt predictions depend on; its route is among it where it says one."""
    shown = [str(controls.key(medium)) for medium in prompt.media]
    route = [prompt.meta["route"]] if "route" in prompt.meta else []
    return [prompt.id, answers.plain(prompt), shown, prompt.meta.get("box"), *route]


# ---------------------------------------------------------------------------------------------- the demo's tasks

Builder: TypeAlias = Callable[[TaskConfig, int], Task]
Some = TypeVar("Some", bound=Task)

LIMIT = 500
"""Items of a task whose config names no limit, drawn from the whole set; every seed measures the same."""


def naming(task: TaskConfig, seed: int) -> Choice:
    """Concepts that training never saw, one of ten names."""
    return replace(of_scenes(Choice, task, seed, "naming", "Naming unseen concepts", split="unseen"), cosine=True)


def naming_options(task: TaskConfig, seed: int) -> Choice:
    """The same pictures, with the ten names in the question."""
    label = "Naming unseen concepts, names in the question"
    return replace(of_scenes(Choice, task, seed, "options", label, split="unseen"), cosine=True)


def naming_freely(task: TaskConfig, seed: int) -> Generate:
    """The same pictures, named in the model's own words."""
    return of_scenes(Generate, task, seed, "naming", "Naming unseen concepts, free reply", split="unseen")


def easy_vqa(task: TaskConfig, seed: int) -> Choice:
    """The official test questions, each among all thirteen answers; in total, and without yes/no."""
    training = config.Source(name="easy-vqa", options=task.options)
    cuts = (Cut("easy-VQA, official test"), Cut("easy-VQA without yes/no", frozenset({"open"})))
    return Choice(task.name, _items(task, seed, training.but(split="test")), cuts, training=training)


def presence(task: TaskConfig, seed: int) -> Choice:
    """Whether a named thing is in the picture; as often as not it is absent."""
    return of_scenes(Choice, task, seed, "presence", "Presence")


def counting(task: TaskConfig, seed: int) -> Choice:
    """How many of a thing there are."""
    return of_scenes(Choice, task, seed, "counting", "Counting")


def relation(task: TaskConfig, seed: int) -> Choice:
    """Which thing stands left of, right of, above or below another."""
    return of_scenes(Choice, task, seed, "relation", "Relations")


def colour(task: TaskConfig, seed: int) -> Choice:
    """The colour of the background, one of ten."""
    return of_scenes(Choice, task, seed, "colour", "Background colour")


def caption(task: TaskConfig, seed: int) -> Likelihood:
    """The reference caption's negative log-likelihood."""
    return of_scenes(Likelihood, task, seed, "caption", "Captions, NLL")


TASKS: dict[str, Builder] = {
    "naming": naming,
    "naming-options": naming_options,
    "naming-free": naming_freely,
    "easy-vqa": easy_vqa,
    "presence": presence,
    "counting": counting,
    "relation": relation,
    "colour": colour,
    "caption": caption,
}
"""By the name that recipes know; `catalogue` holds those of other files too."""


def of_scenes(make: type[Some], task: TaskConfig, seed: int, kind: str, label: str, split: str = "test") -> Some:
    """A task of one row that asks one kind of question about scenes, as they are in training."""
    training = config.Source(name="scenes", options={"kinds": [kind], **task.options})
    asked = training.but(split=split, options={"count": task.limit or LIMIT, **training.options})
    return make(task.name, _items(task, seed, asked), (Cut(label),), training=training)


def _items(task: TaskConfig, seed: int, source: config.Source) -> tuple[Item, ...]:
    """Up to the limit of items of a set, the same for every seed and in the set's order."""
    samples = sets.open_set(source, seed)
    count = min(task.limit or LIMIT, len(samples))
    if count == 0:
        raise DataError(f"{source.name}/{source.split} has no item for task {task.name!r}", "see `isthmus data stats`")
    return tuple(item(samples[index]) for index in drawn(len(samples), count))


def item(sample: Sample) -> Item:
    """A sample with its answer taken out of the conversation; `meta` holds choices, cluster and kind.

    Raises:
        DataError: it does not end with an answer, or its choices repeat or miss the answer.
    """
    *asked, last = sample.turns
    if last.role != "assistant" or not asked:
        raise DataError(f"{sample.id}: does not end with an assistant's answer", "give question and answer as turns")
    answer = str(sample.meta.get("answer", last.text))
    choices = tuple(str(choice) for choice in sample.meta.get("choices", ()))
    if choices and (len(set(choices)) < len(choices) or answer not in choices):
        raise DataError(
            f"{sample.id}: {answer!r} must be one of distinct choices, got {choices}", "repair meta.choices"
        )
    kind, cluster = str(sample.meta.get("kind", "")), str(sample.meta.get("cluster", sample.id))
    return Item(sample.but(turns=tuple(asked)), answer, choices, cluster, kind)
