"""EfficientNet-Lite0, the embedded image encoder and tagger (EfficientNet: Tan & Le, arXiv 1905.11946).

Official code: tensorflow/tpu, models/official/efficientnet/lite.

Differs:
- Features are taken at any depth, or at several depths brought to one grid; deeper blocks are then not computed.
- Batch norm is folded into the convolutions when the weights are read: there are no running statistics to keep from
  moving, and inference is faster (224 px in fp32 by half, smaller pictures and bf16 by up to a quarter).
- Activations are clipped in place: large maps would otherwise be fetched from the system anew at every layer (a third
  of the time of a forward pass in bf16).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from isthmus.config import EncoderConfig, nearest
from isthmus.encoders import Encoder
from isthmus.types import ConfigError, DataError, Features

STEM = 32
STAGES = (  # expansion, width, blocks, stride of the first, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
HEAD = 1280
CLASSES = 1000
EPSILON = 1e-3
SIDE = 224


class Shape(NamedTuple):
    """What distinguishes one block from another."""

    inputs: int
    outputs: int
    expansion: int
    stride: int
    kernel: int


def _shapes() -> Iterator[Shape]:
    inputs = STEM
    for expansion, width, count, stride, kernel in STAGES:
        for index in range(count):
            yield Shape(inputs, width, expansion, 1 if index else stride, kernel)
            inputs = width


BLOCKS = tuple(_shapes())
WIDTHS = (*(shape.outputs for shape in BLOCKS), HEAD)
DEPTHS = (*(f"block{index + 1}" for index in range(len(BLOCKS))), "head")
"""Names of the states, from shallow to deep; shallow ones keep colour and place, deep ones know the category."""


class Convolution(nn.Conv2d):
    """A convolution with TensorFlow's `same` padding: output side = ceil(side / stride), the odd pixel at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        across, down = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in reversed(x_NCHW.shape[2:])
        )
        if across % 2 or down % 2:
            x_NCHW = F.pad(x_NCHW, (across // 2, across - across // 2, down // 2, down - down // 2))
            down = across = 0
        return F.conv2d(x_NCHW, self.weight, self.bias, stride, (down // 2, across // 2), 1, self.groups)


class Block(nn.Module):
    """Inverted residual: expand, filter each channel, project; added to its input where shapes agree."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.inputs * shape.expansion
        self.expand = Convolution(shape.inputs, inner) if shape.expansion > 1 else None
        self.depthwise = Convolution(inner, inner, shape.kernel, shape.stride, groups=inner)
        self.project = Convolution(inner, shape.outputs)
        self.residual = shape.stride == 1 and shape.inputs == shape.outputs

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        inner_NCHW = x_NCHW if self.expand is None else _clipped(self.expand(x_NCHW))
        y_NCHW = self.project(_clipped(self.depthwise(inner_NCHW)))
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class EfficientNetLite(Encoder):
    """EfficientNet-Lite0 without its weights (`load` reads them); fully convolutional, any input size.

    Args:
        config: `layer` and `taps` are depths, one of `DEPTHS` or several joined by `+` (`block5+block11+head`), whose
            maps are average-pooled to the grid of the deepest and concatenated; -1 and -2 mean `head`.
        source: what identifies the weights.

    Raises:
        ConfigError: no such depth.
    """

    processor: CLIPImageProcessorPil

    def __init__(self, config: EncoderConfig, source: Mapping[str, str]) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM, 3, stride=2)
        self.blocks = nn.ModuleList(map(Block, BLOCKS))
        self.head = Convolution(BLOCKS[-1].outputs, HEAD)
        self.classifier = nn.Linear(HEAD, CLASSES)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size, self.aspect = config.image_size or SIDE, config.aspect
        self._source = dict(source)
        self._layer = parse_depths(config.layer)
        self._taps = {str(tap): parse_depths(tap) for tap in config.taps}
        self._deepest = max(max(depths) for depths in (self._layer, *self._taps.values()))
        self.grid = _grid(self.size, max(self._layer))
        self.width = _width(self._layer)
        self.tap_widths = {name: _width(depths) for name, depths in self._taps.items()}
        self.processor = _processor(self.size)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, str]:
        depths = {"layer": _join(self._layer), "taps": ",".join(map(_join, self._taps.values()))}
        return self._source | depths | {"aspect": self.aspect, "processor": self.processor.to_json_string()}

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, 3, H, W] -> x [N, S, E], rows first."""
        maps = self._maps(pixels, self._deepest)
        grid = maps[max(self._layer)].shape[2:]
        taps = {name: _gather(maps, depths) for name, depths in self._taps.items()}
        return Features(_gather(maps, self._layer), taps, (grid[0], grid[1]))

    def classify(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, H, W] -> logits [N, 1000] over the classes of ImageNet-1k in their usual order."""
        head_NCHW = self._maps(pixels, len(DEPTHS) - 1)[-1]
        return self.classifier(head_NCHW.mean((2, 3)))

    def _maps(self, pixels: Tensor, deepest: int) -> list[Tensor]:
        """The state at every depth up to `deepest`, in the order of `DEPTHS`."""
        x_NCHW = _clipped(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        maps = []
        for block in self.blocks[: deepest + 1]:
            x_NCHW = block(x_NCHW)
            maps.append(x_NCHW)
        if deepest == len(self.blocks):
            maps.append(_clipped(self.head(x_NCHW)))
        return maps


def load(config: EncoderConfig, path: Path, source: Mapping[str, str]) -> EfficientNetLite:
    """The encoder with the weights of a converted file (`assets.lite_weights`), ready for inference.

    Raises:
        ConfigError: no such depth.
        DataError: the file lacks a tensor, or has one too many.
    """
    encoder = EfficientNetLite(config, source)
    encoder.load_state_dict(fold(load_file(path)))
    return encoder.eval().requires_grad_(False)


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under our names, each convolution with its batch norm folded in; every tensor is used.

    Raises:
        DataError: a tensor is missing or left over.
    """
    left = dict(tensors)
    try:
        folded = {"classifier.weight": left.pop("_fc.weight"), "classifier.bias": left.pop("_fc.bias")}
        for name in [name for name in tensors if "conv" in name]:
            ours, norm = _ours(name)
            scale = left.pop(f"{norm}.weight") / torch.sqrt(left.pop(f"{norm}.running_var") + EPSILON)
            folded[f"{ours}.weight"] = left.pop(name) * scale[:, None, None, None]
            folded[f"{ours}.bias"] = left.pop(f"{norm}.bias") - left.pop(f"{norm}.running_mean") * scale
            left.pop(f"{norm}.num_batches_tracked")
    except KeyError as missing:
        raise DataError(f"EfficientNet-Lite0's file has no tensor {missing}", "fetch it again") from None
    if left:
        raise DataError(f"EfficientNet-Lite0's file has an unknown tensor {min(left)!r}", "fetch it again")
    return folded


def parse_depths(layer: int | str) -> tuple[int, ...]:
    """Indices into `DEPTHS`, ascending, of a name, of names joined by `+`, or of -1 or -2 (the head).

    Raises:
        ConfigError: no such depth.
    """
    if str(layer) in {"-1", "-2"}:
        return (len(DEPTHS) - 1,)
    names = str(layer).split("+")
    for name in names:
        if name not in DEPTHS:
            raise ConfigError(
                f"EfficientNet-Lite0 has no depth {name!r}{nearest(name, DEPTHS)}",
                f"use {DEPTHS[0]} to {DEPTHS[-2]}, {DEPTHS[-1]}, or several joined by +",
            )
    return tuple(sorted({DEPTHS.index(name) for name in names}))


def _ours(name: str) -> tuple[str, str]:
    """Our name of one of the file's convolutions, and the file's name of the batch norm that follows it."""
    if name == "_conv_stem.weight":
        return "stem", "_bn0"
    if name == "_conv_head.weight":
        return "head", "_bn1"
    found = re.fullmatch(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", name)
    if found is None:
        raise DataError(f"EfficientNet-Lite0's file has an unknown tensor {name!r}", "fetch it again")
    index, part = found.groups()
    return f"blocks.{index}.{part}", f"_blocks.{index}._bn{('expand', 'depthwise', 'project').index(part)}"


def _clipped(new_NCHW: Tensor) -> Tensor:
    """What a convolution has just made, to [0, 6], in its own memory."""
    return F.relu6(new_NCHW, inplace=True)


def _width(depths: tuple[int, ...]) -> int:
    return sum(WIDTHS[depth] for depth in depths)


def _grid(side: int, depth: int) -> tuple[int, int]:
    """Rows and columns at a depth: every stride of two halves the side, rounding up."""
    for stride in (2, *(shape.stride for shape in BLOCKS[: depth + 1])):
        side = -(-side // stride)
    return side, side


def _gather(maps: list[Tensor], depths: tuple[int, ...]) -> Tensor:
    """[N, C, H, W] at some depths -> [N, S, sum of C] on the grid of the deepest."""
    rows, columns = maps[max(depths)].shape[2:]
    pooled = [F.adaptive_avg_pool2d(maps[depth], (rows, columns)) for depth in depths]
    return torch.cat(pooled, 1).flatten(2).transpose(1, 2)


def _join(depths: tuple[int, ...]) -> str:
    return "+".join(DEPTHS[depth] for depth in depths)


def _processor(side: int) -> CLIPImageProcessorPil:
    """(x - 127) / 128 at `side` pixels, of pictures that were made square before."""
    return CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
