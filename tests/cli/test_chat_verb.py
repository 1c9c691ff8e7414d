"""`isthmus chat` in a terminal: stopping an answer, sampling, and the system turn."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import composed
from isthmus import assembly
from isthmus.cli import answer
from isthmus.cli.app import app
from isthmus.cli.options import load_for_thread
from isthmus.serving import browser
from isthmus.speakers.local import Local
from isthmus.types import ConfigError, Sample, Turn


class Interrupted:
    """A speaker whose answers end in Ctrl-C after so many pieces; None lets one end by itself."""

    def __init__(self, *after: int | None):
        self.after, self.heard = list(after), []

    def stream(self, turns):
        self.heard.append(list(turns))
        after = self.after.pop(0)
        for number, piece in enumerate(["a ", "b ", "c"]):
            if number == after:
                raise KeyboardInterrupt
            yield piece


def test_an_answer_that_is_stopped_stays_and_a_question_without_one_is_as_if_not_asked(tmp_path, monkeypatch):
    composed.picture(1).source.save(tmp_path / "one.png")
    said = iter([f"/image {tmp_path / 'one.png'}", "what?", "this?", "and?", "/new", "again?", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(said))
    speaker, console = Interrupted(0, 2, None, None), Console(file=io.StringIO())
    answer._talk(console, speaker, answer.Conversation([], "be brief"), None, "tiny")
    assert console.file.getvalue().count("stopped") == 2
    told = [[(turn.role, turn.text) for turn in turns] for turns in speaker.heard]
    system = ("system", "be brief")
    assert told[0] == [system, ("user", "what?")] and told[1] == [system, ("user", "this?")]
    assert told[2] == [system, ("user", "this?"), ("assistant", "a b"), ("user", "and?")]
    assert told[3] == [system, ("user", "again?")]
    assert [len(turns[1].media) for turns in speaker.heard] == [1, 1, 1, 0]  # the picture waited for the next question


def test_a_conversation_begins_with_what_the_page_says_of_the_model(tmp_path):
    model = composed.model("llama")
    model.save_pretrained(tmp_path / "m", whole=True)
    asked = ["chat", str(tmp_path / "m"), "--device", "cpu"]
    told = CliRunner().invoke(app, asked, input="/quit\n", env={"COLUMNS": "400"})
    assert told.exit_code == 0, told.output
    shown = browser.introduction(load_for_thread(str(tmp_path / "m"), "float32", "cpu"), "m", 8)["facts"]
    assert list(shown) == ["Language model", "Encoder", "Joint", "Parameters"]
    assert " · ".join(f"{what}: {value}" for what, value in shown.items()) in told.output
    single = CliRunner().invoke(app, [*asked, "-p", "hi", "--max-tokens", "1"])
    assert "Parameters" not in single.output


def test_ctrl_c_at_a_single_question_ends_the_command():
    with pytest.raises(KeyboardInterrupt):
        answer._talk(Console(file=io.StringIO()), Interrupted(1), answer.Conversation([]), "what?", "tiny")


def test_draws_are_repeated_by_their_seed_and_narrowed_by_top_p(tmp_path):
    model = composed.stir(composed.model("llama"))
    model.save_pretrained(tmp_path / "m", whole=True)
    greedy = Local(model, max_new_tokens=12)

    def chat(*words):
        asked = ["chat", str(tmp_path / "m"), "-p", "hi", "--max-tokens", "12", "--device", "cpu", *words]
        told = CliRunner().invoke(app, asked)
        assert told.exit_code == 0, told.output
        return told.output.strip()

    warm = ["--temperature", "1.5", "--seed"]
    first = chat(*warm, "3")
    assert first == chat(*warm, "3") != chat(*warm, "4")
    assert chat(*warm, "4", "--top-p", "0.01") == greedy.say([Turn.say("user", "hi")])
    turns = [Turn.say("system", "be odd"), Turn.say("user", "hi")]
    assert chat("--system", "be odd") == greedy.say(turns) != chat()


def test_a_question_about_places_is_asked_as_one(tmp_path):
    options = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "vocabulary": 320, "bottleneck": 4}
    options |= {"aggregator": {"heads": 2, "inner": 24}}
    lion = composed.stir(composed.model("llama", "lion", options, taps=(2, 1)))
    lion.save_pretrained(tmp_path / "lion", whole=True)
    composed.model("llama").save_pretrained(tmp_path / "plain", whole=True)

    def chat(name, *words):
        asked = ["chat", str(tmp_path / name), "-p", "where is it?", "--max-tokens", "12", "--device", "cpu", *words]
        return CliRunner().invoke(app, asked, env={"COLUMNS": "400"})

    turns, local = (Turn.say("user", "where is it?"),), Local(lion, max_new_tokens=12)
    told = [local.say_all([Sample(turns, meta={"route": route})])[0] for route in (0, 1)]
    assert told[0] != told[1]
    found = [chat("lion", *words).output.strip() for words in ((), ("--route", "image"), ("--route", "region"))]
    assert found == [told[0], told[0], told[1]]
    refused = chat("plain", "--route", "region")
    assert refused.exit_code != 0 and "does not treat kinds of tasks apart" in str(refused.exception)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system's threads are counted in /proc")
def test_loading_leaves_no_threads_behind(monkeypatch):
    """Workers of a second OpenMP team slow down every operator of the one that answers."""

    def computed(*given):
        torch.randn(512, 512) @ torch.randn(512, 512)
        inside.append(tasks())
        return given

    inside: list[set[str]] = []
    monkeypatch.setattr(assembly, "load", computed)
    before = tasks()
    assert load_for_thread("model", "float32", "cpu") == ("model", "float32", torch.device("cpu"))
    assert inside[0] - before
    until = time.monotonic() + 10
    while tasks() & inside[0] - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not tasks() & inside[0] - before


def test_an_error_in_loading_stays_what_it_is(monkeypatch):
    def missing(*given):
        raise ConfigError("no such model", "name one")

    monkeypatch.setattr(assembly, "load", missing)
    with pytest.raises(ConfigError, match="no such model"):
        load_for_thread("model", "float32", "cpu")


def tasks() -> set[str]:
    """Threads of this process, OpenMP's among them."""
    return {task.name for task in Path("/proc/self/task").iterdir()}
