"""What terms over pictures and their captions share: texts, which of them are equal, one pass over both, and sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from isthmus.types import Batch, ConfigError, DataError, Features, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step

PAD = -1
"""Behind the ids of a text."""
Shared = TypeVar("Shared")
NO_TEXT = "use aligner blip2 with aligner.options.text=true"


def reads_captions(vlm: VLM) -> None:
    """Nothing but a check.

    Raises:
        ConfigError: the joint has no text half.
    """
    if not all(hasattr(former, "heads") and former.heads is not None for former in vlm.connectors.values()):
        raise ConfigError(f"the joint {vlm.aligner.name} reads no captions", NO_TEXT)


def captions(batch: Batch) -> dict[str, Tensor]:
    """What is said of each medium in the connector's vocabulary, ids [N, T] by kind.

    Raises:
        DataError: the joint reads none.
    """
    if batch.media and not batch.extra_text:
        raise DataError("no captions for the Q-Former's text half", NO_TEXT)
    return {kind: ids_NT for kind, ids_NT in batch.extra_text.items() if kind in batch.media}


def spoken(batch: Batch, kind: str) -> Tensor:
    """What is said of the media of a kind, ids [N, T]; no row where a batch has none of them."""
    none_NT = torch.zeros(0, 1, dtype=torch.long, device=batch.segment_BT.device)
    return captions(batch).get(kind, none_NT)


def features(step: Step, output: Output, batch: Batch, kind: str) -> Features:
    """What the connector of a kind reads of the batch's media; encoded here, with gradients, if the forward has not."""
    if kind not in output.encoded:
        output.encoded[kind] = step.vlm.encode(kind, batch.media[kind])
    return output.encoded[kind]


def seen(step: Step, output: Output, batch: Batch, kind: str) -> list[Tensor]:
    """The states of queries alone that enter every layer and leave the last, [N, Q, W]; all terms share one pass.

    The first term that asks computes them, so no term asks without gradients. So too in `read`.
    """
    former = step.vlm.connectors[kind]
    return _once(output, ("seen", kind), lambda: former.see(features(step, output, batch, kind)))


def read(step: Step, output: Output, batch: Batch, kind: str) -> Tensor:
    """The captions without the pictures, both ways, [N, T, W]; all terms share one pass."""
    former = step.vlm.connectors[kind]
    return _once(output, ("read", kind), lambda: former.read(batch.extra_text[kind]))


def directions(step: Step, output: Output, batch: Batch, kind: str) -> tuple[Tensor, Tensor]:
    """Where pictures [N, Q, C] and their captions [N, C] are compared, in float32; all terms share one pass."""
    former = step.vlm.connectors[kind]

    def compute() -> tuple[Tensor, Tensor]:
        picture_NQW, text_NTW = seen(step, output, batch, kind)[-1], read(step, output, batch, kind)
        return former.heads.directions(picture_NQW).float(), former.heads.direction(text_NTW[:, 0]).float()

    return _once(output, ("directions", kind), compute) if kind in batch.media else nowhere(former)


def everywhere(peers: Any, step: Step, output: Output, batch: Batch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The captions of all processes, ids [M, T], and `directions` of their pictures and of these captions."""

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        picture_NQC, text_NC = directions(step, output, batch, kind)
        ids_MT = peers.all_gather(spoken(batch, kind), PAD)
        return ids_MT, peers.all_gather(picture_NQC), peers.all_gather(text_NC)

    return _once(output, ("everywhere", kind), compute)


def nowhere(former: Any) -> tuple[Tensor, Tensor]:
    """`directions` of a process without media of a kind."""
    width = former.heads.picture.out_features
    return former.queries.new_zeros(0, len(former.queries), width), former.queries.new_zeros(0, width)


def _once(output: Output, name: tuple[str, str], compute: Callable[[], Shared]) -> Shared:
    if name not in output.shared:
        output.shared[name] = compute()
    return output.shared[name]  # type: ignore[no-any-return]


def same(ids_NT: Tensor) -> Tensor:
    """Which texts are equal, [N, N]."""
    return (ids_NT[:, None] == ids_NT[None]).all(-1)


def shares(positive_NM: Tensor) -> Tensor:
    """Every row's positives with equal shares that sum to 1, [N, M]."""
    return positive_NM.float() / positive_NM.sum(1, keepdim=True)


def summed(terms: Iterable[Tensor], batch: Batch) -> Tensor:
    """The sum of a term's kinds; a zero for a batch without media."""
    found = list(terms)
    return torch.stack(found).sum() if found else batch.segment_BT.new_zeros((), dtype=torch.float32)
