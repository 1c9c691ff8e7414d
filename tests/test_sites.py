"""Sites are compared with what each family's own code calls by name, and the head with the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus import sites
from isthmus.graft import Graft, graft
from isthmus.types import ConfigError
from tiny import DECODERS, LLMS, MORE_DECODERS, VISION, WIDTH, llm, vision

IDS = torch.arange(20, 36).reshape(2, 8)
STACKS = {"opt": "model.decoder.layers", "t5": "decoder.block", "clip": "encoder.layers", "siglip": "encoder.layers"}
STACKS |= {"dinov2": "encoder.layer", "vit": "layers", "flan-t5": "decoder.block"}
SCALED: dict[str, dict] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "hyperclovax": {"logits_scaling": 2.0},  # multiplies where granite divides
    "mixtral": {"num_local_experts": 2},  # reads router logits of its stack's output
}


def logits_and_states(model, **kwargs):
    """The model's own logits, and the states behind its last norm as an independent hook saw them go into the head."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True, use_cache=False, **kwargs)
    states = output.decoder_hidden_states if model.config.is_encoder_decoder else output.hidden_states
    return output.logits, states[-1]


@pytest.mark.parametrize("family", LLMS)
def test_words_are_what_the_first_layer_reads(family):
    model = llm(family)
    torch.testing.assert_close(sites.words(model)[IDS], sites.embedding(model)(IDS))


@pytest.mark.parametrize("family", LLMS)
def test_head_equals_the_models_own_logits(family):
    model = llm(family)
    logits, states = logits_and_states(model)
    assert torch.equal(sites.head(model)(states), logits)
    torch.testing.assert_close(sites.head(model)(states[:, 2]), logits[:, 2])  # chosen positions [B, D]
    torch.testing.assert_close(sites.head(model)(states[0, 3]), logits[0, 3])  # one state [D]


@pytest.mark.parametrize("family", SCALED)
def test_head_keeps_scale_and_softcap(family):
    sizes: dict[str, int] = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model(family, eos_token_id=2, **sizes, **SCALED[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    logits, states = logits_and_states(model)
    assert torch.equal(sites.head(model)(states), logits)
    if family != "mixtral":
        assert not torch.allclose(model.lm_head(states), logits)  # the bare head would be wrong


def test_head_scales_t5_and_projects_out_opt():
    t5 = llm("t5")
    logits, states = logits_and_states(t5)
    assert not torch.allclose(t5.lm_head(states), logits, atol=1e-2)
    opt = llm("opt", word_embed_proj_dim=16)
    logits, states = logits_and_states(opt)
    assert states.shape[-1] == 16 and torch.equal(sites.head(opt)(states), logits)


def test_head_passes_gradients_and_grafts():
    class Shift(Graft):
        def forward(self, host, base, x, *args, side, **kw):
            return base(x, *args, **kw) + 1

    model = llm("llama")
    states = torch.randn(5, WIDTH, requires_grad=True)
    logits = sites.head(model)(states)
    logits.sum().backward()
    torch.testing.assert_close(states.grad, model.lm_head.weight.sum(0).expand(5, -1))
    graft(model, "lm_head", "shift", Shift())
    torch.testing.assert_close(sites.head(model)(states), logits + 1)


@pytest.mark.parametrize("family", [*LLMS, *VISION])
def test_layers_attention_and_linears(family):
    model = llm(family) if family in LLMS else vision(family)
    path, modules = sites.layers(model)
    assert path == STACKS.get(family, "model.layers")
    assert model.get_submodule(path) is modules and len(modules) == 3
    attention = sites.attention(modules[1])
    projections = [name for name in sites.linears(attention) if name[0] in "qkv"]
    assert len(projections) == (1 if family == "phi3" else 3) and attention in modules[1].modules()
    every = {name for name, module in modules[1].named_modules() if type(module) is nn.Linear}
    assert set(sites.linears(modules[1])) == every
    assert sites.enclosing(model, f"{path}.1") == f"{path}.1"
    name = next(name for name, module in model.named_modules() if module is attention)
    assert sites.enclosing(model, f"{name}.{projections[0]}") == f"{path}.1"
    assert sites.enclosing(model, path) is None


def test_the_feed_forward_part_is_t5s_sublayer_or_the_norm_before_it():
    assert sites.feed(sites.layers(llm("t5"), "encoder").modules[0]) == ("layer.1", True)
    assert sites.feed(sites.layers(llm("llama")).modules[0]) == ("post_attention_layernorm", False)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bitnet", **shape, num_attention_heads=2, num_key_value_heads=2)
    layer = sites.layers(AutoModelForCausalLM.from_config(config)).modules[0]  # its MLP has a norm inside
    assert sites.feed(layer) == ("post_attention_layernorm", False)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gemma2", "afmoe"])
@torch.no_grad()
def test_the_norm_that_is_found_is_the_one_that_the_feed_forward_hears(family):
    model = llm(family)
    layer: Any = sites.layers(model).modules[1]
    said, heard = [], []
    layer.get_submodule(sites.feed(layer).path).register_forward_hook(lambda module, args, out: said.append(out))
    reader = layer.fc1 if family == "opt" else layer.mlp
    reader.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    model(IDS)
    assert torch.equal(said[0].flatten(), heard[0].flatten())


def test_the_two_stacks_of_an_encoder_decoder():
    model = llm("t5")
    assert sites.layers(model, "encoder").modules is model.encoder.block
    assert sites.layers(model).modules is model.decoder.block
    assert sites.norm(model) is model.decoder.final_layer_norm
    assert sites.norm(model, "encoder") is model.encoder.final_layer_norm
    block: Any = model.decoder.block[0]
    assert sites.attention(block) is block.layer[0].SelfAttention


def test_mlp_or_the_reason_why_not():
    for family in (*DECODERS, *MORE_DECODERS, *VISION):
        layer = sites.layers(llm(family) if family in LLMS else vision(family)).modules[0]
        if family == "opt":
            with pytest.raises(ConfigError, match=r"feed-forward Linears on the layer itself\nchoose \['fc1', 'fc2'\]"):
                sites.mlp(layer)
        else:
            assert sites.mlp(layer) is layer.mlp
    block: Any = llm("t5").decoder.block[0]
    assert sites.mlp(block) is block.layer[2].DenseReluDense


def test_norm_and_embedding():
    assert sites.norm(model := llm("qwen3")) is model.model.norm
    assert sites.norm(model := llm("opt")) is model.model.decoder.final_layer_norm
    assert sites.norm(model := llm("phi")) is model.model.final_layernorm
    assert sites.norm(model := vision("clip")) is model.post_layernorm
    assert sites.norm(model := vision("vit")) is model.layernorm
    assert sites.embedding(model := llm("opt")) is model.model.decoder.embed_tokens


def test_what_grafts_brought_is_not_the_bases():
    class Bringing(Graft):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

    model = llm("llama")
    before = sites.linears(model).keys()
    graft(model, "model.layers.0.mlp.up_proj", "more", Bringing())
    assert sites.linears(model).keys() == before


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="no stack of transformers layers"):
        sites.layers(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ConfigError, match="no attention module"):
        sites.attention(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no feed-forward module"):
        sites.mlp(nn.Sequential(nn.ReLU()))
