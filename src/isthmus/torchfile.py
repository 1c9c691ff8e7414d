"""Reads tensors out of a legacy `torch.save` file without unpickling anything.

The file is a few pickles followed by raw storages. A small stack machine walks the opcodes that a plain state dict
needs and refuses every other opcode and every other global, so nothing in the file can run.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isthmus.errors import DataError

MAGIC = 0x1950A86A20F9469CFC6C
"""What the first pickle of every legacy file holds; the second holds the version below."""
VERSION = 1001
STORAGES: dict[str, np.dtype] = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
EMPTY_DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A name that the file would have imported; it stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class View:
    """A tensor as the file describes it: a strided window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, data: np.ndarray) -> np.ndarray:
        """The tensor's own contiguous copy."""
        if len(self.shape) != len(self.strides) or min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError("a tensor has a negative or ragged layout")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        if 0 not in self.shape and last >= len(data):
            raise ValueError("a tensor reaches beyond its storage")
        steps = [stride * data.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, steps).copy(order="C")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a legacy state dict by name; strides and offsets are honoured.

    Raises:
        DataError: the file holds anything else than a plain dict of float32 and int64 tensors.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, OSError) as error:
        raise DataError(f"{path}: not a plain legacy state dict ({error})", "fetch or save the file again") from None


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if _Machine().run(file) != MAGIC or _Machine().run(file) != VERSION:
        raise ValueError("no legacy header")
    if _Machine().run(file)["little_endian"] is not True:
        raise ValueError("big-endian")
    views = _Machine().run(file)
    if not isinstance(views, dict) or not all(isinstance(view, View) for view in views.values()):
        raise ValueError("something that is not a tensor")
    storages = {view.storage.key: view.storage for view in views.values()}
    data = {key: _read_storage(file, storages[key]) for key in _Machine().run(file)}
    return {name: view.of(data[view.storage.key]) for name, view in views.items()}


def _read_storage(file: BinaryIO, storage: Storage) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    raw = file.read(storage.count * storage.dtype.itemsize)
    if count != storage.count or len(raw) != count * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} is truncated")
    return np.frombuffer(raw, storage.dtype)


@dataclass
class _Machine:
    """Runs one pickle of the file on a stack of plain values."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        (value,) = self.stack
        return value

    def _step(self, name: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "TUPLE":
                push(tuple(self._above_mark()))
            case "APPENDS":
                items = self._above_mark()
                self._top(list).extend(items)
            case "SETITEM":
                value, key = pop(), pop()
                self._top(dict)[key] = value
            case "SETITEMS":
                items = self._above_mark()
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "BUILD":  # attributes of the dict (its version record), of which tensors need none
                pop()
                self._top(dict)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_allowed(argument))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(_call(function, arguments))
            case "BINPERSID":
                push(_storage(pop()))
            case _ if name in CONSTANTS:
                push(CONSTANTS[name])
            case _ if name in LITERALS:
                push(argument)
            case _ if name in TUPLES:
                self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
            case _:
                raise ValueError(f"opcode {name} is refused")

    def _above_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"expected a {kind.__name__}")
        return self.stack[-1]


def _allowed(name: str) -> Global:
    if name not in {EMPTY_DICT, TENSOR, *STORAGES}:
        raise ValueError(f"global {name!r} is refused")
    return Global(name)


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    if function.name == EMPTY_DICT and arguments == ():
        return {}
    if function.name == TENSOR:
        storage, offset, shape, strides, _gradient, _hooks = arguments
        return View(storage, offset, shape, strides)
    raise ValueError(f"call of {function.name!r} is refused")


def _storage(record: tuple[Any, ...]) -> Storage:
    kind, storage, key, _device, count, view = record
    if kind != "storage" or view is not None:
        raise ValueError("a storage that is a view is refused")
    return Storage(key, STORAGES[storage.name], count)
