"""Right, wrong or not scored; and predictions files that are whole or not used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.evaluation import answers
from isthmus.evaluation.answers import Header, Prediction, choose, match, normalise
from isthmus.types import DataError


def prediction(place: int, right: bool | None = True) -> Prediction:
    prompt = "user: <image> é\u2028?"  # with a break that is no line's end in JSON
    return Prediction(f"id-{place}", "naming", "blind", prompt, ("a", "b"), (-1.5, -2.0), "a", "a", right, f"c{place}")


HEADER = Header("naming", "blind", "a rule", "0123456789ab", 3, {"dtype": "float32"})


@pytest.mark.parametrize(
    ("scores", "answer", "expected"),
    [
        ((-1.0, -2.0, -3.0), "a", ("a", True)),
        ((-1.0, -2.0, -3.0), "b", ("a", False)),
        ((-1.0, -1.0, -3.0), "a", (None, None)),  # the answer ties: a guess is not a score
        ((-1.0, -1.0, -3.0), "c", ("a", False)),  # wrong whichever of the two it says
        ((-1.0, math.nan, -3.0), "a", (None, None)),
        ((-1.0, -math.inf, -3.0), "a", (None, None)),
        ((-1.0, -2.0, -3.0), "z", (None, None)),
    ],
)
def test_choices_have_three_states(
    scores: tuple[float, ...], answer: str, expected: tuple[str | None, bool | None]
) -> None:
    assert choose(("a", "b", "c"), scores, answer) == expected


def asked(place: int, scores: dict[str, float], answer: str) -> Prediction:
    best, right = choose((*scores,), (*scores.values(),), answer)
    return replace(
        prediction(place, right), choices=(*scores,), scores=(*scores.values(),), prediction=best, answer=answer
    )


def test_calibrated_answers_are_what_rises_most() -> None:
    """By hand: `ring` is likely whatever is shown, and each picture raises its own name by less than that."""
    told = [
        asked(0, {"ring": -5, "oil drum": -9, "helicopter": -9.5}, "oil drum"),  # others: -4, -11, -9
        asked(1, {"ring": -3, "oil drum": -12, "helicopter": -10}, "ring"),  # others: -5, -9.5, -8.75
        asked(2, {"ring": -5, "oil drum": -10, "helicopter": -8}, "helicopter"),  # others: -4, -10.5, -9.75
    ]
    assert [one.right for one in told] == [False, True, False]
    assert answers.calibrated(told) == [1, 1, 1]
    favoured = [replace(one, scores=tuple(s + len(c) ** 2 for s, c in zip(one.scores, one.choices))) for one in told]
    assert answers.calibrated(favoured) == [1, 1, 1]  # what a name has in every item makes no difference


def test_calibrated_answers_under_a_blank_picture_are_at_chance() -> None:
    blank = [asked(place, {"a": -1 / 3, "b": -0.7, "c": -9.1}, "abc"[place % 3]) for place in range(7)]
    assert answers.calibrated(blank) == [pytest.approx(1 / 3)] * 7


def test_no_calibration_without_other_items_and_none_of_scores_that_are_no_numbers() -> None:
    lone = [asked(0, {"a": -1, "b": -2}, "a"), asked(1, {"a": -1, "c": -2}, "a")]
    assert answers.calibrated(lone) is None and answers.calibrated([]) is None
    spoilt = [asked(place, {"a": math.nan, "b": -2.0}, "b") for place in range(2)]
    assert answers.calibrated(spoilt) == [None, None]


@pytest.mark.parametrize(
    ("reply", "answer", "exact", "contained"),
    [
        ("Two.", "2", True, True),
        ("The red apple!", "red apple", True, True),
        ("I see a red-apple here", "red apple", False, True),
        ("a pineapple", "apple", False, False),
        ("", "apple", False, False),
        (None, "apple", None, None),
        ("apple", " ", None, None),
        ("CAFÉ", "cafe", True, True),
        ("ＣＡＴ", "cat", True, True),
        ("t-shirt", "t shirt", True, True),
        ("カラス", "ガラス", False, False),
        ("か\u3099", "が", True, True),  # the same letter in two pieces
        ("की", "का", False, False),
        ("It is कील.", "काला", False, False),
        ("ที่", "ที", False, False),
        ("-5", "5", False, False),
        ("It is -5°.", "−5°", False, True),
        ("2020-5", "2020 5", True, True),
        (".5", "5", False, False),
        ("$5", "5", False, False),
        ("5%", "5", False, False),
        ("C++", "C", False, False),
        ("F#", "F", False, False),
        ("#7", "7", True, True),
        ("`cat`", "**cat**", True, True),
        ("<", ">", False, False),
        (">", ">", True, True),
        ("😀", "😀", True, True),
        ("?", "!", False, False),
        ("", "?", False, False),
    ],
)
def test_free_replies_have_three_states(
    reply: str | None, answer: str, exact: bool | None, contained: bool | None
) -> None:
    assert match(reply, answer) is exact
    assert match(reply, answer, contains=True) is contained


def test_normalise_is_idempotent_and_keeps_other_scripts() -> None:
    for text in ("The  Three_Cats!", "Ω ß", "写真", "an", "?!", "-.5", "か\u200d\u3099", "x̂ ½ ≠"):
        assert normalise(normalise(text)) == normalise(text)
    assert normalise("The  Three_Cats!") == "3 cats" and normalise("写真") == "写真"


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "naming.blind.jsonl"
    wanted = [prediction(0), prediction(1, False), prediction(2, None)]
    answers.write(path, HEADER, wanted)
    assert answers.read(path) == (HEADER, wanted)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [row["right"] for row in rows[1:]] == [True, False, None]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    """Streams that break off amid a character leave one, and no UTF-8 holds it."""
    path = tmp_path / "naming.jsonl"
    wanted = [replace(prediction(0), prediction="é \ud83d", choices=("\ude00", "b")), prediction(1), prediction(2)]
    answers.write(path, HEADER, wanted)
    assert answers.read(path) == (HEADER, wanted)
    assert "é \\ud83d" in path.read_bytes().decode("utf-8")


def test_only_a_complete_file_with_the_same_fingerprint_is_reused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert answers.reusable(path, HEADER.fingerprint) is None
    answers.write(path, HEADER, [prediction(n) for n in range(3)])
    assert answers.reusable(path, HEADER.fingerprint) == [prediction(n) for n in range(3)]
    assert answers.reusable(path, "another") is None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    before = {name: value for name, value in json.loads(lines[0]).items() if name != "scoring"}
    path.write_text("".join([json.dumps(before) + "\n", *lines[1:]]), encoding="utf-8")
    assert answers.read(path)[1] and answers.reusable(path, HEADER.fingerprint) is None  # replies were scored otherwise
    for damaged in ("".join(lines[:-1]), "".join(lines)[:-20], "", "[1, 2]\n"):
        path.write_text(damaged, encoding="utf-8")
        assert answers.reusable(path, HEADER.fingerprint) is None
        with pytest.raises(DataError, match="p.jsonl"):
            answers.read(path)
