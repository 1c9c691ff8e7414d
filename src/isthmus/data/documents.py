"""Interleaved documents: several pictures, each followed by its text, as web pages have them.

Alayrac et al. 2022, arXiv 2204.14198 (Flamingo's M3W); Awadalla et al. 2023, arXiv 2308.01390 (OpenFlamingo).

A document is a conversation in which the user shows picture after picture and the assistant says what belongs to each,
so that every joint can read it, every text carries loss and ends with the model's own end of turn, and a prompt with
demonstrations looks like the documents that were trained. All texts of a document are of one source: without the
questions, what kind of text is wanted can be told from the pictures before alone.

Differs: texts always follow their pictures, where Flamingo lets them precede in half of the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Annotated, Any

from pydantic import Field, model_validator

from isthmus.config import Frozen, OneSource, Source
from isthmus.data.collate import route_of
from isthmus.types import Sample, Text, Turn


class DocumentOptions(Frozen):
    """Options of `documents`."""

    of: Annotated[tuple[OneSource, ...], Field(min_length=1)] = (
        Source(name="naming"),
        Source(name="scenes", options={"kinds": ["colour"]}),
        Source(name="scenes", options={"kinds": ["caption"]}),
    )
    """Sets that pictures and texts are drawn from, each document's from one, chosen by weight."""
    least: int = Field(2, ge=1)
    most: int = Field(5, ge=1)
    """Pictures of a document: from `least` to `most`."""
    asked: bool = False
    """Keep the questions; otherwise a picture stands alone before its text."""
    count: int | None = Field(None, ge=1)
    """Documents."""

    @model_validator(mode="after")
    def _flat(self) -> DocumentOptions:
        if any(source.name == "documents" for source in self.of):
            raise ValueError("documents are made of other sets, not of documents; name those sets in `of`")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> DocumentOptions:
        if self.least > self.most:
            raise ValueError(f"at least {self.least} pictures are more than at most {self.most}")
        return self


@dataclass(frozen=True)
class Documents:
    """Makes documents, each from its number alone."""

    split: str
    seed: int
    options: DocumentOptions
    shelves: tuple[Sequence[Sample], ...]
    """The opened sets of `options.of`."""

    def sample(self, index: int) -> Sample:
        random = Random(f"document {self.split} {self.seed} {index}")
        place = random.choices(range(len(self.shelves)), [source.weight for source in self.options.of])[0]
        shelf = self.shelves[place]
        size = min(random.randint(self.options.least, self.options.most), len(shelf))
        drawn = [shelf[number] for number in random.sample(range(len(shelf)), size)]
        said = [turn for one in drawn for turn in random.choice((one.turns, *one.branches))]
        told = [turn for turn in said if turn.role != "system"]  # templates know none but in front
        turns = tuple(told if self.options.asked else map(unasked, told))
        name = f"documents/{self.split}/{index}/{'asked' if self.options.asked else 'shown'}"
        meta: dict[str, Any] = {"kind": "document", "cluster": name}
        if any("route" in one.meta for one in drawn):  # one place in a picture makes a conversation region-level
            meta["route"] = max(map(route_of, drawn))
        return Sample(turns, name, meta)


def unasked(turn: Turn) -> Turn:
    """A user's turn without its words, where it shows something; any other turn as it is."""
    if turn.role != "user" or not turn.media:
        return turn
    return replace(turn, parts=tuple(part for part in turn.parts if not isinstance(part, Text)))
