"""The loop around a stage: steps, validation, checkpoints, and going on exactly where it stopped.

A step is a function of (weights, moments, seed, stage, number of the step) alone: data come by number, and every step
seeds its own randomness. So a run that was interrupted and resumed equals one that was not.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from rich.console import Console, RenderableType
from torch import Tensor

from isthmus.config import Engine, Stage
from isthmus.files import writing
from isthmus.model import VLM
from isthmus.training import checkpoint, combination, curves, finite, log, machine, optimizer, parallel
from isthmus.training.budget import marks
from isthmus.training.meter import Meter
from isthmus.training.parallel import World
from isthmus.training.signals import interrupts
from isthmus.training.step import Step
from isthmus.types import IGNORE, Batch, NotFinite

WARM, TIMED, GLANCE = 2, 8, 0.05
"""Calibration runs 2 optimizer steps unmeasured and 8 measured, or as many as fit into 5 % of the budget."""

Validate: TypeAlias = Callable[[Step], float | Mapping[str, float]]


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


def run_stage(
    vlm: VLM,
    stage: Stage,
    feed: Feed,
    folder: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    validate: Validate | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
    sample: RenderableType | None = None,
    engine: Engine = Engine(),  # noqa: B008 - frozen
    world: World = World(),  # noqa: B008 - frozen
) -> Result:
    """Train one stage in `folder`, or go on with it, and hand over the model in `folder/model`.

    The model that is handed over has the weights that validated best, or the last ones without validation.

    Args:
        vlm: the model as the stage before left it, also when resuming.
        steps: how many; None measures once how many fit the budget's minutes.
        validate: the loss on held-out data, see `step.held_out`; or several figures by name, of which
            `validation_loss` decides.
        dtype: bfloat16 runs under autocast; what trains keeps float32 masters either way.
        sample: one rendered sample to show at the start.
        engine: how the machine does it, which changes nothing of what is learnt.
        world: the processes that train this stage together; `feed` gives this one's share of every batch.

    Raises:
        ConfigError: the stage does not fit the model, the feed or what the folder already holds.
        DataError: a step has nothing to learn from.
        IsthmusError: a loss or gradient is not finite, a tensor cannot be reached, memory ran out, or the disk refuses.
    """
    console = console or Console()
    torch.manual_seed(derive(seed, stage.name, "birth"))
    step = Step(vlm, stage.objectives, world)
    trained = optimizer.choose(step, stage)
    with machine.enough_memory(stage.name):
        step.to(device).accompany()
        runner = _Runner(step, trained, stage, feed, folder, seed, validate, torch.device(device), dtype, engine)
        console.print(log.first_lines(f"Stage {stage.name}", optimizer.table(step, runner.trained), sample))
        if steps is None and not world.lead(lambda: checkpoint.begun(folder)):
            steps = runner.calibrate()
        say = lambda text: console.print(text, soft_wrap=True, markup=False)  # noqa: E731
        return runner.run(world.lead(lambda: checkpoint.begin(folder, stage, seed, steps, say)), console)


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
        validate: Validate | None,
        device: torch.device,
        dtype: torch.dtype,
        engine: Engine,
    ):
        combination.check_split(stage, step.terms.values(), feed.micros)
        if stage.recompute:
            step.recompute()
        self.step, self.stage, self.feed, self.folder = step, stage, feed, folder
        self.seed, self.validate, self.device, self.dtype, self.engine = seed, validate, device, dtype, engine
        self.world = step.world
        self.spread = parallel.spread(
            step,
            step.units(),
            self.world,
            device,
            engine.parallel,
            engine.shard_frozen,
            step.uneven(),
            step.drifting(),
            step.vlm.encoders.values(),
        )
        self.trained = trained = optimizer.anew(step, trained)
        self.adamw = optimizer.adamw(trained, stage.betas)
        self.watch = optimizer.Watch(step, trained)
        ceiling = self.world.lead(lambda: int(machine.ceiling(device, dtype, folder / "machine.json")))
        self.meter = Meter(step, ceiling, device)
        if engine.compile:
            step.compile()

    # ------------------------------------------------------------------------------------ the stage

    def run(self, steps: int, console: Console) -> Result:
        say = lambda text: console.print(text, soft_wrap=True, markup=False)  # noqa: E731
        folder = self.folder / "checkpoints"
        saves = checkpoint.Checkpoints(folder, self.step, self.trained, self.adamw, say, self.engine)
        state = saves.resume()
        if state.step:
            say(f"stage {self.stage.name} goes on from step {state.step} of {steps}")
        file = self.folder / "metrics.jsonl"
        with self.world.together():
            metrics = log.Metrics(file, state.step, self.world.main, self.engine.tensorboard)
        evaluations = marks(self.stage.evaluate_every, steps) if self.validate else set()
        saving = marks(self.stage.save_every, steps)
        progress = log.Progress(console, self.stage.name, steps, state.step)
        with metrics, progress, interrupts(progress.say) as stopped, saves.settled():
            self.step.ready()
            if state.step in evaluations and self.world.lead(lambda: not state.validated(log.read_rows(file))):
                self._evaluate(state, metrics, saves)
            while state.step < steps and not self.world.any(stopped()):
                row = self._advance(state, steps, saves, progress.say)
                with self.world.together():
                    metrics.write(row)
                    saves.writer.check()
                progress.show(row)
                if state.step in evaluations:
                    self._evaluate(state, metrics, saves)
                if state.step in saving:
                    self._save(state, saves)
            if state.step not in saving:
                self._save(state, saves)
        self._draw(metrics)
        if state.step < steps:
            return Result("interrupted", steps, state, None)
        if warning := self.watch.end(self.adamw):
            say(warning)
        saves.restore_best(state)
        finite.check(self.world, state.best_step or state.step, saves.updated())
        return Result("done", steps, state, self._hand_over())

    def _save(self, state: checkpoint.State, saves: checkpoint.Checkpoints) -> None:
        finite.check(self.world, state.step, saves.updated())
        saves.save(state)

    def _advance(
        self, state: checkpoint.State, steps: int, saves: checkpoint.Checkpoints, say: Callable[[str], None]
    ) -> log.Row:
        """One optimizer step and its row; a step that fails before its update leaves a checkpoint of the one before."""
        began = time.perf_counter()
        with self._kept(state, saves):
            batches = self._batches(state.step)
            waited = time.perf_counter() - began
            loss, shares, norms = self._learn(state.step, steps, batches, say)
        seconds = time.perf_counter() - began
        samples, tokens, supervised = self.world.total(_sizes(batches))
        state.step += 1
        state.samples += samples
        state.tokens += tokens
        state.seconds += seconds
        state.loss = loss
        return {
            "step": state.step,
            "loss": loss,
            **({f"loss_{name}": share for name, share in shares.items()} if len(shares) > 1 else {}),
            "learning_rate": max(group["lr"] for group in self.adamw.param_groups),
            **norms,
            **self.step.figures(),
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": samples / seconds,
            **self.meter.read(batches, seconds),
            "data_wait": waited / seconds,
            "seconds": seconds,
        }

    @contextmanager
    def _kept(self, state: checkpoint.State, saves: checkpoint.Checkpoints) -> Iterator[None]:
        """What fails inside, in all processes, leaves a checkpoint of the state.

        There is none of a state that is not finite itself, nor of one that is not that of a finished step.
        """
        try:
            yield
        except Exception as error:
            if state.step and checkpoint.common(self.step, error):
                if sound := not self.world.any(finite.unsound(saves.updated()) is not None):
                    saves.save(state)
                if isinstance(error, NotFinite):
                    raise finite.told(error, state.step, sound) from error
            raise

    def _evaluate(self, state: checkpoint.State, metrics: log.Metrics, saves: checkpoint.Checkpoints) -> None:
        """A validation that fails leaves a checkpoint without it; a run that goes on from there has it first."""
        finite.check(self.world, state.step, saves.updated())
        with self._kept(state, saves):
            with finite.counted(self.step) as forwards:
                found = self._validate()
            loss = found["validation_loss"]
            if not math.isfinite(loss):  # NaN as the best loss would never be beaten
                finite.refuse_validation(self.step, state.step, forwards, self._validate, self._note())
            self.step.ready()
            with self.world.together():
                metrics.write({"step": state.step, **found})
        if state.improves(loss):
            state.best_step, state.best_loss = state.step, loss
            saves.save_best(state)

    def _validate(self) -> Mapping[str, float]:
        assert self.validate is not None  # the callers asked
        torch.manual_seed(derive(self.seed, self.stage.name, "validation"))  # what is drawn in it is the same each time
        with self._autocast():
            found = self.validate(self.step)
        self.spread.rest()
        return found if isinstance(found, Mapping) else {"validation_loss": found}

    def _hand_over(self) -> Path:
        """The Hugging Face directory of the finished stage, written once."""
        target = self.folder / "model"
        self.step.eval()
        self.spread.gather()
        with self.world.together():
            if self.world.main and not target.exists():
                checkpoint.write_folder(target, self.step.vlm.save_pretrained)
        return target

    def _draw(self, metrics: log.Metrics) -> None:
        file = self.folder / "curves.png"
        with self.world.together(), writing(file):
            if self.world.main:
                curves.draw_curves(log.read_rows(metrics.file), file, f"Stage {self.stage.name}")

    # ------------------------------------------------------------------------------------ one optimizer step

    def _batches(self, number: int) -> list[Batch]:
        """This process's share of a step."""
        with self.world.together():
            return [self.feed(number, micro) for micro in range(self.feed.micros)]

    def _learn(
        self, number: int, steps: int, batches: list[Batch], say: Callable[[str], None]
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """Forward, backward and update: the loss, its shares by term, and the norms of the gradient."""
        shares = self._draw_and_backward(number, batches)
        norms = {name: norm.to(self.device) for name, norm in optimizer.norms(self.trained).items()}
        # The one place where the host waits for the device: weights must not take a bad update.
        numbers = torch.stack([*shares.values(), *norms.values()]).tolist()
        terms, sizes = numbers[: len(shares)], dict(zip(norms, numbers[len(shares) :]))
        own = {kind: float(any(kind in batch.media for batch in batches)) for kind in self.step.vlm.connectors}
        totals = self.world.total([*terms, *own.values()])
        values = [total / self.world.size for total in totals[: len(terms)]]
        shown = dict(zip(own, totals[len(terms) :]))
        if not all(map(math.isfinite, (*values, *sizes.values()))):
            self._refuse(number, batches, dict(zip(shares, map(torch.tensor, values))))
        with self.world.together():
            if warning := self.watch.look(batches):
                say(warning)
        optimizer.let_rest(self.trained, {kind for kind, processes in shown.items() if not processes})
        if self.stage.clip is not None:
            parallel.clip([each.parameter for each in self.trained], self.stage.clip, norms["grad_norm"])
        factor = optimizer.rate(number, steps, self.stage.warmup, self.stage.schedule, self.stage.floor or 0.0)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.step.sound = False
        self.adamw.step()
        self.adamw.zero_grad()
        self.step.after_step()
        self.step.sound = True
        return sum(values), dict(zip(shares, values)), sizes

    def _draw_and_backward(self, number: int, batches: list[Batch]) -> dict[str, Tensor]:
        """The gradients of a step with the randomness that belongs to it."""
        own = [self.world.rank] if self.world.rank else []  # the first draws as one process alone would
        torch.manual_seed(derive(self.seed, self.stage.name, number, *own))
        return self._backward(batches)

    def _backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Gradients of a whole optimizer step; each term's share of the loss."""
        scales = self.step.scales(batches)
        sums = {name: torch.zeros((), device=self.device) for name in scales}
        self.step.sound = self.world.size == 1  # a process that fails from here on cannot wait for the others
        for number, batch in enumerate(batches, start=1):
            with self.spread.micro(last=number == len(batches)):
                with self._autocast():
                    total, shares = self.spread(batch.to(self.device), scales)
                if total.requires_grad:  # text alone cannot move a connector
                    total.backward()
            for name, share in shares.items():
                sums[name] += share
        self.step.sound = True
        return sums

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _refuse(self, number: int, batches: list[Batch], shares: dict[str, Tensor]) -> None:
        """Stop before the update, with the first bad tensor named and the batch written down."""
        again = lambda: self._draw_and_backward(number, batches)  # noqa: E731
        finite.refuse(self.step, self.trained, number + 1, batches, shares, again, self._note())

    def _note(self) -> Path:
        """Where this process names the batch that did it."""
        return self.folder / ("bad_batch.json" if self.world.main else f"bad_batch_{self.world.rank}.json")

    # ------------------------------------------------------------------------------------ the clock

    def calibrate(self) -> int:
        """How many optimizer steps fit the budget's minutes, validation included; gradients are thrown away."""
        assert self.stage.budget.minutes is not None  # the other budgets count
        budget, began = self.stage.budget.minutes * 60, time.perf_counter()
        self.step.ready()
        for number in range(WARM + TIMED):
            self._batches(number)  # makes their samples, which most steps find made
        times: list[float] = []
        while len(times) < WARM + TIMED and (len(times) <= WARM or sum(times) < GLANCE * budget):
            times.append(self._seconds(lambda: self._backward(self._batches(len(times)))))
        self.adamw.zero_grad()
        validations = 0.0
        if self.validate is not None:
            share = self.stage.evaluate_every
            validations = self._seconds(self._validate) * (math.ceil(1 / share) if share else 1)
        left = budget - validations - (time.perf_counter() - began)
        return max(1, int(left / statistics.mean(times[WARM:])))

    def _seconds(self, work: Callable[[], object]) -> float:
        """How long it takes by the clock of the first process."""
        began = time.perf_counter()
        work()
        return self.world.total([(time.perf_counter() - began) * self.world.main])[0]


def _sizes(batches: list[Batch]) -> list[int]:
    """Samples, tokens and supervised tokens."""
    labels = [batch.labels_BT for batch in batches if batch.labels_BT is not None]
    return [
        sum(len(batch.ids) for batch in batches),
        sum(int((batch.segment_BT > 0).sum()) for batch in batches),
        sum(int((each != IGNORE).sum()) for each in labels),
    ]
