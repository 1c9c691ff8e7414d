"""EVA and NFNet against timm's own models; folders in the layouts of timm and open_clip."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composed import picture
from isthmus import parts
from isthmus.config import EncoderConfig
from isthmus.data import media
from isthmus.encoders import Encoder, eva, nfnet, timm
from isthmus.types import ConfigError, DataError
from timm_folders import TINY_EVA, TINY_NFNET, folder

BESIDE = Path(sys.prefix) / "timm"
"""Where the Makefile puts timm and torchvision, out of every other library's sight."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Folders that timm itself wrote, with the states that it finds."""
    beside = [str(BESIDE)] if BESIDE.is_dir() else []
    if not beside and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (pip install --no-deps --target .venv/timm -r tests/encoders/timm.txt)")
    out = tmp_path_factory.mktemp("timm")
    script = Path(__file__).with_name("timm_reference.py")
    done = subprocess.run([sys.executable, str(script), str(out), *beside], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def load(path: Path, **fields: Any) -> Encoder:
    return parts.load_encoder(EncoderConfig.model_validate({"source": str(path), **fields}), torch.float32)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@torch.no_grad()
def test_every_state_equals_timms(reference: Path) -> None:
    folders = sorted(path for path in reference.iterdir() if path.is_dir())
    assert len(folders) == 7
    for path in folders:
        expected = load_file(path / "expected.safetensors")
        convolutional = "nfnet" in path.name
        names = nfnet.DEPTHS if convolutional else ("0", "1", "2", "3")
        for prefix, size in (("", None), ("larger_", 224)):
            encoder = load(path, layer=names[-1], taps=names, class_token="keep", image_size=size)
            features = encoder(expected[f"{prefix}pixels"])
            for name in names:
                theirs = expected[prefix + name]
                theirs = theirs.flatten(2).transpose(1, 2) if convolutional else theirs
                close(features.taps[name], theirs)
                assert encoder.tap_widths[name] == theirs.shape[-1]
            close(features.x_NSE, features.taps[names[-1]])
            assert features.x_NSE.shape[1] == encoder.tokens and features.grid == encoder.grid


def test_published_towers_have_timms_tensors(reference: Path) -> None:
    for name, theirs in json.loads((reference / "published.json").read_text()).items():
        described = {"architecture": name, "pretrained_cfg": {"input_size": [3, 224, 224]}}
        with torch.device("meta"):
            tower = timm.empty(EncoderConfig(layer=-1), described, {})
        wanted = {key: shape for key, shape in theirs.items() if not key.startswith(tower.unread)}
        if "336" in name:
            wanted["pos_embed"][1] = 257
        ours = {key: list(value.shape) for key, value in tower.state_dict().items()}
        assert ours == {key: shape for key, shape in wanted.items() if not key.endswith(".gain")}


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(("name", "arguments"), [TINY_EVA, TINY_NFNET])
def test_a_folder_says_how_pictures_are_prepared(tmp_path: Path, name: str, arguments: dict) -> None:
    encoder = load(folder(tmp_path / "tower", name, arguments))
    found = media.pixels(picture(1, 40).source, encoder.processor, "squash")
    grey = picture(1, 40).source.resize((encoder.size, encoder.size), resample=2)
    raw = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(encoder.size, encoder.size, 3)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(found, ((raw / 255 - mean) / std).permute(2, 0, 1), atol=1e-5, rtol=0)


def test_an_open_clip_folder_is_the_tower_inside(tmp_path: Path) -> None:
    name, arguments = TINY_EVA
    plain = folder(tmp_path / "timm", name, arguments)
    described = json.loads((plain / "config.json").read_text())
    opened = tmp_path / "open_clip"
    opened.mkdir()
    pictures = {key: described["pretrained_cfg"][key] for key in ("mean", "std", "interpolation")}
    vision = {"timm_model_name": name, "image_size": 32, "timm_model_pretrained": False}
    whole = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": pictures}
    (opened / "open_clip_config.json").write_text(json.dumps(whole))
    assert timm.architecture(opened) == {key: described[key] for key in ("architecture", "pretrained_cfg")}
    tower = load_file(plain / "model.safetensors")
    theirs = {f"visual.trunk.{key}": tensor for key, tensor in tower.items()} | {"logit_scale": torch.zeros(())}
    save_file(theirs, opened / "open_clip_model.safetensors")
    found = timm._tensors(opened)
    assert found.keys() == tower.keys() and all(torch.equal(found[key], tower[key]) for key in tower)


@pytest.mark.parametrize("change", ["lacks", "extra", "shape"])
def test_a_file_with_other_tensors_is_refused(tmp_path: Path, change: str) -> None:
    path = folder(tmp_path / "tower", *TINY_EVA)
    tensors = load_file(path / "model.safetensors")
    if change == "lacks":
        del tensors["blocks.0.attn.proj.bias"]
    else:
        tensors["blocks.0.attn.proj.bias" if change == "shape" else "blocks.0.gamma_1"] = torch.zeros(3)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(DataError, match=r"blocks\.0\.(attn\.proj\.bias|gamma_1)"):
        load(path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    path = folder(tmp_path / "tower", *TINY_EVA)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load(path)


def test_another_architecture_of_timm_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = folder(tmp_path / "tower", *TINY_EVA)
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(described | {"architecture": "eva_giant_patch14_clip_225"}))
    with pytest.raises(ConfigError, match="did you mean 'eva_giant_patch14_clip_224'"):
        load(path)
    (path / "config.json").write_text(json.dumps(described | {"model_args": {"embed_dims": 32}}))
    with pytest.raises(ConfigError, match="embed_dims.*did you mean 'embed_dim'"):
        load(path)


@pytest.mark.parametrize(("name", "arguments"), [TINY_EVA, TINY_NFNET])
def test_an_outline_has_the_shapes_of_the_real_tower_and_no_weights(tmp_path: Path, name: str, arguments: dict) -> None:
    chosen = EncoderConfig(source=str(folder(tmp_path / "tower", name, arguments)))
    real = parts.load_encoder(chosen, torch.float32)
    with torch.device("meta"):
        outline = parts.empty_encoder(chosen, parts.encoder_architecture(chosen))
    assert (outline.tokens, outline.width, outline.grid) == (real.tokens, real.width, real.grid)
    assert {k: v.shape for k, v in outline.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize(
    ("name", "layer", "millions"),
    [
        ("eva_giant_patch14_clip_224", -2, 985.9),  # BLIP-2's tower: 39 blocks, no final norm
        ("eva02_enormous_patch14_clip_224", -2, 4280.8),
        ("dm_nfnet_f6", -1, 435.0),  # Flamingo's, as the paper counts it
    ],
)
def test_published_towers_count_what_was_published(name: str, layer: int, millions: float) -> None:
    with torch.device("meta"):
        tower = timm.empty(EncoderConfig(layer=layer), {"architecture": name}, {})
    assert sum(parameter.numel() for parameter in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_bits_hold_the_linears_of_eva_and_not_of_nfnet(tmp_path: Path) -> None:
    dense = load(folder(tmp_path / "eva", *TINY_EVA))
    packed = load(tmp_path / "eva", bits=8)
    pixels = torch.randn(2, 3, 32, 32)
    difference = packed(pixels).x_NSE - dense(pixels).x_NSE
    assert 0 < difference.abs().max() < 0.1 * dense(pixels).x_NSE.abs().max()
    assert packed.identity() != dense.identity()
    with pytest.raises(ConfigError, match="convolutions"):
        load(folder(tmp_path / "nfnet", *TINY_NFNET), bits=8)


def test_identity_names_all_that_features_depend_on(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "eva", *TINY_EVA), folder(tmp_path / "nfnet", *TINY_NFNET)
    changes = [{}, {"layer": -1}, {"taps": (1,)}, {"class_token": "keep"}, {"image_size": 48}, {"aspect": "crop"}]
    found = [load(one, **change).identity() for change in changes]
    found += [load(other, **change).identity() for change in ({}, {"layer": "stage1"}, {"image_size": 96})]
    assert len({json.dumps(identity, sort_keys=True) for identity in found}) == len(found)
    assert load(one).identity() == found[0]
    assert isinstance(load(one), eva.Eva) and isinstance(load(other), nfnet.NFNet)
