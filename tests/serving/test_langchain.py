"""LangChain's own OpenAI client, unmodified, against a server with a tiny model; skipped where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from http_server import KEY, NAME, encoded, running

import composed
from composed import stir

BESIDE = Path(sys.prefix) / "langchain"
"""Where it is looked for beside the environment, out of every other test's sight."""
INSTALL = "pip install --no-deps --target .venv/langchain -r tests/serving/langchain.txt"
pytestmark = pytest.mark.slow
PICTURE = {"type": "image_url", "image_url": {"url": encoded(1)}}
TALK = [("system", "be brief"), ("human", [{"type": "text", "text": "what is it?"}, PICTURE])]
SCHEMA = {
    "title": "Seen",
    "description": "What is in the picture.",
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}},
    "required": ["shape"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def langchain():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(BESIDE)])
        yield pytest.importorskip("langchain_openai", reason=INSTALL)


@pytest.fixture(scope="module")
def served():
    with running(stir(composed.model("llama"))) as (_, address):
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def chat(langchain, served):
    return langchain.ChatOpenAI(
        base_url=served, api_key=KEY, model=NAME, temperature=0, max_tokens=12, max_retries=0, stream_usage=True
    )


def test_an_answer_streamed_and_whole_and_in_a_batch(chat):
    whole = chat.invoke(TALK)
    assert whole.content and whole.usage_metadata["output_tokens"] <= 12 and whole.response_metadata["finish_reason"]
    chunks = list(chat.stream(TALK))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content and len(chunks) > 2
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 0
    assert [reply.content for reply in chat.batch([TALK] * 3)] == [whole.content] * 3
    assert chat.invoke([*TALK, whole, ("human", "and?")]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    found = chat.with_structured_output(SCHEMA, method=method).invoke(TALK, max_tokens=100)
    assert found["shape"] in ("circle", "square")


def test_a_tool_is_called_and_its_result_read(chat):
    tool = {"type": "function", "function": {"name": "measure", "description": "Measure.", "parameters": SCHEMA}}
    reply = chat.bind_tools([tool], tool_choice="measure").invoke(TALK, max_tokens=100)
    (call,) = reply.tool_calls
    assert call["name"] == "measure" and call["args"]["shape"] in ("circle", "square")
    result = {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"cm": 4})}
    assert chat.bind_tools([tool], tool_choice="none").invoke([*TALK, reply, result]).content


def test_embeddings(langchain, served):
    embed = langchain.OpenAIEmbeddings(base_url=served, api_key=KEY, model=NAME, check_embedding_ctx_length=False)
    one, two = embed.embed_documents(["the cat", "a dog"])
    assert len(one) == len(two) and one != two and embed.embed_query("the cat") == pytest.approx(one, abs=1e-6)
