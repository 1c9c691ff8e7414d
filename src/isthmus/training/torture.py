"""Training that is killed at random moments, again and again, and must end as if nothing had happened.

Every run of a toy recipe is a forked process, which starts in no time; it is ended by SIGKILL together with its
workers, as a machine that loses power would end it, and begun again until it is done. Between two starts the number
of workers and the way of saving change too: nothing in `engine` may change what is learnt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
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
from isthmus.training import machine
from isthmus.training.log import read_rows
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
    kills: int, folder: Path, seed: int = 0, tell: Callable[[int, int], None] = lambda done, total: None
) -> Outcome:
    """Kill training `kills` times and compare what it ends in with a run that was left alone.

    Args:
        folder: for runs and their data; a run that ends as it should is removed.
        tell: is called with (kills so far, kills).

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
    if not _wait(_start(recipe, folder / "whole", Engine())):
        raise IsthmusError("training failed without being killed", f"see {folder / 'whole' / 'error.txt'}")
    duration = time.monotonic() - began
    expected = contents(folder / "whole", recipe)
    while found.kills < kills:
        run = folder / f"run-{found.runs}"
        suffered, failed = _suffer(recipe, run, random, duration, min(KILLS, kills - found.kills), found)
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
            found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
        for number, row in enumerate(read_rows(run / stage.name / "metrics.jsonl")):
            kept = {key: value for key, value in row.items() if key == "step" or "loss" in key or key == "grad_norm"}
            found[f"{stage.name} row {number}"] = json.dumps(kept)
    return found


def _suffer(recipe: Recipe, run: Path, random: Random, duration: float, most: int, found: Outcome) -> tuple[int, bool]:
    """One run to its end through at most so many kills: how many there were, and whether it failed by itself."""
    for suffered in range(most):
        child = _start(recipe, run, random.choice(ENGINES))
        time.sleep(random.uniform(0, LATE * duration))
        if random.random() < SAVING:
            _await_a_save(child, run)
            time.sleep(random.uniform(0, LONG))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it was faster
            return suffered, os.waitstatus_to_exitcode(status) != 0
        found.kills += 1
        found.in_saves += any(run.rglob(".*"))
    return most, not _wait(_start(recipe, run, random.choice(ENGINES)))


def _await_a_save(child: int, run: Path) -> None:
    """Until something half-written is on the disk, or the process has ended."""
    while not any(run.glob("*/checkpoints/.*")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return


def _start(recipe: Recipe, run: Path, engine: Engine) -> int:
    """A process of its own group that trains, or goes on."""
    child = os.fork()
    if not child:
        _train(recipe.but(engine=engine), run)
    with contextlib.suppress(OSError):  # both sides see to it, so that it is done before either goes on
        os.setpgid(child, child)
    return child


def _train(recipe: Recipe, run: Path) -> NoReturn:
    """What the forked process does instead of returning."""
    code = 1
    try:
        os.setpgid(0, 0)
        run.mkdir(parents=True, exist_ok=True)
        os.environ["ISTHMUS_HOME"] = str(run / "home")
        training = Run(recipe, run, torch.device("cpu"), Console(quiet=True))
        model = training.newborn()
        training.train(model, training.look(model))
        code = 0
    except BaseException:
        (run / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _wait(child: int) -> bool:
    """Whether it ended well."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [f"{key} differs" for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
