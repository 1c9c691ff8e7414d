"""Encoder features of pictures that were seen before, found by what is in them."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.data import media, views
from isthmus.model import VLM
from isthmus.types import KIND, ConfigError, Features, Image, Medium
from isthmus.types import Media as BatchMedia


@dataclass(frozen=True)
class Seen:
    """A medium of one request: its name by content, and the pixels that the encoder wants."""

    key: str
    pixels: Tensor


class Pictures:
    """Features by content, at most `limit` bytes of them; the least recently used go first.

    The key holds mode, size, pixels and how the processor prepares them: pixels alone are the same for two shapes, and
    nobody may name a key himself.
    """

    def __init__(self, model: VLM, limit: int):
        self.model, self.limit = model, limit
        self.bytes = self.hits = self.misses = 0
        processor = model.processor
        prepared = {"aspect": processor.aspect, **processor.image_processor.to_dict()}
        self._salt = json.dumps(prepared, sort_keys=True, default=str)
        self._known: OrderedDict[str, Features] = OrderedDict()

    def see(self, medium: Medium) -> Seen:
        """Name and prepare a medium; of the picture itself nothing is kept. May be called in any thread.

        Raises:
            ConfigError: it is no picture.
            DataError: it cannot be read.
        """
        if not isinstance(medium, Image):
            raise ConfigError(f"{KIND[type(medium)]} is not served", "show frames of it as pictures")
        picture = media.open_image(medium.source)
        key = hashlib.sha256(f"{self._salt} {media.content_key(picture)}".encode()).hexdigest()
        processor = self.model.processor
        return Seen(key, views.pixels(picture, processor.image_processor, processor.aspect))

    def look(self, seen: Seen) -> tuple[Features, int]:
        """The features of one picture, and how many vectors had to be made for them: none where it was known."""
        known = self._known.get(seen.key)
        if known is not None:
            self._known.move_to_end(seen.key)
            self.hits += 1
            return known, 0
        self.misses += 1
        nothing = torch.zeros(1, dtype=torch.long)
        batch = BatchMedia(nothing, nothing, nothing, pixels=seen.pixels[None].to(self.model.device))
        made = self.model.encode("image", batch).map(torch.clone)  # on their own in memory
        self._keep(seen.key, made)
        return made, made.x_NSE.shape[1]

    def media(self, looked: Sequence[Features], places: Sequence[int]) -> BatchMedia:
        """The media of one row with their columns."""
        taps = {name: torch.cat([one.taps[name] for one in looked]) for name in looked[0].taps}
        features = Features(torch.cat([one.x_NSE for one in looked]), taps, looked[0].grid)
        row = torch.zeros(len(looked), dtype=torch.long, device=self.model.device)
        return BatchMedia(row, row + 1, torch.tensor(places, device=self.model.device), features=features)

    def _keep(self, key: str, features: Features) -> None:
        size = _bytes(features)
        if size > self.limit:
            return
        self._known[key] = features
        self.bytes += size
        while self.bytes > self.limit:
            _, old = self._known.popitem(last=False)
            self.bytes -= _bytes(old)


def _bytes(features: Features) -> int:
    return sum(x.numel() * x.element_size() for x in [features.x_NSE, *features.taps.values()])
