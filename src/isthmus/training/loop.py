"""The loop around a stage: steps, validation, checkpoints, and going on exactly where it stopped.

A step is a function of (weights, moments, seed, stage, number of the step) alone: data come by number, and every step
seeds its own randomness. So a run that was interrupted and resumed equals one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from rich.console import Console, RenderableType
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from isthmus.config import Budget, Stage
from isthmus.model import VLM
from isthmus.training import checkpoint, log, optimizer
from isthmus.training.step import Step
from isthmus.types import IGNORE, Batch, ConfigError, IsthmusError

WARM, TIMED, GLANCE = 2, 8, 0.05
"""Calibration runs 2 optimizer steps unmeasured and 8 measured, or as many as fit into 5 % of the budget."""


class Feed(Protocol):
    """Where batches come from: a pure function of the step, so that nothing has to be replayed on resume."""

    micros: int
    """Micro-batches per optimizer step."""

    def __call__(self, step: int, micro: int) -> Batch: ...


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    state: Literal["done", "interrupted"]
    steps: int
    at: checkpoint.State
    model: Path | None
    """The Hugging Face directory that was written; None if interrupted."""


def steps_for(budget: Budget, batch_size: int, samples: int) -> int | None:
    """Steps of a budget over `samples` samples per epoch; None for minutes, which need a clock."""
    if budget.steps is not None:
        return budget.steps
    if budget.samples is not None:
        return math.ceil(budget.samples / batch_size)
    if budget.epochs is not None:
        return math.ceil(budget.epochs * samples / batch_size)
    return None


def run_stage(
    vlm: VLM,
    stage: Stage,
    feed: Feed,
    folder: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    validate: Callable[[Step], float] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
    sample: RenderableType | None = None,
) -> Result:
    """Train one stage in `folder`, or go on with it, and hand over the model in `folder/model`.

    The model that is handed over has the weights that validated best, or the last ones without validation.

    Args:
        vlm: the model as the stage before left it, also when resuming.
        steps: how many; None measures once how many fit the budget's minutes.
        validate: the loss on held-out data, see `step.held_out`.
        dtype: bfloat16 runs under autocast; what trains keeps float32 masters either way.
        sample: one rendered sample to show at the start.

    Raises:
        ConfigError: the stage does not fit the model, the feed or what the folder already holds.
        DataError: a step has nothing to learn from.
        IsthmusError: a loss or gradient is not finite, a tensor cannot be reached, or the disk refuses.
    """
    console = console or Console()
    torch.manual_seed(derive(seed, stage.name, "birth"))
    step = Step(vlm, stage.objectives)
    trained = optimizer.choose(step, stage)
    step.to(device)
    runner = _Runner(step, trained, stage, feed, folder, seed, validate, torch.device(device), dtype)
    console.print(log.first_lines(f"Stage {stage.name}", optimizer.table(step, trained), sample))
    steps = checkpoint.begin(folder, stage, seed, lambda: runner.calibrate() if steps is None else steps)
    return runner.run(steps, console)


def derive(seed: int, *names: str | int) -> int:
    """A seed that depends on all its arguments, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class _Runner:
    """One stage on its way."""

    def __init__(
        self,
        step: Step,
        trained: list[optimizer.Trained],
        stage: Stage,
        feed: Feed,
        folder: Path,
        seed: int,
        validate: Callable[[Step], float] | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        whole = [name for name, term in step.terms.items() if not term.splits]
        if feed.micros > 1 and whole:
            raise ConfigError(
                f"stage {stage.name}: {whole[0]} compares the samples of a batch, which cannot be split",
                "set accumulate to 1",
            )
        if stage.recompute:
            step.recompute()
        self.step, self.trained, self.stage, self.feed, self.folder = step, trained, stage, feed, folder
        self.seed, self.validate, self.device, self.dtype = seed, validate, device, dtype
        self.adamw = optimizer.adamw(trained, stage.betas)
        self.watch = optimizer.Watch(step, trained)

    # ------------------------------------------------------------------------------------ the stage

    def run(self, steps: int, console: Console) -> Result:
        say = lambda text: console.print(text, soft_wrap=True, markup=False)  # noqa: E731
        saves = checkpoint.Checkpoints(self.folder / "checkpoints", self.step, self.trained, self.adamw, say)
        state = saves.resume()
        if state.step:
            say(f"stage {self.stage.name} goes on from step {state.step} of {steps}")
        metrics = log.Metrics(self.folder / "metrics.jsonl", state.step)
        evaluations = marks(self.stage.evaluate_every, steps) if self.validate else set()
        saving = marks(self.stage.save_every, steps)
        with log.Progress(console, self.stage.name, steps, state.step) as progress, interrupts(progress.say) as stopped:
            self.step.ready()
            while state.step < steps and not stopped():
                metrics.write(row := self._advance(state, steps, saves, progress.say))
                progress.show(row)
                if state.step in evaluations:
                    self._evaluate(state, metrics, saves)
                if state.step in saving:
                    saves.save(state)
            if state.step not in saving:
                saves.save(state)
        self._draw(metrics)
        if state.step < steps:
            return Result("interrupted", steps, state, None)
        saves.restore_best(state)
        return Result("done", steps, state, self._hand_over())

    def _advance(
        self, state: checkpoint.State, steps: int, saves: checkpoint.Checkpoints, say: Callable[[str], None]
    ) -> log.Row:
        """One optimizer step and its row; a step that fails leaves a checkpoint of the one before."""
        began = time.perf_counter()
        try:
            batches = self._batches(state.step)
            waited = time.perf_counter() - began
            loss, shares, norm = self._learn(state.step, steps, batches, say)
        except IsthmusError:
            if state.step:
                saves.save(state)
            raise
        seconds = time.perf_counter() - began
        samples = sum(len(batch.ids) for batch in batches)
        tokens = sum(int((batch.segment_BT > 0).sum()) for batch in batches)
        supervised = sum(int((batch.labels_BT != IGNORE).sum()) for batch in batches if batch.labels_BT is not None)
        state.step += 1
        state.samples += samples
        state.tokens += tokens
        state.supervised_tokens += supervised
        state.seconds += seconds
        state.loss = loss
        return {
            "step": state.step,
            "loss": loss,
            **({f"loss_{name}": share for name, share in shares.items()} if len(shares) > 1 else {}),
            "learning_rate": max(group["lr"] for group in self.adamw.param_groups),
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited / seconds,
            "seconds": seconds,
        }

    def _evaluate(self, state: checkpoint.State, metrics: log.Metrics, saves: checkpoint.Checkpoints) -> None:
        loss = self._validate()
        self.step.ready()
        state.validation_loss = loss
        metrics.write({"step": state.step, "validation_loss": loss})
        if state.improves(loss):
            state.best_step, state.best_loss = state.step, loss
            saves.save_best(state)

    def _validate(self) -> float:
        assert self.validate is not None  # the callers asked
        with self._autocast():
            return self.validate(self.step)

    def _hand_over(self) -> Path:
        """The Hugging Face directory of the finished stage, written once."""
        target = self.folder / "model"
        self.step.eval()
        if not target.exists():
            checkpoint.write_folder(target, self.step.vlm.save_pretrained)
        return target

    def _draw(self, metrics: log.Metrics) -> None:
        log.draw_curves(log.read_rows(metrics.file), self.folder / "curves.png", f"Stage {self.stage.name}")

    # ------------------------------------------------------------------------------------ one optimizer step

    def _batches(self, number: int) -> list[Batch]:
        return [self.feed(number, micro) for micro in range(self.feed.micros)]

    def _learn(
        self, number: int, steps: int, batches: list[Batch], say: Callable[[str], None]
    ) -> tuple[float, dict[str, float], float]:
        """Forward, backward and update: the loss, its shares by term, and the norm of the gradient."""
        torch.manual_seed(derive(self.seed, self.stage.name, number))
        shares = self._backward(batches)
        gradients = [each.parameter.grad for each in self.trained if each.parameter.grad is not None]
        norm = get_total_norm(gradients, foreach=True)
        # The one place where the host waits for the device: weights must not take a bad update.
        *values, size = torch.stack([*shares.values(), norm.to(self.device)]).tolist()
        if not all(map(math.isfinite, (*values, size))):
            self._refuse(number, batches, shares)
        if warning := self.watch.look(batches):
            say(warning)
        if self.stage.clip is not None:
            clip_grads_with_norm_([each.parameter for each in self.trained], self.stage.clip, norm, foreach=True)
        factor = optimizer.rate(number, steps, self.stage.warmup, self.stage.schedule)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adamw.step()
        self.adamw.zero_grad()
        return sum(values), dict(zip(shares, values)), size

    def _backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Gradients of a whole optimizer step; each term's share of the loss."""
        scales = self.step.scales(batches)
        sums = {name: torch.zeros((), device=self.device) for name in scales}
        for batch in batches:
            with self._autocast():
                total, shares = self.step(batch.to(self.device), scales)
            if total.requires_grad:  # text alone cannot move a connector
                total.backward()
            for name, share in shares.items():
                sums[name] += share
        return sums

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _refuse(self, number: int, batches: list[Batch], shares: dict[str, Tensor]) -> None:
        """Stop before the update, with the first bad tensor named and the batch written down."""
        bad = optimizer.first_bad(shares, self.trained)
        file = self.folder / "bad_batch.json"
        with checkpoint.writing(file):
            ids = [list(batch.ids) for batch in batches]
            checkpoint.write_text(file, json.dumps({"step": number + 1, "tensor": bad, "samples": ids}, indent=1))
        raise IsthmusError(
            f"step {number + 1}: {bad} is not finite",
            f"{file} names the samples; look at them, or lower the learning rate; the weights before it are saved",
        )

    # ------------------------------------------------------------------------------------ the clock

    def calibrate(self) -> int:
        """How many optimizer steps fit the budget's minutes, validation included; gradients are thrown away."""
        assert self.stage.budget.minutes is not None  # the other budgets count
        budget, began = self.stage.budget.minutes * 60, time.perf_counter()
        self.step.ready()
        times: list[float] = []
        while len(times) < WARM + TIMED and (len(times) <= WARM or sum(times) < GLANCE * budget):
            times.append(_seconds(lambda: self._backward(self._batches(len(times)))))
        self.adamw.zero_grad()
        validations = 0.0
        if self.validate is not None:
            share = self.stage.evaluate_every
            validations = _seconds(self._validate) * (math.ceil(1 / share) if share else 1)
        left = budget - validations - (time.perf_counter() - began)
        return max(1, int(left / statistics.mean(times[WARM:])))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def marks(share: float | None, steps: int) -> set[int]:
    """The steps after which something happens every `share` of the way, and always at the end."""
    if not share:
        return {steps}
    inner = (round(steps * share * number) for number in range(1, math.ceil(1 / share)))
    return {mark for mark in inner if mark > 0} | {steps}


@contextlib.contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM finish the step; a second one stops at once. Yields whether one has come.

    Only the main thread gets signals; elsewhere nothing is changed.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("finishing this step and saving; interrupt again to stop at once")

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
