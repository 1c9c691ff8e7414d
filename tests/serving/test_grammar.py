"""Schemas in the vocabularies of tokenizers; of those that llguidance cannot read, a refusal."""

from __future__ import annotations

import httpx2
import llguidance.hf
import pytest
from http_server import KEY, NAME, running, said, user
from test_replies import DECODERS, spaced

import composed
from isthmus.serving.grammar import ANY_JSON, Grammars
from isthmus.types import DataError

FORMS = {
    "response_format": {"response_format": {"type": "json_object"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "measure"}}], "tool_choice": "required"},
}


def test_a_tokenizer_that_llguidance_cannot_read_is_refused_and_read_once(monkeypatch):
    voice, read = spaced(DECODERS["metaspace"]), []
    with pytest.raises(ValueError, match="Metaspace"):  # its own words, or there is nothing to refuse
        llguidance.hf.from_tokenizer(voice)
    right = llguidance.hf.from_tokenizer
    monkeypatch.setattr(llguidance.hf, "from_tokenizer", lambda *all: (read.append(all), right(*all))[1])
    grammars = Grammars(voice)
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be held to a schema"):
            grammars.schema(ANY_JSON)
    assert len(read) == 1
    assert not Grammars(spaced(DECODERS["llama"])).schema(ANY_JSON).begin().done


def test_a_server_with_such_a_tokenizer_says_so_and_answers_all_else():
    with running(composed.stir(composed.model("llama"))) as (server, address):
        server.grammars = Grammars(spaced(DECODERS["metaspace"]))
        body = {"model": NAME, "messages": user(said("hi")), "max_tokens": 2}
        headers = {"Authorization": f"Bearer {KEY}"}
        for param, form in FORMS.items():
            told = httpx2.post(f"{address}/v1/chat/completions", json=body | form, headers=headers)
            assert (told.status_code, told.json()["error"]["param"]) == (400, param)
            assert told.json()["error"]["message"] == "this model's tokenizer cannot be held to a schema"
        assert httpx2.post(f"{address}/v1/chat/completions", json=body, headers=headers).status_code == 200
