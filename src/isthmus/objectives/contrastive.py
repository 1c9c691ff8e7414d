"""Symmetric InfoNCE between connected media and the words that name them, in the LLM's own input space.

CLIP's loss (Radford et al. 2021, arXiv 2103.00020, github.com/openai/CLIP; open code: mlfoundations/open_clip), used
to warm a connector up without running the LLM. `match="late"` compares token by token as FILIP does (Yao et al. 2021,
arXiv 2111.07783): every word looks for the connected token that is most like it, so that a place of the picture comes
to say the word for what stands there.
Differs:
    - the text tower is the LLM's input embedding, centred (what all texts share says nothing) and without gradient;
    - samples with the same supervised tokens are positives of each other, with equal shares;
    - late, words weigh by the logarithm of how few texts of the batch hold them, and one similarity serves both
      directions (FILIP has another one from places to words).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import same, shares
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step

Embed: TypeAlias = Callable[[Tensor], Tensor]

TEMPERATURE = 0.07
"""CLIP's at the start; it is learned as the logarithm of its inverse."""
SHARPEST = 100.0
"""The largest factor of the cosines."""


class Contrastive(Objective):
    """Which text belongs to which medium, both ways, among the media of a batch."""

    class Options(Frozen):
        match: Literal["mean", "late"] = "mean"
        """Cosine of the means of both sides, or of every word with its best connected token."""
        temperature: float = Field(TEMPERATURE, gt=0)
        """What cosines are divided by, at the start."""
        learned: bool = True
        """Whether the temperature trains."""

    name: ClassVar[str] = "contrastive"
    needs = "connected"
    splits = False

    def __init__(self, options: Frozen):
        super().__init__(options)
        sharpness = math.log(1 / self.options.temperature)
        self.sharpness = nn.Parameter(torch.tensor(sharpness), requires_grad=self.options.learned)

    def check(self, vlm: VLM) -> None:
        if vlm.config.is_encoder_decoder:
            raise _misplaced()
        if not vlm.aligner.splices:
            raise ConfigError(
                f"contrastive compares connected tokens with words, and those of {vlm.aligner.name} are no words: they "
                "stay aside",
                "leave the warm stage out for this joint",
            )

    def count(self, batch: Batch) -> int:
        if batch.labels_BT is None or batch.decoder_ids_BU is not None:
            raise _misplaced()
        return sum(len(_texts(batch, kind)) for kind in batch.media)

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        own = [text for kind in output.connected for text in _texts(batch, kind)]
        none_T = batch.segment_BT.new_zeros(0, dtype=torch.long)
        ids_NT = pad_sequence([*own, none_T], batch_first=True, padding_value=IGNORE)[: len(own)]
        ids_MT = self.peers.all_gather(ids_NT, IGNORE)
        if not len(ids_MT):
            return self.sharpness.new_zeros(()) * self.sharpness
        texts = [ids_T[:length] for ids_T, length in zip(ids_MT, (ids_MT != IGNORE).sum(1).tolist())]
        match = late if self.options.match == "late" else mean
        rows = [match(y_NQD, texts, output.embed).float() for y_NQD in output.connected.values()]
        similarity_NM = torch.cat([*rows, self.sharpness.new_zeros(0, len(texts))])
        logits_MM = self.sharpness.exp().clamp(max=SHARPEST) * self.peers.all_gather(similarity_NM)
        target_MM = shares(same(ids_MT))
        to_text = F.cross_entropy(logits_MM, target_MM, reduction="sum")
        to_media = F.cross_entropy(logits_MM.T, target_MM, reduction="sum")
        return (to_text + to_media) / 2 / self.peers.size


def _misplaced() -> ConfigError:
    return ConfigError(
        "contrastive reads labels beside the media, as decoder-only LLMs have them",
        "leave the warm stage out for an encoder-decoder",
    )


def mean(y_NQD: Tensor, texts: Sequence[Tensor], embed: Embed) -> Tensor:
    """Cosines of the mean connected token with the mean word of each text, both from the texts' centre, [N, M]."""
    with torch.no_grad():
        text_MD = torch.stack([embed(ids).float().mean(0) for ids in texts])
        centre_D = text_MD.mean(0)
        text_MD = F.normalize(text_MD - centre_D, dim=-1)
    return F.normalize(y_NQD.float().mean(1) - centre_D, dim=-1) @ text_MD.T


def late(y_NQD: Tensor, texts: Sequence[Tensor], embed: Embed) -> Tensor:
    """Mean over a text's words of the largest cosine with any connected token, [N, M].

    Cosines are taken from the centre of the words that occur; a word weighs log(M / the number of texts that hold it).
    """
    with torch.no_grad():
        word_U = torch.cat(list(texts)).unique()
        held_UM = torch.stack([torch.isin(word_U, ids) for ids in texts], 1).float()
        weight_UM = held_UM * (len(texts) / held_UM.sum(1, keepdim=True)).log().clamp(min=1e-6)
        weight_UM = weight_UM / weight_UM.sum(0)
        word_UD = embed(word_U).float()
        centre_D = word_UD.mean(0)
        word_UD = F.normalize(word_UD - centre_D, dim=-1)
    best_NU = (F.normalize(y_NQD.float() - centre_D, dim=-1) @ word_UD.T).amax(1)
    return best_NU @ weight_UM


def _texts(batch: Batch, kind: str) -> list[Tensor]:
    """The supervised token ids beside each medium of a kind.

    Raises:
        DataError: a medium's sample has none.
    """
    assert batch.labels_BT is not None  # count saw it
    media = batch.media[kind]
    texts = []
    for row, segment in zip(media.row_N, media.segment_N):
        labels = batch.labels_BT[row][batch.segment_BT[row] == segment]
        texts.append(labels[labels != IGNORE])
        if not len(texts[-1]):
            raise DataError(f"a sample among {batch.ids} has no text to compare with", "give it an answer")
    return texts
