"""ViCToR (arXiv 2410.14332): between LLaVA's two stages, one in which most of a picture's vectors are told again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from isthmus.config import (
    AlignerConfig,
    Budget,
    EncoderConfig,
    LLMConfig,
    ObjectiveConfig,
    Recipe,
    Source,
    Stage,
    Train,
)
from isthmus.recipes import parts

QWEN25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
}
WHOLE = {"connectors.*.inner.*": Train()}
"""Stages that leave the pool out read pictures whole."""


def victor(size: Literal["embedded", "published"] = "embedded", weight: float = 10.0) -> Recipe:
    """ViCToR; at `weight` 0 vectors are replaced as well, but nothing has to tell what stood there."""
    return _embedded(weight) if size == "embedded" else _published(weight)


def _published(weight: float) -> Recipe:
    """The second stage's values are those of the released code (spec B10.3), the rest LLaVA-1.5's but for the rate."""
    align, sft = parts.llava_stages(WHOLE)
    tower, rest = Train(lr=2e-6), Train(lr=1e-5)
    comprehend = _comprehend(weight, {"encoders.*": tower, "connectors.*": rest, "llm.*": rest}, Budget(epochs=1)).but(
        data=(parts.file("cc3m_recaptioned.json", "cc3m"),), lr=1e-3, batch_size=4 * 4 * 8, recompute=True
    )
    return parts.published(
        name="victor-7b",
        about="ViCToR 7B: Qwen2.5 tells three quarters of a picture's vectors that a pool has replaced",
        encoder=EncoderConfig(source="openai/clip-vit-large-patch14-336", layer=-2, architecture=parts.CLIP_L_336),
        llm=LLMConfig(source="Qwen/Qwen2.5-7B-Instruct", architecture=QWEN25_7B),
        aligner=AlignerConfig(name="victor"),
        stages=(align, comprehend, sft.but(train={**WHOLE, "llm.*": Train()}, lr=1e-5)),
    )


def _embedded(weight: float, minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0, 49 tokens per picture, 37 of which a pool of 128 replaces."""
    captions = (
        Source(name="naming", weight=3.0, options={"kinds": ["names"], "count": 2500}),
        Source(name="scenes", weight=3.0, options={"kinds": ["names", "caption"], "count": 1500}),
    )
    train = {"connectors.*": Train(lr=5e-4), **parts.ATTENTION_LORA}
    comprehend = _comprehend(weight, train, Budget(minutes=round(0.3 * minutes, 3))).but(data=captions, batch_size=6)
    return parts.embedded(
        "victor",
        "ViCToR on embedded parts: SmolLM2-135M tells vectors of a picture that a pool has replaced",
        AlignerConfig(name="victor", options={"grid": 7, "size": 128}),
        (
            parts.warm(0.15 * minutes).but(train=WHOLE),
            parts.align(0.05 * minutes, WHOLE),
            comprehend,
            parts.sft(0.5 * minutes, {"connectors.*.inner.*": Train(lr=5e-4), **parts.ATTENTION_LORA}),
        ),
    )


def _comprehend(weight: float, train: Mapping[str, Train], budget: Budget) -> Stage:
    """The stage between: everything trains, and the pool with it."""
    told = (ObjectiveConfig(name="victor", weight=weight),) if weight else ()
    return Stage(
        name="comprehend",
        data=("none",),
        train={**train, "connectors.*.pool": Train(lr=1e-3), **({"heads.*": Train(lr=1e-3)} if weight else {})},
        objectives=(ObjectiveConfig(name="lm"), *told),
        lr=2e-3,
        budget=budget,
    )
