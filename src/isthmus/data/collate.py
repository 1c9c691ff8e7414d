"""Samples to a `Batch`, whose promises are checked here, once, with the sample's id in the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from rich.text import Text as RichText
from torch import Tensor

from isthmus.data.chat import Rendered, Renderer, share
from isthmus.data.reading import Reader
from isthmus.types import (
    IGNORE,
    KIND,
    KINDS,
    Batch,
    Box,
    ConfigError,
    DataError,
    Features,
    Grounding,
    Medium,
    Modality,
    Route,
    Sample,
    Turn,
)
from isthmus.types import Media as BatchMedia

Look: TypeAlias = Callable[[str, Sequence[Medium]], tuple[Tensor | None, Features | None]]
"""`look(kind, media)`: pixels or cached features of media of one kind, in order."""

Row: TypeAlias = list[tuple[Sample, Rendered]]


class Collator:
    """Turns samples into batches for one model.

    Args:
        renderer: turns conversations into ids.
        look: reads media.
        pad_id: fills rows up; it is masked everywhere.
        max_length: decoder tokens per sample; None is no limit.
        overlong: a longer sample is refused, dropped and counted, or loses its oldest turns with their media (and is
            dropped if its last exchange alone is too long).
        side: where the content of a row stands opposite to its padding: `right` pads on the right, as rows for an
            encoder always are: some count positions from the first column (BART).
        open_answer: rows end where the assistant is to speak, without labels, padded on the left. An answer at the
            end of a sample is left out; an overlong prompt is always refused.
        bare: media of which nothing is said are samples too, for a stage that can learn from them.
        after_media: nothing is learnt before a sample's first medium.
        routes: the joint treats kinds of tasks apart, so that what branches share must be of one kind.
        reader: makes the ids of what connectors read beside features; None where they read nothing.

    Attributes:
        dropped, shortened: ids of the samples that `overlong` has hit so far.
    """

    def __init__(
        self,
        renderer: Renderer,
        look: Look,
        pad_id: int,
        max_length: int | None = None,
        overlong: Literal["error", "drop", "oldest"] = "error",
        side: Literal["left", "right"] = "right",
        open_answer: bool = False,
        reader: Reader | None = None,
        bare: bool = False,
        after_media: bool = False,
        routes: bool = True,
    ) -> None:
        self.renderer, self.look, self.pad_id = renderer, look, pad_id
        self.max_length, self.overlong = max_length, "error" if open_answer else overlong
        self.side = "right" if renderer.decoder_start is not None else "left" if open_answer else side
        self.open_answer, self.bare, self.after_media, self.routes = open_answer, bare, after_media, routes
        self.reader = None if open_answer and reader and reader.reading.of == "answer" else reader
        self.dropped: set[str] = set()
        self.shortened: set[str] = set()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One row per sample."""
        return self.rows([[sample] for sample in samples])

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """One row per list; the samples of a row become its segments.

        Raises:
            DataError: a sample is too long, has nothing to learn, or a medium cannot be read; or nothing remains.
        """
        if not rows:
            raise DataError("a batch of no samples", "give at least one")
        kept: list[Row] = []
        for samples in rows:
            rendered = [(sample, self._fit(sample)) for sample in samples]
            if row := [(sample, fitting) for sample, fitting in rendered if fitting is not None]:
                kept.append(row)
        if not kept:
            raise DataError(
                f"every sample of the batch is longer than max_length {self.max_length}",
                "raise max_length, or use bucketed or packed batching, which leave such samples out beforehand",
            )
        for sample, rendered_one in (pair for row in kept for pair in row):
            self._check(sample, rendered_one)
        return self._batch(kept)

    def lengths(self, sample: Sample) -> int:
        """Tokens that a sample takes in a row; 0 if it is dropped."""
        rendered = self._fit(sample)
        return 0 if rendered is None else _length(rendered)

    def preview(self, sample: Sample) -> RichText:
        """The sample's tokens in colour, as `Renderer.preview`."""
        return self.renderer.preview(self._render(sample, sample.turns))

    # ------------------------------------------------------------------------------------- one sample

    def _fit(self, sample: Sample) -> Rendered | None:
        """The sample within `max_length`, or None if it is dropped."""
        turns = sample.turns
        if self.open_answer and turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        rendered = self._render(sample, turns)
        if self.max_length is None or _length(rendered) <= self.max_length:
            return rendered
        if self.overlong == "error":
            raise DataError(
                f"sample {sample.id}: {_length(rendered)} tokens, max_length is {self.max_length}",
                "raise max_length, or set overlong to drop or oldest",
            )
        for later in _later_endings(turns) if self.overlong == "oldest" else ():
            rendered = self._render(sample, later)
            if _length(rendered) <= self.max_length:
                self.shortened.add(sample.id)
                return rendered
        self.dropped.add(sample.id)
        return None

    def _render(self, sample: Sample, turns: Sequence[Turn]) -> Rendered:
        silent = self.bare and not any(turn.role == "assistant" for turn in turns)
        try:
            rendered = self.renderer.render(turns, self.open_answer or silent)
            if sample.branches:
                others = [self.renderer.render(branch, self.open_answer) for branch in sample.branches]
                rendered = share([rendered, *others], self.open_answer)
            return _from_first_medium(rendered) if self.after_media else rendered
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error.cause}", error.remedy) from None

    def _check(self, sample: Sample, rendered: Rendered) -> None:
        places = sum(end - start for start, end in rendered.spans)
        marked = sum(kind != Modality.TEXT for kind in rendered.modality)
        if places != marked or len(rendered.spans) != len(rendered.media):
            raise DataError(
                f"sample {sample.id}: {marked} placeholders for {len(rendered.media)} media of {places} vectors",
                "render the sample with the model's own renderer",
            )
        needless = self.open_answer or (self.bare and rendered.media)
        if self.routes and rendered.branch:
            _check_kinds(sample)
        if not needless and not _learns(rendered):
            raise DataError(f"sample {sample.id}: a sample with nothing to learn", "give it an answer with text")

    # ------------------------------------------------------------------------------------- the batch

    def _batch(self, rows: list[Row]) -> Batch:
        columns = [_columns(row) for row in rows]
        routed = any(_is_routed(sample) for row in rows for sample, _ in row)
        drawn = any("draw" in sample.meta for row in rows for sample, _ in row)
        branched = any(any(column.branch) for column in columns)
        width = max(len(column.ids) for column in columns)

        def padded(values: list[list[Any]], filler: float, wide: int = width, side: str = self.side) -> Tensor:
            gaps = [[filler] * (wide - len(row)) for row in values]
            return torch.tensor([gap + row if side == "left" else row + gap for row, gap in zip(values, gaps)])

        segment_BT = padded([column.segment for column in columns], 0)
        batch = Batch(
            input_ids_BT=padded([column.ids for column in columns], self.pad_id),
            segment_BT=segment_BT,
            modality_BT=padded([column.modality for column in columns], Modality.TEXT),
            route_BT=padded([column.route for column in columns], 0) if routed else None,
            draw_BT=padded([column.draw for column in columns], -1.0) if drawn else None,
            branch_BT=padded([column.branch for column in columns], 0) if branched else None,
            media=self._media(rows, [width - len(column.ids) if self.side == "left" else 0 for column in columns]),
            ids=tuple(sample.id for row in rows for sample, _ in row),
        )
        if self.reader is not None:
            batch.extra_text = self.reader((sample, rendered.media) for row in rows for sample, rendered in row)
        if any(column.decoder for column in columns):
            wide = max(len(column.decoder) for column in columns)
            batch.decoder_ids_BU = padded([column.decoder for column in columns], self.pad_id, wide, "right")
            if not self.open_answer:
                batch.labels_BT = padded([column.labels for column in columns], IGNORE, wide, "right")
        elif not self.open_answer:
            batch.labels_BT = padded([column.labels for column in columns], IGNORE)
        return batch

    def _media(self, rows: list[Row], offsets: list[int]) -> dict[str, BatchMedia]:
        """All media by kind, in order of appearance, with their places."""
        found: dict[str, list[tuple[Medium, int, int, int]]] = {}
        for number, (row, offset) in enumerate(zip(rows, offsets)):
            for segment, (_, rendered) in enumerate(row, start=1):
                for medium, (start, _) in zip(rendered.media, rendered.spans):
                    found.setdefault(KIND[type(medium)], []).append((medium, number, segment, offset + start))
                offset += len(rendered.ids)
        return {kind: self._looked(kind, places, rows) for kind, places in found.items()}

    def _looked(self, kind: str, places: list[tuple[Medium, int, int, int]], rows: list[Row]) -> BatchMedia:
        media, row, segment, at = zip(*places)
        pixels, features = self.look(kind, media)
        seen = len(pixels) if pixels is not None else len(features.x_NSE) if features is not None else 0
        if seen != len(media):
            names = ", ".join(sample.id for some in rows for sample, _ in some)
            raise DataError(
                f"samples {names}: {len(media)} {kind}s, but {seen} were read", "repair the collator's look"
            )
        return BatchMedia(torch.tensor(row), torch.tensor(segment), torch.tensor(at), pixels, features)


@dataclass
class _Columns:
    """A row's tokens under construction."""

    ids: list[int]
    segment: list[int]
    modality: list[int]
    labels: list[int]
    route: list[int]
    draw: list[float]
    branch: list[int]
    decoder: list[int]


def _columns(row: Row) -> _Columns:
    """The samples of a row one after another."""
    out = _Columns([], [], [], [], [], [], [], [])
    if len(row) > 1 and any(rendered.decoder_ids is not None for _, rendered in row):
        raise ConfigError("an encoder-decoder cannot read packed rows", "use bucketed or shuffled batching")
    for segment, (sample, rendered) in enumerate(row, start=1):
        size = len(rendered.ids)
        told = rendered.ids if rendered.decoder_ids is None else rendered.decoder_ids
        labels = [token if trained else IGNORE for token, trained in zip(told, rendered.trained)]
        labels[:1] = [IGNORE] * len(labels[:1])  # what stands before it is padding or another sample
        out.ids += rendered.ids
        out.segment += [segment] * size
        out.modality += rendered.modality
        out.labels += labels
        out.route += [route_of(sample)] * size
        out.draw += [float(sample.meta.get("draw", -1)) if _learns(rendered) else -1.0] * size
        out.branch += rendered.branch or [0] * size
        out.decoder += rendered.decoder_ids or []
    return out


def _is_routed(sample: Sample) -> bool:
    """Whether a sample says of what kind it is, or shows it."""
    return "route" in sample.meta or _points(sample)


def _points(sample: Sample) -> bool:
    """Whether a conversation holds a region or asks for one."""
    return any(map(_holds_regions, (sample.turns, *sample.branches)))


def _holds_regions(turns: Sequence[Turn]) -> bool:
    return any(isinstance(part, Box | Grounding) for turn in turns for part in turn.parts)


def _check_kinds(sample: Sample) -> None:
    """What branches share is read once, and so as one kind of task.

    Raises:
        DataError: some of them hold regions and others do not, and the sample does not say what they are.
    """
    if "route" not in sample.meta and len(set(map(_holds_regions, (sample.turns, *sample.branches)))) > 1:
        raise DataError(
            f"sample {sample.id}: its questions share the picture, and some are about places in it, others about all "
            "of it, which this joint treats apart",
            "give each question a sample of its own (options: {together: false}), or say of which kind all are "
            "(route: 0 or 1 of the source, or the sample's meta)",
        )


def route_of(sample: Sample) -> int:
    """What the sample says (`meta["route"]`), else region-level where it holds regions.

    Raises:
        DataError: it says what is no kind of task.
    """
    route: Any = sample.meta.get("route", Route.REGION if _points(sample) else Route.IMAGE)
    if not isinstance(route, int) or route not in tuple(Route):
        raise DataError(f"sample {sample.id}: its route is {route!r}, which is no kind of task", KINDS)
    return route


def _from_first_medium(rendered: Rendered) -> Rendered:
    """The same, with nothing to learn before the first medium; a decoder of its own has all media before it."""
    if not rendered.spans or rendered.decoder_ids is not None:
        return rendered
    first = rendered.spans[0][0]
    return replace(rendered, trained=[False] * first + rendered.trained[first:])


def _learns(rendered: Rendered) -> bool:
    """Whether a token carries loss; the first one has no state before it that could predict it."""
    return any(rendered.trained[1:])


def _length(rendered: Rendered) -> int:
    return max(len(rendered.ids), len(rendered.decoder_ids or ()))


def _later_endings(turns: tuple[Turn, ...]) -> Iterator[tuple[Turn, ...]]:
    """The conversation without its first exchange, without its first two, …; a system turn stays."""
    head = turns[:1] if turns and turns[0].role == "system" else ()
    for start in range(len(head) + 1, len(turns)):
        if turns[start].role == "user" and any(turn.role == "assistant" for turn in turns[start:]):
            yield (*head, *turns[start:])
