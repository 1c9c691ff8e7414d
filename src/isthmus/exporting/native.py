"""What exports to classes of transformers have in common: the marker of a picture, the image processor, the folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image as Pillow
from transformers import LlavaImageProcessorPil, PreTrainedModel, ProcessorMixin

from isthmus import cards, parts
from isthmus.data import media
from isthmus.data.template import Template
from isthmus.encoders import Encoder
from isthmus.exporting import KEEP, Parity
from isthmus.model import VLM
from isthmus.pretrained import quiet
from isthmus.processor import MARKER
from isthmus.types import ConfigError, Layout

LEVELS = 2
"""Largest difference of prepared pictures in grey levels: transformers cuts off the fraction of the margin's colour,
which is rounded here, and resampling may round that apart once more."""


def marked(ours: VLM) -> Any:
    """A copy of the tokenizer that knows the marker, and the chat template that the model is asked with."""
    tokenizer = copy.deepcopy(ours.processor.tokenizer)
    tokenizer.chat_template = Template(tokenizer).jinja
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    return tokenizer


def reads_texts(tokenizer: Any) -> bool:
    """Whether a chat template takes contents as texts; one that came with a processor may know lists of parts alone."""
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "isthmus"}], tokenize=False)
    except (TemplateError, TypeError):
        return False
    return "isthmus" in text


def by_parts(template: str, layout: Layout, system: str | None = None, texts: bool = True) -> str:
    """A chat template whose contents may be lists of parts, as processors are asked: they become text, then it writes.

    Strings and their template stay as they are. A line break behind a picture stands once, as where we write it.

    Args:
        template: that of the LLM, which writes texts.
        layout: what stands around a picture.
        system: the system turn of conversations that have none.
        texts: whether it takes them as such, or as a part.
    """
    shown, told = (json.dumps(text, ensure_ascii=False) for text in (layout.before + MARKER + layout.after, system))
    lines = _SYSTEM.replace("SYSTEM", told) if system is not None else ""
    ends = json.dumps(layout.after.endswith("\n"))
    lines += _PARTS.replace("CONTENT", _TEXT if texts else _PART).replace("ENDS", ends).replace("PICTURE", shown)
    return lines + template


_SYSTEM = """\
{%- if not messages or messages[0].role != 'system' %}
{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages %}
{%- endif %}
"""
_PARTS = """\
{%- set read = namespace(messages=[], text='', ended=false) %}
{%- for message in messages %}
{%- if message.content is iterable and message.content is defined %}
{%- set read.text = message.content if message.content is string else '' %}{%- set read.ended = false %}
{%- for part in message.content if message.content is not string %}
{%- if part.type == 'image' %}
{%- set read.text = read.text + PICTURE %}{%- set read.ended = ENDS %}
{%- elif part.type == 'text' %}
{%- set read.text = read.text + (part.text[1:] if read.ended and part.text[:1] == '\\n' else part.text) %}
{%- set read.ended = read.ended and not part.text %}
{%- else %}{{- raise_exception('a part of a message is text or image, not ' + part.type) }}
{%- endif %}
{%- endfor %}
{%- set message = dict(message, content=CONTENT) %}
{%- endif %}
{%- set read.messages = read.messages + [message] %}
{%- endfor %}
{% set messages = read.messages %}
"""
"""Templates of transformers drop a line break behind a block, so that what follows is what it was."""
_TEXT, _PART = "read.text", "[{'type': 'text', 'text': read.text}]"


def begins_alone(tokenizer: Any) -> None:
    """Leave the beginning of a chat to its template: a processor lets the tokenizer add one where that writes none."""
    chat = Template(tokenizer)
    if not chat.frame(("user",)).slots[0].before.startswith(chat.begin):
        tokenizer.add_bos_token = False


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


_ANSWERED = """answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def write(
    theirs: PreTrainedModel, processor: ProcessorMixin, source: str | Path, out: Path, parity: Parity, asked: str
) -> None:
    """Write a model as a class of transformers, with its processor and a card.

    Args:
        theirs, processor: what is written, `source` in another form.
        source, out: where the model is, and where to write.
        parity: how close both are.
        asked: code that makes `inputs` of "What is this?" and the picture `cat.png`.
    """
    with quiet():
        theirs.save_pretrained(out)
    processor.save_pretrained(out)
    name, folder = type(theirs).__name__, '"path/to/this/directory"'
    code = (
        f"from transformers import AutoProcessor, {name}\n\n"
        f"model = {name}.from_pretrained({folder})\nprocessor = AutoProcessor.from_pretrained({folder})\n\n"
        f"{asked}\n{_ANSWERED}"
    )
    cards.write_export(parts.folder(str(source)), out, cards.Export(name, "transformers", code, parity.difference))
