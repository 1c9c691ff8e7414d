"""Published recipes that train the encoder, on tiny parts: their own maps of what trains pass a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import composed
from isthmus import compose, parts, recipes
from isthmus.config import Budget
from isthmus.model import VLM
from isthmus.training.loop import run_stage
from isthmus.types import Batch

TINY: dict[str, dict[str, Any]] = {
    "mplug-owl-7b": {"queries": 4, "depth": 1, "heads": 2, "inner": 32},
    "qwen-vl-7b": {},
    "victor-7b": {"grid": 2, "size": 16},
}
TRAINING = [
    ("mplug-owl-7b", "pretrain"),
    ("qwen-vl-7b", "pretrain"),
    ("qwen-vl-7b", "multitask"),
    ("victor-7b", "comprehend"),
]


@dataclass
class Feed:
    """One random picture a step."""

    vlm: VLM
    micros: int = 1

    def __call__(self, step: int, micro: int) -> Batch:
        return self.vlm.processor.collator()([composed.sample(composed.picture(step), "what is it?")])


@pytest.mark.parametrize(("name", "stage"), TRAINING)
def test_their_encoder_trains_but_for_what_is_not_read(name: str, stage: str, tmp_path: Path) -> None:
    published = recipes.named(name)
    chosen = published.encoder.but(source=str(composed.vision_folder("clip")), architecture=None)
    options = {**published.aligner.options, **TINY[name]}
    made = composed.recipe("llama", published.aligner.name, options).but(encoder=chosen)
    vlm, (leg,) = compose(made), [each for each in published.stages if each.name == stage]
    before = {key: each.clone() for key, each in vlm.encoders["image"].named_parameters()}
    leg = leg.but(batch_size=1, accumulate=1, budget=Budget(steps=1), save_every=None, evaluate_every=None)
    run_stage(vlm, leg, Feed(vlm), tmp_path, steps=1, console=Console(quiet=True))
    moved = {key for key, each in vlm.encoders["image"].named_parameters() if not torch.equal(each, before[key])}
    fresh = parts.load_encoder(chosen, torch.float32).requires_grad_()
    fresh(torch.randn(1, 3, fresh.size, fresh.size)).x_NSE.square().sum().backward()
    silent = {key for key, each in fresh.named_parameters() if each.grad is None}
    assert silent and moved == before.keys() - silent
