"""GGUF files: written with every number exactly as it is, and read back.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package of llama.cpp's authors does the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Stored
from gguf import GGUFReader, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from isthmus.types import IsthmusError

EXACT = ("position_embd", "patch_embd", "mm.")
"""What stays in float32, as vectors do: what llama.cpp adds or convolves with, and the joint, since what is multiplied
by a bfloat16 matrix there is itself rounded to bfloat16."""
NARROW = {Stored.BF16: torch.bfloat16, Stored.F16: torch.float16}
FILES = {
    Stored.F32: LlamaFileType.ALL_F32,
    Stored.F16: LlamaFileType.MOSTLY_F16,
    Stored.BF16: LlamaFileType.MOSTLY_BF16,
}


@dataclass(frozen=True)
class Content:
    """What a file holds: llama.cpp's name of an architecture, what describes it, and tensors by their names there."""

    architecture: str
    describe: Callable[[GGUFWriter], None]
    tensors: dict[str, Tensor]


def write(file: Path, content: Content) -> None:
    """Write a file and read it back.

    Raises:
        IsthmusError: what was read back differs in a bit.
    """
    stored = {name: _stored(name, tensor) for name, tensor in content.tensors.items()}
    writer = GGUFWriter(file, content.architecture)
    content.describe(writer)
    matrices = Counter(stored[name] for name, tensor in content.tensors.items() if tensor.ndim > 1)
    writer.add_file_type(FILES[matrices.most_common(1)[0][0]])
    for name, tensor in content.tensors.items():
        data = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(name, quants.quantize(data, stored[name]), raw_dtype=stored[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _require_equal(file, content.tensors)


def tensors(reader: GGUFReader, only: str = "") -> dict[str, Tensor]:
    """Every tensor of a file in float32; `only` chooses by the beginning of the name."""
    found = {}
    for each in reader.tensors:
        if not each.name.startswith(only):
            continue
        data = quants.dequantize(each.data, each.tensor_type).astype(np.float32)
        found[each.name] = torch.from_numpy(data.reshape(*reversed(each.shape.tolist())))
    return found


def _stored(name: str, tensor: Tensor) -> Stored:
    """The smallest type that holds all values of a tensor."""
    if tensor.ndim != 2 or any(mark in name for mark in EXACT):
        return Stored.F32
    fits = (stored for stored, dtype in NARROW.items() if torch.equal(tensor.to(dtype).float(), tensor.float()))
    return next(fits, Stored.F32)


def _require_equal(file: Path, expected: dict[str, Tensor]) -> None:
    found = tensors(GGUFReader(file))
    if unlike := set(found) ^ set(expected):
        raise IsthmusError(f"{file.name}: {min(unlike)} is in the model or in the file alone", "nothing was written")
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor.float()):
            raise IsthmusError(f"{file.name}: {name} was not read back as it was written", "nothing was written")
