"""Flamingo: pictures stay aside, and gated cross-attention before every n-th layer of a frozen LLM looks at them.

Alayrac et al. 2022, arXiv 2204.14198 (Flamingo); Awadalla et al. 2023, arXiv 2308.01390 (OpenFlamingo).
Official code: github.com/mlfoundations/open_flamingo.

Differs:
    - `<image>` is written with the LLM's own tokens, and the end of an answer is the LLM's own end token: there are
      no new rows to train;
    - keys and values of the latents are computed again at every decoded token instead of kept;
    - a sample without a picture is learnt whole, so the embedded recipe has none; before a first picture nothing is
      learnt where a stage says `after_media`, as the published recipes do;
    - a picture belongs to the text behind it (the paper draws preceding or following in its documents);
    - `inner` is ours: a narrower resampler for wide encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus import fuse, sites
from isthmus.aligner import Addition, Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.resampler import CrossAttention, Perceiver, feed_forward
from isthmus.encoders import Encoder
from isthmus.graft import Graft, arithmetic, at
from isthmus.types import ConfigError, Layout, Side

if TYPE_CHECKING:
    from isthmus.model import VLM

MARKER = "<image>"
"""Stands in the text where a picture is, and is the first token that sees it."""


class Gated(Graft):
    """Cross-attention to the media and a feed-forward network before a layer, each behind a tanh gate that starts shut.

    Args:
        width: D, the LLM's width.
        read: width of the media's vectors.
        heads: attention heads.
        head_width: width of one head.
        gate: what both gates begin with.
    """

    def __init__(self, width: int, read: int, heads: int, head_width: int, gate: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, read, heads, head_width)
        self.feed = feed_forward(width)
        self.attention_gate, self.feed_gate = (nn.Parameter(torch.full((1,), gate)) for _ in range(2))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        with arithmetic(x):
            y_BTD = x
            if side is not None and side.vision_BKQD is not None and side.media_mask_BTK is not None:
                y_BTD = y_BTD + self.attention_gate.tanh() * self.look(x, side.vision_BKQD, side.media_mask_BTK)
            y_BTD = y_BTD + self.feed_gate.tanh() * self.feed(y_BTD)
        return base(y_BTD.to(x.dtype), *args, **kw)

    def look(self, x_BTD: Tensor, vision_BKQD: Tensor, mask_BTK: Tensor) -> Tensor:
        """What each position sees of the media that it may look at; exactly zero where it may look at none."""
        sees_BT1 = mask_BTK.any(-1, keepdim=True)
        # A row without any key is not a number in some kernels: it looks at everything, and what it saw is dropped.
        allowed_BTS = (mask_BTK | ~sees_BT1).repeat_interleave(vision_BKQD.shape[2], -1)
        seen_BTD = self.attention(self.norm(x_BTD), vision_BKQD.flatten(1, 2), allowed_BTS[:, None])
        return seen_BTD.masked_fill(~sees_BT1, 0)


class Flamingo(Aligner):
    """A resampler's latents, read from inside the LLM; its own weights and its input stay as they are."""

    name = "flamingo"
    family = "perceiver"
    splices = False
    asleep = (
        "connectors.*",
        "llm.*.grafts.gated.norm.*",
        "llm.*.grafts.gated.attention.*",
        "llm.*.grafts.gated.feed.*",
    )

    class Options(Frozen):
        every: int = Field(1, ge=1)
        """Layers from one gated block to the next: 1 in OpenFlamingo-3B, 2 in 4B, 4 in 9B."""
        latents: int = Field(64, ge=1)
        depth: int = Field(6, ge=1)
        """Layers of the resampler."""
        heads: int = Field(8, ge=1)
        head_width: int = Field(64, ge=1)
        inner: int | None = Field(None, ge=1)
        """Width of the resampler; None is the encoder's."""
        gate: float = 0.0
        """What gates begin with, before their tanh. Other than 0 is the ablation: a newborn is then not the LLM."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        options = self.options
        return Perceiver(
            encoder.width, options.latents, options.depth, options.heads, options.head_width, options.inner
        )

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(count=0, after=MARKER)

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        stack = self._stack(llm)
        chosen = range(self.options.every - 1, len(stack.modules), self.options.every)
        if not chosen:
            raise ConfigError(
                f"a gated block every {self.options.every} layers of {len(stack.modules)} is none", "lower `every`"
            )
        for index in chosen:
            options = self.options
            block = Gated(width, self._read(encoders), options.heads, options.head_width, options.gate)
            yield Addition(f"llm.{stack.path}.{index}", "gated", block)

    def media_mask(self, position_BT: Tensor, segment_BT: Tensor, media_at_BK: Tensor) -> Tensor:
        """Only the last medium that has appeared."""
        return fuse.last(super().media_mask(position_BT, segment_BT, media_at_BK), media_at_BK)

    def figures(self, model: VLM) -> dict[str, Tensor]:
        """How far the two gates before each layer are open, from -1 to 1."""
        found = {}
        for index, layer in enumerate(self._stack(model.llm).modules):
            if isinstance(block := at(layer).get("gated"), Gated):
                found[f"gate_attention_{index}"] = block.attention_gate.tanh()
                found[f"gate_feed_{index}"] = block.feed_gate.tanh()
        return found

    def _stack(self, llm: Any) -> sites.Layers:
        """The layers that the blocks stand before."""
        return sites.layers(llm, "encoder" if llm.config.is_encoder_decoder else "decoder")

    def _read(self, encoders: nn.ModuleDict) -> int:
        """The width of the latents, which all encoders share."""
        widths = {self.options.inner or int(encoder.width) for encoder in encoders.values()}  # type: ignore[arg-type]
        if len(widths) > 1:
            raise ConfigError(f"encoders of widths {sorted(widths)} share one cross-attention", "set `inner`")
        return widths.pop()
