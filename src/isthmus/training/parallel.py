"""One training over several processes, on PyTorch's own engine: replicated (DDP) or sharded (FSDP2).

Every process runs the same program on its share of each batch. What has to be the same everywhere - counts, errors,
when to stop - is agreed on with a few numbers over the CPU; nothing that travels or is stored is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from isthmus.types import ConfigError, DataError, IsthmusError, NotFinite, NothingToLearn

Number = TypeVar("Number", int, float)
AnyTensor = TypeVar("AnyTensor", bound=Tensor)

FAULTS = {kind.__name__: kind for kind in (IsthmusError, ConfigError, DataError, NothingToLearn, NotFinite)}
"""Errors by the names under which processes tell each other of them."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Numbers to agree on travel by gloo in any case, so that no accelerator waits for them."""
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the first one measures and writes reports while they do. A process that
fails is noticed by the launcher, which ends the rest."""
_LEFT: list[object] = []
"""The last group of processes, kept beyond its end. DDP holds its group, and an error's traceback holds DDP. Were DDP
the last to hold it, torch would wait for gloo's threads without giving the interpreter's lock away, and one of them may
need that lock to end: the process would hang for good."""


@dataclass(frozen=True)
class World:
    """This process among those that train together; the default is a process that trains alone."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of the process on its machine, and of the accelerator that it uses."""

    @classmethod
    def here(cls) -> World:
        """The world that a launcher such as torchrun has described in the environment; alone without one.

        Raises:
            ConfigError: the description is incomplete or not made of numbers.
        """
        if "RANK" not in os.environ:
            return cls()
        try:
            return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"RANK is set, but the rest of the launcher's environment is not right ({error})",
                "start with torchrun (see docs/scaling.md), or unset RANK to train in one process",
            ) from None

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This process's own accelerator of that type."""
        return torch.device("cuda", self.local) if self.size > 1 and device.type == "cuda" else device

    @contextmanager
    def started(self, device: torch.device) -> Iterator[None]:
        """The processes can reach each other inside; nothing happens for one that trains alone.

        Raises:
            ConfigError: there is no way to train on this device with several processes.
        """
        if self.size == 1:
            yield
            return
        if device.type not in BACKENDS:
            raise ConfigError(f"several processes cannot train together on {device.type}", "use cpu or cuda")
        if device.type == "cuda":
            torch.cuda.set_device(self.local)
        dist.init_process_group(BACKENDS[device.type], rank=self.rank, world_size=self.size, timeout=PATIENCE)
        _LEFT[:] = [dist.group.WORLD]
        try:
            yield
        finally:
            dist.destroy_process_group()

    def total(self, counts: Sequence[Number]) -> list[Number]:
        """Each number added up over all processes.

        Raises:
            IsthmusError: one of them is gone.
        """
        if self.size == 1:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.float64)  # whole numbers, too, are exact up to 2^53
        try:
            dist.all_reduce(sums)
        except RuntimeError as error:
            raise IsthmusError(
                "another process of this training is gone",
                "its own message says why; the same command goes on from the last checkpoint",
            ) from error
        return [type(count)(each) for count, each in zip(counts, sums.tolist())]

    def all_gather(self, rows: Tensor, fill: float = 0) -> Tensor:
        """The rows of all processes: the first of each, then the second of each, as batches are dealt out.

        Some may have fewer rows, or none. Where they differ in another size, `fill` stands behind what is shorter.
        Backward gives every process the gradient of its own rows, times the number of processes: it is for losses of
        which every process computes the whole and returns its share, and so needs no word from the others.
        """
        return rows if self.size == 1 else _AllGather.apply(rows, self, fill)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.total([int(flag)])[0] > 0

    def lead(self, work: Callable[[], int | None]) -> int:
        """What the first process finds (0 for None), while the others wait for it.

        Raises:
            IsthmusError: the first process failed, and why.
        """
        found = 0
        with self.together():
            if self.main:
                found = work() or 0
        return self.total([int(found)])[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails with one of our errors in one process fails with it in all: none waits for another in vain, and
        whichever ends first, its message and its exit code say why. Where several fail, all raise the first one's."""
        if self.size == 1:
            yield
            return
        fault: IsthmusError | None = None
        try:
            yield
        except IsthmusError as error:
            fault = error
        failed = self.total([int(fault is not None and rank == self.rank) for rank in range(self.size)])
        if any(failed):
            first = failed.index(1)
            heard = self._heard(fault, first)
            raise fault if fault is not None and first == self.rank else heard

    def _heard(self, own: IsthmusError | None, source: int) -> IsthmusError:
        """The fault of the process with the number `source`, in all of them; it travels as text."""
        told = [_named(own), own.cause, own.remedy] if own is not None and self.rank == source else None
        letters = torch.tensor(list(json.dumps(told).encode()) if told else [], dtype=torch.uint8)
        heard = torch.zeros(self.total([len(letters)])[0], dtype=torch.uint8)
        heard[: len(letters)] = letters
        dist.broadcast(heard, source)
        name, cause, remedy = json.loads(bytes(heard.tolist()))
        return FAULTS[name](cause, remedy)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.total([0])


def _named(fault: IsthmusError) -> str:
    """The nearest of the kinds in `FAULTS`."""
    return next(kind.__name__ for kind in type(fault).__mro__ if kind.__name__ in FAULTS)


class _AllGather(torch.autograd.Function):
    """`World.all_gather` of several processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, fill: float) -> Tensor:
        shapes = _from_all(torch.tensor(rows.shape, device=rows.device), world)
        padded = rows.new_full(torch.stack(shapes).amax(0).tolist(), fill)
        padded[tuple(map(slice, rows.shape))] = rows
        real = torch.arange(len(padded), device=rows.device)[:, None] < torch.stack(shapes)[:, 0]  # [rows, processes]
        ctx.shape, ctx.size = rows.shape, world.size
        ctx.own = real.nonzero()[:, 1] == world.rank
        return torch.stack(_from_all(padded, world), 1)[real]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        own = gradient[ctx.own]
        return own[tuple(map(slice, ctx.shape))] * ctx.size, None, None


def _from_all(tensor: Tensor, world: World) -> list[Tensor]:
    """A tensor of equal shape from every process."""
    found = [torch.empty_like(tensor) for _ in range(world.size)]
    if tensor.numel():
        dist.all_gather(found, tensor)
    return found


# ---------------------------------------------------------------------------------------------- DDP and FSDP2


def spread(
    step: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    device: torch.device,
    how: Literal["ddp", "fsdp"],
    shard_frozen: bool,
    uneven: bool,
    drifting: Iterable[str],
    lasting: Iterable[nn.Module] = (),
) -> Alone:
    """The step, ready to train in this world. With `fsdp` its parameters are other objects afterwards.

    Args:
        step: the module that trains; what trains requires gradients already.
        units: modules that are gathered one at a time when sharded. All processes must run all of them.
        shard_frozen: shard what does not train, too; otherwise every process holds it whole.
        uneven: samples may differ in which parameters they use.
        drifting: names of what every process changes alike without a gradient, so that nobody has to be sent it.
        lasting: modules that are run by themselves as well: one that is frozen is never sharded.
    """
    if world.size == 1:
        return Alone(step)
    with torch.no_grad():
        for parameter in step.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)
    if how == "ddp":
        return Replicated(step, device, uneven, drifting)
    return Sharded(step, units, world, device, shard_frozen, uneven, lasting)


class Alone:
    """One process, and nothing to exchange. What is said here of several processes holds for the classes below."""

    def __init__(self, step: nn.Module):
        self.step = step

    def __call__(self, batch: Any, scales: Any) -> Any:
        """The step's forward."""
        return self.step(batch, scales)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; with the last one gradients are averaged over processes."""
        return nullcontext()

    def rest(self) -> None:
        """After forwards without a backward."""

    def gather(self) -> None:
        """After the training: parameters are made whole in the first process, so that it can write the model."""


class Replicated(Alone):
    """DDP: every process holds everything, and gradients are averaged while the backward runs."""

    def __init__(self, step: nn.Module, device: torch.device, uneven: bool, drifting: Iterable[str]):
        super().__init__(step)
        # DDP would broadcast a whole queue at every forward. There is no public way to name single buffers.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, list(drifting))
        self.ddp = DistributedDataParallel(
            step,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,
            find_unused_parameters=uneven,
            gradient_as_bucket_view=True,
        )

    def __call__(self, batch: Any, scales: Any) -> Any:
        return self.ddp(batch, scales)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.ddp.no_sync()


class Sharded(Alone):
    """FSDP2: parameters, gradients and moments are split over the processes, and gathered unit by unit to be used.

    Scalars cannot be split: every process holds them, and their gradients are averaged here.
    """

    def __init__(
        self,
        step: nn.Module,
        units: Iterable[nn.Module],
        world: World,
        device: torch.device,
        shard_frozen: bool,
        uneven: bool,
        lasting: Iterable[nn.Module],
    ):
        super().__init__(step)
        self.world = world
        mesh = init_device_mesh(device.type, (world.size,))
        frozen = [each for each in lasting if not any(p.requires_grad for p in each.parameters())]
        held = {p for p in step.parameters() if p.ndim == 0 or not (p.requires_grad or shard_frozen)}
        held |= {p for each in frozen for p in each.parameters()}
        self.scalars = [p for p in step.parameters() if p.ndim == 0 and p.requires_grad]
        for unit in units:
            if not held.issuperset(unit.parameters()):
                fully_shard(unit, mesh=mesh, ignored_params=held)
        self.root = fully_shard(step, mesh=mesh, ignored_params=held)
        if uneven:
            self.root.set_reduce_scatter_unused_params(True)

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        self.root.set_is_last_backward(last)
        self.root.set_requires_gradient_sync(last)
        yield
        if last:
            for scalar in self.scalars:
                scalar.grad = torch.zeros_like(scalar) if scalar.grad is None else scalar.grad
                dist.all_reduce(scalar.grad)
                scalar.grad /= self.world.size

    def rest(self) -> None:
        self.root.reshard()

    def gather(self) -> None:
        """Whole on the CPU of the first process, one tensor at a time; the others keep their shards."""
        self.rest()
        done: dict[int, nn.Parameter] = {}
        for module in self.step.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in done:  # tied weights stay tied
                    full = whole(parameter.data)
                    kept = full.to("cpu", copy=True) if self.world.main else parameter.data  # a gathered one is padded
                    done[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
                setattr(module, name, done[id(parameter)])


def empty(module: nn.Module) -> None:
    """Leave a module shapes without numbers, sharded or not: FSDP's own `to` takes no parameters that were gathered."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            setattr(part, name, nn.Parameter(blank, False) if isinstance(tensor, nn.Parameter) else blank)


# ---------------------------------------------------------------------------------------------- sharded tensors


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a shard; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """All tensors whole in the first process, one after another and to its CPU where they are sharded; none in the
    others, which have to call this too."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.main:
            found[name] = full if full is tensor else full.cpu()
    return found


def like(full: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of `other`, split as that one is; scalars are never split."""
    if isinstance(other, DTensor) and full.ndim:
        full = full.to(other.device)
        return distribute_tensor(full, other.device_mesh, other.placements, src_data_rank=None)
    return full.to(other.device)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, the same in every process."""
    norms = [whole(get_total_norm(some, foreach=True)) for some in _alike(tensors)]
    return norms[0] if len(norms) == 1 else get_total_norm(norms, foreach=True)


def clip(parameters: Sequence[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale gradients, whose norm is known, down to the largest one allowed."""
    for some in _alike(parameters):
        clip_grads_with_norm_(some, largest, norm, foreach=True)


def _alike(tensors: Sequence[AnyTensor]) -> list[list[AnyTensor]]:
    """Sharded tensors and whole ones apart: one kernel cannot take both."""
    groups = ([t for t in tensors if isinstance(t, DTensor) == sharded] for sharded in (True, False))
    return [group for group in groups if group]
