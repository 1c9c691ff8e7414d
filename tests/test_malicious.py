"""Directories made to harm: all are refused or harmless, and a canary file that each tries to write never appears."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

import composed
import isthmus
import tiny
from composed import picture
from isthmus import parts
from isthmus.config import read
from isthmus.torchfile import read_tensors
from isthmus.types import ConfigError, IsthmusError, Sample, Turn
from malicious import FILES, GADGETS, LIVE, SAFETENSORS, TEMPLATES, YAMLS, gadget, poison


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A path that must not exist at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    composed.model("llama").save_pretrained(folder, whole=True)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A whole model with no manifest, which an attacker would write anew."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    return folder


@pytest.mark.parametrize("name", LIVE)
def test_the_gadgets_are_live(name: str, tmp_path: Path) -> None:
    harmless = tmp_path / "harmless"
    pickle.loads(gadget(name, harmless))  # noqa: S301 - in the test alone, to prove that the payloads work
    assert harmless.exists()


@pytest.mark.parametrize("name", GADGETS)
def test_pickles_are_never_loaded(name: str, copy: Path, canary: Path) -> None:
    evil = gadget(name, canary)
    weights = copy / "model.safetensors"
    weights.write_bytes(evil)  # a pickle under a name that is trusted
    with pytest.raises(IsthmusError, match="cannot be read"):
        isthmus.load(copy)
    weights.unlink()
    for ending in ("pytorch_model.bin", "model.pt", "model.pt2", "model.ckpt", "model.pth"):
        (copy / ending).write_bytes(evil)
    with pytest.raises(IsthmusError, match="no safetensors weights"):
        isthmus.load(copy)
    with pytest.raises(IsthmusError, match="not a plain legacy state dict"):
        read_tensors(copy / "model.pt")


@pytest.mark.parametrize("name", ["os.system", "eval", "torch.load"])
@pytest.mark.parametrize("part", ["llm", "vision"])
def test_base_parts_of_pickles_are_refused(name: str, part: str, tmp_path: Path, canary: Path) -> None:
    folder = tiny.llm_folder(tmp_path / "part") if part == "llm" else tiny.vision_folder(tmp_path / "part")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(gadget(name, canary))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = composed.recipe().but(**{"llm" if part == "llm" else "encoder": {"source": str(folder)}})
    with pytest.raises(ConfigError, match="leads to 'pytorch_model.bin'"):
        isthmus.compose(recipe)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(Exception, match="safetensors"):
        isthmus.compose(recipe)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "x/model.safetensors", "a.bin", 7])
def test_an_index_leads_nowhere_else(shard: object, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="leads to|damaged"):
        parts.folder(str(tmp_path))


# ---------------------------------------------------------------------------------------------- code by name


@pytest.mark.parametrize("file", FILES)
def test_code_beside_a_model_is_not_run(file: str, copy: Path, canary: Path) -> None:
    poison(copy, file, canary)
    if file == "tokenizer_config.json":
        tree = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(tree | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    isthmus.load(copy)
    AutoProcessor.from_pretrained(copy, trust_remote_code=False)


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_an_architecture_that_only_its_own_code_knows_is_refused(part: str, tmp_path: Path, canary: Path) -> None:
    folder = tiny.llm_folder(tmp_path / "part") if part == "llm" else tiny.vision_folder(tmp_path / "part")
    poison(folder, "config.json", canary, model_type="evil")
    recipe = composed.recipe().but(**{"llm" if part == "llm" else "encoder": {"source": str(folder)}})
    with pytest.raises((IsthmusError, ValueError), match=r"evil|trust_remote_code|custom code"):
        isthmus.compose(recipe)


@pytest.mark.parametrize("joint", ["os", "subprocess.call", "../../evil", "evil", "/tmp/evil.py"])
def test_a_joint_is_a_known_name_and_no_import_path(joint: str, copy: Path, canary: Path) -> None:
    (copy / "evil.py").write_text(f"__import__('pathlib').Path({str(canary)!r}).touch()\n")
    tree = json.loads((copy / "config.json").read_text())
    tree["aligner"]["name"] = joint
    (copy / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError):
        isthmus.load(copy)


# ---------------------------------------------------------------------------------------------- text that computes


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_cannot_leave_its_sandbox(name: str, copy: Path, canary: Path) -> None:
    evil = TEMPLATES[name].replace("CANARY", str(canary))
    (copy / "chat_template.jinja").write_text(evil)
    model = isthmus.load(copy)
    assert model.processor.tokenizer.chat_template == evil
    with pytest.raises(Exception, match=r"(?i)unsafe|no loader|refuses|template|undefined|attribute"):
        model.processor.prompts([Sample((Turn.say("user", picture(1), "hi"),))])


@pytest.mark.parametrize("name", YAMLS)
def test_a_recipe_makes_no_objects(name: str, tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(YAMLS[name].replace("CANARY", str(canary)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(file)


# ---------------------------------------------------------------------------------------------- damaged tensors


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damaged_tensors_are_refused_by_their_file(name: str, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(SAFETENSORS[name]())
    with pytest.raises(IsthmusError, match="cannot be read") as refused:
        isthmus.load(copy)
    assert str(copy) in refused.value.cause
