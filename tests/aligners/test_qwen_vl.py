"""Qwen-VL's resampler against its formula written out, what its positions change, and the published sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import composed
from composed import MIX
from isthmus import planning
from isthmus.config import Recipe
from isthmus.connectors.pool import Normalised
from isthmus.connectors.position_aware import PositionAware, resized, sine_cosine
from isthmus.recipes.qwen_vl import qwen_vl
from isthmus.types import ConfigError, Context, DataError, Features


def seen(connector: PositionAware, x_NSE: torch.Tensor) -> torch.Tensor:
    return connector(Features(x_NSE), Context())


def small(**options) -> PositionAware:
    torch.manual_seed(0)
    connector = PositionAware(6, 8, (3, 3), **{"side": 2, "heads": 2} | options)
    torch.nn.init.normal_(connector.queries)
    torch.nn.init.normal_(connector.attention.in_proj_bias)
    return connector


def test_the_table_holds_sines_and_cosines_of_column_then_row():
    row, column = 2, 3
    rates = (1.0, 10000**-0.5)
    expected = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos) for rate in rates]
    torch.testing.assert_close(sine_cosine(8, 4)[row, column], torch.tensor(expected))


def test_the_table_is_resized_over_rows_and_columns():
    table = sine_cosine(8, 4)
    assert resized(table, (4, 4)) is table
    wide = resized(table, (4, 8))
    assert wide.shape == (4, 8, 8)
    torch.testing.assert_close(wide[..., 4:], table[:, :1, 4:].expand(4, 8, 4))  # the row's waves do not change


@torch.no_grad()
def test_the_connector_equals_the_formula():
    connector, x_NSE = small(), torch.randn(2, 9, 6)
    x = F.layer_norm(x_NSE @ connector.project.weight.T, (8,), eps=1e-6)
    q = F.layer_norm(connector.queries, (8,), eps=1e-6) + sine_cosine(8, 2).flatten(0, 1)
    places = F.interpolate(sine_cosine(8, 2).permute(2, 0, 1)[None], (3, 3), mode="bicubic")[0].flatten(1).T
    bias, weight = (each.chunk(3) for each in (connector.attention.in_proj_bias, connector.attention.in_proj_weight))
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        q_, k_, v_ = (what @ w[rows].T + b[rows] for what, w, b in zip((q, x + places, x), weight, bias, strict=True))
        heads.append((q_ @ k_.mT / 2).softmax(-1) @ v_)
    out = connector.attention.out_proj(torch.cat(heads, -1))
    expected = F.layer_norm(out, (8,), eps=1e-6) @ connector.out.weight.T
    torch.testing.assert_close(seen(connector, x_NSE), expected)


@torch.no_grad()
def test_only_positions_tell_one_order_of_tokens_from_another():
    x_NSE, order = torch.randn(1, 9, 6), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    blind, knowing = small(positions=False), small()
    torch.testing.assert_close(seen(blind, x_NSE), seen(blind, x_NSE[:, order]))
    assert (seen(knowing, x_NSE) - seen(knowing, x_NSE[:, order])).abs().max() > 1e-2
    names = {name for name, _ in knowing.named_parameters()}
    assert not any("place" in name for name in names)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="3 heads"):
        small(heads=3)
    with pytest.raises(ConfigError, match="no grid"):
        composed.model("llama", "qwen_vl", {"heads": 4}, class_token="keep")
    with pytest.raises(DataError, match="grid"):
        small()(Features(torch.randn(1, 9, 6), lengths_N=torch.tensor([5])), Context())


@torch.no_grad()
def test_a_normalised_joint_starts_where_words_are():
    model = composed.model("llama", "qwen_vl", {"side": 2, "heads": 4, "normalise": True})
    joint, words_VD = model.connectors["image"], model.llm.get_input_embeddings().weight
    assert isinstance(joint, Normalised)
    spread = model.run(model.processor.collator()(MIX), need="connected").connected["image"] - words_VD.mean(0)
    torch.testing.assert_close(spread.square().mean(), (words_VD - words_VD.mean(0)).square().mean())


def test_published_parameters():
    plan = planning.plan(qwen_vl("published"))
    model = planning.outline(qwen_vl("published"))
    last = sum(p.numel() for name in ("out", "norm_out") for p in getattr(model.connectors["image"], name).parameters())
    assert last == pytest.approx(16.8e6, rel=0.01)
    assert plan.parts["connectors.image"] - last == pytest.approx(75.0e6, rel=0.01)
    assert plan.parts["llm"] == pytest.approx(7.7e9, rel=0.01)
    assert plan.total == pytest.approx(9.6e9, rel=0.01)
    assert plan.tokens == {"image": 256}
    assert [sorted(stage.by_part) for stage in plan.stages] == [
        ["connectors.image", "encoders.image"],
        ["connectors.image", "encoders.image", "llm"],
        ["connectors.image", "llm"],
    ]


@pytest.mark.parametrize("positions", [True, False])
def test_the_embedded_recipe_makes_a_round_trip(positions, tmp_path: Path):
    recipe = qwen_vl(positions=positions)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.model_validate_json((tmp_path / "recipe.json").read_text()) == recipe
