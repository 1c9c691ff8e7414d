"""EE-MLLM and EE-MLLM-F (arXiv 2408.11795), NAAViT (arXiv 2502.02458): LLaVA's stages under composite attention."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, Recipe, Train
from isthmus.recipes import parts

Visual = Literal["self", "ffn", "keys"]


def ee_mllm(size: Literal["embedded", "published"] = "embedded", visual: Visual = "self", free: bool = False) -> Recipe:
    """EE-MLLM; `free` is EE-MLLM-F, which is trained as LLaVA; `visual` says what layers do to media."""
    return embedded(visual, free) if size == "embedded" else published(visual, free)


def published(visual: Visual, free: bool) -> Recipe:
    """LLaVA-1.5's parts, data and values, for a comparison on equal terms.

    The authors' own resolutions (672 and 980 pixels) and data were not at hand (spec B7.1).
    """
    name, about = _title(visual, free)
    return parts.published(
        name=f"{name}-7b",
        about=f"{about}, 7B: LLaVA-1.5's parts and values",
        encoder=EncoderConfig(source="openai/clip-vit-large-patch14-336", layer=-2, architecture=parts.CLIP_L_336),
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="ee_mllm", options=_options(visual, free)),
        system=parts.VICUNA_V1,
        stages=parts.llava_stages({"connectors.*": Train()}),
    )


def embedded(visual: Visual = "self", free: bool = False, minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0 with LLaVA's embedded stages; 49 tokens per picture, for it is about them."""
    name, about = _title(visual, free)
    options = {**_options(visual, free), "pool": 7, "normalise": True}
    return parts.embedded(
        name,
        f"{about} on embedded parts: SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="ee_mllm", options=options),
        (parts.warm(0.15 * minutes), parts.align(0.05 * minutes), parts.sft(0.8 * minutes)),
    )


def _options(visual: Visual, free: bool) -> dict[str, str | bool]:
    return {"visual": visual, "free": free}


def _title(visual: Visual, free: bool) -> tuple[str, str]:
    """Name and system."""
    names = {"self": "ee-mllm", "keys": "ee-mllm-keys", "ffn": "naavit"}
    about = "NAAViT (media never ask)" if visual == "ffn" else "EE-MLLM (composite attention)"
    return f"{names[visual]}{'-f' if free else ''}", about.replace(" (", "-F (training-free; ") if free else about
