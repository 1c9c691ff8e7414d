"""Tokens in log-probabilities are spelled as they stand in the text, whatever a tokenizer does with spaces."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import composed
from isthmus.serving.answers import Done, Piece
from isthmus.serving.replies import Reply
from isthmus.serving.sampling import Chosen
from isthmus.serving.speech import Speech

PIECES = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hi", "▁there", "▁x", "a", "re"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def spaced(decoder: Any) -> PreTrainedTokenizerFast:
    """Words bring their spaces along, as `▁`, and a text begins without one."""
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(PIECES)}, [], unk_token="<unk>"))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


DECODERS = {"metaspace": decoders.Metaspace(), "llama": decoders.Sequence(LLAMA)}


def replied(voice: PreTrainedTokenizerFast, ids: list[int], tools: tuple[str, ...] = ()) -> tuple[list, Reply]:
    """The chunks and the reply of an answer that comes token by token; beside each stands the one before it."""
    reply, speech, chunks = Reply("tiny", 3, 1, tools, voice, True), Speech(voice), []
    for place, token in enumerate(ids):
        said = speech.hear(token) + (speech.end() if place == len(ids) - 1 else "")
        chunks += reply.hear(Piece(0, said, (Chosen(token, -0.5, ((token, -0.5), (ids[place - 1], -1.0))),)))
    return [*chunks, *reply.hear(Done(0, "stop", len(ids), 0))], reply


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("words", [["▁hi", "▁there", "▁x"], ["▁", "a", "▁there", "re", "▁", "▁x"]])
@pytest.mark.parametrize("tools", [(), ("measure",)])
def test_tokens_joined_are_the_text(decoder, words, tools):
    voice = spaced(DECODERS[decoder])
    chunks, reply = replied(voice, [PIECES.index(word) for word in words], tools)
    (choice,) = reply.body()["choices"]
    told = choice["logprobs"]["content"]
    text = "".join(words).replace("▁", " ")[1:]
    assert choice["message"]["content"] == text == "".join(each["token"] for each in told)
    assert bytes(byte for each in told for byte in each["bytes"]) == text.encode()
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each for content in streamed if content for each in content["content"]] == told
    for place, each in enumerate(told[1:], 1):
        same, other = each["top_logprobs"]
        assert same["token"] == each["token"] and other["token"] == words[place - 1].replace("▁", " ")


def test_a_character_in_several_tokens_has_no_bytes_of_its_own():
    ids = [PIECES.index("▁hi"), *(2 + byte for byte in "é".encode()), 2 + ord("!"), PIECES.index("▁x")]
    _, reply = replied(spaced(DECODERS["llama"]), ids)
    told = reply.body()["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in told] == ["hi", "\ufffd", "\ufffd", "!", " x"]
    assert [each["bytes"] for each in told] == [[*b"hi"], None, None, [*b"!"], [*b" x"]]


def test_every_token_of_a_byte_level_vocabulary_reads_behind_others_as_it_does_alone():
    voice = composed.model("llama").processor.tokenizer
    told = replied(voice, [0, *range(len(voice))])[1].body()["choices"][0]["logprobs"]["content"][1:]
    assert [each["token"] for each in told] == [voice.decode([token]) for token in range(len(voice))]
    assert any(each["bytes"] is None for each in told) and any(each["token"].startswith(" ") for each in told)
