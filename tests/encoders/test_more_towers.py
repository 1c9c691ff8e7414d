"""Towers that are told otherwise than CLIP's: known to transformers as half of a model alone, with sides in pairs, with
registers; and those that are refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers

import tiny
from isthmus import parts
from isthmus.config import EncoderConfig
from isthmus.types import ConfigError

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
TOWER = {**SMALL, "intermediate_size": 64}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 32}

PLAIN = [
    ("ViTModel", {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, 1),
    ("Dinov2WithRegistersModel", {**SMALL, "mlp_ratio": 2, "num_register_tokens": 4}, 5),
    ("DINOv3ViTModel", {**TOWER, "num_register_tokens": 4}, 5),
    ("BeitModel", TOWER, 1),
    ("Aimv2VisionModel", TOWER, 0),
    ("YolosModel", {**TOWER, "image_size": [32, 32], "num_detection_tokens": 5}, 1),
]
"""Towers, what they are made of, and their tokens in front of the patches."""


def folder(path, name, fields, processor="vit"):
    kind = getattr(transformers, name)
    kind(kind.config_class(**fields)).save_pretrained(path)
    tiny.processor(processor).save_pretrained(path)
    return EncoderConfig(source=str(path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MetaClip2Model", {**TEXT, "projection_size": 32}),
        ("BlipModel", {**TEXT, "encoder_hidden_size": 32}),
        ("AltCLIPModel", {**TEXT, "project_dim": 32}),
    ],
)
@torch.no_grad()
def test_a_tower_that_is_known_as_half_of_a_model_alone_is_built_from_its_config(tmp_path, name, text):
    chosen = folder(tmp_path, name, {"text_config": text, "vision_config": TOWER}, "clip")
    encoder = parts.load_encoder(chosen, torch.float32)
    again = parts.empty_encoder(chosen, parts.encoder_architecture(chosen))
    again.load_state_dict(encoder.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(pixels).x_NSE, encoder(pixels).x_NSE) and encoder.tokens == 16


@pytest.mark.parametrize(("name", "fields", "extra"), PLAIN)
@torch.no_grad()
def test_tokens_that_are_no_patches_are_left_out(tmp_path, name, fields, extra):
    chosen = folder(tmp_path, name, fields)
    encoder = parts.load_encoder(chosen, torch.float32)
    pixels = torch.randn(2, 3, 32, 32)
    expected = encoder.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder(pixels).x_NSE, expected[:, extra : extra + 16]) and encoder.tokens == 16
    keeping = parts.load_encoder(chosen.model_copy(update={"class_token": "keep"}), torch.float32)
    assert torch.equal(keeping(pixels).x_NSE, expected[:, : extra + 16]) and keeping.tokens == extra + 16


@pytest.mark.parametrize(("name", "fields", "extra"), PLAIN)
def test_what_the_penultimate_state_does_not_need_is_what_is_behind_it(tmp_path, name, fields, extra):
    encoder = parts.load_encoder(folder(tmp_path, name, fields), torch.float32).requires_grad_()
    encoder(torch.randn(2, 3, 32, 32)).x_NSE.square().sum().backward()
    assert encoder.needless() == {key for key, each in encoder.named_parameters() if each.grad is None} != set()


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("ConvNextModel", STAGES, "convnext is not a vision transformer"),
        ("ViTModel", {**TOWER, "image_size": [32, 48]}, "image_size of"),
        ("Siglip2VisionModel", {**TOWER, "num_patches": 16}, "no NaFlex"),
        ("ViTMAEModel", TOWER, "does not keep one state per patch"),
    ],
)
def test_what_keeps_no_square_of_patches_is_refused(tmp_path, name, fields, reason):
    with pytest.raises(ConfigError, match=reason):
        parts.load_encoder(folder(tmp_path, name, fields), torch.float32)


def test_a_tower_that_lays_pictures_end_to_end_is_refused(tmp_path):
    encoder = parts.load_encoder(folder(tmp_path, "PixtralVisionModel", TOWER), torch.float32)
    with pytest.raises(ConfigError, match="end to end"):
        encoder(torch.randn(2, 3, 32, 32))
