"""What the grounding recipes share: questions about regions of embedded scenes, and their tasks."""

from __future__ import annotations

from isthmus.config import Recipe, Source, Stage, TaskConfig
from isthmus.recipes import parts

REGIONS: tuple[Source, ...] = (
    Source(
        name="scenes",
        weight=3.0,
        options={"kinds": ["refer", "region"], "together": True, "repeat": 3, "count": 3000},
    ),
    *parts.MIX,
)
"""Three places to find and three to name per picture, and the demo's mix."""
TASKS: tuple[TaskConfig, ...] = (
    TaskConfig(name="rec", limit=200),
    *(TaskConfig(name=name) for name in ("reg", "naming", "relation")),
)


def grounded(recipe: Recipe) -> Recipe:
    """An embedded recipe that learns regions in every stage that runs the LLM, and is asked for them."""
    stages = tuple(_with_regions(stage) if stage.data == parts.MIX else stage for stage in recipe.stages)
    return recipe.but(stages=stages, eval=TASKS)


def _with_regions(stage: Stage) -> Stage:
    return stage.but(data=REGIONS)
