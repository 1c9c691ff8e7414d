"""Kosmos-2: latent queries in the LLM's input, and words that are linked to regions by location tokens.

Peng et al. 2023, arXiv 2306.14824 (Kosmos-2). Official code: github.com/microsoft/unilm, `kosmos-2`.

Differs:
    - encoder states are taken before the encoder's final norm;
    - `places` and `normalise` are ours, off by default: tokens told of their place in 2-D, and LayerNorm before, output
      where the LLM's embeddings are; `grid` is 32 in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import sites, tokens
from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.latents import Latents
from isthmus.connectors.pool import Normalised, settle, whole_grid
from isthmus.data.boxes import Links
from isthmus.encoders import Encoder
from isthmus.types import Layout

if TYPE_CHECKING:
    from isthmus.model import VLM

START, END = "<image>", "</image>"


class Kosmos2(Aligner):
    """A single attention of learned queries to the picture and themselves; `grid`² location tokens are new words."""

    name = "kosmos2"
    family = "perceiver"
    also = "data"

    class Options(Frozen):
        queries: int = Field(64, ge=1)
        """What a picture costs the LLM."""
        heads: int = Field(32, ge=1)
        grid: int = Field(32, ge=2, le=100)
        """Cells of a side; a location token stands for each."""
        places: bool = False
        normalise: bool = False

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        options = self.options
        grid = whole_grid(encoder) if options.places else None
        joint: Connector = Latents(encoder.width, width, options.queries, options.heads, grid)
        return Normalised(joint, encoder.width, width) if options.normalise else joint

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(tokens, before=START, after=END)

    def boxes(self) -> Links:
        return Links(grid=self.options.grid)

    def new_tokens(self) -> tuple[str, ...]:
        return (START, END, *self.boxes().tokens)

    def birth(self, model: VLM) -> None:
        """Location tokens start apart from each other: drawn with the mean and deviation of the LLM's own words."""
        tokens.initialise(model.llm, "normal")
        settle(model.connectors, sites.words(model.llm))
