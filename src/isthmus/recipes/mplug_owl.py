"""mPLUG-Owl (arXiv 2304.14178): ViT and abstractor learn under a frozen LLM, then LoRA on the LLM alone."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, LoRA, Recipe, Stage, Train
from isthmus.recipes import parts


def mplug_owl(size: Literal["embedded", "published"] = "embedded") -> Recipe:
    """mPLUG-Owl 7B, or its joint on embedded parts."""
    return embedded() if size == "embedded" else published()


def published() -> Recipe:
    """The second stage is the official script's (spec B4.3); the first one's values and LoRA's are recalled."""
    return parts.published(
        name="mplug-owl-7b",
        about="mPLUG-Owl 7B as published: CLIP ViT-L/14, 64 queries and an end vector, LLaMA 7B, two stages",
        encoder=EncoderConfig(
            source="openai/clip-vit-large-patch14",
            layer=-1,
            class_token="keep",
            architecture={**parts.CLIP_L_336, "image_size": 224},
            aspect="squash",
        ),
        llm=LLMConfig(source="huggyllama/llama-7b", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="mplug_owl"),
        stages=(
            Stage(
                name="pretrain",
                data=(parts.file("mplug_owl_pairs.jsonl", "pairs"),),
                template="plain",
                train={"encoders.*": Train(), "connectors.*": Train()},
                lr=1e-4,
                batch_size=8192,
                accumulate=32,
                warmup=0.04,
                budget=Budget(steps=50_000),
                recompute=True,
            ),
            Stage(
                name="sft",
                data=(parts.file("mplug_owl_instructions.jsonl", "images"),),
                train={
                    f"llm.*self_attn.{name}_proj": Train(weight_decay=1e-4, mode=LoRA(r=8, alpha=32, dropout=0.05))
                    for name in ("q", "v")
                },
                lr=2e-5,
                floor=0.05,
                batch_size=256,
                budget=Budget(epochs=3),
                recompute=True,
            ),
        ),
    )


def embedded(minutes: float = 5.0) -> Recipe:
    """Eight queries and the end vector in a narrow abstractor; as published, the last stage moves LoRA alone."""
    options = {"queries": 8, "depth": 2, "heads": 4, "inner": 1024, "width": 256, "normalise": True}
    return parts.embedded(
        "mplug-owl",
        "mPLUG-Owl on embedded parts: eight queries and an end vector, SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="mplug_owl", options=options),
        (parts.warm(0.15 * minutes), parts.align(0.25 * minutes), parts.sft(0.6 * minutes, parts.ATTENTION_LORA)),
    )
