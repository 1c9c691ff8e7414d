"""MMMU's rule for open answers says what the official code said (benchmarks/open_answers_vs_mmmu.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.evaluation.metrics import open_answers

KEPT = json.loads((Path(__file__).parent / "open_answers.json").read_text())
PAIRS = [(reply, truth) for reply in KEPT["replies"] for truth in KEPT["truths"]]


def test_as_the_official_code() -> None:
    said = "".join("01"[open_answers.right(reply, truth)] for reply, truth in PAIRS)
    wrong = [pair for pair, ours, theirs in zip(PAIRS, said, KEPT["right"], strict=True) if ours != theirs]
    assert not wrong, wrong[:5]
    assert 0 < KEPT["right"].count("1") < len(PAIRS)


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("So x = 12", ["12.00"], True),
        ("The total is 1,500 metres.", ["1500"], True),
        ("It is a B", ["b"], True),
        ("about", ["b"], False),
        ("", ["12"], False),
    ],
)
def test_by_hand(reply: str, answers: list[str], right: bool) -> None:
    assert open_answers.right(reply, answers) is right
