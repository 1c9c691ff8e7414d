"""Terms of the loss. An objective returns a sum, and the loop divides by the count of the whole optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from isthmus.types import Batch, Output

if TYPE_CHECKING:  # what an objective may be handed; it imports types alone
    Step = Any


class Objective(nn.Module):
    """One term of the loss, with the parameters it owns (a temperature, a head).

    The loop scales each objective's sum by weight / (its count over accumulation and ranks) before backward, so
    that splitting a step into micro-batches does not change its gradient.
    """

    needs: ClassVar[Literal["hidden", "connected"]] = "hidden"
    """`connected` leaves the LLM out of the loop when no other objective needs its states."""
    splits: ClassVar[bool] = True
    """False for losses over in-batch negatives, which change when a step is split into micro-batches."""

    def count(self, batch: Batch) -> int:
        """How many terms `loss` sums over; known before the forward."""
        raise NotImplementedError

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        """The sum of this term over the batch: a scalar in float32. `step` is the module being trained."""
        raise NotImplementedError
