"""SAISA (arXiv 2502.02458): LLaVA-1.5's stages with an MLP per layer and media as keys and values alone."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, Recipe, Train
from isthmus.recipes import parts

JOINT = {"connectors.*": Train(), "llm.*.grafts.saisa.*": Train()}
"""Everything that the joint adds: features' gains and the layers' MLPs."""


def saisa(size: Literal["embedded", "published"] = "embedded") -> Recipe:
    """SAISA; its first step, NAAViT, is `ee_mllm(visual="ffn")`."""
    return embedded() if size == "embedded" else published()


def published() -> Recipe:
    """As the authors describe it on 7B: LLaVA-1.5's data and values in both stages (spec B7.3)."""
    return parts.published(
        name="saisa-7b",
        about="SAISA 7B as published: an MLP per layer, media as keys and values alone, two stages",
        encoder=EncoderConfig(source="openai/clip-vit-large-patch14-336", layer=-2, architecture=parts.CLIP_L_336),
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="saisa"),
        system=parts.VICUNA_V1,
        stages=parts.llava_stages(JOINT),
    )


def embedded(minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0; narrow MLPs, since 30 of full width would outweigh the LLM's attention.

    There is no `warm` stage: the joint has no output at the LLM's input that words could be compared with.
    """
    options = {"inner": 64, "pool": 7, "normalise": True}
    return parts.embedded(
        "saisa",
        "SAISA on embedded parts: SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="saisa", options=options),
        (
            parts.align(0.4 * minutes, JOINT),
            parts.sft(0.6 * minutes, {**{glob: Train(lr=5e-4) for glob in JOINT}, **parts.ATTENTION_LORA}),
        ),
    )
