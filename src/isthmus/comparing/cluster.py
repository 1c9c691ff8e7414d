"""The runs of a comparison on a cluster of Ray: Moritz et al. 2018, arXiv 1712.05889; https://github.com/ray-project/ray.

A Ray task per run starts the very child that `engine.Processes` starts, and hands back its exit code, so that folders
are the same whichever machine made them. All machines have to see the comparison's folder, the data and the parts under
the same paths, and have the same software. A run whose machine is lost starts again elsewhere from its last save.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.comparing.engine import GLANCE, Tell, judged, prepared, spawn, threads_of
from isthmus.comparing.plan import Job
from isthmus.errors import ConfigError, IsthmusError
from isthmus.training import locks
from isthmus.training.signals import interrupts


@dataclass
class OnRay:
    """Jobs as tasks of the cluster that `RAY_ADDRESS` names, else of one that is started on this machine.

    Each reserves the cores that `at_once` runs would leave one another here, or all of the largest machine where that
    has fewer, and an accelerator where there is one.
    """

    console: Console
    device: str = "auto"
    at_once: int = 1

    def __call__(self, jobs: Sequence[Job], tell: Tell) -> None:
        ray = connected()
        threads = self._threads(ray)
        failed: list[IsthmusError] = []
        asked = False
        with interrupts(lambda text: self.console.print(text, soft_wrap=True)) as stopped:
            going = {self._submit(ray, job, threads): job for job in jobs}
            while going:
                ended, _ = ray.wait(list(going), num_returns=1, timeout=GLANCE)
                for job, error in [(going[task], _ended(ray, task, going.pop(task), tell)) for task in ended]:
                    if error is None or asked:
                        continue
                    failed.append(error)
                    _drop(ray, [task for task, other in going.items() if other.folder.parent == job.folder.parent])
                if stopped() and not asked:
                    asked = True
                    _drop(ray, list(going))
        if asked:
            raise KeyboardInterrupt
        if failed:
            raise failed[0]

    def threads(self) -> int:
        return self._threads(connected())

    def _threads(self, ray: Any) -> int:
        """What some machine can give a run: what none has would be waited for without end.

        Raises:
            ConfigError: no machine has a core to give, or an accelerator where one is asked for.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        able = [node for node in nodes if not self.accelerators or node.get("GPU", 0) >= self.accelerators]
        if not able:
            raise ConfigError(
                f"no machine of the cluster has a GPU, which --device {self.device} asks for",
                "start `ray` on one that has (--num-gpus tells it), or compare with --device cpu",
            )
        largest = int(max(node.get("CPU", 0) for node in able))
        if not largest:
            raise ConfigError(
                "no machine of the cluster has a core to give", "start `ray` with --num-cpus of 1 or more"
            )
        return min(threads_of(self.at_once), largest)

    @property
    def accelerators(self) -> int:
        """What each run reserves of them."""
        return int(self.device.startswith("cuda"))

    def _submit(self, ray: Any, job: Job, threads: int) -> Any:
        """A task; it is queued until some machine has room."""
        task = ray.remote(num_cpus=threads, num_gpus=self.accelerators, max_calls=1)(work).options(name=job.label)
        device = self.device.partition(":")[0]  # which one of a machine's is Ray's to say
        return task.remote(str(Path.cwd()), str(prepared(job)), str(job.folder), device, threads)


def connected() -> Any:
    """Ray, with a cluster.

    Raises:
        ConfigError: it is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a comparison leaves the cluster
    os.environ.setdefault("RAY_worker_niceness", "0")  # runs here are no less urgent than the local engine's
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed", "pip install 'isthmus[ray]', or leave --engine out") from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except Exception as error:  # Ray has no type of its own for a cluster that does not come up
            cause = f"no cluster of Ray answers: {error}".splitlines()[0]
            raise ConfigError(cause, "start one with `ray start`, or unset RAY_ADDRESS for one here") from None
    return ray


def work(where: str, file: str, folder: str, device: str, threads: int) -> int:
    """One run on the machine that Ray chose, as `engine.Processes` does it; the exit code.

    A run that outlived its task holds the lock beside its folder; whoever comes next waits for it.
    """
    os.chdir(where)
    place = Path(folder)
    with locks.held(place.with_name(place.name + ".lock"), lambda: None) as lock:
        run = spawn(Path(file), place, device, threads, lock)
        try:
            while run.poll() is None:
                time.sleep(GLANCE)  # a cancelled task is interrupted between two looks
        except KeyboardInterrupt:
            run.send_signal(signal.SIGTERM)  # Ray's workers and their children do not hear SIGINT
            run.wait()
            raise
    return run.returncode


def _drop(ray: Any, tasks: Sequence[Any]) -> None:
    """Take tasks off the queue; those that are running save first."""
    for task in tasks:
        ray.cancel(task)


def _ended(ray: Any, task: Any, job: Job, tell: Tell) -> IsthmusError | None:
    """What went wrong with a task that ended; None too where it was dropped."""
    try:
        return judged(job, ray.get(task), tell)
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        return IsthmusError(f"{job.label}: {error}".splitlines()[0], "the same command goes on with what is missing")
