"""Attention on CPUs and for packed rows, registered with transformers under a name of its own.

PyTorch's CPU flash attention spends its time on blocks that short rows do not fill: for 32 rows of 36 tokens, forward
and backward together took 20 to 25 ms per layer in bfloat16 on two cores, plain batched products 3 ms. In bfloat16 long
causal rows gain, too, by products that stay in the processor's caches (`benchmarks/attention.py`). Other rows and
accelerators keep transformers' sdpa, except where an LLM caps its scores (Gemma 2) or lets a sink take a share of the
weights (gpt-oss), which sdpa cannot.

Packed rows come with the borders of their segments in place of a mask, and each segment is computed alone: on a CPU
in batches of segments of similar length, on an accelerator by PyTorch's flash attention for variable lengths. A dense
mask over whole rows costs many times as much, because nearly all of what it lets be computed is then thrown away.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from isthmus.types import ConfigError

NAME = "isthmus"
"""What transformers knows it by: `attn_implementation="isthmus"`."""
SHORT = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 48}
"""Rows of up to this many keys are computed by products, whose scores are held in memory; beyond it sdpa is faster."""
LONG = 128
"""Causal rows in bfloat16 of more tokens than this are computed block by block."""
BLOCK = 64
"""Queries of a block, whose scores then fit into the processor's caches."""
SIMILAR = 0.8
"""Segments that are at least this share of the longest among them are padded to it and computed together."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, causal or under a mask.

    Args:
        query: [B, heads, T, d].
        key, value: [B, key heads, S, d]; the query heads are grouped over them.
        attention_mask: [B, 1, T, S], added to the scores, or booleans; or `borders`, as integers,
            for causality within each segment; or None for causality alone (or nothing, for a module that is not).

    Returns:
        [B, T, heads, d], and None for the weights.
    """
    options = {"scaling": scaling, "dropout": dropout, **more}
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        options.pop("is_causal", None)  # borders say it
        return _by_segment(module, query, key, value, attention_mask.flatten(), options), None
    length, keys = query.shape[2], key.shape[2]
    softcap, sinks = more.get("softcap"), more.get("s_aux")
    local = query.device.type == "cpu" and not dropout
    other = softcap is not None or sinks is not None  # sdpa knows of neither, and drops sinks in silence
    products = other or (local and keys <= SHORT.get(query.dtype, 0))
    if attention_mask is None:
        causal = module.is_causal if more.get("is_causal") is None else more["is_causal"]
        if causal and local and not other and _in_blocks(query, key, value):
            return _Causal.apply(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
        if products:  # None means what sdpa reads it as
            seen = torch.ones(length, keys, dtype=torch.bool, device=query.device)
            attention_mask = _additive(seen.tril() if causal and length > 1 else seen, query.dtype)
    if attention_mask is None or not products:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask.dtype == torch.bool:
        attention_mask = _additive(attention_mask, query.dtype)
    return _by_products(query, key, value, attention_mask, scaling, softcap, sinks, dropout), None


def mask(*args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor | None:
    """The mask that `attention` wants: sdpa's, additive on a CPU; None where causality alone is right.

    Rules of who sees whom index and compare, so they are evaluated on whole axes that broadcast; transformers would
    vmap them, which takes some 14 ms a mask.
    """
    allowed = sdpa_mask(*args, **{**more, "use_vmap": False})
    return allowed if allowed is None or allowed.device.type != "cpu" else _additive(allowed, dtype)


def borders(segment_BT: Tensor) -> Tensor:
    """Where the segments of packed rows begin, the rows laid end to end, and where the last one ends: [1, 1, 1, N + 1].

    It has four dimensions because transformers' models hand a mask of four on as it is. A stretch of padding counts as
    a segment.
    """
    begins_BT = torch.ones_like(segment_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    starts_N = begins_BT.flatten().nonzero().flatten()
    return nn.functional.pad(starts_N, (0, 1), value=segment_BT.numel()).to(torch.int32)[None, None, None]


def takes(architecture: PreTrainedConfig) -> bool:
    """Whether an LLM's layers call the attention function that its config names; older families (BLOOM, Falcon, GPT-J,
    MPT) compute attention in code of their own, from a mask of padding."""
    kind: Any = type(architecture)
    return _takes(kind)


@functools.cache
def _takes(kind: Any) -> bool:
    known: Any = AutoModelForCausalLM._model_mapping
    return kind not in known or known[kind]._can_set_attn_implementation()


def check_packing(name: str, device: torch.device) -> None:
    """Refuse to pack where only a dense mask over whole rows could keep the samples apart.

    Raises:
        ConfigError: the kernel of that name computes no segments on this device.
    """
    if device.type == "cpu" and name != NAME:
        raise ConfigError(
            f"packed rows under {name} on a CPU take many times as long: it computes whole rows and masks them",
            f"set llm.attention to {NAME}, or batching to bucketed",
        )


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additive: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Scores, softmax and mixture as three batched products; the query heads that share a key go together.

    Scores are held below `softcap` by a tanh before the mask, as in Gemma 2. A head's sink is one more score, of a key
    without a value, as in gpt-oss. Values may be narrower than keys, as in DeepSeek.
    """
    rows, heads, length, width = query.shape
    shared, keys = key.shape[1], key.shape[2]
    grouped = (rows * shared, heads // shared * length)
    mask = additive.to(query.dtype).expand(rows, heads, length, keys).reshape(*grouped, keys)
    asked, offered = query.reshape(*grouped, width), key.flatten(0, 1).transpose(1, 2)
    scale = width**-0.5 if scaling is None else scaling
    if softcap is None:
        scores = torch.baddbmm(mask, asked, offered, alpha=scale)
    else:
        scores = mask + softcap * (torch.bmm(asked, offered) * (scale / softcap)).tanh()
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, shared, -1, 1).expand(rows, -1, -1, length)
        scores = torch.cat([scores, column.reshape(*grouped, 1)], -1)
    weights = nn.functional.dropout(scores.softmax(-1)[..., :keys], dropout)
    mixed = torch.bmm(weights, value.flatten(0, 1))
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous()


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


# ---------------------------------------------------------------------------------------------- long causal rows


def _in_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `_Causal` computes these rows: long, nothing before them, in bfloat16, and not traced by a compiler."""
    long = query.shape[2] == key.shape[2] > LONG and query.shape[-1] == value.shape[-1]
    return long and {query.dtype, key.dtype, value.dtype} == {torch.bfloat16} and not torch.compiler.is_compiling()


class _Causal(torch.autograd.Function):
    """Causal attention by blocks of queries, each against all keys up to its own end: [B, T, heads, d].

    What lies behind a block is not computed, and its weights are computed again on the way back, so that nothing of
    [T, T] is kept. As in FlashAttention (Dao et al., arXiv 2205.14135); Differs: keys are not divided, so that a
    block's softmax is one call.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        rows, heads, length, width = query.shape
        keys, values = key.flatten(0, 1).transpose(1, 2).contiguous(), value.flatten(0, 1).contiguous()
        mixed = query.new_empty(rows, length, heads, width)
        for start, end in _blocks(length):
            weights = _weights(_grouped(query[:, :, start:end], key) * scale, keys[..., :end], end - start)
            mixed[:, start:end] = _apart(torch.bmm(weights, values[:, :end]), query).transpose(1, 2)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        flat = key.flatten(0, 1).contiguous()
        keys, values = (x.flatten(0, 1).transpose(1, 2).contiguous() for x in (key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        to_keys, to_values = (torch.zeros_like(flat, dtype=wide) for _ in range(2))
        to_query = above.new_empty(above.shape)
        for start, end in _blocks(query.shape[2]):
            asked = _grouped(query[:, :, start:end], key) * ctx.scale
            slope = _grouped(above[:, start:end].transpose(1, 2), key)
            weights = _weights(asked, keys[..., :end], end - start)
            to_values[:, :end] += torch.bmm(weights.transpose(1, 2), slope)
            to_weights = torch.bmm(slope, values[..., :end])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_keys[:, :end] += torch.bmm(to_scores.transpose(1, 2), asked)
            to_asked = torch.bmm(to_scores, flat[:, :end]) * ctx.scale
            to_query[:, start:end] = _apart(to_asked, query).transpose(1, 2)
        return to_query.transpose(1, 2), to_keys.to(key.dtype).view_as(key), to_values.to(key.dtype).view_as(key), None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """[B, heads, t, d] -> [B key heads, heads per key t, d]: the query heads that share a key, one behind another."""
    return states.reshape(key.shape[0] * key.shape[1], -1, states.shape[-1])


def _apart(grouped: Tensor, query: Tensor) -> Tensor:
    """The inverse: [B, heads, t, d]."""
    return grouped.view(*query.shape[:2], -1, query.shape[-1])


def _weights(asked: Tensor, keys: Tensor, own: int) -> Tensor:
    """What a block's queries, grouped and scaled, take from each of `keys` [.., d, S], the last `own` their own."""
    scores = torch.bmm(asked, keys)
    later = torch.full((own, own), -torch.inf, dtype=scores.dtype).triu(1)
    scores[..., -own:] += later.repeat(asked.shape[1] // own, 1)
    return scores.softmax(-1)


# ---------------------------------------------------------------------------------------------- packed rows


def _by_segment(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, options: dict[str, Any]
) -> Tensor:
    """Attention within the segments of packed rows, [B, T, heads, d]."""
    rows, _, length, _ = query.shape
    grouped = query.device.type in ("cpu", "meta")
    if not grouped and not _has_flash(query, value, options):
        return attention(module, query, key, value, _dense(borders, rows, length), **options)[0]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if grouped:
        mixed = _in_groups(module, query, key, value, borders, options)
    else:
        mixed = _by_flash(query, key, value, borders, options["scaling"])
    return mixed.unflatten(0, (rows, length))


def _in_groups(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, options: dict[str, Any]
) -> Tensor:
    """Segments of similar length side by side, as rows padded on the right, where causality hides the padding.

    Tokens move by `index_select` alone, whose gradient is fast on CPUs; that of other indexing is not.
    """
    mixed, at, places, before = [], [], [], 0
    for group in _similar(list(pairwise(borders.tolist()))):
        widest = max(end - start for start, end in group)
        place_GL = torch.tensor([start for start, _ in group])[:, None] + torch.arange(widest)
        real_GL = place_GL < torch.tensor([end for _, end in group])[:, None]
        taken = place_GL.clamp(max=len(query) - 1).flatten()
        q, k, v = (x.index_select(0, taken).unflatten(0, place_GL.shape).transpose(1, 2) for x in (query, key, value))
        out, _ = attention(module, q, k, v, None, **options, is_causal=True)
        mixed.append(out.flatten(0, 1))
        real = real_GL.flatten().nonzero().flatten()
        at.append(taken[real])
        places.append(before + real)
        before += len(taken)
    return torch.cat(mixed).index_select(0, torch.cat(places)[torch.cat(at).argsort()])


def _similar(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Spans in groups whose lengths differ little, longest first."""
    group: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        if group and end - start < SIMILAR * (group[0][1] - group[0][0]):
            yield group
            group = []
        group.append((start, end))
    yield group


def _has_flash(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether PyTorch's kernel for variable lengths can do this call; elsewhere a dense mask takes its place."""
    half = _autocast(query).dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1]
    plain = not options["dropout"] and options.get("softcap") is None and options.get("s_aux") is None
    return query.device.type == "cuda" and half and plain


def _by_flash(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scaling: float | None) -> Tensor:
    query, key, value = (_autocast(x) for x in (query, key, value))
    longest = len(query)  # an upper bound serves: reading the true one would wait for the device
    mixed = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(mixed, Tensor)  # a pair only where asked for
    return mixed


def _autocast(x: Tensor) -> Tensor:
    """Rotation may leave queries and keys in float32 where the rest is half."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _dense(borders: Tensor, rows: int, length: int) -> Tensor:
    """The same as booleans, [B, 1, T, T]."""
    place_BT = torch.arange(rows * length, device=borders.device).view(rows, length)
    segment_BT = torch.bucketize(place_BT, borders, right=True)
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & (place_BT[:1, None, :, None] >= place_BT[:1, None, None, :])


AttentionInterface.register(NAME, attention), AttentionMaskInterface.register(NAME, mask)  # never one without the other
