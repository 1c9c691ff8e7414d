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
