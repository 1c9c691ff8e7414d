"""Tiny random transformers models, tokenizers and folders, built in code so that no test needs a network.

Every model is 32 wide, has a few layers, weights from a fixed seed and is in eval mode. Weights are drawn wider than
the libraries' defaults, so that logits differ clearly between tokens and a test of sensitivity can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tiny_voices import VOICES

DECODERS = ("llama", "qwen2", "qwen3", "opt", "glm")
"""Families of decoder-only LLMs that every joint is tried on."""
OWN_MASKS = ("bloom", "falcon", "gptj", "mpt")
"""Older decoder-only families, which compute attention in code of their own, from a mask of padding."""
MORE_DECODERS = ("gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3")
"""Decoder-only families with windows, soft-capping, scaled embeddings, fused projections or parallel layers."""
ENCODER_DECODERS = ("t5", "flan-t5")
LLMS = (*DECODERS, *MORE_DECODERS, *ENCODER_DECODERS)
"""All families that `llm` builds."""
VISION = ("clip", "siglip", "dinov2", "vit")
"""Families of image encoders that `vision` builds."""

VOCAB, WIDTH, IMAGE, PATCH = 320, 32, 32, 8
PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
MERGES = "Ġ t,Ġ a,h e,i n,r e,o n,Ġt he,a t,e r,Ġ s,o u,Ġ c,i s,e n,Ġ w,o r,i t,Ċ Ċ,. Ċ,a s,u s"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before merging; transformers rebuilds its tokenizer with this rule whatever a folder says."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GATED = {**_DECODER, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
_WINDOW = {"sliding_window": 24, "head_dim": 8}
"""Shorter than most rows, so that a window that is forgotten shows; longer than a picture's sixteen tokens."""
_GEMMA = {**_GATED, "head_dim": 8, "eos_token_id": 1, "bos_token_id": 2}
_CAPPED = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_UNTURNED = {"sliding_window": 512, "layer_types": _MIXED}
"""Of families that turn queries and keys in layers with a window alone; the window is longer than any row."""
_FEW = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
_OLD = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
}
_CONFIGS = {
    "llama": {**_GATED, "tie_word_embeddings": True},
    "qwen2": {**_GATED, "tie_word_embeddings": False},
    "qwen3": {**_GATED, "tie_word_embeddings": True, "head_dim": 8},
    "glm": {**_GATED, "tie_word_embeddings": False, "head_dim": 8},
    "opt": {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "init_std": 0.2, "dropout": 0.0},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, **_WINDOW, **_CAPPED},
    "gemma3_text": {
        **_GEMMA,
        **_WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {**_GATED, **_WINDOW, "tie_word_embeddings": False},
    "phi": {**_DECODER, "intermediate_size": 64, "initializer_range": 0.2},
    "phi3": {**_GATED, **_WINDOW, "tie_word_embeddings": False},
    "bloom": {**_OLD, "hidden_size": WIDTH, "n_layer": 3, "n_head": 4},
    "falcon": {**_DECODER, "initializer_range": 0.2},
    "gptj": {**_OLD, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
    "mpt": {**_OLD, "d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 512},
    "gpt2": {**_OLD, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neo": {
        **_OLD,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 24,
        "max_position_embeddings": 512,
    },
    "jamba": {
        **_GATED,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "recurrent_gemma": {
        **_GEMMA,
        "num_key_value_heads": 1,
        "lru_width": WIDTH,
        "attention_window_size": 24,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "zamba": {
        **_GATED,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "olmo2": _GATED,
    "stablelm": _GATED,
    "gpt_oss": {**_GATED, **_WINDOW, "layer_types": _MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**_GATED, **_LATENT, "num_key_value_heads": 4},
    "lfm2": {
        **_GATED,
        "block_ff_dim": 64,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "falcon_h1": {
        **_GATED,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "smollm3": {**_GATED, "no_rope_layers": [1, 0, 1]},
    "cohere2": {**_GATED, **_UNTURNED},
    "exaone4": {**_GATED, **_UNTURNED, "head_dim": 8},
    "afmoe": {**_GATED, **_UNTURNED, **_FEW, "head_dim": 8, "num_dense_layers": 1},
    "hunyuan_v1_dense": {**_GATED, "head_dim": 8},
    "qwen3_next": {**_GATED, **_FEW, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    "olmo": {**_GATED, "clip_qkv": 1.0},
    "llama4_text": {
        **_GATED,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 24,
        "no_rope_layers": [1, 0, 1],
    },
    "t5": {**_T5, "eos_token_id": EOS},
    "bart": {
        **{name: _T5[name] for name in ("vocab_size", "d_model", "pad_token_id")},
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "init_std": 0.2,
    },
    "flan-t5": {**_T5, "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
_TOWER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
_TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {**_TOWER, "intermediate_size": 64}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {**_TOWER, "intermediate_size": 64}),
    "dinov2": (Dinov2Model, Dinov2Config, {**_TOWER, "mlp_ratio": 2, "layerscale_value": 0.5}),
    "vit": (ViTModel, ViTConfig, {**_TOWER, "intermediate_size": 64}),
}
_CROP = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
_SQUARE = {"size": {"height": IMAGE, "width": IMAGE}}
_PROCESSORS: dict[str, tuple[type[PilBackend], dict]] = {
    "clip": (CLIPImageProcessorPil, _CROP),
    "siglip": (SiglipImageProcessorPil, _SQUARE),
    "dinov2": (BitImageProcessorPil, _CROP),
    "vit": (ViTImageProcessorPil, _SQUARE),
}


def llm(family: str = "llama", *, seed: int = 0, **changes) -> Any:
    """A language model of a family in `LLMS`; `changes` replace fields of its config."""
    config = AutoConfig.for_model(family.removeprefix("flan-"), **{**_CONFIGS[family], **changes})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def vision(family: str = "clip", *, seed: int = 0, **changes) -> Any:
    """An image encoder of a family in `VISION`: 32 x 32 pixels, 16 patches; `changes` replace fields of its config."""
    model, config, fields = _TOWERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**{**fields, **changes})).eval()


def tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE with four special tokens, ChatML and exactly `vocab` entries; any text round-trips."""
    merges = [(a, b) for a, b in (pair.split(" ") for pair in MERGES.split(","))]
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    pieces += [f"<unused{i}>" for i in range(vocab - len(pieces))]
    bpe = models.BPE(vocab={piece: i for i, piece in enumerate(pieces[:vocab])}, merges=merges)
    inner = Tokenizer(bpe)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[3],
        chat_template=CHATML,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def processor(family: str = "clip") -> PilBackend:
    """The image processor of `vision(family)`."""
    kind, options = _PROCESSORS[family]
    return kind(**options)


def llm_folder(path: Path, family: str = "llama", **changes) -> Path:
    """Write model and tokenizer as a Hugging Face folder, and return `path`."""
    llm(family, **changes).save_pretrained(path)
    VOICES.get(family, tokenizer)().save_pretrained(path)
    return path


def vision_folder(path: Path, family: str = "clip", **changes) -> Path:
    """Write encoder and image processor as a Hugging Face folder, and return `path`."""
    vision(family, **changes).save_pretrained(path)
    processor(family).save_pretrained(path)
    return path
