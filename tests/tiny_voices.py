"""Tokenizers of LLM families, each made by the family's own class with a tiny vocabulary and a chat template of its
kind: how roles are marked, how a turn ends, whether there is a system turn."""

from __future__ import annotations

import string
from collections.abc import Callable

from tokenizers import AddedToken
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

PIECES = ("▁", *string.digits, *string.ascii_letters, *string.punctuation, "\n")
MERGES = [("▁", "t"), ("▁", "a"), ("h", "e"), ("i", "n"), ("o", "n"), ("▁t", "he"), ("a", "t"), ("e", "r"), ("i", "s")]

GEMMA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
"""No system turn, a role that is called model, and trimmed contents."""

GEMMA3 = """{{ bos_token }}{% set told = '' %}{% if messages[0].role == 'system' %}\
{% set told = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\n\n' %}\
{% set messages = messages[1:] %}{% endif %}{% for m in messages %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (told if loop.first else '') }}\
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}\
{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
"""The system text stands in the first user turn; contents may be strings or lists of parts."""

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}\
{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""

PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""


def gemma(template: str = GEMMA) -> PreTrainedTokenizerFast:
    """Begins every text with `<bos>`; spaces are `▁` and no word is given one."""
    named = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    turns = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
    voice = GemmaTokenizer(_vocabulary(*named), MERGES, chat_template=template)
    voice.add_special_tokens({"additional_special_tokens": turns})
    return voice


def mistral() -> PreTrainedTokenizerFast:
    """`[INST]` and `[/INST]` are tokens; what starts a text is given a space."""
    voice = LlamaTokenizer(_vocabulary("<unk>", "<s>", "</s>"), MERGES, chat_template=MISTRAL, pad_token="<unk>")
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    voice.add_special_tokens({"additional_special_tokens": marks})
    return voice


def phi3() -> PreTrainedTokenizerFast:
    """Role tokens swallow the line break behind them; a turn ends with `<|end|>`, a conversation with another token."""
    voice = LlamaTokenizer(
        _vocabulary("<unk>", "<s>", "<|endoftext|>"), MERGES, chat_template=PHI3, eos_token="<|endoftext|>"
    )
    roles = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "system", "end")]
    voice.add_special_tokens({"additional_special_tokens": roles, "pad_token": "<|endoftext|>"})
    return voice


def flan_t5() -> PreTrainedTokenizerFast:
    """Unigrams that know no line break, `</s>` behind every text, and no chat template."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -8.0) for piece in PIECES if piece != "\n"] + [("▁the", -4.0), ("▁a", -4.0), ("▁is", -4.0)]
    return T5Tokenizer(pieces, extra_ids=2)


def _vocabulary(*named: str) -> dict[str, int]:
    pieces = [*named, *PIECES, *("".join(pair) for pair in MERGES)]
    return {piece: index for index, piece in enumerate(pieces)}


VOICES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gemma": gemma,
    "gemma2": gemma,
    "gemma3_text": lambda: gemma(GEMMA3),
    "mistral": mistral,
    "phi3": phi3,
    "flan-t5": flan_t5,
}
"""Families that are written with a tokenizer of their own; the others share one."""
