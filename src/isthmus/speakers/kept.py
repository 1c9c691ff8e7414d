"""A speaker whose answers are kept in a folder by request: what was interrupted goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.speakers import Speaker
from isthmus.speakers.cache import Answer, Cache, key_of
from isthmus.speakers.settings import PictureConfig
from isthmus.speakers.wire import messages
from isthmus.types import Sample, Turn


class Kept:
    """Asks another speaker what it has not been asked before.

    Args:
        speaker: answers the same request always alike, or is to be asked only once.
        folder: where answers are kept, as a remote speaker's are.
        identity: what else its answers depend on: weights, decoding.
        say: is told about damaged entries; they are asked again.
        together: requests that it answers at once; their answers are kept then.
    """

    def __init__(
        self,
        speaker: Speaker,
        folder: Path,
        identity: Mapping[str, Any],
        say: Callable[[str], None],
        together: int = 4,
    ):
        self.speaker, self.identity, self.together = speaker, dict(identity), together
        self.cache = Cache(folder, say)

    def say(self, turns: Sequence[Turn]) -> str:
        """As the other says, or said before."""
        return self.say_all([Sample(tuple(turns))])[0]

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        """The same for several conversations, in their order."""
        requests = [{**self.identity, "messages": messages(sample.turns, PictureConfig())} for sample in samples]
        keys = [key_of(request) for request in requests]
        known = [self.cache.get(key) for key in keys]
        new = [place for place, answer in enumerate(known) if answer is None]
        for start in range(0, len(new), self.together):
            places = new[start : start + self.together]
            for place, text in zip(places, self.speaker.say_all([samples[place] for place in places]), strict=True):
                known[place] = Answer(text=text)
                self.cache.put(keys[place], requests[place], Answer(text=text))
        return [answer.text for answer in known if answer is not None]

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        """In one piece."""
        yield self.say(turns)
