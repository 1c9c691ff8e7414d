"""BLIP-2 and InstructBLIP as transformers' own classes: equal logits from the written folder, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import carded
import pytest
import torch
from transformers import AutoProcessor, Blip2Config, Blip2ForConditionalGeneration, PreTrainedModel
from typer.testing import CliRunner

import composed
import isthmus
import tiny
from composed import stir
from isthmus import exporting, parity
from isthmus.cli.app import app
from isthmus.config import LoRA
from isthmus.connectors.qformer import Shape
from isthmus.exporting import blip2
from isthmus.exporting.blip2 import NATIVE, Questioned
from isthmus.model import VLM
from isthmus.types import ConfigError, IsthmusError

SHAPE = Shape(queries=3, layers=3, width=16, heads=2, inner=24, dropout=0.0, contrast=8, positions=32)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": tiny.IMAGE,
    "patch_size": tiny.PATCH,
    "layer_norm_eps": 1e-5,
}
EQUAL = [True, True, True, True, None, True]
"""What parity finds of two forms; an export tells no log-probabilities, over which there is nothing to compare."""


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BLIP-2's vision transformer with its image processor, as a checkpoint of the class has it."""
    folder = tmp_path_factory.mktemp("eva")
    config = Blip2Config(vision_config=VISION, text_config=tiny.llm("opt").config.to_dict(), num_query_tokens=3)
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    for parameter in model.vision_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny.processor("clip").save_pretrained(folder)
    return folder


def built(tower: Path, joint: str, family: str = "opt", layer: str = "-1", aspect: str = "crop", **options: Any) -> VLM:
    options = {**SHAPE.model_dump(), "vocabulary": tiny.VOCAB, **options}
    encoder = {"source": str(tower), "layer": layer, "class_token": "keep", "aspect": aspect}
    recipe = composed.recipe(family).but(encoder=encoder, aligner={"name": joint, "options": options})
    return stir(isthmus.compose(recipe))


def read_back(joint: str, folder: Path) -> PreTrainedModel:
    return NATIVE[joint].model.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("joint", list(NATIVE))
def test_the_written_folder_gives_the_same_logits(tmp_path: Path, tower: Path, joint: str, family: str) -> None:
    ours = built(tower, joint, family)
    ours.add_lora(["llm.*.q_proj"], LoRA(r=2), "sft")
    stir(ours).save_pretrained(tmp_path / "ours")
    assert blip2.export(tmp_path / "ours", tmp_path / "theirs", joint).difference <= 1e-4
    theirs, trial = read_back(joint, tmp_path / "theirs"), Questioned.of(ours, rows=3, text=5)
    expected, instructed = trial.ours(ours), joint == "instructblip"
    torch.testing.assert_close(trial.theirs(theirs, instructed), expected, atol=1e-4, rtol=1e-4)
    blind = Questioned(torch.zeros_like(trial.pixels), trial.words, trial.instruction, trial.queries, trial.shared)
    assert (blind.theirs(theirs, instructed) - expected).abs().max() > 1e-2
    if instructed:
        deaf = Questioned(trial.pixels, trial.words, trial.instruction.flip(0), trial.queries, trial.shared)
        assert (deaf.theirs(theirs, True) - expected).abs().max() > 1e-3
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    seen = processor(images=composed.picture(1).source, text="what is it?", return_tensors="pt")
    assert (seen["input_ids"] == theirs.config.image_token_index).sum() == SHAPE.queries
    assert theirs(**seen).logits.shape[:2] == seen["input_ids"].shape


def test_what_only_training_needs_is_left_out(tmp_path: Path, tower: Path) -> None:
    ours = built(tower, "p_former", "llama", text=True, vocabulary=tiny.VOCAB + 1)
    ours.save_pretrained(tmp_path / "ours")
    assert blip2.export(tmp_path / "ours", tmp_path / "theirs", "blip2").difference <= 1e-4
    trial = Questioned.of(ours, rows=3, text=5)
    found = trial.theirs(read_back("blip2", tmp_path / "theirs"), False)
    torch.testing.assert_close(found, trial.ours(ours), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("joint", list(NATIVE))
def test_the_verbs_agree(tmp_path: Path, tower: Path, joint: str) -> None:
    built(tower, joint, "llama").save_pretrained(tmp_path / "ours")
    composed.picture(1).source.save(tmp_path / "one.png")
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    result = CliRunner().invoke(app, ["export", ours, theirs, "--to", joint], catch_exceptions=False)
    assert "largest difference of logits" in result.output
    words = ["parity", ours, theirs, "-i", str(tmp_path / "one.png"), "-p", "what is it?", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert [each["equal"] for each in json.loads(result.output)] == EQUAL, result.output
    assert result.exit_code == 0


@pytest.mark.parametrize("joint", list(NATIVE))
def test_aspect_and_a_missing_chat_template_are_carried_over(tmp_path: Path, tower: Path, joint: str) -> None:
    model = built(tower, joint, "llama", aspect="squash")
    model.processor.tokenizer.chat_template = model.processor.chat_template = None
    model.save_pretrained(tmp_path / "ours")
    blip2.export(tmp_path / "ours", tmp_path / "theirs", joint)
    wide = composed.Image(composed.picture(1, 90).source.crop((0, 0, 90, 40)))
    forms = (parity.form(str(tmp_path / name)) for name in ("ours", "theirs"))
    checks = parity.compare(*forms, parity.Question("what is it?", wide))
    assert [each.equal for each in checks] == EQUAL, checks


@pytest.mark.parametrize("joint", list(NATIVE))
def test_the_cards_code_asks_what_parity_asks(
    tmp_path: Path, tower: Path, joint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tower, joint, "llama").save_pretrained(tmp_path / "ours")
    blip2.export(tmp_path / "ours", tmp_path / "theirs", joint)
    told = carded.run(tmp_path / "theirs", tmp_path, monkeypatch)
    form = parity.form(str(tmp_path / "theirs"))
    seen = form.see(parity.Question("What is this?", composed.picture(1)))
    assert seen.tokens is not None and tuple(told["answer"].tolist()) == seen.tokens[: len(told["answer"])]


REFUSED = {
    "depth": ({"layer": "-2"}, "last depth"),
    "t5": ({"family": "t5"}, "encoder-decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_class_cannot_hold_is_refused(tmp_path: Path, tower: Path, case: str) -> None:
    changes, reason = REFUSED[case]
    built(tower, "blip2", **changes).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=reason):
        blip2.export(tmp_path / "ours", tmp_path / "theirs", "blip2")
    assert not (tmp_path / "theirs").exists()


def test_another_joint_or_encoder_is_refused_and_differing_logits_write_nothing(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tower, "blip2").save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="its joint is blip2, not instructblip"):
        blip2.export(tmp_path / "ours", tmp_path / "theirs", "instructblip")
    composed.model("opt", "blip2", SHAPE.model_dump()).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match="not BLIP-2's vision transformer"):
        blip2.export(tmp_path / "clip", tmp_path / "theirs", "blip2")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(IsthmusError, match="logits differ"):
        blip2.export(tmp_path / "ours", tmp_path / "theirs", "blip2")
    assert not (tmp_path / "theirs").exists()
