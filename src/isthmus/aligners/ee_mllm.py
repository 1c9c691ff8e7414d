"""EE-MLLM: as LLaVA, but in every layer media attend to themselves alone, and text attends to media and text.

Ma et al. 2024, arXiv 2408.11795. No official code. NAAViT (arXiv 2502.02458) is `visual: ffn` here.

Differs:
    - what a layer does to media is an option, since the paper's text was not at hand: `self` (value and output
      projection, feed-forward) reproduces its 24 % fewer FLOPs at 4,900 visual tokens;
    - states of media in the last layer are computed, though text does not need them: objectives may read them;
    - `free` is EE-MLLM-F: full attention while gradients are recorded, this one when the model answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from isthmus import sites
from isthmus.aligner import Addition, Aligner
from isthmus.connectors import Connector, composite
from isthmus.connectors.pool import Projected, settle
from isthmus.encoders import Encoder
from isthmus.fuse import Rule
from isthmus.types import ConfigError, Modality

if TYPE_CHECKING:
    from isthmus.model import VLM


class EEMLLM(Aligner):
    """A projector, and layers whose own weights align media to words without any attention among media."""

    name = "ee_mllm"
    family = "converter"
    encoder_decoder = False

    class Options(Projected):
        words: float | None = Field(None, gt=0)
        """Temperature at which output leans towards the words that it is like, as in LLaVA; needs `normalise`."""
        visual: Literal["self", "ffn", "keys"] = "self"
        """What a layer does to media: attention to themselves and feed-forward; feed-forward alone; nothing."""
        compute: Literal["skip", "rule"] = "skip"
        """`skip` never computes what is not seen; `rule` masks it, in any LLM and kernel: the reference."""
        layers: tuple[int, ...] | None = None
        """Layers in which media are kept apart; None is all. The others have full attention."""
        free: bool = False
        """EE-MLLM-F, training-free: only where no gradient is recorded."""

        @model_validator(mode="after")
        def _rule_is_plain(self) -> Self:
            if self.compute == "rule" and (self.visual != "self" or self.layers is not None or self.free):
                raise ValueError("compute=rule goes with visual=self in all layers, in training too; use compute=skip")
            return self

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return self.options.connector(encoder, width, self.options.words)

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        if self.options.compute == "rule":
            return
        stack = sites.layers(llm)
        chosen = range(len(stack.modules)) if self.options.layers is None else self.options.layers
        beyond = [index for index in chosen if not 0 <= index < len(stack.modules)]
        if beyond:
            raise ConfigError(f"layers {beyond} of an LLM that has {len(stack.modules)}", "layers count from 0")
        for index in chosen:
            yield from self._inside(f"llm.{stack.path}.{index}", stack.modules[index])

    def _inside(self, path: str, layer: nn.Module) -> Iterator[Addition]:
        """What one layer is given."""
        visual, free = self.options.visual, self.options.free
        name = composite.check(layer)
        turns = composite.turns(sites.attention(layer))
        yield Addition(f"{path}.{name}", "composite", composite.MediaAttention(turns, visual == "self", free))
        if visual == "keys":
            yield Addition(f"{path}.{composite.feed_forward(layer)}", "composite", composite.TextOnly(free))

    def media_see(self, layers: int) -> Literal["past", "themselves", "nothing"]:
        """As LLaVA's where one of them is left as it was, or all are while gradients are recorded."""
        apart = self.options.layers
        if self.options.free or (apart is not None and not set(range(layers)) <= set(apart)):
            return "past"
        return "nothing" if self.options.visual == "keys" else "themselves"

    def rule(self, segment_BT: Tensor, modality_BT: Tensor) -> Rule | None:
        """Media see themselves alone. Text rows obey causality only, which is all that `skip` has to compute."""
        media_BT = modality_BT != Modality.TEXT
        if self.options.compute == "skip" or not media_BT.any():
            return None

        def alone(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return ~media_BT[b, q] | (q == kv)

        return alone

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))


def flops(
    d: int,
    m: int,
    layers: int,
    text: int,
    visual: int,
    how: Literal["full", "self", "ffn", "keys"],
    shared: int = 1,
) -> int:
    """Floating-point operations of a prefill in the LLM's layers: 2 per multiply-add, attention counted densely.

    Args:
        d: the LLM's width, which is that of all its query heads.
        m: inner width of its gated feed-forward network.
        layers: number of layers.
        text, visual: tokens of each.
        how: what layers do to visual tokens, as `Options.visual`; `full` is LLaVA.
        shared: query heads per head of keys and values.
    """
    one_side, keys_and_values, feed_forward = 2 * d * d, 4 * d * d // shared, 6 * d * m
    whole = 2 * one_side + keys_and_values + feed_forward
    own = {"full": whole, "self": whole - one_side, "ffn": whole - 2 * one_side, "keys": keys_and_values}
    asking = text + visual if how == "full" else text
    return layers * (text * whole + visual * own[how] + 4 * asking * (text + visual) * d)
