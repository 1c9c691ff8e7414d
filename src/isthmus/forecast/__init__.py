"""What a recipe's training will take, before any weights are read: tokens, operations, memory by kind, time.

Each stage's own step is traced on the meta device over batches of its own data (`trace`, `batches`), and its operations
are timed one by one on this machine (`calibrate`). `benchmarks/plan_error.py` says how far that is from real runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus import assembly, kernels, planning, quantised
from isthmus.config import Recipe, Stage
from isthmus.errors import ConfigError, IsthmusError
from isthmus.forecast import calibrate
from isthmus.forecast.batches import Drawn, draw, row_bytes
from isthmus.forecast.trace import Trace, in_dtype, trace
from isthmus.model import VLM
from isthmus.objectives.lm import NextToken
from isthmus.training import optimizer
from isthmus.training.budget import steps_for
from isthmus.training.machine import arithmetic
from isthmus.training.run import encodes_anew
from isthmus.training.step import Step
from isthmus.training.validation import HELD_OUT

FORWARD = 0.4
"""A validation's share of a step over the same samples, about."""


class Untraceable(ConfigError):
    """A recipe that may well be trained, whose steps cannot be traced without numbers."""


@dataclass(frozen=True)
class StageForecast:
    """One stage, per optimizer step and as a whole."""

    name: str
    trained: int
    steps: int | None
    """None where a budget of minutes is not calibrated."""
    assumed: bool
    """Whether the data are not here, so that samples of one picture and 64 text tokens were assumed."""
    sample: dict[str, float]
    """Tokens, learnt tokens and media per sample; the share of positions that is padding."""
    flops: float
    """Operations per step, as PyTorch counts them: what is padding or computed twice is in it."""
    memory: dict[str, int]
    """Bytes by kind, at the largest batch."""
    seconds: dict[str, float] | None
    """Of a step by what takes them; None without calibration."""

    @property
    def step_seconds(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def stage_seconds(self) -> float | None:
        """All steps; validation and the encoding of pictures come on top."""
        return None if self.step_seconds is None or self.steps is None else self.step_seconds * self.steps

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """As plain values, with the sums."""
        sums = {"step_seconds": self.step_seconds, "stage_seconds": self.stage_seconds, "peak": self.peak}
        return asdict(self) | sums


@dataclass(frozen=True)
class Forecast:
    """All stages of a recipe."""

    recipe: str
    fingerprint: str
    device: str
    dtype: str
    threads: int
    stages: tuple[StageForecast, ...]

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"stages": [stage.plain() for stage in self.stages]}


def forecast(recipe: Recipe, device: torch.device, seconds: float = 1.0) -> Forecast:
    """What every stage will take.

    Args:
        seconds: of calibration per stage; 0 leaves the times out.

    Raises:
        Untraceable: a step cannot be traced without numbers.
        ConfigError, DataError, IsthmusError: parts do not fit, or data are not there.
    """
    if recipe.llm.attention in planning.OPAQUE:
        raise Untraceable(
            f"no step of {recipe.name} can be traced: {recipe.llm.attention} does not run without numbers",
            f"plan it with llm.attention={kernels.NAME}: the same operations, and no less memory",
        )
    dtype = arithmetic(recipe.dtype, device)
    model = planning.outline(recipe)
    stages = tuple(_stage(recipe, stage, model, device, dtype, seconds) for stage in recipe.stages)
    name = str(dtype).removeprefix("torch.")
    return Forecast(recipe.name, recipe.fingerprint(), str(device), name, torch.get_num_threads(), stages)


def _stage(
    recipe: Recipe, stage: Stage, model: VLM, device: torch.device, dtype: torch.dtype, seconds: float
) -> StageForecast:
    if stage.joint:
        assembly.rebuild(model, stage.joint)
    step = Step(model, stage.objectives).to("meta")
    chosen = optimizer.choose(step, stage)
    trained = sum(each.parameter.numel() for each in chosen if each.name.startswith("vlm."))
    step.accompany()
    if stage.recompute:
        step.recompute()
    with _tracing(recipe.name):
        drawn = draw(recipe, stage, model, _steps(stage, None))
    steps = _steps(stage, drawn.epoch)
    weights = _weights(step, dtype)
    with _tracing(recipe.name), in_dtype(step, dtype):
        traces = {number: trace(step, drawn.steps[number]) for number in _chosen(drawn.volumes)}
        row = 0 if encodes_anew(recipe, model) else row_bytes(model)
    flops = _mean(drawn.volumes, {number: float(each.flops) for number, each in traces.items()})
    memory = weights | _step_memory(step, drawn, traces, trained, dtype)
    took = _seconds(drawn, traces, flops, trained, recipe, device, dtype, seconds) if seconds else None
    if steps is None and took is not None and stage.budget.minutes is not None:
        steps = max(1, int(60 * stage.budget.minutes / _with_validation(stage, sum(took.values()))))
    shown = (drawn.epoch or stage.batch_size) if steps is None else steps * stage.batch_size
    memory["features"] = round(row * drawn.per_sample()["media"] * min(shown, drawn.epoch or shown))
    memory["process"] = resident()
    return StageForecast(stage.name, trained, steps, drawn.assumed, drawn.per_sample(), flops, memory, took)


@contextmanager
def _tracing(name: str) -> Iterator[None]:
    """Whatever a step stumbles over that has no numbers becomes one error; faults of recipe and data stay theirs."""
    try:
        yield
    except (IsthmusError, OSError):
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise Untraceable(
            f"no step of {name} can be traced without numbers: {type(error).__name__}: {said}",
            "its training needs no forecast",
        ) from error


def _steps(stage: Stage, epoch: int | None) -> int | None:
    if stage.budget.epochs is not None and epoch is None:
        return None
    return steps_for(stage.budget, stage.batch_size, epoch or 0)


def _with_validation(stage: Stage, step: float) -> float:
    """Seconds per step where validations are spread over the steps of a budget of minutes."""
    assert stage.budget.minutes is not None
    times = math.ceil(1 / stage.evaluate_every) if stage.evaluate_every else 1
    each = FORWARD * step * HELD_OUT / stage.batch_size
    left = max(0.5 * 60 * stage.budget.minutes, 60 * stage.budget.minutes - times * each)
    return step * 60 * stage.budget.minutes / left


# ---------------------------------------------------------------------------------------------- operations


def _chosen(volumes: Sequence[int]) -> list[int]:
    """Numbers of the steps that are traced: the one nearest to the mean, and the largest."""
    mean = sum(volumes) / len(volumes)
    order = sorted(range(len(volumes)), key=lambda number: abs(volumes[number] - mean))
    return sorted({order[0], max(order, key=lambda number: volumes[number])})


def _mean(volumes: Sequence[int], known: dict[int, float]) -> float:
    """The mean over all steps of what is known of some, by a line through the known ones (least squares)."""
    mean = sum(volumes) / len(volumes)
    xs, ys = [volumes[number] for number in known], list(known.values())
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys)) / spread if spread else 0.0
    return middle_y + slope * (mean - middle_x)


# ---------------------------------------------------------------------------------------------- memory


def _weights(step: Step, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what is loaded: what trains in float32, packed weights as they are, the rest in the run's dtype."""
    packed = quantised.weights(step.vlm)
    frozen = trained = 0
    for name, tensor in [*step.named_parameters(), *step.named_buffers()]:
        if tensor.requires_grad:
            trained += 4 * tensor.numel()
        elif name.removeprefix("vlm.") in packed or not tensor.is_floating_point():
            frozen += tensor.nbytes
        else:
            frozen += dtype.itemsize * tensor.numel()
    return {"weights": frozen + trained, "gradients": trained, "optimizer": 2 * trained}


def _step_memory(
    step: Step, drawn: Drawn, traces: dict[int, Trace], trained: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of activations, of a block of logits, and of what lives for a moment, at the largest batch."""
    largest = max(traces, key=lambda number: drawn.volumes[number])
    found = traces[largest]
    logits = _logits(step, drawn, largest, dtype)
    casts = trained * dtype.itemsize if dtype != torch.float32 else 0
    gradients = trained * dtype.itemsize
    moment = max(0, found.peak - found.kept - gradients - logits)
    return {"activations": found.kept + casts, "logits": logits, "moment": moment}


def _logits(step: Step, drawn: Drawn, largest: int, dtype: torch.dtype) -> int:
    """A block of logits, its softmax in float32 and its gradient, where there is a next-token objective."""
    term = next((term for term in step.terms.values() if isinstance(term, NextToken)), None)
    if term is None:
        return 0
    rows = min(term.options.rows, max(term.count(batch) for batch in drawn.steps[largest]))
    return rows * step.vlm.vocabulary * (2 * dtype.itemsize + 4)


def resident() -> int:
    """Bytes that this process holds now: Python and its libraries."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        return 0
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------- time


def _seconds(
    drawn: Drawn,
    traces: dict[int, Trace],
    flops: float,
    trained: int,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
) -> dict[str, float]:
    """Seconds of the mean step, from the traced one that is nearest to it."""
    number = min(traces, key=lambda number: abs(traces[number].flops - flops))
    nearest = traces[number]
    found = calibrate.speed(nearest.calls, device, budget)
    scale = flops / max(1, nearest.flops)
    return {
        "operations": found.operations * scale,
        "casts": len(drawn.steps[number]) * calibrate.casts(trained, dtype, device),
        "host": found.host,
        "optimizer": calibrate.optimizer(trained, device),
        "data": 0.0 if recipe.engine.workers else drawn.seconds,
    }
