"""The demo: LLaVA on embedded parts, sized for ten minutes on two cores."""

from __future__ import annotations

from isthmus.config import Recipe, Train
from isthmus.recipes import parts
from isthmus.recipes.llava import embedded

BASELINES = 100
"""Items per task for the measure before training and for the controls: of ten minutes, most should be training."""


def demo(minutes: float = 4.0) -> Recipe:
    """What `isthmus demo` runs; `minutes` is the time for training alone.

    Chosen by measurement (docs/log.md): the joint learns the words for what it sees in `warm`, at a small part of the
    LLM's cost; from then on its tokens lean towards them (the option `words`) and hardly move, so that all the rest of
    the time goes into reading them.
    """
    return embedded().but(
        name="demo",
        eval=tuple(task.but(baseline_limit=BASELINES) for task in parts.TASKS),
        about="SmolLM2-135M learns to see through EfficientNet-Lite0, joined as in LLaVA",
        stages=(
            parts.warm(0.23 * minutes),
            parts.sft(0.77 * minutes, {"connectors.*": Train(lr=1e-5), **parts.EVERY_LORA}, joint={"words": 0.02}),
        ),
    )
