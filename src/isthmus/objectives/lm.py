"""Next-token cross-entropy where there is something to predict, without ever holding all logits.

States are gathered before the head, and logits live one block of rows at a time; the idea of chunking the head is
that of Cut Cross-Entropy (arXiv 2411.09009) and Liger Kernel (arXiv 2410.10989).
Differs: no kernel. A frozen head, the usual case, gives its states' gradient in the forward by plain autograd, so
that nothing is computed twice; a head that trains runs under checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.types import IGNORE, Batch, DataError, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step

Head: TypeAlias = Callable[[Tensor], Tensor]


class NextToken(Objective):
    """Cross-entropy of every supervised token given all before it in its segment."""

    class Options(Frozen):
        rows: int = Field(256, ge=1)
        """Rows of logits that live at once; memory is about rows x V x 10 bytes."""

    name: ClassVar[str] = "lm"

    def count(self, batch: Batch) -> int:
        return int(supervised(batch).sum())

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        assert output.hidden_BTD is not None and batch.labels_BT is not None  # Step ran the LLM; count saw labels
        chosen = supervised(batch)
        hidden_ND = output.hidden_BTD[:, :-1][chosen]
        return cross_entropy(hidden_ND, batch.labels_BT[:, 1:][chosen], output.head, self.options.rows)


def supervised(batch: Batch) -> Tensor:
    """Which states predict a token that carries loss, [B, T - 1]: never one of another segment.

    Raises:
        DataError: the batch has no labels.
    """
    if batch.labels_BT is None:
        raise DataError("a batch for training has no labels", "collate with labels")
    chosen = batch.labels_BT[:, 1:] != IGNORE
    if batch.decoder_ids_BU is not None:  # the decoder of an encoder-decoder holds one sample per row
        return chosen
    chosen = chosen & (batch.segment_BT[:, 1:] == batch.segment_BT[:, :-1])
    if batch.branch_BT is not None:
        chosen = chosen & (batch.branch_BT[:, 1:] == batch.branch_BT[:, :-1])
    return chosen


def cross_entropy(hidden_ND: Tensor, target_N: Tensor, head: Head, rows: int) -> Tensor:
    """The summed cross-entropy of `head(hidden_ND)` [N, V] against `target_N`, in float32, `rows` at a time."""
    if not len(target_N):  # an empty sum: 0, and the graph stays whole, the head included: other processes may run it
        return hidden_ND.float().sum() + head(hidden_ND.new_zeros(1, hidden_ND.shape[1])).float().sum() * 0
    if not torch.is_grad_enabled():
        return _sum(_block(h, t, head) for h, t in _blocks(hidden_ND, target_N, rows))
    if head(hidden_ND[:1].detach()).requires_grad:
        return _sum(checkpoint(_block, h, t, head, use_reentrant=False) for h, t in _blocks(hidden_ND, target_N, rows))
    return _FrozenHead.apply(hidden_ND, target_N, head, rows)


class _FrozenHead(torch.autograd.Function):
    """Loss and the states' gradient in one forward; the backward only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head, rows: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for hidden, target in _blocks(hidden_ND, target_N, rows):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits = head(hidden)
            scores = torch.log_softmax(logits.detach(), -1, dtype=torch.float32)
            losses.append(F.nll_loss(scores, target, reduction="sum"))
            slope = scores.exp_()  # softmax minus one-hot, in the memory of the scores
            slope[torch.arange(len(target), device=target.device), target] -= 1
            gradients += torch.autograd.grad(logits, hidden, slope.to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return _sum(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * outer[0], None, None, None


def _blocks(hidden_ND: Tensor, target_N: Tensor, rows: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(hidden_ND.split(rows), target_N.split(rows))


def _block(hidden: Tensor, target: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden).float(), target, reduction="sum")


def _sum(losses: Any) -> Tensor:
    return torch.stack(list(losses)).sum()
