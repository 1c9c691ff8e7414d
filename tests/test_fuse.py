"""Splicing, positions and masks, against hand-written tables and transformers' own attention."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tiny
from isthmus import fuse, kernels
from isthmus.types import ConfigError, DataError, Features, Media


def test_splice_fills_placeholders_in_order():
    embeds = torch.zeros(2, 3, 2)
    at = torch.tensor([[0, 1, 1], [1, 0, 0]]).bool()
    y = torch.arange(6.0).view(3, 2)
    out = fuse.splice(embeds, at, y, "image")
    assert out[0, 1].tolist() == [0, 1] and out[0, 2].tolist() == [2, 3] and out[1, 0].tolist() == [4, 5]
    assert out[0, 0].tolist() == [0, 0] and out[1, 1:].abs().sum() == 0


def test_splice_refuses_a_wrong_count():
    with pytest.raises(DataError, match="3 image placeholders for 2 vectors"):
        fuse.splice(torch.zeros(1, 4, 2), torch.tensor([[1, 1, 1, 0]]).bool(), torch.zeros(2, 2), "image")


def test_positions_restart_with_each_segment():
    segment = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
    assert fuse.positions(segment)[0, 2:].tolist() == [0, 1, 2, 0, 1]
    assert fuse.positions(segment)[1, :4].tolist() == [0, 1, 2, 3]


def test_rows_leave_out_padding_of_ragged_pictures():
    y = torch.arange(12.0).view(2, 3, 2)
    features = Features(torch.zeros(2, 3, 1), lengths_N=torch.tensor([3, 1]))
    assert fuse.rows(y, features, lambda s: s).tolist() == y[0].tolist() + y[1, :1].tolist()


def test_media_aside_are_gathered_by_row_and_column():
    y = torch.arange(3.0).view(3, 1, 1)
    media = Media(torch.tensor([1, 0, 1]), torch.ones(3, dtype=torch.long), torch.tensor([7, 2, 4]))
    vision, at = fuse.by_row({"image": y}, {"image": media}, rows=3)
    assert vision[..., 0, 0].tolist() == [[1, 0], [2, 0], [0, 0]]
    assert at.tolist() == [[2, -1], [4, 7], [-1, -1]]


def allowed(mask: torch.Tensor) -> list[list[int]]:
    return mask[0, 0].int().tolist()


def test_mask_is_none_only_where_causality_is_enough():
    config, embeds = tiny.llm("llama").config, torch.zeros(1, 4, 32)
    right_padded, left_padded = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]])
    packed = torch.tensor([[1, 1, 2, 2]])
    assert fuse.masks(config, embeds, right_padded, None, None) is None
    assert allowed(fuse.masks(config, embeds, left_padded, None, None)) == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 1],
    ]
    assert allowed(fuse.masks(config, embeds, packed, None, None)) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_rule_restricts_on_top_of_causality():
    config, embeds, segment = tiny.llm("llama").config, torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.long)
    diagonal = lambda b, h, q, kv: q == kv  # noqa: E731
    assert allowed(fuse.masks(config, embeds, segment, None, diagonal)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("static", [False, True])
def test_rule_sees_absolute_positions_behind_a_cache(static):
    llm = tiny.llm("llama")
    cache = StaticCache(config=llm.config, max_cache_len=8) if static else DynamicCache(config=llm.config)
    segment = torch.tensor([[0, 1, 1, 1]])
    embeds = torch.randn(1, 4, 32)
    llm.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    segment = torch.cat([segment, torch.ones(1, 1, dtype=torch.long)], 1)
    not_the_second = lambda b, h, q, kv: kv != 1  # noqa: E731
    row = fuse.masks(llm.config, embeds[:, :1], segment, cache, not_the_second)[0, 0, 0].int().tolist()
    assert row[:5] == [0, 0, 1, 1, 1] and not any(row[5:])


def test_branches_go_on_from_the_shared_beginning_and_do_not_see_each_other():
    segment = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0]])
    branch = torch.tensor([[0, 0, 1, 1, 2, 0, 1, 0]])
    assert fuse.positions(segment, branch)[0, :7].tolist() == [0, 1, 2, 3, 2, 0, 1]
    config, embeds = tiny.llm("llama").config, torch.zeros(1, 8, 32)
    rows = allowed(fuse.masks(config, embeds, segment, None, None, branch_BS=branch))
    assert rows[3] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rows[4] == [1, 1, 0, 0, 1, 0, 0, 0]
    assert rows[6] == [0, 0, 0, 0, 0, 1, 1, 0]


def test_our_kernel_is_given_borders_where_segments_alone_divide_a_row():
    embeds, packed = torch.zeros(1, 4, 32), torch.tensor([[1, 1, 2, 2]])
    see_all = lambda b, h, q, kv: q >= 0  # noqa: E731
    for family, layered in (("llama", False), ("qwen2", True)):
        config = tiny.llm(family).config
        config._attn_implementation = kernels.NAME
        found = fuse.masks(config, embeds, packed, None, None)
        assert (found["full_attention"] if layered else found).flatten().tolist() == [0, 2, 4]
        for division in ({"rule": see_all}, {"rule": None, "branch_BS": torch.zeros_like(packed)}):
            dense = fuse.masks(config, embeds, packed, None, **division)
            assert (dense["full_attention"] if layered else dense).shape == (1, 1, 4, 4)
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 3
    assert fuse.masks(config, embeds, packed, None, None)["sliding_attention"].shape == (1, 1, 4, 4)
    config.sliding_window = 4
    assert fuse.masks(config, embeds, packed, None, None)["sliding_attention"].dtype == torch.int32


def test_what_would_leak_in_silence_is_refused():
    config, embeds, packed = tiny.llm("llama").config, torch.zeros(1, 4, 32), torch.tensor([[1, 1, 2, 2]])
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2 hears nothing of packed samples"):
        fuse.masks(config, embeds, packed, None, None)
    left = fuse.masks(config, embeds, torch.tensor([[0, 1, 1, 1]]), None, None)
    assert left.tolist() == [[False, True, True, True]]
    config = tiny.llm("qwen2").config
    config.layer_types = ["conv", "full_attention"]
    with pytest.raises(ConfigError, match="carry a state along the whole row"):
        fuse.masks(config, embeds, packed, None, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager", kernels.NAME])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_one_more_token_sees_its_row_without_the_padding(family, attention):
    config = tiny.llm(family, attn_implementation=attention).config
    window = getattr(config, "sliding_window", None) or 100
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(2, 2, 30, 8), torch.zeros(2, 2, 30, 8), layer)
    segment = torch.ones(2, 31, dtype=torch.long)
    segment[1, :9] = 0
    mask = fuse.masks(config, torch.zeros(2, 1, 32), segment, cache, None)
    assert isinstance(mask, torch.Tensor)
    seen = mask if mask.dtype == torch.bool else mask == 0
    column = torch.arange(31)
    assert seen.shape == (2, 1, 1, 31)
    assert torch.equal(seen[:, 0, 0], (segment > 0) & (30 - column < window))
