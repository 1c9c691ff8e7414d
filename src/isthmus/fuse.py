"""Where the modalities meet: splicing vectors over placeholders, positions, and who may look at whom.

Masks are always built from segments and a rule, never guessed from positions: transformers reads any step in
`position_ids` other than +1 as a border between packed samples, and a 2-D mask with packing leaks across them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from isthmus import kernels
from isthmus.types import ConfigError, DataError, Features, Media

Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`rule(batch, head, q, kv) -> bool`, on index tensors; q and kv are absolute positions in the row."""
ONE_BY_ONE = ("jamba", "recurrent_gemma", "zamba")
"""Families whose layers forget their state where several tokens follow it, in transformers' own code."""


def splice(embeds_BTD: Tensor, at_BT: Tensor, y_MD: Tensor, what: str) -> Tensor:
    """Overwrite the embeddings where `at_BT` is True by the rows of `y_MD`, in order.

    Raises:
        DataError: the number of placeholders and the number of vectors differ.
    """
    places = int(at_BT.sum())
    if places != len(y_MD):
        raise DataError(
            f"{places} {what} placeholders for {len(y_MD)} vectors from the connector",
            "render text and media with the model's own processor, which knows how many tokens a medium takes",
        )
    return embeds_BTD.masked_scatter(at_BT.unsqueeze(-1), y_MD.to(embeds_BTD.dtype))


def rows(y_NQD: Tensor, features: Features | None, tokens: Callable[[int], int]) -> Tensor:
    """Connected media one after another, [M, D], without the padding rows of pictures that differ in size."""
    if features is None or features.lengths_N is None:
        return y_NQD.flatten(0, 1)
    return torch.cat([y_QD[: tokens(int(s))] for y_QD, s in zip(y_NQD, features.lengths_N)])


def by_row(connected: dict[str, Tensor], media: dict[str, Media], rows: int) -> tuple[Tensor, Tensor]:
    """Connected media that stay aside, gathered per batch row in order of appearance.

    Returns:
        vision_BKQD, zero where a row has fewer than K media, and media_at_BK, their columns, -1 there.
    """
    y_NQD = torch.cat([connected[kind] for kind in media])
    row_N = torch.cat([some.row_N for some in media.values()])
    at_N = torch.cat([some.at_N for some in media.values()])
    most = int(torch.bincount(row_N, minlength=rows).max())
    vision_BKQD = y_NQD.new_zeros(rows, most, *y_NQD.shape[1:])
    media_at_BK = torch.full((rows, most), -1, device=at_N.device)
    for row in range(rows):
        chosen = (row_N == row).nonzero().flatten()
        chosen = chosen[at_N[chosen].argsort()]
        vision_BKQD[row, : len(chosen)] = y_NQD[chosen]
        media_at_BK[row, : len(chosen)] = at_N[chosen]
    return vision_BKQD, media_at_BK


def last(appeared_BTK: Tensor, media_at_BK: Tensor) -> Tensor:
    """Of the media that have appeared at each position, only the last, [B, T, K]."""
    last_BT1 = media_at_BK[:, None].where(appeared_BTK, -1).amax(-1, keepdim=True)
    return appeared_BTK & (media_at_BK[:, None] == last_BT1)


def positions(segment_BT: Tensor, branch_BT: Tensor | None = None) -> Tensor:
    """Position of each token within its segment, from 0; every branch goes on where the shared beginning ends.

    Padding on the right counts on: a step other than +1 would make transformers build a mask where none is needed.
    """
    steps = torch.arange(segment_BT.shape[1], device=segment_BT.device).expand_as(segment_BT)
    border = torch.ones_like(segment_BT, dtype=torch.bool)
    border[:, 1:] = (segment_BT[:, 1:] != segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
    if branch_BT is None:
        return steps - torch.where(border, steps, 0).cummax(dim=1).values
    border[:, 1:] |= (branch_BT[:, 1:] != branch_BT[:, :-1]) & (branch_BT[:, 1:] > 0)
    start = torch.where(border, steps, 0).cummax(dim=1).values
    shared = torch.zeros(len(segment_BT), int(segment_BT.max()) + 1, dtype=steps.dtype, device=steps.device)
    shared.scatter_add_(1, segment_BT, (branch_BT == 0).to(steps.dtype))
    return steps - start + shared.gather(1, segment_BT) * (branch_BT > 0)


def is_plain(segment_BT: Tensor, cached: int) -> bool:
    """Whether causality alone is the right mask: one segment per row, and padding, if any, only on the right of
    a sequence that has no cache (nothing real ever looks back at it)."""
    one = segment_BT.max() <= 1 and bool((segment_BT[:, 0] > 0).all())
    return bool(one and (cached == 0 or (segment_BT > 0).all()))


def masks(
    config: PreTrainedConfig,
    embeds_BTD: Tensor,
    segment_BS: Tensor,
    cache: Cache | None,
    rule: Rule | None,
    counted: bool = True,
    branch_BS: Tensor | None = None,
) -> Tensor | dict[str, Tensor] | None:
    """The attention mask (or one per layer type) of a decoder for causality, segments, branches and a rule.

    A branch sees the shared beginning of its segment and itself; a sliding window counts positions there, else columns.

    `segment_BS` covers the cached positions too; with a static cache the mask covers its whole length. Padding
    looks at padding, so that no row is empty. None is returned where causality alone is right, which lets
    kernels skip the mask; never where positions are not `counted` by `positions`, whose steps transformers would
    then read as borders between packed samples. Where segments alone divide a row, our own kernel is given their
    `kernels.borders` in place of a mask.

    Raises:
        ConfigError: the layers or the kernel would let something be seen that must not be.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    fixed = cache is not None and cache.is_compileable
    divided = rule is not None or branch_BS is not None
    _check_past(config, cached, fixed, embeds_BTD.shape[1])
    if not divided and counted and not fixed and is_plain(segment_BS, cached):
        return None
    packed = bool(segment_BS.max() > 1)
    check(config, packed or divided, counted)
    if config._attn_implementation.startswith("flash"):
        return segment_BS > 0
    reach = segment_BS.shape[1]
    if cache is not None:  # layers that also carry a state do not tell their length, but that of their mask
        reach = max(reach, cache.get_max_length(), sum(cache.get_mask_sizes(embeds_BTD.shape[1], 0)))
    if _masks_by_itself(config):
        ahead = (
            reach - segment_BS.shape[1] if fixed and not kernels.takes(config) else 0
        )  # BLOOM's biases want it whole
        return torch.nn.functional.pad((segment_BS > 0).long(), (0, ahead))
    if packed and not divided and cache is None and (kinds := _reaching_back(config, segment_BS)) is not None:
        borders = kernels.borders(segment_BS)
        return dict.fromkeys(kinds, borders) if kinds else borders
    segment = torch.nn.functional.pad(segment_BS, (0, reach - segment_BS.shape[1]), value=-1)

    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = segment[b, q] == segment[b, kv]
        if branch_BS is not None:
            seen = seen & ((branch_BS[b, kv] == 0) | (branch_BS[b, q] == branch_BS[b, kv]))
        return seen if rule is None else seen & rule(b, h, q, kv.clamp(max=segment_BS.shape[1] - 1))

    def build(config: PreTrainedConfig, seen: Rule) -> Any:
        made = create_masks_for_generate(
            config=config,
            inputs_embeds=embeds_BTD,
            attention_mask=None,
            past_key_values=cache,
            and_mask_function=seen,
        )
        return _recurrent(made, segment_BS[:, -embeds_BTD.shape[1] :])

    window: Any = getattr(config, "sliding_window", None)
    chunk: Any = getattr(config, "attention_chunk_size", None)
    if chunk is None and (branch_BS is None or window is None):
        return build(config, allowed)
    # Branches lie behind each other, so that a window of columns would cut them off from what they share; and chunks
    # (Llama 4) are counted from where a sample begins, not from where its row does.
    position = torch.nn.functional.pad(positions(segment_BS, branch_BS), (0, reach - segment_BS.shape[1]))

    def near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        here, there = position[b, q], position[b, kv]
        return allowed(b, h, q, kv) & (here - there < window if chunk is None else here // chunk == there // chunk)

    wide = copy.copy(config)
    setattr(wide, "sliding_window" if chunk is None else "attention_chunk_size", reach + 1)
    whole, windowed = build(wide, allowed), build(wide, near)
    if not isinstance(whole, dict):
        return windowed  # every layer has the window
    return {kind: (whole if kind == "full_attention" else windowed)[kind] for kind in whole}


def _recurrent(masks: Any, segment_BT: Tensor) -> Any:
    """The masks with padding told to layers that carry a state along the row, which is all that they hear of masks."""
    if isinstance(masks, dict) and not (segment_BT > 0).all():
        padding = dict.fromkeys(masks.keys() & {"linear_attention", "conv"}, (segment_BT > 0).long())
        return {**masks, **padding}
    return masks


def _masks_by_itself(config: PreTrainedConfig) -> bool:
    """Whether an LLM builds its masks from padding alone: one that calls no kernel, or whose layers are of kinds of
    which transformers does not know from outside how they are masked."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return not kernels.takes(config) or not kinds <= LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.keys()


def check(config: PreTrainedConfig, divided: bool, counted: bool) -> None:
    """Refuse what would be dropped in silence: transformers asks neither a recurrence nor flash attention's kernels
    about a mask function.

    Args:
        divided: samples share rows, or a rule says who sees whom.
        counted: positions are counted by `positions`.

    Raises:
        ConfigError: with the reason.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if (divided or not counted) and _masks_by_itself(config):
        raise ConfigError(
            f"{config.model_type} builds its masks by itself, from padding alone, and hears nothing of packed samples, "
            "branches, or a joint's rule and positions",
            "set batching to bucketed, and use a joint without them, or another LLM",
        )
    if divided and any("linear" in kind or "conv" in kind or "hybrid" in kind for kind in kinds):
        raise ConfigError(
            f"{config.model_type} has layers that carry a state along the whole row, across packed samples",
            "set batching to bucketed, and use a joint without a rule of its own",
        )
    if divided and config._attn_implementation.startswith("flash"):
        raise ConfigError(
            f"{config._attn_implementation} hears nothing of packed samples, branches or a joint's rule",
            "set llm.attention to isthmus, which computes packed rows by flash attention too, or to flex_attention",
        )


def _check_past(config: PreTrainedConfig, cached: int, fixed: bool, new: int) -> None:
    """Refuse what transformers' own code of a family would read wrong, without a word.

    Raises:
        ConfigError: with the reason.
    """
    if fixed and "local" in (getattr(config, "attention_layers", None) or ()):
        raise ConfigError(
            f"{config.model_type} counts its local windows from the end of a static cache, however little it holds",
            "decode with a dynamic cache",
        )
    if cached and new > 1 and config.model_type in ONE_BY_ONE:
        raise ConfigError(
            f"{config.model_type} forgets the state of its layers where {new} tokens at once follow what it has read",
            "pass one token at a time, or the whole prompt again",
        )


def _reaching_back(config: PreTrainedConfig, segment_BT: Tensor) -> set[str] | None:
    """The kinds of layers if all of them see a whole segment by our kernel, empty if there is one kind; else None."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or segment_BT.shape[1]
    if config._attn_implementation != kernels.NAME or not kinds <= {"full_attention", "sliding_attention"}:
        return None
    return kinds if window >= segment_BT.shape[1] else None
