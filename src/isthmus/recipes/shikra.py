"""Shikra (arXiv 2306.15195): projector and LLM learn to point in both stages, by decimals in ordinary text."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts
from isthmus.recipes.grounding import grounded


def shikra(size: Literal["embedded", "published"] = "embedded") -> Recipe:
    """Shikra 7B, or its joint on embedded parts."""
    return embedded() if size == "embedded" else published()


def published() -> Recipe:
    """Rates and batch are the official configuration's (spec B3.4); the numbers of steps are recalled, not checked."""
    trained = {"connectors.*": Train(), "llm.*": Train()}
    return parts.published(
        name="shikra-7b",
        about="Shikra 7B as published: CLIP ViT-L/14 at 224 px, a linear projector, Vicuna 7B, decimals as boxes",
        encoder=EncoderConfig(
            source="openai/clip-vit-large-patch14",
            layer=-2,
            architecture={**parts.CLIP_L_336, "image_size": 224},
            aspect="pad",
        ),
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="shikra"),
        stages=(
            Stage(
                name="pretrain",
                data=(parts.file("shikra_public_mix.jsonl", "images"),),
                train=trained,
                lr=2e-5,
                batch_size=64,
                budget=Budget(steps=100_000),
                recompute=True,
            ),
            Stage(
                name="sft",
                data=(
                    parts.file("llava_instruct_158k.json", "images").but(weight=0.5),
                    parts.file("shikra_referential_dialogue.jsonl", "images").but(weight=0.5),
                ),
                train=trained,
                lr=2e-5,
                batch_size=64,
                budget=Budget(steps=20_000),
                recompute=True,
            ),
        ),
    )


def embedded(minutes: float = 5.0) -> Recipe:
    """All 49 tokens of the encoder's grid, since a token's place in the row tells its place in the picture."""
    new_words = {"llm.*.grafts.tokens.*": Train(lr=5e-4)}
    joint = {"connectors.*": Train(), **new_words}
    return grounded(
        parts.embedded(
            "shikra",
            "Shikra on embedded parts: 49 projected tokens, decimals as boxes, SmolLM2-135M, EfficientNet-Lite0",
            AlignerConfig(name="shikra", options={"projector": "mlp2x_gelu", "normalise": True}),
            (
                parts.warm(0.1 * minutes),
                parts.align(0.05 * minutes, joint),
                parts.sft(0.85 * minutes, {"connectors.*": Train(lr=5e-4), **new_words, **parts.ATTENTION_LORA}),
            ),
        )
    )
