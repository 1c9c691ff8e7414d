"""Towers that turn pixels into `Features`: transformers models (`hf`), EfficientNet-Lite (`lite`)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from isthmus.types import Features


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
    """

    kind: ClassVar[str] = "image"
    width: int
    tap_widths: dict[str, int]
    size: int
    aspect: Literal["crop", "pad", "squash"]
    grid: tuple[int, int]
    processor: ImageProcessingMixin

    @property
    def tokens(self) -> int:
        """S at the configured input size (a kept class token counts)."""
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """What cached features depend on besides the picture: source, weights' hash, depth, preprocessing."""
        raise NotImplementedError

    def blank(self) -> Tensor:
        """Pixels of one empty medium, [1, C, H, W]."""
        return torch.zeros(1, 3, self.size, self.size)

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, C, H, W] -> features with x [N, S, E] and the configured taps."""
        raise NotImplementedError
