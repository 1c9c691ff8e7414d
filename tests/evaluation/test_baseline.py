"""A remote speaker measured on a task: the same items, files and table as a model of our own, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from chat_server import Act, ChatServer, pictures, running
from isthmus.config import TaskConfig
from isthmus.evaluation import answers, baseline
from isthmus.evaluation.grounding import Locate
from isthmus.evaluation.results import rows
from isthmus.evaluation.tasks import Choice, Cut, Generate, item
from isthmus.speakers.remote import Remote
from isthmus.speakers.settings import RemoteConfig
from isthmus.types import ConfigError, Image, Sample, Turn

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0), "black": (0, 0, 0)}


def sample(name: str) -> Sample:
    picture = Image(Pillow.new("RGB", (4, 4), COLOURS[name]))
    return Sample((Turn.say("user", picture, "Which colour?"), Turn.say("assistant", name)), id=name)


ITEMS = tuple(item(sample(name)) for name in COLOURS)
TASK = Generate("colours", ITEMS, (Cut("Colours"),))
CONFIG = TaskConfig(name="colours")


def sees(body: dict[str, Any]) -> str:
    """Names the colour that it is shown, but takes lime for red."""
    (picture,) = pictures(body["messages"][-1]["content"])
    colour = tuple(np.asarray(picture)[0, 0].tolist())
    name = next((name for name, value in COLOURS.items() if value == colour), "grey")
    return f"It is {'red' if name == 'lime' else name}."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as server:
        server.reply = sees
        yield server
        assert server.faults == []


def speaker(server: ChatServer, **settings: Any) -> Remote:
    return Remote(RemoteConfig(**{"endpoint": server.endpoint, "model": "m", "concurrency": 1} | settings))


def test_it_is_measured_like_any_model(server: ChatServer, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    measured = baseline.measure(speaker(server), [(TASK, CONFIG)], 0, tmp_path, lambda *said: heard.append(said))
    _, runs = measured["colours"]
    assert [prediction.right for prediction in runs["after"]] == [True, True, False, True]
    assert [prediction.right for prediction in runs["blind"]] == [False] * 4
    assert not any(prediction.right for prediction in runs["shuffled"] if prediction.answer != "red")
    (row,) = rows(TASK, runs)
    assert row.cells["after"].value == 0.75 and row.gains["blind"].value == 0.75
    header, kept = answers.read(tmp_path / "after" / "colours.jsonl")
    assert kept == runs["after"] and header.settings["request"]["model"] == "m"
    assert heard[-1] == ("colours shuffled", 4, 4)
    again = baseline.measure(speaker(server), [(TASK, CONFIG)], 0, tmp_path)
    assert again == measured and len(server.bodies) == 12
    baseline.measure(speaker(server, max_tokens=9), [(TASK, CONFIG)], 0, tmp_path)
    assert len(server.bodies) == 24


def test_replies_are_as_long_as_those_of_a_model_of_our_own_unless_a_setting_says_otherwise(
    server: ChatServer, tmp_path: Path
) -> None:
    plain = CONFIG.but(controls=())
    longer = replace(TASK, name="more", longest=64)
    baseline.measure(speaker(server), [(TASK, plain), (longer, plain)], 0, tmp_path)
    assert [body["max_tokens"] for body in server.bodies] == [24] * 4 + [64] * 4
    baseline.measure(speaker(server, max_tokens=512), [(TASK, plain)], 0, tmp_path / "set")
    assert {body["max_tokens"] for body in server.bodies[8:]} == {512}


def test_controls_are_asked_as_few_items_as_those_of_any_model(server: ChatServer, tmp_path: Path) -> None:
    measured = baseline.measure(speaker(server), [(TASK, CONFIG.but(baseline_limit=2))], 0, tmp_path)
    assert {name: len(kept) for name, kept in measured["colours"][1].items()} == {"after": 4, "blind": 2, "shuffled": 2}
    assert len(server.bodies) == 8


def test_what_was_refused_is_not_scored(server: ChatServer, tmp_path: Path) -> None:
    server.acts = [Act(), Act(body={"choices": [{"message": {"refusal": "no"}, "finish_reason": "stop"}]})]
    plain = TaskConfig(name="colours", controls=())
    _, runs = baseline.measure(speaker(server), [(TASK, plain)], 0, tmp_path)["colours"]
    assert [prediction.right for prediction in runs["after"]] == [True, None, False, True]
    (row,) = rows(TASK, runs)
    assert (row.cells["after"].lowest, row.cells["after"].highest) == (0.5, 0.75)


def test_tasks_that_need_more_than_text_are_refused_before_anything_is_asked(
    server: ChatServer, tmp_path: Path
) -> None:
    for needs in (Choice("likely", ITEMS, (Cut("Likely"),)), Locate("where", ITEMS, (Cut("Where"),))):
        with pytest.raises(ConfigError, match=rf"'{needs.name}' reads log-probabilities.*\n.*naming-free"):
            baseline.measure(speaker(server), [(TASK, CONFIG), (needs, CONFIG)], 0, tmp_path)
    assert server.bodies == []
