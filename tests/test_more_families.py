"""Families beyond those that every joint is tried on: what sets each apart, against transformers' own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

import composed
import isthmus
import tiny
from composed import MIX
from isthmus import fuse, kernels, parts, sites, tokens
from isthmus.config import LLMConfig
from isthmus.graft import at
from isthmus.types import Batch, ConfigError, DataError, Past

ODD = ("bloom", "falcon", "gptj", "mpt", "deepseek_v3", "falcon_h1", "gpt2", "gpt_oss", "lfm2", "llama4_text")
ODD += ("gpt_neo", "jamba", "smollm3")
LION: dict = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "vocabulary": 320, "bottleneck": 4}
LION |= {"aggregator": {"heads": 2, "inner": 24}}
MADE = "norms of single heads and turns of whole ones alone"


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
    if family in ("gptj", "gpt2", "gpt_neo"):  # these do not tell positions from padding
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(logits(model, batch)[mask > 0], expected[mask > 0])
    for row, one in enumerate(MIX):
        alone = logits(model, model.processor.prompts([one]))[0]
        close(expected[row, -len(alone) :], alone)


def continued(model, batch: Batch, held, step: int) -> torch.Tensor:
    """Logits of a batch whose last six columns come by so many at a time, on what a cache holds of those before."""
    length = batch.input_ids_BT.shape[1]
    cut = length - 6
    begun = {name: getattr(batch, name)[:, :cut] for name in ("input_ids_BT", "segment_BT", "modality_BT")}
    routes = None if batch.route_BT is None else batch.route_BT[:, :cut]
    output = model.run(replace(batch, **begun, route_BT=routes), past=Past(held), keep=True)
    found = [output.head(output.hidden_BTD)]
    for column in range(cut, length, step):
        end = column + step
        seen = {name: getattr(batch, name)[:, :end] for name in ("segment_BT", "modality_BT")}
        new = replace(batch, input_ids_BT=batch.input_ids_BT[:, column:end], media={}, route_BT=None, **seen)
        output = model.run(new, past=output.past, keep=True)
        found.append(output.head(output.hidden_BTD))
    return torch.cat(found, 1)


def empty(model, batch: Batch, cache: str):
    config = model.config.text_config
    if cache == "dynamic":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=batch.input_ids_BT.shape[1] + 3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [family for family in ODD if family != "gpt_neo"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family, cache):
    model = padding_told(family)
    batch = model.processor.prompts(MIX)
    real = batch.segment_BT > 0
    close(continued(model, batch, empty(model, batch, cache), 1)[real], logits(model, batch)[real])


@torch.no_grad()
def test_local_windows_are_right_in_a_dynamic_cache_and_refused_in_a_static_one():
    """GPT-Neo's windows end where the cache does, which in a static one is behind what was written: theirs go wrong."""
    model = padding_told("gpt_neo")
    batch = model.processor.prompts(MIX)
    real, expected = batch.segment_BT > 0, logits(model, batch)
    close(continued(model, batch, empty(model, batch, "dynamic"), 1)[real], expected[real])
    with pytest.raises(ConfigError, match="from the end of a static cache"):
        model.generate(batch, max_new_tokens=2, cache_implementation="static")
    ids = torch.arange(20, 60)[None]
    static = StaticCache(config=model.llm.config, max_cache_len=80)
    theirs = model.llm(input_ids=ids, past_key_values=static).logits
    assert (theirs - model.llm(input_ids=ids, use_cache=False).logits).abs().max() > 0.1, "else refuse no longer"


@pytest.mark.parametrize("family", sorted({*ODD, *fuse.ONE_BY_ONE}))
@torch.no_grad()
def test_several_tokens_on_a_past_equal_the_full_forward_or_are_refused(family):
    model = padding_told(family)
    batch = model.processor.prompts(MIX)
    real, held = batch.segment_BT > 0, empty(model, batch, "dynamic")
    if family not in fuse.ONE_BY_ONE:
        close(continued(model, batch, held, 3)[real], logits(model, batch)[real])
        return
    with pytest.raises(ConfigError, match="forgets the state of its layers where 3 tokens"):
        continued(model, batch, held, 3)
    ids = torch.arange(20, 60)[None]
    expected, held = model.llm(input_ids=ids, use_cache=False).logits, empty(model, batch, "dynamic")
    model.llm(input_ids=ids[:, :37], past_key_values=held, use_cache=True)
    theirs = model.llm(input_ids=ids[:, 37:], past_key_values=held, use_cache=True).logits
    assert (theirs - expected[:, 37:]).abs().max() > 0.01, "else refuse no longer"


@torch.no_grad()
def test_barts_bias_behind_its_head_grows_with_the_vocabulary(tmp_path):
    """As transformers' own resize does it, with the bias at other than zero, where a checkpoint may have it."""
    ours, theirs = tiny.llm("bart"), tiny.llm("bart")
    for llm in (ours, theirs):
        llm.final_logits_bias += torch.arange(tiny.VOCAB)
    tokens.add_tokens(ours, 2, "normal")
    theirs.resize_token_embeddings(tiny.VOCAB + 2, mean_resizing=False)
    theirs.get_input_embeddings().weight[tiny.VOCAB :] = at(sites.embedding(ours))["tokens"].rows
    ids = torch.tensor([[20, tiny.VOCAB, 21, tiny.VOCAB + 1]])
    close(ours(ids, decoder_input_ids=ids).logits, theirs(ids, decoder_input_ids=ids).logits)
    for joint, options in (("kosmos2", {}), ("lion", LION)):
        model = composed.model("bart", joint, options, **({"taps": (2, 1), "layer": 3} if options else {}))
        found = logits(model, model.processor.collator()(MIX))
        assert found.shape[-1] == model.vocabulary > tiny.VOCAB
        for whole in (False, True):
            model.save_pretrained(tmp_path / f"{joint}-{whole}", whole=whole)
            again = isthmus.load(tmp_path / f"{joint}-{whole}")
            assert torch.equal(logits(again, again.processor.collator()(MIX)), found)


@pytest.mark.parametrize("family", ["t5", "flan-t5", "bart"])
@torch.no_grad()
def test_labels_alone_are_shifted_for_the_decoder_as_transformers_shifts_them(family):
    model = composed.model(family)
    prompt = model.processor.prompts(MIX)
    labels = torch.tensor([[40, 41, 42, tiny.EOS], [50, tiny.EOS, -100, -100], [60, 61, tiny.EOS, -100]])
    mask, media = (prompt.segment_BT > 0).long(), prompt.media["image"]
    places = torch.stack([media.row_N, media.at_N], 1)
    given = {"input_ids": prompt.input_ids_BT, "pixel_values": media.pixels, "image_at": places}
    found = model(**given, attention_mask=mask, labels=labels)
    embeds = model.embed(prompt, model.connect(prompt))
    expected = AutoModelForSeq2SeqLM.from_pretrained(composed.llm_folder(family), dtype=torch.float32).eval()(
        inputs_embeds=embeds, attention_mask=mask, labels=labels
    )
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)
    count = int((labels != -100).sum())
    close(model(**given, attention_mask=mask, labels=labels, num_items_in_batch=2 * count).loss, expected.loss / 2)
    with pytest.raises(DataError, match="needs decoder_input_ids"):
        model(**given, attention_mask=mask)


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
        ("olmo2", "llama_adapter", {}, MADE),  # norms over all heads
        ("stablelm", "llama_adapter", {}, MADE),  # a part of each head is turned
        ("hunyuan_v1_dense", "llama_adapter", {}, MADE),  # norms by other names, behind the turn
        ("afmoe", "llama_adapter", {}, MADE),  # a gate on what the heads have read
        ("qwen3_next", "llama_adapter", {}, MADE),  # the same gate, of the queries' Linear
        ("falcon_h1", "llama_adapter", {}, MADE),  # scaled keys
        ("olmo", "llama_adapter", {}, MADE),  # clipped queries, keys and values
        ("llama4_text", "llama_adapter", {}, MADE),  # turned by a function of its own
        ("stablelm", "ee_mllm", {}, "not made of q_proj"),
        ("gpt_oss", "ee_mllm", {}, "not made of q_proj"),
        ("falcon_h1", "saisa", {}, "not made of q_proj"),
        ("olmo", "ee_mllm", {}, "not made of q_proj"),
        ("llama4_text", "ee_mllm", {}, "not made of q_proj"),
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
        ("minimax", {}, "isthmus", "minimax keeps what it has read in a cache of its own"),
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
