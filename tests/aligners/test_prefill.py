"""The prefill figure runs at a tiny size, and refuses a path that differs from its reference."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def prefill(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("prefill")


def test_every_way_is_measured(prefill, tmp_path):
    file = tmp_path / "p.json"
    assert prefill.main(["--tiny", "--repeats", "1", "--json", str(file)]) == 0
    for case in json.loads(file.read_text())["cases"]:
        assert case["error"] < 1e-5 and case["milliseconds"].keys() == set(prefill.WAYS)
        assert case["flops"]["keys"] < case["flops"]["ffn"] < case["flops"]["self"] < case["flops"]["full"]


def test_a_path_that_differs_is_refused(prefill, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prefill.composite, "_through", lambda host, value: host.o_proj(value.repeat(1, 2, 1).flatten(1))
    )
    file = tmp_path / "p.json"
    assert prefill.main(["--tiny", "--repeats", "1", "--json", str(file)]) == 1
    assert all("refused" in case and "milliseconds" not in case for case in json.loads(file.read_text())["cases"])
