"""Where numbers stopped being numbers: the first module that produced one, and the batch on which it did.

Training itself only looks at the loss and at the norm of the gradient. When either is not finite, the step is run once
more with the same randomness, this time under hooks on every module; and so is a validation. What an update made of
weights and moments is looked at before it is saved.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.files import write_text, writing
from isthmus.training.checkpoint import MOMENTS
from isthmus.training.optimizer import Trained
from isthmus.training.parallel import World, local, whole
from isthmus.training.step import Step
from isthmus.types import Batch, NotFinite


@dataclass(frozen=True)
class Fault:
    """The first tensor that is not finite, in words, and the module that made it where one did."""

    tensor: str
    module: str | None = None


def refuse(
    step: nn.Module,
    trained: Sequence[Trained],
    number: int,
    batches: Sequence[Batch],
    shares: Mapping[str, Tensor],
    again: Callable[[], object],
    note: Path,
) -> NoReturn:
    """Name the culprit of a step, write its batches down, and stop.

    Args:
        number: of the step, counted from 1.
        shares: the terms of the loss.
        again: runs forward and backward of the same step once more. With several processes all of them call it.
        note: where the culprit and the samples are named; their tensors go beside it as safetensors.

    Raises:
        NotFinite: always.
    """
    leftover = _left_over(shares, trained)  # before the gradients are overwritten
    for each in trained:
        each.parameter.grad = None
    inside = in_modules(step, again)  # by every process, or the others would wait
    fault = in_batches(batches) or inside or leftover
    raise NotFinite(f"step {number}: {fault.tensor} is not finite", _written_down(note, number, fault, batches))


def _written_down(note: Path, number: int, fault: Fault, batches: Sequence[Batch]) -> str:
    """Where the culprit and the batches are to be found from now on, and what to do."""
    tensors = note.with_suffix(".safetensors")
    with writing(note):
        save_file(tensors_of(batches), tensors)
        samples = [list(batch.ids) for batch in batches]
        content = {"step": number, "tensor": fault.tensor, "module": fault.module, "samples": samples}
        write_text(note, json.dumps(content, indent=1))
    return f"{note} names the samples and {tensors.name} beside it holds them; look at them, or lower the learning rate"


# ---------------------------------------------------------------------------------------------- what is saved


def check(world: World, number: int, updated: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse to save what the update of a step broke: a learning rate or moments beyond what numbers can hold.

    Args:
        number: of the step.
        updated: what it has written of a checkpoint, by file and name. All processes have to ask.

    Raises:
        NotFinite: a tensor is not finite in some process; all raise it.
    """
    with world.together():
        if (name := unsound(updated)) is not None:
            raise NotFinite(
                f"step {number}: {name} is not finite after the update",
                "lower the learning rate; this step is not saved, and no earlier checkpoint is touched",
            )


def unsound(updated: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first tensor that is not finite, of what this process holds of each."""
    names, finite = [], []
    for file, tensors in updated.items():
        for name, tensor in tensors.items():
            mine = local(tensor.detach())
            if mine.is_floating_point() and mine.numel():
                names.append(f"the moment {name.replace('/', ' of ')}" if file == MOMENTS else name)
                # the ends take no memory and do not overflow, and a CPU finds them twenty times sooner than a norm
                finite.append(torch.stack(torch.aminmax(mine)).isfinite().all())
    sound = torch.stack([each.to(finite[0].device) for each in finite]).tolist() if finite else []
    return next((name for name, good in zip(names, sound) if not good), None)


def told(error: NotFinite, step: int, saved: bool) -> NotFinite:
    """The same, with what became of the weights with which the loss or a gradient was not finite: those of a step."""
    sound, broken = f"a checkpoint of step {step} is saved", f"the weights of step {step} are broken too, and not saved"
    return NotFinite(error.cause, f"{error.remedy}; {sound if saved else broken}")


# ---------------------------------------------------------------------------------------------- a validation


@dataclass
class Forwards:
    """How often this process has run a step's forward in one validation."""

    done: int = 0
    bad: int = 0
    """The number of the first one, counted from 1, whose loss is not finite; 0 if there is none."""


@contextlib.contextmanager
def counted(step: Step) -> Iterator[Forwards]:
    """What forwards the step does inside."""
    found = Forwards()

    def after(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        found.done += 1
        if not found.bad and not _finite(output[0]):
            found.bad = found.done

    handle = step.register_forward_hook(after)
    try:
        yield found
    finally:
        handle.remove()


def refuse_validation(step: Step, number: int, own: Forwards, again: Callable[[], object], note: Path) -> NoReturn:
    """Name the culprit of a validation, write the first batch down whose loss is not finite, and stop.

    Args:
        number: of the step after which it was.
        own: its forwards in this process.
        again: runs the same validation once more. With several processes all of them call it.
        note: where the culprit and the samples are named; their tensors go beside it as safetensors.

    Raises:
        NotFinite: always.
    """
    world = step.world
    firsts = world.total([own.bad * (rank == world.rank) for rank in range(world.size)])
    first = min(filter(None, firsts), default=0)
    found = in_forward(step, first, again) if first else None  # by every process, or the others would wait
    with world.together():
        if found is not None and own.bad == first:
            fault, batch = found
            raise NotFinite(
                f"step {number}: the validation loss is not finite; the first such tensor is {fault.tensor}",
                _written_down(note, number, fault, [batch]),
            )
    raise NotFinite(f"step {number}: the validation loss is not finite", "lower the learning rate, or look at the data")


def in_forward(step: Step, number: int, again: Callable[[], object]) -> tuple[Fault, Batch] | None:
    """Run a validation again and watch the forward of that number, counted from 1: its first fault, and its batch."""
    faults, found = list[Fault](), list[tuple[Fault, Batch]]()
    watching = contextlib.ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if forwards.done == number - 1:
            watching.enter_context(_watched(step, faults))

    def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        if forwards.done == number:
            watching.close()
            inside = faults[0] if faults else _of_terms(output[1])
            found.append((in_batches(args[:1]) or inside or Fault("the sum of its terms"), args[0]))

    with watching, counted(step) as forwards, torch.compiler.set_stance("force_eager"):
        handles = [step.register_forward_pre_hook(before), step.register_forward_hook(after)]
        try:
            again()
        finally:
            for handle in handles:
                handle.remove()
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------- what went in


def in_batches(batches: Sequence[Batch]) -> Fault | None:
    """A medium of the batches that is not finite before any module has seen it."""
    for batch in batches:
        for kind, media in batch.media.items():
            for what, tensor in (
                ("pixels", media.pixels),
                ("features", media.features.x_NSE if media.features else None),
            ):
                if tensor is not None and not _finite(tensor):
                    bad = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
                    return Fault(f"a value in the {what} of {kind} {bad + 1}{_of_sample(batch, int(media.row_N[bad]))}")
    return None


def tensors_of(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Every tensor of the batches by dotted name, the number of the micro-batch first: `0.media.image.pixels`."""
    named = {name: tensor for number, batch in enumerate(batches) for name, tensor in _named(batch, f"{number}")}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}


def _of_sample(batch: Batch, row: int) -> str:
    """Which sample a row belongs to, where every row is one."""
    return f" (sample {batch.ids[row]})" if len(batch.ids) == len(batch.input_ids_BT) else f" (row {row + 1})"


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}")
    elif is_dataclass(value):
        for each in fields(value):
            yield from _named(getattr(value, each.name), f"{name}.{each.name}")
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _named(item, f"{name}.{place}")


# ---------------------------------------------------------------------------------------------- what was computed


def in_modules(step: nn.Module, again: Callable[[], object]) -> Fault | None:
    """Run the step again and watch what every module takes and gives, forward and backward; the first bad one."""
    faults: list[Fault] = []
    with _watched(step, faults), torch.compiler.set_stance("force_eager"):
        again()
    return faults[0] if faults else None


@contextlib.contextmanager
def _watched(step: nn.Module, faults: list[Fault]) -> Iterator[None]:
    """Hooks on every module that note what is not finite, in the order in which it is computed."""
    handles = []
    for name, module in step.named_modules():
        if name:
            probe = _Probe(name, faults)
            handles.append(module.register_forward_pre_hook(probe.before, with_kwargs=True))
            handles.append(module.register_forward_hook(probe.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Probe:
    """The hooks of one module.

    Its inputs are replaced by aliases of their own, so that the gradient which flows out of this module is seen
    before it is added to that of the other readers of the same tensor.
    """

    name: str
    faults: list[Fault]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for key, parameter in module.named_parameters(recurse=False):
            if not _finite(whole(parameter)):
                self._note(f"the weight {self.name}.{key}")
        return tuple(map(self._enter, args)), {key: self._enter(value) for key, value in kwargs.items()}

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for _, tensor in _named(output, ""):
            if not _finite(tensor):
                self._note(f"the output of {self.name}")
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._look(gradient, "the gradient that reaches the output of"))

    def _enter(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if bool(value.isnan().any()):  # masks may be infinite
            self._note(f"the input of {self.name}")
        if not value.requires_grad:
            return value
        alias = value.view_as(value)
        alias.register_hook(lambda gradient: self._look(gradient, "the gradient that comes out of"))
        return alias

    def _look(self, tensor: Tensor, what: str) -> None:
        if not _finite(tensor):
            self._note(f"{what} {self.name}")

    def _note(self, tensor: str) -> None:
        self.faults.append(Fault(tensor, self.name))


def _left_over(shares: Mapping[str, Tensor], trained: Sequence[Trained]) -> Fault:
    """What was seen without hooks: a term of the loss, else a gradient, else their norm, which can overflow alone."""
    if fault := _of_terms(shares):
        return fault
    for each in trained:
        if each.parameter.grad is not None and not _finite(whole(each.parameter.grad)):
            return Fault(f"the gradient of {each.name}", each.name.rpartition(".")[0])
    return Fault("the norm of all gradients")


def _of_terms(shares: Mapping[str, Tensor]) -> Fault | None:
    return next((Fault(f"the loss {name} ({float(each)})") for name, each in shares.items() if not _finite(each)), None)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
