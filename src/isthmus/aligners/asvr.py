"""ASVR: LLaVA's joint, and a head that tells the codes of a picture from the LLM's states at its places.

Wang et al. 2025, arXiv 2506.09040. Official code: github.com/AlenjandroWang/ASVR. The parts are in
`connectors.codebook` and `objectives.asvr`.

Differs:
    - codes are those of a residual quantiser that k-means fits to the frozen encoder's own features before training;
      the paper's is a semantic tokenizer trained for itself, whose weights this package does not read;
    - `pool` and `normalise` are ours, off by default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.connectors import Connector
from isthmus.connectors.codebook import Codebook, Coded, Teller
from isthmus.connectors.pool import Projected, settle
from isthmus.encoders import Encoder
from isthmus.types import ConfigError

if TYPE_CHECKING:
    from isthmus.model import VLM


class ASVR(Aligner):
    """A projector whose pictures also have codes: `connectors.*.codebook`, told by `connectors.*.teller`."""

    name = "asvr"
    family = "converter"
    also = "data"

    class Options(Projected):
        tokenizer: str | None = "features"
        """What codes are of: the encoder's `features`, or one of its taps by name, of which a shallow one has the look
        of things rather than their meaning. None carries neither codes nor head: training needs them, answering does
        not."""
        levels: int = Field(8, ge=1)
        size: int = Field(16384, ge=2)
        """Codes in each level."""
        width: int = Field(2048, ge=1)
        """Of the head."""
        depth: int = Field(3, ge=1)
        """Layers of the head."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        """The projector, with codes and head where there is a tokenizer.

        Raises:
            ConfigError: the encoder has no tap of the tokenizer's name.
        """
        o = self.options
        inner = o.connector(encoder, width)
        if o.tokenizer is None:
            return Coded(inner, "features", None, None)
        widths = {"features": encoder.width, **encoder.tap_widths}
        if o.tokenizer not in widths:
            raise ConfigError(
                f"the encoder gives nothing named {o.tokenizer!r} to make codes of",
                f"use one of {', '.join(widths)}, or name it in encoder.taps",
            )
        codes = widths[o.tokenizer]
        head = Teller(width, codes, o.width, o.levels, o.size, o.depth)
        return Coded(inner, o.tokenizer, Codebook(o.levels, o.size, codes), head)

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
