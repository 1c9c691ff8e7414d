"""Vision transformers in folders: our features are transformers' own hidden states, and our pixels its processor's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import composed
import tiny
from composed import picture
from isthmus import parts
from isthmus.config import EncoderConfig
from isthmus.data import media
from isthmus.encoders import Encoder
from isthmus.types import ConfigError
from tiny import IMAGE, PATCH, VISION, WIDTH

EXTRA = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1}
PATCHES = (IMAGE // PATCH) ** 2


def load(family: str, **fields) -> Encoder:
    return parts.load_encoder(EncoderConfig(source=str(composed.vision_folder(family)), **fields), torch.float32)


def pixels(n: int = 2, side: int = IMAGE) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states(folder: Path, **how) -> tuple[torch.Tensor, ...]:
    return AutoModel.from_pretrained(folder)(pixel_values=pixels(**how), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("layer", [-2, -1, 0, 2])
@torch.no_grad()
def test_features_are_transformers_own_hidden_states(family, layer):
    encoder, expected = load(family, layer=layer), states(composed.vision_folder(family))[layer]
    features = encoder(pixels())
    assert torch.equal(features.x_NSE, expected[:, EXTRA[family] :])
    assert features.x_NSE.shape == (2, encoder.tokens, encoder.width) == (2, PATCHES, WIDTH)
    assert features.grid == encoder.grid == (IMAGE // PATCH, IMAGE // PATCH) and encoder.size == IMAGE


@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_a_kept_class_token_comes_first(family):
    encoder = load(family, class_token="keep")
    found = encoder(pixels()).x_NSE
    assert torch.equal(found, states(composed.vision_folder(family))[-2])
    assert found.shape[1] == encoder.tokens == PATCHES + EXTRA[family]


@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_taps_are_other_depths(family):
    encoder = load(family, taps=(0, -1))
    features, expected = encoder(pixels()), states(composed.vision_folder(family))
    assert set(features.taps) == set(encoder.tap_widths) == {"0", "-1"}
    for name, tap in features.taps.items():
        assert torch.equal(tap, expected[int(name)][:, EXTRA[family] :])


@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_another_size_interpolates_positions_as_transformers_does(family):
    encoder = load(family, image_size=48)
    tower = AutoModel.from_pretrained(composed.vision_folder(family))
    how = {} if family == "dinov2" else {"interpolate_pos_encoding": True}  # DINOv2 always does
    expected = tower(pixel_values=pixels(side=48), output_hidden_states=True, **how).hidden_states[-2]
    features = encoder(pixels(side=48))
    assert torch.equal(features.x_NSE, expected[:, EXTRA[family] :])
    assert encoder.tokens == features.x_NSE.shape[1] == 36 and encoder.grid == (6, 6) and encoder.size == 48
    assert media.pixels(picture(1, 80).source, encoder.processor, "squash").shape == (3, 48, 48)


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="50.*patches of 8"):
        load("clip", image_size=50)


@pytest.mark.parametrize(("layer", "reason"), [(4, "3 blocks"), (-5, "3 blocks"), ("stem", "number")])
@pytest.mark.parametrize("field", ["layer", "taps"])
def test_a_layer_that_is_not_there_is_refused(layer, reason, field):
    with pytest.raises(ConfigError, match=reason):
        load("clip", **{field: layer if field == "layer" else (layer,)})


def test_a_model_that_is_no_vision_tower_is_refused():
    with pytest.raises(ConfigError, match="not a vision transformer"):
        parts.load_encoder(EncoderConfig(source=str(composed.llm_folder("llama"))), torch.float32)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
def test_pixels_of_a_square_picture_equal_the_processors_own(family, aspect):
    folder = composed.vision_folder(family)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = picture(4, 80).source
    found = media.pixels(image, load(family).processor, aspect)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("whole", "config", "family"), [(CLIPModel, CLIPConfig, "clip"), (SiglipModel, SiglipConfig, "siglip")]
)
@torch.no_grad()
def test_the_vision_half_of_a_two_tower_folder_is_used(tmp_path, whole, config, family):
    text = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 64,
    }
    vision = tiny.vision(family).config.to_dict()
    model = whole(config(text_config={**text, "projection_size": WIDTH}, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    tiny.processor(family).save_pretrained(tmp_path)
    chosen = EncoderConfig(source=str(tmp_path))
    encoder = parts.load_encoder(chosen, torch.float32)
    expected = model.vision_model(pixel_values=pixels(), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder(pixels()).x_NSE, expected[:, EXTRA[family] :])
    again = parts.empty_encoder(chosen, parts.encoder_architecture(chosen))
    assert again.state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("family", VISION)
def test_an_outline_has_the_shapes_of_the_real_tower_and_no_weights(family):
    chosen = EncoderConfig(source=str(composed.vision_folder(family)))
    with torch.device("meta"):
        outline = parts.empty_encoder(chosen, parts.encoder_architecture(chosen))
    real = load(family)
    assert (outline.tokens, outline.width, outline.grid, outline.size) == (
        real.tokens,
        real.width,
        real.grid,
        real.size,
    )
    assert {k: v.shape for k, v in outline.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in outline.parameters())


def test_identity_names_all_that_features_depend_on():
    plain = load("clip").identity()
    changed = [
        load("clip", **one) for one in ({"layer": -1}, {"taps": (1,)}, {"class_token": "keep"}, {"image_size": 48})
    ]
    changed += [load("clip", aspect="crop"), load("vit")]
    assert len({str(sorted(each.identity().items())) for each in changed} | {str(sorted(plain.items()))}) == 7
    assert load("clip").identity() == plain
    looks = {"size": "32", "aspect": "pad", "processor": load("clip").processor.to_json_string()}
    chosen = {"layer": "2", "taps": "{'0': 0, '-1': 3}", "class_token": "keep"}
    known = load("clip", taps=(0, -1), class_token="keep").identity()
    assert known == {name: plain[name] for name in known.keys() - chosen.keys() - looks.keys()} | chosen | looks
    assert load("clip", layer=2).identity() == plain, "2 is -2 of a tower with three blocks"
