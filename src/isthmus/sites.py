"""Where things are inside somebody else's model: layers, attention, MLPs, Linears, embedding, norm and head.

Found by structure, not by the model's name: transformers marks every layer with `GradientCheckpointingLayer` and
every attention module with `is_causal`, and the head is run by the model's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from isthmus.types import ConfigError

ADDED = "grafts"
"""The child that holds what was added to a module; below it, nothing belongs to the base model."""
FEED_NORMS = (
    "pre_mlp_layernorm",
    "pre_feedforward_layernorm",
    "pre_ff_layernorm",
    "post_attention_layernorm",
    "final_layer_norm",
    "ln_2",
    "input_layernorm",
)
"""What families call the norm before the feed-forward part, those first whose layers have the others too."""


class Layers(NamedTuple):
    """A model's stack of layers: its dotted name in the model, and the modules."""

    path: str
    modules: nn.ModuleList


def layers(model: nn.Module, side: Literal["decoder", "encoder"] = "decoder") -> Layers:
    """The stack of layers; `side` chooses between the two of an encoder-decoder and says nothing elsewhere.

    Raises:
        ConfigError: the model has no stack of transformers layers.
    """
    found = [
        Layers(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_layer, module))
    ]
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        stack = model.get_decoder() if side == "decoder" else model.get_encoder()
        inside = {id(module) for module in stack.modules()}
        found = [each for each in found if id(each.modules) in inside]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no stack of transformers layers", "choose a transformer, or graft by path"
        )
    return min(found, key=lambda each: each.path.count("."))


@contextlib.contextmanager
def states(model: nn.Module, after: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What the decoder's layers hand on while it runs inside the block: by number, the states [B, T, D] after so many
    of them; negative numbers count from the end, -1 being after the last one and before the norm behind it."""
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for number in after:
            layer = layers(model).modules[number - 1 if number > 0 else number]
            hooks.enter_context(layer.register_forward_hook(partial(_keep, found, number)))
        yield found


def _keep(found: dict[int, Tensor], number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    found[number] = output if isinstance(output, Tensor) else output[0]


def enclosing(root: nn.Module, path: str) -> str | None:
    """The dotted name of the layer that the module at `path` is or lies in, None outside of layers."""
    steps = path.split(".")
    prefixes = (".".join(steps[:end]) for end in range(1, len(steps) + 1))
    return next((prefix for prefix in prefixes if _is_layer(root.get_submodule(prefix))), None)


def attention(layer: nn.Module) -> nn.Module:
    """The self-attention of a layer.

    Raises:
        ConfigError: the layer has none.
    """
    for module in base_modules(layer).values():
        if _attends(module):
            return module
    raise ConfigError(f"{type(layer).__name__} has no attention module", "choose a layer that attends")


def mlp(layer: nn.Module) -> nn.Module:
    """The feed-forward module of a layer, without norm and residual.

    Raises:
        ConfigError: it has none made of Linears, or they lie on the layer itself (OPT), with no module to name.
    """
    modules = base_modules(layer)
    attending = {id(part) for module in modules.values() if _attends(module) for part in module.modules()}
    for module in modules.values():
        direct = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        if direct and module is layer:
            raise ConfigError(
                f"{type(layer).__name__} keeps its feed-forward Linears on the layer itself", f"choose {direct} instead"
            )
        if direct and id(module) not in attending:
            return module
    raise ConfigError(f"{type(layer).__name__} has no feed-forward module made of Linears", "choose a module by path")


class Feed(NamedTuple):
    """Where the un-normalised input of a layer's feed-forward part goes in: a dotted name in the layer."""

    path: str
    holds_norm: bool
    """Whether the module there is the whole part with norm and residual; else it is the norm before it."""


def feed(layer: nn.Module) -> Feed:
    """The feed-forward part of a layer: T5's sublayer, or the norm that stands before it elsewhere.

    Raises:
        ConfigError: the layer normalises behind the sum, or its norms are not named as in any known family.
    """
    children = dict(layer.named_children())
    for path, part in base_modules(layer).items():
        if path and any("Norm" in type(child).__name__ for child in part.children()) and _feeds(part):
            return Feed(path, True)
    before = [name for name in FEED_NORMS if name in children]
    after = not vars(layer).get("do_layer_norm_before", True)  # OPT 350M
    alone = before == ["post_attention_layernorm"]  # OLMo 2 normalises what attention returns
    norms = [name for name, child in children.items() if "Norm" in type(child).__name__]
    other = before == ["input_layernorm"] != norms  # it is before the feed-forward where there is no other
    if not before or after or alone or other:
        raise ConfigError(
            f"{type(layer).__name__} has no known norm before its feed-forward part", "choose another LLM or joint"
        )
    return Feed(before[0], False)


def _feeds(part: nn.Module) -> bool:
    """Whether a module that does not attend holds a module made of Linears that does not either: of Linears alone, it
    is no more than an MLP, which may have a norm inside."""
    inner = [child for child in part.children() if not isinstance(child, nn.Linear)]
    return not _attends(part) and any(linears(child) and not any(map(_attends, child.modules())) for child in inner)


def body(llm: PreTrainedModel) -> nn.Module:
    """The LLM without its head; Llama 4's class names a part of another class, and would give itself."""
    named = llm.base_model
    return named if named is not llm else llm.get_submodule(layers(llm).path.partition(".")[0])


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the base model inside `module`, by dotted name; grafts' own are left out, and the routers of
    experts that are Linears by class and return a pair (Llama 4, PhiMoE)."""
    found = {path: each for path, each in base_modules(module).items() if isinstance(each, nn.Linear)}
    return {path: each for path, each in found.items() if "Router" not in type(each).__name__}


def base_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every module inside `module` (itself as "") that was not added by a graft, by dotted name."""
    return {path: each for path, each in module.named_modules() if ADDED not in path.split(".")}


def heads(root: nn.Module) -> set[nn.Module]:
    """The output embeddings of every language model inside `root`, often tied to the input's."""
    return {each.get_output_embeddings() for each in root.modules() if isinstance(each, PreTrainedModel)} - {None}


def embedding(llm: PreTrainedModel) -> nn.Embedding:
    """The input embedding; called on ids [B, T] it gives [B, T, D]."""
    return cast(nn.Embedding, llm.get_input_embeddings())


def words(llm: PreTrainedModel) -> Tensor:
    """Every word as the LLM's first layer reads it, [V, D]: Gemma's embeddings are scaled where they are looked up."""
    table = embedding(llm)
    scale = getattr(table, "embed_scale", None)
    return table.weight if scale is None else table.weight * torch.as_tensor(scale).to(table.weight)


def norm(model: nn.Module, side: Literal["decoder", "encoder"] = "decoder") -> nn.Module:
    """The norm behind the last layer.

    Raises:
        ConfigError: the model ends without one.
    """
    owner, _, _ = layers(model, side).path.rpartition(".")
    while True:
        norms = [child for child in model.get_submodule(owner).children() if "Norm" in type(child).__name__]
        if norms:
            return norms[-1]
        if not owner:
            raise ConfigError(f"{type(model).__name__} has no norm behind its layers", "read the last layer instead")
        owner, _, _ = owner.rpartition(".")


def head(llm: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From last hidden states [..., D] to logits [..., V], with the model's own scale and softcap.

    The model's forward is run with states given in place of its stack of layers, so that whatever it does between
    states and logits is done here too, in any family.
    """

    def logits(states: Tensor) -> Tensor:
        given = states.reshape(1, -1, states.shape[-1])
        return type(llm).forward(_Given(llm, given), inputs_embeds=given).logits.reshape(*states.shape[:-1], -1)

    return logits


class _Given:
    """A module seen as it is, except that any part with layers returns the given states when it is called."""

    def __init__(self, module: nn.Module, states: Tensor):
        self._module, self._states = module, states

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module) and any(map(_is_layer, value.modules())):
            return _Given(value, self._states)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(self._states)


class _Outputs:
    """What a stack of layers returns: states, and None for every other field that a model may read."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "is_causal")  # every attention function of transformers reads it
