"""LLaVA and LLaVA-1.5 (arXiv 2304.08485, 2310.03744): projector alignment, then visual instruction tuning."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts


def llava(
    size: Literal["embedded", "published"] = "embedded", projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
) -> Recipe:
    """LLaVA-1.5 with its MLP, or the first LLaVA with its linear projector."""
    return embedded(projector) if size == "embedded" else published(projector)


def published(projector: str) -> Recipe:
    """As the authors trained it on 7B; name your copies of their data with `stages.align.data=...`.

    Values of stage 1 and 2 are those of the official scripts (spec B3.1, T1.4). Conversations begin with Vicuna's
    system turn, captions with none.
    """
    first = projector == "linear"
    encoder = EncoderConfig(source="openai/clip-vit-large-patch14-336", layer=-2, architecture=parts.CLIP_L_336)
    if first:
        smaller = {**parts.CLIP_L_336, "image_size": 224}
        encoder = EncoderConfig(source="openai/clip-vit-large-patch14", layer=-2, architecture=smaller, aspect="crop")
    return parts.published(
        name="llava-v1-7b" if first else "llava-1.5-7b",
        about=f"LLaVA{'' if first else '-1.5'} 7B as published: {projector} projector, two stages",
        encoder=encoder,
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="llava", options={"projector": projector}),
        system=parts.VICUNA_V1,
        stages=(
            Stage(
                name="align",
                data=(parts.file("cc3m_595k.json" if first else "blip_laion_cc_sbu_558k.json", "llava-pretrain"),),
                template="plain",
                train={"connectors.*": Train()},
                lr=2e-3 if first else 1e-3,
                batch_size=128 if first else 256,
                budget=Budget(epochs=1),
            ),
            Stage(
                name="sft",
                data=(parts.file("llava_instruct_158k.json" if first else "llava_v1_5_mix665k.json", "images"),),
                train={"connectors.*": Train(), "llm.*": Train()},
                lr=2e-5,
                batch_size=32 if first else 128,
                budget=Budget(epochs=3 if first else 1),
                recompute=True,
            ),
        ),
    )


def embedded(projector: str = "mlp2x_gelu", minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0 on scenes and easy-VQA: warm, align, sft within `minutes` of training.

    Chosen by measurement on two cores (docs/log.md): all questions about a picture share its tokens, and few pictures
    per step leave time for many steps.
    """
    return parts.embedded(
        "llava" if projector == "mlp2x_gelu" else "llava-linear",
        f"LLaVA on embedded parts: {projector} projector, SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="llava", options={"projector": projector, "pool": 3, "normalise": True}),
        (
            parts.warm(0.12 * minutes),
            parts.align(0.06 * minutes),
            parts.sft(0.82 * minutes, {"connectors.*": Train(lr=1e-4), **parts.EVERY_LORA}),
        ),
    )
