"""mPLUG-Owl: a visual abstractor gives 64 summaries and an end vector, which stand in the LLM's input.

Ye et al. 2023, arXiv 2304.14178 (mPLUG-Owl). Official code: github.com/X-PLUG/mPLUG-Owl.

Differs:
    - the encoder's states come before its last norm; the abstractor's own norms follow;
    - the LLM's chat template takes the place of `Human:` and `AI:`;
    - `width` and `normalise` are ours, off by default: a narrower abstractor, output where the word embeddings are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.abstractor import Abstractor
from isthmus.connectors.pool import Normalised, settle
from isthmus.encoders import Encoder
from isthmus.types import ConfigError

if TYPE_CHECKING:
    from isthmus.model import VLM


class MPLUGOwl(Aligner):
    """Queries that read the picture in several layers, then a vector that says where the picture ends."""

    name = "mplug_owl"
    family = "perceiver"

    class Options(Frozen):
        queries: int = Field(64, ge=1)
        depth: int = Field(6, ge=1)
        heads: int = Field(16, ge=1)
        inner: int = Field(4096, ge=1)
        """Width inside the feed-forward networks."""
        width: int | None = Field(None, ge=1)
        """Width of the abstractor; None is the encoder's."""
        normalise: bool = False

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        options = self.options
        own = options.width or encoder.width
        if own % options.heads:
            raise ConfigError(f"width {own} does not divide into {options.heads} heads", "set `heads` or `width`")
        joint: Connector = Abstractor(
            encoder.width, width, options.queries, options.depth, options.heads, options.inner, options.width
        )
        return Normalised(joint, encoder.width, width) if options.normalise else joint

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
