"""ALBEF's objectives on our joint: align pictures and texts by contrast, then fuse them, with a slow copy as a teacher.

Li et al. 2021, arXiv 2107.07651. Official code: github.com/salesforce/ALBEF.

Differs:
    - the image tower is frozen, and a Q-Former is both text encoder and multimodal encoder; ALBEF trains a ViT and a
      BERT that is split in two;
    - an LLM follows, in the stages of the embedded `blip2`; ALBEF has none and is tuned per task;
    - the slow copy is of the Q-Former alone, the queue is short, and the teacher's weight rises over 100 steps;
    - there is no `size="published"`: what ALBEF trains is not a joint between an encoder and an LLM.
"""

from __future__ import annotations

from typing import Any

from isthmus.config import ObjectiveConfig, Recipe, Train
from isthmus.recipes.blip2 import blip2

SLOW: dict[str, Any] = {"alpha": 0.4, "ramp": 100, "decay": 0.995}
QUEUE = 1024
UNUSED: dict[str, Train] = {
    f"connectors.*.heads.{part}": Train(mode="frozen") for part in ("picture.*", "text.*", "temperature")
}
"""Heads that contrast alone trains."""


def albef(momentum: bool = True, contrast: bool = True, minutes: float = 5.0) -> Recipe:
    """Contrast, matching and masked words without the LLM, then captions and questions through it.

    `momentum=False` leaves out the slow copy and its queue, `contrast=False` leaves fusion alone.
    """
    name = "albef" + ("" if momentum else "-without-momentum") + ("" if contrast else "-fusion-alone")
    about = "contrast, matching and masked words" if contrast else "matching and masked words, no contrast before"
    slow = SLOW if momentum else {}
    itc = {"smoothing": 0.0, "temperature": [0.001, 0.5], **({**slow, "queue": QUEUE} if momentum else {})}
    objectives = (
        *([ObjectiveConfig(name="itc", options=itc)] if contrast else []),
        ObjectiveConfig(name="itm"),
        ObjectiveConfig(name="mlm", options=slow),
    )
    base = blip2(minutes=minutes)
    first, *rest = base.stages
    first = first.but(objectives=objectives, train={**first.train, **({} if contrast else UNUSED)})
    return base.but(
        name=name,
        about=f"ALBEF's first stage on embedded parts: {about}" + (", a slow copy as teacher" if momentum else ""),
        stages=(first, *rest),
    )
