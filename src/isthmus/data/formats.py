"""Users' own files as samples, every fault with its line, its id and a remedy.

A record is LLaVA's `{id, image | images, conversations: [{from, value}]}` or `{messages: [{role, content}], images}`;
`<image>` in a text is where the next of the record's pictures goes, and `content` may also be a list of parts. What is
null is as good as not there. Other layouts (`layouts`, `tables`) are rewritten as these two, record after record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from isthmus.config import LATER, Frozen
from isthmus.data import containers, layouts, messages, video
from isthmus.data.attached import Attached, Shelf, Unit, full
from isthmus.data.faults import Fault as Fault
from isthmus.data.faults import Wrong, readable, refuse
from isthmus.data.instructions import Wording, put
from isthmus.data.jsons import Place
from isthmus.data.layout import listed
from isthmus.data.messages import turns as turns
from isthmus.types import ConfigError, DataError, Sample, Turn, Video


def _several(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


class FileOptions(Frozen):
    """Options of a file or folder of samples."""

    format: layouts.Name | None = None
    """Its layout; None tells it from the first record."""
    boxes: Unit | None = None
    """What regions count that do not say it; None is what the layout's publishers count."""
    beside: Path | None = None
    """The file that the layout needs besides: VQAv2's annotations, the instances of RefCOCO."""
    rows: Annotated[tuple[str, ...] | None, BeforeValidator(_several)] = Field(None, min_length=1, **LATER)
    """The publisher's splits to take, of data that hold several; None is all of them, which training refuses."""
    prepend: bool | None = Field(None, **LATER)
    """Pictures and videos that no marker places stand before the first question."""
    instructions: Wording = "many"
    """Which wordings ask for what a layout has no question for, or put its question."""
    frames: int | None = Field(None, ge=1, le=video.MOST_FRAMES)
    """Videos are shown as so many pictures, evenly spread; None leaves them to a model that reads videos."""
    fps: float | None = Field(None, gt=0)
    """Pictures per second of a video instead, and then at most `frames` of them."""
    faults: Literal["refuse", "skip"] = "refuse"
    """`skip` leaves out what `isthmus data check` finds, damaged pictures among it, and counts it."""

    @model_validator(mode="after")
    def _limited(self) -> FileOptions:
        if self.fps is not None and self.frames is None:
            raise ValueError("fps needs frames: how many of them at most")
        return self


@dataclass(frozen=True)
class Form:
    """How a file is read.

    Args:
        path: the file or folder.
        images: where relative picture paths start from; None is the file's own folder.
        seed: chooses wordings.
    """

    path: Path
    images: Path | None = None
    options: FileOptions = FileOptions()
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.images or (self.path if self.path.is_dir() else self.path.parent)

    def opened(self) -> containers.Container:
        """What holds its records; see `containers.opened`."""
        with readable(self.path):
            return containers.opened(self.path, self.options.format, self.options.beside)


@dataclass(frozen=True)
class Left:
    """What is left out, be it right or wrong: it is of another split of the publisher's than `rows` names."""

    split: str | None


@dataclass(frozen=True)
class Record:
    """A sample, where its record starts and in which file, which of its samples it is, and the publisher's split."""

    sample: Sample
    place: Place
    file: str
    part: int
    split: str | None

    @property
    def line(self) -> int:
        return self.place.line


def load(
    path: str | Path,
    images: str | Path | None = None,
    options: FileOptions = FileOptions(),  # noqa: B008
) -> list[Sample]:
    """All conversations of a file. Relative picture paths start from `images`, or from the file's own folder.

    With `images` given, pictures lie below it: no absolute paths, no way out by `..`.

    Raises:
        DataError: any record is faulty; the first faults and their number are named.
    """
    path = Path(path)
    found = list(each(Form(path, None if images is None else Path(images), options)))
    samples = [record.sample for record in found if isinstance(record, Record)]
    refuse(path, [fault for fault in found if isinstance(fault, Fault)], len(samples))
    return samples


def check(path: Path, images: Path | None = None, options: FileOptions = FileOptions()) -> list[Fault]:  # noqa: B008
    """Every faulty record of a file, in order; empty where `load` would succeed."""
    return [found for found in each(Form(path, images, options)) if isinstance(found, Fault)]


# ---------------------------------------------------------------------------------------------- files to records


def each(form: Form) -> Iterator[Record | Fault]:
    """What is right and what is wrong with a file, record by record.

    Raises:
        ConfigError: nothing was wrong, and the splits that `rows` names are not there.
    """
    splits, faults = set[str | None](), 0
    for container, place, raw in scan(form):
        for one in parsed(raw, place, container, form):
            if isinstance(one, Fault):
                faults += 1
            else:
                splits.add(one.split)
            if not isinstance(one, Left):
                yield one
    if not faults:
        confirm(form, splits)


def confirm(form: Form, splits: Collection[str | None]) -> None:
    """Raise where splits are to be taken that are not among these.

    Raises:
        ConfigError: with those that are.
    """
    lost = [name for name in form.options.rows or () if name not in splits]
    if lost:
        there = ", ".join(sorted(filter(None, splits))) or "no splits that have names"
        raise ConfigError(f"{form.path} has no rows of {', '.join(lost)}", f"it has {there}")


def scan(form: Form) -> Iterator[tuple[containers.Container, Place, Any]]:
    """Every record of a file as it stands there, or what is `Wrong` with it."""
    container = form.opened()
    with readable(form.path):
        for place, raw in container.scan():
            yield container, place, raw


def sample(raw: Any, place: Place, part: int, container: containers.Container, form: Form) -> Sample:
    """The sample that `each` has found there before, as this part of the record.

    Raises:
        DataError: it is not there any more.
    """
    faults = list[str]()
    for one in parsed(raw, place, container, form):
        if isinstance(one, Fault):
            faults.append(one.message)
        elif isinstance(one, Record) and one.part == part:
            return one.sample
    cause = "; ".join(faults) or "a sample is missing"
    raise DataError(
        f"{form.path}: line {place.line} is not what it was when the file was opened ({cause})",
        "leave the file alone, restart",
    )


def parsed(raw: Any, place: Place, container: containers.Container, form: Form) -> Iterator[Record | Fault | Left]:
    """The samples and faults of a record as it stands in its file, and those that are not wanted."""
    name, part, split = "", 0, None
    file, rows = container.name(place), form.options.rows

    def amiss(wrong: Wrong, name: str) -> Fault | Left:
        known = wrong.split or split
        if rows is not None and known is not None and known not in rows:
            return Left(known)
        return Fault(place.line, name, wrong.message, wrong.remedy, file, wrong.missing)

    try:
        split = _split(raw, raw, file)
        if isinstance(raw, Wrong):
            raise raw
        raw = full(raw) if isinstance(raw, Mapping) else raw
        name = _id(raw, f"{Path(file).stem}:{_where(place)}")
        layout = layouts.of(raw, form.options.format)
        shelf = Shelf(form.folder, form.images is not None, form.options.boxes or layout.unit, container.held(raw))
    except Wrong as wrong:
        yield amiss(wrong, wrong.id or name)
        return
    made = layout.read(raw, name)
    while True:
        split = _split(raw, raw, file, layout.split)
        try:
            one = next(made, None)
            if one is None:
                return
            if isinstance(one, Wrong):
                raise one
            name, split = _id(one, name), _split(one, raw, file, layout.split)
            if rows is not None and split not in rows:
                yield Left(split)
            else:
                told = {"file": file, "line": place.line} | ({} if split is None else {"split": split})
                prepend = form.options.prepend or (form.options.prepend is None and layout.prepend)
                yield Record(_sample(one | {"id": name}, told, shelf, form, prepend), place, file, part, split)
        except Wrong as wrong:
            yield amiss(wrong, name)
        part += 1


# ---------------------------------------------------------------------------------------------- records to samples


def _where(place: Place) -> str:
    """The line; in a file without line ends, where all records stand on the first one, also the byte."""
    return f"{place.line}" if place.line > 1 or place.start <= 1 else f"{place.line}@{place.start}"


def _id(record: Any, default: str) -> str:
    if not isinstance(record, dict):
        raise Wrong("the record is not an object", 'write {"conversations": …} or {"messages": …}')
    name = record.get("id", default)
    if not isinstance(name, str | int):
        raise Wrong("the id is neither a text nor a number", "write a text")
    return messages.text(str(name))


def _split(record: Any, raw: Any, file: str, key: str = "split") -> str | None:
    """The publisher's split of a sample: what it says, or its record, or the name of the file that it stands in."""
    meta = record.get("meta") if isinstance(record, Mapping) else None
    said = meta.get("split") if isinstance(meta, Mapping) else None
    if isinstance(raw, Mapping):
        said = said or raw.get(key) or raw.get("split")
    return said if isinstance(said, str) else containers.split_of(file)


def _sample(record: dict[str, Any], told: dict[str, Any], shelf: Shelf, form: Form, prepend: bool) -> Sample:
    name = record["id"]
    if "task" in record:
        record = put(record, form.options.instructions, form.seed)
    attached = Attached(record, shelf)
    if "conversations" in record:
        said = tuple(messages.spoken(item, attached) for item in listed(record["conversations"], "conversations"))
    else:
        said = tuple(messages.message(message, attached) for message in listed(record["messages"], "messages"))
    if isinstance(record.get("system"), str) and record["system"]:  # ShareGPT's own field
        said = (Turn.say("system", record["system"]), *said)
    first = next((place for place, turn in enumerate(said) if turn.role == "user"), None)
    if prepend and first is not None:
        shown = replace(said[first], parts=(*attached.unplaced(), *said[first].parts))
        said = (*said[:first], shown, *said[first + 1 :])
    other = tuple(messages.message(message, attached) for message in listed(record.get("rejected", []), "rejected"))
    attached.check_counts()
    messages.check_order(said)
    for ending in (said, other) if other else (said,):
        messages.check_answers(ending)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise Wrong("meta is not an object", 'write {"meta": {…}}')
    turns, pair = (tuple(_pictured(turn, form.options) for turn in ending) for ending in (said, other))
    return Sample(turns, name, told | meta, pair or None)


def _pictured(turn: Turn, options: FileOptions) -> Turn:
    """The turn with frames of its videos in their places, if they are to be shown as pictures."""
    if options.frames is None or not any(isinstance(part, Video) for part in turn.parts):
        return turn
    parts = (
        video.frames(part.source, options.frames, options.fps, part.span) if isinstance(part, Video) else (part,)
        for part in turn.parts
    )
    try:
        return Turn(turn.role, tuple(chain.from_iterable(parts)))
    except DataError as error:
        raise Wrong(error.cause, error.remedy) from None
