"""What a step costs: by formula as PyTorch counts it operator by operator, for whatever trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.config import Recipe
from isthmus.training import machine
from isthmus.training.log import read_rows
from isthmus.training.loop import run_stage
from isthmus.training.meter import Meter, forget_peak, peak_memory
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = small.parts(tmp_path_factory.mktemp("parts"))
    return made.override(["llm.attention=eager", "encoder.layer=-1"])  # plain products, none unread


def measured(recipe: Recipe, train: dict[str, Any], **stage: Any) -> tuple[Step, Meter, Batch, int]:
    """A step over samples of one length, with the operations that PyTorch counted."""
    made = small.stage(train=train, **stage)
    step = Step(small.build(recipe), made.objectives)
    step.vlm.encoders["image"].tower.set_attn_implementation("eager")  # PyTorch does not count its fused CPU kernel
    choose(step, made)
    step.ready()
    meter = Meter(step, 1e9, CPU)
    collate = step.vlm.processor.collator()
    batch = collate([small.sample(0).but(id=str(number)) for number in range(6)])
    assert bool((batch.segment_BT > 0).all())
    with FlopCounterMode(display=False) as counter:
        step(batch, step.scales([batch]))[0].backward()
    return step, meter, batch, counter.get_total_flops()


@pytest.mark.parametrize(
    "train",
    [
        {"connectors.*": 1e-3},
        {"connectors.*": 1e-3, "llm.*layers.*": {"mode": {"r": 4}}},
        {"connectors.*": 1e-3, "llm.model.layers.2.*": 1e-3},
        {"llm.model.layers.2.*": 1e-3},
        {"llm.model.layers.*": 1e-3, "connectors.*": 1e-3, "encoders.*encoder.layers.*": 1e-3},
    ],
    ids=["connector", "lora", "connector and last layer", "last layer", "everything"],
)
def test_the_formula_is_what_pytorch_counts(recipe: Recipe, train: dict[str, Any]) -> None:
    _, meter, batch, counted = measured(recipe, train)
    assert meter.flops([batch]) == pytest.approx(counted, rel=0.02)


def test_a_head_that_trains_is_counted_once_though_it_is_computed_twice(recipe: Recipe) -> None:
    step, meter, batch, counted = measured(recipe, {"llm.*": 1e-3, "connectors.*": 1e-3})
    again = 2 * step.vlm.llm.lm_head.weight.numel() * step.terms["lm"].count(batch)
    assert meter.flops([batch]) == pytest.approx(counted - again, rel=0.02)


def test_an_objective_that_leaves_the_llm_out_does_not_pay_for_it(recipe: Recipe) -> None:
    step, meter, batch, _ = measured(recipe, {"connectors.*": 1e-3}, objectives=["contrastive"])
    rows = 6 * step.vlm.encoders["image"].tokens
    connector = sum(2 * 2 * rows * p.numel() for p in step.vlm.connectors.parameters() if p.ndim == 2)
    second = 2 * rows * list(step.vlm.connectors.parameters())[2].numel()  # the second Linear's input has a gradient
    frozen = meter.flops([batch]) - connector - second
    assert frozen > 0 and meter.costs.token == meter.costs.pair == meter.costs.prediction == 0


def test_padding_costs_nothing_and_packed_segments_do_not_meet(recipe: Recipe) -> None:
    _, meter, _, _ = measured(recipe, {"connectors.*": 1e-3})
    ids = torch.ones(1, 8, dtype=torch.long)
    whole, padded, packed = ([[1] * 8], [[1, 1, 1, 1, 0, 0, 0, 0]], [[1, 1, 1, 1, 2, 2, 2, 2]])
    costs = [meter.flops([Batch(ids, torch.tensor(s), ids * 0)]) for s in (whole, padded, packed)]
    assert costs[0] == 8 * meter.costs.token + 64 * meter.costs.pair
    assert costs[1] == 4 * meter.costs.token + 16 * meter.costs.pair
    assert costs[2] == 2 * costs[1]


def test_rows_tell_share_memory_and_norms_of_parts(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    train = {"connectors.*": 1e-2, "llm.*v_proj": {"mode": {"r": 2}}, "encoders.*layers.*": 1e-3}
    stage = small.stage(train=train, clip=None)
    run_stage(vlm, stage, small.Colours(vlm), tmp_path, steps=2, console=small.quiet())
    ceiling = json.loads((tmp_path / "machine.json").read_text())
    assert ceiling["device"] == "cpu" and ceiling["operations_per_second"] > 1e8
    for row in read_rows(tmp_path / "metrics.jsonl"):
        assert 0 < row["mfu"] < 1 and 0.05 < row["memory_gb"] < 100
        assert row["operations"] == pytest.approx(row["mfu"] * row["seconds"] * ceiling["operations_per_second"])
        parts = [row[f"grad_norm_{part}"] for part in ("connectors", "llm", "encoders")]
        assert all(parts) and row["grad_norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5, rel=1e-5)
        assert {key for key in row if key.startswith("grad_norm_")} == {
            f"grad_norm_{part}" for part in ("connectors", "llm", "encoders")
        }


def test_norms_are_those_of_the_gradients(recipe: Recipe) -> None:
    from isthmus.training.optimizer import norms

    made = small.stage(train={"connectors.*": 1e-3, "llm.model.layers.0.*": 1e-3})
    step = Step(small.build(recipe), made.objectives)
    trained = choose(step, made)
    batch = small.Colours(step.vlm)(0, 0)
    step(batch, step.scales([batch]))[0].backward()
    flat = {
        part: torch.cat([e.parameter.grad.flatten() for e in trained if e.name.startswith(f"vlm.{part}.")])
        for part in ("connectors", "llm")
    }
    found = norms(trained)
    for part, gradient in flat.items():
        assert found[f"grad_norm_{part}"].item() == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert found["grad_norm"].item() == pytest.approx(torch.cat(list(flat.values())).norm().item(), rel=1e-5)


def test_the_ceiling_is_measured_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine.json"
    found = machine.ceiling(CPU, torch.float32, file)
    assert json.loads(file.read_text())["threads"] == torch.get_num_threads()
    monkeypatch.setattr(machine, "measured_ceiling", lambda *_: found * 2)
    assert machine.ceiling(CPU, torch.float32, file) == found
    assert machine.ceiling(CPU, torch.bfloat16, file) == found * 2  # another arithmetic is another ceiling


def test_memory_is_what_the_process_once_held() -> None:
    before = peak_memory(CPU)
    block = torch.ones(int(1.2 * before) // 8, dtype=torch.float64)  # more than it ever held
    assert peak_memory(CPU) >= 8 * block.numel()


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system forgets no peak")


@LINUX
def test_a_stage_answers_for_its_own_memory(recipe: Recipe) -> None:
    """Not for what was held before it: by another stage, or by a model that was measured."""
    step = Step(small.build(recipe), small.stage().objectives)
    block = torch.ones(int(1.2 * peak_memory(CPU)) // 8, dtype=torch.float64)
    high, size = peak_memory(CPU), block.nbytes
    del block
    meter = Meter(step, 1e9, CPU)
    assert 1e9 * meter.read([small.Colours(step.vlm)(0, 0)], 1.0)["memory_gb"] < high - 0.5 * size


@LINUX
@pytest.mark.slow
def test_a_process_does_not_answer_for_the_one_that_started_it() -> None:
    """A child's `ru_maxrss` begins with what its parent held, and runs of a comparison are children."""
    block = torch.ones(int(1.2 * peak_memory(CPU)) // 8, dtype=torch.float64)
    high, size = peak_memory(CPU), block.nbytes
    code = "import torch; from isthmus.training.meter import peak_memory; print(peak_memory(torch.device('cpu')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) < high - 0.5 * size


@LINUX
def test_what_is_held_while_the_peak_is_forgotten_still_counts() -> None:
    block = torch.ones(25_000_000)
    forget_peak(CPU)
    again = torch.ones(50_000_000)
    assert peak_memory(CPU) >= block.nbytes + again.nbytes
