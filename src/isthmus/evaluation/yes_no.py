"""Questions to be answered with yes or no, on the user's own files: POPE's rates and MME's scores.

What these count, and where it is from, is in `metrics.judgements`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from isthmus.config import TaskConfig, check
from isthmus.evaluation import statistics
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.files import File, Scored, kind_of, picture_of, rounds, task_of
from isthmus.evaluation.metrics import judgements
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import Builder, Item
from isthmus.types import DataError, Sample

MOST = 200.0
"""MME's score of a sub-task at its best."""


class YesNo(Scored):
    """POPE's and MME's questions."""

    rule = "yes or no as the free reply's first word, else as the one of both that it holds; neither, or both, is wrong"

    def share(self, reply: str, item: Item) -> bool:
        return judgements.judgement(reply) is judgements.judgement(item.answer)

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        """POPE's rates; MME's score where each picture has two questions."""
        clusters = [prediction.cluster for prediction in predictions]
        found = {f"POPE {name}": _share(counted, clusters) for name, counted in _pope(predictions).items()}
        return found | _pope_settings(predictions) | _mme(predictions)


def yes_no(task: TaskConfig, seed: int) -> YesNo:
    """`yes-no`: POPE, MME, VSR; rows by the `category` of a question, where it has one."""
    built = task_of(YesNo, "yes or no", task, check(File, task.options, "task yes-no"), seed, group=_pairs)
    for item in built.items:
        if judgements.judgement(item.answer) is None:
            raise DataError(f"{item.prompt.id}: the answer is neither yes nor no: {item.answer[:40]!r}", "correct it")
    return built


TASKS: dict[str, Builder] = {"yes-no": yes_no}


def _pairs(samples: Sequence[Sample]) -> tuple[list[Hashable], int]:
    """Two questions of one category about one picture, where there are two about every one, as MME has them."""
    groups: list[Hashable] = [(kind_of(sample), picture_of(sample)) for sample in samples]
    return (groups, 2) if set(Counter(groups).values()) == {2} else rounds(samples)


def _share(counted: judgements.Counted, clusters: Sequence[Hashable]) -> Estimate:
    """A rate's share with its interval; of nothing that counts it is 0, and nothing is known of it."""
    if not counted:
        return Estimate(0.0, 0.0, 1.0, 0.0, 0.0, 0, 0)
    return statistics.accuracy([hit for _, hit in counted], [clusters[place] for place, _ in counted])


def _pope(predictions: Sequence[Prediction]) -> dict[str, judgements.Counted]:
    said = [judgements.judgement(prediction.prediction or "") for prediction in predictions]
    return judgements.pope(said, [judgements.judgement(prediction.answer) is True for prediction in predictions])


def _pope_settings(predictions: Sequence[Prediction]) -> dict[str, Estimate]:
    """POPE's F1 of each setting and their mean, where the categories are its settings and several of them."""
    kinds = [prediction.kind for prediction in predictions]
    if len(set(kinds)) < 2 or not set(kinds) <= {"random", "popular", "adversarial"}:
        return {}
    clusters, f1 = [prediction.cluster for prediction in predictions], _pope(predictions)["f1"]
    each = {kind: [one for one in f1 if kinds[one[0]] == kind] for kind in sorted(set(kinds))}
    found = {f"POPE f1, {kind}": _share(counted, clusters) for kind, counted in each.items()}
    if not all(each.values()):
        return found
    hits, places = [hit for _, hit in f1], [place for place, _ in f1]
    mean = statistics.macro(hits, [kinds[place] for place in places], [clusters[place] for place in places])
    return found | {"POPE f1, mean of settings": mean}


def _mme(predictions: Sequence[Prediction]) -> dict[str, Estimate]:
    """MME's score per category, in its two groups and in all; nothing without categories, or where pictures have not
    two questions each."""
    pictures: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    for prediction in predictions:
        pictures[prediction.kind, prediction.cluster].append(prediction.right is True)
    if not all(kind and len(pair) == 2 for (kind, _), pair in pictures.items()):
        return {}
    scores = [(kind, picture, part) for (kind, picture), part in zip(pictures, judgements.mme(pictures.values()))]
    kinds = {kind for kind, _ in pictures}

    def total(members: set[str]) -> Estimate:
        """The sum of sub-tasks' scores, each the mean over its own pictures."""
        chosen = [(part / MOST, kind, picture) for kind, picture, part in scores if kind in members]
        return statistics.macro(*zip(*chosen)).through(lambda share: MOST * len(members) * share)  # type: ignore[arg-type]

    groups = {f"MME {group}": total(members) for group, members in judgements.MME.items() if members <= kinds}
    return {"MME score": total(kinds), **groups, **{f"MME {kind}": total({kind}) for kind in sorted(kinds)}}
