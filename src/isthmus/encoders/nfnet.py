"""NFNet-F0 to F6, Flamingo's convolutional tower (Brock et al., arXiv 2102.06171).

Official code: google-deepmind/deepmind-research, nfnets; weights are read as timm names them (`dm_nfnet_f6`).

Differs:
- The standardisation of the convolutions' weights, with its gain, is folded into them when they are read; trained
  further, they move freely.
- Features are taken at any stage; deeper ones are not built. The classifier is left out.
- Flamingo's own tower was trained against text and never released; the weights at hand were trained on ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import EncoderConfig, Frozen, nearest
from isthmus.encoders import Encoder
from isthmus.encoders.lite import Convolution
from isthmus.types import ConfigError, Features

GAMMA = 1.7015043497085571
"""Keeps the variance of a unit normal through GELU."""
ALPHA, ATTENTION_GAIN, EPSILON = 0.2, 2.0, 1e-5
DEPTHS = ("stem", "stage1", "stage2", "stage3", "stage4", "final")
STRIDES = (4, 4, 8, 16, 32, 32)


class Shape(Frozen):
    """What distinguishes one NFNet from another, under timm's names."""

    depths: tuple[int, int, int, int]
    channels: tuple[int, int, int, int] = (256, 512, 1536, 1536)
    stem_chs: int = 128
    group_size: int = 128
    num_features: int = 3072


SHAPES: dict[str, dict[str, Any]] = {
    f"dm_nfnet_f{index}": {"depths": tuple((index + 1) * depth for depth in (1, 2, 6, 3))} for index in range(7)
}


def activate(x_NCHW: Tensor) -> Tensor:
    """GELU that keeps the variance of a unit normal."""
    return F.gelu(x_NCHW) * GAMMA


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        squeezed = x_NCHW.mean((2, 3), keepdim=True)
        return x_NCHW * self.fc2(F.relu(self.fc1(squeezed))).sigmoid()


class Block(nn.Module):
    """Bottleneck without norms: what enters is scaled to unit variance, what is added is scaled down."""

    def __init__(self, inputs: int, outputs: int, stride: int, variance: float, group: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.scale, self.stride = variance**-0.5, stride
        changes = inputs != outputs or stride != 1
        self.downsample = nn.ModuleDict({"conv": Convolution(inputs, outputs)}) if changes else None
        self.conv1 = Convolution(inputs, inner)
        self.conv2 = Convolution(inner, inner, 3, stride, inner // group)
        self.conv2b = Convolution(inner, inner, 3, 1, inner // group)
        self.conv3 = Convolution(inner, outputs)
        self.attn_last = SqueezeExcite(outputs)
        self.skipinit_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        y_NCHW = activate(x_NCHW) * self.scale
        if self.downsample is not None:
            x_NCHW = y_NCHW if self.stride == 1 else F.avg_pool2d(y_NCHW, 2, 2, 0, True, False)
            x_NCHW = self.downsample["conv"](x_NCHW)
        y_NCHW = self.conv2(activate(self.conv1(y_NCHW)))
        y_NCHW = self.conv3(activate(self.conv2b(activate(y_NCHW))))
        return x_NCHW + ALPHA * self.skipinit_gain * ATTENTION_GAIN * self.attn_last(y_NCHW)


class NFNet(Encoder):
    """An NFNet without its weights (`timm.load` reads them); fully convolutional, any input size.

    Args:
        config: `layer` and `taps` are depths, one of `DEPTHS`; -1 and -2 mean `final`, behind its activation.
        shape: the architecture.
        own: side of the square input that the weights were trained at.
        processor: the image processor that makes its pixels.
        source: what identifies the weights.

    Raises:
        ConfigError: no such depth.
    """

    def __init__(self, config: EncoderConfig, shape: Shape, own: int, processor: Any, source: Mapping[str, str]):
        super().__init__()
        self.shape, self.processor, self.aspect = shape, processor, config.aspect
        self.size, self._source = config.image_size or own, dict(source)
        self._layer = _depth(config.layer)
        self._taps = {str(tap): _depth(tap) for tap in config.taps}
        widths = (shape.stem_chs, *shape.channels, shape.num_features)
        self.width = widths[self._layer]
        self.tap_widths = {name: widths[depth] for name, depth in self._taps.items()}
        self.grid = (-(-self.size // STRIDES[self._layer]),) * 2
        deepest = max(self._layer, *self._taps.values(), 0)
        stem, last = shape.stem_chs, len(DEPTHS) - 1
        self.stem = nn.ModuleDict(
            {
                "conv1": Convolution(3, stem // 8, 3, 2),
                "conv2": Convolution(stem // 8, stem // 4, 3),
                "conv3": Convolution(stem // 4, stem // 2, 3),
                "conv4": Convolution(stem // 2, stem, 3, 2),
            }
        )
        self.stages = nn.Sequential(*(_stage(shape, index) for index in range(min(deepest, len(shape.depths)))))
        self.final_conv = Convolution(shape.channels[-1], shape.num_features) if deepest == last else None
        self.unread = ("head.", *(f"stages.{index}." for index in range(deepest, len(shape.depths))))
        self.unread += () if deepest == last else ("final_conv.",)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, str]:
        chosen = {"layer": DEPTHS[self._layer], "taps": str(self._taps), "shape": self.shape.model_dump_json()}
        return self._source | chosen | self.preprocessing()

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, 3, H, W] -> x [N, S, E], rows first."""
        x_NCHW = self.stem["conv1"](pixels)
        for name in ("conv2", "conv3", "conv4"):
            x_NCHW = self.stem[name](activate(x_NCHW))
        states = [x_NCHW]
        for stage in self.stages:
            states.append(stage(states[-1]))
        if self.final_conv is not None:
            states.append(activate(self.final_conv(states[-1])))
        taps = {name: _rows(states[depth]) for name, depth in self._taps.items()}
        return Features(_rows(states[self._layer]), taps, self.grid)

    @staticmethod
    def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under our names, with every standardised convolution's weight as it is applied."""
        gains = {name.removesuffix(".gain"): gain for name, gain in tensors.items() if name.endswith(".gain")}
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".gain")}
        return kept | {f"{name}.weight": standardise(kept[f"{name}.weight"], gain) for name, gain in gains.items()}


def standardise(weight: Tensor, gain: Tensor) -> Tensor:
    """[C', C, K, K] with every output channel at mean 0 and variance gain^2 / fan-in."""
    flat = weight.float().flatten(1)
    variance, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
    scale = gain.float().flatten(1) * flat.shape[1] ** -0.5
    return ((flat - mean) * torch.rsqrt(variance + EPSILON) * scale).view_as(weight).to(weight.dtype)


def _stage(shape: Shape, index: int) -> nn.Sequential:
    """Blocks of one width; the expected variance grows by alpha^2 with each and starts anew behind the first."""
    inputs = (shape.stem_chs, *shape.channels)[index]
    before = 1 + ALPHA**2 * shape.depths[index - 1] if index else 1.0
    blocks = []
    for number in range(shape.depths[index]):
        variance = 1 + ALPHA**2 * number if number else before
        stride = 2 if index and not number else 1
        blocks.append(Block(inputs, shape.channels[index], stride, variance, shape.group_size))
        inputs = shape.channels[index]
    return nn.Sequential(*blocks)


def _depth(layer: int | str) -> int:
    if str(layer) in {"-1", "-2"}:
        return len(DEPTHS) - 1
    if str(layer) not in DEPTHS:
        raise ConfigError(f"an NFNet has no depth {layer!r}{nearest(str(layer), DEPTHS)}", f"use one of {DEPTHS}")
    return DEPTHS.index(str(layer))


def _rows(x_NCHW: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, S, C]."""
    return x_NCHW.flatten(2).transpose(1, 2)
