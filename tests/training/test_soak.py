"""A long run takes no more memory, and holds no more files open, at its end than near its beginning."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import psutil
import pytest
import small
import torch

from isthmus.training.run import Run
from isthmus.training.step import Step
from isthmus.training.toy import toy


def soak(folder: Path, patch: pytest.MonkeyPatch, steps: int, workers: int) -> tuple[list[int], list[int]]:
    """Resident bytes and open descriptors before every step of a run with many saves and validations."""
    patch.setenv("ISTHMUS_HOME", str(folder / "home"))
    me, memory, descriptors = psutil.Process(), [], []
    real = Step.scales

    def scales(self: Step, batches: Any) -> dict[str, float]:
        memory.append(me.memory_info().rss)
        descriptors.append(me.num_fds())
        return real(self, batches)

    patch.setattr(Step, "scales", scales)
    recipe = toy(folder / "toy")
    stage = recipe.stages[1].but(budget={"steps": steps}, save_every=0.1, evaluate_every=0.1)
    recipe = recipe.but(stages=[stage], engine={"workers": workers, "save_async": True})
    run = Run(recipe, folder / "run", torch.device("cpu"), small.quiet())
    model = run.newborn()
    assert run.train(model, run.look(model)) is not None
    return memory, descriptors


@pytest.mark.parametrize(
    ("steps", "workers", "most"),
    [
        (300, 0, 0.03),  # allocators are still warming up
        pytest.param(10_000, 0, 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(10_000, 1, 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_memory_and_descriptors_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, workers: int, most: float
) -> None:
    memory, descriptors = soak(tmp_path, monkeypatch, steps, workers)
    assert len(memory) >= steps
    tenth = len(memory) // 10
    early, late = memory[2 * tenth : 3 * tenth], memory[-tenth:]
    growth = statistics.median(late) / statistics.median(early) - 1
    print(f"{steps} steps, {workers} workers: memory {growth:+.2%}, descriptors {set(descriptors[-tenth:])}")
    assert growth < most
    assert max(descriptors[-tenth:]) <= max(descriptors[:-tenth])  # batches under way hold some
