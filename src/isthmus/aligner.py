"""What a paper answers: which connector, spliced or aside, positions, who sees whom, what is added inside the LLM.

LLaVA's answers are the defaults. A new joint is one file in `aligners/` with one class that overrides the answers
in which it differs; nothing else in the package changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from isthmus.config import Frozen, check
from isthmus.connectors import Connector
from isthmus.data.boxes import BoxFormat, Decimals
from isthmus.data.hints import Hints
from isthmus.encoders import Encoder
from isthmus.fuse import Rule
from isthmus.graft import Graft
from isthmus.registry import Registry
from isthmus.types import Layout, Reading

if TYPE_CHECKING:
    from isthmus.model import VLM


class Addition(NamedTuple):
    """A graft and where it goes: the dotted name of a module inside the LLM or an encoder."""

    path: str
    name: str
    graft: Graft


class Aligner:
    """One published way of joining an encoder to an LLM.

    Subclasses set `Options`, a schema of the paper's own choices, and override the answers below.
    """

    class Options(Frozen):
        """The paper's own choices; none by default."""

    name: ClassVar[str]
    """How recipes call it; the file in `aligners/` has the same name."""
    family: ClassVar[str] = "converter"
    """Converter, perceiver, tool or data: the survey's families (arXiv 2311.07594)."""
    also: ClassVar[str | None] = None
    """A second family, where the paper is about data as much."""
    splices: ClassVar[bool] = True
    """Vectors take places in the LLM's input; otherwise they stay aside and grafts read `Side.vision_BKQD`."""
    asleep: ClassVar[tuple[str, ...]] = ()
    """Globs of parameters that have no gradient until another part wakes (behind a zero gate)."""
    identity: ClassVar[bool] = True
    """Whether a freshly composed model equals the bare LLM on text."""
    encoder_decoder: ClassVar[bool] = True
    """Whether an encoder-decoder LLM can carry this joint. Its encoder reads prompt and media with positions and masks
    of its own, so `positions` and `rule` are never asked there, rows are not packed, and of the side its decoder knows
    the route alone: a joint that lives by any of these says False."""

    def __init__(self, options: Frozen):
        self.options: Any = options

    @property
    def routes(self) -> bool:
        """Whether it treats kinds of tasks apart (`types.Route`)."""
        return False

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        """The module between an encoder and an LLM of width D. The one answer that has no default."""
        raise NotImplementedError

    def layout(self, kind: str, tokens: int) -> Layout:
        """How a medium of Q connector tokens stands in the text. LLaVA puts a newline behind it."""
        return Layout(count=tokens if self.splices else 0, after="\n")

    def reading(self) -> Reading | None:
        """Text that the connectors read beside features, as `Context.extra_text`; none by default.

        A vocabulary of their own is named, a folder or hub name, and not opened: a plan has no files.
        """
        return None

    def new_tokens(self) -> tuple[str, ...]:
        """Strings that become new vocabulary entries, with rows of their own in embedding and head.

        Those that stand in a layout become control tokens; the others are text that a user may type.
        """
        return ()

    def boxes(self) -> BoxFormat:
        """How regions are written and read; Shikra's decimals unless the paper has a way of its own."""
        return Decimals()

    def hints(self) -> Hints:
        """How a tagger's tags are written; one behind the other unless the paper has a sentence for them."""
        return Hints()

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        """What is added inside the LLM's or the encoders' modules."""
        return iter(())

    def heads(self, width: int) -> dict[str, nn.Module]:
        """Modules beside the LLM, by name (output heads, a teacher)."""
        return {}

    def media_see(self, layers: int) -> Literal["past", "themselves", "nothing"]:
        """What the places of spliced media look at in the LLM's first so many `layers` while it trains: all that is
        before them in one at least, themselves alone, or nothing, where they stay what was put in. Terms over their
        states behind these layers ask for it."""
        return "past"

    def positions(self, counted_BT: Tensor, segment_BT: Tensor, modality_BT: Tensor) -> Tensor | None:
        """Position ids over the whole row, or None for `counted_BT`, the count within each segment."""
        return None

    def rule(self, segment_BT: Tensor, modality_BT: Tensor) -> Rule | None:
        """A restriction of who may look at whom, on top of causality and segments."""
        return None

    def media_mask(self, position_BT: Tensor, segment_BT: Tensor, media_at_BK: Tensor) -> Tensor:
        """For media that stay aside: may the token at `position_BT` look at medium k? [B, T, K].

        The default is every medium that has appeared. `position_BT` counts from the row's first column.
        """
        return (media_at_BK[:, None] >= 0) & (media_at_BK[:, None] <= position_BT[..., None])

    def figures(self, model: VLM) -> dict[str, Tensor]:
        """What the log of a run tells of the joint's state, such as how far gates are open: the mean of each tensor."""
        return {}

    def birth(self, model: VLM) -> None:
        """Initialise from the base parts' own weights; runs once, when freshly composed, never on load."""


JOINTS = Registry("aligner", Aligner, "isthmus.aligners")


def known() -> dict[str, str]:
    """Every aligner's name and its module: files of `isthmus.aligners` and the entry-point group of that name."""
    return JOINTS.known()


def named(name: str) -> type[Aligner]:
    """The aligner class of that name; errors as in `registry.Registry.find`."""
    return JOINTS.find(name)


def build(name: str, options: dict[str, Any]) -> Aligner:
    """An aligner with its options validated against its own schema."""
    kind = named(name)
    return kind(check(kind.Options, options, f"aligner {name}"))
