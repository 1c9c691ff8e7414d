"""Tasks on the user's own files: free replies to their questions, scored as the benchmark that they come from scores.

One task name per way of scoring. `options.data` names the file as a training source does; what else a score needs
stands in the samples' `meta`, where `isthmus.data` puts it for the layouts that it knows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from pydantic import Field

from isthmus.config import Frozen, OneSource, TaskConfig, check
from isthmus.data.choices import ROUND
from isthmus.evaluation import controls, grounding, statistics, tasks
from isthmus.evaluation.answers import Prediction, match, normalise
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.metrics import captions, documents, vqa
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import Advance, Builder, Cut, Free, Item, Task
from isthmus.prepare import tags
from isthmus.types import Box, DataError, Medium, Sample

Group: TypeAlias = Callable[[Sequence[Sample]], tuple[Sequence[Hashable], int]]
"""The group of every sample, and how many questions each is."""


class File(Frozen):
    """Options of a task on a file."""

    data: OneSource
    """The file, where its pictures are, and how it is read, as in a stage's `data`."""
    one_wording: bool = True
    """Ask every question in the same words, unless the source's own options say otherwise."""
    longest: int | None = Field(None, ge=1)
    """Tokens of a reply; None: as many as such tasks have."""


@dataclass(frozen=True)
class Scored(Free):
    """A free reply whose score is a function of itself and the item."""

    longest: int = field(default=32, kw_only=True)

    @abstractmethod
    def share(self, reply: str, item: Item) -> float | bool | None:
        """How right a reply is, from 0 to 1; None: not scored."""

    def score(
        self, scorer: Scorer, item: Item, prompt: Sample, reply: str | None
    ) -> tuple[float | bool | None, tuple[float, ...]]:
        share = None if reply is None else self.share(reply, item)
        return share, () if share is None else (float(share),)


class Exact(Scored):
    """GQA's and OCRBench's rule: the reply is an answer."""

    rule = (
        "free reply equals an answer, after case, accents of Latin letters, punctuation, articles and number words "
        "are evened out"
    )

    def share(self, reply: str, item: Item) -> bool | None:
        told = [match(reply, answer) for answer in known(item) if normalise(answer)]
        return any(told) if told else None


class People(Scored):
    """VQAv2's and TextVQA's rule: how many of the people who were asked said the same."""

    rule = "VQA accuracy: mean over people left out in turn of min(1, others who said the same / 3), text normalised"

    def share(self, reply: str, item: Item) -> float:
        return vqa.accuracy(reply, item.references)


class Documents(Scored):
    """DocVQA's, InfographicVQA's and ST-VQA's rule."""

    rule = "ANLS: how alike a free reply and the nearest answer are, letter by letter; nothing below a half"

    def share(self, reply: str, item: Item) -> float:
        return documents.anls(reply, known(item))


class Charts(Scored):
    """ChartQA's and PlotQA's rule."""

    rule = "relaxed accuracy: the free reply is a number within 5 % of an answer, or an answer's text"

    def share(self, reply: str, item: Item) -> bool:
        return any(documents.relaxed(reply, answer) for answer in known(item))


@dataclass(frozen=True)
class Captions(Free):
    """COCO's metrics. A picture's items are its references; each picture is asked once."""

    longest: int = field(default=40, kw_only=True)
    divisible: ClassVar[bool] = False
    rule = "CIDEr-D of a free reply against all captions of its picture, / 10; words split without Java (see the docs)"

    def score(self, scorer: Scorer, item: Item, prompt: Sample, reply: str | None) -> tuple[None, tuple[float, ...]]:
        return None, ()  # a score depends on all captions together

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        """As in `Free`, scored once all replies are there."""
        found = super().predict(scorer, prompts, advance)
        scores = captions.cider([captions.tokens(one.prediction or "") for one in found], self.references)
        return [
            one if one.prediction is None else replace(one, right=score / 10, scores=(score,))
            for one, score in zip(found, scores)
        ]

    @property
    def references(self) -> list[list[list[str]]]:
        """The tokens of every item's captions."""
        return [[captions.tokens(text) for text in item.references] for item in self.items]

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """BLEU, ROUGE-L and CIDEr as papers print them."""
        pairs = [(captions.tokens(one.prediction or ""), texts) for one, texts in zip(predictions, self.references)]
        clusters = [prediction.cluster for prediction in predictions]
        cider = statistics.accuracy([float(prediction.right or 0) for prediction in predictions], clusters)
        return {
            "BLEU-4": statistics.of_sums([captions.bleu_counts(*pair) for pair in pairs], captions.bleu_of, clusters),
            "ROUGE-L": statistics.accuracy([captions.rouge_l(*pair) for pair in pairs], clusters),
            "CIDEr": cider.through(lambda share: 10 * share),
        }


# ---------------------------------------------------------------------------------------------- building


def plainly(make: Callable[..., Task], what: str) -> Builder:
    """The builder of a task that asks nothing of its file but questions with answers."""
    return lambda task, seed: task_of(make, what, task, check(File, task.options, f"task {task.name}"), seed)


def people(task: TaskConfig, seed: int) -> People:
    """`vqa`: VQAv2, TextVQA, VizWiz; several people's `answers`.

    Raises:
        DataError: an item has fewer answers than make one wholly right when each is left out in turn.
    """
    built = task_of(People, "VQA accuracy", task, check(File, task.options, "task vqa"), seed)
    for item in built.items:
        if len(item.references) <= vqa.ENOUGH:
            raise DataError(
                f"{item.prompt.id}: answers of {len(item.references)} people, and VQA accuracy needs {vqa.ENOUGH + 1}",
                'write more into {"answers": […]}, or score with the task exact',
            )
    return built


def captioning(task: TaskConfig, seed: int) -> Captions:
    """`captions`: COCO, NoCaps, TextCaps, Flickr30k; samples with the same picture are its references."""
    built = task_of(Captions, "CIDEr-D / 10", task, check(File, task.options, "task captions"), seed, _gathered)
    if len(built.items) < 2:
        raise DataError(
            "task captions has one picture, and CIDEr tells words by how rare they are among pictures", "ask about more"
        )
    return built


def locate(task: TaskConfig, seed: int) -> grounding.Locate:
    """`refer`: RefCOCO, RefCOCO+, RefCOCOg; one region per phrase."""
    how = check(File, task.options, "task refer")
    return task_of(grounding.Locate, f"IoU >= {grounding.ENOUGH}", task, how, seed, _with_region)


TASKS: dict[str, Builder] = {
    "exact": plainly(Exact, "exact match"),  # GQA, and whatever else has one answer
    "vqa": people,
    "anls": plainly(Documents, "ANLS"),
    "relaxed": plainly(Charts, "relaxed accuracy"),
    "captions": captioning,
    "refer": locate,
}


def task_of(
    make: Callable[..., Any],
    what: str,
    config: TaskConfig,
    how: File,
    seed: int,
    read: Callable[[Sequence[Sample]], Sequence[Sample]] = tuple,
    group: Group | None = None,
) -> Any:
    """A task over the items of a file, of which as many as the limit are drawn, the same ones for every seed.

    Args:
        read: what is asked of the file's samples; all of them as a rule.
        group: which samples are drawn together, and how many questions such a group is; the rounds of a question else.

    Raises:
        DataError: the file is wrong, or holds no question.
    """
    source = how.data.but(split="test") if how.data.split == "train" else how.data  # nothing of it is held out
    if how.one_wording and "instructions" not in source.options:
        source = source.but(options={**source.options, "instructions": "one"})
    samples = read(tags.open_set(source, seed))
    if not samples:
        raise DataError(
            f"{source.name} has no item for task {config.name!r}", "`isthmus data stats` shows what it holds"
        )
    places = range(len(samples)) if config.limit is None else _drawn(*(group or rounds)(samples), config.limit)
    items = tuple(item(samples[place]) for place in places)
    label = f"{Path(source.name).stem}, {what}"
    kinds = sorted({item.kind for item in items})
    cuts = (Cut(label), *(Cut(f"{label}: {kind}", frozenset({kind})) for kind in kinds if len(kinds) > 1))
    made = make(f"{config.name}-{Path(source.name).stem}", items, cuts)
    return made if how.longest is None else replace(made, longest=how.longest)


def _drawn(groups: Sequence[Hashable], questions: int, limit: int) -> list[int]:
    """The places of up to `limit` questions, in order: whole groups, by the name of each place's, and one at least."""
    places: dict[Hashable, list[int]] = {}
    for place, name in enumerate(groups):
        places.setdefault(name, []).append(place)
    together = list(places.values())
    chosen = drawn(len(together), min(max(1, limit // questions), len(together)))
    return sorted(place for number in chosen for place in together[number])


def rounds(samples: Sequence[Sample]) -> tuple[list[Hashable], int]:
    """Each by itself; a question whose options are moved about is one with all of its rounds."""
    ids = [sample.id for sample in samples]
    moved = {name.partition(ROUND)[0] for name in ids if ROUND in name}
    names = (name.partition(ROUND)[0] for name in ids)
    return [own if own in moved else place for place, own in enumerate(names)], 1


def known(item: Item) -> tuple[str, ...]:
    """All answers that are right."""
    return item.references or (item.answer,)


def item(sample: Sample) -> Item:
    """As `tasks.item`, grouped by picture; the kind is the sample's own category.

    Raises:
        DataError: it does not end with an answer.
    """
    bare = tasks.item(sample.but(meta={}))
    return replace(
        bare,
        prompt=bare.prompt.but(meta=sample.meta),
        choices=_texts(sample, "choices"),
        references=_texts(sample, "answers"),
        cluster=picture_of(sample),
        kind=kind_of(sample),
    )


def picture_of(sample: Sample) -> str:
    """What tells the picture from others, or a sample that shows nothing."""
    return " ".join(map(_name, sample.media)) or sample.id.partition(ROUND)[0]


def kind_of(sample: Sample) -> str:
    return str(sample.meta.get("category", ""))


def _name(medium: Medium) -> str:
    """What tells a picture from others: its path, else a hash of its content."""
    source = medium.source
    return str(source) if isinstance(source, str | Path) else str(controls.key(medium))


def _texts(sample: Sample, name: str) -> tuple[str, ...]:
    """A list in the sample's `meta`, of texts or of annotators' objects; empty where there is none.

    Raises:
        DataError: it is no list, or an object in it has no answer.
    """
    found = sample.meta.get(name) or ()
    if not isinstance(found, list | tuple) or any(isinstance(one, Mapping) and "answer" not in one for one in found):
        raise DataError(
            f"{sample.id}: the {name} in its meta are no list of texts, or of objects with an answer",
            f'write {{"meta": {{"{name}": ["…", …]}}}} or {{"meta": {{"{name}": [{{"answer": "…"}}, …]}}}}',
        )
    return tuple(str(one["answer"] if isinstance(one, Mapping) else one) for one in found)


def need(built: Any, what: Callable[[Item], Any], name: str) -> Any:
    """The task, if every item has what its score needs.

    Raises:
        DataError: one does not.
    """
    for item in built.items:
        if not what(item):
            raise DataError(
                f"{item.prompt.id}: its meta has no {name}", f'write {{"meta": {{"{name}": […]}}}}, or score otherwise'
            )
    return built


def _gathered(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per picture, the answers of all of its samples as its references."""
    by_picture: dict[str, list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(picture_of(sample), []).append(sample)
    return [
        same[0].but(meta={**same[0].meta, "answers": [one.turns[-1].text for one in same]})
        for name, same in by_picture.items()
    ]


def _with_region(samples: Sequence[Sample]) -> list[Sample]:
    """Those whose answer is a region, with its corners in `meta` where the score looks for them."""
    found = []
    for sample in samples:
        regions = [part for part in sample.turns[-1].parts if isinstance(part, Box)]
        if len(regions) == 1:
            found.append(sample.but(meta={**sample.meta, "box": regions[0].xyxy}))
    return found
