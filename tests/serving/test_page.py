"""The chat page: what it may load, who may ask for what, and real clicks in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from importlib.resources import files

import httpx2
import pytest
import torch
from http_server import KEY, NAME, running, said, shown, user

import composed
import page_checks
from composed import picture
from isthmus.evaluation.gap.states import attention_map
from isthmus.serving import browser
from isthmus.serving.http import Access
from isthmus.serving.limits import Limits
from isthmus.types import Turn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def model():
    return composed.stir(composed.model("llama", "llava", {"projector": "linear"}))


@pytest.fixture(scope="module")
def served(model):
    with running(model) as both:
        yield both


@pytest.fixture(scope="module")
def address(served):
    return served[1]


class Tags(HTMLParser):
    """All tags with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_comes_from_this_server_alone(address):
    reply = httpx2.get(address + "/")
    assert page_checks.faults(reply.text) == []
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    tags = Tags(reply.text).found
    assert not [attrs for _, attrs in tags if any(name.startswith("on") or name == "style" for name in attrs)]
    linked = [attrs.get("src") or attrs.get("href") for tag, attrs in tags if tag in ("script", "link", "img")]
    assert linked and all(re.fullmatch(r"/page/[\w.]+", link) for link in linked)
    for link in linked:
        part = httpx2.get(address + link)
        assert part.status_code == 200
        assert part.headers["content-type"] == browser.TYPES[link.removeprefix("/page/")]
        assert "http://" not in part.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in part.text


def test_every_field_of_the_page_has_a_name_to_be_read_out(address):
    tags = Tags(httpx2.get(address + "/").text).found
    labelled = {attrs.get("for") for tag, attrs in tags if tag == "label"}
    page = (files("isthmus.serving") / "page" / "index.html").read_text()
    for tag, attrs in tags:
        if tag in ("input", "textarea"):
            wrapped = re.search(rf'<label[^>]*>[^<]+[^\n]*name="{attrs.get("name")}"', page)
            assert attrs.get("id") in labelled or wrapped, attrs


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../http.py", "/page/%2e%2e/http.py", "/page/none.js", "/page/index.html/x"]
)
def test_no_other_file_is_given_out(address, path):
    assert httpx2.get(address + path).status_code == 404


def test_facts_and_maps_want_the_key(address):
    assert httpx2.get(address + "/page/facts").status_code == 401
    assert httpx2.post(address + "/page/attention", json={}).status_code == 401
    told = httpx2.get(address + "/page/facts", headers=WITH_KEY).json()
    assert told["model"] == NAME and told["attention"] and told["aspect"] == "pad" and told["facts"]["Joint"] == "llava"
    assert told["facts"]["Language model"].startswith("llm-llama (") and "/" not in "".join(told["facts"].values())


def test_maps_are_those_of_the_model_alone(address, model):
    body = {"model": NAME, "messages": user(said("a "), shown(1), said(" b "), shown(2))}
    maps = httpx2.post(address + "/page/attention", json=body, headers=WITH_KEY).json()["maps"]
    expected = attention_map(model, [Turn.say("user", "a ", picture(1), " b ", picture(2))])
    assert len(maps) == 2
    for found, alone in zip(maps, expected):
        assert [x for row in found for x in row] == pytest.approx(alone.flatten().tolist(), abs=1e-6)
    assert 0 < sum(x for each in maps for row in each for x in row) < 1


def test_a_model_without_an_image_encoder_has_no_maps():
    model = composed.model("llama", "llava", {"projector": "linear"})
    assert browser.has_maps(model)
    model.encoders, model.connectors = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    assert not browser.has_maps(model)


def test_a_conversation_without_a_picture_has_no_map(address):
    reply = httpx2.post(
        address + "/page/attention", json={"model": NAME, "messages": user(said("hi"))}, headers=WITH_KEY
    )
    assert reply.status_code == 400 and "no picture" in reply.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- a real browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    page = chromium.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(address + "/")
    yield page
    page.close()


def with_key(page, tokens=6):
    page.click("#settings-open")
    page.fill("input[name=key]", KEY)
    page.fill("input[name=max_tokens]", str(tokens))
    page.keyboard.press("Escape")
    page.locator("#facts dd").first.wait_for()


def attach(page, tmp_path, seed=1, size=None):
    file = tmp_path / f"{seed}.png"
    (picture(seed).source if size is None else picture(seed).source.resize(size)).save(file)
    page.set_input_files("#files", file)
    page.locator("#tray img").wait_for()


@pytest.mark.timeout(120)
def test_asking_about_a_picture(page, tmp_path, address):
    with_key(page)
    attach(page, tmp_path)
    page.fill("#question", "what is it?")
    page.press("#question", "Enter")
    page.locator(".assistant .tools").wait_for()
    body = {"model": NAME, "messages": user(shown(1), said("what is it?")), "temperature": 0, "max_tokens": 6}
    reply = httpx2.post(address + "/v1/chat/completions", json=body, headers=WITH_KEY).json()
    assert page.locator(".assistant .said").text_content() == reply["choices"][0]["message"]["content"]
    assert f"{reply['usage']['prompt_tokens']} tokens read" in page.locator(".assistant .tools").text_content()
    assert page.locator("#tray img").count() == 0 and page.locator(".user .picture img").count() == 1
    page.click("text=Try again")
    page.locator(".assistant .tools").wait_for()
    assert page.locator(".assistant").count() == 1
    page.click("#clear")
    assert page.locator("#log li").count() == 0 and page.locator("#welcome").is_visible()
    assert [each for each in page.complaints if "401" not in each] == []


@pytest.mark.timeout(120)
def test_stop_keeps_what_was_said_and_frees_the_servers_row(page, served, monkeypatch):
    engine = served[0].engine
    right = engine.pool.step
    monkeypatch.setattr(engine.pool, "step", lambda ids: (time.sleep(0.1), right(ids))[1])
    with_key(page, tokens=200)
    page.fill("#question", "hi")
    page.press("#question", "Enter")
    page.wait_for_function("() => document.querySelector('.assistant .said')?.textContent")
    assert engine.running == 1 and page.locator("#send").is_hidden()
    page.click("#stop")
    page.locator(".assistant .tools", has_text="stopped").wait_for()
    said, end = page.locator(".assistant .said").text_content(), time.monotonic() + 10
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert said and not engine.running and engine.counts.cancelled == 1
    page.fill("#question", "and?")
    page.click("#send")  # what was said so far is the answer, and the conversation goes on
    page.locator(".assistant").nth(1).wait_for()
    page.click("#stop")
    assert page.locator(".assistant .said").first.text_content() == said


@pytest.mark.timeout(120)
def test_a_picture_that_the_server_would_refuse_is_made_smaller_and_an_empty_answer_says_so(page, tmp_path):
    with_key(page)
    attach(page, tmp_path, size=(10_100, 101))
    page.locator("#status", has_text="1.png was made smaller: 2048 × 20 pixels.").wait_for()
    page.fill("#question", "what is it?")
    page.click("#send")
    page.locator(".assistant .tools").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed("")))
    page.fill("#question", "nothing?")
    page.click("#send")
    page.get_by_text("The model said nothing.").wait_for()


@pytest.mark.timeout(120)
def test_attention_is_drawn_over_the_picture_and_taken_away(page, tmp_path):
    with_key(page)
    attach(page, tmp_path, size=(640, 320))  # larger than it is shown
    page.fill("#question", "what?")
    page.click("#send")
    switch = page.get_by_role("button", name="Where it looked")
    switch.click()
    canvas = page.locator(".picture canvas")
    canvas.wait_for()
    assert "looked at it" in canvas.get_attribute("aria-label")
    drawn, seen = canvas.bounding_box(), page.locator(".picture img").bounding_box()
    assert drawn["width"] == drawn["height"] == pytest.approx(seen["width"])  # the square with its margins
    assert drawn["y"] + drawn["height"] / 2 == pytest.approx(seen["y"] + seen["height"] / 2)
    assert switch.get_attribute("aria-pressed") == "true"
    page.fill("#question", "and again?")
    page.press("#question", "Enter")
    switch.nth(1).click()  # of the same picture by a later answer: one map is shown at a time
    page.wait_for_function("() => document.querySelectorAll('.look')[1].ariaPressed === 'true'")
    assert canvas.count() == 1 and switch.nth(0).get_attribute("aria-pressed") == "false"
    switch.nth(1).click()
    assert canvas.count() == 0 and switch.nth(1).get_attribute("aria-pressed") == "false"


def streamed(text):
    """A stream of one event, as the server would send it."""
    event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    return {"content_type": "text/event-stream", "body": f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"}


@pytest.mark.timeout(120)
def test_the_end_of_a_long_answer_stands_above_the_composer_unless_one_reads_further_up(page):
    with_key(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed("a line\n" * 200)))
    page.fill("#question", "much?")
    page.press("#question", "Enter")
    page.locator(".assistant .tools").wait_for()
    gap = """() => document.querySelector('#composer').getBoundingClientRect().top
      - document.querySelector('#log').lastElementChild.getBoundingClientRect().bottom"""
    page.wait_for_function(f"() => ({gap})() >= 0")
    page.mouse.wheel(0, -600)
    page.wait_for_function(f"() => ({gap})() < -300")
    place = page.evaluate("() => window.scrollY")
    page.evaluate("() => { document.querySelector('.assistant .said').textContent += 'more\\n'.repeat(50); }")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("() => window.scrollY") == place


@pytest.mark.timeout(120)
def test_markdown_becomes_elements_and_html_stays_text(page):
    with_key(page)
    text = (
        "# Cats\n\n**Two** cats, *one* mat, 2 * 3 * 4, `a*b*c` <img src=x onerror=alert(1)>\nsecond line\n"
        "- a [link](http://x.y)\n- b **c\n\n3. three\n4. four\n```python\n# not a **heading**\n- nor a list\n"
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed(text)))
    page.fill("#question", "what?")
    page.press("#question", "Enter")
    page.locator(".assistant .tools").wait_for()
    said = page.locator(".assistant .said")
    assert said.evaluate("(node) => [...node.children].map((each) => each.tagName)") == ["H3", "P", "UL", "OL", "PRE"]
    assert said.locator("p").inner_html() == (
        "<strong>Two</strong> cats, <em>one</em> mat, 2 * 3 * 4, <code>a*b*c</code> "
        "&lt;img src=x onerror=alert(1)&gt;\nsecond line"
    )
    assert said.locator("ul li").all_inner_texts() == ["a [link](http://x.y)", "b **c"]
    assert said.locator("ol").get_attribute("start") == "3"
    assert said.locator("pre").text_content() == "# not a **heading**\n- nor a list\n"


@pytest.mark.timeout(120)
def test_an_answer_is_copied_and_nothing_is_not_sent(page):
    with_key(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    assert page.is_disabled("#send")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed("a cat\non a mat")))
    page.fill("#question", "what?")
    page.click("#send")
    page.click("text=Copy")
    page.locator("#status", has_text="Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == "a cat\non a mat"
    assert page.is_disabled("#send")


@pytest.mark.timeout(120)
def test_a_failed_question_goes_back_to_where_it_was_written(page, tmp_path):
    page.locator("#status", has_text="API key").wait_for()
    attach(page, tmp_path)
    page.fill("#question", "what is it?")
    page.press("#question", "Enter")
    page.locator("#tray img").wait_for()
    assert page.input_value("#question") == "what is it?"
    assert page.locator("#log li").count() == 0
    assert "API key" in page.locator("#status").text_content()


@pytest.mark.timeout(120)
def test_what_was_typed_meanwhile_stands_behind_a_failed_question(page):
    page.locator("#status", has_text="API key").wait_for()
    page.route("**/v1/chat/completions", lambda route: (page.fill("#question", "and that?"), route.abort()))
    page.fill("#question", "what is it?")
    page.press("#question", "Enter")
    page.locator("#status", has_text="cannot be reached").wait_for()
    assert page.input_value("#question") == "what is it?\nand that?"


@pytest.mark.timeout(120)
def test_settings_close_where_the_server_gives_short_answers(chromium, model):
    with running(model, access=Access(), limits=Limits(tokens=64)) as (_, address):
        page = chromium.new_page()
        page.goto(address + "/")
        page.locator("#facts dd").first.wait_for(state="attached")
        assert page.input_value("input[name=max_tokens]") == "64"
        page.click("#settings-open")
        page.click("#settings button:not([type=button])")
        page.locator("#settings").wait_for(state="hidden")
        page.close()


@pytest.mark.timeout(120)
def test_a_dropped_and_a_pasted_picture_are_taken_and_other_files_refused(page):
    with_key(page)
    give = """async ([kind, type, url]) => {
      const data = new DataTransfer();
      const raw = await (await fetch(url)).blob();
      data.items.add(new File([raw], "x", { type }));
      const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
        : new DragEvent("drop", { dataTransfer: data, bubbles: true });
      document.querySelector("#question").dispatchEvent(event);
    }"""
    # a data URL is not among what the page may fetch, so the pixels come as a picture of this server
    page.evaluate(give, ["drop", "image/png", "/page/icon.svg"])
    page.locator("#tray img").first.wait_for()
    page.evaluate(give, ["paste", "image/jpeg", "/page/icon.svg"])
    page.locator("#tray img").nth(1).wait_for()
    page.evaluate(give, ["drop", "text/plain", "/page/icon.svg"])
    page.locator("#status", has_text="not a PNG").wait_for()
    assert page.locator("#tray img").count() == 2
    page.locator("#tray button").first.click()
    assert page.locator("#tray img").count() == 1


@pytest.mark.timeout(120)
def test_a_refusal_is_still_said_after_a_picture_that_was_taken(page):
    with_key(page)
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File(["a"], "notes.pdf", { type: "application/pdf" }));
      data.items.add(new File(["b"], "cat.png", { type: "image/png" }));
      document.querySelector("#question").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }""")
    page.locator("#tray img").wait_for()
    assert page.locator("#status").text_content() == "notes.pdf is not a PNG, JPEG, WebP or GIF picture."


@pytest.mark.timeout(120)
def test_the_page_can_be_used_with_the_keyboard_alone(page):
    with_key(page)
    page.locator("#question").focus()
    order = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        order.append(page.evaluate("() => document.activeElement.id"))
    assert order[:3] == ["files", "clear", "settings-open"]
    page.locator("#question").focus()
    page.keyboard.type("hi")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#question") == "hi\nthere"
    page.keyboard.press("Enter")
    page.locator(".assistant .tools").wait_for()
    assert page.evaluate("() => document.activeElement.id") == "question"
