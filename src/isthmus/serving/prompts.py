"""A conversation as the engine reads it: its tokens, its media by content, and the states of what is new in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from isthmus import sites
from isthmus.data.chat import Renderer
from isthmus.data.reading import Reader
from isthmus.model import VLM
from isthmus.serving.pictures import Pictures, Seen
from isthmus.serving.pool import Row
from isthmus.serving.prefix import Prefixes, Symbols
from isthmus.types import KIND, Batch, Past, Sample, Turn

if TYPE_CHECKING:
    from isthmus.serving.answers import Job


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where the assistant is to speak.

    Attributes:
        spans: where the placeholders of each medium stand; empty ones where the joint keeps media aside.
        read: what connectors read beside each medium, [N, L], or None.
    """

    ids: list[int]
    modality: list[int]
    spans: list[tuple[int, int]]
    seen: tuple[Seen, ...]
    read: Tensor | None

    @property
    def places(self) -> list[int]:
        """How many tokens each medium takes."""
        return [end - start for start, end in self.spans]

    @property
    def symbols(self) -> Symbols:
        """What the states of each token depend on."""
        return self.followed([])

    def followed(self, ids: Sequence[int]) -> Symbols:
        """The symbols of the prompt and of what was said after it."""
        media: dict[int, tuple[Hashable, ...]] = {}
        for number, (start, _) in enumerate(self.spans):
            asked = () if self.read is None else tuple(self.read[number].tolist())
            media[start] = (*media.get(start, ()), self.seen[number].key, asked)
        whole = [*self.ids, *ids]
        return tuple((token, media[place]) if place in media else token for place, token in enumerate(whole))


def prepare(turns: Sequence[Turn], renderer: Renderer, reader: Reader | None, pictures: Pictures) -> Prompt:
    """Render a conversation that ends with the user, and name its pictures.

    Raises:
        ConfigError, DataError: the template refuses it, or a picture cannot be read.
    """
    rendered = renderer.render(turns, open_answer=True)
    seen = tuple(pictures.see(medium) for medium in rendered.media)
    read = None
    if reader is not None and reader.reading.of == "question" and rendered.media:
        read = reader([(Sample(tuple(turns)), rendered.media)])[KIND[type(rendered.media[0])]]
    return Prompt(rendered.ids, rendered.modality, rendered.spans, seen, read)


class Prefill:
    """Reads a prompt chunk by chunk, from where an earlier one is known.

    Attributes:
        reused: tokens that were known.
        row: the past of the whole prompt, once it was read.
        hidden_D: the state of its last token.
    """

    def __init__(self, job: Job, model: VLM, pictures: Pictures, prefixes: Prefixes):
        self.job, self.model, self.pictures, self.prefixes = job, model, pictures, prefixes
        self.reused = -1
        self.at = 0

    @property
    def done(self) -> bool:
        """Whether the prompt is read."""
        return self.at == len(self.job.prompt.ids)

    def advance(self, chunk: int) -> int:
        """Read on by about so many tokens; how many it were."""
        if self.reused < 0:
            self._begin()
        end = self._whole(min(self.at + chunk, self.segment_1T.shape[1]))
        embeds_1CD = self.embeds_1TD[:, self.at - self.reused : end - self.reused]
        hidden_1CD, _, _ = self.model.think(
            embeds_1CD, self.segment_1T[:, :end], self.modality_1T[:, :end], None, self.past
        )
        self.at = end
        if self.done:
            self.hidden_D = hidden_1CD[0, -1]
            self.row = Row.of(self.past, self.modality_1T[0])
        return embeds_1CD.shape[1]

    def _begin(self) -> None:
        """Find what is known, look at the pictures that are not, and embed the rest."""
        prompt, model = self.job.prompt, self.model
        known = self.prefixes.find(prompt.symbols, prompt.spans)
        reused = 0 if known is None else len(known)
        batch = self._batch(prompt, reused)
        connected = model.connect(batch)
        self.embeds_1TD = model.embed(batch, connected)
        self.past = model.aside(batch, connected, self._nothing() if known is None else known.past())
        self.segment_1T, self.modality_1T = batch.segment_BT, batch.modality_BT
        self.reused = self.at = reused

    def _whole(self, end: int) -> int:
        """The end of a chunk, moved behind a medium that it would cut: positions may depend on where one ends."""
        return next((behind for start, behind in self.job.prompt.spans if start < end < behind), end)

    def _nothing(self) -> Past:
        """An empty past; sliding layers keep everything, as in `pool`."""
        layers = sites.layers(self.model.llm).modules
        return Past(Cache(layers=[DynamicLayer() for _ in layers]))

    def _batch(self, prompt: Prompt, reused: int) -> Batch:
        """What is new of a prompt; segments and modality cover all of it."""
        device = self.model.device
        ids_1T = torch.tensor([prompt.ids[reused:]], device=device)
        modality_1T = torch.tensor([prompt.modality], device=device)
        new = [number for number, (start, _) in enumerate(prompt.spans) if start >= reused]
        media, extra_text = {}, {}
        if new:
            places = [prompt.spans[number][0] - reused for number in new]
            media["image"] = self.pictures.media([prompt.seen[number] for number in new], places)
            if prompt.read is not None:
                extra_text["image"] = prompt.read[new].to(device)
        segment_1T = torch.ones_like(modality_1T)
        return Batch(ids_1T, segment_1T, modality_1T, media=media, extra_text=extra_text)
