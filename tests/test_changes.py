"""A directory that refers to its base holds whatever differs from it, however it was changed, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import composed
import isthmus
import tiny
from composed import MIX, stir
from isthmus import changes, parts, storage
from isthmus.aligners.llava import LLaVA
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, Recipe
from isthmus.model import VLM
from isthmus.types import ConfigError, IsthmusError
from test_storage import Worded


@torch.no_grad()
def logits(model: VLM) -> torch.Tensor:
    output = model.eval().run(model.processor.collator()(MIX))
    return output.head(output.hidden_BTD)


def base_keys(folder: Path) -> set[str]:
    """The base's tensors that a directory holds of its own, by what the file says."""
    return {key for key in load_file(folder / "model.safetensors") if storage.is_base(key)}


def reloaded(model: VLM, folder: Path) -> set[str]:
    """Saved and loaded again it computes the same; the base's tensors that this took."""
    expected, config = logits(model), model.config.to_dict()
    model.save_pretrained(folder)
    assert torch.equal(logits(isthmus.load(folder)), expected)
    assert model.config.to_dict()["trained"] == config["trained"], "the model in memory is left as it was"
    return base_keys(folder)


# ---------------------------------------------------------------------------------------------- what changed is stored


@pytest.mark.parametrize("key", ["llm.model.layers.1.mlp.down_proj.weight", "encoders.image.tower.post_layernorm.bias"])
@pytest.mark.parametrize("how", ["in place", "behind autograd's back", "as another tensor"])
def test_a_weight_that_was_changed_by_hand_is_stored(tmp_path, key, how):
    """As task vectors and merges do it: nothing ever required a gradient."""
    model = composed.model("llama")
    weight = model.get_parameter(key)
    if how == "in place":
        with torch.no_grad():
            weight.add_(0.1)
    elif how == "behind autograd's back":
        weight.data[..., -1] += 1e-6 + weight.data[..., -1].abs() * 1e-3  # and a few numbers of it alone
    else:
        owner, _, name = key.rpartition(".")
        setattr(model.get_submodule(owner), name, torch.nn.Parameter(weight.detach() + 0.1, requires_grad=False))
    assert not any(each.requires_grad for each in (*model.llm.parameters(), *model.encoders.parameters()))
    assert reloaded(model, tmp_path) == {key}
    found = load_file(tmp_path / "model.safetensors")[key]
    assert torch.equal(found, model.get_parameter(key))


def test_a_fine_tuning_that_was_frozen_before_the_save_is_stored(tmp_path):
    model = composed.model("llama")
    model.llm.requires_grad_(True)
    inputs = model.processor(images=composed.picture(1).source, text="<image>hello")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.llm.parameters(), 0.1).step()
    model.requires_grad_(False)
    moved = {f"llm.{name}" for name, each in model.llm.named_parameters() if each.grad is not None}
    assert reloaded(model, tmp_path) == moved and len(moved) > 10


def test_an_adapter_of_peft_that_was_merged_is_stored(tmp_path):
    peft = pytest.importorskip("peft")
    model = composed.model("llama")
    before = logits(model)
    how = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    merged = peft.get_peft_model(model, how).merge_and_unload()
    assert merged is model and not torch.equal(logits(model), before)
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in reloaded(model, tmp_path)} == {"q_proj", "v_proj"}


def test_a_whole_model_that_changed_is_true_as_a_delta_too(tmp_path):
    composed.model("llama").save_pretrained(tmp_path / "whole", whole=True)
    model = isthmus.load(tmp_path / "whole")
    with torch.no_grad():
        model.llm.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "delta", whole=False)
    assert torch.equal(logits(isthmus.load(tmp_path / "delta")), logits(model))
    assert base_keys(tmp_path / "delta") == {"llm.model.norm.weight"}


def test_tensors_that_were_gathered_elsewhere_are_those_that_are_compared(tmp_path):
    model = composed.model("llama")
    key = "llm.model.layers.0.mlp.up_proj.weight"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[key] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    assert base_keys(tmp_path) == {key}
    assert torch.equal(isthmus.load(tmp_path).get_parameter(key), state[key])


# ---------------------------------------------------------------------------------------------- no false alarms


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "glm", "gemma2", "t5", "bart", "gpt_oss"])
def test_an_untouched_base_is_referred_to_in_every_family(tmp_path, family):
    joint = "llava" if family == "gpt_oss" else Worded.name  # new tokens lengthen BART's bias, tied heads and all
    model = stir(composed.model(family, joint))
    assert reloaded(model, tmp_path / "delta") == set()
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert torch.equal(logits(isthmus.load(tmp_path / "whole")), logits(model))


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "vit"])
def test_an_untouched_encoder_is_referred_to(tmp_path, vision):
    assert reloaded(stir(composed.model("llama", vision=vision)), tmp_path) == set()


WENT = [("bfloat16",), ("float16",), ("bfloat16", "float32"), ("float32", "bfloat16")]
WENT += [("bfloat16", "float16"), ("float16", "bfloat16")]


@pytest.mark.parametrize("went", WENT)
def test_rounding_is_no_change(tmp_path, went):
    """A base of float32 that runs, or was loaded, in fewer bits."""
    first, *then = (getattr(torch, name) for name in went)
    model = composed.model("llama", dtype=first)
    for dtype in then:
        model.to(dtype)
    model.save_pretrained(tmp_path)
    assert base_keys(tmp_path) == set()


def test_a_change_is_seen_in_half_precision_too(tmp_path):
    model = composed.model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.llm.model.layers[0].mlp.up_proj.weight[3, 4] += 1
    assert reloaded(model, tmp_path) == {"llm.model.layers.0.mlp.up_proj.weight"}


def test_a_change_is_seen_after_two_roundings_too(tmp_path):
    model = composed.model("llama", dtype=torch.bfloat16).half()
    key = "llm.model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(key)[3, 4] *= 1 + 2**-9
    model.save_pretrained(tmp_path)
    assert base_keys(tmp_path) == {key}


def test_a_base_is_read_once_where_rounding_cannot_be_what_changed_it(tmp_path, monkeypatch):
    """In float32 it may be twice the model."""
    model, asked, load = composed.model("llama", dtype=torch.bfloat16), [], parts.load_llm
    monkeypatch.setattr(parts, "load_llm", lambda config, dtype: asked.append(dtype) or load(config, dtype))
    with torch.no_grad():
        model.llm.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert asked == [torch.bfloat16] and base_keys(tmp_path) == {"llm.model.layers.0.mlp.up_proj.weight"}


def test_a_base_in_shards_is_compared_over_all_of_them(tmp_path):
    folder = tiny.llm_folder(tmp_path / "llm", "qwen2")
    state, index = load_file(folder / "model.safetensors"), {}
    for number, key in enumerate(sorted(state)):
        save_file({key: state[key]}, folder / f"model-{number}.safetensors", {"format": "pt"})
        index[key] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()
    recipe = Recipe(
        encoder=EncoderConfig(source=str(composed.vision_folder("clip"))),
        llm=LLMConfig(source=str(folder)),
        aligner=AlignerConfig(name="llava"),
    )
    model = isthmus.compose(recipe)
    assert reloaded(model, tmp_path / "one") == set()
    with torch.no_grad():
        model.llm.lm_head.weight.mul_(2)
    assert reloaded(model, tmp_path / "two") == {"llm.lm_head.weight"}


def test_saving_draws_no_random_numbers(tmp_path):
    model = composed.model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------------------------------- what cannot be stored


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
@pytest.mark.parametrize("call", ["add_adapter", "get_peft_model"])
def test_an_adapter_of_another_library_is_refused_before_anything_is_written(tmp_path, call, whole):
    peft = pytest.importorskip("peft")
    model = composed.model("llama")
    how = peft.LoraConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(model, how) if call == "get_peft_model" else model.add_adapter(how)
    before = model.config.to_dict()
    with pytest.raises(
        ConfigError, match="other code has put .*q_proj.base_layer.weight and .* more into the model"
    ) as told:
        model.save_pretrained(tmp_path / "out", whole=whole)
    assert "merge_and_unload" in told.value.remedy and "isthmus import" in told.value.remedy
    assert not (tmp_path / "out").exists() and model.config.to_dict() == before


def test_an_adapter_on_the_joint_is_refused_too(tmp_path):
    peft = pytest.importorskip("peft")
    model = composed.model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layers.0"], r=2), model.connectors)
    with pytest.raises(ConfigError, match=r"connectors\.image\.layers\.0\.base_layer"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_were_taken_out_are_refused_unless_the_model_is_whole(tmp_path):
    model = composed.model("llama")
    model.llm.model.layers = model.llm.model.layers[:2]
    model.llm.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match=r"the model no longer has llm\.model\.layers\.2\..* and 8 more") as told:
        model.save_pretrained(tmp_path / "out")
    assert "whole=True" in told.value.remedy
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert torch.equal(logits(isthmus.load(tmp_path / "whole")), logits(model))


def test_layers_of_which_the_config_still_tells_are_refused_with_a_remedy_of_their_own(tmp_path):
    model = composed.model("llama")
    model.llm.model.layers = model.llm.model.layers[:-1]
    with pytest.raises(ConfigError, match="the model no longer has") as told:
        model.save_pretrained(tmp_path / "out", whole=True)
    assert "num_hidden_layers" in told.value.remedy and "whole" not in told.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_single_tensor_is_named_alone(tmp_path):
    model = composed.model("llama")
    del model.llm.model.norm.weight
    with pytest.raises(ConfigError) as told:
        model.save_pretrained(tmp_path / "out")
    assert told.value.cause == "the model no longer has llm.model.norm.weight"


def test_another_size_is_refused(tmp_path):
    model = composed.model("qwen2")
    model.llm.resize_token_embeddings(400)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is \(400, 32\), and loading would make it \(320, 32\)"):
        model.save_pretrained(tmp_path / "out")


def test_a_head_that_was_untied_and_trained_is_refused(tmp_path):
    model = composed.model("llama")
    model.llm.lm_head.weight = torch.nn.Parameter(model.llm.lm_head.weight.detach().clone(), requires_grad=False)
    assert reloaded(model, tmp_path / "equal") == set(), "untied, but the same"
    with pytest.raises(ConfigError, match="lm_head.weight is tied to another tensor .* in its config"):
        model.save_pretrained(tmp_path / "out", whole=True)
    with torch.no_grad():
        model.llm.lm_head.weight.add_(1)
    with pytest.raises(
        ConfigError, match=r"lm_head.weight has changed, and is tied to llm\.model\.embed_.* in its base"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_since_is_named(tmp_path):
    recipe = composed.recipe("llama").but(llm=LLMConfig(source=str(tiny.llm_folder(tmp_path / "llm", "llama"))))
    model = isthmus.compose(recipe)
    tiny.llm_folder(tmp_path / "llm", "llama", seed=1)
    with pytest.raises(IsthmusError, match="llm: the weights in .* are not those"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", whole=True)


@isthmus.register
class Reckoning(LLaVA):
    """LLaVA whose connector looks at a number while it is built, which the meta device has none of."""

    name = "reckoning"

    def connector(self, kind, encoder, width):
        assert torch.linspace(0, 1, 3).sum().item() == 1.5
        return super().connector(kind, encoder, width)


@isthmus.register
class Refusing(LLaVA):
    """LLaVA whose connector turns what the meta device lacks into an error of its own."""

    name = "refusing"

    def connector(self, kind, encoder, width):
        if torch.empty(1).is_meta:
            raise ConfigError("no numbers here", "build it on the CPU")
        return super().connector(kind, encoder, width)


@pytest.mark.parametrize("joint", [Reckoning, Refusing])
def test_a_joint_that_reckons_while_it_is_built_is_saved_too(tmp_path, joint):
    model = stir(composed.model("llama", joint.name))
    assert reloaded(model, tmp_path) == set()


def test_the_outline_is_what_loading_builds(tmp_path):
    """Names and shapes, for a joint with grafts, new tokens and LoRA in it."""
    model = composed.model("llama", Worded.name)
    model.add_lora(["llm.*.q_proj"], isthmus.config.LoRA(r=2), "first")
    model.save_pretrained(tmp_path)
    again = {key: tensor.shape for key, tensor in isthmus.load(tmp_path).state_dict().items()}
    for whole in (False, True):
        found = changes.outline(model, whole)
        assert {key: tensor.shape for key, tensor in found.state_dict().items()} == again
        assert all(each.is_meta for each in found.state_dict().values())
