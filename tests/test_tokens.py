"""New tokens leave the base's rows and logits as they were, learn alone, and can be read and written."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus import sites
from isthmus.graft import at
from isthmus.tokens import add_tokens
from isthmus.types import ConfigError
from tiny import LLMS, VOCAB, WIDTH, llm

IDS = torch.arange(20, 36).reshape(2, 8)
N = 3


def run(model, ids=IDS):
    kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **kwargs, output_hidden_states=True)


def last(output) -> torch.Tensor:
    return (output.get("decoder_hidden_states") or output.hidden_states)[-1]


def new_rows(host) -> Any:
    """The rows that a grafted embedding or head uses."""
    return cast(Any, at(host)["tokens"]).rows


def rows(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".grafts.tokens." in name}


@pytest.mark.parametrize("family", LLMS)
def test_old_ids_keep_their_logits_and_rows_to_the_bit(family):
    plain, model = llm(family), llm(family)
    assert add_tokens(model, N) == VOCAB
    before, after = run(plain).logits, run(model).logits
    assert torch.equal(after[..., :VOCAB], before) and after.shape[-1] == VOCAB + N
    base = {name: value for name, value in model.state_dict().items() if ".grafts." not in name}
    assert base.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in base.items())


@pytest.mark.parametrize("family", LLMS)
def test_the_result_is_that_of_a_resized_model(family):
    """transformers' own way: longer tables, with our rows at their end."""
    model, resized = llm(family), llm(family)
    add_tokens(model, N, "normal")
    resized.resize_token_embeddings(VOCAB + N, mean_resizing=False)
    tied = resized.get_output_embeddings().weight is resized.get_input_embeddings().weight
    with torch.no_grad():
        resized.get_input_embeddings().weight[VOCAB:] = new_rows(sites.embedding(model))
        resized.get_output_embeddings().weight[VOCAB:] = new_rows(model.get_output_embeddings())
    assert len(rows(model)) == (1 if tied else 2)
    ids = IDS.clone()
    ids[0, 2], ids[1, 5], ids[1, 7] = VOCAB, VOCAB + 1, VOCAB + 2
    torch.testing.assert_close(run(model, ids).logits, run(resized, ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(sites.head(model)(last(run(model, ids))), run(model, ids).logits)


def test_placeholders_are_embedded_as_zeros_and_have_no_logit():
    model = llm("llama")
    add_tokens(model, N)
    embedded = sites.embedding(model)(torch.tensor([[5, VOCAB + N - 1, VOCAB + N, VOCAB + 1000]]))
    assert torch.equal(embedded[0, 2:], torch.zeros(2, WIDTH)) and embedded[0, 1].abs().min() > 0
    assert torch.equal(embedded[0, 0], llm("llama").get_input_embeddings().weight[5])


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_gradients_reach_the_new_rows_only(family):
    model = llm(family).requires_grad_(False)
    add_tokens(model, N)
    ids = IDS.clone()
    ids[:, 3] = VOCAB + 1
    logits = run(model, ids).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == set(rows(model)) and len(learned) == (2 if family == "qwen2" else 1)
    inputs = new_rows(sites.embedding(model)).grad
    if family == "qwen2":  # untied: a row that was not read has no gradient from the input side
        assert inputs[1].abs().max() > 0 and inputs[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_new_tokens_and_reads_them_again(beams):
    model = llm("qwen2")
    first = add_tokens(model, N)
    with torch.no_grad():
        states = last(run(model))[:, -1].mean(0)
        new_rows(model.get_output_embeddings())[1] = 30 * states / states.norm()
    found = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None
    )
    assert (found[:, IDS.shape[1] :] == first + 1).any(1).all()
    if beams == 1:
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids)


def test_state_dict_round_trip():
    model, again = llm("llama"), llm("llama", seed=9)
    add_tokens(model, N, "normal")
    add_tokens(again, N)
    ids = IDS.clone()
    ids[:, 3] = VOCAB + 2
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(again, ids).logits, run(model, ids).logits)
    assert list(rows(model)) == ["model.embed_tokens.grafts.tokens.weight"]


def test_births():
    model, base = llm("llama"), llm("llama").get_input_embeddings().weight
    add_tokens(model, N)
    torch.testing.assert_close(new_rows(sites.embedding(model)), base.mean(0).expand(N, -1))
    model = llm("llama")
    add_tokens(model, 4000, "normal")
    new = new_rows(sites.embedding(model))
    torch.testing.assert_close(new.mean(0), base.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(new.std(0), base.std(0), atol=0.02, rtol=0)


def test_an_embedding_that_scales_scales_new_rows_too():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma3_text", vocab_size=64, head_dim=8, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    add_tokens(model, 1)
    table = model.get_input_embeddings()
    torch.testing.assert_close(table(torch.tensor([64]))[0], table(torch.arange(64)).mean(0), rtol=1e-4, atol=1e-5)


def test_none_and_twice():
    model = llm("llama")
    assert add_tokens(model, 0) == VOCAB and not rows(model)
    add_tokens(model, 1)
    with pytest.raises(ConfigError, match="already has a graft named 'tokens'"):
        add_tokens(model, 1)
    lopsided = llm("qwen2")
    lopsided.lm_head = torch.nn.Linear(WIDTH, VOCAB + 8, bias=False)
    with pytest.raises(ConfigError, match="no head of the embedding's size"):
        add_tokens(lopsided, 1)
