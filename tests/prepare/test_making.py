"""Conversations made from captions and boxes: a real speaker behind a real server writes them, and rules judge them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from chat_server import ChatServer, running
from isthmus.prepare import instructions
from isthmus.prepare.curation import curated
from isthmus.prepare.filters import uncurated
from isthmus.prepare.instructions import Made, broken
from isthmus.speakers.remote import Remote
from isthmus.speakers.settings import RemoteConfig
from isthmus.types import Box, Image, Part, Sample, Turn

GOOD = {
    "conversation": "Question: What is it?\nAnswer: A fox.\n\n**Question:** Where is it?\n**Answer:** On the left.",
    "detail": " ".join(f"The fox number {n} sits beside tree {n * 7}." for n in range(8)),
    "reasoning": "Question: Why is it wet?\nAnswer: " + " ".join(f"reason{n}" for n in range(20)),
}


def kind_of(system: str) -> str:
    return next(kind for kind, request in instructions.REQUESTS.items() if request == system)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with running() as server:
        server.reply = lambda body: GOOD[kind_of(body["messages"][0]["content"])]
        yield server
        assert server.faults == []


def captioned() -> list[Sample]:
    """Two captions and a region of one picture, a caption of another, and a short answer that is no sentence."""
    fox, wolf = Image(Path("fox.png")), Image(Path("wolf.png"))
    said: list[tuple[Image, tuple[Part | str, ...]]] = [
        (fox, ("A fox on the grass.",)),
        (fox, ("The fox is red.",)),
        (fox, (Box((0.1, 0.25, 0.5, 1.0), "fox"),)),
        (wolf, ("A wolf at night.",)),
        (wolf, ("No.",)),
    ]
    return [
        Sample((Turn.say("user", picture, "?"), Turn.say("assistant", *answer)), str(number))
        for number, (picture, answer) in enumerate(said)
    ]


def test_what_is_known_of_a_picture_is_gathered() -> None:
    fox, wolf = instructions.gathered(captioned())
    assert fox.told == "A fox on the grass.\nThe fox is red.\n\nfox: [0.10, 0.25, 0.50, 1.00]"
    assert wolf.told == "A wolf at night." and wolf.picture == Image(Path("wolf.png"))


def test_a_limit_keeps_pictures_whole_and_counts_those_of_which_something_is_said() -> None:
    wolf, *_ = samples = captioned()[::-1]  # "No." says nothing of the wolf yet
    assert wolf.turns[1].text == "No."
    (one,) = instructions.gathered([wolf, *samples[2:], *samples[:2]], limit=1)
    assert one.picture == Image(Path("fox.png")) and len(one.sentences) == 2 and len(one.boxes) == 1


def test_a_picture_is_one_however_its_path_is_spelt(tmp_path: Path) -> None:
    """Captions and regions of it come from files in several folders."""
    (tmp_path / "more").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "more")
    spelt = (tmp_path / "0.png", tmp_path / "more" / ".." / "0.png", str(tmp_path / "link" / ".." / "0.png"), b"raw")
    samples = [
        Sample((Turn.say("user", Image(source), "?"), Turn.say("assistant", f"A fox of file {number}.")))
        for number, source in enumerate((*spelt, b"raw"))
    ]
    fox, raw = instructions.gathered(samples)
    assert fox.picture == Image(spelt[0]) and len(fox.sentences) == 3 and len(raw.sentences) == 2


def test_conversations_are_made_kept_and_not_paid_twice(server: ChatServer, tmp_path: Path) -> None:
    config = RemoteConfig(endpoint=server.endpoint, model="writer", cache=tmp_path / "cache")
    seen, kinds = instructions.gathered(captioned()), ("conversation", "detail", "reasoning")
    for asked in (6, 6):  # the second time from the cache
        made = Made()
        with Remote(config) as speaker:
            samples = list(instructions.make(seen, kinds, speaker, made))
        assert made.samples == len(samples) == 6 and not made.refused and len(server.bodies) == asked
    conversation, detail, reasoning, *_ = samples
    assert [turn.text for turn in conversation.turns] == ["\nWhat is it?", "A fox.", "Where is it?", "On the left."]
    assert conversation.media == (Image(Path("fox.png")),) and reasoning.turns[0].text == "\nWhy is it wet?"
    assert detail.meta["kind"] == "detail" and detail.turns[1].text == GOOD["detail"]
    told = [body["messages"][1]["content"] for body in server.bodies]  # sent side by side, in any order
    assert sum(text.startswith("A fox on the grass.") for text in told) == 3
    assert speaker.usage.cached == 6


@pytest.mark.parametrize(
    ("kind", "said", "rule"),
    [
        ("conversation", [], "not in the form"),
        ("conversation", [("What?", "A."), ("What?", "B.")], "not in the form"),
        ("conversation", [("What does the caption say?", "A fox.")], "speaks of its source"),
        ("conversation", [("Where?", "At [0.12, 0.30, 0.5, 0.6].")], "holds coordinates"),
        ("conversation", [("What?", "A fox in <image>.")], "holds a marker"),
        ("conversation", [("What is in <img>1</img>?", "A fox.")], "holds a marker"),
        ("detail", [("Describe.", "A fox.")], "too short"),
        ("detail", [("Describe.", "The fox is very red. " * 15)], "repeats itself"),
        ("conversation", [("What?", "A fox.")], ""),
    ],
)
def test_replies_that_break_a_rule_are_named(kind: instructions.Kind, said: list[tuple[str, str]], rule: str) -> None:
    assert broken(kind, said).startswith(rule) and bool(broken(kind, said)) == bool(rule)


def test_descriptions_are_curated() -> None:
    good = " ".join(f"Tree number {n} stands beside house {n * 3}." for n in range(14))
    assert curated(good) == ""
    assert curated(good + " And then the") == "breaks off"
    assert curated(good + " Tree number 3 stands beside house 9. Done.") == "repeats itself"
    assert curated("Short.") == "too short"
    said = [Sample((Turn.say("user", "x"), Turn.say("assistant", text))) for text in (good, "Short.")]
    assert [uncurated(sample) for sample in said] == [0, 1]


class Describing:
    """A speaker that sees: half of a description at first, and the other half when it is asked to go on."""

    def __init__(self) -> None:
        self.asked: list[Sample] = []

    def say(self, turns: Sequence[Turn]) -> str:
        return self.say_all([Sample(tuple(turns))])[0]

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        self.asked += samples
        return [self._half(sample) for sample in samples]

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        yield self.say(turns)

    @staticmethod
    def _half(sample: Sample) -> str:
        where = 7 if len(sample.turns) > 1 else 0
        broken_off = sample.media == (Image(Path("wolf.png")),) and where == 7
        told = " ".join(f"Tree number {n} stands beside house {n * 3}." for n in range(where, where + 7))
        return told.rstrip(".") if broken_off else told


def test_a_model_that_sees_describes_and_is_asked_to_go_on_where_it_is_short() -> None:
    """MiniGPT-4's second stage: descriptions of pictures of which nothing is said, continued, and curated."""
    samples = [
        Sample((Turn.say("user", Image(Path(name)), "?"), Turn.say("assistant", "No.")), name)
        for name in ("fox.png", "wolf.png")
    ]
    assert instructions.gathered(samples) == []
    seen, made, speaker = instructions.gathered(samples, bare=True), Made(), Describing()
    (fox,) = instructions.make(seen, ("description",), speaker, made)
    assert made.samples == 1 and made.refused == {"breaks off": 1}
    assert fox.media == (Image(Path("fox.png")),) and fox.turns[1].text.endswith(
        "Tree number 13 stands beside house 39."
    )
    first, again = speaker.asked[0], speaker.asked[2]
    assert first.media == again.media == fox.media and again.turns[2].text == "Go on." and len(speaker.asked) == 4
    assert curated(fox.turns[1].text) == "" and fox.turns[0].text.strip() != first.turns[0].text  # a request of many
