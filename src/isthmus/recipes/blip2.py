"""BLIP-2, InstructBLIP and MiniGPT-4 (arXiv 2301.12597, 2305.06500, 2304.10592): one Q-Former, trained three ways."""

from __future__ import annotations

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

EVA_G: dict[str, Any] = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
OPT_2_7B: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 2560,
    "word_embed_proj_dim": 2560,
    "ffn_dim": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50272,
}
FLAN_T5_XL: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
LLMS = {
    "opt-2.7b": LLMConfig(source="facebook/opt-2.7b", architecture=OPT_2_7B),
    "flan-t5-xl": LLMConfig(source="google/flan-t5-xl", architecture=FLAN_T5_XL),
}
BERT = "google-bert/bert-base-uncased"
SMALL: dict[str, Any] = {"queries": 9, "layers": 4, "width": 192, "heads": 4, "inner": 768, "dropout": 0.0}
"""A Q-Former for a laptop: two looks at the picture, nine tokens like the other embedded recipes."""
WORDS = 49152
"""SmolLM2's vocabulary, which the embedded text halves read."""
TEXT_HALF = ("words.*", "layers.*.text_feed.*", "heads.*")
"""What the first stage trains and the second has no use for."""


def blip2(
    size: Literal["embedded", "published"] = "embedded",
    llm: Literal["opt-2.7b", "flan-t5-xl"] = "opt-2.7b",
    first: bool = True,
    minutes: float = 5.0,
) -> Recipe:
    """Contrast, matching and writing without the LLM, then captions through it; `first=False` leaves out the former."""
    name = f"blip2-{llm}" if size == "published" else "blip2"
    name, about = (name, "three objectives, then generation") if first else (f"{name}-second", "generation alone")
    if size == "published":
        options: dict[str, Any] = {"qformer": BERT, **({"text": True, "tokenizer": BERT} if first else {})}
        return parts.published(
            name=name,
            about=f"BLIP-2 as published, {llm}: {about}",
            encoder=_encoder(llm),
            llm=LLMS[llm],
            aligner=AlignerConfig(name="blip2", options=options),
            stages=tuple(_published(first, llm)),
        )
    options = {**SMALL, **({"text": True, "vocabulary": WORDS + 1} if first else {})}
    rest = minutes if not first else 0.75 * minutes
    joint = {"connectors.*": Train(), **(_frozen() if first else {})}
    stages = (
        *([_first(round(minutes - rest, 3))] if first else []),
        parts.align(0.2 * rest, joint),
        parts.sft(0.8 * rest, {"connectors.*": Train(lr=5e-4), **(_frozen() if first else {}), **parts.ATTENTION_LORA}),
    )
    return parts.embedded(
        name, f"BLIP-2 on embedded parts: {about}", AlignerConfig(name="blip2", options=options), stages
    )


def instructblip(
    size: Literal["embedded", "published"] = "embedded", aware: bool = True, minutes: float = 5.0
) -> Recipe:
    """Questions reach the Q-Former as well as the LLM; every question is a sample of its own.

    `aware=False` is the paper's ablation: the same data and stages, and queries that do not hear what is asked.
    The published recipe begins with a trained Q-Former and BERT's text half; embedded, `align` makes one. The authors
    draw their 26 sets by the root of their sizes: give several files and `stages.sft.mixing=0.5` for that.
    """
    end = "" if aware else "-blind"
    if size == "published":
        former = "Salesforce/blip2-opt-2.7b"
        hears = AlignerConfig(name="instructblip", options={"tokenizer": BERT, "qformer": [BERT, former]})
        return parts.published(
            name=f"instructblip{end}-vicuna-7b",
            about="InstructBLIP 7B as published: " + ("instruction-aware" if aware else "blind") + " Q-Former",
            encoder=_encoder("opt-2.7b"),
            llm=LLMConfig(source="lmsys/vicuna-7b-v1.1", architecture=parts.VICUNA_7B),
            aligner=hears if aware else AlignerConfig(name="blip2", options={"qformer": former}),
            stages=(
                Stage(
                    name="sft",
                    data=(parts.file("instructblip_held_in.json", "images"),),
                    train={"connectors.*": Train(weight_decay=0.05)},
                    lr=1e-5,
                    batch_size=128,  # the paper's for 7B, recalled and not checked; 192 for 3B, 64 for 11B and 13B
                    warmup=1000 / 60_000,
                    budget=Budget(steps=60_000),
                ),
            ),
        )
    options = {**SMALL, "vocabulary": WORDS} if aware else SMALL
    return parts.embedded(
        f"instructblip{end}",
        "InstructBLIP on embedded parts: the Q-Former " + ("hears" if aware else "does not hear") + " the question",
        AlignerConfig(name="instructblip" if aware else "blip2", options=options),
        (
            parts.align(0.2 * minutes).but(data=_apart()),
            parts.sft(0.8 * minutes).but(data=_apart()),
        ),
    )


def minigpt4(size: Literal["embedded", "published"] = "embedded", curated: bool = True, minutes: float = 5.0) -> Recipe:
    """A trained, frozen Q-Former and one Linear; `curated=False` leaves out the short second stage.

    Embedded, there is no trained Q-Former to begin with, so a first stage through the LLM makes one.
    """
    linear = {"connectors.*.project.*": Train(weight_decay=0.05)}
    name = "minigpt4" if curated else "minigpt4-first"
    if size == "published":
        one = Stage(
            name="align",
            data=(
                parts.file("laion_captions.json", "images").but(weight=115.0),
                parts.file("cc_sbu_captions.json", "images").but(weight=14.0),
            ),
            template="plain",
            train=linear,
            lr=1e-4,
            floor=0.8,
            batch_size=256,
            warmup=5000 / 20_000,
            budget=Budget(steps=20_000),
        )
        two = one.but(
            name="sft",
            data=(parts.file("cc_sbu_align.json", "images"),),
            template="chat",
            lr=3e-5,
            floor=1 / 3,
            batch_size=12,
            warmup=200 / 1000,
            budget=Budget(steps=1000),
        )
        return parts.published(
            name=f"{name}-7b",
            about="MiniGPT-4 7B as published: frozen Q-Former, one Linear, a short curated second stage",
            encoder=_encoder("flan-t5-xxl"),
            llm=LLMConfig(source="lmsys/vicuna-7b-v1.1", architecture=parts.VICUNA_7B),
            aligner=AlignerConfig(name="minigpt4", options={"qformer": "Salesforce/blip2-flan-t5-xxl"}),
            stages=(one, two) if curated else (one,),
        )
    only = {"connectors.*.project.*": Train()}
    last = parts.sft(0.2 * minutes, only).but(data=(Source(name="scenes", options={"kinds": ["caption"]}),))
    return parts.embedded(
        name,
        "MiniGPT-4 on embedded parts: a frozen Q-Former and one Linear",
        AlignerConfig(name="minigpt4", options=SMALL),
        (
            parts.align(0.5 * minutes).but(name="former"),
            parts.align(0.3 * minutes if curated else 0.5 * minutes, only),
            *((last,) if curated else ()),
        ),
    )


def _encoder(llm: str) -> EncoderConfig:
    """EVA's ViT-g before its last norm, which the Q-Former's own replaces; 256 patches and a class token."""
    source = f"Salesforce/blip2-{llm}"
    return EncoderConfig(source=source, layer=-1, class_token="keep", aspect="squash", architecture=EVA_G)


def _published(first: bool, llm: str) -> list[Stage]:
    """Batches and steps are those of the paper for ViT-g (recalled, spec B2.1); rates those of the scripts, but that
    they rise from 0 and not from 1e-6."""
    data = (parts.file("blip2_129m_captions.json", "images"),)
    whole = {"connectors.*": Train(weight_decay=0.05)}
    one = Stage(
        name="first",
        data=data,
        template="plain",
        train={**whole, "connectors.*.project.*": Train(mode="frozen")},
        objectives=_three(),
        lr=1e-4,
        floor=0.1,
        batch_size=1680,
        warmup=5000 / 250_000,
        betas=(0.9, 0.98),
        budget=Budget(steps=250_000),
    )
    two = Stage(
        name="second",
        data=data,
        template="prefix" if llm == "flan-t5-xl" else "plain",
        train={**whole, **(_frozen() if first else {})},
        lr=1e-4,
        floor=0.1,
        batch_size=1520 if llm == "flan-t5-xl" else 1920,
        warmup=2000 / 80_000,
        betas=(0.9, 0.98),
        budget=Budget(steps=80_000),
    )
    return [one, two] if first else [two]


def _first(minutes: float) -> Stage:
    """The three objectives on names and captions of the embedded pictures."""
    return Stage(
        name="first",
        data=(
            Source(name="naming", weight=3.0, options={"kinds": ["names"], "count": 2500}),
            Source(name="scenes", weight=3.0, options={"kinds": ["names"], "count": 1500}),
            Source(name="easy-vqa", weight=0.7, limit=1000, options={"kinds": ["caption"]}),
        ),
        train={"connectors.*": Train(), "connectors.*.project.*": Train(mode="frozen")},
        objectives=_three(),
        lr=1e-3,
        batch_size=64,
        budget=Budget(minutes=minutes),
    )


def _three() -> tuple[ObjectiveConfig, ...]:
    return tuple(ObjectiveConfig(name=name) for name in ("itc", "itm", "itg"))


def _frozen() -> dict[str, Train]:
    return {f"connectors.*.{glob}": Train(mode="frozen") for glob in TEXT_HALF}


def _apart() -> tuple[Source, ...]:
    """The embedded mix with every question in a sample of its own: the picture's tokens depend on it."""
    return tuple(
        source.but(options={**source.options, "together": False}) if "together" in source.options else source
        for source in parts.MIX
    )
