"""A frozen encoder's features, computed once per picture and memory-mapped.

A folder per encoder identity (source, weights, depth, preprocessing, dtype) holds `rows.bin`, fixed-size rows in the
encoder's own dtype, and `index.txt`, the content key of each row. Rows are on disk before the index names them, so an
interrupted run keeps what it has and a half-written row is never read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isthmus.data import media as pictures
from isthmus.data import views
from isthmus.data.recent import weight
from isthmus.encoders import Encoder
from isthmus.prepare.threads import side_by_side
from isthmus.types import Features, IsthmusError, Medium

Progress = Callable[[int, int], None]
"""Called with (done, total known so far)."""
WINDOW, WINDOW_BYTES = 1 << 15, 256 << 20
"""So many media, or bytes of them, are at hand at once while a cache is filled."""
BATCH, CPU_BATCH = 32, 8
"""Pictures per forward. On CPUs the maps of few stay in the caches, which makes convolutions about twice as fast
(docs/performance.md)."""


class FeatureCache:
    """The features of one encoder; calling it is a collator's `look`.

    Args:
        encoder: the frozen encoder. Its features must not vary in size.
        folder: parent folder; every encoder identity has its own below it.
        batch_size: pictures per forward of the encoder; by default what its device is fastest with.
    """

    def __init__(self, encoder: Encoder, folder: Path, batch_size: int | None = None):
        self.encoder = encoder.eval()
        self.batch_size = batch_size or (CPU_BATCH if self._device.type == "cpu" else BATCH)
        self._encoding = threading.Lock()
        self._dtype = next(encoder.parameters()).dtype
        changed = {"own": encoder.own} if encoder.own else {}
        identity = json.dumps(encoder.identity() | changed | {"dtype": str(self._dtype)}, sort_keys=True)
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "identity.json").write_text(identity)
        self._shapes = self._probe()
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._row_bytes = sum(self._sizes) * self._dtype.itemsize
        self._rows: np.ndarray = np.empty((0, self._row_bytes), np.uint8)
        self._place: dict[str, int] = {}
        self._index_bytes = 0
        self.open()

    def __len__(self) -> int:
        return len(self._place)

    def __call__(self, kind: str, media: Sequence[Medium]) -> tuple[None, Features]:
        """Features of these media, from the cache; those that it lacks are computed and kept."""
        keys = [pictures.content_key(medium.source) for medium in media]
        self._fill(dict(zip(keys, media)))
        raw = torch.from_numpy(self._rows[[self._place[key] for key in keys]]).view(self._dtype)
        parts = {
            name: part.unflatten(1, shape)
            for (name, shape), part in zip(self._shapes.items(), raw.split(self._sizes, dim=1))
        }
        return None, Features(parts.pop("x"), parts, self.encoder.grid)

    def fill(self, media: Iterable[Medium], progress: Progress | None = None, rank: int = 0, size: int = 1) -> int:
        """Compute what is missing; returns how many pictures that was.

        Media are taken as they come, some at a time, so they may be more than memory holds. Of `size` processes that
        call this with the same media at once, number `rank` computes its share.

        Raises:
            DataError: a picture cannot be read; it is named.
            IsthmusError: the disk is full.
        """
        done = 0

        def tell(of_these: int, total: int) -> None:
            if progress is not None:
                progress(done + of_these, done + total)

        for some in _windows(media):
            done += self._fill({pictures.content_key(medium.source): medium for medium in some}, tell, rank, size)
        return done

    def _fill(
        self, wanted: Mapping[str, Medium], progress: Progress | None = None, rank: int = 0, size: int = 1
    ) -> int:
        """Compute what is missing of media by their keys."""
        if wanted.keys() <= self._place.keys():
            return 0
        with _Lock(self.folder / f"lock-{rank}-of-{size}"):
            self.open()  # another run may have computed some meanwhile
            # Neighbours stay together: all frames of a video are decoded at once, and held until they are drawn.
            share = slice(len(wanted) * rank // size, len(wanted) * (rank + 1) // size)
            missing = [key for key in list(wanted)[share] if key not in self._place]
            chunks = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
            done = 0
            try:
                with closing(side_by_side(lambda keys: self._made([wanted[key] for key in keys]), chunks)) as made:
                    for rows, keys in zip(made, chunks):
                        self._append(keys, rows)
                        done += len(keys)
                        if progress is not None:
                            progress(done, len(missing))
            finally:
                self.open()
        return len(missing)

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def _made(self, media: Sequence[Medium]) -> np.ndarray:
        """Rows of some media; elsewhere than on a CPU one batch at a time is encoded, others are read meanwhile."""
        pixels = self._pixels(media)
        with nullcontext() if self._device.type == "cpu" else self._encoding:
            return self._encode(pixels)

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> np.ndarray:
        """One row of raw bytes per picture."""
        features = self.encoder(pixels.to(self._device, self._dtype))
        parts = [features.x_NSE, *features.taps.values()]
        flat = torch.cat([part.to(self._dtype).flatten(1) for part in parts], dim=1).cpu().contiguous()
        return flat.view(torch.uint8).numpy()

    def _pixels(self, media: Sequence[Medium]) -> Tensor:
        pixels = [
            views.pixels(pictures.open_image(medium.source), self.encoder.processor, self.encoder.aspect)
            for medium in media
        ]
        return torch.stack(pixels)

    def _probe(self) -> dict[str, torch.Size]:
        """Shapes of x and every tap for one picture."""
        with torch.inference_mode():
            features = self.encoder(self.encoder.blank().to(self._device, self._dtype))
        return {"x": features.x_NSE.shape[1:]} | {name: tap.shape[1:] for name, tap in features.taps.items()}

    # ------------------------------------------------------------------------------------ files

    def open(self) -> None:
        """Map what is on disk; rows that the index does not name, or that are cut short, do not exist.

        It is mapped afresh: rows that were read before no longer count as this process's memory.
        """
        self._read_on()
        if self._place:
            shape = len(self._place), self._row_bytes
            self._rows = np.memmap(self.folder / "rows.bin", np.uint8, "r", shape=shape)

    def _read_on(self) -> None:
        """Learn what the index names by now beyond what is known."""
        index, rows = self.folder / "index.txt", self.folder / "rows.bin"
        if not index.is_file() or not rows.is_file():
            return
        new = rows.stat().st_size // self._row_bytes - len(self._place)
        with index.open("rb") as stream:
            stream.seek(self._index_bytes)
            keys = stream.read().decode().split("\n")[:-1][:new]  # behind the last newline is a torn line
        self._place |= {key: row for row, key in enumerate(keys, start=len(self._place))}
        self._index_bytes += sum(len(key.encode()) + 1 for key in keys)

    def _append(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Add what no other process has added meanwhile."""
        with _Lock(self.folder / "lock"):
            self._read_on()
            fresh = [number for number, key in enumerate(keys) if key not in self._place]
            self._write([keys[number] for number in fresh], rows[fresh])

    def _write(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Rows first, flushed to disk; then their keys."""
        start = len(self._place)
        try:
            with (self.folder / "rows.bin").open("ab") as stream:
                stream.truncate(start * self._row_bytes)
                stream.write(rows.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            lines = "".join(f"{key}\n" for key in keys).encode()
            with (self.folder / "index.txt").open("ab") as stream:
                stream.truncate(self._index_bytes)
                stream.write(lines)
        except OSError as error:
            raise IsthmusError(
                f"{self.folder}: features cannot be written ({error.strerror})",
                "free some space, set ISTHMUS_HOME to a larger disk, or engine.cache=false; what was cached is kept",
            ) from None
        self._index_bytes += len(lines)
        self._place |= {key: start + row for row, key in enumerate(keys)}


def _windows(media: Iterable[Medium]) -> Iterator[list[Medium]]:
    """Media in stretches that memory holds."""
    window, held = list[Medium](), 0
    for medium in media:
        window.append(medium)
        held += weight(medium)
        if len(window) == WINDOW or held > WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


class _Lock:
    """An advisory lock on a file, so that two runs do not compute or append the same at once."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self._stream = self.path.open("w")
        fcntl.flock(self._stream, fcntl.LOCK_EX)

    def __exit__(self, *unused: object) -> None:
        self._stream.close()
