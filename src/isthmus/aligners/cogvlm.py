"""CogVLM: every layer of the LLM has a second set of weights for image positions, copied from its own at birth.

Wang et al. 2023, arXiv 2311.03079. Official code: github.com/THUDM/CogVLM, `utils/models/mixin.py`.

Differs:
    - an expert sits on each Linear of a layer, so that fused and separate projections and any LLM are served alike; an
      LLM's routed experts are no Linears (Mixtral, gpt-oss), so pictures share them with text, and little more than
      attention has a second set of weights there;
    - the LLM's chat template takes the place of `Question: ... Short answer:` and `[INST] ... [/INST]`;
    - a newline follows the end marker, which keeps pictures in a row apart (the authors have one picture);
    - the last layer has only the experts that a prediction can depend on, unless `idle` asks for the rest;
    - `every`, `where` and `start` are the paper's ablations; its bidirectional image mask is left out, because a rule
      here may narrow causality and never widen it;
    - `pool` is ours, off by default, for an LLM on a laptop that pays for every image token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import fuse, sites
from isthmus.aligner import Addition, Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.pool import pooled
from isthmus.data.boxes import Brackets
from isthmus.encoders import Encoder
from isthmus.graft import Graft, at
from isthmus.types import ConfigError, Context, Features, Layout, Side

if TYPE_CHECKING:
    from isthmus.model import VLM

EXPERT = "expert"
SPEAKING = ("q_proj", "o_proj", "out_proj", "dense")
"""Attention Linears that only shape a position's own output, as against the keys and values that others read."""


def runs(modality_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the token before, and the token behind, belongs to the same picture: two masks [B, T], False on text."""
    same_BT = (modality_BT[:, 1:] > 0) & (modality_BT[:, 1:] == modality_BT[:, :-1])
    same_BT &= segment_BT[:, 1:] == segment_BT[:, :-1]
    return F.pad(same_BT, (1, 0)), F.pad(same_BT, (0, 1))


class GLU(Connector):
    """Linear, LayerNorm, GELU, then a gated feed-forward; begin and end markers around each picture.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        expansion: hidden units of the feed-forward per unit of D.
    """

    def __init__(self, width: int, out: int, expansion: float):
        super().__init__()
        hidden = round(expansion * out)
        self.project = nn.Linear(width, out, bias=False)
        self.norm = nn.LayerNorm(out)
        self.gate, self.up = nn.Linear(out, hidden, bias=False), nn.Linear(out, hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)
        self.begin, self.end = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.zeros(out))

    def tokens(self, s: int) -> int:
        return s + 2

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, S + 2, D]; the end marker stands behind the last real token of each picture."""
        x_NSD = F.gelu(self.norm(self.project(features.x_NSE)))
        y_NSD = self.down(F.silu(self.gate(x_NSD)) * self.up(x_NSD))
        marker_N1D = (len(y_NSD), 1, -1)
        y_NQD = torch.cat([self.begin.expand(marker_N1D), y_NSD, self.end.expand(marker_N1D)], 1)
        if features.lengths_N is None:
            return y_NQD
        last_NQ = torch.arange(y_NQD.shape[1], device=y_NQD.device) == features.lengths_N[:, None] + 1
        return torch.where(last_NQ[..., None], self.end, y_NQD)


class Expert(Graft):
    """A Linear's second weights, for the begin marker and the tokens of a picture; the end marker counts as text.

    Args:
        host: the Linear; weights have its shape, and its values once `learn_from` was called.
        split: send each position through its own weights alone; otherwise both are computed everywhere and one is
            chosen, which needs no gathering and suits `torch.compile`.
    """

    reads_host = False
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, host: nn.Linear, split: bool):
        super().__init__()
        place: dict[str, Any] = {"device": next(host.parameters()).device, "dtype": torch.float32}
        self.split = split
        self.weight = nn.Parameter(torch.empty(host.out_features, host.in_features, **place))
        self.bias = None if host.bias is None else nn.Parameter(torch.empty(host.out_features, **place))

    @torch.no_grad()
    def learn_from(self, host: nn.Linear) -> None:
        """Take the host's own values."""
        self.weight.copy_(host.weight)
        if self.bias is not None:
            self.bias.copy_(host.bias)

    @torch.no_grad()
    def start_over(self) -> None:
        """Random values, as a new Linear has them."""
        fresh = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        self.weight.copy_(fresh.weight)
        if self.bias is not None:
            self.bias.copy_(fresh.bias)

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        if side is None:
            return base(x, *args, **kw)
        _, inside_BT = runs(side.modality_BT, side.segment_BT)
        image = inside_BT.reshape(x.shape[:-1])  # some families flatten rows and columns before their feed-forward
        if torch.compiler.is_compiling() or not self.split or self._side_is_read_below(host):
            return torch.where(image[..., None], self.look(x), base(x, *args, **kw))
        if not image.any():
            return base(x, *args, **kw)
        y_text, y_image = base(x[~image], *args, **kw), self.look(x[image])
        y = y_image.new_empty(*x.shape[:-1], y_image.shape[-1])
        return y.index_put((~image,), y_text.to(y.dtype)).index_put((image,), y_image)

    def look(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] by the expert's weights."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _side_is_read_below(self, host: nn.Module) -> bool:
        """Another addition inside this one expects the side's rows and columns, not gathered positions."""
        additions = list(at(host).values())
        return any(each.reads_side for each in additions[: additions.index(self)])


class CogVLM(Aligner):
    """Image positions go through weights of their own in every layer; one attention is over all positions."""

    name = "cogvlm"
    family = "converter"
    encoder_decoder = False

    class Options(Frozen):
        every: int = Field(1, ge=1)
        """Experts in every n-th layer, counted from the last; 1 is the paper's, 4 its ablation."""
        where: Literal["layer", "attention", "ffn"] = "layer"
        """Which Linears have experts: all, those of attention, or those of the feed-forward."""
        start: Literal["llm", "random"] = "llm"
        """Expert weights at birth: copies of the LLM's own, or random."""
        idle: bool = False
        """Also the last layer's experts behind which nothing is predicted, as the authors' checkpoints hold them; they
        learn only from an objective on image states."""
        split: bool = True
        """Each position through its own weights alone; off computes both everywhere and chooses."""
        expansion: float = Field(2.6875, gt=0)
        """Hidden units of the connector per unit of the LLM's width; the default is Vicuna's, as in the paper."""
        pool: int | None = Field(None, ge=1)
        """Average the encoder's grid to pool x pool tokens first."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return pooled(GLU(encoder.width, width, self.options.expansion), encoder, self.options.pool)

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        stack = sites.layers(llm)
        last = len(stack.modules) - 1
        for index, layer in enumerate(stack.modules):
            if (last - index) % self.options.every:
                continue
            idle = self.options.idle or index < last
            chosen = self._chosen(layer, idle)
            if not chosen and idle:
                raise ConfigError(
                    f"{type(layer).__name__} has no Linears that experts could stand beside", "choose another LLM"
                )
            for path, linear in chosen.items():
                yield Addition(f"llm.{stack.path}.{index}.{path}", EXPERT, Expert(linear, self.options.split))

    def _chosen(self, layer: nn.Module, idle: bool) -> dict[str, nn.Linear]:
        """The Linears of a layer that get experts, by dotted name; without `idle`, only keys and values."""
        attending = set(sites.linears(sites.attention(layer)).values())
        chosen = {}
        for path, linear in sites.linears(layer).items():
            part = "attention" if linear in attending else "ffn"
            speaking = part == "ffn" or path.rpartition(".")[2] in SPEAKING
            if self.options.where in ("layer", part) and (idle or not speaking):
                chosen[path] = linear
        return chosen

    def layout(self, kind: str, tokens: int) -> Layout:
        """Begin marker, picture, end marker, newline."""
        return Layout(tokens, after="\n")

    def boxes(self) -> Brackets:
        return Brackets()

    def positions(self, counted_BT: Tensor, segment_BT: Tensor, modality_BT: Tensor) -> Tensor | None:
        """All tokens between the markers share one position; what follows goes on behind it."""
        before_BT, behind_BT = runs(modality_BT, segment_BT)
        between_BT = before_BT & behind_BT
        if not between_BT.any():
            return None
        shared_BT = F.pad(between_BT[:, 1:] & between_BT[:, :-1], (1, 0))
        total_BT = shared_BT.cumsum(1)
        column_BT = torch.arange(segment_BT.shape[1], device=segment_BT.device).expand_as(segment_BT)
        start_BT = column_BT - fuse.positions(segment_BT)
        return counted_BT - (total_BT - total_BT.gather(1, start_BT))

    def birth(self, model: VLM) -> None:
        for host in sites.linears(model.llm).values():
            expert = at(host).get(EXPERT)
            if isinstance(expert, Expert):
                if self.options.start == "llm":
                    expert.learn_from(host)
                else:
                    expert.start_over()
