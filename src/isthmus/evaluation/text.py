"""Tasks on text alone: what alignment costs the LLM, measured on raw text beside the LLM as it was.

`perplexity` reads a text; `next-sentence` asks which of four sentences goes on; `continuation` takes multiple choice in
the layouts of ARC (Clark et al. 2018, arXiv 1803.05457), HellaSwag (Zellers et al. 2019, arXiv 1905.07830), PIQA (Bisk
et al. 2019, arXiv 1911.11641) and OpenBookQA (Mihaylov et al. 2018, arXiv 1809.02789), with the prompts and the two
accuracies of lm-evaluation-harness. Nothing is downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar, Literal, TypeVar

from isthmus.config import Frozen, TaskConfig, check
from isthmus.data import containers
from isthmus.data.faults import Wrong
from isthmus.evaluation import answers, prose, statistics
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.draw import SEED, drawn
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import LIMIT, Advance, Builder, Cut, Item, Task
from isthmus.types import DataError, Sample, Turn

DOCS = "python-docs"
"""The reference texts that Python brings along (`pydoc_data.topics`, PSF licence), read in place."""
PIECE = 2000
"""Characters of a piece of text, about: it ends where a paragraph does."""
OPTIONS = 4
"""Sentences to choose the next one from."""
Found = TypeVar("Found")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


class TextOptions(Frozen):
    """Options of the tasks on text."""

    text: str
    """A file, or `python-docs`."""


@dataclass(frozen=True)
class Perplexity(Task):
    """How surprising a text is."""

    unit: ClassVar[Literal["accuracy", "nats per token"]] = "nats per token"
    rule = "negative log-likelihood per token of raw text, without chat template; every piece from its beginning"

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        found = prose.of(scorer).texts([prompt.turns[-1].text for prompt in prompts], advance)
        return [
            self._prediction(
                item, prompt, choices=(), scores=(told.value,), prediction=None, right=None, tokens=told.tokens
            )
            for item, prompt, told in zip(self.items, prompts, found)
        ]

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """Perplexity per token, and bits per byte, which compares LLMs with other tokenizers."""
        clusters = [prediction.cluster for prediction in predictions]
        nats = [-prediction.scores[-1] for prediction in predictions]
        tokens = [prediction.tokens for prediction in predictions]
        sizes = [len(item.prompt.turns[-1].text.encode()) for item in self.items]
        return {
            "perplexity": statistics.mean(nats, clusters, tokens).through(math.exp),
            "bits per byte": statistics.mean([value / math.log(2) for value in nats], clusters, sizes),
        }


@dataclass(frozen=True)
class Continuation(Task):
    """Which of several continuations of a text is the likeliest for its length."""

    rule = "highest log-probability per character of the continuation of raw text, without chat template"

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        pairs = [
            (prompt.turns[-1].text, f" {choice}")
            for prompt, item in zip(prompts, self.items)
            for choice in item.choices
        ]
        values = iter([told.value for told in prose.of(scorer).continuations(pairs)])
        found = []
        for item, prompt in zip(self.items, prompts):
            scores = tuple(next(values) / len(choice) for choice in item.choices)
            best, right = answers.choose(item.choices, scores, item.answer)
            found.append(
                self._prediction(item, prompt, choices=item.choices, scores=scores, prediction=best, right=right)
            )
            if advance is not None:
                advance(1)
        return found

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """The other of the two common accuracies: the likeliest continuation, long or short."""
        right = []
        for prediction in predictions:
            sums = [score * len(choice) for score, choice in zip(prediction.scores, prediction.choices)]
            right.append(prediction.choices[sums.index(max(sums))] == prediction.answer)
        return {"accuracy by the whole probability": statistics.accuracy(right, [told.cluster for told in predictions])}


# ---------------------------------------------------------------------------------------------- building


def perplexity(task: TaskConfig, seed: int) -> Perplexity:
    """`perplexity`: the pieces of a text, or the texts of a file of records, up to the limit.

    Raises:
        DataError: it holds no text.
    """
    name = check(TextOptions, task.options, "task perplexity").text
    if not (pieces := _pieces(name)):
        raise DataError(f"{name} holds no text", "name another file")
    items = tuple(_item(piece.strip(), "", (), f"{_stem(name)}/{place}") for place, piece in _drawn(pieces, task.limit))
    return Perplexity(f"{task.name}-{_stem(name)}", items, (Cut(f"{_stem(name)}, NLL per token"),))


def next_sentence(task: TaskConfig, seed: int) -> Continuation:
    """`next-sentence`: one sentence of each piece, among three of other pieces that are nearly as long.

    Raises:
        DataError: the text has too few different sentences that others precede.
    """
    name = check(TextOptions, task.options, "task next-sentence").text
    places = _places(name)
    if len({sentence for _, sentence in places}) < OPTIONS:
        raise DataError(f"{name} has too few sentences to choose the next one from", "give a longer text")
    items = tuple(
        _item(*_among(place, places), f"{_stem(name)}/{place}/next") for place, _ in _drawn(places, task.limit)
    )
    return Continuation(f"{task.name}-{_stem(name)}", items, (Cut(f"{_stem(name)}, next sentence of four"),))


def continuation(task: TaskConfig, seed: int) -> Continuation:
    """`continuation`: ARC, HellaSwag, PIQA, OpenBookQA, and `{context, choices, answer}`, by their keys.

    Raises:
        DataError: a record is none of these, or its answer none of its choices.
    """
    path = Path(check(TextOptions, task.options, "task continuation").text)
    asked = list(_asked(path))
    if not asked:
        raise DataError(f"{path} has no question", "give one JSON object a line")
    items = tuple(_item(*one, f"{path.stem}/{place}") for place, one in _drawn(asked, task.limit))
    return Continuation(f"{task.name}-{path.stem}", items, (Cut(f"{path.stem}, likeliest continuation"),))


TASKS: dict[str, Builder] = {"perplexity": perplexity, "next-sentence": next_sentence, "continuation": continuation}


def named_for(text: str) -> tuple[str, ...]:
    """The tasks that a file is for: what it holds tells.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(text)
    if text != DOCS and path.suffix in containers.ENDINGS:
        first = next((raw for _, raw in containers.opened(path).scan()), None)
        if isinstance(first, Mapping) and any(fits(first) for fits, _ in LAYOUTS):
            return ("continuation",)
    sentences = {sentence for _, sentence in _places(text)}
    return ("perplexity", "next-sentence") if len(sentences) >= 4 * OPTIONS else ("perplexity",)


def _item(context: str, answer: str, choices: Sequence[str], name: str) -> Item:
    return Item(Sample((Turn.say("user", context),), id=name), answer, tuple(choices), name, "")


def _drawn(found: Sequence[Found], limit: int | None) -> list[tuple[int, Found]]:
    """Places and what stands there, in order, as many as the limit."""
    count = min(limit or LIMIT, len(found))
    return [(place, found[place]) for place in drawn(len(found), count)]


def _stem(name: str) -> str:
    return name if name == DOCS else Path(name).stem


# ---------------------------------------------------------------------------------------------- texts


def _pieces(name: str) -> list[str]:
    """A text in pieces that end with a paragraph, or the `text` of every record of a file."""
    path = Path(name)
    if name == DOCS:
        from pydoc_data import topics

        whole = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    elif path.suffix in containers.ENDINGS:
        return [_text(raw, where) for where, raw in _records(path)]
    else:
        try:
            whole = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as text ({error})", "name a UTF-8 text file") from None
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", whole):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += f"{paragraph}\n\n"
    return [piece for piece in pieces if piece.strip()]


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where every record of a file stands, and the record.

    Raises:
        DataError: one is malformed.
    """
    for place, raw in containers.opened(path).scan():
        where = f"{path}:{place.line}"
        if isinstance(raw, Wrong):
            raise DataError(f"{where}: {raw.message}", raw.remedy)
        yield where, raw


def _text(raw: Any, where: str) -> str:
    text = raw.get("text") if isinstance(raw, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the record has no text", 'write {"text": "…"}, or a layout of multiple choice')
    return text


def _places(name: str) -> list[tuple[str, str]]:
    """Of each piece of a text that has room for it, what stands before a sentence, and the sentence."""
    return [found for number, piece in enumerate(_pieces(name)) if (found := _place(piece, f"{SEED} {number}"))]


def _place(piece: str, key: str) -> tuple[str, str] | None:
    """A place in a piece: what stands before it, and the sentence that follows; None where there is no room."""
    sentences = [sentence.strip() for sentence in SENTENCE.split(piece)]
    fit = [
        place for place, said in enumerate(sentences) if place >= 2 and 30 <= len(said) <= 300 and "\n\n" not in said
    ]
    if not fit:
        return None
    place = Random(f"next {key}").choice(fit)
    return " ".join(sentences[:place]), sentences[place]


def _among(place: int, places: Sequence[tuple[str, str]]) -> tuple[str, str, tuple[str, ...]]:
    """A place's context, its sentence, and that among others of its length."""
    context, true = places[place]
    random = Random(f"others {SEED} {place}")
    others = sorted({sentence for _, sentence in places} - {true})
    near = sorted(random.sample(others, min(8 * OPTIONS, len(others))), key=lambda one: abs(len(one) - len(true)))
    choices = [true, *near[: OPTIONS - 1]]
    random.shuffle(choices)
    return context, true, tuple(choices)


# ---------------------------------------------------------------------------------------------- multiple choice


def _asked(path: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Context, answer and choices of every record."""
    for where, raw in _records(path):
        try:
            read = next(read for fits, read in LAYOUTS if isinstance(raw, Mapping) and fits(raw))
            context, choices, right = read(raw)
            answer = choices[_number(right)]
        except (StopIteration, KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise DataError(
                f"{where}: no known layout of multiple choice, or an answer that is none of the choices",
                "see docs/evaluation.md for the layouts",
            ) from None
        if not all(choices) or len(set(choices)) < len(choices):
            raise DataError(f"{where}: a choice is empty, or there twice", "remove it")
        yield context, answer, tuple(choices)


def _number(label: int | str) -> int:
    """0 for `A`, `0` and 0.

    Raises:
        ValueError: it is neither a letter nor a place, as where a test set keeps its answers back.
    """
    return int(label) if str(label).isdecimal() else list(ascii_uppercase).index(str(label))


def _arc(raw: Any) -> tuple[str, list[str], int]:
    """ARC's and OpenBookQA's: `choices` with their labels, of the record or, as first published, of its question."""
    inner = raw["question"] if isinstance(raw.get("question"), Mapping) else raw
    choices = inner["choices"]
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [one["text"] for one in choices], [one["label"] for one in choices]
    stem = inner.get("question_stem", inner.get("stem", inner.get("question")))
    context = stem if "question_stem" in inner else f"Question: {stem}\nAnswer:"
    return context, list(texts), list(labels).index(raw["answerKey"])


def _hellaswag(raw: Any) -> tuple[str, list[str], str]:
    told = f"{raw['ctx_a']} {raw['ctx_b'].capitalize()}" if "ctx_a" in raw else raw["ctx"]
    context = _how_to(f"{raw['activity_label']}: {told}")
    return context, [_how_to(ending) for ending in raw["endings"]], str(raw["label"])


def _how_to(text: str) -> str:
    """HellaSwag's texts without WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(raw: Any) -> tuple[str, list[str], str]:
    return f"Question: {raw['goal']}\nAnswer:", [raw["sol1"], raw["sol2"]], str(raw["label"])


def _plain(raw: Any) -> tuple[str, list[str], Any]:
    choices = [str(choice) for choice in raw["choices"]]
    answer = raw["answer"]
    return str(raw["context"]), choices, choices.index(answer) if answer in choices else answer


LAYOUTS: tuple[tuple[Callable[[Any], bool], Callable[[Any], tuple[str, list[str], Any]]], ...] = (
    (lambda raw: "answerKey" in raw, _arc),
    (lambda raw: {"endings", "activity_label"} <= raw.keys(), _hellaswag),
    (lambda raw: {"goal", "sol1", "sol2"} <= raw.keys(), _piqa),
    (lambda raw: {"context", "choices", "answer"} <= raw.keys(), _plain),
)
"""How a layout is told, and read: context, choices, and the right one's number or label."""
