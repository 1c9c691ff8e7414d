"""The module that is trained: a VLM, the terms of its loss, and companions such as a teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from isthmus import graft, objectives, sites
from isthmus.config import ObjectiveConfig
from isthmus.model import VLM
from isthmus.training.momentum import Momentum
from isthmus.training.parallel import World, whole
from isthmus.types import IGNORE, Batch, ConfigError, NothingToLearn

RUNGS = ("encoded", "connected", "hidden")
"""What a term may need of the model, each with all before it."""


class Step(nn.Module):
    """One forward of everything that a stage trains; what touches a part of the model happens inside it.

    Args:
        vlm: the model.
        terms: the stage's objectives with their weights and options.
        world: the processes that train together, to which every batch is dealt out.

    Raises:
        ConfigError: an objective is unknown, named twice, or not for this model.
    """

    def __init__(self, vlm: VLM, terms: Sequence[ObjectiveConfig], world: World = World()):  # noqa: B008 - frozen
        super().__init__()
        names = [term.name for term in terms]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a stage has each objective once, and at least one; got {names}", "merge their weights")
        self.vlm = vlm
        self.objectives = nn.ModuleDict({term.name: objectives.named(term.name, term.options) for term in terms})
        self.companions = nn.ModuleDict()
        self.weights = {term.name: term.weight for term in terms}
        self.world = world
        self.sound = True
        """Whether the weights are those of a finished step, and no process waits for this one amid its work."""
        for term in self.terms.values():
            term.world = world
            term.check(vlm)

    @property
    def terms(self) -> dict[str, objectives.Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]

    def scales(self, batches: Iterable[Batch]) -> dict[str, float]:
        """What each term's sum is multiplied by: its weight over its count in the whole optimizer step, everywhere.

        Gradients of several processes are averaged, hence the factor.

        Raises:
            NothingToLearn: no term is about any of these batches.
            DataError: one process has a batch that a term cannot be about.
        """
        batches = list(batches)
        counts = dict(zip(self.terms, self.world.total([self._count(name, batches) for name in self.terms])))
        if not any(counts.values()):
            ids = [sample for batch in batches for sample in batch.ids]
            raise NothingToLearn(
                f"nothing to learn from in samples {ids[:8]}: no token is supervised",
                "`isthmus data preview` shows what is trained in each sample",
            )
        size = self.world.size
        return {name: self.weights[name] * size / count if count else 0.0 for name, count in counts.items()}

    def _count(self, name: str, batches: Sequence[Batch]) -> int:
        """A term's count over this process's batches. Terms may ask the other processes, so all leave off together."""
        with self.world.together():
            return sum(self.terms[name].count(self._left(name, batch)) for batch in batches)

    def accompany(self) -> None:
        """Once it is settled what trains: the slow copy that terms learn from, and what they keep between steps.

        Raises:
            ConfigError: terms ask for slow copies that differ.
        """
        decays = {term.momentum for term in self.terms.values() if term.momentum is not None}
        if len(decays) > 1:
            raise ConfigError(f"one slow copy cannot keep {sorted(decays)} of itself", "give the terms one decay")
        for decay in decays:
            self.companions["momentum"] = Momentum(self.vlm.connectors, decay)
        for term in self.terms.values():
            term.begin(self)

    def after_step(self) -> None:
        """After every update of the weights; all processes have to call it."""
        for term in self.terms.values():
            term.after_step(self)
        for slow in self._slow().values():
            slow.follow(self.vlm.connectors)

    def drifting(self) -> dict[str, Tensor]:
        """What changes from step to step without a gradient, by name: a slow copy, and what terms keep in buffers."""
        found = dict(self.objectives.named_buffers("objectives"))
        for name, slow in self._slow().items():
            found |= {**dict(slow.named_parameters(name)), **dict(slow.named_buffers(name))}
        return {name: tensor.detach() for name, tensor in found.items()}

    def _slow(self) -> dict[str, Momentum]:
        """The companions that follow the model, by name; a teacher stays as it is."""
        return {f"companions.{name}": each for name, each in self.companions.items() if isinstance(each, Momentum)}

    def forward(self, batch: Batch, scales: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scaled total to call backward on, and each term's scaled share of it (detached)."""
        need = max((term.needs for term in self.terms.values()), key=RUNGS.index)
        idle = self._idle(batch)
        read = {term.reads for term in self.terms.values() if term.reads is not None}
        with sites.states(self.vlm.llm, read) as states:
            output = self.vlm.run(batch, need=need, idle=idle)
        output.states = states
        losses = {name: term.loss(self, output, self._left(name, batch)) for name, term in self.terms.items()}
        shares = {name: loss * scales[name] for name, loss in losses.items()}
        total = torch.stack([*shares.values(), *self._untouched(batch)]).sum()
        return total if idle is None else total + idle, {name: share.detach() for name, share in shares.items()}

    def figures(self) -> dict[str, float]:
        """What terms measured in their last forward, in this process, and what the joint tells; all have to ask."""
        told = {f"{name}_{key}": value for name, term in self.terms.items() for key, value in term.figures().items()}
        joint = self.vlm.aligner.figures(self.vlm)
        return told | {name: float(whole(x.detach()).mean()) for name, x in joint.items()}

    def _left(self, name: str, batch: Batch) -> Batch:
        """The batch as a term sees it: without the labels of samples that another term has to itself.

        Where nothing was drawn, as in validation, nothing is kept from anyone.
        """
        for other, term in self.terms.items():
            if term.alone and other != name and batch.draw_BT is not None and batch.labels_BT is not None:
                kept_BT = term.about(batch)
                batch = replace(batch, labels_BT=batch.labels_BT.masked_fill(kept_BT, IGNORE))
        return batch

    def _idle(self, batch: Batch) -> Tensor | None:
        """A zero that depends on the connector (and the encoder, if it trains) of every kind this batch lacks.

        Processes that train together wait for each other's gradients, so none may leave a part out, and gradients
        go down to the LLM's input in all or in none: where media stay aside, by way of this zero alone. None if
        there is nobody to wait for, or nothing to add.
        """
        splices = self.vlm.aligner.splices
        kinds = [kind for kind in self.vlm.connectors if kind not in batch.media or not splices]
        if self.world.size == 1 or not kinds:
            return None
        return torch.stack([self.vlm.blank(kind, batch).sum() * 0 for kind in kinds]).sum()

    def _untouched(self, batch: Batch) -> list[Tensor]:
        """Zeros that depend on what terms run for the kinds of media that this batch lacks, for the same reason.

        They stay out of the LLM's input, to which no gradient need go from there.
        """
        if self.world.size == 1:
            return []
        lacking = [kind for kind in self.vlm.connectors if kind not in batch.media]
        modules = [module for kind in lacking for module in self._run_with(kind)]
        return [each.float().sum() * 0 for module in modules for each in module.parameters() if _trains(each)]

    def _run_with(self, kind: str) -> list[nn.Module]:
        """What terms run of the model where there are media of a kind alone."""
        return [module for term in self.terms.values() for module in term.with_media(self.vlm, kind)]

    def seen_with(self) -> dict[nn.Parameter, set[str]]:
        """Of every parameter that is used with media alone, which kinds these are."""
        found: dict[nn.Parameter, set[str]] = {}
        for kind, connector in self.vlm.connectors.items():
            for module in (connector, self.vlm.encoders[kind], *self._run_with(kind)):
                for parameter in module.parameters():
                    found.setdefault(parameter, set()).add(kind)
        return found

    def ready(self) -> None:
        """Train mode where something trains, and for terms; else a part without a trainable parameter is in eval mode.

        Layers that recompute need their own flag up even when frozen; what is inside them keeps its mode.
        """
        _settle(self)
        self.objectives.train()
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True

    def uneven(self) -> bool:
        """Whether samples may differ in what they use of the LLM: a joint's grafts may look at kinds and routes."""
        adapters = {adapter["name"] for adapter in self.vlm.config.lora}
        return any(graft.at(module).keys() - adapters for module in self.vlm.modules())

    def units(self) -> list[nn.Module]:
        """The layers of the LLM and of encoders that train: modules that all processes run, or none.

        A frozen encoder's are not among them, because cached features leave it out wherever there are some.
        """
        encoders = [encoder for encoder in self.vlm.encoders.values() if any(map(_trains, encoder.parameters()))]
        parts = [self.vlm.llm, *encoders]
        return [module for part in parts for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]

    def recompute(self) -> None:
        """Forget the activations inside the layers of the LLM and of encoders that train; backward makes them again."""
        for layer in self.units():
            _set_recompute(layer, _Again(layer))

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:  # type: ignore[override]
        """`torch.compile` the LLM's layers one by one, in place: equal layers share one code, and no name changes.

        What is outside of them (encoders, the splice, the loss) varies in shape and stays as it is. Call it after
        `recompute`: of a layer that is computed again, the inside is compiled.
        """
        for layer in self.vlm.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                if layer.gradient_checkpointing:
                    _set_recompute(layer, _Again(layer, backend))
                else:
                    layer.compile(dynamic=True, backend=backend)


class _Again:
    """How a layer runs when its activations are computed again: in the mode that it would have otherwise.

    Transformers recomputes in training mode only, so that flag is up on frozen layers too, but for their inside.

    Args:
        layer: the layer.
        backend: of `torch.compile`, None to leave it as it is.
    """

    def __init__(self, layer: nn.Module, backend: str | Callable[..., Any] | None = None):
        self.layer, self.backend = layer, backend

    def __call__(self, inside: partial[Any], *args: Any) -> Any:
        return checkpoint(self._run, inside, *args, use_reentrant=False)

    def _run(self, inside: partial[Any], *args: Any) -> Any:
        forward = inside.func if self.backend is None else _compiled(inside.func, self.backend)
        flag, self.layer.training = self.layer.training, any(map(_trains, self.layer.parameters()))
        try:
            return forward(*inside.args, *args, **inside.keywords)
        finally:
            self.layer.training = flag


@functools.cache
def _compiled(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True, backend=backend)


def _set_recompute(layer: nn.Module, how: _Again) -> None:
    """Transformers calls these attributes so."""
    setattr(layer, "gradient_checkpointing", True)  # noqa: B010
    setattr(layer, "_gradient_checkpointing_func", how)  # noqa: B010


def mixed(terms: Sequence[ObjectiveConfig]) -> Literal["sample", "batch"] | None:
    """By what objectives that are about a share of the samples draw it; None if there is none.

    Raises:
        ConfigError: they do it differently.
    """
    found = [objectives.named(term.name, term.options) for term in terms]
    ways = {term.by for term in found if term.share < 1 or term.alone}
    if len(ways) > 1:
        raise ConfigError("one objective mixes by sample, another by batch", "give them the same `mix_by`")
    return ways.pop() if ways else None


def unlabelled(terms: Sequence[ObjectiveConfig]) -> bool:
    """Whether a stage learns from samples without labels."""
    return any(objectives.named(term.name, term.options).unlabelled for term in terms)


def held_out(batches: Sequence[Batch]) -> Callable[[Step], float]:
    """A validation for `run_stage`: the stage's own loss over fixed batches, in eval mode and without gradient.

    Processes that train together share the batches out; all run the same number, if need be one that counts nothing.
    What terms draw in a batch does not depend on who runs it, nor does what is drawn after all batches.
    """

    @torch.no_grad()
    def validate(step: Step) -> float:
        step.eval()
        device = next(step.parameters()).device
        seeds = torch.randint(2**62, (len(batches),)).tolist()
        mine = range(step.world.rank, len(batches), step.world.size)
        scales = step.scales([batches[number] for number in mine])
        loss = 0.0
        step.sound = step.world.size == 1  # a process that fails from here on cannot wait for the others
        with torch.random.fork_rng(devices=[]):  # seeds are drawn on the CPU
            for number in mine:
                torch.manual_seed(seeds[number])
                loss += float(step(batches[number].to(device), scales)[0])
            if len(mine) * step.world.size < len(batches):
                step(batches[0].to(device), scales)
        (loss,) = step.world.total([loss])
        step.sound = True
        return loss / step.world.size

    return validate


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _settle(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(map(_trains, parameters)):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _settle(child)
