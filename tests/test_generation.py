"""Decoding step by step: caches continued by hand, transformers' other loops, and what is refused of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import test_contract as contract
from composed import MIX, sample
from isthmus import aligner as aligners
from isthmus.model import VLM
from isthmus.types import Batch, ConfigError, DataError
from test_contract import JOINTS, close, extended, grown, logits

ASIDE = [name for name, joint in JOINTS.items() if not aligners.named(joint.aligner).splices]
"""Joints whose pictures are in no column of the cache."""
BY_COLUMN = ["cogvlm", "composite", "shared", "ee-mllm", "ee-mllm-rule", "saisa", "lion", "mlp"]
"""Joints that ask what stands in the columns of the cache, or on which route; and one that does not."""
joints = pytest.mark.parametrize("joint", [*ASIDE, *BY_COLUMN])


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as the processor returns it."""
    given = {"input_ids": batch.input_ids_BT, "attention_mask": (batch.segment_BT > 0).long()}
    given |= {} if batch.route_BT is None else {"route": batch.route_BT}
    if "image" in batch.media:
        media = batch.media["image"]
        given |= {"pixel_values": media.pixels, "image_at": torch.stack([media.row_N, media.at_N], 1)}
    return given | ({"instruction_ids": batch.extra_text["image"]} if batch.extra_text else {})


def seen(batch: Batch, columns: int) -> torch.Tensor:
    return (batch.segment_BT[:, :columns] > 0).long()


def prompts(model: VLM) -> Batch:
    """Rows with one picture, none and two, of which the shorter are padded on the left."""
    batch = model.processor.prompts(
        [replace(one, meta=one.meta if model.aligner.name == "lion" else {}) for one in MIX]
    )
    assert (batch.segment_BT[:, 0] == 0).any()
    return batch


def test_the_joints_that_keep_media_aside_are_among_them():
    assert {JOINTS[name].aligner for name in ASIDE} >= {"flamingo", "llama_adapter", "aside"}


@joints
@torch.no_grad()
def test_a_loop_by_hand_on_what_forward_returns_equals_the_whole_forward(joint):
    model = grown(joint, "llama")
    batch = prompts(model)
    output = model(**tensors(batch), use_cache=True)
    for token in (40, 41, 42):
        batch = extended(batch, torch.full((3,), token))
        found = model(
            input_ids=batch.input_ids_BT[:, -1:],
            attention_mask=seen(batch, batch.input_ids_BT.shape[1]),
            past_key_values=output.past_key_values,
        )
        close(found.logits[:, -1], logits(model, batch)[:, -1])


@joints
@torch.no_grad()
def test_a_cropped_cache_forgets_the_picture_that_it_has_lost_and_takes_it_again(joint):
    model = grown(joint, "llama")
    batch = model.processor.collator()([MIX[2]])
    given, cut = tensors(batch), int(batch.media["image"].at_N[1]) - 1
    media = {name: given[name] for name in ("pixel_values", "image_at", "instruction_ids") if name in given}
    cache = model(**given, use_cache=True).past_key_values
    cache.crop(cut - batch.input_ids_BT.shape[1])
    text = torch.tensor([[50, 51, 52]])
    shorter = {"input_ids": torch.cat([batch.input_ids_BT[:, :cut], text], 1), "route": 1}
    expected = model(**shorter, **{name: value[:1] for name, value in media.items()}).logits[:, cut:]
    close(model(input_ids=text, past_key_values=copy.deepcopy(cache)).logits, expected)
    second = {name: value[1:] for name, value in media.items()}
    second["image_at"] = second["image_at"] - torch.tensor([0, cut])
    found = model(input_ids=batch.input_ids_BT[:, cut:], past_key_values=cache, **second).logits
    close(found, model(**given).logits[:, cut:])


@joints
@torch.no_grad()
def test_the_cache_that_generate_returns_is_continued_by_hand(joint):
    model = contract.endless(grown(joint, "llama"))
    batch = prompts(model)
    told = model.generate(batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    for token_B in told.sequences[:, -3:].unbind(1):
        batch = extended(batch, token_B)
    mask = seen(batch, batch.input_ids_BT.shape[1])
    found = model(input_ids=batch.input_ids_BT[:, -1:], attention_mask=mask, past_key_values=told.past_key_values)
    close(found.logits[:, -1], logits(model, batch)[:, -1])


@torch.no_grad()
def test_a_cache_of_other_rows_asks_for_theirs():
    model = grown("flamingo", "llama")
    one = model.processor.collator()([MIX[0]])
    cache = model(**tensors(one), use_cache=True).past_key_values
    token, whole = torch.full((2, 1), 40), extended(one, torch.tensor([40]))
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    with pytest.raises(DataError, match="a cache of 1 rows is continued by 2"):
        model(input_ids=token, past_key_values=twice)
    past = model.run(one, keep=True).past
    aside = {"vision": past.vision_BKQD.expand(2, -1, -1, -1), "media_at": past.media_at_BK.expand(2, -1)}
    modality = one.modality_BT.expand(2, -1)
    found = model(input_ids=token, past_key_values=twice, modality=F.pad(modality, (0, 1)), **aside)
    close(found.logits[:, -1], logits(model, whole)[:, -1].expand(2, -1))


@torch.no_grad()
def test_an_emptied_cache_begins_anew():
    model = grown("lion", "llama")
    talk = tensors(model.processor.collator()([sample("hi there")]))
    cache = model(**(talk | {"route": 1}), use_cache=True).past_key_values
    cache.crop(-cache.get_seq_length())
    del talk["route"]
    expected = model(**talk).logits
    close(model(**talk, past_key_values=cache).logits, expected)
    assert (model(**talk, route=1).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("joint", ["flamingo", "cogvlm", "ee-mllm", "lion"])
@torch.no_grad()
def test_prompt_lookup_writes_what_greedy_search_writes(joint, monkeypatch):
    guesses = []
    look = PromptLookupCandidateGenerator.get_candidates

    def counted(self, ids, *args, **kwargs):
        found = look(self, ids, *args, **kwargs)
        guesses.append(found[0].shape[1] - ids.shape[1])
        return found

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", counted)
    model = contract.endless(grown(joint, "llama"))
    prompt = model.processor.prompts([MIX[2]])
    greedy = {"max_new_tokens": 40, "do_sample": False}  # long enough for a tiny model to repeat itself
    expected = model.generate(prompt, **greedy)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **greedy), expected)
    assert max(guesses) > 1


def test_prompt_lookup_of_several_prompts_or_a_padded_one_is_refused():
    model = grown("flamingo", "llama")
    one, several = (tensors(model.processor.prompts(some)) for some in ([MIX[1]], MIX))
    padded = {name: F.pad(value, (2, 0)) for name, value in one.items()}
    for given in (padded, several):
        with pytest.raises(ConfigError, match="prompt_lookup_num_tokens takes one prompt without padding"):
            model.generate(**given, prompt_lookup_num_tokens=3, max_new_tokens=2)


def test_ways_of_decoding_that_run_on_ids_alone_are_refused_by_name():
    model = grown("mlp", "llama")
    inputs = tensors(model.processor.prompts([MIX[0]]))
    for asked in ({"guidance_scale": 1.5}, {"prefill_chunk_size": 7}, {"assistant_early_exit": 1}):
        (name,) = asked
        for given in (asked, {"generation_config": GenerationConfig(max_new_tokens=2, **asked)}):
            with pytest.raises(ConfigError, match=f"generate of this model does not take {name}\n") as raised:
                model.generate(**inputs, **given)
            assert "greedy search" in raised.value.remedy
    with pytest.raises(ConfigError, match="does not take assistant_model"):
        model.generate(**inputs, assistant_model=model.llm)
    plain = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, guidance_scale=1.0, **plain), model.generate(**inputs, **plain))
