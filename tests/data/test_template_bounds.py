"""A chat template is a small program of a stranger's: how long it runs and how much it writes is bounded."""

from __future__ import annotations

import copy
import sys

import pytest
from tiny_tokenizers import zoo

from isthmus.data import template
from isthmus.data.template import Template
from isthmus.types import ConfigError
from malicious import TEMPLATES


def of(jinja: str) -> Template:
    tokenizer = copy.deepcopy(zoo()["none"])
    tokenizer.chat_template = jinja
    return Template(tokenizer)


@pytest.mark.parametrize(
    ("name", "words"), [("loops", "steps"), ("recursion", "steps"), ("depth", "steps"), ("long", "characters")], ids=str
)
def test_a_template_that_takes_or_writes_too_much_is_refused_in_a_line(name, words, monkeypatch):
    monkeypatch.setattr(template, "STEPS", 100_000 if words == "steps" else template.STEPS)
    before = sys.gettrace()
    with pytest.raises(ConfigError, match=f"more than [0-9]+ {words}") as refused:
        of(TEMPLATES[name])
    assert sys.gettrace() is before
    assert "\n" not in refused.value.cause + refused.value.remedy and "repair" in refused.value.remedy


def test_a_conversation_as_long_as_the_server_takes_fits_every_template():
    roles = ("user", "assistant") * 127 + ("user",)
    for name, tokenizer in zoo().items():
        assert len(Template(tokenizer).frame(roles).slots) == len(roles), name
