"""Putting a model together: freshly from pretrained parts, or back from a directory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus import aligner as aligners
from isthmus import graft, parts, sites
from isthmus.config import Recipe
from isthmus.model import VLM, VLMConfig
from isthmus.processor import VLMProcessor
from isthmus.types import ConfigError, Turn


def compose(recipe: Recipe, dtype: torch.dtype = torch.float32) -> VLM:
    """A freshly composed model: pretrained parts, a newborn joint, everything of the base frozen.

    Base parts compute in `dtype`; what the joint adds is float32. New weights depend on the recipe's seed alone.

    Raises:
        ConfigError: a part cannot be found, or the parts and the joint do not fit, with the reason.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{recipe!r} is no recipe", "compose(isthmus.recipes.named(...)), or a Recipe of your own")
    llm = parts.load_llm(recipe.llm, dtype)
    encoders = {kind: parts.load_encoder(config, dtype) for kind, config in recipe.encoders.items()}
    config = VLMConfig(
        text_config=copy.deepcopy(llm.config),
        llm={
            "config": recipe.llm.model_dump(),
            "weights": parts.fingerprint(parts.folder(recipe.llm.source, recipe.llm.revision)),
        },
        encoders={
            kind: {
                "config": config.model_dump(mode="json"),
                "architecture": parts.encoder_architecture(config),
                "weights": parts.encoder_fingerprint(config),
            }
            for kind, config in recipe.encoders.items()
        },
        aligner=recipe.aligner.model_dump(mode="json"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = VLM(config, llm, encoders)
        model.aligner.birth(model)
    tokenizer = parts.tokenizer(recipe.llm)
    model.processor = VLMProcessor.of(model, tokenizer, recipe.system)
    _stop_at_turns_end(model)
    return model.eval()


def rejoin(model: VLM, options: dict[str, Any]) -> None:
    """Give the joint other options, in place; its weights stay, which therefore must all fit.

    Raises:
        ConfigError: an option is wrong, or it changes the joint's parts, their parameters or its vocabulary.
    """
    rebuild(model, options)
    before = model.processor
    model.processor = VLMProcessor.of(model, before.tokenizer, before.system)
    model.processor.template = before.template


def rebuild(model: VLM, options: dict[str, Any]) -> None:
    """`rejoin` without the processor, which an outline lacks: every part of the joint is built anew by the options and
    takes the weights of the one before, with the LoRA that stages put on it."""
    config = {**model.config.aligner, "options": {**model.config.aligner.get("options", {}), **options}}
    joint = aligners.build(config["name"], config["options"])
    width = sites.embedding(model.llm).weight.shape[1]
    with model.device:
        built: dict[str, nn.Module] = {
            f"connectors.{kind}": joint.connector(kind, each, width) for kind, each in model.encoders.items()
        }
        built |= {f"heads.{name}": head for name, head in joint.heads(width).items()}
        built |= dict(_inside(joint, model, width))
        there = [*(f"connectors.{kind}" for kind in model.connectors), *(f"heads.{name}" for name in model.heads)]
        there += [path for path, _ in _inside(model.aligner, model, width)]
    fits = joint.new_tokens() == model.aligner.new_tokens() and list(built) == there  # in the order of their nesting
    if not fits or not all(_alike(new, model.get_submodule(path)) for path, new in built.items()):
        raise ConfigError(
            f"{', '.join(options)}: these options change what {joint.name} consists of",
            "set them in aligner.options, for all stages",
        )
    for path, new in built.items():
        _replace(model, path, new)
    model.aligner, model.config.aligner = joint, config


def _inside(joint: aligners.Aligner, model: VLM, width: int) -> Iterator[tuple[str, graft.Graft]]:
    """What a joint adds inside the base parts, newborn, by the dotted name that it has in the model."""
    for path, name, addition in joint.grafts(model.llm, model.encoders, width):
        yield f"{path}.{sites.ADDED}.{name}", addition


def _alike(new: nn.Module, old: nn.Module) -> bool:
    """Whether both have the same tensors by name and shape, but for LoRA on the old one."""
    return _shapes(new) == {key: shape for key, shape in _shapes(old).items() if sites.ADDED not in key.split(".")}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _replace(model: VLM, path: str, new: nn.Module) -> None:
    """Put a module where one of the same tensors is, whose weights and LoRA it takes over."""
    old = model.get_submodule(path)
    model.set_submodule(path, new)
    for inner, host in sites.base_modules(old).items():
        for name, adapter in graft.at(host).items():
            graft.graft(model, f"{path}.{inner}".removesuffix("."), name, adapter)
    new.load_state_dict(old.state_dict())
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    new.train(old.training)


def _stop_at_turns_end(model: VLM) -> None:
    """Let generation stop where the template ends an answer, too; some checkpoints name another token alone.

    Raises:
        ConfigError: the template refuses a question and its answer, or a system turn that the recipe asks for.
    """
    rendered = model.processor.renderer().render((Turn.say("user", "?"), Turn.say("assistant", "!")))
    ids = rendered.ids if rendered.decoder_ids is None else rendered.decoder_ids
    end = [token for token, trained in zip(ids, rendered.trained) if trained][-1]
    own = model.generation_config.eos_token_id
    known = own if isinstance(own, list) else [] if own is None else [own]
    if end not in known:
        model.generation_config.eos_token_id = [*known, end]


def load(source: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu") -> VLM:
    """A saved model, ready to answer: `isthmus.load("runs/demo/sft/model")`."""
    return VLM.from_pretrained(source, dtype=dtype).to(device)  # type: ignore[arg-type]
