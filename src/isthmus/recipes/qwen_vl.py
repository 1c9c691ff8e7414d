"""Qwen-VL (arXiv 2308.12966): pretraining under a frozen LLM, multi-task training of all, instruction tuning."""

from __future__ import annotations

from typing import Any, Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts

CLIP_BIG_G: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
"""Qwen-7B's shape in the class of its successors; its own class is not part of transformers."""


def qwen_vl(size: Literal["embedded", "published"] = "embedded", positions: bool = True) -> Recipe:
    """Qwen-VL; `positions=False` is the ablation without places in queries and keys."""
    return embedded(positions) if size == "embedded" else published(positions)


def published(positions: bool = True) -> Recipe:
    """Parts as published; the stages' hyper-parameters are recalled from the paper, not checked (spec B4.2).

    All stages see 448 pixels (the first one's 224 would be another encoder), and no rate decays with the ViT's depth.
    """
    vision, joint, llm = ({glob: Train(weight_decay=0.05)} for glob in ("encoders.*", "connectors.*", "llm.*"))
    return parts.published(
        name="qwen-vl-7b",
        about="Qwen-VL as published: OpenCLIP bigG at 448 px, 256 position-aware queries, Qwen 7B, three stages",
        encoder=EncoderConfig(
            source="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
            layer=-1,
            image_size=448,
            architecture=CLIP_BIG_G,
            aspect="squash",
        ),
        llm=LLMConfig(source="Qwen/Qwen1.5-7B", architecture=QWEN_7B),
        aligner=AlignerConfig(name="qwen_vl", options={"positions": positions}),
        stages=(
            Stage(
                name="pretrain",
                data=(parts.file("qwen_vl_pairs.jsonl", "pairs"),),
                template="plain",
                train=vision | joint,
                lr=2e-4,
                floor=0.005,
                betas=(0.9, 0.98),
                batch_size=30720,
                accumulate=30,
                warmup=0.01,
                budget=Budget(steps=50_000),
                recompute=True,
            ),
            Stage(
                name="multitask",
                data=(parts.file("qwen_vl_multitask.jsonl", "images"),),
                train=vision | joint | llm,
                lr=5e-5,
                floor=0.2,
                betas=(0.9, 0.98),
                batch_size=4096,
                accumulate=16,
                warmup=0.02,
                budget=Budget(steps=19_000),
                recompute=True,
            ),
            Stage(
                name="sft",
                data=(parts.file("qwen_vl_instructions.jsonl", "images"),),
                train=joint | llm,
                lr=1e-5,
                betas=(0.9, 0.98),
                batch_size=128,
                budget=Budget(steps=8_000),
                recompute=True,
            ),
        ),
    )


def embedded(positions: bool = True, minutes: float = 5.0) -> Recipe:
    """Nine queries, SmolLM2-135M, EfficientNet-Lite0: warm, align, sft within `minutes` of training."""
    options = {"side": 3, "heads": 9, "positions": positions, "normalise": True}
    return parts.embedded(
        "qwen-vl" if positions else "qwen-vl-blind-to-place",
        f"Qwen-VL on embedded parts: nine queries {'that know' if positions else 'blind to'} their place, SmolLM2-135M",
        AlignerConfig(name="qwen_vl", options=options),
        (parts.warm(0.15 * minutes), parts.align(0.05 * minutes), parts.sft(0.8 * minutes)),
    )
