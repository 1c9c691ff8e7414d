"""What is measured of a model: the joint alone only where its vectors stand among the words'."""

from __future__ import annotations

from pathlib import Path

import pytest

import composed
from isthmus.config import TaskConfig
from isthmus.evaluation.measure import measure
from isthmus.evaluation.tasks import Choice, Cut, Item
from isthmus.types import Sample, Turn

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
