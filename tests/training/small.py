"""A tiny real model and a feed of small pictures with names, for tests of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from rich.console import Console

import tiny
from isthmus import compose
from isthmus.config import Recipe, Stage
from isthmus.model import VLM
from isthmus.types import Batch, Image, Sample, Turn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "a pale grey": (200, 200, 200)}


def parts(folder: Path, family: str = "llama") -> Recipe:
    """A recipe over a tiny LLM and encoder that are written to `folder`."""
    llm = tiny.llm_folder(folder / "llm", family)
    encoder = tiny.vision_folder(folder / "encoder", "clip")
    return Recipe.model_validate({"llm": {"source": str(llm)}, "encoder": {"source": str(encoder)}})


def build(recipe: Recipe, dtype: torch.dtype = torch.float32) -> VLM:
    """A fresh model; the same each time."""
    return compose(recipe, dtype)


def stage(**changes: Any) -> Stage:
    """Align on nothing in particular: the connector, six steps of four samples."""
    fields = {
        "name": "align",
        "data": ["none"],
        "train": {"connectors.*": 1e-2},
        "budget": {"steps": 6},
        "batch_size": 4,
        "save_every": None,
        "evaluate_every": None,
    }
    return Stage.model_validate({**fields, **changes})


def sample(number: int) -> Sample:
    name, colour = list(COLOURS.items())[number % len(COLOURS)]
    picture = Image(Pillow.new("RGB", (16, 16), colour))
    question = "What colour is it?" + " Look well!" * (number % 3)
    return Sample((Turn.say("user", picture, question), Turn.say("assistant", name)), id=f"s{number}")


@dataclass
class Colours:
    """Samples in windows of three steps, sorted by length inside a window, as bucketing does."""

    vlm: VLM
    size: int = 4
    micros: int = 1
    asked: list[int] = field(default_factory=list)

    def __call__(self, step: int, micro: int) -> Batch:
        self.asked.append(step)
        window, place = divmod(step, 3)
        numbers = range(window * 3 * self.size, (window + 1) * 3 * self.size)
        ordered = sorted(numbers, key=lambda number: (number % 3, number))
        mine = ordered[place * self.size : (place + 1) * self.size]
        each = self.size // self.micros
        return self.vlm.processor.collator()([sample(n) for n in mine[micro * each : (micro + 1) * each]])


def quiet() -> Console:
    return Console(file=None, quiet=True)


def weights(vlm: VLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in vlm.state_dict().items()}


def text(number: int) -> Sample:
    """A conversation without a picture."""
    return Sample((Turn.say("user", f"Say {number}."), Turn.say("assistant", str(number))), id=f"t{number}")


def text_batch(vlm: VLM) -> Batch:
    """Two conversations without a picture."""
    turns = (Turn.say("user", "Say something."), Turn.say("assistant", "Something."))
    return vlm.processor.collator()([Sample(turns, id="t0"), Sample(turns, id="t1")])
