"""EVA against the ViT-g that transformers holds for BLIP-2; every other member of the family is compared with timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionConfig, Blip2VisionModel

from isthmus import parts
from isthmus.config import EncoderConfig
from isthmus.encoders import Encoder
from isthmus.types import ConfigError
from timm_folders import TINY_EVA, folder

DEPTH = 3


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("eva") / "tower", *TINY_EVA)


def load(path: Path, **fields: object) -> Encoder:
    return parts.load_encoder(EncoderConfig.model_validate({"source": str(path), **fields}), torch.float32)


def blip2s(path: Path) -> Blip2VisionModel:
    """The same weights in transformers' class, whose queries, keys and values share one bias."""
    ours = load_file(path / "model.safetensors")
    theirs = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=int(32 * 6144 / 1408),
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    state = {
        "embeddings.class_embedding": ours["cls_token"],
        "embeddings.position_embedding": ours["pos_embed"],
        "embeddings.patch_embedding.weight": ours["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": ours["patch_embed.proj.bias"],
        "post_layernorm.weight": torch.ones(32),
        "post_layernorm.bias": torch.zeros(32),
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {"self_attn.projection": "attn.proj"}
    for index in range(DEPTH):
        there, here = f"encoder.layers.{index}", f"blocks.{index}"
        for name, own in names.items():
            state |= {f"{there}.{name}.{end}": ours[f"{here}.{own}.{end}"] for end in ("weight", "bias")}
        q, v = ours[f"{here}.attn.q_bias"], ours[f"{here}.attn.v_bias"]
        state[f"{there}.self_attn.qkv.weight"] = ours[f"{here}.attn.qkv.weight"]
        state[f"{there}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def test_states_are_those_of_blip2s_tower(tower: Path) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = blip2s(tower)(pixels, output_hidden_states=True).hidden_states
    encoder = load(tower, layer=-1, taps=(0, 1, -2), class_token="keep")
    features = encoder(pixels)
    for name, theirs in {"0": expected[0], "1": expected[1], "-2": expected[-2]}.items():
        torch.testing.assert_close(features.taps[name], theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.x_NSE, expected[-1], atol=1e-4, rtol=1e-4)
    assert features.x_NSE.shape == (2, encoder.tokens, encoder.width) == (2, 17, 32)
    dropped = load(tower, layer=-1)
    assert torch.equal(dropped(pixels).x_NSE, features.x_NSE[:, 1:]) and dropped.tokens == 16


def test_blocks_behind_the_last_state_are_not_built(tower: Path) -> None:
    assert [len(load(tower, layer=layer).blocks) for layer in (0, 1, -2, -1)] == [0, 1, 2, 3]
    assert len(load(tower, layer=1, taps=(2,)).blocks) == 2


@torch.no_grad()
def test_positions_of_another_size_lie_between_those_of_its_own(tower: Path) -> None:
    larger = load(tower, image_size=64)
    larger.pos_embed[:] = torch.cat([torch.zeros(1), torch.arange(4.0).repeat(4)])[None, :, None]
    table = larger._positions()
    assert larger.grid == (8, 8) and table.shape == (1, 65, 32)
    columns = table[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(columns[0], columns[7])
    assert (columns[0].diff() > 0).all()
    torch.testing.assert_close(columns[0, 3] + columns[0, 4], torch.tensor(3.0))
    assert larger(torch.randn(1, 3, 64, 64)).x_NSE.shape == (1, 64, 32)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"layer": 4}, "3 blocks"), ({"taps": ("stem",)}, "number"), ({"image_size": 50}, "50.*patches of 8")],
)
def test_what_is_not_there_is_refused(tower: Path, fields: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(tower, **fields)
