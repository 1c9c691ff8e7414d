"""Whether a recipe's joint, LLM, objectives and batching go together, told before anything runs; and whether a model
that it starts with is made of the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from isthmus import aligner, assembly, fuse, kernels, objectives, parts
from isthmus.config import EncoderConfig, LLMConfig, Recipe, Stage
from isthmus.model import VLM
from isthmus.training import agreement
from isthmus.types import ConfigError

Part = TypeVar("Part", EncoderConfig, LLMConfig)
BARE = "pictures"
"""The set whose samples carry no labels."""


def check(recipe: Recipe, vlm: VLM, device: torch.device) -> None:
    """Every stage of a recipe against the model that was composed of it.

    Raises:
        ConfigError: a stage asks for what this joint or this LLM cannot do.
    """
    if any(stage.joint for stage in recipe.stages):
        vlm = outline(vlm)
    for stage in recipe.stages:
        with of(stage):
            if stage.joint:
                assembly.rebuild(vlm, stage.joint)
            terms = [objectives.named(term.name, term.options) for term in stage.objectives]
            _check_stage(stage, terms, vlm, recipe.llm.attention, device)
        check_split(stage, terms, stage.accumulate)


@contextmanager
def of(stage: Stage) -> Iterator[None]:
    """What is refused inside is told with the stage's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name}: {error.cause}", error.remedy) from None


def check_split(stage: Stage, terms: Iterable[objectives.Objective], micros: int) -> None:
    """Whether a stage's steps may be split into so many micro-batches.

    Raises:
        ConfigError: a term of its loss does not add up over them.
    """
    whole = [term.name for term in terms if not term.splits]
    if micros > 1 and whole:
        raise ConfigError(
            f"stage {stage.name}: {whole[0]} compares the samples of a batch, which cannot be split",
            "set accumulate to 1",
        )


def outline(model: VLM) -> VLM:
    """A copy of a model whose tensors have shapes and no numbers; it shares what is no part of the network."""
    memo: dict[int, Any] = {id(model.processor): model.processor}
    memo |= {id(each): nn.Parameter(each.to("meta"), requires_grad=False) for each in model.parameters()}
    memo |= {id(each): each.to("meta") for each in model.buffers()}
    return copy.deepcopy(model, memo)


def _check_stage(
    stage: Stage, terms: Sequence[objectives.Objective], vlm: VLM, attention: str, device: torch.device
) -> None:
    for term in terms:
        term.check(vlm)
    bare = all(source.name == BARE for source in stage.data)  # samples without labels are never out of a share
    if all(term.share < 1 for term in terms) and not bare:
        names = " and ".join(term.name for term in terms)
        raise ConfigError(
            f"{names} alone learns from a share of the samples, and nothing does from the others",
            f"let {names} have all of them (ratio: 1), or add an objective that learns from words, such as lm",
        )
    if stage.batching == "packed" and vlm.config.is_encoder_decoder:
        raise ConfigError("an encoder-decoder cannot read packed rows", "use bucketed or shuffled batching")
    if stage.batching == "packed":
        kernels.check_packing(attention, device)
        if any(term.needs == "hidden" for term in terms):
            fuse.check(vlm.config.text_config, divided=True, counted=True)


def started(recipe: Recipe, dtype: torch.dtype) -> VLM:
    """The model that a recipe starts with; a part that lies elsewhere is known by its weights.

    Raises:
        ConfigError: it has another encoder, LLM or joint than the recipe names.
        IsthmusError: it cannot be loaded.
    """
    assert recipe.start is not None  # the caller asked
    model = VLM.from_pretrained(recipe.start, dtype=dtype, attn_implementation=recipe.llm.attention)
    config = model.config
    llm, asked = LLMConfig(**config.llm["config"]), recipe.llm
    if config.llm["weights"] and config.llm["weights"] == parts.fingerprint(parts.folder(asked.source, asked.revision)):
        asked = _placed(asked, llm)
    encoders, wanted = {kind: config.encoder(kind) for kind in config.encoders}, recipe.encoders
    for kind in encoders.keys() & wanted.keys():
        known = config.encoders[kind]["weights"]
        if known and known == parts.encoder_fingerprint(wanted[kind]):
            wanted[kind] = _placed(wanted[kind], encoders[kind])
    joint = aligner.build(recipe.aligner.name, recipe.aligner.options)
    if wrong := agreement.differing(_plain(llm, encoders, model.aligner), _plain(asked, wanted, joint)):
        raise ConfigError(
            f"{recipe.start} is made of other parts than the recipe names: {agreement.told(wrong)}",
            "name the same encoder, LLM and aligner, with its options, as the recipe that made it",
        )
    if recipe.system is not None:
        model.processor.system = recipe.system
    return model


def _plain(llm: LLMConfig, encoders: Mapping[str, EncoderConfig], joint: aligner.Aligner) -> dict[str, Any]:
    """Parts as plain values, without what their sources tell anyway and how they compute."""
    return {
        "llm": llm.model_dump(mode="json", exclude={"architecture", "attention"}),
        "encoder": {kind: each.model_dump(mode="json", exclude={"architecture"}) for kind, each in encoders.items()},
        "aligner": {"name": joint.name, "options": joint.options.model_dump(mode="json")},
    }


def _placed(config: Part, like: Part) -> Part:
    """A part's config, found where another has it that has the same weights."""
    places: dict[str, Any] = {"source": like.source, "revision": like.revision}
    if isinstance(config, EncoderConfig) and isinstance(like, EncoderConfig):
        places["also"] = tuple(_placed(*pair) for pair in zip(config.also, like.also))
    return config.but(**places)
