"""Limits, one below and one above; what strangers send in place of pictures and requests; who may ask."""

from __future__ import annotations

import base64
import json
import math
import socket
import struct
import sys
import threading
import time
import zlib
from io import BytesIO

import httpx2
import pytest
from http_server import KEY, NAME, data_url, encoded, running, said, shown, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

import composed
from isthmus.serving import bodies
from isthmus.serving.engine import Sizes
from isthmus.serving.grammar import Grammars
from isthmus.serving.intake import from_data_url
from isthmus.serving.limits import Limits
from isthmus.serving.protocol import ChatRequest, turns
from isthmus.serving.refusals import Refusal
from isthmus.types import ConfigError

SMALL = Limits(
    body=200_000,
    encoded=100_000,
    pictures=2,
    pixels=400 * 300,
    all_pixels=400 * 300 + 4,
    longest=1000,
    messages=6,
    parts=8,
    text=500,
    stops=2,
    stop_length=5,
    tools=2,
    schema=300,
    inputs=3,
    tokens=8,
    reading=2.0,
    attention=4 * 4 * 100 * 100,
)
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def served():
    with running(composed.model("llama"), Sizes(batch=3, context=200), limits=SMALL) as (server, address):
        yield server, address


@pytest.fixture(scope="module")
def post(served):
    with httpx2.Client(base_url=served[1], headers=HEADERS, timeout=60) as client:

        def send(messages=None, path="/v1/chat/completions", raw=None, **more):
            body = {"model": NAME, "max_tokens": 2, "temperature": 0} | more
            if messages is not None:
                body["messages"] = messages
            headers = {"Content-Type": "application/json"}
            return client.post(path, content=json.dumps(body).encode() if raw is None else raw, headers=headers)

        yield send


def refused(response, status, code=None) -> str:
    """The error's message, once it has the protocol's form and says nothing that it should not."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and (code is None or error["code"] == code), error
    for leak in ("/", "0x", "Traceback", "File ", "PIL", "torch", KEY):
        if leak != "/":
            assert leak not in response.text
    assert "/work" not in response.text and "/usr" not in response.text and "site-packages" not in response.text
    return error["message"]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says so; without data nothing can be decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def one_colour(width: int, height: int) -> bytes:
    return png(width, height, zlib.compress(bytes((width + 7) // 8 + 1) * height, 9))


# ---------------------------------------------------------------------------------------------- one below, one above


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"n": 3}, {"n": 4}),
        ({"stop": ["a" * 5, "b"]}, {"stop": ["a", "b", "c"]}),
        ({"stop": "a" * 5}, {"stop": "a" * 6}),
        ({"stop": "a"}, {"stop": ""}),
        ({"temperature": 2}, {"temperature": 2.01}),
        ({"top_p": 1}, {"top_p": 0}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.1}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.1}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
        ({"logprobs": True}, {"top_logprobs": 1}),
        ({"seed": 2**63 - 1}, {"seed": 2**63}),
        ({"max_tokens": 1}, {"max_tokens": 0}),
        ({"max_tokens": 1 << 60}, {"max_tokens": "1"}),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "json_schema"}}),
        ({"stream": False}, {"stream": "false"}),
        ({"user": "u", "chat_template": "{{ 1 }}", "unknown": [1]}, {"tool_choice": "required"}),
    ],
    ids=str,
)
def test_fields(within, beyond, post):
    assert post(user(said("hi")), **within).status_code == 200
    refused(post(user(said("hi")), **beyond), 400)


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


def test_numbers_of_things(post):
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant") * 3][:5]
    system = {"role": "system", "content": "a"}
    assert post([system, *talk]).status_code == 200
    assert refused(post([*talk, *talk[1:3]]), 400) == "more than 6 messages"
    assert post(user(*[said("a")] * 8)).status_code == 200
    refused(post(user(*[said("a")] * 9)), 400)
    assert post(user(shown(1), shown(2))).status_code == 200
    refused(post(user(shown(1), shown(2), shown(3))), 400, "too_many_images")
    refused(post(user(*[shown(1)] * 8) * 5), 400, "too_many_images")
    refused(post(user(said("a" * 500))), 400, "context_length_exceeded")
    refused(post(user(said("a" * 501))), 400, "string_above_max_length")
    assert post(user(said("a")), tools=[tool("a"), tool("b")], tool_choice="none").status_code == 200
    three = [tool("a"), tool("b"), tool("c")]
    assert refused(post(user(said("a")), tools=three, tool_choice="none"), 400) == "more than 2 tools"
    refused(post(user(said("a")), tools=[tool("a b")]), 400)
    schema = {"type": "object", "properties": {"a" * 200: {"type": "null"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert post(user(said("a")), response_format=form).status_code == 200
    schema["properties"]["a" * 200]["description"] = "b" * 100
    refused(post(user(said("a")), response_format=form), 400)
    path = "/v1/embeddings"
    assert post(path=path, input=["a"] * 3).status_code == 200
    for wrong in (["a"] * 4, [], [""], [[1, 2]], [shown(1)] * 3, 7):
        refused(post(path=path, input=wrong), 400)
    refused(post(path=path, input="a", dimensions=3), 400)


def test_text_counts_wherever_it_stands(post):
    long = {"type": "object", "description": "d" * 500}
    refused(post(user(said("a")), tools=[tool("a", long)]), 400, "string_above_max_length")
    assert post(user(said("a")), tools=[tool("a", long)], tool_choice="none").status_code == 200
    path = "/v1/embeddings"
    refused(post(path=path, input=[said("a" * 501)]), 400, "string_above_max_length")
    assert post(path=path, input=[said("0" * 200)]).status_code == 200  # a digit is a token, the context holds 200
    refused(post(path=path, input=[said("0" * 201)]), 400, "context_length_exceeded")
    call = {"id": "a", "type": "function", "function": {"name": "a", "arguments": ""}}
    talk = [*user(said("a")), {"role": "assistant", "tool_calls": [call] * 9}, *user(said("a"))]
    assert "tool calls" in refused(post(talk), 400)


def test_a_long_text_leaves_the_others_their_turn(served):
    turns, over = [0], threading.Event()

    def count():
        while not over.is_set():
            turns[0] += 1
            time.sleep(0.001)

    beside = threading.Thread(target=count)
    beside.start()
    time.sleep(0.05)
    before = turns[0]
    served[0].engine.renderer.plain("a" * (1 << 19))  # half a second
    during = turns[0] - before
    over.set()
    beside.join()
    assert during > 10


def test_the_context(post, served):
    frame = post(user(said("0"))).json()["usage"]["prompt_tokens"] - 1
    usage = post(user(said("0" * (199 - frame))), max_tokens=50).json()["usage"]  # a digit is a token
    assert served[0].engine.context == 200 and usage["prompt_tokens"] == 199 and usage["total_tokens"] == 200
    assert "200 tokens" in refused(post(user(said("0" * (200 - frame)))), 400, "context_length_exceeded")


def test_the_attention_of_which_a_map_is_drawn(post, served):
    def map_of(text):
        return post(user(shown(1), said(text)), path="/page/attention")

    frame = post(user(shown(1), said("0"))).json()["usage"]["prompt_tokens"] - 1
    heads = served[0].engine.model.config.text_config.num_attention_heads
    most = math.isqrt(SMALL.attention // (4 * heads))
    assert SMALL.attention == 4 * heads * most**2
    assert len(map_of("0" * (most - frame)).json()["maps"]) == 1
    assert f"at most {most}" in refused(map_of("0" * (most - frame + 1)), 400, "context_length_exceeded")
    assert post(user(shown(1), said("0" * (most - frame + 1)))).status_code == 200


def test_bodies(post, served):
    frame = json.dumps({"model": NAME, "messages": user(said("hi")), "max_tokens": 1, "padding": ""})
    fits = frame[:-2] + "x" * (SMALL.body - len(frame)) + frame[-2:]
    assert len(fits) == SMALL.body and post(raw=fits.encode()).status_code == 200
    refused(post(raw=fits.encode() + b" "), 413, "body_too_large")
    for raw in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}', b'"a"', b"1" * 10_000):
        refused(post(raw=raw), 400)
    refused(post(raw=b"[" * 100_000), 400)
    nested = ['{"a":' * (depth - 1) + "1" + "}" * (depth - 1) for depth in (200, 201)]
    within, beyond = (f'{frame[:-1]}, "unknown": {each}}}'.encode() for each in nested)
    assert post(raw=within).status_code == 200 and "too deeply" in refused(post(raw=beyond), 400)
    refused(post(raw=b'{"messages":' * 10_000), 400)
    deep = '{"type":"object","properties":{"a":' * 60 + "{}" + "}}" * 60
    form = f'{{"type":"json_schema","json_schema":{{"schema":{deep}}}}}'
    refused(post(raw=frame[:-1].encode() + b', "response_format": ' + form.encode() + b"}"), 400)
    assert served[0].bodies.held == 0


@pytest.mark.parametrize(("size", "status"), [(16_384, b" 200 "), (16_385, b" 400 ")])
def test_the_size_of_a_head_that_is_not_whole(size, status, served):
    host, port = served[1].removeprefix("http://").split(":")
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
    with socket.create_connection((host, int(port)), 60) as link:
        link.sendall(head + b"x" * (size - len(head) - 3) + b"\r\n\r")
        if status == b" 200 ":
            time.sleep(1)  # it has read all of it by now, and waits for more
            link.sendall(b"\n")
        assert status in link.recv(64)


BROUGHT = {"injected": "OWNED", "add_generation_prompt": False, "messages": [], "eos_token": "OWNED"}


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template_kwargs": BROUGHT},
        {"chat_template": "OWNED"},
        {"documents": [{"title": "OWNED", "text": "OWNED"}]},
        {"prompt_token_ids": [1, 2, 3], "add_generation_prompt": False, "continue_final_message": True},
        BROUGHT | {"messages": None},
    ],
    ids=["arguments", "template", "documents", "ids", "at the top"],
)
def test_no_caller_brings_a_template_or_its_arguments(field):
    """The template says whatever it is given; nothing of it reaches the prompt."""
    model = composed.model("llama")
    tokenizer = model.processor.tokenizer
    tokenizer.chat_template += "{{ injected }}{{ documents or '' }}"
    with running(model) as (server, address), httpx2.Client(base_url=address, headers=HEADERS, timeout=60) as client:
        body = {"model": NAME, "max_tokens": 2, "temperature": 0, "messages": user(said("hi"))}
        heard = []
        prepare = server.engine.prepare
        server.engine.prepare = lambda *asked: heard.append(prepare(*asked)) or heard[-1]
        for asked in (body, field | body):
            assert client.post("/v1/chat/completions", json=asked).status_code == 200
    plain, brought = heard
    assert brought.ids == plain.ids and "OWNED" not in tokenizer.decode(brought.ids)


def test_the_pictures_sizes(post):
    def sent(raw, form="png"):
        return post(user({"type": "image_url", "image_url": {"url": data_url(raw, form)}}))

    assert sent(one_colour(400, 300)).status_code == 200
    refused(sent(one_colour(401, 300)), 413, "image_too_large")
    assert sent(one_colour(1000, 5)).status_code == 200
    refused(sent(one_colour(1001, 6)), 413, "image_too_large")
    assert sent(one_colour(400, 2)).status_code == 200
    refused(sent(one_colour(401, 2)), 400, "invalid_image")
    refused(sent(one_colour(20, 1)), 400, "invalid_image")
    whole, corner = (data_url(one_colour(*size)) for size in ((400, 300), (2, 2)))
    both = [{"type": "image_url", "image_url": url} for url in (whole, corner)]
    assert post(user(*both)).status_code == 200
    more = {"type": "image_url", "image_url": data_url(one_colour(3, 2))}
    assert "together" in refused(post(user(both[0], more)), 413, "image_too_large")
    url = encoded(1)
    padded = url + "A" * (SMALL.encoded - len(url))
    assert refused(post(user({"type": "image_url", "image_url": padded})), 400) != refused(
        post(user({"type": "image_url", "image_url": padded + "A"})), 413, "image_too_large"
    )
    bomb = one_colour(20_000, 20_000)
    begun = time.process_time()
    refused(sent(bomb), 413, "image_too_large")
    refused(sent(png(2**31 - 1, 2**31 - 1)), 413, "image_too_large")
    assert time.process_time() - begun < 0.5  # nothing was decoded


# ---------------------------------------------------------------------------------------------- what is no picture


def animated(frames: int) -> bytes:
    first, *others = [Pillow.new("RGB", (8, 8), (n % 256, 0, 0)) for n in range(frames)]
    out = BytesIO()
    first.save(out, "PNG", save_all=True, append_images=others)
    return out.getvalue()


def formats(form: str, mode: str = "RGB") -> bytes:
    out = BytesIO()
    Pillow.new(mode, (8, 8)).save(out, form)
    return out.getvalue()


def test_pictures_of_every_kind_that_is_taken(post):
    kinds = [
        ("png", "RGBA"),
        ("png", "P"),
        ("png", "I;16"),
        ("jpeg", "CMYK"),
        ("jpeg", "L"),
        ("webp", "RGB"),
        ("gif", "P"),
    ]
    for form, mode in kinds:
        raw = formats(form, mode)
        assert post(user({"type": "image_url", "image_url": {"url": data_url(raw, "png")}})).status_code == 200, (
            form,
            mode,
        )
    assert post(user({"type": "image_url", "image_url": data_url(animated(50), "png")})).status_code == 200


BAD = {
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "pdf": b"%PDF-1.7\n1 0 obj",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system",
    "jpeg2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64),
    "bmp": formats("bmp"),
    "tiff": formats("tiff"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "nothing": b"",
    "truncated": one_colour(300, 300)[:-30],
    "cut jpeg": formats("jpeg")[:200],
    "no data": png(8, 8),
    "html": b"<html>",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_refused_in_our_words(kind, post):
    message = refused(
        post(user({"type": "image_url", "image_url": {"url": data_url(BAD[kind])}})), 400, "invalid_image"
    )
    assert message in ("a picture must be PNG, JPEG, WebP or GIF", "a picture is damaged or cut short")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/a.png",
        "gopher://localhost",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:text/html;base64,PGI+",
        "data:image/png,raw",
        "data:image/png;base64,%%%%",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA AA",
        "data:;base64,AAAA",
        "",
    ],
)
def test_urls_that_are_no_picture(url, post, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name was resolved"))
    refused(post(user({"type": "image_url", "image_url": {"url": url}})), 400)


def test_parts_and_roles_that_are_not_taken(post):
    picture = {"type": "image_url", "image_url": {"url": encoded(1)}}
    wrong = [
        [],
        [{"role": "user"}],
        [{"role": "wizard", "content": "hi"}],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}],
        [{"role": "system", "content": [picture]}, *user(said("hi"))],
        user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        user({"type": "video_url", "video_url": {"url": "x"}}),
        user({"type": "image_embeds", "image_embeds": "AAAA"}),
        user({"type": "image_url"}),
        user({"type": "text"}),
        [{"role": "user", "content": 7}],
    ]
    for messages in wrong:
        refused(post(messages), 400)


# ---------------------------------------------------------------------------------------------- who may ask


def raw(address: str, request: bytes) -> bytes:
    """What the server says to bytes as they are."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as link:
        link.sendall(request)
        link.shutdown(socket.SHUT_WR)
        pieces = []
        while piece := link.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("given", [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/models/tiny"])
def test_a_wrong_key(given, path, served):
    headers = {} if given is None else {"Authorization": given}
    assert KEY not in refused(httpx2.get(served[1] + path, headers=headers), 401, "invalid_api_key")


def test_no_way_around_the_key(served):
    _, address = served
    for path in ("//v1/models", "/v1//models", "/V1/models", "/v1%2fmodels", "/v1/models/", "/health/../v1/models",
                 "/v1/./models", "/docs", "/openapi.json", "/redoc", "/health/", "/metrics/"):  # fmt: skip
        for host in ("localhost", "127.0.0.1:1", "LOCALHOST:80", "[::1]:8000"):
            answer = raw(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            assert answer.split(b" ")[1] in (b"401", b"404", b"405", b"307") and b"owned_by" not in answer, (
                path,
                answer,
            )


def test_names_that_the_server_does_not_have(served):
    _, address = served
    hosts = [
        "evil.example",
        "localhost.evil.example",
        "localhost@evil",
        "127.0.0.1.evil",
        "",
        "localhost:80:80",
        "localhost:x",
    ]
    lines = [f"Host: {host}\r\n" for host in hosts] + ["Host: localhost\r\nX-Forwarded-Host: a\r\nHost: evil\r\n"]
    for line in lines:
        request = f"GET /health HTTP/1.1\r\n{line}Connection: close\r\n\r\n"
        assert raw(address, request.encode()).split(b" ")[1] in (b"421", b"400"), line
    told = raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").lower()
    assert b"200 ok" in told and b"access-control" not in told and b"nosniff" in told and b"server:" not in told


def test_a_page_of_another_origin_gets_nothing(served):
    _, address = served
    body = json.dumps({"model": NAME, "messages": user(said("hi"))})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = HEADERS | {"Content-Type": kind, "Origin": "https://evil.example"}
        refused(httpx2.post(f"{address}/v1/chat/completions", content=body, headers=headers), 415)
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx2.options(f"{address}/v1/chat/completions", headers=asked)
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


def test_another_model_method_or_path(post, served):
    refused(post(user(said("hi")), model="gpt-4"), 404, "model_not_found")
    refused(httpx2.get(f"{served[1]}/v1/chat/completions", headers=HEADERS), 405)
    refused(httpx2.get(f"{served[1]}/nothing", headers=HEADERS), 404)


# ---------------------------------------------------------------------------------------------- time and memory


def test_slow_clients_hold_nobody_up(served, post):
    server, address = served
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
    links = []
    for number in range(200):
        links.append(socket.create_connection((host, int(port))))
        whole = number % 2 == 0
        links[-1].sendall(
            head + (b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{" if whole else b"X-A: ")
        )
    begun = time.monotonic()
    assert post(user(shown(4), said("hi"))).status_code == 200 and time.monotonic() - begun < 20
    links[0].settimeout(30)
    assert b" 408 " in links[0].recv(65536)
    for link in links:
        link.close()
    end = time.monotonic() + 30
    while server.bodies.held and time.monotonic() < end:
        time.sleep(0.01)
    assert server.bodies.held == server.bodies.entering == 0


def test_bodies_together_have_a_bound(served, post, monkeypatch):
    monkeypatch.setattr(bodies, "HELD", 50_000)
    assert post(user(said("hi"))).status_code == 200
    refused(post(raw=b"{" + b" " * 60_000), 429, "queue_full")
    assert served[0].bodies.held == 0


def test_an_error_of_the_programs_own_says_nothing(served, monkeypatch):
    server, address = served

    def fails(*asked):
        raise RuntimeError("/secret/path at 0x7f")

    monkeypatch.setattr(server.engine, "prepare", fails)
    body = {"model": NAME, "messages": user(said("hi"))}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, headers=HEADERS)
    assert refused(answer, 500, "internal_error") == "the server failed on this request"
    monkeypatch.undo()
    assert httpx2.post(f"{address}/v1/chat/completions", json=body, headers=HEADERS).status_code == 200


def test_turns_that_the_chat_template_refuses_are_the_users_to_change(served, post, monkeypatch):
    tokenizer = served[0].engine.model.processor.tokenizer
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", strict + tokenizer.chat_template)
    monkeypatch.setattr(served[0].engine, "renderer", served[0].engine.model.processor.renderer())
    messages = [{"role": "system", "content": "be brief"}, *user(said("hi"))]
    for path in ("/v1/chat/completions", "/page/attention"):
        answer = post(messages, path=path)
        assert refused(answer, 400).endswith("no system role") and answer.json()["error"]["param"] == "messages"
    assert post(user(said("hi"))).status_code == 200


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_ours(served, caplog):
    server, address = served
    left = server.metrics.requests.labels("refused", "499")
    before = left._value.get()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address.removeprefix("http://").split(":")) as link:
        link.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        end = time.monotonic() + 10
        while not server.bodies.held and time.monotonic() < end:
            time.sleep(0.01)
    while left._value.get() == before and time.monotonic() < end:
        time.sleep(0.01)
    assert left._value.get() == before + 1 and server.bodies.held == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_tools_result_says_the_same_as_text_and_in_parts():
    def told(content):
        call = {"id": "a", "type": "function", "function": {"name": "measure", "arguments": "{}"}}
        messages = [
            *user(said("how long?")),
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": content},
        ]
        asked = ChatRequest.model_validate({"model": NAME, "messages": messages})
        return "".join(part.text for part in turns(asked, SMALL, lambda url: None)[-1].parts)

    assert told("4 cm") == told([said("4 "), said("cm")]) == "<tool_response>4 cm</tool_response>"


def test_text_beside_a_call_goes_back_as_it_was_said():
    call = {"id": "a", "type": "function", "function": {"name": "measure", "arguments": "{}"}}
    messages = [*user(said("how long?")), {"role": "assistant", "content": "I measure.", "tool_calls": [call]}]
    asked = ChatRequest.model_validate({"model": NAME, "messages": [*messages, *user(said("and?"))]})
    told = "".join(part.text for part in turns(asked, SMALL, lambda url: None)[1].parts)
    assert told == 'I measure.\n<tool_call>{"name": "measure", "arguments": {}}</tool_call>'


def test_a_missing_llguidance_is_said_with_what_to_install(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ConfigError, match="pip install"):
        Grammars(served[0].engine.model.processor.tokenizer).schema({"type": "object"})


def test_base64_is_read_strictly():
    assert base64.b64decode("AA==AA", validate=False)  # what a lax reader makes of it
    with pytest.raises(Refusal):
        from_data_url("data:image/png;base64,AA==AA", SMALL.encoded)


# ---------------------------------------------------------------------------------------------- anything at all

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(ChatRequest.model_fields)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4), st.none() | JUNK, st.none() | JUNK)
def test_any_body_is_answered_or_refused_in_order(post, served, changed, role, content):
    message = {"role": "user" if role is None else role, "content": "hi" if content is None else content}
    response = post(raw=json.dumps({"model": NAME, "max_tokens": 1, "messages": [message]} | changed).encode())
    assert response.status_code in (200, 400, 404) and served[0].engine.alive
    if response.status_code != 200:
        refused(response, response.status_code)
