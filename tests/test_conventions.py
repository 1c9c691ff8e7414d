"""What a VLM is to transformers' own conventions: tuples, lengths, prompts, and a vocabulary of a fixed size."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import composed
from composed import picture, stir
from isthmus.model import VLM
from isthmus.types import ConfigError, DataError


@pytest.fixture(scope="module")
def model() -> VLM:
    return stir(composed.model("llama"))


@pytest.fixture(scope="module")
def inputs(model):
    return model.processor(images=[picture(1).source], text="<image>hi")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_tuple_is_what_there_is_in_the_order_of_the_output(family):
    model = composed.model(family)
    inputs = dict(model.processor(images=[picture(1).source], text="<image>hi"))
    labels = inputs["input_ids"].clamp(max=9)
    named = model(**inputs, labels=labels)
    loss, logits = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert type(model(**inputs, labels=labels, return_dict=True)) is type(named)
    model.config.return_dict = False  # as every model of transformers reads it
    asked = model(**inputs, labels=labels)
    assert type(asked) is tuple and torch.equal(asked[0], loss)
    again = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.config.return_dict = True
    assert torch.equal(again, model.generate(**inputs, max_new_tokens=2, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_call_without_a_prompt_says_so(family):
    model = composed.model(family)
    for call in (lambda: model.generate(max_new_tokens=4), lambda: model(labels=torch.ones(1, 3, dtype=torch.long))):
        with pytest.raises(DataError, match="there are no input_ids") as told:
            call()
        assert "processor" in told.value.remedy


def test_a_length_that_the_prompt_uses_up_is_said_with_its_remedy(model, inputs):
    prompt = inputs["input_ids"].shape[1]
    own = GenerationConfig(max_length=prompt, do_sample=False)
    for asked in ({"max_length": 5}, {"max_length": prompt}, {"generation_config": own}):
        with pytest.raises(ConfigError, match=f"counts the prompt too, which has {prompt} tokens") as told:
            model.generate(**inputs, **asked)
        assert "max_new_tokens" in told.value.remedy
    greedy = {"do_sample": False, "eos_token_id": -1}
    longer = model.generate(**inputs, max_length=prompt + 3, **greedy)
    assert longer.shape[1] == prompt + 3
    assert torch.equal(longer, model.generate(**inputs, max_new_tokens=3, **greedy))
    assert torch.equal(longer, model.generate(**inputs, max_length=5, max_new_tokens=3, **greedy)), "it goes first"
    given = GenerationConfig(max_length=5, **greedy)
    try:
        model.generation_config.max_new_tokens = 3
        assert torch.equal(longer, model.generate(**inputs, generation_config=given)), "settings are merged"
    finally:
        model.generation_config.max_new_tokens = None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_vocabulary_that_cannot_be_resized_stays_whole(family):
    model = composed.model(family)
    inputs = model.processor(images=[picture(1).source], text="<image>hi")
    table, before = model.get_input_embeddings(), model(**inputs).logits
    rows, known = table.weight.clone(), model.config.get_text_config().vocab_size
    for asked in ({"new_num_tokens": 400}, {"new_num_tokens": 300}, {"pad_to_multiple_of": 64 * 3}):
        with pytest.raises(ConfigError, match="cannot be resized"):
            model.resize_token_embeddings(**asked)
        assert model.get_input_embeddings() is table and torch.equal(table.weight, rows)
        assert model.config.get_text_config().vocab_size == known and torch.equal(model(**inputs).logits, before)
    for idle in ({}, {"new_num_tokens": known}, {"new_num_tokens": known, "pad_to_multiple_of": 64}):
        assert model.resize_token_embeddings(**idle) is table


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_the_head_is_the_llms_own(family, tied):
    model = composed.model(family)
    head = model.get_output_embeddings()
    assert head is model.llm.lm_head and (head.weight is model.get_input_embeddings().weight) is tied
    peft = pytest.importorskip("peft")
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    touched = {name for name, _ in found.named_parameters() if "lora_A" in name}
    assert touched and not any("lm_head" in name for name in touched)
