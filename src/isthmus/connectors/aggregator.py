"""The vision aggregator: the encoder's last tokens ask its earlier layers, then go through an MLP to the LLM.

Chen et al. 2024, arXiv 2311.11860 (LION). Official code: github.com/JiuTian-VL/JiuTian-LION, `models/lion_t5.py`.

Differs:
    - depths may differ in width and in grid, as those of a convolutional encoder do;
    - `width` and `places` are ours, off by default: a working width of its own, and tokens told of their place in 2-D,
      for encoders that do not know it;
    - without taps there is no layer, which is the ablation "last layer alone".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.position_aware import sine_cosine
from isthmus.connectors.qformer import EPSILON, Attention, FeedForward, Layer, Shape, as_bert
from isthmus.types import ConfigError, Context, DataError, Features


class Aggregation(Frozen):
    """Sizes of an aggregator; the defaults are LION's, on EVA ViT-g."""

    width: int | None = Field(None, ge=4)
    """Width of the layers; None is the encoder's."""
    heads: int = Field(16, ge=1)
    inner: int = Field(3072, ge=1)
    """Width inside the layers' feed-forward parts."""
    expansion: float = Field(4.0, gt=0)
    """Hidden units of the MLP behind them per unit of width."""
    dropout: float = Field(0.1, ge=0, lt=1)
    places: bool = False


class Aggregator(Connector):
    """One BERT-like layer per tap, each reading itself, its tap, and a feed-forward; then LayerNorm and MLP.

    At birth every layer's outputs are zero, so that what leaves the last one is a chain of LayerNorms of the features.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        taps: names and widths of the taps that the layers read, in order.
        shape: sizes.

    Raises:
        ConfigError: the heads, or four waves, do not divide the width.
    """

    def __init__(self, width: int, out: int, taps: Sequence[tuple[str, int]], shape: Aggregation):
        super().__init__()
        own = shape.width or width
        if own % shape.heads or (shape.places and own % 4):
            raise ConfigError(
                f"{shape.heads} heads (and 4 waves of `places`) do not divide a width of {own}",
                "set aligner.options.aggregator.heads or .width",
            )
        self.names, self.places = [name for name, _ in taps], shape.places
        bert = Shape(width=own, heads=shape.heads, inner=shape.inner, dropout=shape.dropout)
        self.enter = nn.Identity() if own == width else nn.Linear(width, own)
        self.layers = nn.ModuleList(Layer(bert, source, text=False) for _, source in taps)
        self.norm = nn.LayerNorm(own, eps=EPSILON)
        hidden = round(shape.expansion * own)
        self.mlp = nn.Sequential(nn.Linear(own, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.layers.apply(as_bert)
        self.layers.apply(_shut)

    def tokens(self, s: int) -> int:
        return s

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] and its taps -> y [N, S, D]."""
        return self.mlp(self.norm(self.gather(features)))

    def gather(self, features: Features) -> Tensor:
        """x [N, S, E] and its taps [N, S', E'] -> [N, S, width], before the last norm.

        Raises:
            DataError: `places` on features that form no square.
        """
        real_NS = features.real_NS
        own = None if real_NS is None else real_NS.unsqueeze(1)
        x_NSE = self._placed(self.enter(features.x_NSE))
        for name, layer in zip(self.names, self.layers):
            tap = self._placed(features.taps[name])
            seen = own if tap.shape[1] == x_NSE.shape[1] else None
            x_NSE = layer(x_NSE, x_NSE.shape[1], tap, seen, own)
        return x_NSE

    def _placed(self, x_NSE: Tensor) -> Tensor:
        """The tokens with a table of their places added, where that is wanted."""
        if not self.places:
            return x_NSE
        side, width = math.isqrt(x_NSE.shape[1]), x_NSE.shape[2]
        if side**2 != x_NSE.shape[1] or width % 4:
            raise DataError(
                f"{x_NSE.shape[1]} tokens of width {width} have no places in a square",
                "set aligner.options.aggregator.places=false",
            )
        table_SE = sine_cosine(width, side).flatten(0, 1)
        return x_NSE + table_SE.to(x_NSE)


@torch.no_grad()
def _shut(module: nn.Module) -> None:
    """Zero what a part adds to its residual."""
    if isinstance(module, Attention):
        module.out.weight.zero_()
    elif isinstance(module, FeedForward):
        module.contract.weight.zero_()
