"""A benchmark's questions as MMBench publishes them: a TSV with quoted cells and pictures in base64.

A picture that several rows show stands in one of them; the others hold that row's index in its place.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.data.choices import REFERENCE
from isthmus.data.copied import Copied
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Place
from isthmus.types import DataError

LONGEST = 64 << 20
"""Characters of a cell: a picture in base64."""
csv.field_size_limit(LONGEST)  # the module's own limit, 128 KiB, is shorter than a picture, and there is one for all


def fits(path: Path) -> bool:
    """Whether the first line names the columns of questions."""
    if path.suffix != ".tsv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        return {"index", "question"} <= set(stream.readline(1 << 16).rstrip("\r\n").split("\t"))


class Questions(Copied):
    """The rows of such a file, each with its own picture."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        try:
            named = {row["image"] for _, row in self._rows() if isinstance(row, dict) and _refers(row)}
            pictures: dict[str, str] = {}
            for line, row in self._rows():
                if isinstance(row, dict) and row.get("index") in named:
                    pictures[row["index"]] = row.get("image", "")
                yield Place(0, line), _with_picture(row, pictures)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})", "check the path") from None
        except UnicodeDecodeError:
            yield Place(0, 1), Wrong("not UTF-8", "save the file as UTF-8")
        except csv.Error as error:
            yield Place(0, 1), Wrong(f"not a table ({error})", "quote cells that hold a tab, a quote or a line's end")

    def _rows(self) -> Iterator[tuple[int, dict[str, str] | Wrong]]:
        """The line and the filled cells of every row."""
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter="\t")
            names = next(rows, [])
            line = rows.line_num + 1
            for row in rows:
                if len(row) == len(names):
                    yield line, {name: cell for name, cell in zip(names, row) if cell.strip()}
                elif row:
                    remedy = "quote cells that hold a tab, a quote or a line's end"
                    yield line, Wrong(f"{len(row)} cells under {len(names)} names", remedy)
                line = rows.line_num + 1


def _refers(row: dict[str, str]) -> bool:
    """Whether the picture is another row's; a short cell with a dot is a path."""
    given = row.get("image", "")
    return 0 < len(given) <= REFERENCE and "." not in given


def _with_picture(row: dict[str, str] | Wrong, pictures: dict[str, str]) -> dict[str, str] | Wrong:
    if isinstance(row, Wrong) or not _refers(row):
        return row
    if not pictures.get(row["image"]):
        return Wrong(
            f"image names the row {row['image'][:40]}, and no row before has that index and a picture",
            "put the row with the picture first",
        )
    return {**row, "image": pictures[row["image"]]}
