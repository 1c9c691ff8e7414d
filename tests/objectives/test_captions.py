"""Terms over pictures and captions share one look at the picture and one reading of the text; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import composed
import tiny
from composed import picture, sample
from isthmus.config import ObjectiveConfig
from isthmus.training.step import Step

N, Q = 3, 3
SHAPE = {"queries": Q, "layers": 3, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0, "positions": 32}
TEXT = {**SHAPE, "text": True, "vocabulary": tiny.VOCAB + 1}
PAIRS = tuple(sample(picture(n), answer=text) for n, text in enumerate(["a cat", "the dog is here", "on the left"], 1))


def taken(joint: str, *names: str) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Each term's share in one step, and the rows of every pass through parts of the model."""
    model = composed.stir(composed.model("llama", joint, TEXT))
    former, passes = model.connectors["image"], {"encoder": [], "connector": [], "queries": [], "texts": []}

    def count(module: nn.Module, part: str) -> None:
        module.register_forward_hook(lambda module, args, output: passes[part].append(len(args[0])))

    count(model.encoders["image"], "encoder")
    former.register_forward_hook(lambda *_: passes["connector"].append(1))
    count(former.layers[0], "queries")
    count(former.layers[0].text_feed, "texts")
    batch = model.processor.collator(template="plain")(PAIRS)
    step = Step(model, [ObjectiveConfig(name=name) for name in names])
    torch.manual_seed(7)  # of which matching draws its negatives
    _, shares = step(batch, step.scales([batch]))
    return {name: share.item() for name, share in shares.items()}, passes


def test_three_terms_encode_once_look_once_and_read_once() -> None:
    shares, passes = taken("blip2", "itc", "itm", "itg")
    # matching has a pass of its own, over three pairs per picture; writing reads words behind the queries
    assert passes == {"encoder": [N], "connector": [], "queries": [N, 3 * N], "texts": [N, 3 * N, N]}
    alone: dict[str, Any] = {}
    for name in shares:
        alone |= taken("blip2", name)[0]
    assert shares == alone


@pytest.mark.parametrize("beside", ["itc", "lm"])
def test_a_prompt_is_matched_by_the_queries_that_others_see(beside: str) -> None:
    shares, passes = taken("p_former", beside, "prompt_match")
    assert passes["encoder"] == passes["queries"] == [N] and passes["connector"] == [1] * (beside == "lm")
    assert shares["prompt_match"] == taken("p_former", "prompt_match")[0]["prompt_match"]
