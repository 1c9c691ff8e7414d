"""The renderer on each family's own tokenizer class and on templates whose contents are lists of parts."""

from __future__ import annotations

import pytest
from PIL import Image as Pillow
from tiny_tokenizers import metaspace, zoo

import tiny_voices
from isthmus.data.chat import Renderer
from isthmus.types import ConfigError, Image, Layout, Turn

PICTURE, IMAGE = Image(Pillow.new("RGB", (2, 2))), 1_000_000
TALK = (
    Turn.say("user", "What is on the hill?"),
    Turn.say("assistant", "A cat, and the other one."),
    Turn.say("user", "How many?"),
    Turn.say("assistant", "three"),
)
SYSTEM = Turn.say("system", "Be brief.")

PROCESSORS = """{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] + ' ' }}{% else %}\
{{ m['role'].upper() + ': ' }}{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\n' }}{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}\
{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""In the manner of llava-hf's processors: contents are lists, and a string would be taken for one of letters."""


def renderer(tokenizer):
    return Renderer(tokenizer, {"image": Layout(3, after="\n")}, {"image": IMAGE})


def messages(turns, parts=False):
    return [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if parts else turn.text} for turn in turns
    ]


@pytest.mark.parametrize("family", sorted(set(tiny_voices.VOICES) - {"flan-t5"}))
@pytest.mark.parametrize("with_system", [False, True])
def test_a_familys_own_template_and_tokenizer(family, with_system):
    tokenizer = tiny_voices.VOICES[family]()
    turns = (SYSTEM, *TALK) if with_system else TALK
    make = renderer(tokenizer)
    if with_system and family in ("gemma", "gemma2"):
        with pytest.raises(ConfigError, match="System role not supported") as refused:
            make.render(turns)
        assert "into the first user turn" in refused.value.remedy
        return
    rendered = make.render(turns)
    assert rendered.ids == tokenizer.apply_chat_template(messages(turns), return_dict=False)
    prompt = tokenizer.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True, return_dict=False)
    assert make.render(turns[:-1], open_answer=True).ids == prompt == rendered.ids[: len(prompt)]
    said = [token for token, trained in zip(rendered.ids, rendered.trained) if trained]
    ends = {"mistral": "</s>", "phi3": "<|end|>"}.get(family, "<end_of_turn>")
    assert tokenizer.decode(said) == ends.join(["A cat, and the other one.", "three", ""])


def test_contents_as_lists_of_parts():
    tokenizer = metaspace(PROCESSORS)
    turns = (SYSTEM, *TALK)
    make = renderer(tokenizer)
    own = tokenizer.apply_chat_template(messages(turns, parts=True), tokenize=False)
    rendered = make.render(turns)
    assert tokenizer.decode(rendered.ids).replace(tokenizer.eos_token, "") == own
    assert sum(token == tokenizer.eos_token_id for token in rendered.ids) == 2, "the template ends no answer: we do"
    prompt = make.render(turns[:-1], open_answer=True).ids
    assert rendered.ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).replace(tokenizer.eos_token, "").endswith("How many? ASSISTANT:")


def test_a_picture_stands_where_a_processors_template_puts_it():
    tokenizer = metaspace(PROCESSORS)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    own = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    rendered = renderer(tokenizer).render((Turn.say("user", PICTURE, "What is it?"),), open_answer=True)
    (start, end) = rendered.spans[0]
    told = f"{tokenizer.decode(rendered.ids[:start])}<image>{tokenizer.decode(rendered.ids[end:])}"
    assert told.replace(" ", "") == own.replace(" ", "")


def test_a_template_that_takes_both_is_given_strings():
    make = renderer(tiny_voices.gemma(tiny_voices.GEMMA3))
    assert not make._chat._parts and make.render((SYSTEM, *TALK)).ids
    assert all(not renderer(tokenizer)._chat._parts for tokenizer in zoo().values())
