"""Base parts that lack tensors: refused where they are used, and taken where nothing needs what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from isthmus import parts
from isthmus.config import EncoderConfig, LLMConfig
from isthmus.types import ConfigError


def without(folder: Path, part: str) -> Path:
    """The folder, whose weights lack every tensor with this in its name."""
    file = folder / "model.safetensors"
    whole = load_file(file)
    kept = {name: tensor for name, tensor in whole.items() if part not in name}
    assert len(kept) < len(whole)
    save_file(kept, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "part"), [("llama", "layers.1.mlp.up_proj"), ("qwen2", "lm_head"), ("t5", "decoder.block.1.layer.0")]
)
def test_an_llm_that_lacks_a_tensor_is_refused(tmp_path, family, part):
    folder = without(tiny.llm_folder(tmp_path, family), part)
    with pytest.raises(ConfigError, match=f"the weights lack .*{part}"):
        parts.load_llm(LLMConfig(source=str(folder)), torch.float32)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("clip", "layers.1.mlp.fc1"),
        ("clip", "position_embedding"),
        ("clip", "pre_layrnorm"),
        ("vit", "layer.0."),
        ("dinov2", "cls_token"),
    ],
)
def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path, family, part):
    folder = without(tiny.vision_folder(tmp_path, family), part)
    with pytest.raises(ConfigError, match="the weights lack "):
        parts.load_encoder(EncoderConfig(source=str(folder)), torch.float32)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda shard: shard.unlink(), "of its index are not there"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), "rror"),
    ],
)
def test_an_llm_whose_shards_are_not_whole_is_refused(tmp_path, damage, cause):
    folder = tiny.llm_folder(tmp_path, "llama")
    parts.load_llm(LLMConfig(source=str(folder)), torch.float32).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    damage(sorted(folder.glob("model-*.safetensors"))[0])
    with pytest.raises(ConfigError, match=f"{folder.name}.*{cause}"):
        parts.load_llm(LLMConfig(source=str(folder)), torch.float32)


@pytest.mark.parametrize(("family", "part"), [("vit", "pooler"), ("siglip", "head"), ("dinov2", "mask_token")])
def test_a_tower_needs_no_pooler_head_or_mask(tmp_path, family, part):
    folder = without(tiny.vision_folder(tmp_path, family), part)
    assert parts.load_encoder(EncoderConfig(source=str(folder)), torch.float32).width == tiny.WIDTH
