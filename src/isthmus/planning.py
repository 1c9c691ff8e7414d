"""What a recipe would cost, before any weights are read: parameters by part and what each stage trains."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers.image_processing_base import ImageProcessingMixin

from isthmus import assembly, kernels, parts, quantised
from isthmus.config import Recipe
from isthmus.model import VLM, VLMConfig
from isthmus.processor import VLMProcessor
from isthmus.training import optimizer
from isthmus.training.step import Step

OPAQUE = ("flex_attention", "flash_attention_2")
"""Attention that does not run on tensors without numbers, or whose products are not seen there."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: which parameters train."""

    name: str
    trained: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Parameters of the parts, and of what every stage trains."""

    recipe: str
    parts: dict[str, int]
    tokens: dict[str, int]
    """Connector tokens of one medium, by kind, as the last stage leaves the joint."""
    stages: tuple[StagePlan, ...]
    trained: int
    """Parameters that any stage trains."""
    whole: int
    """All parameters at the end, with the LoRA that stages add."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan(recipe: Recipe) -> Plan:
    """Build the recipe's structure without memory for weights, and count.

    Raises:
        ConfigError: parts do not fit, or a stage's glob matches nothing.
    """
    model = outline(recipe)
    whole = count(model)
    stages, trained = [], dict[str, int]()
    for stage in recipe.stages:
        if stage.joint:
            assembly.rebuild(model, stage.joint)
        optimizer.choose(Step(model, stage.objectives), stage)
        awake = count(model, trained=True)
        stages.append(StagePlan(stage.name, sum(awake.values()), awake))
        trained |= {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    end = sum(count(model).values())
    tokens = {kind: model.queries(kind) for kind in model.encoders}
    return Plan(recipe.name, whole, tokens, tuple(stages), sum(trained.values()), end)


def countable(recipe: Recipe) -> Recipe:
    """The recipe with attention whose products can be counted; it computes the same."""
    if recipe.llm.attention not in OPAQUE:
        return recipe
    return recipe.but(llm=recipe.llm.but(attention=kernels.NAME))


def outline(recipe: Recipe) -> VLM:
    """The model's structure on the meta device: shapes and names, no numbers.

    Attention whose package is not here is left to another kernel, which has the same parameters.
    """
    text = parts.llm_config(recipe.llm)
    architectures = {kind: parts.encoder_architecture(config) for kind, config in recipe.encoders.items()}
    config = VLMConfig(
        text_config=copy.deepcopy(text),
        llm={"config": recipe.llm.model_dump(mode="json"), "weights": None},
        encoders={
            kind: {"config": encoder.model_dump(mode="json"), "architecture": architectures[kind], "weights": None}
            for kind, encoder in recipe.encoders.items()
        },
        aligner=recipe.aligner.model_dump(mode="json"),
    )
    with torch.device("meta"):
        try:
            llm = parts.empty_llm(text, recipe.llm.attention)
        except ImportError:
            llm = parts.empty_llm(text, countable(recipe).llm.attention)
        encoders = {kind: parts.empty_encoder(config.encoder(kind), architectures[kind]) for kind in architectures}
        if recipe.llm.bits is not None:
            quantised.quantise(llm, recipe.llm.bits, torch.float32)
        for kind, encoder in recipe.encoders.items():
            if encoder.bits is not None:
                quantised.quantise(encoders[kind], encoder.bits, torch.float32)
        return VLM(config, llm, encoders)


def processor(model: VLM, recipe: Recipe) -> VLMProcessor:
    """An outline's processor, which writes samples as the model would read them; no picture can be prepared by it."""
    for encoder in model.encoders.values():
        encoder.processor = encoder.processor or ImageProcessingMixin()
    return VLMProcessor.of(model, parts.tokenizer(recipe.llm), recipe.system)


def count(model: VLM, trained: bool = False) -> dict[str, int]:
    """Parameters by part; with `trained`, only those that require gradients. Grafts count apart from their hosts."""
    counts: dict[str, int] = {}
    packed = quantised.weights(model)
    for name, parameter in model.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        top, rest = name.split(".", 1)
        part = f"{top}.{rest.split('.', 1)[0]}" if top in ("encoders", "connectors", "heads") else top
        part = f"{part} grafts" if ".grafts." in name else part
        counts[part] = counts.get(part, 0) + packed.get(name, parameter.numel())
    return counts
