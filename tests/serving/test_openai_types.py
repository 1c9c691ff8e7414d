"""Every reply is what OpenAI's own types say, strictly: no field of another type, none that is missing."""

from __future__ import annotations

import json

import httpx2
import pytest
from http_server import KEY, NAME, running, said, shown, user
from openai.types import CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ValidationError

import composed
from composed import stir

QUESTION = user(shown(1), said("what is it?"))
TOOL = {"type": "function", "function": {"name": "measure", "parameters": {"type": "object", "properties": {}}}}
WISHES = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "two": {"n": 2, "temperature": 1.0, "seed": 1, "logprobs": True},
    "stopped": {"stop": ["a", "e", "i", "o"]},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 30},
    "called": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60},
    "not called": {"tools": [TOOL], "logprobs": True},
    "ids": {"return_token_ids": True},
}


@pytest.fixture(scope="module")
def http():
    with (
        running(stir(composed.model("llama"))) as (_, address),
        httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client,
    ):
        yield client


def strictly(kind: type[BaseModel], text: str) -> BaseModel:
    return kind.model_validate_json(text, strict=True)


@pytest.mark.parametrize("wish", WISHES)
def test_answers_and_every_chunk(http, wish):
    body = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 6} | WISHES[wish]
    whole = strictly(ChatCompletion, http.post("/v1/chat/completions", json=body).text)
    assert len(whole.choices) == WISHES[wish].get("n", 1) and whole.usage.total_tokens > whole.usage.prompt_tokens
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        *lines, end = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    chunks = [strictly(ChatCompletionChunk, line) for line in lines]
    assert end == "[DONE]" and len(chunks) > 2 and chunks[-1].usage.total_tokens > 0
    assert {choice.finish_reason for chunk in chunks for choice in chunk.choices} - {None} == {
        choice.finish_reason for choice in whole.choices
    }


@pytest.mark.parametrize("wish", ["plain", "two", "stopped", "json", "called", "not called"])
def test_token_ids_are_told_whole_and_streamed_where_they_are_wished(http, wish):
    body = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 6} | WISHES[wish]
    plain = http.post("/v1/chat/completions", json=body).json()
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]
    asked = body | {"return_token_ids": True}
    whole = http.post("/v1/chat/completions", json=asked).json()
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    told = [choice["token_ids"] for choice in whole["choices"]]
    assert sum(map(len, told)) == whole["usage"]["completion_tokens"]
    begun, streamed = [], [[] for _ in told]
    with http.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                begun += [chunk["prompt_token_ids"]] if "prompt_token_ids" in chunk else []
                for choice in chunk["choices"]:
                    streamed[choice["index"]] += choice["token_ids"]
    assert streamed == told and begun == [whole["prompt_token_ids"]] * len(told)


def test_embeddings_and_models(http):
    body = {"model": NAME, "input": ["the cat", QUESTION[0]["content"][0]], "encoding_format": "float"}
    found = strictly(CreateEmbeddingResponse, http.post("/v1/embeddings", json=body).text)
    assert [each.index for each in found.data] == [0, 1]
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    cards = [json.dumps(each) for each in listed["data"]] + [http.get(f"/v1/models/{NAME}").text]
    assert [strictly(Model, card).id for card in cards] == [NAME, NAME]


def test_the_types_are_strict(http):
    body = {"model": NAME, "messages": user(said("hi")), "max_tokens": 1}
    right = http.post("/v1/chat/completions", json=body).json()
    choice = right["choices"][0]
    for wrong in (
        right | {"created": "1"},
        right | {"object": "completion"},
        {name: value for name, value in right.items() if name != "choices"},
        right | {"choices": [choice | {"finish_reason": "done"}]},
    ):
        with pytest.raises(ValidationError):
            strictly(ChatCompletion, json.dumps(wrong))
