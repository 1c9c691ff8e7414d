"""Tiny fast tokenizers and chat templates in the manner of well-known models, made in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "USER: What is in the picture? ASSISTANT: A red fox, and two boats.",
    "user\nHello there!\n\nassistant\nThe answer is 42.\n system You are a helpful assistant. user assistant",
    "  how many   dogs are there?\tthree dogs, I think. äöü 日本 \n\n the end.",
]

LINES_TOGETHER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama-3 and Qwen cut words: line breaks stay together, whatever follows (GPT-2 sets the last one apart)."""

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

VICUNA = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}\
{{ message['content'] + ' ' }}{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}\
{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""

LLAMA2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% elif message['role'] == 'user' %}\
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}\
{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

GLM = """<|gmask|>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

PHI = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

THINKING = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{ message['content'] + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def _wrap(backend: Tokenizer, template: str | None, special: list[str | AddedToken], **named: str):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def byte_level(
    template: str | None, special: Sequence[str | AddedToken] = (), pattern: str | None = None, **named: str
):
    """GPT-2-like: byte-level BPE with a few merges, so that tokens would cross borders if they could."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    words = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, template, list(special), **named)


def metaspace(template: str | None, legacy: bool = False, **named: str):
    """Llama-2-like: spaces are `▁`, unknown characters fall back to bytes. `legacy` prepends by a normaliser."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # learns no merge across words
    alphabet = [*map(chr, range(32, 127)), "▁"]
    learner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    model = models.BPE(
        {word: index for index, word in enumerate(words)},
        [tuple(merge) for merge in learnt["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _wrap(backend, template, [], bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named)


def unigram():
    """T5-like: the control tokens are words of the vocabulary, and the end token is added to every text."""
    from tokenizers.processors import TemplateProcessing

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)] + [("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in ("a", "red", "fox", "what", "is", "this")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(backend, None, [], eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@lru_cache(maxsize=1)
def zoo() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers with templates, by manner; all but `llama2` know the system role."""
    im = ["<|im_start|>", "<|im_end|>"]
    llama3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    glm = ["<|gmask|>", "<|user|>", "<|assistant|>", "<|system|>"]
    phi = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "system", "end")]
    undeclared = byte_level(CHATML, [], eos_token="<|endoftext|>")
    undeclared.add_tokens(im)  # role markers that nobody declared special
    thinking = byte_level(THINKING, im, eos_token="<|im_end|>")
    thinking.add_tokens(["<think>", "</think>"])
    return {
        "chatml": byte_level(CHATML, im, bos_token="<|im_start|>", eos_token="<|im_end|>"),
        "undeclared": undeclared,
        "thinking": thinking,
        "llama3": byte_level(LLAMA3, llama3, LINES_TOGETHER, bos_token="<|begin|>", eos_token="<|eot_id|>"),
        "vicuna": byte_level(VICUNA, bos_token="<s>", eos_token="</s>"),
        "vicuna-metaspace": metaspace(VICUNA),
        "vicuna-legacy": metaspace(VICUNA, legacy=True),
        "llama2": metaspace(LLAMA2),
        "glm": byte_level(GLM, glm, eos_token="<|endoftext|>"),
        "phi": byte_level(PHI, phi, bos_token="<s>", eos_token="<|endoftext|>"),
        "none": byte_level(None, eos_token="</s>"),
    }
