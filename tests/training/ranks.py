"""Several processes of one training, on one machine over gloo: what tests start, and what runs inside."""

from __future__ import annotations

import errno
import gc
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.config import Engine, Recipe, Stage
from isthmus.training import checkpoint, optimizer
from isthmus.training.loop import run_stage
from isthmus.training.optimizer import Trained, choose
from isthmus.training.parallel import World, local, spread
from isthmus.training.run import Feed, mix_of, train
from isthmus.training.step import Step, held_out
from isthmus.types import Batch, DataError, IsthmusError

PATIENCE = 120
"""Seconds after which processes that have not ended count as hanging."""

PRELOADED = [
    "isthmus.training.run",
    "isthmus.aligners.llava",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
]
"""What takes long to import is imported once, in the process that the others are forked from."""


def start(size: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """Run `work(world, *arguments)` in `size` processes; their exit codes. Processes that hang are ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_inside, args=(rank, size, port, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} of {size} hang"
    return [process.exitcode or 0 for process in processes]


def _inside(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    work(World.here(), *arguments)


@dataclass
class Share(small.Colours):
    """One process's rows of what `Colours` gives a process that is alone."""

    world: World = World()
    texts: tuple[int, ...] = ()
    """Numbers of the rows that are conversations without a picture."""
    silent: tuple[int, ...] = ()
    """Steps in which all of them are."""

    def __call__(self, step: int, micro: int) -> Batch:
        numbers = [step * self.size + row for row in range(self.size)]
        mine = numbers[self.world.rank :: self.world.size][micro :: self.micros]
        texts = range(self.size) if step in self.silent else self.texts
        chosen = [small.text(n) if n % self.size in texts else small.sample(n) for n in mine]
        return self.vlm.processor.collator()(chosen)


def learn(
    world: World,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    engine: Engine = Engine(),  # noqa: B008
    feed: type[Share] = Share,
    steps: int | None = 6,
    **more: Any,
) -> None:
    """One stage to its end, by one process of a world."""
    vlm = small.build(recipe)
    alone = Share(vlm, size=stage.batch_size)
    share = feed(vlm, size=stage.batch_size, micros=stage.accumulate, world=world, **more)
    validate = held_out([alone(number, 0) for number in (50, 51, 52)])
    console = small.quiet()
    common = {"steps": steps, "validate": validate, "console": console, "engine": engine, "world": world}
    with world.started(torch.device("cpu")):
        run_stage(vlm, stage, share, folder, **common)  # type: ignore[arg-type]


class Stopped(Share):
    """SIGTERM comes to the last process alone, while it prepares the third step."""

    def __call__(self, step: int, micro: int) -> Batch:
        if step == 2 and micro == 0 and self.world.rank == self.world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(step, micro)


class Faulty(Share):
    """The third step has a picture that the last process cannot read."""

    def __call__(self, step: int, micro: int) -> Batch:
        if step == 2 and self.world.rank == self.world.size - 1:
            raise DataError("cat.png: cannot be read", "mend it")
        return super().__call__(step, micro)


def fail(
    world: World,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    engine: Engine,
    feed: type[Share] = Faulty,
    steps: int | None = 6,
) -> None:
    """What every process says of a fault in one of them, and its exit code, as the command line does."""
    with _telling(world, folder):
        learn(world, recipe, stage, folder, engine, feed, steps)


def full(world: World, recipe: Recipe, stage: Stage, folder: Path) -> None:
    """The same where the first process, which saves beside the training, finds its disk full."""

    def fill(*unused: Any) -> None:
        time.sleep(0.3)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_fill", fill)
        fail(world, recipe, stage, folder, Engine(save_async=True))


@contextmanager
def _telling(world: World, folder: Path) -> Iterator[None]:
    try:
        yield
    except IsthmusError as error:
        (folder / f"said-{world.rank}").write_text(str(error))
        sys.exit(error.code)


def broken(world: World, recipe: Recipe, stage: Stage, folder: Path, engine: Engine) -> None:
    """What every process says where moments overflow in the last one alone, in front of the third step."""
    optimizers, real = list[torch.optim.Optimizer](), optimizer.adamw

    def adamw(*arguments: Any) -> torch.optim.Optimizer:
        optimizers.append(real(*arguments))
        return optimizers[0]

    class Breaking(Share):
        def __call__(self, step: int, micro: int) -> Batch:
            if step == 2 and world.rank == world.size - 1:
                shards = [local(state["exp_avg"]) for state in optimizers[0].state.values()]
                next(shard for shard in shards if shard.numel()).fill_(torch.inf)
            return super().__call__(step, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "adamw", adamw)
        fail(world, recipe, stage, folder, engine, Breaking)


def invalid(world: World, recipe: Recipe, stage: Stage, folder: Path, engine: Engine) -> None:
    """What every process says of a validation of three batches; the second, the last process's, is no numbers."""
    vlm = small.build(recipe)
    batches = [Share(vlm)(number, 0) for number in (50, 51, 52)]
    batches[1].media["image"].pixels.fill_(torch.nan)
    common = {"steps": 6, "validate": held_out(batches), "console": small.quiet(), "engine": engine, "world": world}
    with world.started(torch.device("cpu")), _telling(world, folder):
        run_stage(vlm, stage, Share(vlm, size=stage.batch_size, world=world), folder, **common)  # type: ignore[arg-type]


def heard(world: World, recipe: Recipe, stage: Stage, folder: Path, more: dict[str, Any]) -> None:
    """What the first process prints, whose feed has options."""
    console = Console(file=io.StringIO(), width=400, quiet=not world.main)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "quiet", lambda: console)
        learn(world, recipe, stage, folder, **more)
    if world.main:
        (folder / "heard.txt").write_text(console.file.getvalue())  # type: ignore[attr-defined]


def unvalidated(world: World, recipe: Recipe, stage: Stage, folder: Path, engine: Engine, together: bool) -> None:
    """A validation that fails in all processes after some work, or in the last one amid it; each says how it ends."""
    vlm = small.build(recipe)
    good, mute = (Share(vlm)(50, 0) for _ in range(2))
    mute.labels_BT.fill_(-100)

    def raise_(*arguments: Any) -> None:
        raise DataError("cat.png: cannot be read", "mend it")

    def validate(step: Step) -> float:
        if not together and world.rank == world.size - 1:
            step.register_forward_pre_hook(raise_)
        held_out([good] * 2)(step)
        return held_out([mute] * 2)(step)

    feed = Share(vlm, size=stage.batch_size, world=world)
    with world.started(torch.device("cpu")):
        try:
            common = {"steps": 6, "validate": validate, "console": small.quiet(), "engine": engine, "world": world}
            run_stage(vlm, stage, feed, folder, **common)  # type: ignore[arg-type]
        except IsthmusError as error:
            sys.exit(error.code)


def leave(world: World, folder: Path) -> None:
    """How many threads a process has before and after DDP is gone, whose world has come to its end before."""
    with world.started(torch.device("cpu")):
        held = spread(nn.Linear(1, 1), (), world, torch.device("cpu"), "ddp", False, False, ())
    found = [len(list(Path("/proc/self/task").iterdir()))]
    del held
    gc.collect()
    found.append(len(list(Path("/proc/self/task").iterdir())))
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def gone(world: World, folder: Path) -> None:
    """One process is killed, and the other says what it hears of that."""
    with world.started(torch.device("cpu")):
        world.barrier()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            world.barrier()
        except IsthmusError as error:
            (folder / "said").write_text(error.cause)


def whole(world: World, recipe: Recipe, folder: Path, home: Path) -> None:
    """All stages of a recipe, as `isthmus train` runs them."""
    os.environ["ISTHMUS_HOME"] = str(home)
    train(recipe, folder, torch.device("cpu"), small.quiet())


def queues(world: World, recipe: Recipe, stage: Stage, folder: Path) -> None:
    """What is in each process's queue, which differ, after a forward of them together, written down by each."""
    step = Step(small.build(recipe), stage.objectives, world)
    choose(step, stage)
    step.accompany()
    step.ready()
    keys = step.objectives["itc"].queues["image"].key_K.fill_(world.rank)
    batch, device = small.Colours(step.vlm)(0, 0), torch.device("cpu")
    with world.started(device):
        spread(step, (), world, device, "ddp", False, step.uneven(), step.drifting())(batch, step.scales([batch]))
        (folder / f"{world.rank}.json").write_text(json.dumps(keys.tolist()))


def gradients(world: World, recipe: Recipe, stages: dict[str, Stage], folder: Path) -> None:
    """The gradient of the first step of each stage, as the optimizer gets it, written down by the first process."""
    norms = optimizer.norms
    with world.started(torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
        for name, stage in stages.items():

            def noted(trained: Sequence[Trained], name: str = name) -> dict[str, Tensor]:
                if world.main:
                    save_file({each.name: each.parameter.grad for each in trained}, folder / f"{name}.safetensors")
                return norms(trained)

            patch.setattr(optimizer, "norms", noted)
            vlm, data = small.build(recipe), mix_of(stage, 0)
            feed = Feed(stage, data, vlm.processor.collator(max_length=stage.max_length), 0, world)
            run_stage(vlm, stage, feed, folder / name, steps=1, console=small.quiet(), world=world)


def agree(world: World, folder: Path) -> None:
    """What processes agree on, written down by each."""
    with world.started(torch.device("cpu")):
        found = [
            world.total([1, world.rank]),
            world.total([0.5]),
            world.total([0.5 if world.main else 0]),  # one process has whole numbers where another has not
            world.any(world.rank == 1),
            world.any(False),
            world.lead(lambda: 7 + world.rank),
        ]
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
