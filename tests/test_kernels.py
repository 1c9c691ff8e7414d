"""Our attention kernel against transformers' sdpa, forward and backward."""

from __future__ import annotations

import shutil

import pytest
import torch

import tiny
from isthmus import fuse, kernels
from isthmus.types import ConfigError

PACKED = [[1] * 5 + [2] * 4 + [3] * 3, [1] * 11 + [0]]


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("segments", [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 0]])
def test_equals_sdpa_forward_and_backward(family, segments):
    embeds = torch.randn(2, 6, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    segment = torch.tensor([segments, [1] * 6])
    found = {}
    for name in ("sdpa", kernels.NAME):
        llm = tiny.llm(family)
        llm.set_attn_implementation(name)
        x = embeds.clone().requires_grad_()
        mask = fuse.masks(llm.config, x, segment, None, None)
        states = llm.base_model(inputs_embeds=x, attention_mask=mask, position_ids=fuse.positions(segment))[0]
        real = states[segment > 0]
        (slope,) = torch.autograd.grad(real.square().sum(), x)
        found[name] = real, slope
    for ours, theirs in zip(found[kernels.NAME], found["sdpa"]):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_grouped_heads_by_hand():
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)[None, None]
    mixed, _ = kernels.attention(torch.nn.Module(), query, key, value, mask)
    for head in range(4):
        scores = query[0, head] @ key[0, head // 2].T / 8**0.5 + mask[0, 0]
        expected = scores.softmax(-1) @ value[0, head // 2]
        torch.testing.assert_close(mixed[0, :, head], expected)


def test_booleans_mean_what_an_additive_mask_means():
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    found, expected = (kernels.attention(torch.nn.Module(), query, key, value, mask)[0] for mask in (allowed, added))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 2, True


def states(rows, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, heads, length, 8, generator=generator).to(dtype) for heads in (4, 2, 2)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("length", [12, 12 * kernels.SHORT[torch.float32]])
def test_packed_rows_equal_a_dense_mask_over_whole_rows(length):
    """By products and by sdpa; forward and backward against float64, written out."""
    segment = torch.tensor(PACKED).repeat_interleave(length // 12, 1)
    tensors, exact = states(2, length), states(2, length, torch.float64)
    mixed, _ = kernels.attention(Layer(), *tensors, kernels.borders(segment), scaling=0.3)
    query, key, value = exact[0], *(x.repeat_interleave(2, 1) for x in exact[1:])
    allowed = (segment[:, None, :, None] == segment[:, None, None]) & torch.ones(length, length).tril().bool()
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(mixed, expected.float())
    above = torch.randn_like(mixed)
    slopes = torch.autograd.grad(mixed, tensors, above)
    for ours, theirs in zip(slopes, torch.autograd.grad(expected, exact, above.double())):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-4)
    dense = kernels._dense(kernels.borders(segment).flatten(), 2, length)
    assert torch.equal(dense.expand_as(allowed), allowed), "what accelerators without such a kernel are given"


@pytest.mark.parametrize("length", [3, 8, 10])
def test_blocks_equal_float64_written_out(length, monkeypatch):
    """Rows shorter than a block, of whole blocks, and with a rest."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    tensors = states(2, length, torch.float64)
    mixed = kernels._Causal.apply(*tensors, 0.3)
    query, key, value = tensors[0], *(x.repeat_interleave(2, 1) for x in tensors[1:])
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, atol=1e-12, rtol=1e-10)
    above = torch.randn_like(mixed).transpose(1, 2).contiguous().transpose(1, 2)  # slopes come with any strides
    slopes = (torch.autograd.grad(out, tensors, above) for out in (mixed, expected))
    for ours, exact in zip(*slopes):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("rows", [torch.tensor([[1] * 140, [1] * 130 + [0] * 10]), torch.tensor([[1] * 135 + [2] * 5])])
def test_long_rows_go_by_blocks(rows, monkeypatch):
    """Alone and packed, in bfloat16: what real tokens come to, and their slopes, as near to float32 as sdpa's."""
    calls, blocks = [], kernels._weights
    monkeypatch.setattr(kernels, "_weights", lambda *args: calls.append(args) or blocks(*args))
    embeds = torch.randn(*rows.shape, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, dtype in (("exact", torch.float32), ("sdpa", torch.bfloat16), (kernels.NAME, torch.bfloat16)):
        llm = tiny.llm("llama").to(dtype)
        llm.set_attn_implementation("sdpa" if name == "exact" else name)
        x = embeds.to(dtype).requires_grad_()
        mask = fuse.masks(llm.config, x, rows, None, None)
        states = llm.base_model(inputs_embeds=x, attention_mask=mask, position_ids=fuse.positions(rows))[0]
        assert bool(calls) == (name == kernels.NAME)
        (slope,) = torch.autograd.grad(states[rows > 0].square().sum(), x)
        found[name] = torch.cat([states[rows > 0], slope[rows > 0]]).detach()
    apart = {name: float((found[name] - found["exact"]).norm()) for name in ("sdpa", kernels.NAME)}
    assert apart[kernels.NAME] < 1.2 * apart["sdpa"], apart


def test_borders_by_hand():
    found = kernels.borders(torch.tensor(PACKED))
    assert found.shape == (1, 1, 1, 6) and found.flatten().tolist() == [0, 5, 9, 12, 23, 24]


def test_segments_of_similar_length_go_together():
    spans = [(0, 10), (10, 13), (13, 22), (22, 30), (30, 33)]
    assert list(kernels._similar(spans)) == [[(0, 10), (13, 22), (22, 30)], [(10, 13), (30, 33)]]


def test_causality_needs_no_mask(monkeypatch):
    """What transformers skips stays skipped: short rows get a triangle, long ones sdpa's flag."""
    for length in (6, kernels.SHORT[torch.float32] + 1):
        tensors = states(2, length)
        triangle = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        expected, _ = kernels.attention(Layer(), *tensors, triangle)
        torch.testing.assert_close(kernels.attention(Layer(), *tensors, None)[0], expected)
        last, _ = kernels.attention(Layer(), tensors[0][:, :, -1:], *tensors[1:], None)
        torch.testing.assert_close(last, expected[:, -1:])
    seen = []
    llm = tiny.llm("llama")
    llm.set_attn_implementation(kernels.NAME)
    monkeypatch.setattr(kernels, "sdpa_mask", lambda **more: seen.append(more["allow_is_causal_skip"]))
    assert llm(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all() and seen == [True]


def test_the_kernel_for_variable_lengths_is_called_as_it_wants(monkeypatch):
    """PyTorch's own needs a GPU; one in plain terms takes its place."""
    segment = torch.tensor(PACKED)
    tensors = states(2, 12)
    expected, _ = kernels.attention(Layer(), *tensors, kernels.borders(segment), scaling=0.3)

    def plain(query, key, value, queries_at, keys_at, longest, also, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and longest == also >= 11 and queries_at is keys_at
        assert queries_at.dtype == torch.int32 and query.shape == (24, 4, 8) and key.shape == (24, 2, 8)
        parts = []
        for start, end in zip(queries_at.tolist(), queries_at.tolist()[1:]):
            one = [x[None, start:end].transpose(1, 2) for x in (query, key, value)]
            out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(kernels, "varlen_attn", plain)
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
    found = kernels._by_flash(*tokens, kernels.borders(segment).flatten(), 0.3)
    torch.testing.assert_close(found.unflatten(0, (2, 12)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_rows_on_a_gpu():
    segment = torch.tensor(PACKED).repeat_interleave(8, 1)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-4)):
        made = [x.detach().repeat(1, 1, 1, 4) for x in states(2, 96)]
        expected, _ = kernels.attention(Layer(), *made, kernels.borders(segment))
        moved = [x.to("cuda", dtype) for x in made]
        found, _ = kernels.attention(Layer(), *moved, kernels.borders(segment).cuda())
        torch.testing.assert_close(found.cpu().float(), expected, atol=tolerance, rtol=tolerance)


def test_packing_without_a_kernel_for_it_is_refused_on_a_cpu():
    kernels.check_packing(kernels.NAME, torch.device("cpu"))
    kernels.check_packing("sdpa", torch.device("cuda"))
    with pytest.raises(ConfigError, match="packed rows under sdpa on a CPU"):
        kernels.check_packing("sdpa", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled")
@torch.no_grad()
def test_flex_attention_sees_segments_too():
    segment, found = torch.tensor(PACKED), {}
    embeds = torch.randn(2, 12, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    for name in ("flex_attention", kernels.NAME):
        llm = tiny.llm("llama", head_dim=16)  # flex refuses narrower heads
        llm.set_attn_implementation(name)
        mask = fuse.masks(llm.config, embeds, segment, None, None)
        states = llm.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=fuse.positions(segment))[0]
        found[name] = states[segment > 0]
    torch.testing.assert_close(found["flex_attention"], found[kernels.NAME], atol=2e-5, rtol=1e-4)
