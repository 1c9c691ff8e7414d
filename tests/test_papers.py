"""docs/papers.md is what the docstrings say, with and without a checkout around the package."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus import aligner, papers
from isthmus.cli.app import app
from isthmus.config import ConfigError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/papers.md").read_text(encoding="utf-8")


KNOWN = papers.entries()


def entry(name: str) -> papers.Entry:
    return next(entry for entry in KNOWN if entry.name == name)


def test_the_page_is_current():
    assert papers.page() == PAGE, "run isthmus papers --write"


def test_every_joint_stands_under_its_family_with_its_tests():
    inside = {name for name, module in aligner.known().items() if module.startswith("isthmus.")}
    listed = {each.name: each for each in KNOWN if each.room == "aligners"}
    assert listed.keys() == inside
    for name, each in listed.items():
        assert each.families[0] == aligner.named(name).family and set(each.families) <= papers.FAMILIES.keys()
        assert each.tests and all((ROOT / test).is_file() for test in each.tests), name
        heading = PAGE.index(f"## {papers.FAMILIES[each.families[0]]}\n")
        assert f"**{name}**" in PAGE[heading : PAGE.index("\n## ", heading)]
    second = {name: aligner.named(name).also for name in inside if aligner.named(name).also}
    data = dict.fromkeys(("llava", "instructblip", "shikra", "kosmos2", "victor", "asvr"), "data")
    assert second == {**data, "lion": "tool"}
    assert {name: each.families[1] for name, each in listed.items() if each.families[1:]} == second


def test_what_is_read_of_one_file():
    found = entry("flamingo")
    assert found.papers == (("2204.14198", "Flamingo"), ("2308.01390", "OpenFlamingo"))
    assert found.file == "src/isthmus/aligners/flamingo.py" and found.families == ("perceiver",)
    assert {"flamingo", "openflamingo-9b"} <= set(found.recipes)
    assert found.tests == ("tests/aligners/test_flamingo.py", "tests/test_contract.py")
    assert "`inner` is ours: a narrower resampler for wide encoders" in found.differs
    assert entry("resampler").families == ("perceiver",) and entry("composite").families == ("converter",)
    assert entry("composite").recipes == () and entry("lora").families == ()


@pytest.mark.parametrize(
    ("said", "items"),
    [
        ("A.\n\nDiffers:\n    - one\n      in two lines;\n    - another.\n\nB.", ("one in two lines", "another")),
        ("A.\nDiffers: one sentence\nthat goes on.", ("one sentence that goes on",)),
        ("Differs from `x`: nothing of a paper.", ()),
    ],
)
def test_deviations_are_read_from_lists_and_sentences(said, items):
    assert papers._differs(said) == items


def test_every_number_in_the_source_is_in_the_page():
    for file in papers.SOURCE.rglob("*.py"):
        docstring = file.read_text(encoding="utf-8").split('"""')[1]
        if file.parent.name != "recipes":
            for number in re.findall(r"arXiv (\d{4}\.\d{4,5})", docstring):
                assert number in PAGE, (file, number)
    for model in ("PaLM", "Chinchilla", "GPT-4V", "Gemini"):
        assert f"| {model} |" in PAGE


def test_an_installed_package_tells_the_same_but_for_tests(monkeypatch, tmp_path):
    here = [asdict(each) for each in KNOWN]
    installed = tmp_path / "site-packages" / "isthmus"
    shutil.copytree(papers.SOURCE, installed, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(papers, "SOURCE", installed)
    monkeypatch.setattr(papers, "__file__", str(installed / "papers.py"))
    assert papers.plain()["papers"] == [{**each, "tests": ()} for each in here]
    assert "not in the installed package" in papers.text()
    with pytest.raises(ConfigError, match="checkout"):
        papers.rewrite("papers.md", papers.page)


def test_the_verb_prints_and_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(papers, "entries", lambda: KNOWN)
    shown = CliRunner().invoke(app, ["papers", "--json"])
    told = json.loads(shown.output)
    assert {each["name"] for each in told["papers"]} == {each.name for each in KNOWN}
    assert "2311.03079" in CliRunner().invoke(app, ["papers"]).output
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(papers, "checkout", lambda: tmp_path)
    monkeypatch.setattr(papers, "page", lambda: "the page")
    assert CliRunner().invoke(app, ["papers", "--write"]).exit_code == 0
    assert (tmp_path / "docs/papers.md").read_text() == "the page"
