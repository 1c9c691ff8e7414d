"""LLaMA-Adapter V1 and V2: learnt prompts beside the keys of upper layers, behind a gate per head that starts shut.

Zhang et al. 2023, arXiv 2303.16199 (V1) and Gao et al. 2023, arXiv 2304.15010 (V2).
Official code: github.com/OpenGVLab/LLaMA-Adapter, `alpaca_finetuning_v1`, `llama_adapter_v2_multimodal7b` and
`llama_adapter_v2_chat65b`.

Differs:
    - a token meets the prompts of the last picture before it, and plain ones where there is none, so that rows with
      several pictures, packed rows and cached prefixes work; the authors have one picture per row;
    - queries are computed once more from the frozen weights, since no LLM is forked;
    - V1's picture vector is the mean over tokens of every depth that is configured, side by side;
    - the released V2 blocks read the encoder's states, without CLIP's last norm and projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import fuse, sites
from isthmus.aligner import Addition, Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector, composite
from isthmus.encoders import Encoder
from isthmus.graft import Graft, at
from isthmus.types import ConfigError, Context, Features, Side

if TYPE_CHECKING:
    from isthmus.model import VLM

Tuned: TypeAlias = Literal["bias", "scale", "inputs"]

# ---------------------------------------------------------------------------------------------- connectors


class Glance(Connector):
    """V1: one vector per picture, from the mean over tokens of all depths side by side.

    Args:
        widths: of `x_NSE` and of each tap, in the encoder's order.
        out: D, the LLM's width.
    """

    def __init__(self, widths: list[int], out: int):
        super().__init__()
        self.project = nn.Linear(sum(widths), out)

    def tokens(self, s: int) -> int:
        return 1

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] and taps [N, S', E'] -> y [N, 1, D]."""
        depths = [features.x_NSE, *features.taps.values()]
        return self.project(torch.cat([depth.mean(1, keepdim=True) for depth in depths], -1))


class Tokens(Connector):
    """V2 as in the paper: every token through one Linear and LayerNorm, to be read as a prompt."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.project, self.norm = nn.Linear(width, out), nn.LayerNorm(out)

    def tokens(self, s: int) -> int:
        return s

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, S, D]."""
        return self.norm(self.project(features.x_NSE))


class Blocks(Connector):
    """V2 as released: queries and tokens go through transformer blocks together, and the queries come out.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        queries: Q, one per prompt.
        depth, inner, heads: of the blocks.
    """

    def __init__(self, width: int, out: int, queries: int, depth: int, inner: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, inner))
        self.project, self.norm = nn.Linear(width, inner), nn.LayerNorm(inner)
        how: dict[str, Any] = {"dropout": 0.0, "activation": _gelu, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(inner, heads, 4 * inner, **how) for _ in range(depth))
        self.out, self.out_norm = nn.Linear(inner, out), nn.LayerNorm(out)

    def tokens(self, s: int) -> int:
        return len(self.queries)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D]."""
        tokens = self.norm(self.project(features.x_NSE))
        x = torch.cat([self.queries.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(self.out(x[:, : len(self.queries)]))


def _gelu(x: Tensor) -> Tensor:
    """Torch fuses a block whose activation it knows, outside of training; no graft inside would run then."""
    return F.gelu(x)


# ---------------------------------------------------------------------------------------------- grafts


class Prompted(Graft):
    """Prompts beside an attention's keys, under a softmax of their own and a tanh gate per head.

    Keys and values of the prompts come from the host's frozen weights, without input norm and rotation. The host's
    output is linear in its heads, so what the prompts add is simply added to what the host returns.

    Args:
        host: the attention.
        width: D.
        prompts: P learnt prompts; 0 for pictures alone.
        pictures: whether a picture's vectors are added to the prompts, or are the prompts where there are none.
        gate: what the gates begin with.

    Raises:
        ConfigError: the attention is not made of separate query, key, value and output Linears.
    """

    def __init__(self, host: Any, width: int, prompts: int, pictures: bool, gate: float):
        super().__init__()
        _check(host)
        self.pictures, self.turns = pictures, composite.turns(host)
        self.prompts = nn.Parameter(torch.randn(prompts, width)) if prompts else None
        self.gate = nn.Parameter(torch.full((host.q_proj.out_features // host.head_dim,), gate))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        output, *rest = base(x, *args, **kw)
        prompts_BCPD, allowed_BTC = self.offered(x, side)
        if prompts_BCPD is None:
            return output, *rest
        query = _query(host, x, kw.get("position_embeddings") if self.turns else None)
        seen = self.look(host, query, prompts_BCPD, allowed_BTC)
        out = next(getattr(host, name) for name in composite.OUT if hasattr(host, name))
        return output + out(seen) - out(seen.new_zeros(1, 1, seen.shape[-1])), *rest  # without the bias, which is in

    def offered(self, x_BTD: Tensor, side: Side | None) -> tuple[Tensor | None, Tensor | None]:
        """Sets of prompts [B, C, P, D], one without a picture and one for each, and who reads which, [B, T, C]."""
        vision_BKQD = side.vision_BKQD if side is not None and self.pictures else None
        if self.prompts is None:
            if vision_BKQD is None or side is None:
                return None, None
            return vision_BKQD.to(x_BTD.dtype), side.media_mask_BTK
        plain_BCPD = self.prompts.to(x_BTD.dtype).expand(len(x_BTD), 1, -1, -1)
        if vision_BKQD is None or side is None or side.media_mask_BTK is None:
            return plain_BCPD, None
        sets_BCPD = torch.cat([plain_BCPD, plain_BCPD + vision_BKQD.to(x_BTD.dtype)], 1)
        none_BT1 = ~side.media_mask_BTK.any(-1, keepdim=True)
        return sets_BCPD, torch.cat([none_BT1, side.media_mask_BTK], -1)

    def look(self, host: Any, query: Tensor, prompts_BCPD: Tensor, allowed_BTC: Tensor | None) -> Tensor:
        """What the heads [B, H, T, d] read from the prompts, gated: [B, T, H * d]; zero for who may read none."""
        shape = (len(query), -1, host.k_proj.out_features // host.head_dim, host.head_dim)
        flat_BSD = prompts_BCPD.flatten(1, 2)
        key, value = host.k_proj(flat_BSD).view(shape), host.v_proj(flat_BSD).view(shape)
        if hasattr(host, "k_norm"):
            key = host.k_norm(key)
        mask = some = None
        if allowed_BTC is not None:
            some = allowed_BTC.any(-1)[:, None, :, None]
            mask = allowed_BTC.repeat_interleave(prompts_BCPD.shape[2], -1)[:, None] | ~some  # no row may be empty
        seen = F.scaled_dot_product_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), mask, scale=host.scaling, enable_gqa=True
        )
        gate = self.gate.tanh().to(seen.dtype)[:, None, None]
        if some is not None:
            gate = gate * some
        return (gate * seen).transpose(1, 2).flatten(2)


class Affine(Graft):
    """V2's tuning of a Linear, with b = 0 and s = 1 at birth.

    Args:
        host: the Linear.
        tune: `bias` is W x + b; `scale` is s (W x + b), the paper's; `inputs` is W (s x) + b, the released chat code's.
    """

    reads_side = False
    reads_host = False

    def __init__(self, host: nn.Linear, tune: Tuned):
        super().__init__()
        self.tune = tune
        self.bias = nn.Parameter(torch.zeros(host.out_features))
        width = host.in_features if tune == "inputs" else host.out_features
        self.scale = None if tune == "bias" else nn.Parameter(torch.ones(width))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        if self.scale is not None and self.tune == "inputs":
            x = x * self.scale.to(x.dtype)
        y = base(x, *args, **kw)
        y = y + self.bias.to(y.dtype)
        return y * self.scale.to(y.dtype) if self.scale is not None and self.tune == "scale" else y


def _check(host: Any) -> None:
    missing = [name for name in ("q_proj", "k_proj", "v_proj", "head_dim", "scaling") if not hasattr(host, name)]
    if not any(hasattr(host, name) for name in composite.OUT):
        missing.append("o_proj")
    if missing:
        raise ConfigError(
            f"{type(host).__name__} has no {', '.join(missing)}, so prompts cannot stand beside its keys",
            "choose an LLM with separate query, key, value and output projections",
        )
    if not composite.repeatable(host):
        raise ConfigError(
            f"{type(host).__name__} is not made of projections, norms of single heads and turns of whole ones alone",
            "choose a Llama-, Qwen-, Mistral-, Gemma-, GLM- or OPT-like LLM",
        )


def _query(host: Any, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The host's queries [B, H, T, d], normalised and turned as its own forward does it."""
    query = host.q_proj(x_BTD).unflatten(-1, (-1, host.head_dim))
    if hasattr(host, "q_norm"):
        query = host.q_norm(query)
    query = query.transpose(1, 2)
    return query if rotation is None else composite.turned(host, query, rotation)


# ---------------------------------------------------------------------------------------------- the joint


class LLaMAAdapter(Aligner):
    """Prompts in the upper layers of a frozen LLM; a picture is added to them, or read in the lower layers."""

    name = "llama_adapter"
    family = "converter"
    splices = False
    asleep = ("connectors.*", "llm.*.grafts.adapter.prompts")
    encoder_decoder = False

    class Options(Frozen):
        fusion: Literal["added", "early"] = "added"
        """`added` (V1, and V2's released code): a picture's vectors are added to the prompts. `early` (V2's paper): its
        tokens are the prompts of the lower layers, and the learnt ones of the upper layers know nothing of it."""
        lower: int = Field(2, ge=0)
        """Lower layers without learnt prompts: 2 of 32 in V1, 1 in V2's released code."""
        prompts: int = Field(10, ge=1)
        """Learnt prompts per layer."""
        tune: Literal["none"] | Tuned = "none"
        """V2: on every Linear of the layers a bias (released code), a bias and a scale of what comes out (paper), or a
        bias and a scale of what goes in (`inputs`, released chat code)."""
        blocks: int = Field(0, ge=0)
        """Transformer blocks between encoder and prompts: 8 in V2's released code, 0 in the papers."""
        inner: int = Field(768, ge=1)
        """Width of those blocks."""
        heads: int = Field(16, ge=1)
        """Attention heads of those blocks."""
        gate: float = 0.0
        """What gates begin with, before their tanh. Other than 0 is the ablation: a newborn is then not the LLM."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        chosen = self.options
        if chosen.fusion == "early":
            return Tokens(encoder.width, width)
        if chosen.blocks:
            return Blocks(encoder.width, width, chosen.prompts, chosen.blocks, chosen.inner, chosen.heads)
        return Glance([encoder.width, *encoder.tap_widths.values()], width)

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        stack = sites.layers(llm)
        early = self.options.fusion == "early"
        if self.options.lower >= len(stack.modules) or (early and not self.options.lower):
            raise ConfigError(
                f"lower={self.options.lower} of {len(stack.modules)} layers leaves none for prompts or pictures",
                f"use {int(early)} to {len(stack.modules) - 1}",
            )
        for index, layer in enumerate(stack.modules):
            path = f"llm.{stack.path}.{index}"
            attention = sites.attention(layer)
            name = next(name for name, module in layer.named_modules() if module is attention)
            if index >= self.options.lower:
                prompted = Prompted(attention, width, self.options.prompts, not early, self.options.gate)
                yield Addition(f"{path}.{name}", "adapter", prompted)
            elif early:
                yield Addition(f"{path}.{name}", "early", Prompted(attention, width, 0, True, self.options.gate))
            if self.options.tune != "none":
                for linear, host in sites.linears(layer).items():
                    yield Addition(f"{path}.{linear}", "affine", Affine(host, self.options.tune))

    def media_mask(self, position_BT: Tensor, segment_BT: Tensor, media_at_BK: Tensor) -> Tensor:
        """The last medium that has appeared, and no other: [B, T, K]."""
        return fuse.last(super().media_mask(position_BT, segment_BT, media_at_BK), media_at_BK)

    def figures(self, model: VLM) -> dict[str, Tensor]:
        """How far each layer's gates are open, from 0 to 1, over its heads."""
        found = {}
        for index, layer in enumerate(sites.layers(model.llm).modules):
            for name, graft in at(sites.attention(layer)).items():
                if isinstance(graft, Prompted):
                    found[f"gate_{name}_{index}"] = graft.gate.tanh().abs()
        return found
