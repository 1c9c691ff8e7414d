"""What the tests of VDEP share: samples, stages with the term, a step that is ready, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import composed
from composed import picture, sample
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.model import VLM
from isthmus.objectives import named
from isthmus.objectives.vdep import VDEP
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import Batch


def term(**options: Any) -> VDEP:
    return named("vdep", {"ratio": 1.0, **options})  # type: ignore[return-value]


SAMPLES = (
    sample(picture(1), "what is it?", answer="a cat"),
    sample(picture(2), picture(3), "and?", answer="two dogs, and more to say of them"),
    sample("hello", answer="good day"),
    sample(picture(4), answer="a"),
)


def stage(*terms: ObjectiveConfig, **changes: Any) -> Stage:
    fields = {
        "name": "sft",
        "data": ("none",),
        "train": {"connectors.*": 1e-2, "llm.*": 1e-3},
        "budget": Budget(steps=3),
        "batch_size": 4,
        "objectives": terms or ("lm",),
        "save_every": None,
        "evaluate_every": None,
    }
    return Stage.model_validate({**fields, **changes})


def with_term(weight: float = 1.0, **options: Any) -> tuple[ObjectiveConfig, ...]:
    return ObjectiveConfig(name="lm"), ObjectiveConfig(name="vdep", weight=weight, options=options)


def prepared(leg: Stage, vlm: VLM | None = None) -> Step:
    vlm = composed.model() if vlm is None else vlm
    step = Step(vlm, leg.objectives)
    choose(step, leg)
    step.ready()
    return step


def gradients(step: Step, batches: Sequence[Batch]) -> dict[str, Tensor]:
    scales = step.scales(batches)
    for batch in batches:
        step(batch, scales)[0].backward()
    found = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return found
