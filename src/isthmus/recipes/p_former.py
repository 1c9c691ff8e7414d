"""P-Former (arXiv 2307.07063): BLIP-2, whose queries are shown what prompt the LLM wants, learned from text alone."""

from __future__ import annotations

from typing import Literal

from isthmus.config import Budget, ObjectiveConfig, Recipe, Source, Stage, Train
from isthmus.recipes import parts
from isthmus.recipes.blip2 import blip2

PUBLISHED = (10.0, 100.0)
"""The weight of the match in the first stage, and in the second."""
SENTENCES = 12_000_000
"""Read from the name of the checkpoint that the authors' log of the first stage starts from."""
PAIRS = 4_000_000
DEVICES = 8


def p_former(
    size: Literal["embedded", "published"] = "embedded", weight: float | None = None, minutes: float = 5.0
) -> Recipe:
    """A prompt teacher on sentences, then BLIP-2's stages with the teacher's prompt as a target.

    Args:
        size: embedded parts, or those of the paper (OPT-2.7B).
        weight: lambda in both stages; None is the paper's 10 and then 100. With 0 the teacher and its stage are left
            out: BLIP-2 on the same data, with the same minutes in the shared stages.
        minutes: of the whole embedded recipe.
    """
    weights = PUBLISHED if weight is None else (weight, weight)
    base = blip2(size, minutes=round(0.8 * minutes, 3))
    stages = _published(base, weights) if size == "published" else _embedded(base, weights)
    name = "p-former" if size == "embedded" else "p-former-opt-2.7b"
    about = f"P-Former {'as published, opt-2.7b' if size == 'published' else 'on embedded parts'}"
    if not any(weights):
        return base.but(name=f"{name}-without", about=f"{about}: its BLIP-2 without the teacher", stages=stages)
    return base.but(
        name=name if weight is None else f"{name}-{weight:g}",
        about=f"{about}: prompts learned from text alone guide the Q-Former",
        aligner=base.aligner.but(name="p_former"),
        stages=(_teacher(size, 0.2 * minutes), *stages),
    )


def _teacher(size: str, minutes: float) -> Stage:
    """Sentences alone; the LLM is frozen and there is no picture."""
    stage = Stage(
        name="teacher",
        data=_captions("words"),
        template="plain",
        train={"heads.teacher.*": Train()},
        objectives=tuple(ObjectiveConfig(name=name) for name in ("prompt_contrast", "prompt_words", "prompt_lm")),
        lr=1e-3,
        batch_size=64,
        budget=Budget(minutes=round(minutes, 3)),
    )
    if size == "embedded":
        return stage
    batch, epochs = 3 * 128, 5
    return stage.but(
        data=(parts.file("laion_12m_sentences.json", "images"),),
        train={"heads.teacher.*": Train(weight_decay=0.05)},
        lr=1e-4,
        floor=0.1,
        batch_size=batch,
        warmup=2000 * batch / (SENTENCES * epochs),
        budget=Budget(epochs=epochs),
    )


def _embedded(base: Recipe, weights: tuple[float, float]) -> tuple[Stage, ...]:
    """Names and captions in the first two stages; questions, which are no captions, in the last."""
    first, align, sft = base.stages
    data = _captions("picture")
    return (
        _guided(first.but(data=data), weights[0]),
        _guided(align.but(data=data, template="plain"), weights[1]),
        sft,
    )


def _published(base: Recipe, weights: tuple[float, float]) -> tuple[Stage, ...]:
    """COCO, Visual Genome, CC3M and SBU, ten times in either stage."""
    batch, epochs = DEVICES * 128, 10
    first, second = (
        stage.but(
            data=(parts.file("coco_vg_cc3m_sbu_captions.json", "images"),),
            batch_size=batch,
            betas=(0.9, 0.999),
            warmup=steps * batch / (PAIRS * epochs),
            budget=Budget(epochs=epochs),
        )
        for stage, steps in zip(base.stages, (5000, 2000))
    )
    return _guided(first, weights[0]), _guided(second, weights[1])


def _guided(stage: Stage, weight: float) -> Stage:
    """The stage with the match beside its objectives, so that the projection trains in all of them."""
    if not weight:
        return stage
    return stage.but(
        train={glob: how for glob, how in stage.train.items() if glob != "connectors.*.project.*"},
        objectives=(*stage.objectives, ObjectiveConfig(name="prompt_match", weight=weight)),
    )


def _captions(shown: Literal["picture", "words"]) -> tuple[Source, ...]:
    """What is said of the embedded pictures; in the plain template, words in their place are left out."""
    return (
        Source(name="naming", weight=3.0, options={"kinds": ["names"], "count": 2500, "shown": shown}),
        Source(name="scenes", weight=3.0, options={"kinds": ["names", "caption"], "count": 1500, "shown": shown}),
    )
