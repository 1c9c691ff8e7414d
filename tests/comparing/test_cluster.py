"""Runs on a cluster of Ray that is started here: the same folders as the local engine's; skipped without Ray."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from comparing_runs import recipes, small
from isthmus.comparing import cluster
from isthmus.errors import ConfigError, IsthmusError


def answers(folder: Path) -> dict[str, object]:
    """The hash of every weight below a folder, and every prediction, without how long it took."""
    found: dict[str, object] = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.safetensors")
    }
    for file in folder.rglob("predictions/**/*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(folder))] = [{**line, "seconds": None} for line in lines]
    return found


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_comes_out_is_what_the_local_engine_makes(ray, embedded, tmp_path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    local = small(here, *recipes(here), factors=(0.5, 2.0), seeds=1, engine="local")
    spread = small(there, *recipes(there), factors=(0.5, 2.0), seeds=1, engine="ray", at_once=2)
    assert answers(here / "comparison") == answers(there / "comparison") != {}
    assert spread.lines == local.lines and spread.mean == local.mean and spread.rates == local.rates
    names = [{str(f.relative_to(x)) for f in x.rglob("*") if f.suffix != ".lock"} for x in (here, there)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_fails_is_named_with_its_log(ray, embedded, tmp_path) -> None:
    one, two = recipes(tmp_path)
    bad = two.but(llm=str(tmp_path / "nowhere"))
    with pytest.raises(IsthmusError, match="two, seed 0 ended with exit code 2") as caught:
        small(tmp_path, one, bad, seeds=1, engine="ray")
    assert "seed0.log" in caught.value.remedy
    assert json.loads((tmp_path / "comparison/one/seed0/report.json").read_text())["rows"]


class Nodes:
    """A cluster of which nothing but its machines is known."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines

    def nodes(self) -> list[dict[str, object]]:
        lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [lost, *({"Alive": True, "Resources": each} for each in self.machines)]


def test_a_run_asks_for_no_more_than_some_machine_has(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    small, large = {"CPU": 2.0, "memory": 1e9}, {"CPU": 4.0, "GPU": 1.0}
    for machines, device, at_once, threads in (
        ((small,), "cpu", 1, 2),
        ((small, large), "cpu", 1, 4),
        ((small, large), "cpu", 4, 2),
        (({"CPU": 16.0}, large), "cuda:1", 1, 4),  # that one alone has what is asked for
    ):
        monkeypatch.setattr(cluster, "connected", lambda machines=machines: Nodes(*machines))
        assert cluster.OnRay(Console(), device, at_once).threads() == threads
    for machines, device, cause in (((small,), "cuda", "has a GPU"), (({"CPU": 0.0},), "cpu", "has a core to give")):
        monkeypatch.setattr(cluster, "connected", lambda machines=machines: Nodes(*machines))
        with pytest.raises(ConfigError, match=cause) as told:
            cluster.OnRay(Console(), device)([], lambda job, outcome: None)
        assert "start `ray`" in told.value.remedy


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as caught:
        cluster.connected()
    assert "pip install 'isthmus[ray]'" in caught.value.remedy
