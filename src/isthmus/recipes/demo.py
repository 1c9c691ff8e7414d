"""The demo: LLaVA on embedded parts, sized for ten minutes on two cores."""

from __future__ import annotations

from isthmus.config import Recipe
from isthmus.recipes.llava import embedded


def demo(minutes: float = 3.0) -> Recipe:
    """What `isthmus demo` runs; `minutes` is the time for training alone."""
    return embedded(minutes=minutes, name="demo").but(
        about="SmolLM2-135M learns to see through EfficientNet-Lite0, joined as in LLaVA"
    )
