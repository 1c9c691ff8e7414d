"""The module that is trained: a VLM, the terms of its loss, and companions such as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from isthmus import objectives
from isthmus.config import ObjectiveConfig
from isthmus.model import VLM
from isthmus.types import Batch, ConfigError, DataError


class Step(nn.Module):
    """One forward of everything that a stage trains; what touches a part of the model happens inside it.

    Args:
        vlm: the model.
        terms: the stage's objectives with their weights and options.

    Raises:
        ConfigError: an objective is unknown or named twice.
    """

    def __init__(self, vlm: VLM, terms: Sequence[ObjectiveConfig]):
        super().__init__()
        names = [term.name for term in terms]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a stage has each objective once, and at least one; got {names}", "merge their weights")
        self.vlm = vlm
        self.objectives = nn.ModuleDict({term.name: objectives.named(term.name, term.options) for term in terms})
        self.companions = nn.ModuleDict()
        self.weights = {term.name: term.weight for term in terms}

    @property
    def terms(self) -> dict[str, objectives.Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]

    def scales(self, batches: Iterable[Batch]) -> dict[str, float]:
        """What each term's sum is multiplied by: its weight over its count in the whole optimizer step.

        Raises:
            DataError: there is nothing to learn from in these batches.
        """
        batches = list(batches)
        counts = {name: sum(term.count(batch) for batch in batches) for name, term in self.terms.items()}
        if not any(counts.values()):
            ids = [sample for batch in batches for sample in batch.ids]
            raise DataError(
                f"nothing to learn from in samples {ids[:8]}: no token is supervised",
                "`isthmus data preview` shows what is trained in each sample",
            )
        return {name: self.weights[name] / count if count else 0.0 for name, count in counts.items()}

    def forward(self, batch: Batch, scales: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scaled total to call backward on, and each term's scaled share of it (detached)."""
        hidden = any(term.needs == "hidden" for term in self.terms.values())
        output = self.vlm.run(batch, need="hidden" if hidden else "connected")
        shares = {name: term.loss(self, output, batch) * scales[name] for name, term in self.terms.items()}
        return torch.stack(list(shares.values())).sum(), {name: share.detach() for name, share in shares.items()}

    def ready(self) -> None:
        """Train mode where something trains; a part without a trainable parameter stays in eval mode.

        Layers that recompute need their own flag up even when frozen; what is inside them keeps its mode.
        """
        _settle(self)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True

    def recompute(self) -> None:
        """Forget the activations inside the LLM's layers and compute them again in the backward."""
        for module in self.vlm.llm.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                setattr(module, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010


def held_out(batches: Sequence[Batch]) -> Callable[[Step], float]:
    """A validation for `run_stage`: the stage's own loss over fixed batches, in eval mode and without gradient."""

    @torch.no_grad()
    def validate(step: Step) -> float:
        step.eval()
        device = next(step.parameters()).device
        scales = step.scales(batches)
        return sum(float(step(batch.to(device), scales)[0]) for batch in batches)

    return validate


def _settle(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _settle(child)
