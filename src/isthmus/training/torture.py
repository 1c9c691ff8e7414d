"""Training that is killed at random moments, again and again, and must end as if nothing had happened.

Every run of a toy recipe is a forked process, which starts in no time; it is ended by SIGKILL together with its
workers, as a machine that loses power would end it, and begun again until it is done. Between two starts the number
of workers and the way of saving change too: nothing in `engine` may change what is learnt. Several ranks are forked by
a launcher in front of them, and die with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NoReturn

import torch
from rich.console import Console

from isthmus.config import Engine, Recipe
from isthmus.files import sha256
from isthmus.training import locks, machine
from isthmus.training.log import read_rows
from isthmus.training.parallel import World
from isthmus.training.run import Run
from isthmus.training.toy import toy
from isthmus.types import ConfigError, IsthmusError

KILLS = 6
"""A run is killed at most so often before it is left alone."""
LATE = 1.1
"""A kill comes at a random moment within so many times the duration of an undisturbed run."""
SAVING, LONG = 0.6, 0.004
"""Share of the kills that are put off until the next save, and the seconds over which they then fall."""
ENGINES = tuple(Engine(workers=workers, save_async=beside) for workers in (0, 1) for beside in (False, True))


@dataclass
class Outcome:
    """What became of runs that were killed."""

    runs: int = 0
    kills: int = 0
    survived: int = 0
    """Kills after which the run ended exactly as the one that was left alone."""
    in_saves: int = 0
    """Kills that left something half-written behind."""
    faults: list[str] = field(default_factory=list)
    """Runs that failed or ended otherwise, and in what."""


def torture(
    kills: int, folder: Path, seed: int = 0, tell: Callable[[int, int], None] = lambda done, total: None, ranks: int = 1
) -> Outcome:
    """Kill training `kills` times and compare what it ends in with a run that was left alone.

    Args:
        folder: for runs and their data; a run that ends as it should is removed.
        tell: is called with (kills so far, kills).
        ranks: processes that train together, over gloo; all of them are killed at once.

    Raises:
        ConfigError: this system cannot fork.
        IsthmusError: the run that was left alone failed.
    """
    if not hasattr(os, "fork"):
        raise ConfigError("torture needs a system that forks processes", "run it on Linux or macOS")
    torch.set_num_threads(1)  # threads do not survive a fork
    machine.measured_ceiling(torch.device("cpu"), torch.float32, 1)  # once for all of the processes
    random, found = Random(seed), Outcome()
    recipe = toy(folder / "parts")
    began = time.monotonic()
    if not _start(recipe, folder / "whole", Engine(), ranks).ends_well():
        raise IsthmusError("training failed without being killed", f"see {folder / 'whole' / 'error.txt'}")
    duration = time.monotonic() - began
    expected = contents(folder / "whole", recipe)
    while found.kills < kills:
        run = folder / f"run-{found.runs}"
        suffered, failed = _suffer(recipe, run, random, duration, min(KILLS, kills - found.kills), found, ranks)
        found.runs += 1
        differing = ["it failed: see error.txt"] if failed else _differences(expected, contents(run, recipe))
        if differing:
            found.faults.append(f"{run}: {'; '.join(differing[:3])}")
        else:
            found.survived += suffered
            shutil.rmtree(run)
        tell(found.kills, kills)
    return found


def contents(run: Path, recipe: Recipe) -> dict[str, str]:
    """All that a finished run amounts to: hashes of weights and moments, every loss and every counter."""
    found: dict[str, str] = {}
    for stage in recipe.stages:
        for file in sorted((run / stage.name).rglob("*.safetensors")):
            found[str(file.relative_to(run))] = sha256(file)
        for number, row in enumerate(read_rows(run / stage.name / "metrics.jsonl")):
            kept = {key: value for key, value in row.items() if key == "step" or "loss" in key or key == "grad_norm"}
            found[f"{stage.name} row {number}"] = json.dumps(kept)
    return found


def _suffer(
    recipe: Recipe, run: Path, random: Random, duration: float, most: int, found: Outcome, ranks: int
) -> tuple[int, bool]:
    """One run to its end through at most so many kills: how many there were, and whether it failed by itself."""
    for suffered in range(most):
        child = _start(recipe, run, random.choice(ENGINES), ranks)
        time.sleep(random.uniform(0, LATE * duration))
        if random.random() < SAVING:
            _await_a_save(child, run)
            time.sleep(random.uniform(0, LONG))
        if not child.killed():  # it was faster
            return suffered, not child.ends_well()
        found.kills += 1
        found.in_saves += any(run.rglob(".*"))
    return most, not _start(recipe, run, random.choice(ENGINES), ranks).ends_well()


def _await_a_save(child: Group, run: Path) -> None:
    """Until something half-written is on the disk, or the process has ended."""
    while not any(run.glob("*/checkpoints/.*")):
        if child.ended():
            return


@dataclass
class Group:
    """A process, the leader of a group, with all that it starts. Each of them holds `end` of a pipe open."""

    leader: int
    end: int
    status: int | None = None

    def ended(self) -> bool:
        """Whether the leader has ended; it is not waited for."""
        return os.waitid(os.P_PID, self.leader, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def killed(self) -> bool:
        """Kill all of them; False if the leader had ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.leader, signal.SIGKILL)
        return os.WIFSIGNALED(self._wait())

    def ends_well(self) -> bool:
        """Wait for its end, and say whether it was a good one."""
        return os.waitstatus_to_exitcode(self._wait()) == 0

    def _wait(self) -> int:
        if self.status is None:
            _, self.status = os.waitpid(self.leader, 0)
            os.read(self.end, 1)  # nothing comes but the end, when the last one is gone: a new run must not meet it
            os.close(self.end)
        return self.status


def _start(recipe: Recipe, run: Path, engine: Engine, ranks: int = 1) -> Group:
    """Processes in a group of their own that train, or go on."""
    end, held = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            recipe = recipe.but(engine=engine)
            _train(recipe, run) if ranks == 1 else _launch(recipe, run, ranks)
        finally:
            os._exit(1)
    os.close(held)
    with contextlib.suppress(OSError):  # both sides see to it, so that it is done before either goes on
        os.setpgid(child, child)
    return Group(child, end)


def _launch(recipe: Recipe, run: Path, ranks: int) -> NoReturn:
    """Start all ranks on this machine, as torchrun does, and end all of them when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _train(recipe, run, rank)
        children.add(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    os._exit(failed)


def _train(recipe: Recipe, run: Path, rank: int = 0) -> NoReturn:
    """What a forked process does instead of returning."""
    code = 1
    try:
        run.mkdir(parents=True, exist_ok=True)
        os.environ["ISTHMUS_HOME"] = str(run / "home")
        cpu, world = torch.device("cpu"), World.here()
        with world.started(cpu), locks.alone(run, world):
            training = Run(recipe, run, cpu, Console(quiet=True), world)
            model = training.newborn()
            training.train(model, training.look(model))
        code = 0
    except BaseException:
        (run / (f"error-{rank}.txt" if rank else "error.txt")).write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [f"{key} differs" for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
