"""Exchange with transformers' own LLaVA class: equal logits and tokens both ways, and refusals that name the reason."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

import composed
import isthmus
import tiny
from composed import picture, stir
from isthmus import exporting, parts
from isthmus.config import EncoderConfig, LLMConfig, LoRA
from isthmus.exporting import blip2, gguf, llava, native, onnx
from isthmus.types import ConfigError, IsthmusError, Sample, Turn
from tiny import IMAGE, PATCH, VOCAB

TEXT = "USER: <image>what is it? ASSISTANT:"
"""For our processor, whose layout puts a newline behind a picture; theirs is told so."""
CASES = [("clip", "llama", "default"), ("clip", "qwen2", "default"), ("siglip", "llama", "full")]
CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def theirs(folder: Path, vision: str = "clip", text: str = "llama", strategy: str = "default", **changes) -> Path:
    """A LLaVA folder as transformers writes it, random weights, with its image token inside the vocabulary."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=tiny.vision(vision).config,
        text_config=tiny.llm(text, vocab_size=VOCAB + 8).config,
        image_token_index=VOCAB,
        vision_feature_select_strategy=strategy,
        **{"vision_feature_layer": -2, **changes},
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for name, part in (
        ("vision_tower", tiny.vision(vision)),
        ("language_model", tiny.llm(text, vocab_size=VOCAB + 8).base_model),
    ):
        getattr(model.model, name).load_state_dict(part.state_dict())
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        tiny.processor(vision),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def agree(
    ours: isthmus.VLM, reference: LlavaForConditionalGeneration, processor: LlavaProcessor, atol: float = 1e-5
) -> None:
    """Equal logits at every position and equal greedy tokens on a picture and a text, each through its processor."""
    image = picture(1, IMAGE).source  # square and of the right size: neither processor has anything to resize
    expected = processor(images=image, text=TEXT.replace("<image>", "<image>\n"), return_tensors="pt")
    found = ours.processor(images=image, text=TEXT)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert found["input_ids"].shape == expected["input_ids"].shape
    vocabulary = ours.config.text_config.vocab_size
    logits = reference(**expected).logits
    torch.testing.assert_close(ours(**found).logits, logits[..., :vocabulary], atol=atol, rtol=1e-5)
    blind = reference(**{**expected, "pixel_values": torch.zeros_like(expected["pixel_values"])}).logits
    assert (blind - logits).abs().max() > 1e-2
    ours.generation_config.eos_token_id = reference.generation_config.eos_token_id = None
    start, greedy = found["input_ids"].shape[1], {"max_new_tokens": 16, "do_sample": False}
    never = {"suppress_tokens": list(range(VOCAB, logits.shape[-1]))}
    tokens = ours.generate(**found, **greedy, **never)[:, start:]
    assert torch.equal(tokens, reference.generate(**expected, **greedy, **never)[:, start:])


@pytest.mark.parametrize(("vision", "text", "strategy"), CASES)
def test_an_imported_llava_equals_transformers_own(tmp_path, vision, text, strategy):
    source = theirs(tmp_path / "theirs", vision, text, strategy)
    parity = llava.import_llava(source, tmp_path / "ours")
    assert parity.difference <= 1e-5
    reference = LlavaForConditionalGeneration.from_pretrained(source).eval()
    agree(isthmus.load(tmp_path / "ours"), reference, AutoProcessor.from_pretrained(source, backend="pil"))


def test_an_imported_model_is_saved_again_with_its_base(tmp_path):
    llava.import_llava(theirs(tmp_path / "theirs"), tmp_path / "ours")
    ours = isthmus.load(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "again")
    again = isthmus.load(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.state_dict().items())
    with pytest.raises(ConfigError, match="its base weights are nowhere else"):
        ours.save_pretrained(tmp_path / "delta", whole=False)


@pytest.mark.parametrize(("vision", "text", "strategy"), CASES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_an_exported_model_equals_ours(tmp_path, vision, text, strategy, adapted):
    token = "keep" if strategy == "full" else "drop"
    ours = composed.model(text, vision=vision, class_token=token, aspect="crop")
    if adapted:
        ours.add_lora(["llm.*.q_proj"], LoRA(r=2), "sft")
    stir(ours).save_pretrained(tmp_path / "ours")
    parity = llava.export(tmp_path / "ours", tmp_path / "theirs")
    assert parity.difference <= 1e-4
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    assert isinstance(processor, LlavaProcessor)
    agree(isthmus.load(tmp_path / "ours"), reference, processor, atol=1e-4 if adapted else 1e-5)  # merging rounds


CODES = {"levels": 2, "size": 5, "width": 16, "depth": 1}
ALIKE = {"one Linear": ("llava", {"projector": "linear"}), "asvr": ("asvr", CODES)}


@pytest.mark.parametrize("case", ALIKE)
def test_other_joints_that_their_class_holds_equal_ours_and_come_back(tmp_path, case):
    ours = stir(composed.model("llama", *ALIKE[case], aspect="crop"))
    ours.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    agree(isthmus.load(tmp_path / "ours"), reference, processor)
    llava.import_llava(tmp_path / "theirs", tmp_path / "again")
    agree(isthmus.load(tmp_path / "again"), reference, processor)


def test_there_and_back_is_the_same_model(tmp_path):
    ours = stir(composed.model("llama", aspect="crop"))
    ours.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    llava.import_llava(tmp_path / "theirs", tmp_path / "back")
    again = isthmus.load(tmp_path / "back")
    inputs = ours.processor(images=picture(1).source, text=TEXT)
    placeholder = inputs["input_ids"] == ours.placeholder("image")
    moved = inputs["input_ids"].masked_fill(placeholder, again.placeholder("image"))
    with torch.no_grad():
        found = again(**{**inputs, "input_ids": moved}).logits[..., :VOCAB]
        torch.testing.assert_close(found, ours(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert again.processor.tokenizer.chat_template == tiny.CHATML
    talk = [Sample((Turn.say("user", picture(1), "what is it?"),))]
    assert torch.equal(again.processor.prompts(talk).modality_BT, ours.processor.prompts(talk).modality_BT)


def levels(ours: isthmus.VLM, theirs: LlavaProcessor, width: int, height: int) -> float:
    """How many grey levels lie between two preparations of a noisy picture."""
    noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    image = composed.Image(Pillow.fromarray(noise))
    found = theirs.image_processor(image.source, return_tensors="pt")["pixel_values"]
    std = torch.tensor(theirs.image_processor.image_std).view(3, 1, 1)
    return (255 * std * (found - ours.processor.look("image", [image])[0])).abs().max().round().item()


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_exported_processor_prepares_wide_and_tall_pictures_as_ours_does(tmp_path, vision, aspect):
    ours = composed.model("llama", vision=vision, class_token="drop" if vision == "clip" else "keep", aspect=aspect)
    ours.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    theirs = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    sizes = [(4 * IMAGE, IMAGE), (IMAGE, 2 * IMAGE)]
    sizes += [] if aspect == "crop" else [(50, 37), (41, 90)]  # whose lengths crop rounds to whole pixels there
    apart = [levels(ours, theirs, *size) for size in sizes]
    assert max(apart) <= (native.LEVELS if aspect == "pad" else 0)
    llava.import_llava(tmp_path / "theirs", tmp_path / "back")
    assert isthmus.load(tmp_path / "back").config.encoder("image").aspect == aspect


def test_an_image_processor_of_another_arithmetic_is_refused():
    encoder = composed.model("llama").encoders["image"]
    side = {"height": IMAGE, "width": IMAGE}
    encoder.processor = EfficientNetImageProcessorPil(size=side, include_top=False)
    assert native.picture_processor(encoder).do_pad
    encoder.processor = EfficientNetImageProcessorPil(size=side, include_top=True)  # divides by the deviation twice
    with pytest.raises(ConfigError, match="cannot pad pictures for this encoder"):
        native.picture_processor(encoder)


REFUSED = {
    "pooled": (("llama", "llava", {"pool": 2}), {}, "two-layer MLP"),
    "t5": (("t5",), {}, "encoder-decoder"),
    "another size": (("llama",), {"image_size": 2 * tiny.IMAGE}, "not its own size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_export_refuses_what_their_class_cannot_hold(tmp_path, case):
    built, encoder, reason = REFUSED[case]
    composed.model(*built, **encoder).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=reason):
        llava.export(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "projector"),
        ({"multimodal_projector_bias": False}, "projector"),
    ],
)
def test_import_refuses_what_our_joint_does_not_have(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        llava.import_llava(theirs(tmp_path / "theirs", **changes), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_import_refuses_a_checkpoint_that_is_not_whole(tmp_path):
    file = theirs(tmp_path / "theirs") / "model.safetensors"
    whole = load_file(file)
    projector = next(name for name in whole if "linear_1.weight" in name)
    norm = next(name for name in whole if "layers.1.input_layernorm" in name)
    save_file({name: whole[name] for name in whole if name not in (projector, norm)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"the weights lack model.* and 1 more\ncopy the checkpoint again"):
        llava.import_llava(tmp_path / "theirs", tmp_path / "ours")
    save_file(whole | {projector: torch.zeros(3, 5)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="other shapes than config.json says: model.multi_modal_projector"):
        llava.import_llava(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("described", "cause"),
    [
        ({"model_type": "clip_vision_model"}, "is a clip_vision_model, not a LLaVA of transformers"),
        ({"model_type": "isthmus"}, "is a model of Isthmus already"),
        ({"model_type": "llava", "hidden_size": 32}, "is a LLaVA in its authors' layout"),
    ],
)
def test_import_refuses_other_models_before_it_builds_one(tmp_path, monkeypatch, described, cause):
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("was built"))
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=cause):
        llava.import_llava(tmp_path, tmp_path / "ours")


def test_a_llava_is_no_part_of_another_model(tmp_path):
    whole = str(theirs(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="llava is a multimodal model, and its vision tower cannot be taken out"):
        parts.encoder_architecture(EncoderConfig(source=whole))
    with pytest.raises(ConfigError, match="llava is a multimodal model, with a tower and a joint of its own"):
        parts.llm_config(LLMConfig(source=whole))
    composed.model("llama", vision="clip").save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"is a model of Isthmus, with .*\ngo on from it with start="):
        parts.llm_config(LLMConfig(source=str(tmp_path / "ours")))


def test_nothing_is_written_when_logits_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(IsthmusError, match="logits differ"):
        llava.import_llava(theirs(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("form", [llava.export, gguf.export, onnx.export, functools.partial(blip2.export, to="blip2")])
def test_no_model_is_written_over_by_its_own_export(tmp_path, form):
    composed.model("llama", vision="clip").save_pretrained(tmp_path / "ours")
    before = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    with pytest.raises(ConfigError, match="holds the model itself"):
        form(tmp_path / "ours", out=tmp_path / "other/../ours")
    assert {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()} == before


def test_a_number_that_is_none_is_not_equal():
    same = torch.zeros(2, 3)
    exporting.Parity.between(same, same).require("export")
    for broken in (float("nan"), float("inf")):
        other = same.clone()
        other[1, 2] = broken
        with pytest.raises(IsthmusError, match="logits differ"):
            exporting.Parity.between(same, other).require("export")


def test_an_import_leaves_the_kernels_of_both_models_named(tmp_path):
    """transformers warns where attention has no kernel's name."""
    reference = LlavaForConditionalGeneration.from_pretrained(theirs(tmp_path)).eval()
    ours = llava.from_llava(reference, AutoProcessor.from_pretrained(tmp_path, backend="pil"), str(tmp_path))
    assert reference.model.language_model.config._attn_implementation is not None
    assert ours.llm.config._attn_implementation is not None


def test_parity_notices_a_wrong_weight(tmp_path):
    reference = LlavaForConditionalGeneration.from_pretrained(theirs(tmp_path)).eval()
    ours = llava.from_llava(reference, AutoProcessor.from_pretrained(tmp_path, backend="pil"), str(tmp_path))
    assert llava.compare(ours, reference).difference <= 1e-5
    with torch.no_grad():
        ours.connectors["image"].layers[0].weight[0] += 1
    assert llava.compare(ours, reference).difference > 1e-3
