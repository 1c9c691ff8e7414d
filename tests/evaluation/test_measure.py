"""What is measured of a model: which columns, and of how many items."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import composed
from isthmus.config import TaskConfig
from isthmus.data.choices import ROUND
from isthmus.evaluation.answers import CALIBRATED_RULE, Prediction
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.files import Captions
from isthmus.evaluation.measure import check_exchanges, measure, merge, rules, some
from isthmus.evaluation.results import examples, rows
from isthmus.evaluation.tasks import Choice, Cut, Item
from isthmus.types import DataError, Sample, Turn

ITEMS = tuple(
    Item(Sample((Turn.say("user", composed.picture(n), "what?"),), str(n)), "a cat", ("a cat", "a dog"), str(n), "")
    for n in range(2)
)


@pytest.mark.parametrize(("aligner", "columns"), [("llava", ["after", "cosine"]), ("flamingo", ["after"])])
def test_the_joint_alone_is_measured_where_its_vectors_are_like_words(
    aligner: str, columns: list[str], tmp_path: Path
) -> None:
    task = Choice("t", ITEMS, (Cut("T"),), cosine=True)
    found = measure(composed.model(aligner=aligner), [(task, TaskConfig(name="t", controls=()))], 0, tmp_path)
    assert list(found["t"][1]) == columns
    assert all(len(predictions) == 2 for predictions in found["t"][1].values())


def test_baselines_may_be_asked_fewer_items_and_are_paired_with_the_same_ones(tmp_path: Path) -> None:
    items = tuple(
        Item(Sample((Turn.say("user", composed.picture(n), "what?"),), str(n)), "a cat", ("a cat", "a dog"), str(n), "")
        for n in range(9)
    )
    task, model = Choice("t", items, (Cut("T"),), cosine=True), composed.model()
    few = [(task, TaskConfig(name="t", baseline_limit=4))]
    assert rules(few) == f"{task.rule}; {CALIBRATED_RULE}"
    assert rules([(replace(task, cosine=False), few[0][1])]) == task.rule
    before = measure(model, few, 0, tmp_path, column="before")
    found = merge(before, measure(model, few, 0, tmp_path))["t"][1]
    sizes = {column: len(told) for column, told in found.items()}
    assert sizes == {"before": 4, "after": 9, "blind": 4, "shuffled": 4, "cosine": 9}
    asked = [prediction.id for prediction in found["blind"]]
    assert asked == sorted(asked, key=int) and asked == [one.id for one in found["shuffled"]]
    assert asked == [one.id for one in measure(model, few, 1, tmp_path / "other")["t"][1]["blind"]]
    whole = {one.id: one.right for one in found["after"]}
    (row,) = rows(task, found)
    assert (row.n, row.fewest) == (9, 4) and set(row.besides["no name favoured"]) == {"after", "cosine"}
    gained = sum(bool(whole[one.id]) - bool(one.right) for one in found["blind"]) / 4
    assert row.gains["blind"].value == pytest.approx(gained)
    shown = examples({"t": (task, found)}, 9)
    assert sorted(one.after.id for one in shown) == sorted(asked)
    assert all(one.before is not None and one.before.id == one.after.id for one in shown)


def items(kinds: str) -> tuple[Item, ...]:
    return tuple(replace(ITEMS[0], prompt=ITEMS[0].prompt.but(id="twin"), kind=kind) for kind in kinds)


def test_answers_of_another_batch_size_are_asked_anew(tmp_path: Path) -> None:
    task, model = Choice("t", ITEMS, (Cut("T"),)), composed.model()
    for size in (1, 1, 2):
        measure(model, [(task, TaskConfig(name="t", controls=()))], 0, tmp_path, batch_size=size)
    kept = [json.loads(file.read_text().splitlines()[0]) for file in tmp_path.rglob("t*.jsonl")]
    assert sorted(header["settings"]["batch"] for header in kept) == [1, 2]


def test_items_of_one_name_are_paired_by_their_place() -> None:
    task = Choice("t", items("aaaaaaaaa"), (Cut("T"),))
    after = [predicted(one, right=place % 2 == 0) for place, one in enumerate(task.items)]
    blind = [after[place] for place in drawn(9, 4)]
    (row,) = rows(task, {"after": after, "blind": blind})
    assert row.gains["blind"].value == 0


def test_a_kind_that_no_baseline_was_asked_of_has_none() -> None:
    kinds = "".join("b" if place == next(n for n in range(9) if n not in drawn(9, 4)) else "a" for place in range(9))
    task = Choice("t", items(kinds), (Cut("all"), Cut("only b", frozenset("b"))))
    after = [predicted(one, right=True) for one in task.items]
    whole, alone = rows(task, {"after": after, "blind": [after[place] for place in drawn(9, 4)]})
    assert set(whole.cells) == {"after", "blind"} and set(alone.cells) == {"after"} and alone.n == 1


def predicted(one: Item, right: bool) -> Prediction:
    return Prediction(one.prompt.id, "t", None, "", (), (), None, one.answer, right, one.cluster, one.kind)


def test_what_is_scored_together_stays_together() -> None:
    captions = Captions("t", ITEMS * 3, (Cut("T"),))
    circular = Choice(
        "t", tuple(replace(one, prompt=one.prompt.but(id=f"1{ROUND}{n}")) for n, one in enumerate(ITEMS)), ()
    )
    assert some(captions, 2) is captions and some(circular, 1) is circular
    assert len(some(Choice("t", ITEMS, ()), 1).items) == 1


def test_pictures_that_cannot_be_exchanged_are_noticed_at_once() -> None:
    with pytest.raises(DataError, match="cannot be exchanged"):
        check_exchanges([(Choice("t", ITEMS, ()), TaskConfig(name="t", baseline_limit=1))])
