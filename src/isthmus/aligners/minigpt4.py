"""MiniGPT-4: BLIP-2's Q-Former as it was trained, frozen, and one Linear to another LLM.

Zhu et al. 2023, arXiv 2304.10592. Official code: github.com/Vision-CAIR/MiniGPT-4.

Differs:
    - the Q-Former's weights come from the `qformer` option; without it, it is newborn, and a first stage must train it
      before it is frozen;
    - the LLM's chat template and its end token take the place of `###Human:`, `###Assistant:` and `###`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus import parts
from isthmus.aligner import Aligner
from isthmus.connectors import Connector, qformer_weights
from isthmus.connectors.qformer import Begun, QFormer
from isthmus.encoders import Encoder
from isthmus.types import Layout

if TYPE_CHECKING:
    from isthmus.model import VLM


class MiniGPT4(Aligner):
    """32 queries between `<Img>` and `</Img>`; in training, only `connectors.*.project` learns."""

    name = "minigpt4"
    family = "perceiver"

    class Options(Begun):
        """A Q-Former's; `qformer` is the trained one."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return QFormer(encoder.width, width, self.options)

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(tokens, before="<Img>", after="</Img>")

    def birth(self, model: VLM) -> None:
        """Take weights over, where some are named."""
        qformer_weights.begin(model, self.options.qformer, parts.tensors)
