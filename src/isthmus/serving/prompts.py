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
from isthmus.data.collate import route_of
from isthmus.data.reading import Reader
from isthmus.model import VLM
from isthmus.serving.pictures import Pictures, Seen
from isthmus.serving.pool import Row
from isthmus.serving.prefix import Prefixes, Symbols
from isthmus.types import KIND, Batch, Features, Past, Route, Sample, Turn

if TYPE_CHECKING:
    from isthmus.serving.answers import Job


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where the assistant is to speak.

    Attributes:
        spans: where the placeholders of each medium stand; empty ones where the joint keeps media aside.
        read: what connectors read beside each medium, [N, L], or None.
        route: of what kind the conversation is (`types.Route`), for joints that treat kinds apart.
    """

    ids: list[int]
    modality: list[int]
    spans: list[tuple[int, int]]
    seen: tuple[Seen, ...]
    read: Tensor | None
    route: int = Route.IMAGE

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
        if self.route:
            media[0] = (*media.get(0, ()), self.route)
        whole = [*self.ids, *ids]
        return tuple((token, media[place]) if place in media else token for place, token in enumerate(whole))


def prepare(
    turns: Sequence[Turn], renderer: Renderer, reader: Reader | None, pictures: Pictures, route: int | None = None
) -> Prompt:
    """Render a conversation that ends with the user, and name its pictures.

    Args:
        route: of what kind it is; None lets its parts tell.

    Raises:
        ConfigError, DataError: the template refuses it, or a picture cannot be read; or the route is no kind of task.
    """
    rendered = renderer.render(turns, open_answer=True)
    seen = tuple(pictures.see(medium) for medium in rendered.media)
    sample, read = Sample(tuple(turns), meta={} if route is None else {"route": route}), None
    if reader is not None and reader.reading.of == "question" and rendered.media:
        read = reader([(sample, rendered.media)])[KIND[type(rendered.media[0])]]
    return Prompt(rendered.ids, rendered.modality, rendered.spans, seen, read, route_of(sample))


class Prefill:
    """Reads a prompt chunk by chunk, from where an earlier one is known, once its new pictures were looked at.

    Attributes:
        reused: tokens that were known; -1 until that is asked.
        row: the past of the whole prompt, once it was read.
        hidden_D: the state of its last token.
    """

    def __init__(self, job: Job, model: VLM, pictures: Pictures, prefixes: Prefixes):
        self.job, self.model, self.pictures, self.prefixes = job, model, pictures, prefixes
        self.reused = self.at = -1
        self.looked: dict[str, Features] = {}

    @property
    def done(self) -> bool:
        """Whether the prompt is read."""
        return self.at == len(self.job.prompt.ids)

    def advance(self, chunk: int) -> int:
        """Read on by about so many tokens; how many it were, vectors of pictures that were made among them."""
        made = 0
        if self.at < 0:
            made = self._look(chunk)
            if made >= chunk:
                return made
            self._begin()
        end = self._whole(min(self.at + chunk - made, self.segment_1T.shape[1]))
        embeds_1CD = self.embeds_1TD[:, self.at - self.reused : end - self.reused]
        segment_1S, route = self.segment_1T[:, :end], self.job.prompt.route
        route_1S = torch.full_like(segment_1S, route) if route else None
        hidden_1CD, _, _ = self.model.think(embeds_1CD, segment_1S, self.modality_1T[:, :end], route_1S, self.past)
        self.at = end
        if self.done:
            self.hidden_D = hidden_1CD[0, -1]
            self.row = Row.of(self.past, self.modality_1T[0], route)
        return made + embeds_1CD.shape[1]

    def _look(self, most: int) -> int:
        """Look at the new pictures, one by one, until so many vectors were made; how many it were."""
        prompt = self.job.prompt
        if self.reused < 0:
            self.known = self.prefixes.find(prompt.symbols, prompt.spans)
            self.reused = 0 if self.known is None else len(self.known)
            self.new = [number for number, (start, _) in enumerate(prompt.spans) if start >= self.reused]
        made = 0
        for seen in (prompt.seen[number] for number in self.new):
            if made >= most:
                break
            if seen.key not in self.looked:
                self.looked[seen.key], vectors = self.pictures.look(seen)
                made += vectors
        return made

    def _begin(self) -> None:
        """Embed what is new."""
        model, batch = self.model, self._batch()
        connected = model.connect(batch)
        self.embeds_1TD = model.embed(batch, connected)
        self.past = model.aside(batch, connected, self._nothing() if self.known is None else self.known.past())
        self.segment_1T, self.modality_1T = batch.segment_BT, batch.modality_BT
        self.at = self.reused
        self.looked, self.known = {}, None

    def _whole(self, end: int) -> int:
        """The end of a chunk, moved behind a medium that it would cut: positions may depend on where one ends."""
        return next((behind for start, behind in self.job.prompt.spans if start < end < behind), end)

    def _nothing(self) -> Past:
        """An empty past; sliding layers keep everything, as in `pool`."""
        layers = sites.layers(self.model.llm).modules
        return Past(Cache(layers=[DynamicLayer() for _ in layers]))

    def _batch(self) -> Batch:
        """What is new of the prompt; segments and modality cover all of it."""
        prompt, device = self.job.prompt, self.model.device
        ids_1T = torch.tensor([prompt.ids[self.reused :]], device=device)
        modality_1T = torch.tensor([prompt.modality], device=device)
        media, extra_text = {}, {}
        if self.new:
            places = [prompt.spans[number][0] - self.reused for number in self.new]
            looked = [self.looked[prompt.seen[number].key] for number in self.new]
            media["image"] = self.pictures.media(looked, places)
            if prompt.read is not None:
                extra_text["image"] = prompt.read[self.new].to(device)
        segment_1T = torch.ones_like(modality_1T)
        return Batch(ids_1T, segment_1T, modality_1T, media=media, extra_text=extra_text)
