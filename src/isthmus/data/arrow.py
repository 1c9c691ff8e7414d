"""Parquet, Arrow files and folders that `datasets` saved, memory-mapped; pictures stay bytes until they are needed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from isthmus.assets import home
from isthmus.data import jsons
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Place
from isthmus.types import ConfigError, DataError

FETCHED = 64
"""Rows that are read at once in passing."""
SPELLED = ("conversations", "messages", "meta")
"""Columns that tables may hold as JSON, since what is in them differs from row to row."""


class Rows:
    """The rows of tables. Parquet is unpacked once, by `datasets`, beside the other caches."""

    copied = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.table = _opened(paths).with_format("arrow")
        sizes = [parquet.read_metadata(path).num_rows for path in paths] if len(paths) > 1 else [len(self.table)]
        self.ends = list(accumulate(sizes))
        """Of each file, how many rows there are up to its end."""

    def files(self) -> Sequence[Path]:
        return [file for path in self.paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]

    def scan(self) -> Iterator[tuple[Place, Any]]:
        number = 0
        for batch in self.table.iter(FETCHED):
            for row in batch.to_pylist():
                shard = bisect_right(self.ends, number)
                number += 1
                yield Place(shard, number - self._before(shard)), _full(row)

    def read(self, place: Place) -> Any:
        return _full(self.table[self._before(place.shard) + place.line - 1].to_pylist()[0])

    def name(self, place: Place) -> str:
        return str(self.paths[place.shard])

    def _before(self, shard: int) -> int:
        return self.ends[shard - 1] if shard else 0

    def held(self, raw: Any) -> Mapping[str, bytes]:
        return {}


def _opened(paths: Sequence[Path]) -> datasets.Dataset:
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below
    try:
        if paths[0].is_dir():
            found = datasets.load_from_disk(str(paths[0]))
        elif paths[0].suffix == ".arrow":
            found = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
        else:
            datasets.disable_progress_bars()
            _check_alike(paths)
            found = datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=str(home() / "tables"))
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        said = str(error.__cause__ or error)  # the library wraps what it stumbled over
        cause = (said.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{paths[0]}: not a table ({cause[:200]})", "check the path, or write it again") from None
    if isinstance(found, datasets.DatasetDict):
        raise ConfigError(f"{paths[0]} holds the splits {', '.join(found)}", "name the folder of one of them")
    return found


def _check_alike(paths: Sequence[Path]) -> None:
    """Whether files are the rows of one table.

    Raises:
        ConfigError: one has other columns than the first.
    """
    first = set(parquet.read_schema(paths[0]).names)
    for path in paths[1:]:
        if set(parquet.read_schema(path).names) != first:
            cause = f"{path.parent} holds several tables: {path.name} has other columns than {paths[0].name}"
            raise ConfigError(cause, "name one of them, or put each into a folder of its own")


def _full(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what it has not, and with what it spells out as JSON."""
    return {key: _spelled(key, value) for key, value in row.items() if value is not None}


def _spelled(key: str, value: Any) -> Any:
    found = jsons.parse(value) if key in SPELLED and isinstance(value, str) else value
    return value if isinstance(found, Wrong) else found
