"""EfficientNet-Lite0 against a plain functional reference with unfolded batch norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from isthmus import assets
from isthmus.config import EncoderConfig
from isthmus.data import sprites
from isthmus.encoders import lite
from isthmus.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("embedded")
EVERY = tuple(lite.DEPTHS)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(assets.lite_weights())


def load(**options: object) -> lite.EfficientNetLite:
    config = EncoderConfig.model_validate(options)
    return lite.load(config, assets.lite_weights(), {"source": "test"})


def reference(tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Every depth's map, computed from the file's tensors as TensorFlow defines the network."""

    def same(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        kernel, pads = weight.shape[-1], []
        for side in (x.shape[3], x.shape[2]):
            total = max(kernel - stride if side % stride == 0 else kernel - side % stride, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, None, stride, 0, 1, groups)

    def unit(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        y = same(x, tensors[f"{conv}.weight"], stride, groups)
        mean, var, weight, bias = (tensors[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-3)

    maps, x = {}, unit(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for i in range(16):
        at = f"_blocks.{i}."
        y = unit(x, f"{at}_expand_conv", f"{at}_bn0").clamp(0, 6) if f"{at}_expand_conv.weight" in tensors else x
        y = unit(y, f"{at}_depthwise_conv", f"{at}_bn1", 2 if i in (1, 3, 5, 11) else 1, y.shape[1]).clamp(0, 6)
        y = unit(y, f"{at}_project_conv", f"{at}_bn2")
        x = x + y if y.shape == x.shape else y
        maps[f"block{i + 1}"] = x
    maps["head"] = unit(x, "_conv_head", "_bn1").clamp(0, 6)
    return maps


@pytest.mark.parametrize("side", [96, 75])
def test_every_depth_equals_the_reference(tensors: dict[str, Tensor], side: int) -> None:
    encoder = load(layer="head", taps=EVERY, image_size=side)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = encoder(pixels)
    for name, expected in reference(tensors, pixels).items():
        rows_first = expected.flatten(2).transpose(1, 2)
        assert features.taps[name].shape == rows_first.shape
        assert encoder.tap_widths[name] == expected.shape[1]
        torch.testing.assert_close(features.taps[name], rows_first, atol=2e-4, rtol=2e-4)


def test_logits_are_the_pooled_head_classified(tensors: dict[str, Tensor]) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    expected = F.linear(reference(tensors, pixels)["head"].mean((2, 3)), tensors["_fc.weight"], tensors["_fc.bias"])
    torch.testing.assert_close(load(layer="block2").classify(pixels), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("char", "label"), [("🧮", 398), ("🧷", 772), ("🩹", 419)])
def test_it_recognises_an_abacus_a_safety_pin_and_a_plaster(char: str, label: int) -> None:
    aspect = sprites.aspect(char, "openmoji")
    drawing = sprites.sprite(char, "openmoji", round(180 * min(1, aspect)), round(180 * min(1, 1 / aspect)))
    picture = Image.new("RGB", (224, 224), "white")
    picture.paste(drawing, ((224 - drawing.width) // 2, (224 - drawing.height) // 2), drawing)
    encoder = load()
    pixels = encoder.processor(picture, return_tensors="pt")["pixel_values"]
    assert encoder.classify(pixels).argmax().item() == label


@pytest.mark.parametrize("layer", ["block1", "block5", "block16", -2, "block3+block11"])
@pytest.mark.parametrize("side", [224, 100, 33])
def test_grid_and_width_are_known_before_any_forward(layer: str | int, side: int) -> None:
    encoder = lite.EfficientNetLite(EncoderConfig(layer=layer, image_size=side), {})
    features = encoder(torch.zeros(1, 3, side, side))
    assert features.grid == encoder.grid
    assert features.x_NSE.shape == (1, encoder.tokens, encoder.width)


def test_joined_depths_pool_to_the_deepest_grid() -> None:
    encoder = load(layer="head+block5", taps=("block5", "head"), image_size=96)
    features = encoder(torch.randn(1, 3, 96, 96))
    shallow = features.taps["block5"].reshape(1, 3, 4, 3, 4, 40).mean((2, 4)).reshape(1, 9, 40)
    torch.testing.assert_close(features.x_NSE, torch.cat([shallow, features.taps["head"]], -1))


def test_deeper_blocks_are_not_computed() -> None:
    encoder, called = load(layer="block5", taps=("block2",)), []
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index + 1))
    encoder(torch.zeros(1, 3, 64, 64))
    assert called == [1, 2, 3, 4, 5]


def test_bfloat16_is_close() -> None:
    pixels = load().processor(Image.effect_noise((96, 96), 60).convert("RGB"), return_tensors="pt")["pixel_values"]
    exact, rounded = load()(pixels).x_NSE, load().to(torch.bfloat16)(pixels.bfloat16()).x_NSE
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.995


def test_training_mode_changes_nothing() -> None:
    encoder, pixels = load(), torch.randn(2, 3, 64, 64)
    before, state = encoder(pixels).x_NSE, {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.testing.assert_close(encoder.train()(pixels).x_NSE, before, atol=0, rtol=0)
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_pixels_are_centred_on_127() -> None:
    encoder = load(image_size=32)
    raw = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = encoder.processor(Image.fromarray(raw), return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(raw).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)


def test_identity_names_all_that_features_depend_on() -> None:
    base = load().identity()
    others = [load(layer="block5"), load(image_size=96), load(taps=("block3",)), load(aspect="crop")]
    assert all(encoder.identity() != base for encoder in others)
    looks = {"aspect": "pad", "processor": load().processor.to_json_string()}
    assert base == {"source": "test", "layer": "head", "taps": ""} | looks, "features in caches are known by it"
    assert load(layer="head").identity() == base


def test_an_unknown_depth_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'block5'"):
        lite.EfficientNetLite(EncoderConfig(layer="blok5"), {})
    with pytest.raises(ConfigError, match="no depth '3'"):
        lite.EfficientNetLite(EncoderConfig(taps=(3,)), {})


def test_a_file_with_other_tensors_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    lacking = {name: tensor for name, tensor in tensors.items() if name != "_blocks.4._bn1.bias"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    save_file(tensors | {"_extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(DataError, match="_blocks.4._bn1.bias"):
        lite.load(EncoderConfig(), tmp_path / "lacking.safetensors", {})
    with pytest.raises(DataError, match="_extra"):
        lite.load(EncoderConfig(), tmp_path / "extra.safetensors", {})
