"""Attention in which media are never queries: shared by EE-MLLM, NAAViT and SAISA.

EE-MLLM (Ma et al. 2024, arXiv 2408.11795) and SAISA (Yuan et al. 2025, arXiv 2502.02458; official code:
github.com/icip-cas/SAISA) let text look at media while media do not look at each other.

Text rows of a call are gathered and run through the layer's own attention, whose cache is stood in for by one that
joins the media's keys and values to theirs. So no score among media is computed, and no mask over whole rows is built
where nothing else needs one. A medium's token that attends to itself alone comes out as its value, through W_o. Where
a kernel tells weights, they are told of whole rows.

Differs: works on ragged batches, packed rows, prefixes that are reused, and text on both sides of a picture.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from isthmus import graft, sites
from isthmus.graft import Graft
from isthmus.types import ConfigError, Modality, Side

OUT = {"o_proj", "out_proj"}
"""What families call the Linear behind their heads."""
NORMS = {"q_norm", "k_norm"}
INSIDE = {"q_proj", "k_proj", "v_proj", *OUT, *NORMS, "rotary_fn", sites.ADDED}
"""What an attention module may hold for its queries, keys and values to be computed beside it."""
ROTATE = "apply_rotary_pos_emb"
"""What every family calls the function that turns its queries and keys."""


class Rows(NamedTuple):
    """Text rows of a call side by side, padded to the longest; media rows end to end; and the way back.

    `column_BU` are the columns of text (padded with columns of media), `text` the same as indices into B * T,
    `media` [M] those of media, and `back` [B * T] leads from text and media laid end to end to where they came from.
    """

    column_BU: Tensor
    text: Tensor
    media: Tensor
    back: Tensor

    @classmethod
    def of(cls, modality_BT: Tensor) -> Self:
        text_BT = modality_BT == Modality.TEXT
        rows, length = text_BT.shape
        most = max(1, int(text_BT.sum(1).max()))
        start_B1 = torch.arange(rows, device=text_BT.device)[:, None]
        column_BU = (~text_BT).byte().argsort(dim=1, stable=True)[:, :most]
        back_BT = torch.where(
            text_BT,
            start_B1 * most + text_BT.cumsum(1) - 1,
            rows * most + (~text_BT).flatten().cumsum(0).view_as(text_BT) - 1,
        )
        text = (column_BU + start_B1 * length).flatten()
        return cls(column_BU, text, (~text_BT).flatten().nonzero().flatten(), back_BT.flatten())

    def split(self, x_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, ...] -> text [B, U, ...] and media [M, ...]."""
        flat = x_BTX.flatten(0, 1)
        return flat.index_select(0, self.text).unflatten(0, self.column_BU.shape), flat.index_select(0, self.media)

    def join(self, text_BUX: Tensor, media_MX: Tensor) -> Tensor:
        """The way back, [B, T, ...]."""
        laid = torch.cat([text_BUX.flatten(0, 1), media_MX.to(text_BUX.dtype)])
        return laid.index_select(0, self.back).unflatten(0, (len(self.column_BU), -1))


def holds_media(side: Side | None) -> bool:
    """Whether any position of this call is a medium's."""
    return side is not None and bool((side.modality_BT != Modality.TEXT).any())


class MediaAttention(Graft):
    """On a self-attention: media give keys and values, and ask nothing.

    Args:
        turns: whether the layer turns queries and keys to their positions (`turns`).
        echo: media attend to themselves (EE-MLLM), else the attention adds nothing to them (NAAViT).
        free: only where no gradient is recorded; training then has full attention.
    """

    def __init__(self, turns: bool, echo: bool = True, free: bool = False):
        super().__init__()
        self.turns, self.echo, self.free = turns, echo, free

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        if side is None or not holds_media(side) or (self.free and torch.is_grad_enabled()):
            return base(x, *args, **kw)
        _check_kernel(host)
        rows = Rows.of(side.modality_BT)
        text_BUD, media_MD = rows.split(x)
        rotation = kw.get("position_embeddings")
        cache = kw.get("past_key_values")
        if rotation is not None:
            turned = [rows.split(each.expand(len(x), -1, -1)) for each in rotation]
            kw["position_embeddings"], rotation = tuple(text for text, _ in turned), [media for _, media in turned]
        if kw.get("position_ids") is not None:
            kw["position_ids"] = kw["position_ids"].expand(len(x), -1).gather(1, rows.column_BU)
        key_MHd, value_MHd = keys_and_values(host, media_MD, rotation if self.turns else None)
        cached = 0 if cache is None else cache.get_seq_length(host.layer_idx)
        kw["attention_mask"] = _mask(kw.get("attention_mask"), rows, side, cached, x.dtype)
        kw["past_key_values"] = _Joined(cache, rows, key_MHd, value_MHd)
        text_BUD, weights_BHUS, *more = base(text_BUD, *args, **kw)
        out_MD = _through(host, value_MHd) if self.echo else torch.zeros_like(media_MD)
        whole = None if weights_BHUS is None else self._weights(weights_BHUS, rows, x.shape[1])
        return rows.join(text_BUD, out_MD), whole, *more

    def _weights(self, text_BHUS: Tensor, rows: Rows, length: int) -> Tensor:
        """Weights of text rows -> those of all T = `length`, [B, H, T, S]; media's are on themselves or nowhere."""
        _, heads, _, seen = text_BHUS.shape
        media_MS = text_BHUS.new_zeros(len(rows.media), seen)
        if self.echo:
            media_MS.scatter_(1, (rows.media % length + seen - length)[:, None], 1)
        return rows.join(text_BHUS.transpose(1, 2), media_MS[:, None].expand(-1, heads, -1)).transpose(1, 2)


class TextOnly(Graft):
    """On a feed-forward: media rows are left out and gain nothing.

    Args:
        free: only where no gradient is recorded.
    """

    def __init__(self, free: bool = False):
        super().__init__()
        self.free = free

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        if side is None or not holds_media(side) or (self.free and torch.is_grad_enabled()):
            return base(x, *args, **kw)
        rows = Rows.of(side.modality_BT)
        text_BUD, media_MD = rows.split(x)
        return rows.join(base(text_BUD, *args, **kw), torch.zeros_like(media_MD))


def check(layer: nn.Module) -> str:
    """The name of a layer's attention, once it is sure that its keys and values can be computed from outside.

    Raises:
        ConfigError: it is made otherwise than Llama's and OPT's.
    """
    attention: Any = sites.attention(layer)
    if not repeatable(attention) or dict(attention.named_parameters(recurse=False)):  # gpt-oss's sinks
        raise ConfigError(
            f"{type(attention).__name__} is not made of q_proj, k_proj, v_proj and o_proj alone",
            "choose a Llama-, Qwen-, Mistral-, Gemma-, GLM- or OPT-like LLM, or ee_mllm with compute=rule",
        )
    return _name(layer, attention)


def repeatable(attention: Any) -> bool:
    """Whether queries, keys and values can be computed beside an attention as it computes them itself: by projections,
    norms of single heads and a turn of whole ones, with nothing scaled, gated or clipped on the way."""
    children = dict(attention.named_children())
    if not ({"q_proj", "k_proj", "v_proj"} <= children.keys() <= INSIDE and len(children.keys() & OUT) == 1):
        return False
    weights = [getattr(children[name], "weight", None) for name in NORMS & children.keys()]
    return (
        all(weight is not None and weight.numel() == attention.head_dim for weight in weights)
        and attention.q_proj.out_features == _out(attention).in_features
        and _turns_whole(attention)
        and not any(map(_alters, graft.steps(attention)))
    )


def turns(attention: Any) -> bool:
    """Whether a layer's attention turns queries and keys to their positions: SmolLM3, Cohere 2 and EXAONE 4 do so in
    some of their layers."""
    return bool(_turning(attention))


def _turning(attention: Any) -> list[ast.Call]:
    calls = [node for step in graft.steps(attention) for node in ast.walk(step) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == ROTATE]


def _turns_whole(attention: Any) -> bool:
    """Whether what turns takes whole queries and keys together; StableLM cuts a part out of them beforehand."""
    rotate = vars(inspect.getmodule(type(attention))).get(ROTATE)
    if rotate is None:
        return "position_embeddings" not in graft.arguments(attention)  # Llama 4 turns in a way of its own
    if any(len(call.args) != 4 or call.keywords for call in _turning(attention)):
        return False
    share = (getattr(attention.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    given, angle = (torch.zeros(1, 1, 1, int(attention.head_dim * part), device="meta") for part in (1, share))
    try:
        rotate(given, given, angle[0], angle[0])
    except RuntimeError:
        return False
    return True


def _alters(step: ast.stmt) -> bool:
    """Whether a step calculates, in place or not, beyond what modules do; OPT scales its queries before the kernel."""
    return any(
        isinstance(node, ast.AugAssign)
        or (isinstance(node, ast.BinOp) and ast.unparse(node.right) != "self.scaling")
        or (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_"))
        for node in ast.walk(step)
    )


def feed_forward(layer: nn.Module) -> str:
    """The name of a layer's feed-forward module.

    Raises:
        ConfigError: it has none that media could be kept from (OPT).
    """
    return _name(layer, sites.mlp(layer))


def _name(layer: nn.Module, inner: nn.Module) -> str:
    return next(path for path, module in layer.named_modules() if module is inner)


def keys_and_values(host: Any, media_MD: Tensor, rotation: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys (turned to their positions) and values of media rows, each [M, H, d], with the host's own weights."""
    key_MHd, value_MHd = (each(media_MD).unflatten(-1, (-1, host.head_dim)) for each in (host.k_proj, host.v_proj))
    if hasattr(host, "k_norm"):
        key_MHd = host.k_norm(key_MHd)
    if rotation is not None:
        key_MHd = turned(host, key_MHd.transpose(0, 1)[None], [each[None] for each in rotation])[0].transpose(0, 1)
    return key_MHd, value_MHd


def turned(host: Any, x_BHTd: Tensor, rotation: Sequence[Tensor]) -> Tensor:
    """Queries or keys turned to their positions the family's own way."""
    return vars(inspect.getmodule(type(host)))[ROTATE](x_BHTd, x_BHTd, *rotation)[0]


class _Joined:
    """A cache as the attention of text rows sees it: media's keys and values join theirs in the order of columns."""

    def __init__(self, cache: Any, rows: Rows, key_MHd: Tensor, value_MHd: Tensor):
        self.cache, self.rows, self.media = cache, rows, (key_MHd, value_MHd)

    def update(self, key_BHUd: Tensor, value_BHUd: Tensor, *where: Any, **more: Any) -> Any:
        pairs = zip((key_BHUd, value_BHUd), self.media)
        whole = tuple(self.rows.join(text.transpose(1, 2), media).transpose(1, 2) for text, media in pairs)
        return whole if self.cache is None else self.cache.update(*whole, *where, **more)


def _through(host: Any, value_MHd: Tensor) -> Tensor:
    """W_o of values, each repeated for the query heads that share it: attention over one key."""
    out = _out(host)
    heads = host.q_proj.out_features // host.head_dim
    return out(value_MHd.repeat_interleave(heads // value_MHd.shape[1], 1).flatten(1))


def _out(host: Any) -> nn.Linear:
    return host.o_proj if "o_proj" in dict(host.named_children()) else host.out_proj


def _mask(given: Tensor | None, rows: Rows, side: Side, cached: int, dtype: torch.dtype) -> Tensor:
    """The text rows' part of a mask, [B, 1, U, S]; where there is none, or borders of segments, what it stands for."""
    batch, length = side.modality_BT.shape
    if given is not None and given.dtype != torch.int32:
        row_B1 = torch.arange(batch, device=given.device)[:, None]
        return given.expand(batch, -1, -1, -1)[row_B1, :, rows.column_BU].transpose(1, 2)
    at_S = torch.arange(cached + length, device=rows.column_BU.device)
    allowed_BUS = at_S <= rows.column_BU[..., None] + cached
    if given is not None:  # borders come without a cache
        segment_BU = side.segment_BT.gather(1, rows.column_BU)
        allowed_BUS = allowed_BUS & (segment_BU[..., None] == side.segment_BT[:, None])
    nothing = torch.zeros((), dtype=dtype, device=at_S.device)
    return torch.where(allowed_BUS, nothing, torch.finfo(dtype).min)[:, None]


def _check_kernel(host: Any) -> None:
    kernel = host.config._attn_implementation
    if kernel.startswith(("flash", "flex")):
        raise ConfigError(
            f"{kernel} takes no mask over chosen rows, which is how media are left out of the queries",
            "set llm.attention to isthmus or sdpa",
        )
