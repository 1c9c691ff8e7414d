"""What is gathered of runs that differ: kinds that only some seeds drew, and recipes of which one cannot be run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console

from comparing_runs import recipes
from isthmus.comparing import gather, page
from isthmus.comparing.engine import Here
from isthmus.comparing.gather import Quality
from isthmus.comparing.plan import Job
from isthmus.errors import IsthmusError
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import Choice, Cut, Item
from isthmus.types import Image, Sample, Turn


def predicted(kinds: str) -> list[Prediction]:
    """An answer per letter, which is its kind; those of kind `a` are right."""
    return [
        Prediction(f"{n}", "t", None, "", (), (), None, "yes", kind == "a", f"{n}", kind)
        for n, kind in enumerate(kinds)
    ]


def test_a_kind_that_one_seed_drew_none_of_is_no_line() -> None:
    items = [
        Item(Sample((Turn.say("user", "?"),), f"{n}"), "yes", ("yes", "no"), f"{n}", kind)
        for n, kind in enumerate("aabc")
    ]
    cuts = (Cut("all"), *(Cut(kind, frozenset(kind)) for kind in "abc"))
    task = Choice("t", tuple(items), cuts)
    answers: gather.Answers = {
        name: {"t": [{"after": predicted("aabc")}, {"after": predicted("abbb")}]} for name in ("one", "two")
    }
    quality = Quality(answers, gather.questions([task]), "one", draws=50)
    lines = {line.label: line.cells["two"].level.value for line in (quality.line([each]) for each in quality.asked)}
    assert lines == pytest.approx({"all": (2 / 4 + 1 / 4) / 2, "a": 1.0, "b": 0.0})


def test_a_baseline_that_was_asked_fewer_items_is_compared_over_these() -> None:
    task = Choice(
        "t",
        tuple(Item(Sample((Turn.say("user", "?"),), f"{n}"), "yes", ("yes", "no"), f"{n}", "") for n in range(4)),
        (Cut("all"),),
    )
    after = predicted("aabb")
    one, two = (after[place] for place in drawn(4, 2))
    runs = {"after": after, "blind": [one, replace(two, right=not two.right)]}
    answers: gather.Answers = {name: {"t": [runs, runs]} for name in ("one", "two")}
    quality = Quality(answers, gather.questions([task]), "one", draws=50)
    cell = quality.line(quality.asked).cells["two"]
    assert cell.level.value == 0.5
    assert cell.seen is not None and cell.seen.value == (0.5 if two.right else -0.5)  # one of two items differs


class Counted(Choice):
    """A task that reports how many are right, too."""

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        right = float(sum(prediction.right is True for prediction in predictions))
        return {"right": Estimate(right, 0, 4, right, right, 4, 4)}


def test_further_figures_are_means_over_seeds() -> None:
    items = tuple(
        Item(Sample((Turn.say("user", "?"),), f"{n}"), "yes", ("yes", "no"), f"{n}", kind)
        for n, kind in enumerate("aabb")
    )
    task = Counted("t", items, (Cut("all"), Cut("only a", frozenset("a"))))
    runs = [{"after": predicted("aaab")}, {"after": predicted("abbb")}]
    answers: gather.Answers = {
        "one": {"t": runs},
        "two": {"t": [runs[0], {"after": [replace(one, right=None) for one in predicted("abbb")]}]},
    }
    quality = Quality(answers, gather.questions([task]), "one", draws=50)
    line = quality.line(quality.asked[:1])
    assert line.cells["one"].besides == {"right": 2.0} and line.cells["two"].besides == {}
    assert quality.line(quality.asked[1:2]).cells["one"].besides == {}


def test_what_has_no_picture_is_contrasted_in_words() -> None:
    item = Item(Sample((Turn.say("user", "?"),), "0"), "yes", ("yes", "no"), "0", "")
    task = Choice("t", (item,), (Cut("all"),))
    answers: gather.Answers = {"one": {"t": [{"after": predicted("b")}]}, "two": {"t": [{"after": predicted("a")}]}}
    contrast = Quality(answers, gather.questions([task]), "one", draws=50).contrast("two")
    assert (contrast.won, contrast.lost, contrast.shown[0].picture) == (1, 0, None)
    assert "<img" not in page._contrast(contrast, "one") and "yes" in page._contrast(contrast, "one")


def test_shares_of_right_are_contrasted_too() -> None:
    """As VQA accuracy scores: from a half on an answer is right, and 0.0 is wrong as much as False."""
    items = tuple(Item(Sample((Turn.say("user", "?"),), f"{n}"), "yes", (), f"{n}", "") for n in range(5))
    shares = {"one": (0.0, 1.0, 0.3, 0.6, None), "two": (1.0, 0.0, 0.9, 1.0, 1.0)}
    answers: gather.Answers = {
        name: {"t": [{"after": [replace(one, right=share) for one, share in zip(predicted("aaaaa"), each)]}]}
        for name, each in shares.items()
    }
    task = Choice("t", items, (Cut("all"),))
    contrast = Quality(answers, gather.questions([task]), "one", draws=50).contrast("two")
    assert (contrast.won, contrast.lost, contrast.items) == (2, 1, 5)
    whole = Whole("t", items, (Cut("all"),))
    assert Quality(answers, gather.questions([whole]), "one", draws=50).contrast("two").items == 0


class Whole(Choice):
    """A task whose scores depend on all items together, as CIDEr does."""

    divisible = False


def test_items_that_differ_are_shown_with_their_own_pictures() -> None:
    colours = [(n, 100, 200) for n in range(4)]
    asked = [Turn.say("user", Image(Pillow.new("RGB", (4, 4), colour)), f"{n}?") for n, colour in enumerate(colours)]
    items = tuple(Item(Sample((turn,), f"{n}"), "yes", ("yes", "no"), f"{n}", "") for n, turn in enumerate(asked))
    task = Choice("t", items, (Cut("all"),))
    said = {"one": "aabb", "two": "baab"}
    answers: gather.Answers = {name: {"t": [{"after": predicted(kinds)}]} for name, kinds in said.items()}
    contrast = Quality(answers, gather.questions([task]), "one", draws=50).contrast("two")
    assert (contrast.won, contrast.lost, contrast.items) == (1, 1, 4)
    assert [(shown.right, shown.question) for shown in contrast.shown] == [("two", "2?"), ("one", "0?")]
    assert [shown.picture.getpixel((0, 0)) for shown in contrast.shown if shown.picture] == [colours[2], colours[0]]
    assert page._contrast(contrast, "one").count("<img") == 2


def test_a_recipe_that_fails_here_keeps_no_other_from_being_done(tmp_path: Path, embedded: None) -> None:
    good = recipes(tmp_path)[0].but(eval=())
    bad = good.but(name="bad", llm=str(tmp_path / "nowhere"))
    runs = ((bad, 0), (bad, 1), (good, 0))
    jobs = [Job(each, tmp_path / each.name / f"seed{seed}", each.name) for each, seed in runs]
    told = []
    with pytest.raises(IsthmusError, match="nowhere"):
        Here(Console(file=io.StringIO()), torch.device("cpu"))(jobs, lambda job, outcome: told.append((job, outcome)))
    assert told == [(jobs[2], "done")] and not jobs[1].folder.exists()
