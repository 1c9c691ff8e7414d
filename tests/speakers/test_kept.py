"""Answers of a speaker in this process, kept by request: what was asked before is not asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

import composed
from isthmus.cli.app import app
from isthmus.speakers.kept import Kept
from isthmus.speakers.local import Local
from isthmus.types import Image, Sample, Turn


class Counting:
    """Answers with the number of what it was asked; the fourth time it is interrupted."""

    def __init__(self, most: int = 99) -> None:
        self.asked: list[str] = []
        self.most = most

    def say(self, turns: Sequence[Turn]) -> str:
        return self.say_all([Sample(tuple(turns))])[0]

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        if len(self.asked) + len(samples) > self.most:
            raise KeyboardInterrupt
        self.asked += [sample.turns[-1].text for sample in samples]
        return [f"{sample.turns[-1].text}!" for sample in samples]

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        yield self.say(turns)


def questions(shade: int = 0) -> list[Sample]:
    picture = Image(Pillow.new("RGB", (4, 4), (shade, 0, 0)))
    return [Sample((Turn.say("user", picture, f"q{number}"),)) for number in range(6)]


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stopped, whole = Counting(most=5), Counting()
    with pytest.raises(KeyboardInterrupt):
        Kept(stopped, tmp_path, {"weights": "w"}, print, together=2).say_all(questions())
    assert stopped.asked == ["q0", "q1", "q2", "q3"]
    expected = [f"q{number}!" for number in range(6)]
    assert Kept(whole, tmp_path, {"weights": "w"}, print).say_all(questions()) == expected and whole.asked == [
        "q4",
        "q5",
    ]
    assert Kept(whole, tmp_path, {"weights": "w"}, print).say(questions()[3].turns) == "q3!" and len(whole.asked) == 2


def test_other_weights_and_other_pictures_are_asked_anew(tmp_path: Path) -> None:
    speaker = Counting()
    Kept(speaker, tmp_path, {"weights": "w"}, print).say_all(questions())
    Kept(speaker, tmp_path, {"weights": "v"}, print).say_all(questions()[:1])
    Kept(speaker, tmp_path, {"weights": "w"}, print).say_all(questions(shade=200)[:2])
    assert len(speaker.asked) == 9


def test_make_keeps_what_a_model_here_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    composed.stir(composed.model()).save_pretrained(tmp_path / "model")
    Pillow.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "a.png", "caption": "A plain dark picture."}))
    words = ["data", "make", str(tmp_path / "data.jsonl"), str(tmp_path / "out.jsonl"), str(tmp_path / "model")]
    words += ["--kinds", "description", "--device", "cpu", "-r", f"cache={tmp_path / 'kept'}"]
    asked: list[int] = []
    told = " ".join(f"Tree number {number} stands beside house {number * 3}." for number in range(14))
    monkeypatch.setattr(Local, "say_all", lambda self, samples: [asked.append(1) or told for _ in samples])
    for _ in range(2):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 and "1 samples about 1 pictures" in done.output, done.output
        assert asked == [1]
        (tmp_path / "out.jsonl").unlink()
    refused = CliRunner().invoke(app, [*words[:-1], "temperature=1"])
    assert refused.exit_code != 0 and "settings of an endpoint" in f"{refused.exception}"
