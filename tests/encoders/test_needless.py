"""What an encoder holds beside the states that it returns is told, and stays as it is when the encoder trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import composed
import tiny
from isthmus import compose, parts, planning
from isthmus.config import Recipe, Stage
from isthmus.encoders import Encoder
from isthmus.model import VLM
from isthmus.quantised import Packed
from isthmus.training.loop import run_stage
from isthmus.types import Batch
from timm_folders import TINY_EVA, TINY_NFNET, folder

pytestmark = pytest.mark.usefixtures("embedded")
LITE = "efficientnet-lite0"
READ = [(-1, ()), (-2, ()), (0, ()), (0, (1,)), (-2, (-1, 1))]
DEPTHS = [(-2, ()), ("block5", ()), ("block3+block5", ("block8",))]
"""States that are read, and taps."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


def recipe(tower: str, layer: int | str, taps: tuple[int | str, ...] = ()) -> Recipe:
    """Of a joint that reads all taps, if there are some."""
    joint, options = ("llama_adapter", {"gate": 1.0}) if taps else ("llava", {})
    vision = "clip" if tower == LITE else tower
    made = composed.recipe("llama", joint, options, vision, layer=layer, taps=taps)
    return made.but(encoder=made.encoder.but(source=LITE, image_size=64)) if tower == LITE else made


def load(tower: str, layer: int | str, taps: tuple[int | str, ...] = ()) -> Encoder:
    return parts.load_encoder(recipe(tower, layer, taps).encoder, torch.float32)


def unreached(encoder: Encoder) -> set[str]:
    """Parameters that are no part of the graph of a random picture's features."""
    named = dict(encoder.requires_grad_().named_parameters())
    pixels = torch.randn(encoder.blank().shape, generator=torch.Generator().manual_seed(1))
    features = encoder(pixels)
    states = [features.x_NSE, *features.taps.values()]
    gradients = torch.autograd.grad(states, list(named.values()), [x.sign() for x in states], allow_unused=True)
    encoder.requires_grad_(False)
    return {name for name, gradient in zip(named, gradients) if gradient is None}


TOWERS = [(tower, *read) for tower in tiny.VISION for read in READ]
EMBEDDED = [(LITE, *read) for read in DEPTHS]


@pytest.mark.parametrize(("tower", "layer", "taps"), [*TOWERS, *EMBEDDED])
def test_it_is_what_no_gradient_of_a_random_picture_reaches(tower: str, layer: Any, taps: tuple[Any, ...]) -> None:
    encoder = load(tower, layer, taps)
    assert encoder.needless() == unreached(encoder) != set()


@pytest.mark.parametrize(
    ("tower", "layer", "count"),
    [("clip", -1, 2), ("clip", -2, 18), ("siglip", -1, 13), ("dinov2", -1, 3), ("vit", -1, 4)],
)
def test_counts_by_hand(tower: str, layer: int, count: int) -> None:
    """A norm and a pooler are two tensors each, CLIP's block is sixteen, SigLIP's head eleven, a mask token one."""
    assert len(load(tower, layer).needless()) == count


def test_nothing_of_the_encoder_changes_when_it_is_asked() -> None:
    encoder = load("dinov2", -2).train()
    encoder.requires_grad_(False).tower.encoder.layer[0].requires_grad_(True)
    drawn, state = torch.get_rng_state(), {name: each.clone() for name, each in encoder.state_dict().items()}
    trains = {name: each.requires_grad for name, each in encoder.named_parameters()}
    with torch.no_grad():
        encoder.needless()
    assert torch.equal(drawn, torch.get_rng_state()) and all(module.training for module in encoder.modules())
    assert trains == {name: each.requires_grad for name, each in encoder.named_parameters()}
    assert all(torch.equal(state[name], each) for name, each in encoder.state_dict().items())
    assert all(each.grad is None and not each.is_meta for each in encoder.parameters())


@pytest.mark.parametrize("tower", tiny.VISION)
def test_it_is_the_same_without_numbers_and_in_mixed_dtypes(tower: str) -> None:
    encoder, chosen = load(tower, -2), recipe(tower, -2).encoder
    expected = encoder.needless()
    with torch.device("meta"):
        assert parts.empty_encoder(chosen, parts.encoder_architecture(chosen)).needless() == expected
    encoder.bfloat16()
    next(iter(encoder.parameters())).data = next(iter(encoder.parameters())).data.float()
    assert encoder.needless() == expected


@pytest.mark.parametrize("which", [TINY_EVA, TINY_NFNET])
def test_towers_that_build_what_they_read_need_all_of_it(home: Path, which: tuple[str, Any]) -> None:
    source = str(folder(home / which[0], *which))
    encoder = parts.load_encoder(recipe("clip", -2).encoder.but(source=source), torch.float32)
    assert encoder.needless() == unreached(encoder) == set()


def test_several_encoders_are_asked_each() -> None:
    clip, siglip = (recipe(tower, -2).encoder for tower in ("clip", "siglip"))
    both = parts.load_encoder(clip.but(also=(siglip,)), torch.float32)
    own = [
        {f"members.{number}.{name}" for name in load(tower, -2).needless()}
        for number, tower in enumerate(("clip", "siglip"))
    ]
    assert both.needless() == own[0] | own[1]


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Feed:
    """Two random pictures a step."""

    vlm: VLM
    micros: int = 1

    def __call__(self, step: int, micro: int) -> Batch:
        pictures = [composed.picture(2 * step + number) for number in range(2)]
        return self.vlm.processor.collator()([composed.sample(each, "what is it?") for each in pictures])


def trained(made: Recipe, how: dict[str, Any], home: Path) -> tuple[VLM, dict[str, Tensor]]:
    """A model after two steps in which its encoder trains, and its base parameters before; the plan counts the same."""
    vlm = compose(made)
    before = {name: each.detach().clone() for name, each in vlm.named_parameters()}
    stage = Stage.model_validate(
        {
            "name": "see",
            "data": ["none"],
            "train": {"encoders.image.*": how, "connectors.*": 1e-3},
            "budget": {"steps": 2},
            "batch_size": 2,
            "warmup": 0,
            "save_every": None,
            "evaluate_every": None,
        }
    )

    run_stage(vlm, stage, Feed(vlm), home, steps=2, console=Console(quiet=True))
    moving = sum(each.numel() for each in vlm.encoders.parameters() if each.requires_grad)
    (planned,) = planning.plan(made.but(stages=(stage,))).stages
    assert sum(count for part, count in planned.by_part.items() if part.startswith("encoders.")) == moving
    return vlm, before


def moved(vlm: VLM, before: dict[str, Tensor]) -> set[str]:
    named = vlm.encoders["image"].named_parameters()
    return {name for name, each in named if not torch.equal(each, before.get(f"encoders.image.{name}", each * 0))}


@pytest.mark.parametrize(("tower", "layer", "taps"), [*(each for each in TOWERS if each[1:] != (0, ())), *EMBEDDED])
def test_an_encoder_trains_in_full_but_for_that(tower: str, layer: Any, taps: tuple[Any, ...], tmp_path: Path) -> None:
    """Of the embeddings alone, the class token is left out before anything reads it: its gradient is zero."""
    vlm, before = trained(recipe(tower, layer, taps), {"lr": 1e-2}, tmp_path)
    fresh = load(tower, layer, taps)
    silent = unreached(fresh)
    assert moved(vlm, before) == {name for name, _ in fresh.named_parameters()} - silent
    again = VLM.from_pretrained(tmp_path / "model")
    for name, each in again.encoders["image"].named_parameters():
        assert (name in silent) == torch.equal(each, before[f"encoders.image.{name}"]), name


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("tower", tiny.VISION)
def test_lora_on_an_encoder_lies_on_what_is_read_alone(tower: str, layer: int, tmp_path: Path) -> None:
    vlm, before = trained(recipe(tower, layer), {"lr": 1e-2, "mode": {"r": 2}}, tmp_path)
    fresh = load(tower, layer)
    silent = unreached(fresh)
    linears = [name for name, module in fresh.named_modules() if isinstance(module, nn.Linear)]
    read = [name for name in linears if f"{name}.weight" not in silent]
    assert moved(vlm, before) == {f"{name}.grafts.see.{factor}" for name in read for factor in "AB"} != set()


def test_lora_on_an_encoder_in_codes_lies_there_too(tmp_path: Path) -> None:
    made = recipe("clip", -2)
    vlm, _ = trained(made.but(encoder=made.encoder.but(bits=8)), {"lr": 1e-2, "mode": {"r": 2}}, tmp_path)
    hosts = {name.partition(".grafts.")[0] for name, _ in vlm.named_parameters() if ".grafts." in name}
    layers = vlm.encoders["image"].tower.encoder.layers
    assert len(hosts) == sum(isinstance(module, Packed) for layer in layers[:2] for module in layer.modules()) > 0
    assert not any(".layers.2." in name for name in hosts)
