"""LLaVA-VDEP (arXiv 2502.09093): LLaVA's joint and stages, with a term over states at the places of pictures."""

from __future__ import annotations

from typing import Literal

from isthmus.config import AlignerConfig, ObjectiveConfig, Recipe
from isthmus.recipes import parts
from isthmus.recipes.llava import published


def vdep(
    size: Literal["embedded", "published"] = "embedded",
    alpha: float = 0.1,
    ratio: float = 0.5,
    shift: Literal[0, 1] = 1,
    detach: bool = True,
    distance: Literal["mse", "cosine", "smooth-l1"] = "mse",
    layer: Literal["last", "before"] | int = "last",
    mix_by: Literal["sample", "batch"] = "sample",
    text: bool = True,
) -> Recipe:
    """VDEP in the stage that trains the LLM; `alpha` weighs its term, and at 0 it is LLaVA. See `objectives.vdep`.

    Values other than LLaVA's are ours (spec B10.2): which stages carry the term, and how strongly, is not verified.
    """
    base = embedded() if size == "embedded" else published("mlp2x_gelu")
    name = "vdep" if size == "embedded" else "vdep-7b"
    where = "on embedded parts" if size == "embedded" else "7B: LLaVA-1.5's parts and values"
    if not alpha:
        return base.but(name=f"{name}-without", about=f"LLaVA {where}: VDEP's recipe without its term")
    options = {
        "distance": distance,
        "shift": shift,
        "detach": detach,
        "layer": layer,
        "ratio": ratio,
        "mix_by": mix_by,
        "text": text,
    }
    *before, last = base.stages
    term = ObjectiveConfig(name="vdep", weight=alpha, options=options)
    return base.but(
        name=name if shift else f"{name}-shift-0",
        about=f"LLaVA-VDEP {where}: states at a picture's places tell its {'next' if shift else 'own'} vectors",
        stages=(*before, last.but(objectives=(*last.objectives, term))),
    )


def embedded(minutes: float = 5.0) -> Recipe:
    """LLaVA's embedded stages with 49 tokens per picture, for it is about them."""
    return parts.embedded(
        "vdep",
        "",
        AlignerConfig(name="llava", options={"pool": 7, "normalise": True}),
        (parts.warm(0.15 * minutes), parts.align(0.05 * minutes), parts.sft(0.8 * minutes)),
    )
