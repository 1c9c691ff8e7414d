"""Requests as VLMEvalKit's API classes write them (`--base-url`: LMDeployAPI; `GPT4V`), answered as they read answers.

Its code is in no package registry, so its requests are rebuilt here from its public source (open-compass/VLMEvalKit,
`vlmeval/api`): a plain POST of JSON, pictures as JPEG in data URLs, fields that no OpenAI server knows.
"""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import httpx2
import pytest
from http_server import KEY, NAME, data_url, running

import composed
from composed import picture
from isthmus.serving.http import Access
from isthmus.serving.limits import Limits
from isthmus.speakers.local import Local
from isthmus.types import Image, Turn

QUESTION = "Question: Which?\nOptions:\nA. a cat\nB. a dog\nPlease select the correct answer from the options above. \n"
HUGE = 32768
"""What `--max-tokens` is unless it is given: more than a small model's context."""


@pytest.fixture(scope="module")
def model():
    return composed.stir(composed.model("llama"))


@pytest.fixture(scope="module")
def address(model):
    with running(model, limits=Limits(tokens=12)) as (_, address):
        yield address


def jpeg(seed: int) -> bytes:
    """A picture as it is sent: RGB, JPEG, its smaller side raised to 100 pixels."""
    raw = BytesIO()
    picture(seed).source.convert("RGB").resize((100, 100)).save(raw, "jpeg")
    return raw.getvalue()


def body(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The fields that are always there, and what a data set's own arguments add at the top."""
    message = {"role": "user", "content": list(content)}
    return {"model": NAME, "messages": [message], "max_tokens": HUGE, "n": 1, "temperature": 0} | more


def shown(seed: int, **extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(jpeg(seed), "jpeg"), **extra}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def post(address: str, asked: dict[str, Any]) -> httpx2.Response:
    """As `requests.post(url, headers=…, data=json.dumps(payload))` sends it."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return httpx2.post(f"{address}/v1/chat/completions", headers=headers, content=json.dumps(asked), timeout=60)


def answer(address: str, asked: dict[str, Any]) -> str:
    """Read as there: any 2xx, then the first choice's content, which must be a text and not empty."""
    reply = post(address, asked)
    assert 200 <= reply.status_code < 300, reply.text
    content = reply.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str) and content.strip()
    return content.strip()


def alone(model, *parts: Any) -> str:
    return Local(model, max_new_tokens=12).say([Turn.say("user", *parts)])


@pytest.mark.parametrize(
    "extra",
    [{}, {"max_dynamic_patch": 6}, {"detail": "low"}],
    ids=["plain", "a field of a wrapper's own", "GPT4V's detail"],
)
def test_a_question_with_a_picture_is_answered_within_the_room_there_is(address, model, extra):
    asked = body(said(QUESTION), shown(3, **extra), dataset="MMBench_DEV_EN", top_k=1, repetition_penalty=1.0)
    assert answer(address, asked) == alone(model, QUESTION, Image(jpeg(3)))


def test_pictures_and_texts_keep_the_data_sets_order(address, model):
    asked = body(shown(1), said("What is left?"), shown(2), said(QUESTION))
    own = alone(model, Image(jpeg(1)), "What is left?", Image(jpeg(2)), QUESTION)
    assert answer(address, asked) == own
    swapped = body(shown(2), said("What is left?"), shown(1), said(QUESTION))
    assert answer(address, swapped) == alone(model, Image(jpeg(2)), "What is left?", Image(jpeg(1)), QUESTION)


def test_the_health_check_is_text_alone(address, model):
    """`vlmutil check`: a greeting without a picture, its parts joined into one."""
    assert answer(address, body(said("hello"))) == alone(model, "hello")


def test_a_system_prompt_and_earlier_turns(address, model):
    asked = body(said(QUESTION))
    asked["messages"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [said("hello")]},
        {"role": "assistant", "content": [said("hi")]},
        *asked["messages"],
    ]
    turns = [Turn.say("system", "Be brief."), Turn.say("user", "hello"), Turn.say("assistant", "hi")]
    own = Local(model, max_new_tokens=12).say([*turns, Turn.say("user", QUESTION)])
    assert answer(address, asked) == own


def test_a_stream_is_read_line_by_line_until_done(address, model):
    """`--stream`: lines that begin with `data:`, contents joined, until `[DONE]`."""
    asked = body(shown(3), said(QUESTION), stream=True)
    lines = [line for line in post(address, asked).text.splitlines() if line.startswith("data:")]
    payloads = [line.removeprefix("data:").strip() for line in lines]
    assert payloads[-1] == "[DONE]"
    deltas = [json.loads(payload)["choices"][0]["delta"] for payload in payloads[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == alone(model, Image(jpeg(3)), QUESTION)


def test_the_first_model_in_the_list_is_the_one_to_ask_for(address):
    """The wrapper reads the name from `/v1/models`."""
    listed = httpx2.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert listed["data"][0]["id"] == NAME


def test_without_a_key_the_list_needs_none_and_any_key_is_taken(model):
    """The wrapper sends no key for the list, and `sk-123456` or EMPTY with its questions."""
    with running(model, limits=Limits(tokens=4), access=Access()) as (_, open_address):
        assert httpx2.get(f"{open_address}/v1/models").json()["data"][0]["id"] == NAME
        assert answer(open_address, body(said("hello")))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd"])
def test_local_media_is_refused_and_says_so(address, url):
    """`--local-media` must be off: a path is no picture of ours to open."""
    reply = post(address, body({"type": "image_url", "image_url": {"url": url}}, said("what?")))
    assert reply.status_code == 400 and "root:" not in reply.text
