"""What something else saw in a picture, put beside it as tags: a tagger's guesses, scene truth, a user's own.

Soft prompting with tags: Chen et al. 2024, arXiv 2311.11860 (LION). Its tagger, RAM (arXiv 2306.03514), is run where a
user has its weights (`ram`, `ram_folder`); an embedded ImageNet classifier stands in for it elsewhere.

Differs:
- in order that the cost of wrong tags can be measured, any share of them can be exchanged for names of things that are
  not there. Which ones depends on the picture and the seed alone, and a tag that is wrong at one rate is wrong at every
  higher one
- tags stand with the surest first, at most twenty; RAM's release gives all of them in the order of its list
- RAM has a threshold for every tag, which counts in any case, and `least` beside it: a tag passes both. LION's code
  asks RAM for 0.85 by an argument that the release does not read, so that together they tag as is done here by default;
  `least: 0.85` is what was asked for, but for the few tags whose own threshold is higher
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch.utils.data import get_worker_info

from isthmus import assets, parts
from isthmus.assets import packages
from isthmus.config import EncoderConfig, Frozen, Source, check
from isthmus.data import media as pictures
from isthmus.data import sets, views
from isthmus.data.concepts import alike, names
from isthmus.data.scenes import Scene
from isthmus.encoders import lite
from isthmus.prepare.ram import RAM
from isthmus.prepare.ram_folder import WEIGHTS, Folder
from isthmus.types import ConfigError, DataError, Image, Part, Sample, Tag, Turn

See: TypeAlias = Callable[[Sample, Sequence[Image]], list[tuple[Tag, ...]]]
"""Tags of each of a sample's pictures."""

Progress: TypeAlias = Callable[[int, int], None]
AT_ONCE = 8
"""Samples whose pictures a tagger is shown together."""
TOGETHER = 4
"""Pictures that RAM looks at together: every one of them takes some hundred megabytes meanwhile."""
LISTED = 20
"""Guesses per picture that are kept on disk, whatever a recipe then takes of them."""


class Tagging(Frozen):
    """Which tags stand beside pictures (`Source.tags`, or `tags` among a task's options)."""

    by: Literal["imagenet", "ram", "record", "scene"]
    """The embedded ImageNet classifier; RAM; `meta.tags` of a record, for its first picture; or what a scene holds."""
    weights: str | None = None
    """Folder of RAM's weights and lists (`ram_folder`)."""
    most: int = Field(10, ge=1, le=LISTED)
    """At most so many per picture, the surest first."""
    least: float = Field(0.05, ge=0, le=1)
    """Surer than this; of RAM's also surer than the tag's own threshold."""
    wrong: float = Field(0.0, ge=0, le=1)
    """Share of them that is exchanged for names of things that are not there."""
    drop: float = Field(0.0, ge=0, le=1)
    """Share of the pictures that get none."""
    seed: int = 0

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        if (self.by == "ram") != (self.weights is not None):
            raise ValueError(
                "`by: ram` and `weights: FOLDER` belong together; the other taggers have no weights of yours"
            )
        return self


@dataclass(frozen=True)
class Tagger:
    """Puts tags behind every picture of a sample, in all its conversations."""

    how: Tagging
    see: See

    @classmethod
    def of(cls, options: dict[str, Any], where: str) -> Tagger:
        """From plain values.

        Raises:
            ConfigError: an option is unknown or wrong, or RAM's folder lacks a file.
            DataError: RAM's folder holds something else.
        """
        how = check(Tagging, options, f"tags of {where}")
        if how.weights is not None:
            _recogniser(how.weights)  # a wrong folder is refused before anything is looked at
        looks: See = functools.partial(_looked, how)
        return cls(how, {"imagenet": looks, "ram": looks, "record": _of_record, "scene": _of_scene}[how.by])

    def __call__(self, sample: Sample) -> Sample:
        """The sample with tags; in the same order at every call: the surest first, equals by name."""
        shown = [medium for medium in sample.media if isinstance(medium, Image)]
        if not shown:
            return sample
        seen = [self._chosen(image, tags) for image, tags in zip(shown, self.see(sample, shown), strict=True)]
        turns, *branches = (_beside(turns, seen) for turns in (sample.turns, *sample.branches))
        return sample.but(turns=turns, branches=tuple(branches))

    def _chosen(self, image: Image, tags: Iterable[Tag]) -> tuple[Tag, ...]:
        key = pictures.content_key(image.source)
        if _chance(self.how.seed, key, "drop") < self.how.drop:
            return ()
        seen = _ordered(tags)
        true = [tag for tag in seen if tag.score > self.how.least][: self.how.most]
        found = list(true)
        for place, tag in enumerate(true):
            if _chance(self.how.seed, key, f"wrong {place}") < self.how.wrong:
                found[place] = replace(tag, text=_stranger(f"{self.how.seed} {key} {place}", [*seen, *found]))
        return _ordered(found)


def open_set(source: Source, seed: int) -> sets.Set:
    """A set that a recipe names, with the tags that it asks for, or those that the sets do that it is made of.

    Raises:
        ConfigError: documents ask for tags beside those of their sets, or for those of records, which they have not
            themselves; or an option is unknown or wrong. Further errors as in `data.sets.open_set`.
    """
    opened = sets.open_set(source, seed, open_set)
    if not source.tags:
        return opened
    tagger = Tagger.of(source.tags, source.name)
    if source.name == "documents" and (tagger.how.by == "record" or any(each.tags for each in sets.made_of(source))):
        raise ConfigError(
            "documents are made of other sets, whose records or sources bring tags of their own",
            "leave tags out here, and give them to the sets in options.of",
        )
    return opened.map(tagger)


def look_ahead(
    sources: Sequence[Source], seed: int, progress: Progress | None = None, rank: int = 0, size: int = 1
) -> None:
    """Let taggers see what these sources will show, so that whoever reads their samples finds it done.

    Of `size` processes that call this with the same sources at once, number `rank` sees its share; `progress` is called
    with the samples done and those of the share.
    """
    named = [each for source in sources for each in (source, *sets.made_of(source))]
    hows = [(source, Tagger.of(source.tags, source.name).how) for source in named if source.tags]
    wanted = [(sets.open_set(source, seed), how) for source, how in hows if how.by in ("imagenet", "ram")]
    total, done = sum(len(range(rank, len(items), size)) for items, _ in wanted), 0
    lookers = [_looker(how) for _, how in wanted]
    for (items, _), looker in zip(wanted, lookers):
        share = (items[place] for place in range(rank, len(items), size))
        while some := list(islice(share, AT_ONCE)):
            looker.see([medium for sample in some for medium in sample.media if isinstance(medium, Image)])
            done += len(some)
            if progress is not None:
                progress(done, total)
    for looker in lookers:
        looker.rest()


def _beside(turns: Sequence[Turn], seen: Sequence[tuple[Tag, ...]]) -> tuple[Turn, ...]:
    fresh = iter(seen)

    def parts_of(turn: Turn) -> Iterable[Part]:
        for part in turn.parts:
            yield part
            if isinstance(part, Image):
                yield from next(fresh)

    return tuple(replace(turn, parts=tuple(parts_of(turn))) for turn in turns)


def _ordered(tags: Iterable[Tag]) -> tuple[Tag, ...]:
    return tuple(sorted(tags, key=lambda tag: (-tag.score, tag.text)))


def _chance(*what: int | str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def _stranger(seed: str, there: Sequence[Tag]) -> str:
    """The name of something that stands for none of the tags."""
    random, known = Random(f"stranger {seed}"), _vocabulary()
    while True:
        name = random.choice(known)
        if not any(alike(name, tag.text) for tag in there):
            return name


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    """What wrong tags are drawn from: the names of all drawings."""
    return tuple(sorted(set(names().values())))


# ---------------------------------------------------------------------------------------------- scene truth, records


def _of_scene(sample: Sample, shown: Sequence[Image]) -> list[tuple[Tag, ...]]:
    return [_scene(sample, image.source) for image in shown]


def _scene(sample: Sample, source: Any) -> tuple[Tag, ...]:
    if not isinstance(source, Scene):
        raise DataError(
            f"sample {sample.id}: its picture is no scene, of which the truth is known", "set tags.by to imagenet"
        )
    return tuple(Tag(names()[char]) for char in source.counts)


def _of_record(sample: Sample, shown: Sequence[Image]) -> list[tuple[Tag, ...]]:
    """`meta.tags`: names, or pairs of a name and how sure its tagger was; none where the record has none."""
    given = sample.meta.get("tags", [])
    try:
        if not isinstance(given, list | tuple):  # a text would be a tag per letter
            raise TypeError
        found = tuple(Tag(one) if isinstance(one, str) else Tag(str(one[0]), float(one[1])) for one in given)
    except (TypeError, ValueError, IndexError, KeyError):
        raise DataError(
            f"sample {sample.id}: its meta.tags are not tags", 'write ["dog", "ball"] or [["dog", 0.9], …]'
        ) from None
    return [found, *[()] * (len(shown) - 1)]


# ---------------------------------------------------------------------------------------------- what is looked at once


def _looked(how: Tagging, sample: Sample, shown: Sequence[Image]) -> list[tuple[Tag, ...]]:
    return _looker(how).see(shown)


def _looker(how: Tagging) -> Looker:
    return _classifier() if how.weights is None else _recogniser(how.weights)


@functools.cache
def _classifier() -> Classifier:
    return Classifier(assets.home() / "tags")


@functools.cache
def _recogniser(weights: str) -> Recogniser:
    return Recogniser(assets.home() / "tags", Folder.of(Path(weights).expanduser()))


class Looker(ABC):
    """What a network saw in a picture, kept on disk by the picture's content.

    Args:
        folder: parent folder; every identity of a network (weights, preprocessing, names) has a file below it.
    """

    def __init__(self, folder: Path, name: str, identity: Sequence[Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.jsonl"
        self._known: dict[str, tuple[Tag, ...]] = {}
        self._read_bytes = 0
        self._read_on()

    def see(self, images: Sequence[Image]) -> list[tuple[Tag, ...]]:
        """The likeliest tags of each picture with their probabilities, from disk where it was seen before."""
        keys = [pictures.content_key(image.source) for image in images]
        if not self._known.keys() >= set(keys):
            self._read_on()  # another process may have seen some meanwhile
        missing = {key: image for key, image in zip(keys, images) if key not in self._known}
        if missing:
            found = dict(zip(missing, self._classify(list(missing.values()))))
            lines = "".join(
                json.dumps([key, [[tag.text, tag.score] for tag in tags]]) + "\n" for key, tags in found.items()
            )
            with self.file.open("ab", buffering=0) as stream:  # in one piece, for others may write, too
                stream.write(lines.encode())
            self._known |= found
        return [self._known[key] for key in keys]

    @abstractmethod
    def rest(self) -> None:
        """Give back the memory that only looking takes."""

    @abstractmethod
    def _classify(self, images: Sequence[Image]) -> list[tuple[Tag, ...]]: ...

    def _read_on(self) -> None:
        """Learn what is on disk beyond what was read; of a line that was left half written nothing is learnt."""
        if not self.file.is_file() or self.file.stat().st_size == self._read_bytes:
            return
        with self.file.open("rb") as stream:
            stream.seek(self._read_bytes)
            new = stream.read()
        self._read_bytes += len(new)
        for line in new.splitlines():
            try:
                key, found = json.loads(line)
            except ValueError:
                continue
            self._known[key] = tuple(Tag(text, score) for text, score in found)


def imagenet_names() -> tuple[str, ...]:
    """The thousand classes in their usual order, in lower case, without what some have in brackets.

    Raises:
        IsthmusError: the package was not fetched.
    """
    file = assets.locate(packages.IMAGENET, packages.IMAGENET.members[0])
    return tuple(name.partition(" (")[0].lower() for name in json.loads(file.read_text(encoding="utf-8")))


class Classifier(Looker):
    """EfficientNet-Lite0 with its own head, of which the likeliest classes are kept."""

    def __init__(self, folder: Path):
        config = EncoderConfig(source=parts.EMBEDDED_ENCODER, aspect="crop")
        path = parts.encoder_weights(config)
        self.encoder = lite.load(config, path, {"weights": parts.fingerprint(path)})
        self.names = imagenet_names()
        super().__init__(folder, "imagenet", [self.encoder.identity(), self.names, LISTED])

    def rest(self) -> None:
        """Nothing: it is small."""

    @torch.inference_mode()
    def _classify(self, images: Sequence[Image]) -> list[tuple[Tag, ...]]:
        opened = (pictures.open_image(image.source) for image in images)
        pixels = torch.stack([views.pixels(one, self.encoder.processor, self.encoder.aspect) for one in opened])
        top = self.encoder.classify(pixels).softmax(-1).topk(LISTED)
        return [
            tuple(Tag(self.names[index], round(score, 4)) for score, index in zip(scores, indices))
            for scores, indices in zip(top.values.tolist(), top.indices.tolist())
        ]


class Recogniser(Looker):
    """RAM, of which the likeliest tags above their thresholds are kept; it looks on an accelerator if there is one."""

    def __init__(self, folder: Path, release: Folder):
        self.release = release
        self._network: RAM | None = None
        identity = [parts.fingerprint(release.path / WEIGHTS), release.names, release.thresholds, LISTED]
        super().__init__(folder, "ram", identity)

    def rest(self) -> None:
        """Drop the network, which is large; it is read again where it is needed."""
        self._network = None

    @torch.inference_mode()
    def _classify(self, images: Sequence[Image]) -> list[tuple[Tag, ...]]:
        network, device = self._awake()
        thresholds, found = torch.tensor(self.release.thresholds), []
        for start in range(0, len(images), TOGETHER):
            opened = (pictures.open_image(image.source) for image in images[start : start + TOGETHER])
            pixels = torch.stack([views.pixels(one, self.release.processor, "squash") for one in opened])
            sure = network(pixels.to(device)).sigmoid().cpu()
            top = (sure * (sure > thresholds)).topk(min(LISTED, sure.shape[-1]))
            for scores, indices in zip(top.values.tolist(), top.indices.tolist()):
                pairs = [(score, index) for score, index in zip(scores, indices) if score]
                found.append(tuple(Tag(self.release.names[index], round(score, 4)) for score, index in pairs))
        return found

    def _awake(self) -> tuple[RAM, torch.device]:
        """The network, on the device that this process may use: forked workers have the CPU alone."""
        device = torch.device("cpu")
        if get_worker_info() is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator() or device
        if self._network is None or next(self._network.parameters()).device.type != device.type:
            self._network = self.release.network().to(device)
        return self._network, device
