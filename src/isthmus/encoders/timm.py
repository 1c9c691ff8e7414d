"""Folders of timm and open_clip: EVA, EVA-CLIP and NFNet by their own definitions, so that torchvision is not needed.

timm and open_clip import torchvision, which many installations of torch have no build of; the two families that the
published systems use are small enough to be defined here (`eva`, `nfnet`), and are compared with timm's in the tests.
An architecture is the `config.json` of such a folder: `architecture` (timm's name), `pretrained_cfg` (input side, mean,
standard deviation, interpolation) and, where it departs from the name, `model_args`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from PIL.Image import Resampling
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from isthmus.config import EncoderConfig, check, nearest
from isthmus.encoders import eva, nfnet
from isthmus.errors import abbreviated
from isthmus.types import ConfigError, DataError

Tower: TypeAlias = eva.Eva | nfnet.NFNet
FAMILIES: tuple[tuple[dict[str, dict[str, Any]], Any, Any], ...] = (
    (eva.SHAPES, eva.Shape, eva.Eva),
    (nfnet.SHAPES, nfnet.Shape, nfnet.NFNet),
)
NAMES = [name for shapes, _, _ in FAMILIES for name in shapes]
HEADS = ("num_classes", "global_pool", "img_size")
"""Arguments that concern the classifier, or that `pretrained_cfg` says too."""
TRUNK = "visual.trunk."
"""Where an open_clip model holds its tower."""


def architecture(folder: Path) -> dict[str, Any] | None:
    """The architecture of a folder of timm or open_clip; None where it is neither."""
    described = _read(folder / "config.json")
    if "architecture" in described:
        return {key: described[key] for key in ("architecture", "pretrained_cfg", "model_args") if key in described}
    opened = _read(folder / "open_clip_config.json")
    if described or "timm_model_name" not in opened.get("model_cfg", {}).get("vision_cfg", {}):
        return None
    vision, pictures = opened["model_cfg"]["vision_cfg"], opened.get("preprocess_cfg", {})
    size = vision.get("image_size", 224)
    return {"architecture": vision["timm_model_name"], "pretrained_cfg": {"input_size": [3, size, size], **pictures}}


def empty(config: EncoderConfig, described: Mapping[str, Any], source: Mapping[str, str]) -> Tower:
    """The tower's structure; weights come from a checkpoint, or never (a plan).

    Raises:
        ConfigError: an architecture that is neither EVA nor NFNet, or whose arguments are not those of published ones.
    """
    name, pictures = described["architecture"], described.get("pretrained_cfg", {})
    arguments = {key: value for key, value in described.get("model_args", {}).items() if key not in HEADS}
    for shapes, shape, tower in FAMILIES:
        if name in shapes:
            own = pictures.get("input_size", (3, 224, 224))[-1]
            looks = _processor(config.image_size or own, pictures)
            return tower(config, check(shape, {**shapes[name], **arguments}, name), own, looks, source)
    raise ConfigError(
        f"{name!r} is not among the architectures of timm that are known here{nearest(name, NAMES)}",
        "take EVA, EVA-CLIP or NFNet, or a tower in the format of transformers",
    )


def load(config: EncoderConfig, folder: Path, source: Mapping[str, str], dtype: torch.dtype | Literal["auto"]) -> Tower:
    """The tower with the weights of a folder, ready for inference; `auto` is the dtype that they are stored in.

    Raises:
        DataError: a tensor is missing, left over or of another shape.
    """
    described = architecture(folder)
    assert described is not None
    with torch.device("meta"):
        tower = empty(config, described, source)
    tensors = tower.translate(_tensors(folder))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tower.unread)}
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := {name for name in found.keys() | shapes if found.get(name) != shapes.get(name)}:
        raise DataError(
            f"{folder}: weights are not those of {described['architecture']} ({abbreviated(sorted(wrong))})",
            "fetch the folder again, or correct `model_args` in its config",
        )
    if dtype != "auto":
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tower.load_state_dict(tensors, assign=True)
    return tower.eval().requires_grad_(False)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors: of timm's file where there is one, else of the tower inside open_clip's.

    Raises:
        ConfigError: there is neither.
    """
    files = {file.name: file for file in folder.glob("*.safetensors")}
    if "model.safetensors" in files:
        return load_file(files["model.safetensors"])
    if "open_clip_model.safetensors" in files:
        tensors = load_file(files["open_clip_model.safetensors"])
        return {name.removeprefix(TRUNK): tensor for name, tensor in tensors.items() if name.startswith(TRUNK)}
    raise ConfigError(
        f"{folder}: neither model.safetensors nor open_clip_model.safetensors", "convert the checkpoint to safetensors"
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _processor(side: int, pictures: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """Normalises pictures that were made square before; timm's margin (`crop_pct`) is for classifiers."""
    return CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        resample=Resampling[pictures.get("interpolation", "bicubic").upper()],
        image_mean=list(pictures.get("mean", OPENAI_CLIP_MEAN)),
        image_std=list(pictures.get("std", OPENAI_CLIP_STD)),
    )
