"""Checks the report of a short demo for structure, not for quality: `python tests/report_structure.py runs/ci`."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

TASKS = {"naming", "easy-vqa", "presence", "counting", "relation", "caption"}
CONDITIONS = {"before", "after", "blind", "shuffled"}


class Page(HTMLParser):
    """Counts what a reader should find, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1
        source = dict(attributes).get("src") or ""
        if source and not source.startswith("data:"):
            self.outside.append(source)


def check(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in report["rows"]} == TASKS
    for row in report["rows"]:
        assert set(row["cells"]) >= CONDITIONS, row["label"]
        for cell in row["cells"].values():
            assert cell["low"] <= cell["value"] <= cell["high"], row["label"]
    assert report["fingerprint"] and report["data_hash"] and report["credits"]
    assert len(report["examples"]) == 10 and report["generations"]
    assert {curve["stage"] for curve in report["curves"]} == {"warm", "sft"}
    assert all(curve["train"] and curve["validation"] for curve in report["curves"])
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.found["img"] >= 10 and page.found["table"] >= 1 and page.found["svg"] >= 1
    assert not page.outside and "script" not in page.found
    model = folder / "sft" / "model"
    assert (model / "config.json").is_file() and list(model.glob("*.safetensors"))
    print(f"{folder}: the report has every part")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
