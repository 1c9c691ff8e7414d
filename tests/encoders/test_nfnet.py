"""NFNet against a plain functional reference with standardised weights; compared with timm's own in `test_timm`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import composed
from isthmus import parts, planning
from isthmus.config import EncoderConfig
from isthmus.encoders import Encoder, nfnet
from isthmus.recipes.flamingo import flamingo
from isthmus.types import ConfigError
from timm_folders import TINY_NFNET, folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("nfnet") / "tower", *TINY_NFNET)


def load(path: Path, **fields: object) -> Encoder:
    return parts.load_encoder(EncoderConfig.model_validate({"source": str(path), **fields}), torch.float32)


def reference(tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Every depth's map, from the file's tensors, as the paper writes the network down."""

    def act(x: Tensor) -> Tensor:
        return 1.7015043497085571 * F.gelu(x)

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), correction=0, keepdim=True)
        fan = weight[0].numel()
        weight = (weight - mean) / (variance * fan + 1e-5 * fan).sqrt() * tensors[f"{name}.gain"]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, tensors[f"{name}.bias"], stride, 0, 1, groups)

    x = act(conv(x, "stem.conv1", 2))
    x = act(conv(act(conv(x, "stem.conv2")), "stem.conv3"))
    x = conv(x, "stem.conv4", 2)
    maps = {"stem": x}
    variance = 1.0
    for stage, depth in enumerate(TINY_NFNET[1]["depths"]):
        for index in range(depth):
            at, stride = f"stages.{stage}.{index}", 2 if stage and not index else 1
            y = act(x) / variance**0.5
            if f"{at}.downsample.conv.weight" in tensors:
                pooled = F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else y
                x = conv(pooled, f"{at}.downsample.conv")
            groups = tensors[f"{at}.conv2.weight"].shape[0] // 4
            y = act(conv(y, f"{at}.conv1"))
            y = act(conv(y, f"{at}.conv2", stride, groups))
            y = conv(act(conv(y, f"{at}.conv2b", 1, groups)), f"{at}.conv3")
            squeezed = y.mean((2, 3))
            for layer, then in (("fc1", F.relu), ("fc2", torch.sigmoid)):
                matrix = tensors[f"{at}.attn_last.{layer}.weight"].flatten(1)
                squeezed = then(squeezed @ matrix.T + tensors[f"{at}.attn_last.{layer}.bias"])
            x = x + 0.2 * tensors[f"{at}.skipinit_gain"] * 2 * squeezed[..., None, None] * y
            variance = (variance if index else 1.0) + 0.04
        maps[f"stage{stage + 1}"] = x
    maps["final"] = act(conv(x, "final_conv"))
    return maps


@pytest.mark.parametrize("side", [64, 50])
@torch.no_grad()
def test_every_depth_equals_the_reference(tower: Path, side: int) -> None:
    encoder = load(tower, layer="final", taps=nfnet.DEPTHS, image_size=side)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = encoder(pixels)
    for name, expected in reference(load_file(tower / "model.safetensors"), pixels).items():
        torch.testing.assert_close(features.taps[name], expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
        assert encoder.tap_widths[name] == expected.shape[1]
    assert torch.equal(features.x_NSE, features.taps["final"])


@pytest.mark.parametrize("layer", ["stem", "stage1", "stage2", "stage3", "stage4", -2])
@pytest.mark.parametrize("side", [64, 50])
def test_grid_and_width_are_known_before_any_forward(tower: Path, layer: str | int, side: int) -> None:
    encoder = load(tower, layer=layer, image_size=side)
    features = encoder(torch.zeros(1, 3, side, side))
    assert features.grid == encoder.grid and features.x_NSE.shape == (1, encoder.tokens, encoder.width)


def test_stages_behind_the_last_depth_are_not_built(tower: Path) -> None:
    assert [len(load(tower, layer=layer).stages) for layer in ("stem", "stage2", "stage4", "final")] == [0, 2, 4, 4]
    assert load(tower, layer="stage4").final_conv is None


def test_flamingos_picture_is_a_grid_of_a_hundred_tokens() -> None:
    described = {"architecture": "dm_nfnet_f6", "pretrained_cfg": {"input_size": [3, 448, 448]}}
    chosen = EncoderConfig(source="timm/dm_nfnet_f6.dm_in1k", image_size=320, architecture=described)
    with torch.device("meta"):
        encoder = parts.empty_encoder(chosen, parts.encoder_architecture(chosen))
    assert encoder.grid == (10, 10) and encoder.width == 3072


def test_flamingos_own_tower_is_an_ablation_of_its_recipe() -> None:
    recipe = flamingo("published", tower="nfnet-f6")
    found = planning.plan(recipe.but(llm=composed.recipe().llm, aligner={"name": "flamingo"}))
    assert found.parts["encoders.image"] == pytest.approx(435e6, rel=0.01)  # the paper's figure
    assert recipe.encoder.image_size == 320


def test_an_unknown_depth_names_the_nearest(tower: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'stage3'"):
        load(tower, layer="stge3")
