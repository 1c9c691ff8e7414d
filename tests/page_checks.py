"""Whether a page is sound HTML (html5lib, strict) and can be read by all (axe-core in headless Chromium).

`python tests/page_checks.py PAGE.html ... [--shots FOLDER]` checks pages that are there, and takes pictures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice")
SCHEMES = ("light", "dark")


def faults(text: str) -> list[str]:
    """What html5lib's parser, which is the standard's own algorithm, finds wrong with a document."""
    from html5lib import HTMLParser, constants

    parser = HTMLParser()
    parser.parse(text)
    return [f"{place}: {constants.E[code] % values}" for place, code, values in parser.errors]


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def barriers(page: Any) -> list[str]:
    """What axe-core finds on a page that is open: the rule, and the first element that breaks it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": list(RULES)}}).response["violations"]
    return [f"{each['id']} ({len(each['nodes'])}): {each['nodes'][0]['html'][:160]}" for each in found]


def opened(browser: Any, address: str, scheme: str, width: int = 1200) -> Any:
    """A page in a colour scheme, everything that can be folded open."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.goto(address)
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    return page


def too_wide(page: Any) -> bool:
    """Whether the page has to be scrolled sideways as a whole."""
    return page.evaluate("() => document.documentElement.scrollWidth > document.documentElement.clientWidth")


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("pages", nargs="+", type=Path)
    made.add_argument("--shots", type=Path)
    options = made.parse_args()
    bad = 0
    with chromium() as browser:
        for number, file in enumerate(options.pages):
            told = faults(file.read_text(encoding="utf-8"))
            for scheme in SCHEMES:
                page = opened(browser, file.resolve().as_uri(), scheme)
                told += [f"{scheme}: {each}" for each in barriers(page)]
                if options.shots:
                    page.screenshot(path=options.shots / f"{number}-{file.stem}-{scheme}.png", full_page=True)
                page.close()
            if options.shots:
                paper = opened(browser, file.resolve().as_uri(), "light", width=794)  # A4
                paper.emulate_media(media="print")
                paper.screenshot(path=options.shots / f"{number}-{file.stem}-print.png", full_page=True)
                paper.close()
            narrow = opened(browser, file.resolve().as_uri(), "light", width=390)
            told += ["too wide for a telephone"] if too_wide(narrow) else []
            narrow.close()
            bad += len(told)
            print("\n".join([f"{file}: {len(told)} faults", *told]))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
