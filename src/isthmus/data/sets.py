"""Named sets of samples: the embedded ones, and the user's own files.

Training draws from the recipe's seed; every other split is the same for all seeds, so that scores compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias, cast, overload

from pydantic import Field, field_validator

from isthmus.assets import packages
from isthmus.config import Frozen, Source, check, nearest
from isthmus.data import containers, easyvqa, formats, records, sprites
from isthmus.data.concepts import Split, concepts, countable, names
from isthmus.data.containers import ENDINGS as FILES
from isthmus.data.documents import DocumentOptions, Documents
from isthmus.data.hub import located
from isthmus.data.indexes import Part as Piece
from isthmus.data.pictures import PictureOptions, Pictures, files, shown
from isthmus.data.questions import Asker
from isthmus.data.scenes import Scene, compose, crowd, layout, pick
from isthmus.types import ConfigError, Image, Part, Sample, Text, Turn

Opener: TypeAlias = Callable[[Source, int], "Set"]
SPLITS = ("train", "val", "test", "unseen")
PARTS: dict[str, Piece] = {"train": "kept", "val": "held out", "test": "all"}
"""The splits of a user's file: all but one picture in fifty, that one, and both."""
MANY, FEW = 20_000, 500
"""Pictures of a generated set, in training and elsewhere, unless `count` says otherwise."""


@dataclass(frozen=True)
class Card:
    """What a report says about a set."""

    name: str
    licence: str
    attribution: str
    source: str
    size: int
    """Samples."""


class Set(Sequence[Sample]):
    """Samples made one by one when they are asked for; nothing is drawn before a picture is needed."""

    def __init__(self, card: Card, item: Callable[[int], Sample]) -> None:
        self.card, self._item = card, item

    def __len__(self) -> int:
        return self.card.size

    def first(self, count: int) -> Set:
        """The set's first `count` samples, or all if it has fewer."""
        return Set(replace(self.card, size=min(count, self.card.size)), self._item)

    def map(self, change: Callable[[Sample], Sample]) -> Set:
        """The set with `change` applied to every sample when it is asked for."""
        return Set(self.card, lambda index: change(self._item(index)))

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.card.name} has {len(self)} samples, not {index}")
        return self._item(index % len(self))


@dataclass(frozen=True)
class Routed:
    """Tells a sample of which kind it is."""

    route: int

    def __call__(self, sample: Sample) -> Sample:
        return sample.but(meta={**sample.meta, "route": self.route})


def open_set(source: Source, seed: int, opener: Opener | None = None) -> Set:
    """The set that a recipe names: an embedded one, or a file or folder of the user's.

    Args:
        opener: opens the sets that documents are made of, where it adds something to them.

    Raises:
        ConfigError: no such set, split or option.
        DataError: the file or a sample in it is wrong.
        IsthmusError: an embedded package was not fetched.
    """
    if _is_file(source):
        opened = _file(source, seed)
    elif source.name == "documents" and opener is not None:
        opened = _documents(source, seed, opener)
    elif source.name in EMBEDDED:
        opened = EMBEDDED[source.name](source, seed)
    else:
        raise ConfigError(
            f"no data set is named {source.name!r}{nearest(source.name, list(EMBEDDED))}",
            f"use {', '.join(EMBEDDED)}, a folder, a path that ends in {', '.join(FILES)}, or what `hf download "
            "--repo-type dataset OWNER/NAME` fetched",
        )
    opened = opened if source.limit is None else opened.first(source.limit)
    return opened if source.route is None else opened.map(Routed(source.route))


def stamp(sources: Sequence[Source], seed: int) -> str:
    """Sixteen hex digits that change when these sources hold other samples: with recipe, seed, file or version."""
    return _digits(sources, seed, records.stamp)


def content(source: Source, seed: int) -> str:
    """The same of one source, by what its files hold rather than by when they were written; it takes longer."""
    return _digits([source], seed, records.content)


def _digits(sources: Sequence[Source], seed: int, state: Callable[[formats.Form, containers.Container], str]) -> str:
    states = [one for source in sources for one in each_state(source, seed, state)]
    told = [[source.model_dump(mode="json") for source in sources], seed, states, version("isthmus")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def each_state(source: Source, seed: int, state: Callable[[formats.Form, containers.Container], str]) -> Iterator[str]:
    """What `state` says of each file or folder that a source reads, its own and those of the sets it is made of."""
    for each in (source, *made_of(source)):
        if _is_file(each):
            form = _form(each, seed)
            yield state(form, form.opened())


def here(source: Source) -> bool:
    """Whether the file or folder of a set is on this machine, and those of the sets that it is made of."""
    if source.name not in EMBEDDED:
        return located(source.name).exists()
    return all(map(here, made_of(source)))


def cards() -> list[Card]:
    """The cards of the embedded sets, with the sizes of their training splits."""
    return [open_set(Source.model_validate({"name": name}), seed=0).card for name in EMBEDDED]


def _is_file(source: Source) -> bool:
    return source.name not in EMBEDDED and (Path(source.name).suffix in FILES or located(source.name).exists())


def _form(source: Source, seed: int) -> formats.Form:
    options = check(formats.FileOptions, source.options, source.name)
    return formats.Form(located(source.name), source.images, options, seed)


def _file(source: Source, seed: int) -> Set:
    """A user's file: one picture in fifty is held out as `val`; `test` is the whole file."""
    if source.split not in PARTS:
        remedy = f"use one of {', '.join(PARTS)}; a split of its publisher's is options: {{rows: {source.split}}}"
        raise ConfigError(f"{source.name} has no split {source.split!r}", remedy)
    found = records.Records(_form(source, seed), PARTS[source.split])
    left = f", {found.skipped} faulty ones left out" if found.skipped else ""
    several = source.options.get("rows") is None and len(found.splits) > 1
    left += f", its splits {', '.join(found.splits)} together" if several else ""
    return Set(Card(source.name, "the user's own", "", f"{source.name}{left}", len(found)), found.__getitem__)


# ---------------------------------------------------------------------------------------------- easy-VQA


class EasyOptions(Frozen):
    """Options of `easy-vqa`."""

    kinds: tuple[Literal["yesno", "open", "caption"], ...] = ("yesno", "open")
    together: bool = False
    """All questions about a picture in one sample, as branches that share it; otherwise each in one of its own."""


def _easy_vqa(source: Source, seed: int) -> Set:
    options = check(EasyOptions, source.options, "easy-vqa")
    data = easyvqa.read(source.split, options.kinds, options.together)
    return Set(_card("easy-vqa", (packages.EASY_VQA,), len(data.groups)), data.sample)


# ---------------------------------------------------------------------------------------------- generated sets


Kind: TypeAlias = Literal[
    "naming",
    "options",
    "checklist",
    "presence",
    "counting",
    "colour",
    "relation",
    "refer",
    "region",
    "names",
    "caption",
]
FAMILIES: dict[str, frozenset[Kind]] = {
    "single": frozenset({"naming", "options", "names"}),
    "layout": frozenset({"checklist", "presence", "colour", "relation", "refer", "region", "names", "caption"}),
    "crowd": frozenset({"checklist", "presence", "counting", "colour", "names", "caption"}),
}
"""What can be asked of one object, of several different ones, and where some object is there several times."""


REPEATED: frozenset[Kind] = frozenset({"presence", "relation", "refer", "region"})
"""What can be asked again of the same picture."""


class SceneOptions(Frozen):
    """Options of `scenes` and `naming`."""

    kinds: tuple[Kind, ...] = ("presence", "counting", "colour", "relation", "caption")
    together: bool = False
    """All questions about a picture in one sample, as branches that share it; otherwise each in one of its own."""
    shown: Literal["picture", "words"] = "picture"
    """`words` shows the names of what is there among those of other things, in place of the picture: a connector that
    speaks in words can then be read by what the LLM learns here, at a fraction of the tokens (as CapDec trains a
    captioner on text alone, arXiv 2211.00575)."""
    repeat: int = Field(1, ge=1)
    """Questions about presence, relations and regions per picture, where they are together."""
    count: int | None = Field(None, ge=1)
    """Pictures."""
    size: int = Field(224, ge=32)
    """Pixels of a side."""
    styles: tuple[str, ...] = (sprites.OPENMOJI,)
    """Drawing styles, one of which is drawn per picture; concepts that all styles share, if any is not OpenMoji."""

    @field_validator("styles")
    @classmethod
    def _known(cls, styles: tuple[str, ...]) -> tuple[str, ...]:
        for style in styles:
            sprites.check_style(style)
        return styles


@dataclass(frozen=True)
class Generator:
    """Makes the samples of a generated set, each from its number alone."""

    split: str
    seed: int
    options: SceneOptions
    singles: tuple[str, ...]
    """Concepts of the split, in the order in which they are shown alone."""
    pool: tuple[str, ...]
    """Those of them that can be among others."""
    groups: tuple[tuple[str, tuple[Kind, ...]], ...]
    """The samples of one cycle: whose family of pictures, and what is asked."""

    def sample(self, index: int) -> Sample:
        cycle, position = divmod(index, len(self.groups))
        family, kinds = self.groups[position]
        scene, main = self._scene(family, cycle)
        pool = self.singles if family == "single" else self.pool
        asker = Asker(scene, pool, main, varied=self.split == "train")
        questions = [asker.ask(kind, kinds[:place].count(kind)) for place, kind in enumerate(kinds)]
        meta: dict[str, Any] = {
            "kind": "several",
            "cluster": names()[main] if family == "single" else scene.key,
            "style": scene.style,
            "boxes": scene.boxes,
        }
        if len(questions) == 1:
            (only,) = questions
            meta |= {"kind": only.kind, "choices": only.choices, "answer": only.answer}
            meta |= {} if only.box is None else {"box": only.box.xyxy}
        shown = self._words(scene) if self.options.shown == "words" else (Image(scene),)
        turns, *branches = [
            (Turn.say("user", *shown, *question.asked), Turn.say("assistant", *question.told)) for question in questions
        ]
        asked = "+".join((*dict.fromkeys(kinds), *(["words"] if self.options.shown == "words" else [])))
        return Sample(turns, f"scenes/{self.split}/{family}/{cycle}/{asked}", meta, branches=tuple(branches))

    def _words(self, scene: Scene) -> tuple[Part, ...]:
        """What is there and, unless it is alone, as many other things, in any order."""
        random = Random(f"words {scene.seed}")
        present = tuple(scene.counts)
        others = pick(random, self.pool, len(present), but=present) if len(scene.objects) > 1 else ()
        listed = [names()[char] for char in (*present, *others)]
        return (*(Text(f" {name}") for name in random.sample(listed, len(listed))), Text("\n"))

    def _scene(self, family: str, number: int) -> tuple[Scene, str]:
        """A picture of a family, and the concept that naming or counting asks for."""
        seed = f"{self.split} {self.seed} {family} {number}"
        style = Random(f"style {seed}").choice(self.options.styles)
        if family == "single":
            char = self.singles[number % len(self.singles)]
            return compose(seed, [char], self.options.size, style), char
        if family == "layout":
            return layout(seed, self.pool, self.options.size, style), ""
        return crowd(seed, self.pool, self.options.size, style)


def _scenes(source: Source, seed: int) -> Set:
    if source.split not in SPLITS:
        raise ConfigError(f"{source.name} has no split {source.split!r}", f"use one of {', '.join(SPLITS)}")
    options = check(SceneOptions, source.options, source.name)
    seed = seed if source.split == "train" else 0
    known = concepts(cast(Split, source.split))
    if options.styles != (sprites.OPENMOJI,):
        known = tuple(char for char in known if char in sprites.shared())
    singles = Random(f"order {seed}").sample(known, len(known))
    groups = tuple(_groups(options))
    generator = Generator(source.split, seed, options, tuple(singles), tuple(filter(countable, known)), groups)
    pictures = options.count or (MANY if source.split == "train" else FEW)
    cycles = -(-pictures // len({family for family, _ in groups}))
    drawn = tuple(sprites.package(style) for style in options.styles)
    return Set(_card(source.name, drawn, cycles * len(groups)), generator.sample)


def _groups(options: SceneOptions) -> Iterator[tuple[str, tuple[Kind, ...]]]:
    """What is asked of one picture of each family: all in one sample, or one question each."""
    for family, possible in FAMILIES.items():
        kinds = tuple(kind for kind in options.kinds if kind in possible)
        if options.together and kinds:
            yield family, tuple(kind for kind in kinds for _ in range(options.repeat if kind in REPEATED else 1))
        else:
            yield from ((family, (kind,)) for kind in kinds)


def _naming(source: Source, seed: int) -> Set:
    """One object per picture, every concept of the split as often as every other."""
    return _scenes(source.but(options={"kinds": ("naming",), **source.options}), seed)


# ---------------------------------------------------------------------------------------------- documents


def _documents(source: Source, seed: int, opener: Opener = open_set) -> Set:
    """Several pictures of other sets, each followed by its text."""
    options = check(DocumentOptions, source.options, source.name)
    shelves = tuple(opener(each, seed) for each in made_of(source))
    card = _joined(source.name, shelves, options.count or (MANY if source.split == "train" else FEW))
    return Set(card, Documents(source.split, seed if source.split == "train" else 0, options, shelves).sample)


def _pictures(source: Source, seed: int) -> Set:
    """A folder's pictures, or what other sets show, and nothing that they say."""
    if source.images is not None:
        if source.options:
            raise ConfigError("pictures are a folder's or those of other sets, not both", "leave out `of` or `images`")
        found = files(source.images, source.split)
        card = Card(source.name, "the user's own", "", str(source.images), len(found))
        return Set(card, lambda index: shown(found[index]))
    shelves = tuple(open_set(each, seed) for each in made_of(source))
    pictures = Pictures(shelves)
    return Set(_joined(source.name, shelves, len(pictures)), pictures.sample)


MADE_OF: dict[str, type[DocumentOptions | PictureOptions]] = {"documents": DocumentOptions, "pictures": PictureOptions}
"""Sets that are made of others, which their option `of` names."""


def made_of(source: Source) -> tuple[Source, ...]:
    """The sets that a set is made of, in its own split; of most there are none."""
    if source.name not in MADE_OF:
        return ()
    return tuple(each.but(split=source.split) for each in check(MADE_OF[source.name], source.options, source.name).of)


def _joined(name: str, shelves: Sequence[Set], size: int) -> Card:
    """The card of a set that is made of others."""
    cards = [shelf.card for shelf in shelves]
    licence, attribution, origin = (
        "; ".join(dict.fromkeys(texts)) for texts in zip(*((c.licence, c.attribution, c.source) for c in cards))
    )
    return Card(name, licence, attribution, origin, size)


def _card(name: str, origins: tuple[packages.Package, ...], size: int) -> Card:
    licence = ", ".join(dict.fromkeys(origin.licence for origin in origins))
    attribution = "; ".join(origin.attribution for origin in origins)
    source = ", ".join(f"{origin.name} {origin.version}" for origin in origins)
    return Card(name, licence, attribution, source, size)


EMBEDDED: dict[str, Callable[[Source, int], Set]] = {
    "documents": _documents,
    "easy-vqa": _easy_vqa,
    "naming": _naming,
    "pictures": _pictures,
    "scenes": _scenes,
}
"""The sets that come with Isthmus, by name."""
