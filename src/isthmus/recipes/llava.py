"""LLaVA and LLaVA-1.5 (arXiv 2304.08485, 2310.03744): projector alignment, then visual instruction tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from isthmus.config import (
    AlignerConfig,
    Budget,
    EncoderConfig,
    LLMConfig,
    LoRA,
    ObjectiveConfig,
    Recipe,
    Source,
    Stage,
    TaskConfig,
    Train,
)

CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llava(
    size: Literal["embedded", "published"] = "embedded", projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
) -> Recipe:
    """LLaVA-1.5 with its MLP, or the first LLaVA with its linear projector."""
    return embedded(projector) if size == "embedded" else published(projector)


def published(projector: str) -> Recipe:
    """As the authors trained it on 7B; name your copies of their data with `stages.align.data=...`.

    Values of stage 1 and 2 are those of the official scripts (spec B3.1, T1.4).
    """
    first = projector == "linear"
    encoder = EncoderConfig(source="openai/clip-vit-large-patch14-336", layer=-2, architecture=CLIP_L_336)
    if first:
        smaller = {**CLIP_L_336, "image_size": 224}
        encoder = EncoderConfig(source="openai/clip-vit-large-patch14", layer=-2, architecture=smaller, aspect="crop")
    return Recipe(
        name="llava-v1-7b" if first else "llava-1.5-7b",
        about=f"LLaVA{'' if first else '-1.5'} 7B as published: {projector} projector, two stages",
        encoder=encoder,
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=VICUNA_7B),
        aligner=AlignerConfig(name="llava", options={"projector": projector}),
        dtype="bfloat16",
        stages=(
            Stage(
                name="align",
                data=(_file("blip_laion_cc_sbu_558k.json", "llava-pretrain"),),
                template="plain",
                train={"connectors.*": Train()},
                lr=2e-3 if first else 1e-3,
                batch_size=128 if first else 256,
                budget=Budget(epochs=1),
            ),
            Stage(
                name="sft",
                data=(_file("llava_instruct_158k.json" if first else "llava_v1_5_mix665k.json", "images"),),
                train={"connectors.*": Train(), "llm.*": Train()},
                lr=2e-5,
                batch_size=32 if first else 128,
                budget=Budget(epochs=3 if first else 1),
                recompute=True,
            ),
        ),
    )


def _file(name: str, images: str) -> Source:
    return Source(name=f"data/{name}", images=Path("data") / images)


def embedded(projector: str = "mlp2x_gelu", minutes: float = 5.0, name: str | None = None) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0 on scenes and easy-VQA: warm, align, sft within `minutes` of training.

    Chosen by measurement on two cores (docs/log.md): all questions about a picture share its tokens, LoRA sits on
    attention alone, and few pictures per step leave time for many steps.
    """
    return Recipe(
        name=name or ("llava" if projector == "mlp2x_gelu" else "llava-linear"),
        about=f"LLaVA on embedded parts: {projector} projector, SmolLM2-135M, EfficientNet-Lite0",
        encoder=EncoderConfig(layer="block5+block11+head", aspect="squash"),
        aligner=AlignerConfig(name="llava", options={"projector": projector, "pool": 3, "normalise": True}),
        system="",  # the default one costs 17 tokens in every sample
        stages=(
            Stage(
                name="warm",
                data=(
                    Source(name="naming", weight=3.0, options={"count": 2500}),
                    Source(name="scenes", weight=2.0, options={"kinds": ["caption"], "count": 1500}),
                    Source(name="easy-vqa", limit=1000, options={"kinds": ["caption"]}),
                ),
                train={"connectors.*": Train()},
                objectives=(ObjectiveConfig(name="contrastive"),),
                lr=3e-3,
                batch_size=128,
                budget=Budget(minutes=round(0.15 * minutes, 3)),
            ),
            Stage(
                name="align",
                data=MIX,
                train={"connectors.*": Train()},
                lr=2e-3,
                batch_size=6,
                evaluate_every=None,
                budget=Budget(minutes=round(0.08 * minutes, 3)),
            ),
            Stage(
                name="sft",
                data=MIX,
                train={"connectors.*": Train(lr=5e-4), "llm.*self_attn.*": Train(mode=LoRA(r=16, alpha=32))},
                lr=2e-3,
                batch_size=6,
                evaluate_every=0.5,
                budget=Budget(minutes=round(0.77 * minutes, 3)),
            ),
        ),
        eval=TASKS,
    )


MIX: tuple[Source, ...] = (
    Source(name="easy-vqa", weight=1.0, limit=1500, options={"together": True}),
    Source(name="scenes", weight=1.0, options={"together": True, "repeat": 3, "count": 1500}),
    Source(name="naming", weight=1.0, options={"count": 2500}),
)
TASKS: tuple[TaskConfig, ...] = (
    *(TaskConfig(name=name) for name in ("naming", "easy-vqa", "presence", "counting", "relation")),
    TaskConfig(name="caption", limit=100),
)
