"""Models of ours in other forms, and those of others in ours: the numbers are compared before anything is written.

`llava` and `blip2` are classes of transformers, `gguf` is what llama.cpp reads, `onnx` holds encoder and joint alone,
`peft` has adapters. What a form cannot hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from isthmus import kernels_linear, parts, quantised
from isthmus.connectors.codebook import Coded
from isthmus.model import VLM
from isthmus.types import ConfigError, IsthmusError

TOLERANCE = 1e-4
"""Largest difference of float32 logits that counts as equal."""
KEEP = "keep it as it is; `load` reads it"
ANOTHER = "export to another form"
"""Remedies: where no form is nearer to the model, and where another may hold it."""


ANSWERS_AS = {"asvr": "llava", "p_former": "blip2"}
"""Joints that differ from another in training alone: what only training needs is left out of an export."""


def answering(ours: VLM) -> str:
    """The name of the joint that a model's is when it answers."""
    return ANSWERS_AS.get(ours.aligner.name, ours.aligner.name)


def projector(ours: VLM) -> Any:
    """What makes vectors of a picture, without codes and a head for them."""
    connector = ours.connectors["image"]
    return connector.inner if isinstance(connector, Coded) else connector


def refuse(what: str, reasons: Iterable[tuple[bool, str]], remedy: str = KEEP) -> None:
    """Refuse a model for the first reason that holds, if one does.

    Raises:
        ConfigError: `what` a form cannot do, and that reason.
    """
    for unfit, reason in reasons:
        if unfit:
            raise ConfigError(f"{what}: {reason}", remedy)


def opened(source: str | Path, out: Path) -> VLM:
    """The model that is to be exported, in float32 and in PyTorch's own arithmetic, which what is written will have.

    Raises:
        ConfigError: it would be written over itself.
    """
    if out.resolve() == parts.folder(str(source)).resolve():
        raise ConfigError(f"{out} holds the model itself, which an export would write over", "name another folder")
    model = VLM.from_pretrained(source, dtype=torch.float32)
    kernels_linear.use_pytorch(model)
    return model


@dataclass(frozen=True)
class Parity:
    """How close two models are: the largest absolute difference of their float32 logits."""

    difference: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Parity:
        return cls((ours - theirs).abs().max().item())

    def require(self, what: str, of: str = "logits") -> None:
        """Nothing but a check.

        Raises:
            IsthmusError: the difference is larger than `TOLERANCE`.
        """
        if not self.difference <= TOLERANCE:  # nor is NaN equal
            raise IsthmusError(
                f"{what}: {of} differ by {self.difference:.2e}, more than {TOLERANCE:.0e}", "nothing was written"
            )


@dataclass(frozen=True)
class Trial:
    """Random pictures and words that two models are asked about; of logits, those of the words that both know."""

    pixels: Tensor
    words: Tensor
    image_tokens: int
    shared: int

    @classmethod
    def of(cls, ours: VLM, rows: int = 2, text: int = 8) -> Trial:
        generator = torch.Generator().manual_seed(0)
        encoder, shared = ours.encoders["image"], ours.config.text_config.vocab_size
        pixels = torch.randn(rows, 3, encoder.size, encoder.size, generator=generator)
        return cls(pixels, torch.randint(shared - 1, (rows, text), generator=generator), encoder.tokens, shared)

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, image_token: int) -> Tensor:
        """Logits [rows, T, V] at every position, with the picture behind the first word."""
        image = torch.full((len(self.words), self.image_tokens), image_token)
        words = self.words.where(self.words != image_token, 0)
        ids = torch.cat([words[:, :1], image, words[:, 1:]], 1)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=self.pixels)
        return out.logits[..., : self.shared]


def dense(model: VLM) -> None:
    """Make of a model what other formats can hold: parts in few bits become dense, and every LoRA is merged."""
    quantised.dequantise(model)
    merge(model)


def merge(model: VLM) -> None:
    """Fold every LoRA into the weights that it stands beside.

    Raises:
        ConfigError: one cannot be (see `lora.merge`); those before it are.
    """
    for name in adapters(model):
        model.merge_lora(name)


def adapters(model: VLM) -> list[str]:
    """The names of a model's LoRA, in order of attachment; one may be of several shapes."""
    return list(dict.fromkeys(adapter["name"] for adapter in model.config.lora))


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose files are moved into `out` when the block ends well; otherwise nothing is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".exporting-") as scratch:
        yield Path(scratch)
        out.mkdir(exist_ok=True)
        for file in Path(scratch).iterdir():
            file.replace(out / file.name)
