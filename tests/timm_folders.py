"""Tiny EVA and NFNet towers in folders of timm's layout, with random weights; timm itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from isthmus.config import EncoderConfig
from isthmus.encoders import timm

TINY_EVA = ("eva_giant_patch14_clip_224", {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8})
TINY_NFNET = (
    "dm_nfnet_f6",
    {"depths": [1, 2, 1, 1], "channels": [16, 16, 24, 24], "stem_chs": 16, "group_size": 4, "num_features": 48},
)
PICTURES = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def folder(path: Path, name: str, arguments: dict[str, Any]) -> Path:
    """Write a tower as timm would, with a classifier that nobody reads, and return `path`."""
    described = {"architecture": name, "num_classes": 7, "pretrained_cfg": PICTURES, "model_args": arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = timm.empty(EncoderConfig(layer=-1), described, {})
        tensors = {key: 0.2 * torch.randn(tensor.shape) for key, tensor in tower.state_dict().items()}
    tensors |= {"head.fc.weight": torch.zeros(7, tower.width), "head.fc.bias": torch.zeros(7)}
    for key in list(tensors):
        if "nfnet" in name and key.endswith(".weight") and ".attn_last." not in key and not key.startswith("head"):
            tensors[key.replace(".weight", ".gain")] = torch.ones(len(tensors[key]), 1, 1, 1)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(described))
    save_file(tensors, path / "model.safetensors")
    return path
