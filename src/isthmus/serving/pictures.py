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

    def media(self, seen: Sequence[Seen], places: Sequence[int]) -> BatchMedia:
        """The media of one row with their columns, encoding what is new in one go."""
        features = self._features(seen)
        row = torch.zeros(len(seen), dtype=torch.long, device=self.model.device)
        return BatchMedia(row, row + 1, torch.tensor(places, device=self.model.device), features=features)

    def _features(self, seen: Sequence[Seen]) -> Features:
        found = {each.key: self._known[each.key] for each in seen if each.key in self._known}
        for key in found:
            self._known.move_to_end(key)
        new = {each.key: each for each in seen if each.key not in found}
        self.hits += len(found)
        self.misses += len(new)
        if new:
            encoded = self._encode(torch.stack([each.pixels for each in new.values()]))
            for number, key in enumerate(new):
                found[key] = _one(encoded, number)
                self._keep(key, found[key])
        chosen = [found[each.key] for each in seen]
        taps = {name: torch.cat([one.taps[name] for one in chosen]) for name in chosen[0].taps}
        return Features(torch.cat([one.x_NSE for one in chosen]), taps, chosen[0].grid)

    def _encode(self, pixels: Tensor) -> Features:
        nothing = torch.zeros(len(pixels), dtype=torch.long)
        batch = BatchMedia(nothing, nothing, nothing, pixels=pixels.to(self.model.device))
        return self.model.encode("image", batch)

    def _keep(self, key: str, features: Features) -> None:
        size = _bytes(features)
        if size > self.limit:
            return
        self._known[key] = features
        self.bytes += size
        while self.bytes > self.limit:
            _, old = self._known.popitem(last=False)
            self.bytes -= _bytes(old)


def _one(features: Features, number: int) -> Features:
    """The features of one picture, on their own in memory."""
    return features.map(lambda x: x[number : number + 1].clone())


def _bytes(features: Features) -> int:
    return sum(x.numel() * x.element_size() for x in [features.x_NSE, *features.taps.values()])
