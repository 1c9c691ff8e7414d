"""mPLUG-Owl's abstractor against its formula written out, its end vector, and the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import composed
from composed import MIX
from isthmus import planning
from isthmus.connectors.abstractor import Abstractor
from isthmus.recipes.mplug_owl import mplug_owl
from isthmus.types import ConfigError, Context, Features


def small(**options) -> Abstractor:
    torch.manual_seed(0)
    connector = Abstractor(8, 6, **{"queries": 3, "depth": 2, "heads": 2, "inner": 5} | options)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.normal_()
    return connector


def seen(connector: Abstractor, x_NSE: torch.Tensor) -> torch.Tensor:
    return connector(Features(x_NSE), Context())


def attend(module: torch.nn.MultiheadAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Two heads of four, written out."""
    weight, bias = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        asked, key, value = (what @ w[rows].T + b[rows] for what, w, b in zip((q, kv, kv), weight, bias, strict=True))
        heads.append((asked @ key.mT / 2).softmax(-1) @ value)
    return F.linear(torch.cat(heads, -1), module.out_proj.weight, module.out_proj.bias)


@torch.no_grad()
def test_the_connector_equals_the_formula():
    connector, x_NSE = small(), torch.randn(2, 7, 8)

    def normal(x, norm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps=1e-6)

    q = connector.queries.expand(2, -1, -1)
    for layer in connector.layers:
        q1 = normal(q, layer.norm_queries)
        q2 = q1 + attend(layer.attention, q1, torch.cat([q1, normal(x_NSE, layer.norm_x)], 1))  # q1, not q
        h, feed = normal(q2, layer.norm_feed), layer.feed
        q = q2 + feed.w2(normal(F.silu(feed.w1(h)) * feed.w3(h), feed.norm))
    torch.testing.assert_close(seen(connector, x_NSE)[:, :3], connector.project(q), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_end_vector_is_last_and_the_same_for_every_picture():
    connector = small()
    assert connector.tokens(7) == 4
    y_NQD = seen(connector, torch.randn(2, 7, 8))
    assert torch.equal(y_NQD[0, 3], y_NQD[1, 3]) and torch.equal(y_NQD[0, 3], connector.end[0])
    assert not torch.allclose(y_NQD[0, :3], y_NQD[1, :3])


@torch.no_grad()
def test_a_picture_is_a_set_of_tokens():
    connector, x_NSE = small(), torch.randn(2, 7, 8)
    torch.testing.assert_close(
        seen(connector, x_NSE[:, torch.randperm(7)]), seen(connector, x_NSE), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_padding_of_a_smaller_picture_is_not_read():
    connector, x_NSE = small(narrow=4), torch.randn(2, 7, 8)
    found = connector(Features(x_NSE, lengths_N=torch.tensor([7, 4])), Context())
    torch.testing.assert_close(found[1:], seen(connector, x_NSE[1:, :4]), atol=1e-4, rtol=1e-4)


def test_a_class_token_may_stay():
    model = composed.model("llama", "mplug_owl", {"queries": 3, "heads": 4, "depth": 1}, class_token="keep")
    batch = model.processor.collator()(MIX)
    assert model.run(batch, need="connected").connected["image"].shape == (3, 4, 32)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="32 does not divide into 3 heads"):
        composed.model("llama", "mplug_owl", {"heads": 3})


def test_published_parameters():
    plan = planning.plan(mplug_owl("published"))
    assert plan.parts["connectors.image"] == pytest.approx(105e6, rel=0.01)
    assert plan.tokens == {"image": 65}
    pretrain, sft = plan.stages
    assert set(pretrain.by_part) == {"encoders.image", "connectors.image"}
    assert sft.trained == 32 * 2 * 2 * 8 * 4096  # layers, q and v, A and B, rank, width
