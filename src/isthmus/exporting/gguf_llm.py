"""The LLM of a model as GGUF: tensors and settings under llama.cpp's names, and a byte-level BPE's vocabulary.

Families whose rotary positions llama.cpp turns in another order than transformers have their rows reordered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from isthmus.data.template import Template
from isthmus.exporting import ANOTHER, refuse
from isthmus.exporting.gguf_file import Content
from isthmus.model import VLM
from isthmus.types import ConfigError

FAMILIES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
"""The families of transformers that are written, and llama.cpp's names of them."""
PAIRED = "llama"
"""Its rotary pairs lie side by side in llama.cpp, and half a head apart in transformers."""
FREQUENCIES = "rope_freqs.weight"

_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    ("digits", "words"): "smollm",
    ("words",): "gpt-2",
    (_PIECES % r"\p{N}", "bytes"): "qwen2",
    (_PIECES % r"\p{N}{1,3}", "bytes"): "llama-bpe",
}
"""How tokenizers split text before merging, and llama.cpp's name of that way; it knows no other than named ones."""
WHOLE = "llama-bpe"
"""Its words that are one token are not merged from pieces."""


def content(ours: VLM) -> Content:
    """The file of a model's LLM."""
    return Content(
        MODEL_ARCH_NAMES[FAMILIES[ours.llm.config.model_type]],
        lambda writer: _describe(writer, ours),
        dict(_tensors(ours.llm)),
    )


def require_fit(ours: VLM) -> None:
    """Whether llama.cpp's architectures hold an LLM and its words.

    Raises:
        ConfigError: they do not; what and why is said.
    """
    config = ours.llm.config.to_dict()
    family = config["model_type"]
    if family not in FAMILIES:
        raise ConfigError(f"GGUF is written for {', '.join(FAMILIES)}, and its LLM is {family}", ANOTHER)
    turn = config["rope_parameters"]["rope_type"]
    reasons = [
        (turn not in ("default", "llama3")[: 1 + (family == PAIRED)], f"its rotary positions are of the kind {turn}"),
        (config["hidden_act"] != "silu", f"its activation is {config['hidden_act']}"),
        (bool(config.get("attention_bias") or config.get("mlp_bias")), "its projections have biases"),
        (bool(config.get("use_sliding_window")), "it has a sliding window"),
    ]
    refuse("its LLM cannot be written as GGUF", reasons, ANOTHER)
    splitting(ours.processor.tokenizer)


def splitting(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how a tokenizer splits text.

    Raises:
        ConfigError: it has none, or the tokenizer is no byte-level BPE.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        raise ConfigError(
            "its tokenizer is SentencePiece's, whose scores a Hugging Face folder does not keep",
            "choose an LLM with a byte-level BPE (SmolLM2, Qwen2, Qwen3, Llama 3)",
        )
    steps = state["pre_tokenizer"] or {"type": "none"}
    found = SPLITS.get(tuple(_step(step) for step in steps.get("pretokenizers", [steps])))
    if found is None or bool(state["model"].get("ignore_merges")) != (found == WHOLE):
        raise ConfigError(
            "llama.cpp has no name that we know for how its tokenizer splits text",
            f"GGUF is written for tokenizers like those of {', '.join(SPLITS.values())}",
        )
    return found


def _step(step: dict[str, Any]) -> str:
    """One step of splitting, in the words of `SPLITS`."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "")
    return step["type"]


def _tensors(llm: Any) -> Iterator[tuple[str, Tensor]]:
    config = llm.config
    names = get_tensor_name_map(FAMILIES[config.model_type], config.num_hidden_layers)
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in llm.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name  # the families' own classes have no others
        heads = turned.get(name.split(".")[-2]) if config.model_type == PAIRED else None
        yield place, tensor if heads is None else _paired(tensor, heads)
    if config.rope_parameters["rope_type"] != "default":
        yield FREQUENCIES, _slowed(llm)


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order first, first of the second half, second, ... [out, in]."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _slowed(llm: Any) -> Tensor:
    """By what each plain rotary frequency is divided."""
    actual = llm.base_model.rotary_emb.inv_freq.float()
    theta = llm.config.rope_parameters["rope_theta"]
    return theta ** -(torch.arange(len(actual)) / len(actual)) / actual


def _describe(writer: GGUFWriter, ours: VLM) -> None:
    config = ours.llm.config
    head = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _describe_words(writer, ours.processor.tokenizer, config.vocab_size)


def _describe_words(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    words, kinds = zip(*_words(tokenizer, size))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(tokenizer))
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(False)  # a chat template writes its own
    template = Template(tokenizer).jinja
    if isinstance(template, str):
        writer.add_chat_template(template)


def _words(tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[tuple[str, TokenType]]:
    """Every row of the embedding: its text, and whether it is a piece of text, typed as it stands, or control."""
    words = {token: word for word, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    for token in range(size):
        if token not in words:
            yield f"[PAD{token}]", TokenType.UNUSED
        elif token not in added:
            yield words[token], TokenType.NORMAL
        else:
            yield added[token].content, TokenType.CONTROL if added[token].special else TokenType.USER_DEFINED
