"""Families beyond those that every joint is tried on: what sets each apart, against transformers' own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import composed
import tiny
from composed import MIX
from isthmus import kernels, parts, sites
from isthmus.config import LLMConfig
from isthmus.types import Batch, ConfigError, Past

ODD = ("bloom", "falcon", "gptj", "mpt", "deepseek_v3", "falcon_h1", "gpt2", "gpt_oss", "lfm2", "llama4_text")


def padding_told(family: str):
    """A model whose padding is embedded as something: a zero row would hide what padding does to a state."""
    model = composed.model(family)
    with torch.no_grad():
        sites.embedding(model.llm).weight[tiny.PAD] = 1.0
    return model


def logits(model, batch: Batch, **how) -> torch.Tensor:
    output = model.run(batch, **how)
    return output.head(output.hidden_BTD)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ODD)
@torch.no_grad()
def test_a_left_padded_batch_with_pictures_equals_transformers_own_forward(family):
    model = padding_told(family)
    batch = model.processor.prompts(MIX)
    embeds, mask = model.embed(batch, model.connect(batch)), (batch.segment_BT > 0).long()
    theirs = AutoModelForCausalLM.from_pretrained(composed.llm_folder(family), dtype=torch.float32).eval()
    theirs.get_input_embeddings().weight[tiny.PAD] = 1.0
    expected = theirs(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    if family in ("gptj", "gpt2"):  # these do not tell positions from padding
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(logits(model, batch)[mask > 0], expected[mask > 0])
    for row, one in enumerate(MIX):
        alone = logits(model, model.processor.prompts([one]))[0]
        close(expected[row, -len(alone) :], alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ODD)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family, cache):
    model = padding_told(family)
    batch = model.processor.prompts(MIX)
    real, length = batch.segment_BT > 0, batch.input_ids_BT.shape[1]
    cut = length - 2
    config = model.config.text_config
    held = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=length + 3)
    begun = {name: getattr(batch, name)[:, :cut] for name in ("input_ids_BT", "segment_BT", "modality_BT")}
    routes = None if batch.route_BT is None else batch.route_BT[:, :cut]
    output = model.run(replace(batch, **begun, route_BT=routes), past=Past(held), keep=True)
    found = [output.head(output.hidden_BTD)]
    for column in range(cut, length):
        seen = {name: getattr(batch, name)[:, : column + 1] for name in ("segment_BT", "modality_BT")}
        new = replace(batch, input_ids_BT=batch.input_ids_BT[:, column : column + 1], media={}, route_BT=None, **seen)
        output = model.run(new, past=output.past, keep=True)
        found.append(output.head(output.hidden_BTD))
    close(torch.cat(found, 1)[real], logits(model, batch)[real])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4_text", "gpt2", "olmo2", "stablelm"])
@torch.no_grad()
def test_packed_rows_equal_single_samples(family):
    model = padding_told(family)
    collator = model.processor.collator()
    packed = collator.rows([MIX])
    rows = logits(model, packed)
    for segment, one in enumerate(MIX, 1):
        close(rows[packed.segment_BT == segment], logits(model, collator([one]))[0])


@pytest.mark.parametrize("rows", [20, 60])
def test_sinks_by_hand_shorter_and_longer_than_products_are_used_for(rows):
    query, key, value = (torch.randn(2, heads, rows, 8, dtype=torch.float64) for heads in (4, 2, 2))
    value, sinks = value[..., :6], torch.randn(4, dtype=torch.float64)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = kernels.attention(module, query, key, value, None, scaling=0.4, s_aux=sinks)
    scores = (0.4 * query @ key.repeat_interleave(2, 1).mT).masked_fill(
        ~torch.ones(rows, rows).tril().bool(), -torch.inf
    )
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


@torch.no_grad()
def test_prompts_for_an_encoder_with_learnt_positions_are_padded_on_the_right():
    model = composed.model("bart")
    together = model.processor.prompts(MIX)
    states = model.read(together, model.embed(together, model.connect(together)), {})
    for row, one in enumerate(MIX):
        alone = model.processor.prompts([one])
        expected = model.read(alone, model.embed(alone, model.connect(alone)), {})[0]
        close(states[row, : len(expected)], expected)
    strings = model.processor(text=["a", "a longer one"])
    assert strings["attention_mask"][:, 0].all() and not strings["attention_mask"][0, -1]


@pytest.mark.parametrize(
    ("family", "aligner", "options", "reason"),
    [
        ("bloom", "cogvlm", {}, "builds its masks by itself"),
        ("falcon", "ee_mllm", {"compute": "rule"}, "builds its masks by itself"),
        ("lfm2", "ee_mllm", {"compute": "rule"}, "carry a state along the whole row"),
        ("gpt2", "cogvlm", {}, "no Linears that experts could stand beside"),
        ("olmo2", "llama_adapter", {}, "otherwise than head by head"),
        ("stablelm", "llama_adapter", {}, "otherwise than head by head"),
        ("stablelm", "ee_mllm", {}, "not made of q_proj"),
        ("gpt_oss", "ee_mllm", {}, "not made of q_proj"),
    ],
)
def test_what_a_family_cannot_carry_is_refused_when_composing(family, aligner, options, reason):
    with pytest.raises(ConfigError, match=reason):
        composed.model(family, aligner, options)


@pytest.mark.parametrize("family", tiny.OWN_MASKS)
@torch.no_grad()
def test_what_needs_more_than_a_mask_of_padding_refuses_packed_rows(family):
    model = composed.model(family)
    with pytest.raises(ConfigError, match="from padding alone"):
        model.run(model.processor.collator().rows([MIX[:2]]))


@pytest.mark.parametrize(
    ("source", "fields", "attention", "cause"),
    [
        ("mamba", {}, "isthmus", "mamba keeps no keys and values"),
        ("rwkv", {}, "isthmus", "rwkv keeps no keys and values"),
        ("gemma3n_text", {}, "isthmus", "looks each token's id up"),
        ("gpt_oss", {}, "sdpa", "gpt_oss does not run on sdpa"),
    ],
)
def test_what_cannot_be_read_right_is_refused_before_a_weight_is_read(tmp_path, source, fields, attention, cause):
    AutoConfig.for_model(source, **fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=cause):
        parts.load_llm(LLMConfig(source=str(tmp_path), attention=attention), torch.float32)


@torch.no_grad()
def test_the_head_of_a_family_that_looks_at_the_length_of_its_input():
    fields = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "intermediate_size": 64, "head_dim": 8}
    fields |= {"vocab_size": 64, "hidden_size": tiny.WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **fields, pad_token_id=0)).eval()
    ids = torch.arange(20, 36).reshape(2, 8)
    output = model(ids, output_hidden_states=True)
    close(sites.head(model)(output.hidden_states[-1]), output.logits)
