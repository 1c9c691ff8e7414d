"""What a run leaves on disk so that it can go on exactly where it stopped, whatever stops it.

A checkpoint is a folder that appears by one rename, when all that is in it has reached the disk: what trains, the
optimizer's moments, slow copies and queues, counters, and a manifest with the sha256 of each file. There is no random
state in it, because every step derives its own seed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.config import Engine, Stage
from isthmus.files import read_json, remove, sha256, sync, write_text, writing
from isthmus.training import agreement
from isthmus.training.optimizer import Trained
from isthmus.training.parallel import gathered, like
from isthmus.training.step import Step
from isthmus.types import ConfigError, IsthmusError

WEIGHTS, MOMENTS, STATE, MANIFEST = "trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
DRIFTING = "drifting.safetensors"
"""Slow copies and queues, where a stage has some."""
NUMBERED = re.compile(r"-\d+$")
"""How names of checkpoints end."""
AGAIN = "remove the folder to start the stage over"


@dataclass
class State:
    """Where a stage stands at the border between two optimizer steps."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None

    def improves(self, loss: float) -> bool:
        return self.best_loss is None or loss < self.best_loss

    def validated(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the log has a validation at this step, and the state knows of it."""
        found = [row["validation_loss"] for row in rows if row["step"] == self.step and "validation_loss" in row]
        return bool(found) and not self.improves(found[-1])


class Checkpoints:
    """The checkpoints of one stage: `step-*` to go on from, `best-*` to hand over.

    Args:
        folder: where they live.
        step, trained, optimizer: what is saved and filled.
        say: is told about damaged checkpoints that were passed over.
        engine: how many stay, and whether they are written beside the training.
    """

    def __init__(
        self,
        folder: Path,
        step: Step,
        trained: Sequence[Trained],
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        engine: Engine = Engine(),  # noqa: B008 - frozen
    ):
        self.folder, self.step, self.trained, self.optimizer, self.say = folder, step, trained, optimizer, say
        self.keep, self.writer = engine.keep, Writer(engine.save_async)

    def save(self, state: State) -> None:
        """Write a resumable checkpoint and drop all but the last ones; see `Writer` for when an error is raised."""
        self._write("step", state, self.held(), self.keep)

    def held(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a resumable checkpoint has, by file."""
        return self.updated() | {WEIGHTS: self._moving()}

    def updated(self) -> dict[str, dict[str, Tensor]]:
        """Those of them that an update writes; buffers may hold what they like, such as a mask's minus infinity."""
        drifting = self.step.drifting()
        more = {DRIFTING: drifting} if drifting else {}
        return {WEIGHTS: self._weights(), MOMENTS: self._moments(), **more}

    def save_best(self, state: State) -> None:
        """Write the weights that validated best so far, and drop those they beat."""
        self._write("best", state, {WEIGHTS: self._moving()}, keep=1)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """However it is left, all saves have ended then; one that failed is told in place of what ended it."""
        try:
            yield
        except BaseException as error:
            if common(self.step, error):
                self.step.world.lead(self.writer.close)
            else:
                self.writer.close()
            raise
        self.step.world.lead(self.writer.close)

    def resume(self) -> State:
        """Fill weights and moments from the newest sound checkpoint; a fresh `State` when there is none.

        Raises:
            IsthmusError: a sound checkpoint holds other tensors than the model has.
        """
        newest = self.step.world.lead(self._newest)
        self.step.world.barrier()
        if not newest:
            return State()
        folder = self.folder / f"step-{newest:07d}"
        _copy(folder / WEIGHTS, self._moving())
        if drifting := self.step.drifting():
            _copy(folder / DRIFTING, drifting)
        self._set_moments(folder / MOMENTS)
        kept = {field.name for field in fields(State)}
        return State(**{key: value for key, value in read_json(folder / STATE, AGAIN).items() if key in kept})

    def _newest(self) -> int:
        """The step of the newest sound checkpoint, 0 without one; what is left of interrupted saves is cleared away."""
        for stray in self.folder.glob(".*"):
            self.say(f"{stray} was left half-written by an interrupted save; removed")
            shutil.rmtree(stray, ignore_errors=True)
        newest = 0
        for folder in self._found("step"):
            fault = damage(folder)
            if fault is None:
                newest = _number(folder)
                break
            self.say(f"{fault}; going back to the checkpoint before")
        self._forget_after(newest)
        return newest

    def restore_best(self, state: State) -> None:
        """Fill the weights that validated best, if they are not the present ones."""
        self.step.world.lead(self.writer.join)
        if state.best_step in (None, state.step):
            return
        folder = self.folder / f"best-{state.best_step:07d}"
        if fault := damage(folder):
            self.say(f"{fault}; the last weights are kept instead of the best")
            return
        _copy(folder / WEIGHTS, self._moving())

    def _write(self, kind: str, state: State, files: dict[str, dict[str, Tensor]], keep: int) -> None:
        target, state = self.folder / f"{kind}-{state.step:07d}", replace(state)
        world = self.step.world
        if world.lead(lambda: self._has(target)):  # never removed for the sake of an equal one
            return
        files = {name: self.writer.own(gathered(tensors, world)) for name, tensors in files.items()}

        def work() -> None:
            write_folder(target, lambda folder: _fill(folder, files, state))
            for old in self._found(kind)[keep:]:
                remove(old)

        world.lead(lambda: self.writer(work))

    def _has(self, target: Path) -> bool:
        """Whether a sound checkpoint is there already, once all saves are done."""
        self.writer.join()
        return damage(target) is None

    def _found(self, kind: str) -> list[Path]:
        """Finished checkpoints of a kind, newest first; folders that others put beside them are not among them."""
        return sorted((path for path in self.folder.glob(f"{kind}-*") if NUMBERED.search(path.name)), reverse=True)

    def _forget_after(self, step: int) -> None:
        """Drop what lies ahead of where the run goes on: damaged, or the best of steps that will be run again."""
        for folder in [*self._found("step"), *self._found("best")]:
            if _number(folder) > step:
                remove(folder)

    def _moving(self) -> dict[str, Tensor]:
        """Everything that training changes: trainable tensors, and statistics of the modules that own them."""
        moving = self._weights()
        owners = {name.rpartition(".")[0] for name in moving}
        kept = self.step.state_dict()
        buffers = {name: buffer for name, buffer in self.step.named_buffers() if name.rpartition(".")[0] in owners}
        return moving | {name: buffer for name, buffer in buffers.items() if name in kept}

    def _weights(self) -> dict[str, Tensor]:
        return {each.name: each.parameter.data for each in self.trained}

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{field}/{each.name}": tensor
            for each in self.trained
            for field, tensor in self.optimizer.state[each.parameter].items()
        }

    def _set_moments(self, file: Path) -> None:
        parameters = {each.name: each.parameter for each in self.trained}
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                field, _, name = key.partition("/")
                parameter = parameters[name]
                self.optimizer.state[parameter][field] = like(tensors.get_tensor(key), parameter)


class Writer:
    """Does one save at a time: at once, or beside the training in a thread.

    What fails beside the training is raised by the next call of any method.
    """

    def __init__(self, beside: bool):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if beside else None
        self._pending: Future[None] | None = None

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they will be written: copies, if the training goes on meanwhile."""
        if self._pool is None:
            return dict(tensors)
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}

    def __call__(self, work: Callable[[], None]) -> None:
        """Do this, after what is still being done."""
        self.join()
        if self._pool is None:
            work()
        else:
            self._pending = self._pool.submit(work)

    def check(self) -> None:
        """Raise what has gone wrong meanwhile; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.join()

    def join(self) -> None:
        """Wait until all is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """The same for good: no thread is left."""
        if self._pool is not None:
            self._pool.shutdown()
        self.join()


def common(step: Step, error: BaseException) -> bool:
    """Whether all processes have failed with it, as they do with our errors, so that they can act on it together."""
    return step.sound and (step.world.size == 1 or isinstance(error, IsthmusError))


def begun(folder: Path) -> bool:
    """Whether a stage has settings to keep to in this folder: a step was saved under them, or the model handed over."""
    done = any((folder / "checkpoints").glob("step-*")) or (folder / "model").is_dir()
    return done and (folder / MANIFEST).is_file()


def clear(folder: Path) -> None:
    """Forget the settings of a stage that has not begun, by whose note others would take it for one that has."""
    if not begun(folder):
        with writing(folder / MANIFEST):
            (folder / MANIFEST).unlink(missing_ok=True)


def begin(folder: Path, stage: Stage, seed: int, steps: int | None, say: Callable[[str], None]) -> int:
    """The number of steps of the stage in this folder: `steps` when it begins, read back ever after.

    `say` is told of what differs from then and may; see `agreement`.

    Raises:
        ConfigError: the folder holds a run of another stage; what differs is named.
    """
    file = folder / MANIFEST
    wanted = {"seed": seed, **stage.model_dump(mode="json")}
    manifest: dict[str, Any] = read_json(file, AGAIN) if begun(folder) else {"run": wanted, "steps": steps}
    wrong, said = agreement.of_stage(manifest["run"], wanted)
    if wrong:
        raise ConfigError(
            f"{folder} holds stage {stage.name} of another run: {agreement.told(wrong)}",
            "name another output folder, or remove this one to start over",
        )
    for text in said:
        say(f"stage {stage.name}: {text}")
    manifest |= {"run": wanted, **({"changed": [*manifest.get("changed", []), *said]} if said else {})}
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(manifest, indent=1))
    return manifest["steps"]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None if it is sound."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        for name, known in hashes.items():
            if sha256(folder / name) != known:
                return f"{folder / name} is damaged (its content is not what was saved)"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    return None


# ---------------------------------------------------------------------------------------------- whole folders


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear at once, with all its files on the disk, in place of an earlier one.

    Raises:
        IsthmusError: it cannot be written; what was there before is intact.
    """
    part = target.with_name(f".{target.name}.part")
    with writing(target):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            fill(part)
            for path in [*part.rglob("*"), part]:
                sync(path)
            remove(target)
            part.rename(target)
            sync(target.parent)
        except Exception:
            shutil.rmtree(part, ignore_errors=True)  # a full disk gets its space back
            raise


# ---------------------------------------------------------------------------------------------- inside


def _fill(folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: State) -> None:
    for name, tensors in files.items():
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1))
    hashes = {name: sha256(folder / name) for name in (*files, STATE)}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))


def _number(folder: Path) -> int:
    """The step of a checkpoint."""
    return int(folder.name.partition("-")[2])


def _copy(file: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from a file that must hold exactly them."""
    with safe_open(file, framework="pt") as tensors:
        if wrong := set(tensors.keys()) ^ set(into):
            raise IsthmusError(
                f"{file} and the model do not hold the same tensors: {sorted(wrong)[:3]}",
                "resume with the recipe that began the run, or name another output folder",
            )
        for key, tensor in into.items():
            tensor.copy_(like(tensors.get_tensor(key), tensor))
