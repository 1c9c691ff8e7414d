"""What needs the encoder's grid refuses tokens that are none, and pictures that have no common one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import composed
from isthmus import aligner as aligners
from isthmus.connectors import Connector
from isthmus.connectors.pool import Pool
from isthmus.types import ConfigError, Context, DataError, Features

POOLING = sorted(name for name in aligners.known() if "pool" in aligners.named(name).Options.model_fields)
NEEDS: dict[str, dict[str, Any]] = {
    **{name: {"pool": 2} for name in POOLING},
    "qwen_vl": {"side": 2, "heads": 4},
    "kosmos2": {"queries": 3, "heads": 4, "grid": 2, "places": True},
}
"""Joints with options under which they read the encoder's tokens as a grid."""


@pytest.mark.parametrize("name", NEEDS)
def test_a_class_token_beside_the_grid_is_refused_when_composing(name):
    with pytest.raises(ConfigError, match="17 tokens are no grid.*4x4") as refused:
        composed.model("llama", name, NEEDS[name], class_token="keep")
    assert str(refused.value).splitlines()[1:] == ["set encoder.class_token to drop"]


@pytest.mark.parametrize(("name", "markers"), [("saisa", 0), ("cogvlm", 2)])
def test_a_grid_without_one_is_pooled(name, markers):
    assert composed.model("llama", name, NEEDS[name]).queries("image") == 4 + markers


@pytest.mark.parametrize("name", ["saisa", "cogvlm", "kosmos2"])
@torch.no_grad()
def test_a_class_token_may_stay_where_no_grid_is_read(name):
    options = {key: value for key, value in NEEDS[name].items() if key not in ("pool", "places")}
    model = composed.model("llama", name, options, class_token="keep")
    output = model.run(model.processor.collator()(composed.MIX))
    assert output.hidden_BTD.isfinite().all()


class Shown(Connector):
    """What it is given."""

    def forward(self, features: Features, context: Context) -> torch.Tensor:
        return features.x_NSE


def test_cells_are_means_and_pictures_that_differ_in_size_are_refused():
    connector, x_NSE = Pool(Shown(), (4, 2), 2), torch.randn(1, 8, 6)
    found = connector(Features(x_NSE), Context())
    torch.testing.assert_close(found[0, 0], x_NSE[0, [0, 2]].mean(0))  # two rows and one column of tokens to a cell
    torch.testing.assert_close(found[0, 3], x_NSE[0, [5, 7]].mean(0))
    with pytest.raises(DataError, match="no common grid"):
        connector(Features(x_NSE, lengths_N=torch.tensor([5])), Context())
