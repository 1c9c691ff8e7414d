"""Whether a recipe's joint, LLM, objectives and batching go together, told before anything runs."""

from __future__ import annotations

import torch

from isthmus import aligner, kernels, objectives
from isthmus.config import Recipe, Stage
from isthmus.model import VLM
from isthmus.types import ConfigError


def check(recipe: Recipe, vlm: VLM, device: torch.device) -> None:
    """Every stage of a recipe against the model that was composed of it.

    Raises:
        ConfigError: a stage asks for what this joint or this LLM cannot do.
    """
    options = dict(recipe.aligner.options)
    for stage in recipe.stages:
        options |= stage.joint
        try:
            aligner.build(recipe.aligner.name, options)
            _check_stage(stage, vlm, recipe.llm.attention, device)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error.cause}", error.remedy) from None


def _check_stage(stage: Stage, vlm: VLM, attention: str, device: torch.device) -> None:
    for term in stage.objectives:
        objectives.named(term.name, term.options).check(vlm)
    if stage.batching == "packed" and vlm.config.is_encoder_decoder:
        raise ConfigError("an encoder-decoder cannot read packed rows", "use bucketed or shuffled batching")
    if stage.batching == "packed":
        kernels.check_packing(attention, device)
