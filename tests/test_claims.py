"""The page of claims says of each what its comparison decided, and leaves out what was not measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("claims")


def gap(value: float, p: float) -> dict:
    ends = {"low": value - 0.1, "high": value + 0.1, "items_low": value - 0.2, "items_high": value + 0.05}
    return {"value": value, "each": [value] * 4, **ends, "p_seeds": p, "p_items": p / 2, "paired": True}


def test_a_claim_is_confirmed_or_reversed_after_correction_alone(script, tmp_path) -> None:
    measured = script.CLAIMS[:4]
    found = dict(zip(measured, [gap(-0.3, 0.001), gap(0.3, 0.01), gap(-0.1, 0.03), gap(-0.1, 0.9)]))
    for group in {claim.group for claim in measured}:
        mine = [claim for claim in measured if claim.group == group]
        cells = {claim.other: {"gap": found[claim]} for claim in mine}
        tree = {
            "names": [mine[0].base, *cells],
            "baseline": mine[0].base,
            "seeds": [0, 1, 2, 3],
            "budget": "30 TFLOP",
            "lines": [{"label": "other"}, {"label": script.DECISIVE, "cells": cells}],
        }
        options = script.options_of(["--numbers", str(tmp_path)])
        script.numbers(group, options).write_text(json.dumps(tree))
    page = tmp_path / "claims.md"
    assert script.main(["--numbers", str(tmp_path), "--page", str(page)]) == 0
    told = page.read_text()
    rows = {claim: next(line for line in told.splitlines() if f" {claim.says} " in line) for claim in measured}
    first, second, third, fourth = rows.values()
    assert "**confirmed**" in first and "**reversed**" in second
    assert "not decided" in third and "not decided" in fourth  # .03 is .06 after Holm
    assert "-0.30 (-0.50 to -0.20)" in first and "4 seeds of 30 TFLOP" in first
    assert f"- {script.CLAIMS[4].says}: `{script.CLAIMS[4].command}`" in told


def test_every_claim_has_recipes_that_differ(script) -> None:
    from isthmus import recipes as book

    for claim in script.CLAIMS:
        if claim.group == script.HOUSE:
            base, other = script.house_table.recipe(claim.base), script.house_table.recipe(claim.other)
        else:
            base, other = script.GROUPS[claim.group]()
        assert (base.name, other.name) == (claim.base, claim.other) and book.named(base.name)
        plain = base.but(name="x", about="")
        assert plain != other.but(name="x", about="") and (plain.encoder, plain.llm) == (other.encoder, other.llm)
