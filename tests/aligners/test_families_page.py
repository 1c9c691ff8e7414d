"""What docs/llms.md says of joints and families of LLMs is what the contract tests."""

from __future__ import annotations

import re

import pytest

import test_contract as contract
import tiny
from isthmus import aligner as aligners
from test_papers import ROOT

ROWS = {
    "Llama, Vicuna, SmolLM2": "llama",
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "OPT": "opt",
    "GLM-4": "glm",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3_text",
    "Mistral": "mistral",
    "Phi-1, Phi-2": "phi",
    "Phi-3": "phi3",
    "T5": "t5",
    "Flan-T5": "flan-t5",
}
PAGE = (ROOT / "docs/llms.md").read_text(encoding="utf-8")
KNOWN = {path.stem for path in (ROOT / "src/isthmus/aligners").glob("[!_]*.py")}


def passing(family: str) -> set[str]:
    """Joints that pass the whole contract on a family."""
    return {contract.JOINTS[joint].aligner for joint, each in contract.PAIRS if each == family} & KNOWN


def refused(family: str) -> set[str]:
    """Joints of which every form is refused on a family."""
    unfit = {name for name in KNOWN if family in tiny.ENCODER_DECODERS and not aligners.named(name).encoder_decoder}
    unfit |= {contract.JOINTS[joint].aligner for joint, each in contract.REFUSALS if each == family}
    return unfit - passing(family)


def test_every_joint_passes_the_contract_and_so_does_every_family():
    assert {joint.aligner for joint in contract.JOINTS.values()} >= KNOWN
    assert set(ROWS.values()) == {family for _, family in contract.PAIRS} == set(tiny.LLMS)


@pytest.mark.parametrize("title", ROWS)
def test_the_page_names_the_joints_that_are_tested_on_a_family(title):
    (cell,) = re.findall(rf"^\| {re.escape(title)} \|.*\| (.*) \|$", PAGE, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", cell))
    if cell.startswith("every joint"):
        named = KNOWN - named - (refused(ROWS[title]) if "refused" in cell else set())
    assert named == passing(ROWS[title])
