"""CogVLM (arXiv 2311.03079): experts and connector on captions, then with grounding, then on conversations."""

from __future__ import annotations

from typing import Any, Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts

EVA2_CLIP_E = EncoderConfig(
    source="timm/eva02_enormous_patch14_clip_224.laion2b_plus",
    layer=-2,
    image_size=490,
    architecture={"architecture": "eva02_enormous_patch14_clip_224", "pretrained_cfg": {"input_size": [3, 224, 224]}},
    aspect="squash",
)
"""All but the last of 64 blocks, with norms behind attention and MLP; positions resampled to 35 x 35 patches."""
JOINT = {"connectors.*": Train(), "llm.*.grafts.expert.*": Train()}

Where = Literal["layer", "attention", "ffn"]
Start = Literal["llm", "random"]


def cogvlm(
    size: Literal["embedded", "published"] = "embedded", every: int = 1, where: Where = "layer", start: Start = "llm"
) -> Recipe:
    """CogVLM; `every`, `where` and `start` are the paper's ablations of the experts."""
    options = {"every": every, "where": where, "start": start}
    recipe = embedded(options) if size == "embedded" else published(options)
    return parts.ablated(recipe, options, {"every": 1, "where": "layer", "start": "llm"})


def published(options: dict[str, Any]) -> Recipe:
    """17 B as the authors describe it (spec B5); name your copies of the data with `stages.align.data=...`.

    What the spec marks as not verified is a hint: steps, batch sizes and rates of all three stages.
    """
    vision = Train(lr=1e-6)
    return parts.published(
        name="cogvlm-17b",
        about="CogVLM 17B as published: EVA2-CLIP-E at 490 px, experts on every Linear of Vicuna 7B",
        encoder=EVA2_CLIP_E,
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="cogvlm", options={**options, "idle": True}),
        stages=(
            Stage(
                name="align",
                data=(parts.file("laion2b_coyo_captions.json", "captions"),),
                template="plain",
                train=JOINT,
                lr=1e-4,
                batch_size=8192,
                accumulate=64,
                budget=Budget(steps=120_000),
                recompute=True,
            ),
            Stage(
                name="ground",
                data=(
                    parts.file("laion2b_coyo_captions.json", "captions"),
                    parts.file("grounded_captions_40m.json", "grounded"),
                ),
                train=JOINT,
                lr=1e-5,
                batch_size=1024,
                accumulate=8,
                budget=Budget(steps=60_000),
                recompute=True,
            ),
            Stage(
                name="sft",
                data=(parts.file("cogvlm_sft_311k.json", "images"),),
                train={**JOINT, "encoders.image.*": vision},
                lr=1e-5,
                batch_size=1024,
                accumulate=8,
                budget=Budget(steps=6_000),
                recompute=True,
            ),
        ),
    )


def embedded(options: dict[str, Any], minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M with experts, EfficientNet-Lite0: align and sft within `minutes`; the LLM's own weights stay."""
    return parts.embedded(
        "cogvlm",
        "CogVLM on embedded parts: visual experts beside the frozen weights of SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="cogvlm", options={**options, "pool": 3}),
        (
            parts.align(0.2 * minutes),
            parts.sft(0.8 * minutes, {"connectors.*": Train(lr=5e-4), "llm.*.grafts.expert.*": Train(lr=1e-4)}),
        ),
    )
