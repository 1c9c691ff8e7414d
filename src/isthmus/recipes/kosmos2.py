"""Kosmos-2 (arXiv 2306.14824): one stage over grounded captions, in which words link to location tokens."""

from __future__ import annotations

from typing import Any, Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts
from isthmus.recipes.grounding import grounded

MAGNETO: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 64005,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""The LLM's shape in the class of OPT, without the 1032 words that the joint adds: Magneto's further norms within
attention and feed-forward parts are missing, and positions are learned."""


def kosmos2(size: Literal["embedded", "published"] = "embedded") -> Recipe:
    """Kosmos-2, or its joint on embedded parts."""
    return embedded() if size == "embedded" else published()


def published() -> Recipe:
    """Rate, warm-up, decay and updates are the official script's (spec B3.5); a batch there is some 419 000 tokens.

    The LLM has no checkpoint apart from Kosmos-2's own, so this is a recipe to count with and to start from.
    """
    decayed = Train(weight_decay=0.01)
    return parts.published(
        name="kosmos2-1.7b",
        about="Kosmos-2 as published: CLIP ViT-L/14 at 224 px, 64 latents, 1024 location tokens, a 1.3 B LLM",
        encoder=EncoderConfig(
            source="openai/clip-vit-large-patch14",
            layer=-1,
            class_token="keep",
            architecture={**parts.CLIP_L_336, "image_size": 224},
            aspect="crop",
        ),
        llm=LLMConfig(source="facebook/opt-1.3b", architecture=MAGNETO),
        aligner=AlignerConfig(name="kosmos2"),
        stages=(
            Stage(
                name="pretrain",
                data=(parts.file("grit.jsonl", "grit"),),
                template="documents",
                train={"encoders.*layers.23.*": decayed, "connectors.*": decayed, "llm.*": decayed},
                lr=2e-4,
                batch_size=2048,
                accumulate=8,
                warmup=375 / 60_000,
                budget=Budget(steps=60_000),
                recompute=True,
            ),
        ),
    )


def embedded(minutes: float = 5.0) -> Recipe:
    """Sixteen latents and 256 location tokens; the embedded encoder is told where its tokens lie."""
    options = {"queries": 16, "heads": 9, "grid": 16, "places": True, "normalise": True}
    words = {"llm.*.grafts.tokens.*": Train(lr=2e-3)}
    return grounded(
        parts.embedded(
            "kosmos2",
            "Kosmos-2 on embedded parts: 16 latents, 256 location tokens, SmolLM2-135M, EfficientNet-Lite0",
            AlignerConfig(name="kosmos2", options=options),
            (
                parts.warm(0.1 * minutes),
                parts.align(0.05 * minutes, {"connectors.*": Train(), **words}),
                parts.sft(0.85 * minutes, {"connectors.*": Train(lr=5e-4), **words, **parts.ATTENTION_LORA}),
            ),
        )
    )
