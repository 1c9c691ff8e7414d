"""Attention for short rows on CPUs: three batched matrix products instead of a blocked kernel.

PyTorch's CPU flash attention spends its time on blocks that short rows do not fill: for 32 rows of 36 tokens, forward
and backward together took 20 to 25 ms per layer in bfloat16 on two cores, plain batched products 3 ms
(`benchmarks/attention.py`). Longer rows and accelerators keep transformers' sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

NAME = "isthmus"
"""What transformers knows it by: `attn_implementation="isthmus"`."""
SHORT = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 48}
"""Rows of up to this many keys are computed by products, whose scores are held in memory; beyond it sdpa is faster."""


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
    """Scaled dot-product attention under an additive mask.

    Args:
        query: [B, heads, T, d].
        key, value: [B, key heads, S, d]; the query heads are grouped over them.
        attention_mask: [B, 1, T, S], added to the scores.

    Returns:
        [B, T, heads, d], and None for the weights.
    """
    keys = key.shape[2]
    capped = more.get("softcap") is not None or more.get("s_aux") is not None
    long = keys > SHORT.get(query.dtype, 0)
    if query.device.type != "cpu" or long or dropout or capped or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    rows, heads, length, width = query.shape
    shared = key.shape[1]
    grouped = (rows * shared, heads // shared * length)
    mask = attention_mask.to(query.dtype).expand(rows, heads, length, keys).reshape(*grouped, keys)
    scores = torch.baddbmm(
        mask,
        query.reshape(*grouped, width),
        key.flatten(0, 1).transpose(1, 2),
        alpha=width**-0.5 if scaling is None else scaling,
    )
    mixed = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return mixed.view(rows, heads, length, width).transpose(1, 2).contiguous(), None


def mask(*args: Any, **more: Any) -> Any:
    """The mask that `attention` wants: additive on a CPU, as for sdpa elsewhere."""
    device = torch.device(more.get("device", "cpu"))
    return eager_mask(*args, **more) if device.type == "cpu" else sdpa_mask(*args, **more)


AttentionInterface.register(NAME, attention), AttentionMaskInterface.register(NAME, mask)  # never one without the other
