"""Every page that Isthmus writes or serves: sound HTML, read by all, in light and dark, on telephones and on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import composed
import page_checks
from comparing_runs import recipes, small
from isthmus.cli.app import app
from isthmus.evaluation.gap import page, report
from isthmus.evaluation.gap.states import Pair
from isthmus.serving.engine import Engine, Sizes
from isthmus.serving.http import Access, Server
from isthmus.serving.run import serving
from isthmus.types import Sample, Turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("compare", "report", "gap", "preview")
A4 = 718
"""CSS pixels across, a browser's margins of a centimetre taken off."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, embedded: None) -> dict[str, Path]:
    """A comparison and one of its runs' reports, the gap of two joints, and a preview, all of tiny models."""
    folder = tmp_path_factory.mktemp("pages")
    one, two = recipes(folder)
    small(folder, one, two, factors=(0.5, 2.0))
    pairs = [
        Pair(Sample((Turn.say("user", composed.picture(n), "what?"),), f"p{n}"), w) for n, w in enumerate("abcdefgh")
    ]
    models = [composed.stir(composed.model()), composed.model(aligner="flamingo")]
    gaps = [report.measure(model, name, "own", pairs, pictures=1, cells=2) for model, name in zip(models, "ab")]
    (folder / "gap.html").write_text(page.render(gaps))
    one.save(folder / "one.yaml")
    words = ["data", "preview", str(folder / "one.yaml"), "-n", "2", "--html", str(folder / "preview.html")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    runs = folder / "comparison"
    files = (runs / "compare.html", runs / "one/seed0/report.html", folder / "gap.html", folder / "preview.html")
    return dict(zip(NAMES, files))


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python")
    if page_checks.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with page_checks.chromium() as browser:
        yield browser


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_sound(written: dict[str, Path], name: str) -> None:
    pytest.importorskip("html5lib")
    assert page_checks.faults(written[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_keeps_a_reader_out(written: dict[str, Path], browser, name: str) -> None:
    for scheme in page_checks.SCHEMES:
        opened = page_checks.opened(browser, written[name].as_uri(), scheme)
        assert page_checks.barriers(opened) == []
        opened.close()
    narrow = page_checks.opened(browser, written[name].as_uri(), "light", width=390)
    assert not page_checks.too_wide(narrow)
    narrow.close()


def test_folded_parts_are_on_paper(written: dict[str, Path], browser) -> None:
    shown = browser.new_page()
    shown.goto(written["compare"].as_uri())
    shown.emulate_media(media="print")
    heights = shown.evaluate("() => [...document.querySelectorAll('details table')].map(each => each.offsetHeight)")
    assert heights and min(heights) > 0
    shown.close()


@pytest.mark.parametrize("name", NAMES)
def test_paper_holds_the_whole_page(written: dict[str, Path], browser, name: str) -> None:
    paper = page_checks.opened(browser, written[name].as_uri(), "light", width=A4)
    paper.emulate_media(media="print")
    assert not page_checks.too_wide(paper)
    paper.close()


@pytest.mark.parametrize("scheme", page_checks.SCHEMES)
def test_nothing_keeps_anybody_out_of_the_chat(browser, scheme: str) -> None:
    server = Server(Engine(composed.model(), Sizes()), "tiny", access=Access())
    with serving(server) as address:
        opened = browser.new_page(color_scheme=scheme)
        opened.goto(address + "/")
        assert page_checks.faults(opened.request.get(address + "/").text()) == []
        assert page_checks.barriers(opened) == []
        opened.click("#settings-open")
        assert page_checks.barriers(opened) == []
        opened.close()


def test_what_is_wrong_is_found(browser) -> None:
    assert page_checks.faults("<!doctype html><title>t</title><p><b>a</p>")
    opened = browser.new_page()
    opened.set_content(
        '<html><title>t</title><main><h1>a</h1><img src="data:,"><p style="color:#ccc">grey words</p></main></html>'
    )
    told = " ".join(page_checks.barriers(opened))
    assert "image-alt" in told and "color-contrast" in told and "html-has-lang" in told
    opened.close()
