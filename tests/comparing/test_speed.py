"""Timed answers: joints take turns, notes of one session stay, and LoRA is merged before anything is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import composed
import isthmus
from isthmus.comparing import speed
from isthmus.comparing.speed import TOKENS, Speed, Turns, ready, speeds, told
from isthmus.config import LoRA
from isthmus.exporting import adapters
from isthmus.model import VLM

CPU = torch.device("cpu")


class Session:
    """Times what is no model, and knows whose turns there were; the second round meets a machine twice as slow."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.turns = folder, list[str]()

    def measure(self, name: str) -> Turns:
        self.turns.append(name)
        slow = 2 if self.turns.count(name) == 2 else 1
        return [(0.1 * slow, (0.1 + 0.01 * (TOKENS - 1)) * slow)] * speed.REPEATS

    def __call__(self, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Speed]:
        self.turns.clear()
        notes = {name: self.folder / name / "speed.json" for name in names}
        return speeds({name: self.folder / name for name in names}, dtype, CPU, notes)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    found = Session(tmp_path)
    monkeypatch.setattr(speed, "ready", lambda folder, dtype, device: folder.name)
    monkeypatch.setattr(speed, "adapters", lambda name: ["sft"] if name == "stiff" else [])
    monkeypatch.setattr(speed, "measure", found.measure)
    return found


def test_joints_take_turns(session: Session) -> None:
    found = session("one", "two")
    assert session.turns == ["one", "two"] * speed.ROUNDS
    for each in found.values():
        assert (each.prefill, each.decode) == (pytest.approx(100), pytest.approx(10))
        assert (each.prefill_spread, each.decode_spread) == (pytest.approx(100), pytest.approx(10))


def test_notes_of_one_session_stay_and_all_is_timed_again_where_one_is_missing(
    session: Session, tmp_path: Path
) -> None:
    first = session("one", "two")
    assert session("one", "two") == first and session.turns == []
    assert session("two") == {"two": first["two"]} and session.turns == []
    session("one", "two", "three")
    assert session.turns == ["one", "two", "three"] * speed.ROUNDS
    (tmp_path / "two" / "speed.json").unlink()
    session("one", "two", "three")
    assert set(session.turns) == {"one", "two", "three"}
    session("one", "two", "three", dtype=torch.bfloat16)
    assert set(session.turns) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "change",
    [
        {"when": "2020-01-01 00:00:00 UTC"},
        {"processor": "Another"},
        {"threads": 77},
        {"device": "cuda:0: NVIDIA H200"},
        {"method": "median of 5"},
        {"arithmetic": "bfloat16"},
    ],
)
def test_a_note_of_another_time_or_place_is_timed_again_with_all_others(
    session: Session, tmp_path: Path, change: dict[str, Any]
) -> None:
    session("one", "two")
    note = tmp_path / "two" / "speed.json"
    known = json.loads(note.read_text())
    assert change.keys() <= known.keys()
    note.write_text(json.dumps(known | change))
    session("one", "two")
    assert session.turns == ["one", "two"] * speed.ROUNDS
    assert json.loads(note.read_text())["when"] == json.loads((tmp_path / "one" / "speed.json").read_text())["when"]


def test_on_another_machine_all_is_timed_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session("one", "two")
    monkeypatch.setattr(speed, "processor", lambda: "Another")
    found = session("one", "two")
    assert session.turns == ["one", "two"] * speed.ROUNDS and {each.processor for each in found.values()} == {"Another"}


def test_notes_of_earlier_versions_are_timed_again(session: Session, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    old = {"prefill": 1.0, "decode": 1.0, "arithmetic": "float32", "threads": torch.get_num_threads(), "device": "cpu"}
    (tmp_path / "one" / "speed.json").write_text(json.dumps({**old, "method": "median of 5 after 1 unmeasured"}))
    assert session("one")["one"].prefill == pytest.approx(100)


def test_what_is_said_names_threads_noise_and_lora_that_stayed(session: Session) -> None:
    found = session("one", "stiff")
    assert (found["one"].merged, found["stiff"].merged) == (True, False)
    said = told(found)
    assert f", {torch.get_num_threads()} threads, cpu, float32; LoRA of stiff cannot be merged; " in said
    assert said.endswith("up to 100% (prefill) and 100% (token) apart") and said.startswith(found["one"].when)
    assert "LoRA" not in told({"one": found["one"]})


def test_lora_is_merged_before_a_model_is_timed(tmp_path: Path) -> None:
    model = composed.model("llama")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "first")
    model.add_lora(["llm.*.q_proj", "llm.*.v_proj"], LoRA(r=2), "second")
    composed.stir(model).save_pretrained(tmp_path)
    before, merged = isthmus.load(tmp_path), ready(tmp_path, torch.float32, CPU)
    assert adapters(before) and not adapters(merged)
    assert any("grafts" in name for name, _ in before.named_modules())
    assert not any("grafts" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(_logits(merged), _logits(before), atol=1e-3, rtol=1e-3)
    plain = composed.model("llama")
    assert not torch.allclose(_logits(plain), _logits(before), atol=1e-2)  # that LoRA does something


def test_lora_that_cannot_be_merged_is_timed_as_it_is(tmp_path: Path) -> None:
    model = composed.model("llama")
    model.add_lora(["llm.lm_head"], LoRA(r=2), "head")  # whose weight is the embedding's, too
    model.save_pretrained(tmp_path)
    found = ready(tmp_path, torch.float32, CPU)
    assert adapters(found) == ["head"] and len(speed.measure(found)) == speed.REPEATS


@torch.no_grad()
def _logits(model: VLM) -> torch.Tensor:
    return model(**model.processor(images=[composed.picture(1).source], text="<image>hi")).logits
