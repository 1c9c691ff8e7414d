"""Whole tiny models for tests: base parts in folders made once, composed with any joint, and samples to feed them."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow

import isthmus
import tiny
from isthmus import storage
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, Recipe
from isthmus.model import VLM
from isthmus.types import Image, Sample, Turn

_HOME = tempfile.TemporaryDirectory()
HOME = Path(_HOME.name)


@functools.cache
def llm_folder(family: str) -> Path:
    return tiny.llm_folder(HOME / f"llm-{family}", family)


@functools.cache
def vision_folder(family: str) -> Path:
    return tiny.vision_folder(HOME / f"vision-{family}", family)


def recipe(
    family: str = "llama",
    aligner: str = "llava",
    options: dict[str, Any] | None = None,
    vision: str = "clip",
    **encoder: Any,
) -> Recipe:
    return Recipe(
        encoder=EncoderConfig(source=str(vision_folder(vision)), **encoder),
        llm=LLMConfig(source=str(llm_folder(family))),
        aligner=AlignerConfig(name=aligner, options=options or {}),
    )


def model(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> VLM:
    """A newborn model of `recipe(...)`: a copy of one that was composed, which takes a tenth of the time."""
    return copy.deepcopy(_composed(recipe(*args, **kwargs).model_dump_json(), dtype))


@functools.cache
def _composed(written: str, dtype: torch.dtype) -> VLM:
    return isthmus.compose(Recipe.model_validate_json(written), dtype)


@torch.no_grad()
def stir(vlm: VLM) -> VLM:
    """Move everything that was added away from its birth, so that gates are open and tests of influence can fail."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in vlm.named_parameters():
        if not storage.is_base(name):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return vlm


def picture(seed: int, size: int = tiny.IMAGE) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image(Pillow.fromarray(pixels))


def questions(folder: Path, count: int) -> Path:
    """A file of so many pictures, of each of which its number is told."""
    lines = []
    for number in range(count):
        picture(number).source.save(folder / f"{number}.png")
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"number {number}"}]
        lines.append(json.dumps({"id": str(number), "messages": turns}))
    file = folder / "some.jsonl"
    file.write_text("\n".join(lines))
    return file


def sample(*question: Image | str, answer: str = "a cat", route: int = 0) -> Sample:
    return Sample((Turn.say("user", *question), Turn.say("assistant", answer)), id="one", meta={"route": route})


MIX = (
    sample(picture(1), "what is it?", answer="a cat", route=1),
    sample("hi there", answer="the dog is here"),
    sample(picture(2), "and", picture(3), "do they differ?", answer="on the left", route=1),
)
"""One picture, none, and two; routes of both kinds."""
