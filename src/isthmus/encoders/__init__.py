"""Towers that turn pixels into `Features`: of transformers (`hf`), of timm and open_clip (`timm`), and `lite`."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from isthmus import quantised
from isthmus.types import ConfigError, Features


class Encoder(nn.Module):
    """A pretrained tower for one kind of medium. It is used as it is: `forward` maps pixels to features.

    Attributes:
        kind: `image`, `video` or `audio`.
        width: E of `Features.x_NSE`.
        tap_widths: E of every named tap that `forward` returns.
        size: side of the square input in pixels.
        aspect: how a picture becomes square (`EncoderConfig.aspect`).
        grid: (rows, columns) of S at that size.
        processor: the transformers image processor that makes its pixels; saved beside the model.
        own: a hash of the weights and adapters that a saved model brought for it; empty where it is its source's.
    """

    kind: ClassVar[str] = "image"
    width: int
    tap_widths: dict[str, int]
    size: int
    aspect: Literal["crop", "pad", "squash"]
    grid: tuple[int, int]
    processor: ImageProcessingMixin
    own: str = ""

    @property
    def tokens(self) -> int:
        """S at the configured input size (a kept class token counts)."""
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """What cached features depend on besides the picture: source, weights' hash, depth, preprocessing."""
        raise NotImplementedError

    def preprocessing(self) -> dict[str, str]:
        """The part of `identity` that says how a picture becomes pixels."""
        return {"size": str(self.size), "aspect": self.aspect, "processor": self.processor.to_json_string()}

    def blank(self) -> Tensor:
        """Pixels of one empty medium, [1, C, H, W]."""
        return torch.zeros(1, 3, self.size, self.size)

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, C, H, W] -> features with x [N, S, E] and the configured taps."""
        raise NotImplementedError

    def needless(self) -> set[str]:
        """Names of the parameters that none of the states it returns depends on: blocks behind them, poolers, heads.

        A backward over a copy without numbers tells, in which what is held in 4 or 8 bits is dense.
        """
        memo: dict[int, Any] = {id(each): _outline(each) for each in self.buffers()}
        memo |= {id(each): nn.Parameter(_outline(each), requires_grad=False) for each in self.parameters()}
        outline = copy.deepcopy(self, memo).eval()
        with torch.device("meta"), torch.enable_grad():
            held = {f"{path}.weight": f"{path}.packed" for path in quantised.dequantise(outline)}
            named = {name: each.requires_grad_() for name, each in outline.named_parameters()}
            seen = outline(outline.blank())
            states = torch.stack([x.sum() for x in (seen.x_NSE, *seen.taps.values())])
            gradients = torch.autograd.grad(states.sum(), list(named.values()), allow_unused=True)
        return {held.get(name, name) for name, gradient in zip(named, gradients) if gradient is None}


def _outline(tensor: Tensor) -> Tensor:
    """A tensor's shape without its numbers; of all floating-point ones in one dtype, as they meet under autocast."""
    return torch.empty_like(tensor, dtype=torch.float32 if tensor.is_floating_point() else None, device="meta")


def state_index(layer: int | str, depth: int) -> int:
    """Which of a transformer's states a layer means: 0 is the embeddings, `depth` or -1 the last block's output.

    Raises:
        ConfigError: not a number, or there is no such state.
    """
    try:
        index = int(layer)
    except ValueError:
        raise ConfigError(f"layer {layer!r} of a transformer is a number", "-2 is the penultimate") from None
    if not -depth - 1 <= index <= depth:
        raise ConfigError(f"layer {index} of a tower with {depth} blocks", f"use {-depth - 1} to {depth}")
    return index % (depth + 1)


def check_patches(size: int, patch: int) -> None:
    """Refuse a side that is no whole number of patches.

    Raises:
        ConfigError: the next smaller side that is one stands in the remedy.
    """
    if size % patch:
        raise ConfigError(f"image_size {size} does not divide into patches of {patch}", f"use {size // patch * patch}")
