"""LLaVA: encoder tokens through a linear layer or a small MLP into the LLM's input.

Liu et al. 2023, arXiv 2304.08485 (linear) and arXiv 2310.03744 (two-layer MLP).
Official code: github.com/haotian-liu/LLaVA.

Differs:
    - `pool`, `normalise` and `words` are ours, off by default; the embedded recipe uses the first two, since a 135 M
      LLM on a laptop pays for every image token, and the demo the third, since so small an LLM hardly learns to read
      vectors that are not nearly words (docs/log.md);
    - the published LLaVA-1.5 letter-boxes pictures in both stages; the authors' first stage crops them;
    - in the first stage a line break stands between picture and caption, and the LLM's end token behind it; the
      authors' caption follows the picture at once and ends with a line break;
    - in conversations a picture stands where its marker is; the authors move it to the start of its turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.connectors import Connector
from isthmus.connectors.pool import Projected, settle
from isthmus.encoders import Encoder

if TYPE_CHECKING:
    from isthmus.model import VLM


class LLaVA(Aligner):
    """Projects every encoder token; the projected tokens stand in the LLM's input in place of the image."""

    name = "llava"
    family = "converter"
    also = "data"

    class Options(Projected):
        words: float | None = Field(None, gt=0)
        """Temperature at which output leans towards the words that it is like, after AlignVLM; needs `normalise`."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return self.options.connector(encoder, width, self.options.words)

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
