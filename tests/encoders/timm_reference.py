"""What timm itself computes, in a process of its own: `python timm_reference.py OUT [FOLDER OF TIMM]`.

Writes one folder per architecture under OUT, in timm's own layout: `config.json`, `model.safetensors` with random
weights, and `expected.safetensors` with pixels and the states that timm finds in them. Where torchvision was built for
another torch, its compiled operators are lacking; the two that its import asks for are declared first, never run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

EVA = {"embed_dim": 48, "depth": 3, "num_heads": 4}
NFNET = {
    "depths": (1, 2, 2, 1),
    "channels": (16, 32, 48, 48),
    "stem_chs": 16,
    "group_size": 8,
    "num_features": 96,
}
CASES: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_clip_224": EVA,
    "eva02_tiny_patch14_224": EVA,
    "eva02_base_patch14_224": EVA,
    "eva02_base_patch16_clip_224": EVA,
    "eva02_large_patch14_clip_336": EVA,
    "eva02_enormous_patch14_clip_224": EVA,
    "dm_nfnet_f6": NFNET,
}
PUBLISHED = (
    "eva_giant_patch14_clip_224",
    "eva02_large_patch14_clip_336",
    "eva02_enormous_patch14_clip_224",
    "dm_nfnet_f6",
)
SIDE, LARGER = 112, 224
"""Sides that patches of 14 and 16 divide; positions are resampled for the larger one."""


def declare_operators() -> torch.library.Library:
    """torchvision's import describes these two operators whether or not it could load them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@torch.no_grad()
def states(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What leaves the stem or embedding, every stage or block, and the end before any norm."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out.clone())

    if hasattr(model, "blocks"):
        model.blocks[0].register_forward_pre_hook(lambda module, given: seen.__setitem__("0", given[0].clone()))
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(keep(str(index + 1)))
        model.forward_features(pixels)
        return seen
    model.stem.register_forward_hook(keep("stem"))
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(keep(f"stage{index + 1}"))
    seen["final"] = model.forward_features(pixels)
    return seen


@torch.no_grad()
def write(folder: Path, name: str, arguments: dict[str, Any]) -> None:
    import timm

    torch.manual_seed(0)
    sized = {} if "nfnet" in name else {"img_size": SIDE}
    model = timm.create_model(name, num_classes=7, **sized, **arguments).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    pictures = {
        "input_size": (3, SIDE, SIDE),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bilinear",
    }
    described = {"architecture": name, "num_classes": 7, "pretrained_cfg": pictures, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(described))
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    larger = torch.randn(1, 3, LARGER, LARGER)
    expected = {"pixels": pixels, "larger_pixels": larger, **states(model, pixels)}
    if not sized:
        found = states(model, larger)
    else:
        model.set_input_size(LARGER)
        found = states(model, larger)
    expected |= {f"larger_{key}": tensor for key, tensor in found.items()}
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / "expected.safetensors")


def main(out: Path, packages: str | None) -> None:
    if packages is not None:
        sys.path.insert(0, packages)
    library = declare_operators() if torch.version.cuda is None else None
    import timm

    for name, arguments in CASES.items():
        write(out / name, name, arguments)
    with torch.device("meta"):
        counts = {
            name: {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
            for name in PUBLISHED
        }
    (out / "published.json").write_text(json.dumps(counts))
    del library


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
