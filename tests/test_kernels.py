"""Our attention kernel against transformers' sdpa, forward and backward."""

from __future__ import annotations

import pytest
import torch

import tiny
from isthmus import fuse, kernels


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("segments", [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
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
