"""Encoder and joint in ONNX: onnxruntime computes what the model does, for any number of pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from typer.testing import CliRunner

import composed
import test_contract
from composed import picture, stir
from isthmus import aligner as aligners
from isthmus import exporting
from isthmus.cli.app import app
from isthmus.config import LoRA
from isthmus.exporting import onnx
from isthmus.model import VLM
from isthmus.types import ConfigError, IsthmusError, Sample, Turn

onnxruntime: Any = pytest.importorskip("onnxruntime")
OWL = {"queries": 3, "depth": 1, "heads": 4, "inner": 8}
SMALL = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "contrast": 8}


def run(folder: Path, pixels: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / onnx.FILE, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {"pixels": pixels.numpy()})
    return vectors


def connected(model: VLM, pixels: torch.Tensor) -> np.ndarray:
    """What the whole model puts in place of pictures, by its own way through a batch."""
    ids = torch.full((len(pixels), model.queries("image")), model.placeholder("image"))
    with torch.no_grad():
        return model.connect(model.as_batch(ids, None, pixels))["image"].numpy()


@pytest.mark.parametrize(
    "built",
    [
        ("llama", "llava"),
        pytest.param(("llama", "blip2", SMALL), marks=pytest.mark.slow),
        pytest.param(("llama", "mplug_owl", OWL), marks=pytest.mark.slow),
        pytest.param(("llama", "qwen_vl", {"side": 2, "heads": 4}), marks=pytest.mark.slow),
    ],
    ids=["llava", "blip2", "mplug_owl", "qwen_vl"],
)
def test_onnxruntime_computes_the_models_vectors(
    tmp_path: Path, built: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = composed.model(*built)
    model.add_lora(["encoders.*layers.*.fc1"], LoRA(r=2), "sight")
    stir(model).save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as warned:
        result = CliRunner().invoke(
            app, ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "onnx"], catch_exceptions=False
        )
    assert not warned and "torchvision is not installed" not in caplog.text
    assert "encoder and joint, largest difference" in result.output
    for number in (1, 2, 5):
        pixels = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        np.testing.assert_allclose(run(tmp_path / "out", pixels), connected(model, pixels), atol=1e-4, rtol=1e-4)
    pixels, _ = model.processor.look("image", [picture(1), picture(2)])
    one, other = run(tmp_path / "out", pixels)
    assert np.abs(one - other).max() > 1e-2
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: onnx" in card and "largest difference of vectors" in card
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil").do_pad


@pytest.mark.parametrize(
    ("built", "reason"),
    [(("llama", "instructblip", SMALL), "reads the question"), (("llama", "flamingo"), "inside the LLM's layers")],
    ids=["instructblip", "flamingo"],
)
def test_what_does_not_stand_alone_is_refused(tmp_path: Path, built: tuple[Any, ...], reason: str) -> None:
    options = {key: value for key, value in (built[2] if len(built) > 2 else {}).items() if key != "contrast"}
    composed.model(built[0], built[1], options).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=reason):
        onnx.export(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


ASKED = (Sample((Turn.say("user", picture(1), "what is it?"),)),)


@torch.no_grad()
def takes_vectors_alone(model: VLM, family: str) -> bool:
    """Whether the bare LLM, given a prompt with the joint's vectors in it, has the states that the model has."""
    batch = model.processor.prompts(ASKED)
    given = model.embed(batch, model.connect(batch))
    bare = test_contract.bare_llm(family).base_model(inputs_embeds=given).last_hidden_state
    return torch.allclose(bare, model.run(batch).hidden_BTD, atol=1e-4)


@pytest.mark.parametrize(
    "joint", [name for name, each in test_contract.JOINTS.items() if each.aligner in aligners.known()]
)
def test_exactly_the_joints_that_work_outside_of_the_llm_are_taken(joint: str) -> None:
    family = next(each for each in test_contract.JOINTS[joint].families if each in ("llama", "qwen2"))
    model = test_contract.grown(joint, family)
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "sft")  # merged on the way, whatever the joint
    try:
        onnx._require_fit(model)
        taken = True
    except ConfigError:
        taken = False
    assert taken == (takes_vectors_alone(model, family) and not model.connectors["image"].reads_context)


def test_several_encoders_are_refused(tmp_path: Path) -> None:
    folder = composed.vision_folder("siglip")
    composed.model("llama", also=({"source": str(folder)},)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="several encoders see its picture"):
        onnx.export(tmp_path / "ours", tmp_path / "out")


@pytest.mark.slow
def test_a_graph_for_one_number_of_pictures_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stir(composed.model("llama")).save_pretrained(tmp_path / "ours")
    sight = onnx.Sight.forward
    monkeypatch.setattr(
        onnx.Sight,
        "forward",
        lambda self, pixels: sight(self, pixels) * torch.ones(len(pixels), 1, 1),  # `len` fixes the number
    )
    with pytest.raises(IsthmusError, match=r"one number of pictures alone\n.*x\.shape\[0\]"):
        onnx.export(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", onnx.PROBE)
def test_one_vector_that_is_no_number_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    model = stir(composed.model("llama"))
    model.save_pretrained(tmp_path / "ours")

    def run(file: Path, pixels: torch.Tensor) -> torch.Tensor:
        vectors = torch.from_numpy(connected(model, pixels))
        return vectors.where(torch.tensor(len(pixels) != broken), torch.nan)

    monkeypatch.setattr(onnx, "_write", lambda sight, pixels, file: None)
    monkeypatch.setattr(onnx, "_run", run)
    with pytest.raises(IsthmusError, match="vectors differ by nan"):
        onnx.export(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_when_vectors_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stir(composed.model("llama")).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(IsthmusError, match="vectors differ by"):
        onnx.export(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
