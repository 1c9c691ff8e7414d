"""A run's rows as TensorBoard events, written by PyTorch's own writer through the `tensorboard` package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.types import ConfigError


class Board:
    """Events in a folder: a scalar for every number of a row.

    Args:
        folder: of the events. Those of steps after the last row are void: the run goes on from there.
        rows: what the run has told so far; a new folder begins with them.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard is not installed", "pip install 'isthmus[tensorboard]', or set engine.tensorboard=false"
            ) from None
        fresh = not folder.is_dir()
        last = max((row["step"] for row in rows), default=0)
        self._writer = SummaryWriter(folder, purge_step=None if fresh else last + 1)
        for row in rows if fresh else ():
            self._add(row)
        self._writer.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, on the disk when this returns: a run that is killed must not lose what it will not do again."""
        self._add(row)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self._writer.add_scalar(name, value, row["step"], walltime=row.get("time"))
