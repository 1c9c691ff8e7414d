"""What recipes share: the embedded parts, data, tasks and stages, and the published parts that several papers use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.config import (
    AlignerConfig,
    Budget,
    EncoderConfig,
    Engine,
    LoRA,
    ObjectiveConfig,
    Recipe,
    Source,
    Stage,
    TaskConfig,
    Train,
)

CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B: dict[str, Any] = {
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
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system turn of LLaVA's `v1` template, which Vicuna from v1.1 on was trained with."""

ENCODER = EncoderConfig(layer="block5+block11+head", aspect="squash")
"""EfficientNet-Lite0 with three depths side by side."""
SINGLE, SCENES = 2500, 4000
"""Pictures of one thing, and of several, that embedded recipes draw from: each is encoded once, before the training."""
MIX: tuple[Source, ...] = (
    Source(name="easy-vqa", weight=0.6, limit=1500, options={"together": True}),
    *(
        Source(
            name="scenes",
            weight=weight,
            options={"kinds": ["checklist", "presence"], "together": True, "count": SCENES, "shown": shown},
        )
        for shown, weight in (("picture", 2.5), ("words", 0.6))
    ),
    Source(
        name="scenes",
        weight=0.2,
        options={"kinds": ["counting", "colour", "relation", "caption"], "together": True, "count": SCENES},
    ),
    *(
        Source(
            name="naming",
            weight=weight,
            options={"kinds": ["naming"], "count": SINGLE, "shown": shown},
        )
        for shown, weight in (("picture", 1.5), ("words", 0.5))
    ),
)
"""Pictures, and words in place of pictures: what the LLM learns of the second it can do with the first, once connected
tokens are like words. Presence is asked by checklists and, so that the plain question is known, once by itself."""
TASKS: tuple[TaskConfig, ...] = (
    *(TaskConfig(name=name) for name in ("naming", "easy-vqa", "presence", "counting", "relation")),
    TaskConfig(name="caption", limit=100),
)
ATTENTION_LORA: Mapping[str, Train] = {"llm.*self_attn.*": Train(mode=LoRA(r=16, alpha=32))}
"""On attention alone: fewer products per step than on all Linears."""
EVERY_LORA: Mapping[str, Train] = {"llm.*layers.*": Train(lr=1e-3, mode=LoRA(r=16, alpha=32))}
"""On every Linear of every layer."""


def warm(minutes: float) -> Stage:
    """Connected tokens against the words for what they show; the LLM is not run."""
    return Stage(
        name="warm",
        data=(
            Source(name="naming", weight=2.0, options={"kinds": ["names"], "count": SINGLE}),
            Source(name="scenes", weight=4.0, options={"kinds": ["names"], "count": SCENES + SCENES // 2}),
            Source(name="easy-vqa", weight=0.7, limit=1000, options={"kinds": ["caption"]}),
        ),
        train={"connectors.*": Train()},
        objectives=(ObjectiveConfig(name="contrastive", options={"match": "late", "temperature": 0.15}),),
        lr=3e-3,
        batch_size=128,
        budget=Budget(minutes=round(minutes, 3)),
    )


def align(minutes: float, train: Mapping[str, Train] | None = None, **more: Any) -> Stage:
    """What the joint added trains (by default its connectors), the LLM is frozen."""
    return Stage(
        name="align",
        data=MIX,
        train=dict(train or {"connectors.*": Train()}),
        lr=2e-3,
        batch_size=7,
        evaluate_every=None,
        budget=Budget(minutes=round(minutes, 3)),
        **more,
    )


def sft(minutes: float, train: Mapping[str, Train] | None = None, **more: Any) -> Stage:
    """Questions and answers, with LoRA on the LLM's attention unless `train` says otherwise."""
    return Stage(
        name="sft",
        data=MIX,
        train=dict(train or {"connectors.*": Train(lr=5e-4), **ATTENTION_LORA}),
        lr=2e-3,
        batch_size=7,
        evaluate_every=0.5,
        budget=Budget(minutes=round(minutes, 3)),
        **more,
    )


def embedded(name: str, about: str, aligner: AlignerConfig, stages: tuple[Stage, ...], **more: Any) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0 under a joint, on scenes and easy-VQA, measured by the demo's tasks."""
    return Recipe(
        name=name,
        about=about,
        encoder=more.pop("encoder", ENCODER),
        aligner=aligner,
        system="",  # the default one costs 17 tokens in every sample
        stages=stages,
        eval=TASKS,
        **more,
    )


def published(name: str, about: str, **more: Any) -> Recipe:
    """A system as its authors trained it: in bfloat16, and pictures are encoded in every step.

    Kept features would take 0.7 MB a picture of BLIP-2's 129 million, 1.2 MB of LLaVA-1.5's 1.2 million.
    """
    return Recipe(name=name, about=about, dtype="bfloat16", engine=Engine(cache=False), **more)


def ablated(recipe: Recipe, chosen: Mapping[str, Any], usual: Mapping[str, Any]) -> Recipe:
    """The recipe with what was chosen otherwise than usual in its name, so that no two settings share one."""
    return recipe.but(
        name="-".join([recipe.name, *(f"{key}-{chosen[key]}" for key in chosen if chosen[key] != usual[key])])
    )


def gated(recipe: Recipe, gate: float) -> Recipe:
    """The recipe whose joint's gates begin with `gate`, before their tanh; at 0 as published."""
    joint = recipe.aligner
    return recipe.but(aligner=joint.but(options={**joint.options, "gate": gate})) if gate else recipe


def file(name: str, images: str) -> Source:
    """A file of a published data set, where recipes expect the user's copy."""
    return Source(name=f"data/{name}", images=Path("data") / images)


def llava_stages(joint: Mapping[str, Train]) -> tuple[Stage, Stage]:
    """LLaVA-1.5's two stages as published (spec T1.4): `joint` alone, then connectors and LLM."""
    return (
        Stage(
            name="align",
            data=(file("blip_laion_cc_sbu_558k.json", "llava-pretrain"),),
            template="plain",
            train=dict(joint),
            lr=1e-3,
            batch_size=256,
            budget=Budget(epochs=1),
        ),
        Stage(
            name="sft",
            data=(file("llava_v1_5_mix665k.json", "images"),),
            train={"connectors.*": Train(), "llm.*": Train()},
            lr=2e-5,
            batch_size=128,
            budget=Budget(epochs=1),
            recompute=True,
        ),
    )
