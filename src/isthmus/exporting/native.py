"""What exports to classes of transformers have in common: the marker of a picture, the image processor, the folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from transformers import LlavaImageProcessorPil, PreTrainedModel, ProcessorMixin

from isthmus import cards, parts
from isthmus.data import media
from isthmus.data.template import Template
from isthmus.encoders import Encoder, hf
from isthmus.exporting import KEEP, Parity
from isthmus.model import VLM
from isthmus.processor import MARKER
from isthmus.types import ConfigError

LEVELS = 2
"""Largest difference of prepared pictures in grey levels: transformers cuts off the fraction of the margin's colour,
which is rounded here, and resampling may round that apart once more."""


def marked(ours: VLM) -> Any:
    """A copy of the tokenizer that knows the marker, and the chat template that the model is asked with."""
    tokenizer = copy.deepcopy(ours.processor.tokenizer)
    tokenizer.chat_template = Template(tokenizer).jinja
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    return tokenizer


@torch.no_grad()
def add_marker(theirs: Any, token: int) -> None:
    """Rows for a marker beyond the vocabulary: always the same ones, and the model never says it."""
    theirs.resize_token_embeddings(token + 1, mean_resizing=False)
    for table in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
        table.weight[token] = 0
    theirs.generation_config.suppress_tokens = [token]


def picture_processor(encoder: Encoder) -> LlavaImageProcessorPil:
    """transformers' image processor that makes pictures square as they were for an encoder.

    Compared on noise three times as wide as it is tall, and as tall as it is wide, of whole multiples of the encoder's
    side: of other sizes `crop` there rounds the lengths to whole pixels before it crops, and lies up to a pixel beside.

    Raises:
        ConfigError: it prepares them otherwise.
    """
    own, aspect = encoder.processor, encoder.aspect
    side = media.side(own)
    square = {"height": side, "width": side}
    fields: dict[str, Any] = {
        "size": {"shortest_edge": side} if aspect == "crop" else square,
        "crop_size": square,
        "do_center_crop": aspect == "crop",
        "do_pad": aspect == "pad",
    }
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    theirs = LlavaImageProcessorPil(**fields, **{name: getattr(own, name) for name in kept})
    black, white = (media.pixels(Pillow.new("RGB", (side, side), each), own, aspect) for each in ("black", "white"))
    generator = np.random.default_rng(0)
    for shape in ((2 * side, 6 * side, 3), (6 * side, 2 * side, 3)):
        picture = Pillow.fromarray(generator.integers(0, 256, shape, np.uint8))
        expected, found = media.pixels(picture, own, aspect), theirs(picture, return_tensors="pt")["pixel_values"][0]
        levels = (255 * (found - expected) / (white - black)).abs().max().round().item()
        if not levels <= LEVELS:
            raise ConfigError(
                f"transformers cannot {aspect} pictures for this encoder ({levels:.0f} grey levels apart)",
                KEEP,
            )
    return theirs


def write(theirs: PreTrainedModel, processor: ProcessorMixin, source: str | Path, out: Path, parity: Parity) -> None:
    """Write a model as a class of transformers, with its processor and a card."""
    with hf.quiet():
        theirs.save_pretrained(out)
    processor.save_pretrained(out)
    name, folder = type(theirs).__name__, '"path/to/this/directory"'
    code = (
        f"from transformers import AutoProcessor, {name}\n\n"
        f"model = {name}.from_pretrained({folder})\nprocessor = AutoProcessor.from_pretrained({folder})"
    )
    cards.write_export(parts.folder(str(source)), out, cards.Export(name, "transformers", code, parity.difference))
