"""A model in this process as a speaker."""

from __future__ import annotations

import inspect
import re
import time
from contextlib import closing

import pytest
import torch
from transformers import GenerationMixin

import composed
from isthmus.serving.engine import Engine
from isthmus.serving.sampling import Settings
from isthmus.speakers.local import PLAIN, Local
from isthmus.types import Sample, Turn

LONGEST = 24
"""Tokens of the answers below."""
TURNS = [Turn.say("user", composed.picture(1), "what is it?")]


def test_a_model_that_nobody_listens_to_stops(monkeypatch):
    model = composed.stir(composed.model("llama"))
    model.generation_config.eos_token_id = None
    steps, think = [], type(model).think
    monkeypatch.setattr(type(model), "think", lambda self, *all: steps.append(1) or think(self, *all))
    speaker, turns = Local(model, max_new_tokens=400), [Turn.say("user", "hi")]
    with closing(speaker.stream(turns)) as pieces:
        next(pieces)
    told = len(steps)
    time.sleep(0.2)
    assert told == len(steps) < 400


def greedy(model) -> list[int]:
    """The likeliest token after each beginning, read anew each time."""
    batch = model.processor.prompts([Sample(tuple(TURNS))])
    ids, images, start = batch.input_ids_BT, batch.media["image"], batch.input_ids_BT.shape[1]
    at = torch.stack([images.row_N, images.at_N], 1)
    for _ in range(LONGEST):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=images.pixels, image_at=at).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    return ids[0, start:].tolist()


def asked(first: int) -> dict:
    """Settings that each change an answer which begins with that token."""
    return {
        "repetition_penalty": {"repetition_penalty": 1.3},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "suppress_tokens": {"suppress_tokens": [first]},
        "bad_words_ids": {"bad_words_ids": [[first]]},
        "sequence_bias": {"sequence_bias": [[[first], -50.0]]},
        "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 1.3},
        "beams": {"num_beams": 4},
    }


@pytest.mark.parametrize("name", asked(0))
def test_a_models_own_settings_change_no_answer_here_or_served(name):
    model = composed.stir(composed.model("llama"))
    model.generation_config.eos_token_id = None
    expected = greedy(model)
    assert len(set(expected)) < len(expected)  # it repeats itself, so that a penalty would tell
    for setting, value in asked(expected[0])[name].items():
        setattr(model.generation_config, setting, value)
    speaker = Local(model, max_new_tokens=LONGEST)
    batch = speaker._prompt([Sample(tuple(TURNS))])
    start, limits = batch.input_ids_BT.shape[1], {"max_new_tokens": LONGEST, "pad_token_id": model.processor.pad}
    assert model.generate(batch, **speaker.decode)[0, start:].tolist() == expected
    if name != "beams":  # of which the tiny model's best may be the greedy one
        torch.manual_seed(0)
        assert model.generate(batch, **limits)[0, start:].tolist() != expected  # transformers' own would differ
    text = model.processor.decode(expected, skip_special_tokens=True)
    assert speaker.say(TURNS) == text.strip() == "".join(speaker.stream(TURNS)).strip()
    with Engine(model) as engine:
        assert engine.answer(TURNS, Settings(max_tokens=LONGEST)) == [text]


def test_a_least_length_of_the_models_own_holds_back_no_end():
    model = composed.stir(composed.model("llama"))
    model.generation_config.eos_token_id = greedy(model)[0]
    model.generation_config.min_new_tokens = 5
    with Engine(model) as engine:
        assert engine.answer(TURNS) == [""]
    speaker = Local(model)
    batch = speaker._prompt([Sample(tuple(TURNS))])
    assert model.generate(batch, **speaker.decode).shape[1] == batch.input_ids_BT.shape[1] + 1


def test_what_is_asked_of_a_speaker_holds():
    model = composed.stir(composed.model("llama"))
    model.generation_config.eos_token_id = None
    said = Local(model, max_new_tokens=LONGEST, no_repeat_ngram_size=1)
    batch = said._prompt([Sample(tuple(TURNS))])
    ids = model.generate(batch, **said.decode)[0, batch.input_ids_BT.shape[1] :].tolist()
    assert len(set(ids)) == len(ids) == LONGEST


def test_plain_decoding_leaves_out_all_that_transformers_would_put_in_its_way():
    read = set(re.findall(r"generation_config\.([a-z]\w*)", inspect.getsource(GenerationMixin._get_logits_processor)))
    assert len(read) > 20 and read - {"use_cache", "max_length"} <= set(PLAIN)
