"""A directory holds exactly what it must, loads everywhere, and says what is wrong with it."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import composed
import isthmus
import tiny
from composed import MIX, stir
from isthmus import storage
from isthmus.aligners.llava import LLaVA
from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, LoRA, ObjectiveConfig, Recipe, Stage
from isthmus.exporting.peft import export_adapters
from isthmus.files import sha256
from isthmus.model import VLM, VLMConfig
from isthmus.processor import VLMProcessor
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import ConfigError, IsthmusError


@torch.no_grad()
def logits(model: VLM) -> torch.Tensor:
    output = model.run(model.processor.collator()(MIX))
    return output.head(output.hidden_BTD)


def own_parts(tmp_path: Path, **llm) -> Recipe:
    """A recipe over base parts of this test's own, free to be damaged."""
    return Recipe(
        encoder=EncoderConfig(source=str(tiny.vision_folder(tmp_path / "vision", "clip"))),
        llm=LLMConfig(source=str(tiny.llm_folder(tmp_path / "llm", "llama", **llm))),
        aligner=AlignerConfig(name="llava"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    stir(composed.model("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
def test_every_auto_class_loads_it(tmp_path, whole):
    model = stir(composed.model("qwen2"))
    model.save_pretrained(tmp_path, whole=whole)
    expected = logits(model)
    for load in (
        isthmus.load,
        VLM.from_pretrained,
        AutoModel.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
    ):
        again = load(tmp_path)
        assert type(again) is VLM and not again.training and torch.equal(logits(again), expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VLMConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VLMProcessor


def test_a_delta_holds_the_joint_alone_and_a_whole_everything(tmp_path):
    model = composed.model("llama")
    model.save_pretrained(tmp_path / "delta")
    model.save_pretrained(tmp_path / "whole", whole=True)
    delta, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("delta", "whole"))
    assert set(delta) == {name for name, _ in model.connectors.named_parameters(prefix="connectors")}
    tied = {"llm.lm_head.weight"}
    assert set(whole) == set(model.state_dict()) - tied, "of tied weights one name is stored"
    assert all(torch.equal(whole[key], tensor) for key, tensor in delta.items())


def test_a_whole_model_needs_no_base_parts(tmp_path):
    model = stir(isthmus.compose(own_parts(tmp_path)))
    model.save_pretrained(tmp_path / "whole", whole=True)
    expected = logits(model)
    shutil.rmtree(tmp_path / "llm")
    shutil.rmtree(tmp_path / "vision")
    assert torch.equal(logits(isthmus.load(tmp_path / "whole")), expected)


def test_saving_over_an_older_save_leaves_nothing_of_it(tmp_path):
    model = composed.model("llama")
    model.save_pretrained(tmp_path, whole=True)
    stir(model).save_pretrained(tmp_path)
    assert torch.equal(logits(isthmus.load(tmp_path)), logits(model))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]


def test_a_fingerprint_changes_with_the_weights_alone(tmp_path):
    model = composed.model()
    model.save_pretrained(tmp_path)
    first = storage.fingerprint(tmp_path)
    model.save_pretrained(tmp_path)
    assert storage.fingerprint(tmp_path) == first
    stir(model).save_pretrained(tmp_path)
    assert storage.fingerprint(tmp_path) != first


def test_a_loaded_model_is_saved_again_the_same(saved, tmp_path):
    isthmus.load(saved).save_pretrained(tmp_path)
    first, second = load_file(saved / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((saved / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
def test_dtype_is_that_of_the_base_and_the_joint_keeps_float32(tmp_path, whole):
    model = composed.model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, whole=whole)
    for asked, base in (("auto", torch.bfloat16), (torch.float32, torch.float32), ("float32", torch.float32)):
        again = isthmus.load(tmp_path, dtype=asked)
        assert {p.dtype for p in again.llm.parameters()} == {p.dtype for p in again.encoders.parameters()} == {base}
        assert {p.dtype for p in again.connectors.parameters()} == {torch.float32}
    assert torch.equal(logits(isthmus.load(tmp_path)), logits(model))


def test_progress_bars_of_transformers_stay_silent(saved, tmp_path, capfd):
    isthmus.load(saved).save_pretrained(tmp_path, whole=True)
    isthmus.load(tmp_path)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- what was trained


def train(model: VLM, **globs) -> None:
    """Choose as a stage does, then move what trains."""
    stage = Stage(name="sft", data=("none",), train=globs, budget=Budget(steps=1))
    with torch.no_grad():
        for each in choose(Step(model, [ObjectiveConfig(name="lm")]), stage):
            each.parameter.add_(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_parameters_that_were_trained_are_in_the_delta(tmp_path, dtype):
    model = composed.model("llama", dtype=dtype)
    train(model, **{"connectors.*": 1e-3, "llm.model.layers.1.*": 1e-4, "encoders.image.*layers.0.*": 1e-4})
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layers = [
        name
        for name in model.state_dict()
        if "llm.model.layers.1." in name or ".layers.0." in name and "encoders" in name
    ]
    assert set(stored) == {*layers, *(name for name in model.state_dict() if name.startswith("connectors."))}
    again = isthmus.load(tmp_path)
    assert all(
        torch.equal(again.state_dict()[key], tensor.to(again.state_dict()[key].dtype)) for key, tensor in stored.items()
    )
    if dtype == torch.float32:
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
def test_what_a_loop_of_ones_own_trains_is_saved(tmp_path, whole):
    """Without a stage that chose it: what differs from the base, and nothing else of it."""
    model = composed.model("llama")
    model.llm.model.layers[1].requires_grad_(True)
    with torch.no_grad():
        for parameter in model.llm.model.layers[1].parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "one", whole=whole)
    again = isthmus.load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model)) and again.config.whole is whole
    again.save_pretrained(tmp_path / "two", whole=False)
    assert torch.equal(logits(isthmus.load(tmp_path / "two")), logits(model))
    mine = {key for key in load_file(tmp_path / "two/model.safetensors") if storage.is_base(key)}
    assert mine == {key for key in model.state_dict() if key.startswith("llm.model.layers.1.")}


def test_what_requires_a_gradient_and_has_not_changed_is_not_in_the_delta(tmp_path):
    model = composed.model("llama")
    model.requires_grad_(True)
    model.save_pretrained(tmp_path)
    assert not any(map(storage.is_base, load_file(tmp_path / "model.safetensors")))


def test_a_whole_model_tells_what_a_loop_of_ones_own_trained(tmp_path):
    """Nothing compares it with its base, and peft's format could not hold it."""
    model = composed.model("llama")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "first")
    model.llm.model.norm.requires_grad_(True)
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert isthmus.load(tmp_path / "whole").config.trained == ["llm.model.norm.weight"]
    with pytest.raises(ConfigError, match="norm.weight was trained beside LoRA"):
        export_adapters(tmp_path / "whole", tmp_path / "adapters")


def test_a_whole_model_stays_whole_even_over_itself(tmp_path):
    model = composed.model("llama")
    with torch.no_grad():
        model.llm.model.layers[0].mlp.up_proj.weight.mul_(2)  # as nothing else knows it
    model.save_pretrained(tmp_path, whole=True)
    assert not model.config.whole, "a composed one is still referred to"
    isthmus.load(tmp_path).save_pretrained(tmp_path)
    assert torch.equal(logits(isthmus.load(tmp_path)), logits(model))


def test_a_whole_model_without_its_base_is_not_saved_without_it(tmp_path):
    isthmus.compose(own_parts(tmp_path)).save_pretrained(tmp_path / "whole", whole=True)
    model = isthmus.load(tmp_path / "whole")
    model.save_pretrained(tmp_path / "delta", whole=False)
    assert not any(map(storage.is_base, load_file(tmp_path / "delta/model.safetensors")))
    tiny.llm_folder(tmp_path / "llm", "llama", seed=1)
    with pytest.raises(IsthmusError, match="llm: the weights in .* are not those"):
        model.save_pretrained(tmp_path / "other", whole=False)
    assert not (tmp_path / "other").exists()


def test_merged_lora_is_saved_with_its_hosts(tmp_path):
    model = composed.model("llama")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "first")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "second")
    stir(model)
    paths = model.merge_lora("first")
    assert [adapter["name"] for adapter in model.config.lora] == ["second"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(isthmus.load(tmp_path)), logits(model))
    mine = {key for key in load_file(tmp_path / "model.safetensors") if storage.is_base(key)}
    assert mine == {f"{path}.weight" for path in paths}


def test_arguments_of_transformers_are_heeded_or_refused(saved, tmp_path):
    for load in (VLM.from_pretrained, AutoModel.from_pretrained):
        again = load(saved, torch_dtype="bfloat16", attn_implementation="eager", token=None, trust_remote_code=False)
        assert again.llm.dtype == torch.bfloat16 and again.llm.config._attn_implementation == "eager"
        for name, value in (("device_map", "auto"), ("load_in_4bit", True), ("dtyp", torch.bfloat16)):
            with pytest.raises(ConfigError, match=f"from_pretrained of this model does not take {name}"):
                load(saved, **{name: value})
    with pytest.raises(ConfigError, match="no dtype is named 'bf16'"):
        isthmus.load(saved, dtype="bf16")
    with pytest.raises(ConfigError, match="does not take push_to_hub"):
        again.save_pretrained(tmp_path / "out", push_to_hub=True)
    again.save_pretrained(tmp_path / "out", is_main_process=False, safe_serialization=True)
    assert not (tmp_path / "out").exists()
    gathered = {key: tensor + 1 for key, tensor in again.state_dict().items()}
    again.save_pretrained(tmp_path / "out", state_dict=gathered)
    written = load_file(tmp_path / "out/model.safetensors")
    assert written and all(torch.equal(tensor, gathered[key]) for key, tensor in written.items())
    with pytest.raises(ConfigError, match="state_dict lacks connectors"):
        again.save_pretrained(tmp_path / "out", state_dict={})


def test_lora_of_two_stages_survives(tmp_path):
    model = composed.model("llama")
    model.add_lora(["llm.*.q_proj"], LoRA(r=2), "first")
    model.add_lora(["llm.*.q_proj", "llm.*.down_proj"], LoRA(r=3, dora=True), "second")
    stir(model).save_pretrained(tmp_path)
    again = isthmus.load(tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.config.lora == model.config.lora
    assert not any(".q_proj.weight" in key for key in load_file(tmp_path / "model.safetensors"))


@isthmus.register
class Worded(LLaVA):
    """LLaVA with two new tokens around each picture."""

    name = "worded"

    def new_tokens(self):
        return ("<img>", "</img>")


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_new_tokens_survive_and_base_rows_stay(tmp_path, family):
    model = composed.model(family, "worded")
    assert model.vocabulary == tiny.VOCAB + 2 and model.placeholder("image") == tiny.VOCAB + 2
    stir(model).save_pretrained(tmp_path)
    again = isthmus.load(tmp_path)
    assert torch.equal(logits(again), logits(model)) and logits(again).shape[-1] == tiny.VOCAB + 2
    assert "llm." not in {key.partition(".grafts.")[0][:4] for key in load_file(tmp_path / "model.safetensors")} - {
        "llm."
    }


# ---------------------------------------------------------------------------------------------- refusals


def test_another_base_under_the_same_name_is_refused(tmp_path):
    isthmus.compose(own_parts(tmp_path)).save_pretrained(tmp_path / "out")
    before = json.loads((tmp_path / "out/config.json").read_text())["llm"]["weights"]
    tiny.llm_folder(tmp_path / "llm", "llama", seed=1)
    with pytest.raises(IsthmusError, match=f"llm: the weights in .* are not those .*[0-9a-f]{{16}} != {before}"):
        isthmus.load(tmp_path / "out")
    tiny.llm_folder(tmp_path / "llm", "llama")
    tiny.vision_folder(tmp_path / "vision", "clip", seed=1)
    with pytest.raises(IsthmusError, match="image encoder: the weights"):
        isthmus.load(tmp_path / "out")


def test_a_base_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    isthmus.compose(own_parts(tmp_path)).save_pretrained(tmp_path / "out")
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'llm'}.*neither a folder"):
        isthmus.load(tmp_path / "out")


def rewrite(folder: Path, change) -> None:
    """Change the tensors, with a manifest to match."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    (folder / storage.MANIFEST).write_text(json.dumps({file.name: sha256(file)}))


KEY = "connectors.image.layers.0.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop(KEY), f"missing {KEY}"),
        (lambda state: state.update(stray=torch.zeros(1)), "unexpected stray"),
        (lambda state: state.update({KEY: torch.zeros(2, 3)}), rf"{KEY} is \(2, 3\), not \(32, 32\)"),
        (lambda state: state.clear(), "missing connectors.image.layers.0.bias; .*"),
    ],
    ids=["missing", "unexpected", "shape", "empty"],
)
def test_keys_that_do_not_fit_are_named(copy, change, reason):
    rewrite(copy, change)
    with pytest.raises(IsthmusError, match=reason):
        isthmus.load(copy)


def test_a_damaged_file_is_named(copy):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(IsthmusError, match=f"{file}: damaged"):
        isthmus.load(copy)
    file.write_bytes(content[:40])
    (copy / storage.MANIFEST).unlink()
    with pytest.raises(IsthmusError, match=f"{file}: cannot be read"):
        isthmus.load(copy)
    file.unlink()
    with pytest.raises(IsthmusError, match="no safetensors weights"):
        isthmus.load(copy)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_a_damaged_json_is_named(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(IsthmusError, match=f"{copy / name}"):
        isthmus.load(copy)


PROCESSOR = ["processor_config.json", "tokenizer_config.json", "tokenizer.json"]


@pytest.mark.parametrize("content", ["{", "", "[1]", None], ids=["cut", "empty", "list", "missing"])
@pytest.mark.parametrize("name", [*PROCESSOR, "generation_config.json"])
def test_what_else_a_directory_holds_is_named_too(copy, name, content):
    file = copy / name
    file.unlink() if content is None else file.write_text(content)
    if content is None and name == "generation_config.json":
        assert isthmus.load(copy), "a model may have none"
        return
    for load in (isthmus.load, VLMProcessor.from_pretrained) if name in PROCESSOR else (isthmus.load,):
        with pytest.raises(IsthmusError) as told:
            load(copy)
        assert told.value.cause == f"{file}: " + ("missing" if content is None else "damaged (not a JSON object)")
        assert told.value.remedy and "\n" not in told.value.remedy


@pytest.mark.parametrize("name", PROCESSOR[::2])
def test_a_processor_of_other_content_is_no_traceback(copy, name):
    (copy / name).write_text("{}")
    with pytest.raises(IsthmusError, match=f"{copy}: its processor cannot be read") as told:
        isthmus.load(copy)
    assert "\n" not in told.value.cause


@pytest.mark.parametrize("lost", ["aligner.name", "llm.config", "encoders", "text_config"])
def test_a_config_that_lacks_a_part_is_named(copy, lost):
    file = copy / "config.json"
    tree = json.loads(file.read_text())
    owner, _, name = lost.rpartition(".")
    del (tree[owner] if owner else tree)[name]
    file.write_text(json.dumps(tree))
    for load in (isthmus.load, AutoModel.from_pretrained):
        with pytest.raises(IsthmusError) as told:
            load(copy)
        assert told.value.cause == f"{file}: damaged (no {lost})"


def test_a_file_that_the_manifest_lists_must_be_there(copy):
    hashes = json.loads((copy / storage.MANIFEST).read_text())
    (copy / storage.MANIFEST).write_text(json.dumps(hashes | {"model-2.safetensors": "00"}))
    with pytest.raises(IsthmusError, match="model-2.safetensors: missing"):
        isthmus.load(copy)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(IsthmusError, match="no config.json"):
        isthmus.load(tmp_path)
    (tmp_path / "run" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "model" / "config.json").write_text("{}")
    with pytest.raises(IsthmusError) as told:
        isthmus.load(tmp_path / "run")
    assert told.value.remedy == f"name a model below it: {tmp_path / 'run' / 'sft' / 'model'}"


def test_a_folder_of_another_kind_of_model_is_refused():
    with pytest.raises(IsthmusError, match="is a llama"):
        isthmus.load(composed.llm_folder("llama"))


def test_an_interrupted_or_failed_save_keeps_the_older_one(copy, monkeypatch):
    model = isthmus.load(copy)
    expected = logits(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    stir(model)
    monkeypatch.setattr(storage, "save_torch_state_dict", full)
    with pytest.raises(IsthmusError, match="No space left on device"):
        model.save_pretrained(copy)
    assert torch.equal(logits(isthmus.load(copy)), expected)


def test_what_a_killed_save_left_behind_goes_with_the_next(copy):
    stray = copy / ".saving-1234"
    stray.mkdir()
    (stray / "model.safetensors").write_bytes(b"half")
    model = isthmus.load(copy)
    model.save_pretrained(copy)
    assert not stray.exists()
    assert torch.equal(logits(isthmus.load(copy)), logits(model))


def test_a_disk_that_fills_up_keeps_the_older_save(copy):
    """A real limit on file sizes, since writers in Rust raise errors of their own."""
    model = stir(isthmus.load(copy))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for file in ("model.safetensors", "tokenizer.json"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[file]) - 1, limits[1]))
            with pytest.raises(IsthmusError, match="cannot be written.*File too large"):
                model.save_pretrained(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("wrong", [{"temperature": 0.2}, {"num_beams": 2, "num_return_sequences": 3}])
def test_generation_settings_that_transformers_refuses_are_not_taken_for_a_full_disk(tmp_path, wrong):
    model = composed.model("llama")
    for name, value in wrong.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError) as told:
        model.save_pretrained(tmp_path / "out")
    assert list(wrong)[-1] in told.value.cause and "\n" not in told.value.cause
    assert "generation_config" in told.value.remedy and "space" not in told.value.remedy
    assert not (tmp_path / "out").exists()
    model.generation_config.update(do_sample=True, num_return_sequences=1)
    model.save_pretrained(tmp_path / "out")
    assert isthmus.load(tmp_path / "out").generation_config.do_sample


def test_generation_settings_that_came_so_are_saved_as_they_came(copy, tmp_path):
    """Published ones often have a temperature without sampling."""
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.2}))
    isthmus.load(copy).save_pretrained(tmp_path / "out")
    assert isthmus.load(tmp_path / "out").generation_config.temperature == 0.2


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("no such argument")

    monkeypatch.setattr(storage, "save_torch_state_dict", fails)
    with pytest.raises(TypeError, match="no such argument"):
        composed.model("llama").save_pretrained(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IsthmusError, match="cannot be written"):
        composed.model("llama").save_pretrained(tmp_path / "file")
