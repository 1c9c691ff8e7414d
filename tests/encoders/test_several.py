"""Several encoders at once are the encoders one by one, put together; they save, load, cache and plan as one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import composed
from composed import picture, sample
from isthmus import compose, parts, planning
from isthmus.config import EncoderConfig, Recipe
from isthmus.data import media
from isthmus.encoders import Encoder
from isthmus.encoders.several import Several, resample
from isthmus.model import VLM
from isthmus.prepare.features import FeatureCache
from isthmus.types import ConfigError
from timm_folders import TINY_EVA, TINY_NFNET, folder

PICTURES = [picture(seed, 40) for seed in range(3)]


@functools.cache
def tower(name: str) -> str:
    """EVA and NFNet in timm's layout; any other name is a family of transformers."""
    if name not in {"eva", "nfnet"}:
        return str(composed.vision_folder(name))
    return str(folder(composed.HOME / f"timm-{name}", *(TINY_EVA if name == "eva" else TINY_NFNET)))


def chosen(*names: str, join: str = "concatenate", **first: object) -> EncoderConfig:
    also = [{"source": tower(name)} for name in names[1:]]
    return EncoderConfig.model_validate({"source": tower(names[0]), "also": also, "join": join, **first})


def one(config: EncoderConfig) -> Encoder:
    return parts.load_encoder(config, torch.float32)


def own(encoder: Encoder) -> torch.Tensor:
    """What an encoder sees in the pictures by itself, in its own pixels."""
    pixels = [media.pixels(medium.source, encoder.processor, encoder.aspect) for medium in PICTURES]
    return encoder(torch.stack(pixels)).x_NSE


@torch.no_grad()
def seen(encoder: Encoder, folder: Path) -> torch.Tensor:
    return FeatureCache(encoder, folder)("image", PICTURES)[1].x_NSE


@torch.no_grad()
def test_side_by_side_is_every_encoder_in_the_order_named(tmp_path: Path) -> None:
    names = ("siglip", "clip", "eva")
    together = one(chosen(*names))
    expected = torch.cat([own(one(chosen(name))) for name in names], -1)
    assert (together.width, together.tokens, together.grid) == (96, 16, (4, 4))
    torch.testing.assert_close(seen(together, tmp_path), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_interleaved_tokens_alternate_in_channels_of_their_own(tmp_path: Path) -> None:
    together = one(chosen("clip", "eva", join="interleave"))
    found = seen(together, tmp_path)
    assert (together.width, together.tokens, together.grid) == (64, 32, (4, 8)) and found.shape == (3, 32, 64)
    torch.testing.assert_close(found[:, 0::2, :32], own(one(chosen("clip"))), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1::2, 32:], own(one(chosen("eva"))), atol=1e-5, rtol=1e-5)
    assert not found[:, 0::2, 32:].any() and not found[:, 1::2, :32].any()


@torch.no_grad()
def test_another_grid_comes_to_the_first_ones(tmp_path: Path) -> None:
    first = chosen("clip", "nfnet", taps=(0,))
    together = one(first.but(also=[first.also[0].but(layer="stage3", image_size=96)]))
    assert isinstance(together, Several) and together.members[1].grid == (6, 6)
    found = FeatureCache(together, tmp_path)("image", PICTURES)[1]
    assert found.x_NSE.shape == (3, 16, 32 + 24) and found.taps.keys() == together.tap_widths.keys() == {"0"}
    torch.testing.assert_close(found.x_NSE[..., :32], own(one(chosen("clip"))), atol=1e-5, rtol=1e-5)
    assert not torch.equal(found.x_NSE[:, :1, 32:], found.x_NSE[:, 5:6, 32:])


def test_resampling_is_linear() -> None:
    ramp = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 4, 1)
    wide = resample(ramp, (2, 2), (4, 4)).view(4, 4)
    torch.testing.assert_close(wide, torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(4, 4))
    torch.testing.assert_close(resample(torch.ones(1, 36, 2), (6, 6), (4, 4)), torch.ones(1, 16, 2))


def recipe(join: str, aligner: str = "llava") -> Recipe:
    base = composed.recipe("llama", aligner)
    return base.but(encoder=chosen("clip", "eva", join=join))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("aligner", "join"), [("llava", "concatenate"), ("flamingo", "interleave")])
@torch.no_grad()
def test_a_saved_model_says_the_same(tmp_path: Path, aligner: str, join: str, whole: bool) -> None:
    model = composed.stir(compose(recipe(join, aligner)))
    asked = [sample(PICTURES[0], "what is it?")]
    expected = model.run(model.processor.prompts(asked)).hidden_BTD
    other = model.run(model.processor.prompts([sample(PICTURES[1], "what is it?")])).hidden_BTD
    assert not torch.allclose(expected, other)
    model.save_pretrained(tmp_path, whole=whole)
    again = VLM.from_pretrained(tmp_path)
    assert torch.equal(again.run(again.processor.prompts(asked)).hidden_BTD, expected)


def test_a_plan_counts_every_encoder() -> None:
    plan = planning.plan(recipe("concatenate"))
    alone = [planning.plan(composed.recipe("llama").but(encoder=chosen(name))) for name in ("clip", "eva")]
    assert plan.parts["encoders.image"] == sum(each.parts["encoders.image"] for each in alone)
    assert plan.tokens["image"] == 16 and planning.plan(recipe("interleave")).tokens["image"] == 32


def test_identity_tells_order_and_join() -> None:
    found = [
        str(one(chosen(*names, join=join)).identity())
        for names in (("clip", "eva"), ("eva", "clip"), ("clip", "siglip"))
        for join in ("concatenate", "interleave")
    ]
    assert len(set(found)) == 6


def test_a_bare_name_will_do() -> None:
    assert EncoderConfig.model_validate({"also": ["one", "two"]}).also[1].source == "two"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"aspect": "crop"}, "aspect|square"),
        ({"bits": 8}, "bits"),
        ({"class_token": "keep"}, "class token"),
        ({"also": [{"source": "x", "taps": [1]}]}, "taps"),
        ({"also": [{"source": "x", "also": ["y"]}]}, "inside"),
    ],
)
def test_what_cannot_be_joined_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        one(chosen("clip", "eva").but(**change))
