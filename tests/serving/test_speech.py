"""Pieces of text add up to the text, whatever tokens it is cut into, and a stop string never shows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import tiny
from isthmus.serving.speech import Speech

TOKENIZER = tiny.tokenizer()
TEXT = st.text(st.sampled_from("abc stop\né€😀"), max_size=40)


def told(ids, stops=()):
    speech = Speech(TOKENIZER, stops)
    pieces = []
    for token in ids:
        pieces.append(speech.hear(token))
        if speech.stopped:
            break
    return speech, [*pieces, speech.end()]


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_pieces_add_up_and_hold_no_half_character(text):
    speech, pieces = told(TOKENIZER(text, add_special_tokens=False).input_ids)
    assert "".join(pieces) == speech.text == text and not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(st.text(st.sampled_from("abc stop\né€😀"), min_size=1, max_size=5), max_size=3))
def test_nothing_of_a_stop_string_is_ever_given_out(text, stops):
    speech, pieces = told(TOKENIZER(text, add_special_tokens=False).input_ids, stops)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text  # the stop string that is complete first
    assert "".join(pieces) == speech.text == expected and speech.stopped is bool(ends)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_unfinished_character_becomes_a_replacement_at_the_end_alone(cut):
    ids = TOKENIZER("a😀", add_special_tokens=False).input_ids
    assert len(ids) == 5
    _, pieces = told(ids[: 1 + cut])
    assert pieces[: 1 + cut] == ["a"] + [""] * cut and pieces[-1].strip("\ufffd") == ""


def test_control_tokens_are_not_said():
    _, pieces = told([tiny.BOS, *TOKENIZER("hi", add_special_tokens=False).input_ids, tiny.PAD])
    assert "".join(pieces) == "hi"


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2's: what has no piece of its own is told byte by byte."""
    pieces = ["\u2581hi", "\u2581x", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("end", [[], [1], [1, 0]])
def test_a_byte_too_many_behind_a_character_ends_nothing(end):
    speech = Speech(byte_fallback())
    pieces = [speech.hear(token) for token in [0, 2 + 0xC3, 2 + 0xA9, 2 + 0x80, *end]]
    said = "".join([*pieces, speech.end()])
    assert said == "hi\u00e9\ufffd" + "".join([" x", " hi"][: len(end)])
