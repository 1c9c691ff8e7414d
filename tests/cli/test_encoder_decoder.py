"""`isthmus chat` and `isthmus eval` with a tiny Flan-T5 behind LLaVA's joint."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import composed
import isthmus
import tiny
import tiny_voices
from isthmus.cli.app import app
from isthmus.config import LLMConfig
from isthmus.types import Sample, Turn


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that knows no more words than its tokenizer, and says at least four."""
    home = tmp_path_factory.mktemp("flan")
    words = len(tiny_voices.flan_t5())
    llm = LLMConfig(source=str(tiny.llm_folder(home / "llm", "flan-t5", vocab_size=words)))
    model = composed.stir(isthmus.compose(composed.recipe().model_copy(update={"llm": llm})))
    model.generation_config.min_new_tokens = 4
    model.save_pretrained(home / "model")
    return home / "model"


def test_chat_answers_about_a_picture(saved, tmp_path):
    composed.picture(0).source.save(tmp_path / "a.png")
    words = ["chat", str(saved), "-i", str(tmp_path / "a.png"), "-p", "what is it?", "--max-tokens", "5"]
    answered = CliRunner().invoke(app, [*words, "--device", "cpu"])
    model = isthmus.load(saved)
    inputs = model.processor.prompts([Sample((Turn.say("user", composed.picture(0), "what is it?"),))])
    told = model.processor.decode(model.generate(inputs, max_new_tokens=5)[0], skip_special_tokens=True)
    assert answered.exit_code == 0 and answered.output.strip() == told.strip() != ""


def test_eval_measures_choices_likelihoods_and_replies(saved, tmp_path):
    words = ["eval", str(saved), "--tasks", "presence,caption,naming-free", "--limit", "3", "--controls", "blind"]
    measured = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json", "--device", "cpu"])
    assert measured.exit_code == 0, measured.output
    rows = json.loads(measured.stdout)
    assert len(rows) == 3
    kept = [json.loads(line) for line in (tmp_path / "after" / "presence.jsonl").read_text().splitlines()[1:]]
    assert len(kept) == 3 and all(len(one["scores"]) == 2 and max(one["scores"]) < 0 for one in kept)
