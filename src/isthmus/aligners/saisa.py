"""SAISA: each layer reads the picture through an MLP of its own, as keys and values alone.

Yuan et al. 2025, arXiv 2502.02458. Official code: github.com/icip-cas/SAISA.
Its first step, NAAViT (media never ask, the rest as in LLaVA), is `ee_mllm` with `visual: ffn`.

Differs:
    - any number of pictures at any place, ragged and packed rows (the official forward takes one picture per sample,
      at the same column throughout a batch, without padding);
    - the connector is a gain per feature, all ones at birth, in front of the layers' MLPs: connectors carry weights;
    - `pool`, `normalise` and `inner` are ours, off by default, for small machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import fuse, sites
from isthmus.aligner import Addition, Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector, composite
from isthmus.connectors.pool import pooled
from isthmus.encoders import Encoder
from isthmus.graft import Graft, arithmetic
from isthmus.types import ConfigError, Context, Features, Layout, Modality, Side


class Gain(Connector):
    """Encoder features as they are, up to a learned gain per feature.

    Args:
        width: E, the encoder's width.
        normalise: LayerNorm, whose gain it then is.
    """

    def __init__(self, width: int, normalise: bool):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.normalise = normalise

    def tokens(self, s: int) -> int:
        return s

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, S, E]."""
        x_NSE = features.x_NSE
        if self.normalise:
            return nn.functional.layer_norm(x_NSE, x_NSE.shape[-1:], self.gain)
        return x_NSE * self.gain


class OwnView(Graft):
    """On a layer: the states of media are replaced by what this layer's MLP makes of the encoder's features.

    Args:
        read: E, the features' width.
        inner: width of the MLP's hidden layer.
        width: D, the LLM's width.
    """

    def __init__(self, read: int, inner: int, width: int):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(read, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        if side is not None and composite.holds_media(side):
            at_BT = side.modality_BT != Modality.TEXT
            master = cast(nn.Linear, self.projector[0]).weight
            with arithmetic(x):
                own_MD = self.projector(_present(side).to(master.dtype))
            x = fuse.splice(x, at_BT, own_MD, "image")
        return base(x, *args, **kw)


def _present(side: Side) -> Tensor:
    """Features of the media that stand in this call, end to end, [M, E]; those of earlier calls are in the cache."""
    assert side.vision_BKQD is not None and side.media_mask_BTK is not None
    here_BT = side.modality_BT != Modality.TEXT
    present_BK = (side.media_mask_BTK & here_BT[..., None]).any(1)
    return side.vision_BKQD[present_BK].flatten(0, 1)


class SAISA(Aligner):
    """Places in the input for every token of the picture, filled anew in every layer and gone after it."""

    name = "saisa"
    family = "converter"
    splices = False
    encoder_decoder = False

    class Options(Frozen):
        inner: int | None = Field(None, ge=1)
        """Width inside each layer's MLP; None is the LLM's."""
        pool: int | None = Field(None, ge=1)
        """Average the encoder's grid to pool x pool tokens first."""
        normalise: bool = False
        """LayerNorm of the features first."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return pooled(Gain(encoder.width, self.options.normalise), encoder, self.options.pool)

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(count=tokens, after="\n")

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        reads = {int(encoder.width) for encoder in encoders.values()}  # type: ignore[arg-type]
        if len(reads) > 1:
            raise ConfigError(f"encoders of widths {sorted(reads)} share the layers' MLPs", "keep one encoder")
        (read,) = reads
        stack = sites.layers(llm)
        for index, layer in enumerate(stack.modules):
            path, name = f"llm.{stack.path}.{index}", composite.check(layer)
            turns = composite.turns(sites.attention(layer))
            yield Addition(f"{path}.{name}", "saisa", composite.MediaAttention(turns, echo=False))
            yield Addition(f"{path}.{composite.feed_forward(layer)}", "saisa", composite.TextOnly())
            yield Addition(path, "saisa", OwnView(read, self.options.inner or width, width))

    def media_mask(self, position_BT: Tensor, segment_BT: Tensor, media_at_BK: Tensor) -> Tensor:
        """Only the last medium that has begun: the one that a place belongs to."""
        return fuse.last(super().media_mask(position_BT, segment_BT, media_at_BK), media_at_BK)
