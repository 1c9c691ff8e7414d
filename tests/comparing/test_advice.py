"""What is said of figures that differ by a trifle, and what is marked that a blank picture reaches as well."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.comparing.advice import _least
from isthmus.comparing.outcome import sees
from isthmus.comparing.table import _marked
from isthmus.evaluation.seeds import Gap


def gap(value: float, p: float) -> Gap:
    return Gap(value, (value,) * 3, value - 0.1, value + 0.1, value - 0.1, value + 0.1, p, p / 2, True)


@pytest.mark.parametrize(("other", "said"), [(1.01, []), (1.5, ["one takes least (1.00 GFLOP)"])])
def test_a_price_that_differs_by_a_trifle_is_no_lower(other: float, said: list[str]) -> None:
    class Priced:
        costs = {"one": 1.0, "two": other}

    def price(cost: Any) -> float:
        return cost

    assert [*_least(Priced, ["one", "two"], "take", "least", "GFLOP", price)] == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "marked"), [(gap(0.4, 0.01), False), (gap(0.4, 0.2), True), (gap(-0.4, 0.01), True), (None, False)]
)
def test_what_a_blank_picture_reaches_as_well_is_marked(seen: Gap | None, marked: bool) -> None:
    level = {"value": 0.5, "low": 0.4, "high": 0.6, "items_low": 0.45, "items_high": 0.7}
    cell = {"level": level, "seen": None if seen is None else vars(seen), "verdict": "worse"}
    line = {"unit": "accuracy", "cells": {"one": cell}}
    assert sees(seen) is not marked
    assert _marked(line, "one") == f".500 (.40 to .70){'°' if marked else ''} **worse**"
    assert "°" not in _marked({**line, "unit": "nats"}, "one")
