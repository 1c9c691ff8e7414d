"""Terms of the loss. An objective returns a sum, and the loop divides by the count of the whole optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from isthmus.config import Frozen, check
from isthmus.registry import Registry
from isthmus.types import Batch, Output

if TYPE_CHECKING:  # what an objective may be handed; it imports types alone
    Step = Any
    VLM = Any


class Alone:
    """One process, which compares its samples with no other's; `training.parallel.World` has the same for several."""

    rank, size = 0, 1

    def all_gather(self, rows: Tensor, fill: float = 0) -> Tensor:
        """The rows as they are."""
        return rows


class Objective(nn.Module):
    """One term of the loss, with the parameters it owns (a temperature, a head).

    The loop scales each objective's sum by weight / (its count over accumulation and ranks) before backward, so
    that splitting a step into micro-batches does not change its gradient.
    """

    class Options(Frozen):
        """The term's own choices; none by default."""

    name: ClassVar[str]
    """How recipes call it; the file in `objectives/` has the same name."""
    needs: ClassVar[Literal["hidden", "connected", "encoded"]] = "hidden"
    """`connected` leaves the LLM out of the loop when no other objective needs its states; `encoded` leaves out the
    connectors' forward too, for a term that asks its Q-Former itself."""
    splits: ClassVar[bool] = True
    """False for losses over in-batch negatives, which change when a step is split into micro-batches. Processes share
    the batch all the same: such a term asks its `peers` for the rows of the others."""
    unpictured: ClassVar[bool] = False
    """True if samples without any medium are what it learns from."""
    unlabelled: ClassVar[bool] = False
    """True if samples without any supervised token teach something, such as pictures of which nothing is said."""
    share: float = 1.0
    """Of the samples that carry labels, how many the term is about."""
    by: Literal["sample", "batch"] = "sample"
    """Whether that share is one of the samples of every batch, or of the batches."""
    alone: bool = False
    """Whether the labels of the samples that it is about are kept from the other terms."""
    reads: int | None = None
    """After how many layers of the LLM it reads `Output.states`; None if it does not."""
    momentum: float | None = None
    """Share of itself that the slow copy of the connectors keeps at every step, for a term that learns from one: it is
    `step.companions["momentum"]`, and the same for all terms."""
    world: Any = Alone()
    """The processes that share the batches; the step says it."""

    def __init__(self, options: Frozen):
        super().__init__()
        self.options: Any = options

    @property
    def peers(self) -> Any:
        """The processes with whose samples the term compares its own. In validation each has batches to itself.

        All of them have to ask for rows, also those that have none, equally often and in the same order. What every
        process computes of all rows alike, each divides by `peers.size`, so that their sums add up to it.
        """
        return self.world if self.training else Alone()

    def check(self, vlm: VLM) -> None:
        """Before anything runs: whether this joint and this LLM can carry the term; by default all can.

        Raises:
            ConfigError: they cannot.
        """

    def count(self, batch: Batch) -> int:
        """How many terms `loss` sums over; known before the forward."""
        raise NotImplementedError

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        """The sum of this term over the batch: a scalar in float32. `step` is the module being trained."""
        raise NotImplementedError

    def about(self, batch: Batch) -> Tensor:
        """Which positions belong to samples that the term is about, [B, T]."""
        real_BT = batch.segment_BT > 0
        return real_BT if batch.draw_BT is None else real_BT & (batch.draw_BT < self.share)

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        """Modules of the model that the term itself runs where there are media of a kind, and nowhere else."""
        return ()

    def figures(self) -> dict[str, float]:
        """What the term measured in its last forward, for the log of the run; nothing by default."""
        return {}

    def begin(self, step: Step) -> None:
        """Once, before the first step, when it is settled what trains: the place to register buffers."""

    def after_step(self, step: Step) -> None:
        """After every update of the weights. What it writes into buffers is saved and resumed."""


TERMS = Registry("objective", Objective, "isthmus.objectives")


def named(name: str, options: dict[str, Any]) -> Objective:
    """The objective of that name, with its options validated against its own schema.

    Raises:
        ConfigError: no such name, or no such option; the nearest is suggested.
    """
    kind = TERMS.find(name)
    return kind(check(kind.Options, options, f"objective {name}"))
