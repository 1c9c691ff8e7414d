"""What an optimizer step costs: floating-point operations by formula, their share of the machine's ceiling, memory.

A matrix of P weights costs 2P operations per position forward, 2P more where its input needs a gradient, and 2P more
where it trains itself: a frozen matrix has no product for its weights. What is computed twice (recompute) and what is
padding do not count, so the share is that of useful work (model FLOPs utilisation, MFU).
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import quantised, sites
from isthmus.model import VLM
from isthmus.objectives.lm import supervised
from isthmus.training.step import Step
from isthmus.types import Batch


class Meter:
    """Measures a stage's steps.

    The LLM's cost follows from its parameters. A medium's cost is counted once, product by product, on the first
    batch that has one of its kind: an encoder may be cached, convolutional or pooled, and each kind has one size. What
    terms ask of its connector is in it, be it about texts.

    Args:
        step: what trains, with its gradients chosen.
        ceiling: operations per second that the machine reaches.
        device: where it trains.
    """

    def __init__(self, step: Step, ceiling: float, device: torch.device):
        self.ceiling, self.device = ceiling, device
        self.costs = llm_costs(step)
        self.media = {kind: _MediumCost(step, kind) for kind in step.vlm.connectors}
        forget_peak(device)

    def read(self, batches: Sequence[Batch], seconds: float) -> dict[str, float]:
        """`operations`, their share `mfu` of the ceiling, and `memory_gb` at its peak since the stage began.

        Memory is the accelerator's, else the process's; where the system forgets no peak, since the process began.
        """
        flops = self.flops(batches)
        share = flops / seconds / self.ceiling
        return {"operations": flops, "mfu": share, "memory_gb": peak_memory(self.device) / 1e9}

    def flops(self, batches: Sequence[Batch]) -> float:
        """Operations of one optimizer step over these batches, once their kinds of media have been seen."""
        media = sum(self.media[kind].each * len(media) for batch in batches for kind, media in batch.media.items())
        return media + sum(map(self.costs.of, batches))


@dataclass(frozen=True)
class LLMCosts:
    """Operations of forward and backward together."""

    token: float = 0.0
    """Per position: every matrix of the layers."""
    pair: float = 0.0
    """Per pair of positions of one segment: the products of attention, counted without regard to causality."""
    prediction: float = 0.0
    """Per supervised position: the head."""

    def of(self, batch: Batch) -> float:
        """Operations over a batch; padding is not counted."""
        tokens, pairs = _positions(batch.segment_BT)
        predictions = int(supervised(batch).sum()) if batch.labels_BT is not None else 0
        return self.token * tokens + self.pair * pairs + self.prediction * predictions


def llm_costs(step: Step) -> LLMCosts:
    """The LLM's costs from its parameters and from what trains; nothing where no objective runs it.

    Dense decoders are meant: every matrix is applied at every position, which tells too much or too little of joints
    that send media another way (`forecast` counts what is computed). Encoder-decoders count as if their decoder read
    what the encoder reads.
    """
    vlm = step.vlm
    if not any(term.needs == "hidden" for term in step.terms.values()):
        return LLMCosts()
    text = vlm.config.text_config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    flows = _reaches(vlm)
    token = pair = 0.0
    for layer in sites.layers(vlm.llm).modules:
        cost, flows_on = _layer(layer, flows)
        token += cost
        pair += 4 * width * (1 + 2 * flows_on)
        flows = flows_on
    head = vlm.llm.get_output_embeddings().weight
    return LLMCosts(token, pair, _product(head.numel(), flows, head.requires_grad))


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew with what is held now, where the system can: on CUDA devices and under Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, else the most that the process held, mapped files included.

    Under Linux this is the process's own VmHWM: `ru_maxrss` would tell of the process that started it, too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------- inside


def _product(weights: int, flows: bool, trains: bool) -> float:
    """Operations of one matrix at one position."""
    return 2.0 * weights * (1 + flows + trains)


def _reaches(vlm: VLM) -> bool:
    """Whether the first layer's input needs a gradient."""
    below: list[nn.Module] = [sites.embedding(vlm.llm)]
    if vlm.aligner.splices:
        below += [vlm.connectors, vlm.encoders]
    return any(parameter.requires_grad for module in below for parameter in module.parameters())


def _layer(layer: nn.Module, flows: bool) -> tuple[float, bool]:
    """Operations of a layer's matrices at one position, additions included, and whether its output needs a gradient.

    Where no gradient reaches the layer, its matrices need one for their inputs from the first trained one on.
    """
    packed = quantised.weights(layer)
    cost = 0.0
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2 or name in packed:
            cost += _product(packed.get(name, parameter.numel()), flows, parameter.requires_grad)
        flows = flows or parameter.requires_grad
    return cost, flows


def _positions(segment_BT: Tensor) -> tuple[int, int]:
    """How many positions are no padding, and how many pairs of them share a segment."""
    rows = torch.arange(len(segment_BT), device=segment_BT.device)[:, None]
    own = segment_BT + rows * (int(segment_BT.max()) + 1)
    lengths = torch.bincount(own[segment_BT > 0])
    return int(lengths.sum()), int(lengths.square().sum())


class _MediumCost:
    """Counts the products of one kind's encoder and connector in the first step that has one, then takes itself off."""

    def __init__(self, step: Step, kind: str):
        self.kind, self.each, self._sum = kind, 0.0, 0.0
        counted = [
            (module, count)
            for part in (step.vlm.encoders[kind], step.vlm.connectors[kind])
            for module in part.modules()
            if (count := _counter(module)) is not None
        ]
        self._handles = [module.register_forward_hook(self._adding(count)) for module, count in counted]
        self._handles.append(step.register_forward_hook(self._finish))

    def _adding(self, count: Callable[[Any, Tensor], float]) -> Callable[..., None]:
        def add(module: Any, args: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            self._sum += count(module, y) * _times(module, args, y)

        return add

    def _finish(self, step: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        media = args[0].media.get(self.kind)
        if not torch.is_grad_enabled() or not media:
            self._sum = 0.0  # a validation, or a blank for the others' sake
            return
        self.each = self._sum / len(media)
        for handle in self._handles:
            handle.remove()


def _counter(module: nn.Module) -> Callable[[Any, Tensor], float] | None:
    """How to count a module's own products from its output; None if it has none that are known."""
    if isinstance(module, nn.Linear):
        return lambda linear, y: 2.0 * y.numel() * linear.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lambda convolution, y: 2.0 * y.numel() * convolution.weight[0].numel()
    if hasattr(module, "is_causal"):  # transformers' attention: scores and mixing
        return lambda attention, y: 4.0 * y.numel() * y.shape[-2]
    return None


def _times(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> int:
    """How often forward and backward together compute a module's product: attention's backward has it twice."""
    if hasattr(module, "is_causal"):
        return 1 + 2 * y.requires_grad
    flows = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    return 1 + flows + any(parameter.requires_grad for parameter in module.parameters(recurse=False))
