"""An exported LLaVA is asked in transformers' own way, messages of parts, and reads the token ids that ours reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import carded
import pytest
import torch
from jinja2.exceptions import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, pipeline

import composed
import tiny
from composed import picture, stir
from isthmus.data.template import Template
from isthmus.exporting import llava, native
from isthmus.types import Layout

SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'Be kind.\\n' }}{% endif %}" + tiny.CHATML
)
SIGHT = {"type": "image", "image": picture(1).source}
PARTS = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Takes parts alone, as templates of llava-hf do."""
TALKS = {
    "question": [("user", SIGHT, "what is it?")],
    "several": [("user", "is ", SIGHT, " like", SIGHT, "?"), ("assistant", "no"), ("user", "why?", SIGHT, "\n why?")],
    "system": [("system", "be brief"), ("user", SIGHT, "what is it?")],
}


def messages(talk: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}
        for role, *parts in talk
    ]


@pytest.mark.parametrize("told", [None, "You are tiny.\n"], ids=["", "told"])
@pytest.mark.parametrize("template", [None, tiny.CHATML, SYSTEM, PARTS], ids=["fallback", "chatml", "system", "parts"])
def test_an_export_is_asked_as_transformers_asks_with_our_token_ids(
    tmp_path: Path, template: str | None, told: str | None
) -> None:
    ours = composed.model("llama", aspect="crop")
    ours.processor.tokenizer.chat_template = ours.processor.chat_template = template
    ours.processor.system = told
    stir(ours).save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    asked = pipeline("image-text-to-text", model=str(tmp_path / "theirs"))
    theirs, token = asked.processor, asked.model.config.image_token_id
    for talk in map(messages, TALKS.values()):
        expected = ours.processor.apply_chat_template(talk)
        found = theirs.apply_chat_template(
            talk, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        pictures = expected["input_ids"] == ours.placeholder("image")
        assert torch.equal(found["input_ids"] == token, pictures) and pictures.any()
        assert torch.equal(found["input_ids"].where(~pictures, 0), expected["input_ids"].where(~pictures, 0))
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
    greedy = {"max_new_tokens": 4, "do_sample": False}
    (told,) = asked(text=messages(TALKS["question"]), return_full_text=False, generate_kwargs=greedy)
    answer = ours.generate(**ours.processor.apply_chat_template(messages(TALKS["question"])), **greedy)[0, -4:]
    assert told["generated_text"] == ours.processor.decode(answer, skip_special_tokens=True)
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is it?"}]
    if template == PARTS:
        return
    jinja = Template(ours.processor.tokenizer).jinja
    own = ours.processor.tokenizer.apply_chat_template(plain, chat_template=jinja, tokenize=False)
    assert theirs.apply_chat_template(plain) == theirs.tokenizer.apply_chat_template(plain, tokenize=False) == own


def test_what_is_no_part_of_a_question_is_refused_by_the_written_template() -> None:
    written = native.by_parts(tiny.CHATML, Layout(1, after="\n"))
    with pytest.raises(TemplateError, match="text or image, not video"):
        tiny.tokenizer().apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}]}], chat_template=written, tokenize=False
        )


EDGES = [
    "\n\n  {% if true %}x{% endif %}{{ messages[0].content }}",
    "  {%- for m in messages %}[{{ m.content }}]{% endfor %}",
]


@pytest.mark.parametrize("template", [*EDGES, tiny.CHATML])
def test_the_written_template_runs_the_old_one_unchanged(template: str) -> None:
    tokenizer = tiny.tokenizer()
    written = native.by_parts(template, Layout(1, after="\n"), system='"\\n{% é😀 %} }}')
    turns = [{"role": "system", "content": '"\\n{% é😀 %} }}'}, {"role": "user", "content": "<image>\nwhat?"}]
    turns += [{"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]
    expected = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert tokenizer.apply_chat_template(turns, chat_template=written, tokenize=False) == expected
    parts = [{"type": "image"}, {"type": "text", "text": "wh"}, {"type": "text", "text": "at?"}]
    turns[1:] = [{"role": "user", "content": parts}, {**turns[2], "content": []}]
    assert tokenizer.apply_chat_template(turns[1:], chat_template=written, tokenize=False) == expected


def test_a_tokenizer_adds_no_beginning_where_the_template_has_none(tmp_path: Path) -> None:
    ours = composed.model("llama", aspect="crop")
    tokenizer = ours.processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|>:0 $A:0", special_tokens=[("<|im_start|>", tiny.BOS)]
    )
    assert Template(tokenizer).begin
    ours.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    theirs = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    talk = messages(TALKS["question"])
    found = theirs.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(found[0]) == ours.processor.apply_chat_template(talk)["input_ids"].shape[1]


def test_the_cards_code_asks_a_whole_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = stir(composed.model("llama", aspect="crop"))
    ours.save_pretrained(tmp_path / "ours")
    llava.export(tmp_path / "ours", tmp_path / "theirs")
    inputs = carded.run(tmp_path / "theirs", tmp_path, monkeypatch)["inputs"]
    expected = ours.processor.apply_chat_template(messages([("user", SIGHT, "What is this?")]))
    assert inputs["input_ids"].shape == expected["input_ids"].shape and capsys.readouterr().out
