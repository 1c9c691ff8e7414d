"""Regions of pictures as text and back: the ways in which papers write a box, in coordinates of what the encoder sees.

Shikra (decimals), Chen et al. 2023, arXiv 2306.15195; official code: github.com/shikras/shikra,
`box_process_function.py`.
Kosmos-2 (location tokens in links), Peng et al. 2023, arXiv 2306.14824; official code: github.com/microsoft/unilm,
`kosmos-2`.
Qwen-VL (thousandths), Bai et al. 2023, arXiv 2308.12966; official code: github.com/QwenLM/Qwen-VL.
CogVLM (brackets), Wang et al. 2023, arXiv 2311.03079; official code: github.com/THUDM/CogVLM.

Differs: a region is mapped onto the square that the encoder gets, whatever makes the picture square; what a centre
crop leaves of it is written, and of a region outside the crop its words alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from isthmus.config import Frozen
from isthmus.data.media import Aspect, Frame, upright_size
from isthmus.types import Box, Grounding, Image, Part, Text, Turn

NUMBER = r"\d(?:\.\d*)?"
"""One leading digit, as the authors of Shikra parse it."""
GROUP = rf"{NUMBER}(?:,{NUMBER}){{3}}|{NUMBER},{NUMBER}"
DECIMALS = re.compile(rf"\[((?:{GROUP})(?:;(?:{GROUP}))*)\]")
THOUSANDTHS = re.compile(r"(?:<ref>([^<]*)</ref>)?<box>\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)</box>")
BRACKETS = re.compile(r"\[\[(\d{3}(?:,\d{3}){3}(?:;\d{3}(?:,\d{3}){3})*)\]\]")
DELIMITER = "</delimiter_of_multi_objects/>"
PAIR = r"<patch_index_\d{4}><patch_index_\d{4}>"
LINKS = re.compile(rf"(?:<phrase>([^<]*)</phrase>)?<object>({PAIR}(?:{DELIMITER}{PAIR})*)</object>")


class Format(Frozen):
    """A way to write regions in text; each has `write(boxes)`, for boxes of one label, and `read(text)`."""

    @property
    def request(self) -> str:
        """What asks for regions; most need no word for it."""
        return ""


class Decimals(Format):
    """`the man[0.220,0.066,0.541,0.930]`, several `[..;..]`, a point `[x,y]`: ordinary text, no new token."""

    kind: Literal["decimals"] = "decimals"
    digits: int = Field(3, ge=1)

    def write(self, boxes: Sequence[Box]) -> str:
        """The words that regions of one label point out, and the regions."""
        return boxes[0].label + f"[{';'.join(map(self._group, boxes))}]"

    def read(self, text: str) -> list[Box]:
        """All regions in a text, without labels; what is malformed is none."""
        groups = [group for found in DECIMALS.finditer(text) for group in found[1].split(";")]
        corners = [tuple(map(float, group.split(","))) for group in groups]
        return list(_valid((numbers * 2 if len(numbers) == 2 else numbers, "") for numbers in corners))

    def _group(self, box: Box) -> str:
        x1, y1, x2, y2 = box.xyxy
        numbers = (x1, y1) if (x1, y1) == (x2, y2) else box.xyxy
        return ",".join(f"{number:.{self.digits}f}" for number in numbers)


class Thousandths(Format):
    """`<ref>the man</ref><box>(220,66),(541,930)</box>`, integers from 0 to 999."""

    kind: Literal["thousandths"] = "thousandths"

    def write(self, boxes: Sequence[Box]) -> str:
        """The words that regions of one label point out, and the regions."""
        label = f"<ref>{boxes[0].label}</ref>" if boxes[0].label else ""
        return label + "".join("<box>({},{}),({},{})</box>".format(*map(_count, box.xyxy)) for box in boxes)

    def read(self, text: str) -> list[Box]:
        """All regions in a text; what is malformed is none."""
        found = (match.groups() for match in THOUSANDTHS.finditer(text))
        return list(_valid((tuple(int(number) / 1000 for number in numbers), label or "") for label, *numbers in found))


class Brackets(Format):
    """`the man[[220,066,541,930]]`, several `[[..;..]]`, always three digits, from 000 to 999: ordinary text."""

    kind: Literal["brackets"] = "brackets"

    def write(self, boxes: Sequence[Box]) -> str:
        """The words that regions of one label point out, and the regions."""
        return boxes[0].label + f"[[{';'.join(map(self._group, boxes))}]]"

    def read(self, text: str) -> list[Box]:
        """All regions in a text, without labels; what is malformed is none."""
        groups = [group for found in BRACKETS.finditer(text) for group in found[1].split(";")]
        return list(_valid((tuple(int(number) / 1000 for number in group.split(",")), "") for group in groups))

    def _group(self, box: Box) -> str:
        return ",".join(f"{_count(share):03d}" for share in box.xyxy)


class Links(Format):
    """`<phrase>the man</phrase><object><patch_index_0071><patch_index_0945></object>`: two corners' cells of a grid."""

    kind: Literal["links"] = "links"
    grid: int = Field(32, ge=2, le=100)
    """Cells of a side."""

    @property
    def request(self) -> str:
        return "<grounding>"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary that this takes: cells row by row, then the grammar around them."""
        grammar = ("<phrase>", "</phrase>", "<object>", "</object>", DELIMITER)
        return (*map(self._token, range(self.grid**2)), *grammar, self.request)

    def write(self, boxes: Sequence[Box]) -> str:
        """The words that regions of one label point out, and the regions."""
        label = f"<phrase>{boxes[0].label}</phrase>" if boxes[0].label else ""
        cells = DELIMITER.join("".join(map(self._token, self.cells(box))) for box in boxes)
        return f"{label}<object>{cells}</object>"

    def read(self, text: str) -> list[Box]:
        """All regions in a text; what is malformed is none."""
        return list(_valid(self._pairs(text)))

    def cells(self, box: Box) -> tuple[int, int]:
        """The cells of the upper left and the lower right corner."""
        x1, y1, x2, y2 = (math.floor(min(value, 0.99999) * self.grid) for value in box.xyxy)
        return x1 + y1 * self.grid, x2 + y2 * self.grid

    def corners(self, first: int, last: int) -> tuple[float, ...]:
        """From centre to centre of two cells; from outer edge to outer edge where they share a row or a column."""
        (y1, x1), (y2, x2) = divmod(first, self.grid), divmod(last, self.grid)
        start, end = (0.0, 1.0) if x1 == x2 or y1 == y2 else (0.5, 0.5)
        return tuple(cell / self.grid for cell in (x1 + start, y1 + start, x2 + end, y2 + end))

    def _pairs(self, text: str) -> Iterator[tuple[tuple[float, ...], str]]:
        for found in LINKS.finditer(text):
            for pair in found[2].split(DELIMITER):
                first, last = map(int, re.findall(r"\d{4}", pair))
                yield self.corners(first, last), found[1] or ""

    def _token(self, cell: int) -> str:
        return f"<patch_index_{cell:04d}>"


BoxFormat: TypeAlias = Decimals | Thousandths | Brackets | Links
_FORMAT: TypeAdapter[BoxFormat] = TypeAdapter(Annotated[BoxFormat, Field(discriminator="kind")])


def _count(share: float) -> int:
    """Thousandths of a side, below a thousand."""
    return min(round(share * 1000), 999)


def _valid(found: Iterator[tuple[tuple[float, ...], str]]) -> Iterator[Box]:
    """Those corners that make a box."""
    for (x1, y1, x2, y2), label in found:
        if 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1:
            yield Box((x1, y1, x2, y2), label)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two regions; 0 where neither has an area."""
    (a1, b1, a2, b2), (c1, d1, c2, d2) = one.xyxy, other.xyxy
    shared = max(0.0, min(a2, c2) - max(a1, c1)) * max(0.0, min(b2, d2) - max(b1, d1))
    union = (a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - shared
    return shared / union if union else 0.0


@dataclass(frozen=True)
class Regions:
    """A joint's format for boxes, in the coordinates of the square that its encoder sees.

    Args:
        format: how they are written.
        aspect: how pictures become square; `squash` keeps normalised coordinates as they are.
    """

    format: BoxFormat = Decimals()
    aspect: Aspect = "squash"

    @classmethod
    def of(cls, fields: dict[str, Any], aspect: Aspect) -> Regions:
        """From a format's fields as a saved processor keeps them."""
        return cls(_FORMAT.validate_python(fields), aspect)

    def spell(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The same conversation with regions, and the wish for them, as text."""
        if not any(isinstance(part, Box | Grounding) for turn in turns for part in turn.parts):
            return tuple(turns)
        pictures = [part for turn in turns for part in turn.parts if isinstance(part, Image)]
        picture, spelled = next(iter(pictures), None), []
        for turn in turns:
            parts: list[Part] = []
            for label, group in groupby(turn.parts, key=_label):
                members = list(group)
                if label is not None:
                    parts.append(self._region([box for box in members if isinstance(box, Box)], label, picture))
                    continue
                parts += [Text(self.format.request) if isinstance(part, Grounding) else part for part in members]
                picture = next((part for part in reversed(members) if isinstance(part, Image)), picture)
            spelled.append(replace(turn, parts=tuple(parts)))
        return tuple(spelled)

    def read(self, text: str, picture: Image | None) -> list[Box]:
        """The regions in a reply about a picture, as regions of that picture."""
        frame = self._frame(picture)
        found = [(frame.back(box.xyxy), box.label) for box in self.format.read(text)]
        return [Box(xyxy, label) for xyxy, label in found if xyxy is not None]

    def _region(self, boxes: Sequence[Box], label: str, picture: Image | None) -> Text:
        frame = self._frame(picture)
        seen = [Box(xyxy, label) for box in boxes if (xyxy := frame.onto(box.xyxy)) is not None]
        return Text(self.format.write(seen) if seen else label)

    def _frame(self, picture: Image | None) -> Frame:
        if self.aspect == "squash" or picture is None:
            return Frame()
        return Frame.of(upright_size(picture.source), self.aspect)


def _label(part: Part) -> str | None:
    return part.label if isinstance(part, Box) else None


UNMAPPED = Regions()
"""Decimals in the coordinates of the picture itself."""
