"""A remote speaker against a real server on this machine: what it sends, retries, keeps, counts and refuses."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from pydantic import ValidationError

from chat_server import KEY, Act, ChatServer, pictures, refusal, running
from isthmus.speakers.endpoint import Refused
from isthmus.speakers.remote import Remote
from isthmus.speakers.settings import RemoteConfig
from isthmus.types import Audio, Box, ConfigError, DataError, Image, IsthmusError, Sample, Tag, Turn

ASKED = [Turn.say("user", "What is this?")]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running() as server:
        yield server
        assert server.faults == []


def remote(server: ChatServer, **settings: Any) -> Remote:
    return Remote(RemoteConfig(**{"endpoint": server.endpoint, "model": "apple-1", "backoff": 0.01} | settings))


def questions(*texts: str) -> list[Sample]:
    return [Sample((Turn.say("user", text),), id=text) for text in texts]


def noise(width: int, height: int) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# ---------------------------------------------------------------------------------------------- what is sent


def test_a_conversation_is_sent_as_the_protocol_writes_it(server: ChatServer) -> None:
    first, second = noise(9, 5), noise(4, 4)
    turns = [
        Turn.say("system", "Be ", "brief."),
        Turn.say("user", Image(first), "Is this ", Tag("red", 0.9), Image(second), "?"),
        Turn.say("assistant", "no"),
        Turn.say("user", "And at ", Box((0, 0.25, 0.5, 1)), "?"),
    ]
    speaker = remote(server, max_tokens=7, seed=3, options={"top_p": 0.5})
    assert speaker.say(turns) == "an apple"
    (body,) = server.bodies
    messages = body.pop("messages")
    assert body == {"model": "apple-1", "max_tokens": 7, "temperature": 0.0, "seed": 3, "top_p": 0.5}
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[2:] == [
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "And at [0.000,0.250,0.500,1.000]?"},
    ]
    parts = messages[1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts if "text" in part] == ["Is this red", "?"]
    for sent, shown in zip(pictures(parts), (first, second), strict=True):
        assert np.array_equal(np.asarray(sent), np.asarray(shown))
    assert "authorization" not in server.headers[0]


def test_the_official_types_accept_what_is_sent(server: ChatServer) -> None:
    types = pytest.importorskip("openai.types.chat")
    from pydantic import TypeAdapter

    remote(server).say([Turn.say("system", "Be brief."), Turn.say("user", Image(noise(3, 3)), "What?")])
    adapter = TypeAdapter(list[types.ChatCompletionMessageParam])
    sent = server.bodies[0]["messages"]
    checked = adapter.validate_python(sent)
    parts = [{**part} for part in checked[1]["content"]]  # pydantic leaves iterables lazy
    assert checked[0]["content"] == "Be brief." and parts == sent[1]["content"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_official_client_sends_and_reads_the_same(server: ChatServer, streaming: bool) -> None:
    openai = pytest.importorskip("openai")
    server.reply, server.key = lambda body: "a ripe apple – “red”", KEY
    speaker = remote(server, key_env="TEST_KEY", max_tokens=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_KEY", KEY)
        ours = "".join(speaker.stream(ASKED)) if streaming else speaker.say(ASKED)
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if streaming else {}
    with openai.OpenAI(base_url=server.endpoint, api_key=KEY, max_retries=0) as client:
        theirs = client.chat.completions.create(
            model="apple-1",
            messages=[{"role": "user", "content": "What is this?"}],
            max_tokens=9,
            temperature=0,
            **more,
        )
        if streaming:
            chunks = list(theirs)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            tokens = chunks[-1].usage
        else:
            said, tokens = theirs.choices[0].message.content, theirs.usage
    assert ours == said == "a ripe apple – “red”"
    assert (speaker.usage.input_tokens, speaker.usage.output_tokens) == (tokens.prompt_tokens, tokens.completion_tokens)
    assert server.bodies[0] == server.bodies[1]
    assert server.headers[0]["authorization"] == server.headers[1]["authorization"] == f"Bearer {KEY}"


def test_large_pictures_are_scaled_down_and_jpeg_is_smaller(server: ChatServer) -> None:
    photo = noise(20, 10).resize((200, 100), Pillow.Resampling.BICUBIC)
    shown = [Turn.say("user", Image(photo), "What?")]
    for picture in ({"side": 50}, {"side": 200}, {"format": "jpeg"}):
        remote(server, picture=picture).say(shown)
    urls = [body["messages"][0]["content"][0] for body in server.bodies]
    small, whole, jpeg = (pictures([url])[0] for url in urls)
    assert small.size == (50, 25) and whole.size == jpeg.size == (200, 100)
    assert np.array_equal(np.asarray(whole), np.asarray(photo))
    assert jpeg.format == "JPEG" and len(urls[2]["image_url"]["url"]) < len(urls[1]["image_url"]["url"])
    assert np.abs(np.asarray(jpeg, float) - np.asarray(photo, float)).mean() < 8
    assert photo.size == (200, 100)


def test_fields_can_be_left_out_and_renamed(server: ChatServer) -> None:
    speaker = remote(
        server, temperature=None, length_field="max_completion_tokens", options={"reasoning_effort": "low"}
    )
    speaker.say(ASKED)
    assert server.faults == ["no max_tokens"]
    server.faults.clear()
    assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ([], "ends with the user"),
        ([Turn.say("user", "a"), Turn.say("assistant", "b")], "ends with the user"),
        ([Turn("user", ())], "says nothing"),
        ([Turn.say("user", Audio("a.wav"), "What?")], "no audio"),
        ([Turn.say("system", Image(noise(2, 2))), Turn.say("user", "What?")], "picture stands in a turn of the system"),
        ([Turn.say("user", Image("gone.png"), "What?")], "gone.png: no such picture"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(server: ChatServer, turns: list[Turn], cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        remote(server).say(turns)
    assert server.bodies == []


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"endpoint": "localhost:8000/v1"}, "an endpoint is an address"),
        ({"endpoint": f"https://user:{KEY}@example.org/v1"}, "no user, password or query"),
        ({"endpoint": f"https://example.org/v1?key={KEY}"}, "no user, password or query"),
        ({"key": KEY}, "Extra inputs"),
        ({"options": {"stream": True}}, "stream cannot be set here"),
        ({"budget": 1.0, "cache": Path("c")}, "a budget needs input_price"),
        ({"budget": 1.0, "input_price": 1.0}, "a budget needs a cache"),
        ({"endpoint": "http://example.org/v1", "key_env": "TEST_KEY"}, "in clear text over http; use https"),
        ({"endpoint": "HTTP://localhost.example.org/v1", "key_env": "TEST_KEY"}, "in clear text over http"),
    ],
)
def test_settings_that_make_no_sense_are_refused_without_repeating_them(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause) as caught:
        RemoteConfig(**{"endpoint": "http://localhost/v1", "model": "m"} | settings)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://LOCALHOST:1/v1", "http://127.0.0.1/v1", "http://[::1]:1/v1", "https://h/v1"]
)
def test_a_key_goes_to_this_machine_or_travels_encrypted(address: str) -> None:
    assert RemoteConfig(endpoint=address, model="m", key_env="TEST_KEY").endpoint == address


def test_no_proxy_comes_between_a_key_and_a_server_of_this_machine(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes elsewhere takes the proxy that the environment names, a second server here; it sees no key of ours."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.delenv("no_proxy", raising=False)
    with running() as proxy:
        for kind in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(kind, proxy.endpoint.removesuffix("/v1"))
        for endpoint in (server.endpoint, server.endpoint.replace("127.0.0.1", "localhost")):
            assert remote(server, endpoint=endpoint, key_env="TEST_KEY").say(ASKED) == "an apple"
        with pytest.raises(IsthmusError):
            remote(server, endpoint="http://[::1]:9/v1", key_env="TEST_KEY", retries=0).say(ASKED)  # nobody is there
        assert len(server.bodies) == 2 and proxy.bodies == []
        assert remote(server, endpoint="http://elsewhere.invalid/v1").say(ASKED) == "an apple"
        assert len(server.bodies) == 2 and len(proxy.bodies) == 1


def test_the_whole_address_may_be_given() -> None:
    for address in ("http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"):
        assert RemoteConfig(endpoint=address, model="m").endpoint == "http://h:1/v1"


# ---------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_may_pass_is_tried_again(server: ChatServer, status: int, streaming: bool) -> None:
    server.acts = [refusal(status, "busy"), Act(cut=True)] if not streaming else [refusal(status, "busy")]
    speaker = remote(server)
    said = "".join(speaker.stream(ASKED)) if streaming else speaker.say(ASKED)
    assert said == "an apple"
    assert len(server.bodies) == len(server.times) == 2 + (not streaming)
    assert (speaker.usage.requests, speaker.usage.retried) == (1, 1 + (not streaming))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 307])
def test_what_will_not_pass_is_not_tried_again(server: ChatServer, status: int) -> None:
    server.acts = [refusal(status, "no\n  way", Location="http://127.0.0.1:9/v1/chat/completions")]
    with pytest.raises(IsthmusError, match=f"apple-1 at {server.endpoint}: HTTP {status}: no way") as caught:
        remote(server).say(ASKED)
    assert caught.value.remedy and len(server.bodies) == 1


def test_a_pause_that_the_server_asks_for_is_kept(server: ChatServer) -> None:
    server.acts = [refusal(429, "slow down", Retry_After="0.3")]
    remote(server, backoff=0).say(ASKED)
    assert server.times[1] - server.times[0] >= 0.3
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    for asked in ("90", later):
        server.acts = [refusal(503, "down", Retry_After=asked)]
        with pytest.raises(IsthmusError, match=r"a pause of (8\d|90) s"):
            remote(server, longest_wait=60).say(ASKED)
    server.acts = [refusal(429, "slow down", Retry_After="soon")]
    assert remote(server).say(ASKED) == "an apple"


def test_pauses_double_up_to_a_limit_and_differ(server: ChatServer) -> None:
    endpoint = remote(server, backoff=1, longest_wait=5)._endpoint
    for failures, longest in enumerate([1, 2, 4, 5, 5]):
        pauses = [endpoint._pause(failures) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in pauses) and len(set(pauses)) > 10


def test_attempts_end(server: ChatServer) -> None:
    server.acts = [refusal(503, "overloaded")] * 9
    with pytest.raises(IsthmusError, match=r"HTTP 503: overloaded \(3 attempts\)"):
        remote(server, retries=2).say(ASKED)
    assert len(server.bodies) == 3


def test_no_credit_is_no_rate_limit(server: ChatServer) -> None:
    server.acts = [refusal(429, "You exceeded your current quota", "insufficient_quota")]
    with pytest.raises(IsthmusError, match="no credit left"):
        remote(server).say(ASKED)
    assert len(server.bodies) == 1


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = RemoteConfig(endpoint=f"http://127.0.0.1:{port}/v1", model="m", backoff=0.01, retries=1)
    with pytest.raises(IsthmusError, match=r"no connection .* \(2 attempts\)\ncheck the address"):
        Remote(config).say(ASKED)


def test_silence_is_an_error_and_not_paid_for_twice(server: ChatServer) -> None:
    server.acts = [Act(silent=0.6)]
    with pytest.raises(IsthmusError, match=r"silent for 0\.2 s\nraise timeout"):
        remote(server, timeout=0.2).say(ASKED)
    assert len(server.bodies) == 1


# ---------------------------------------------------------------------------------------------- streaming


def test_a_stream_comes_in_pieces_and_is_counted(server: ChatServer) -> None:
    server.reply = lambda body: "a ripe äpple 🍎"
    speaker = remote(server, input_price=2, output_price=8)
    assert list(speaker.stream(ASKED)) == ["a", " ripe", " äpple", " 🍎"]
    assert server.bodies[0]["stream"] is True and server.bodies[0]["stream_options"] == {"include_usage": True}
    assert speaker.usage.cost == pytest.approx((1000 * 2 + 10 * 8) / 1e6)


def test_a_connection_lost_in_the_middle_is_an_error_and_not_kept(server: ChatServer, tmp_path: Path) -> None:
    server.acts = [Act(cut=True)]
    speaker, heard = remote(server, cache=tmp_path), []
    with pytest.raises(IsthmusError, match="lost in the middle"):
        for piece in speaker.stream(ASKED):
            heard.append(piece)
    assert heard == ["an"] and not list(tmp_path.rglob("*.json"))
    assert (speaker.usage.requests, speaker.usage.unmetered, len(server.bodies)) == (1, 1, 1)
    assert "".join(speaker.stream(ASKED)) == "an apple"


def test_a_listener_that_leaves_closes_the_connection(server: ChatServer) -> None:
    server.reply, server.drip = lambda body: "very " * 3000, 0.01
    speaker = remote(server)
    stream = speaker.stream(ASKED)
    assert next(stream) == "very"
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while server.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.busy == 0 and speaker.usage.unmetered == 1


def test_an_endpoint_that_does_not_stream_says_so(server: ChatServer) -> None:
    server.acts = [Act(body={"choices": [{"message": {"content": "x"}}]})]
    with pytest.raises(IsthmusError, match="does not stream"):
        list(remote(server).stream(ASKED))


def test_streamed_and_whole_answers_share_the_cache(server: ChatServer, tmp_path: Path) -> None:
    assert "".join(remote(server, cache=tmp_path).stream(ASKED)) == "an apple"
    again = remote(server, cache=tmp_path)
    assert again.say(ASKED) == "an apple" and list(again.stream(ASKED)) == ["an apple"]
    assert len(server.bodies) == 1 and again.usage.cached == 2


# ---------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"<html>It works!</html>", "malformed"),
        ({}, "choices: Field required"),
        ({"choices": []}, "choices: List should have at least 1 item"),
        ({"choices": [{"message": {"content": 7}}]}, "choices.0.message.content"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "no text, finish_reason 'length'"),
        ({"error": {"message": "upstream is gone", "code": 502}}, "upstream is gone"),
    ],
)
def test_malformed_replies_say_where(server: ChatServer, tmp_path: Path, body: Any, cause: str) -> None:
    server.acts = [Act(body=body)]
    speaker = remote(server, cache=tmp_path)
    with pytest.raises(IsthmusError, match=cause):
        speaker.say(ASKED)
    assert not list(tmp_path.rglob("*.json")) and (speaker.usage.requests, speaker.usage.unmetered) == (1, 1)


@pytest.mark.parametrize(
    "act",
    [
        Act(body={"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]}),
        Act(body={"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}),
        refusal(400, "The response was filtered", "content_filter"),
    ],
)
def test_refusals_are_told_apart(server: ChatServer, act: Act) -> None:
    server.acts = [act]
    with pytest.raises(Refused, match="refused"):
        remote(server).say(ASKED)
    server.acts = [act]
    assert remote(server, concurrency=1).replies(questions("a", "b")) == [None, "an apple"]


def test_a_refusal_is_kept_like_an_answer(server: ChatServer, tmp_path: Path) -> None:
    server.acts = [Act(body={"choices": [{"message": {"refusal": "I cannot."}, "finish_reason": "stop"}]})]
    for _ in range(2):
        with pytest.raises(Refused, match="I cannot"):
            remote(server, cache=tmp_path).say(ASKED)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("body", [{"error": "gone"}, [{"error": {"message": "gone"}}], {"detail": "gone"}, b"gone"])
def test_errors_are_read_in_every_dialect(server: ChatServer, body: Any) -> None:
    server.acts = [Act(status=404, body=body)]
    with pytest.raises(ConfigError, match="HTTP 404: gone\n.*model's name"):
        remote(server).say(ASKED)


# ---------------------------------------------------------------------------------------------- cache


def test_the_same_request_is_sent_once(server: ChatServer, tmp_path: Path) -> None:
    server.reply = lambda body: f"answer {len(server.bodies)}"
    asked = [Turn.say("user", Image(noise(6, 6)), "What?")]
    first = remote(server, cache=tmp_path).say(asked)
    again = remote(server, cache=tmp_path, retries=0, concurrency=1, timeout=5)
    assert again.say(asked) == first and (again.usage.cached, again.usage.requests) == (1, 0)
    others: list[dict[str, Any]] = [
        {"model": "apple-2"},
        {"seed": 1},
        {"max_tokens": 9},
        {"options": {"top_p": 0.1}},
        {"picture": {"side": 3}},
        {"endpoint": server.endpoint.replace("127.0.0.1", "localhost")},
    ]
    for other in others:
        remote(server, cache=tmp_path, **other).say(asked)
    remote(server, cache=tmp_path).say([Turn.say("user", Image(noise(6, 7)), "What?")])
    assert len(server.bodies) == 2 + len(others) == len(list(tmp_path.rglob("*.json")))
    assert not list(tmp_path.rglob("*.part"))


def test_equal_questions_at_the_same_time_are_sent_once(server: ChatServer, tmp_path: Path) -> None:
    server.pause = 0.05
    speaker = remote(server, cache=tmp_path)
    assert speaker.say_all(questions(*"aaaabbbb")) == ["an apple"] * 8
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == ["a", "b"]


def test_entries_can_be_read_and_hold_no_pictures(server: ChatServer, tmp_path: Path) -> None:
    remote(server, cache=tmp_path).say([Turn.say("user", Image(noise(50, 50)), "What?")])
    (file,) = tmp_path.rglob("*.json")
    entry = json.loads(file.read_text())
    assert entry["answer"]["text"] == "an apple" and entry["answer"]["model"] == "apple-1-0305"
    assert entry["request"]["body"]["messages"][0]["content"][0]["image_url"]["url"].startswith("sha256:")
    assert file.stat().st_size < 2000


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_named_and_asked_again(server: ChatServer, tmp_path: Path, damage: str) -> None:
    remote(server, cache=tmp_path).say(ASKED)
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    broken = {"cut": whole[:-9], "flip": whole.replace("an apple", "an appla"), "empty": "", "other": "[1]"}[damage]
    file.write_text(broken)
    said: list[str] = []
    speaker = Remote(RemoteConfig(endpoint=server.endpoint, model="apple-1", cache=tmp_path), said.append)
    assert speaker.say(ASKED) == "an apple" and len(server.bodies) == 2
    assert len(said) == 1 and str(file) in said[0] and "damaged" in said[0]
    assert file.read_text() == whole


def test_a_folder_that_cannot_be_written_is_named(server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsthmusError, match="cannot be written"):
        remote(server, cache=tmp_path / "file").say(ASKED)


# ---------------------------------------------------------------------------------------------- cost


def test_cost_is_tokens_times_price(server: ChatServer) -> None:
    speaker = remote(server, input_price=2.5, output_price=10)
    speaker.say_all(questions("a", "b", "c"))
    usage = speaker.usage
    assert (usage.requests, usage.input_tokens, usage.output_tokens) == (3, 3000, 30)
    assert usage.cost == pytest.approx(3 * (0.0025 + 0.0001))
    assert str(usage) == "3 requests, 0 answers from the cache, 3,000 tokens in, 30 out, cost 0.0078"


def test_the_budget_stops_and_nothing_is_lost(server: ChatServer, tmp_path: Path) -> None:
    each = 1000 * 1e-6 + 10 * 4e-6
    settings = {"input_price": 1, "output_price": 4, "cache": tmp_path, "concurrency": 1}
    asked = questions(*"abcdef")
    poor = remote(server, budget=2.5 * each, **settings)
    with pytest.raises(IsthmusError, match=rf"the budget of 0\.0026 is spent: 3 requests.*\nraise budget.*{tmp_path}"):
        poor.say_all(asked)
    assert len(server.bodies) == 3 and poor.usage.cost == pytest.approx(3 * each)
    rich = remote(server, budget=100 * each, **settings)
    assert rich.say_all(asked) == ["an apple"] * 6
    assert len(server.bodies) == 6 and (rich.usage.cached, rich.usage.requests) == (3, 3)


def test_at_most_the_requests_on_their_way_exceed_the_budget(server: ChatServer, tmp_path: Path) -> None:
    server.pause = 0.02
    speaker = remote(server, input_price=1, budget=0.0045, cache=tmp_path, concurrency=4)
    with pytest.raises(IsthmusError, match="is spent"):
        speaker.say_all(questions(*map(str, range(40))))
    assert 5 <= len(server.bodies) <= 5 + 3


def test_a_budget_needs_an_endpoint_that_counts(server: ChatServer, tmp_path: Path) -> None:
    server.usage = None
    speaker = remote(server, input_price=1, budget=1, cache=tmp_path)
    assert speaker.say(ASKED) == "an apple"
    with pytest.raises(IsthmusError, match="cannot be kept: 1 requests.*tokens untold"):
        speaker.say([Turn.say("user", "another")])


# ---------------------------------------------------------------------------------------------- many at once


def test_no_more_requests_at_once_than_allowed_and_answers_in_order(server: ChatServer) -> None:
    server.pause = 0.03
    server.reply = lambda body: "it is " + body["messages"][0]["content"]
    names = [str(number) for number in range(24)]
    assert remote(server, concurrency=3).say_all(questions(*names)) == [f"it is {name}" for name in names]
    assert server.busiest == 3


def test_after_an_error_nothing_more_is_sent(server: ChatServer, tmp_path: Path) -> None:
    server.acts = [Act(), refusal(400, "no")]
    server.pause = 0.02
    speaker = remote(server, concurrency=2, cache=tmp_path)
    with pytest.raises(IsthmusError, match="HTTP 400"):
        speaker.say_all(questions(*map(str, range(30))))
    assert len(server.bodies) < 10
    assert len(list(tmp_path.rglob("*.json"))) == len(server.bodies) - 1


# ---------------------------------------------------------------------------------------------- the key


def test_the_key_is_nowhere_but_in_the_header(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("TEST_KEY", f"  {KEY}\n")
    server.key = KEY
    speaker = remote(server, key_env="TEST_KEY", cache=tmp_path)
    assert speaker.say(ASKED) == "an apple"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    seen = [repr(speaker), repr(vars(speaker)), speaker.config.model_dump_json(), str(speaker.usage), caplog.text]
    seen += [file.read_text() for file in tmp_path.rglob("*.json")]
    server.key = "another"  # the server repeats the wrong key in its complaint
    for act in (Act(), refusal(500, f"Bearer {KEY} is odd"), Act(body=f"what is {KEY}?".encode())):
        server.acts = [act] * 2
        with pytest.raises(IsthmusError) as caught:
            remote(server, key_env="TEST_KEY", retries=1).say(ASKED)
        seen += [str(caught.value), "".join(traceback.format_exception(caught.value))]
    assert "[key]" in seen[-2] + seen[-4] + seen[-6]
    assert len(seen) == 12 and not any(KEY in text for text in seen)


def test_a_missing_or_impossible_key_is_told_before_anything_is_sent(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="TEST_KEY holds no key\nexport TEST_KEY"):
        remote(server, key_env="TEST_KEY").say(ASKED)
    monkeypatch.setenv("TEST_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(ConfigError, match="cannot be a key") as caught:
        remote(server, key_env="TEST_KEY").say(ASKED)
    assert KEY not in str(caught.value) and server.bodies == []


def test_a_wrong_key_says_which_variable_to_look_at(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = KEY
    monkeypatch.setenv("TEST_KEY", "sk-wrong")
    with pytest.raises(ConfigError, match=r"HTTP 401: .*\ncheck the key in TEST_KEY"):
        remote(server, key_env="TEST_KEY").say(ASKED)
    with pytest.raises(ConfigError, match=r"HTTP 401: .*\nname the key's variable in key_env"):
        remote(server).say(ASKED)


def test_a_full_cache_needs_neither_key_nor_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with running() as server:
        config = RemoteConfig(endpoint=server.endpoint, model="apple-1", key_env="TEST_KEY", cache=tmp_path)
        Remote(config).say(ASKED)
    monkeypatch.delenv("TEST_KEY")
    with Remote(config) as speaker:
        assert speaker.say(ASKED) == "an apple"
