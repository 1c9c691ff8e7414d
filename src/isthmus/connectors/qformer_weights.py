"""What a Q-Former begins as: BERT, a Q-Former of transformers' BLIP-2 or InstructBLIP, or one that was trained here.

Li et al. 2023, arXiv 2301.12597, and Dai et al. 2023, arXiv 2305.06500. Official code: github.com/salesforce/LAVIS,
`blip2_models/blip2.py`.

Differs: the embedding that BERT adds to every word of a single text (its token type) is added to the positions, so that
a text half that begins as BERT is BERT; the released code leaves it out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isthmus.connectors.prompt_teacher import PromptTeacher
from isthmus.connectors.qformer import QFormer
from isthmus.types import ConfigError

Names = tuple[tuple[str, str], ...]
"""How ours begin, as patterns, and what stands there in another's; the first that fits counts."""


class Source(NamedTuple):
    """Where weights may come from."""

    title: str
    sign: str
    """A name that tells it, behind whatever its class puts before all of them."""
    names: Names

    def theirs(self, name: str) -> str | None:
        """The name of one of our parameters there; None where it has nothing of the kind."""
        for ours, other in self.names:
            if re.match(ours, name):
                return re.sub(ours, other, name)
        return None


def _feed(ours: str, theirs: str) -> Names:
    """A feed-forward part; theirs are two modules, `intermediate` and `output`, with a suffix for the queries'."""
    layer = rf"^layers\.(\d+)\.{ours}\."
    return (
        (layer + r"expand\.", rf"{theirs.format('intermediate')}.dense."),
        (layer + r"contract\.", rf"{theirs.format('output')}.dense."),
        (layer + r"norm\.", rf"{theirs.format('output')}.LayerNorm."),
    )


def _attention(ours: str, theirs: str, inner: str) -> Names:
    layer = rf"^layers\.(\d+)\.{ours}\."
    return (
        (layer + r"(query|key|value)\.", rf"{theirs}.{inner}.\2."),
        (layer + r"out\.", rf"{theirs}.output.dense."),
        (layer + r"norm\.", rf"{theirs}.output.LayerNorm."),
    )


_LAYER = r"qformer.encoder.layer.\1."
_QFORMER: Names = (
    (r"^queries$", r"query_tokens"),
    (r"^picture_norm\.", r"vision_model.post_layernorm."),
    (r"^enter\.0\.", r"qformer.layernorm."),
    *_attention("attention", _LAYER + "attention", "attention"),
    *_attention("cross", _LAYER + "crossattention", "attention"),
    *_feed("feed", _LAYER + "{}_query"),
    *_feed("text_feed", _LAYER + "{}"),
    (r"^words\.(word|position)\.", r"qformer.embeddings.\1_embeddings."),
    (r"^project\.", r"language_projection."),
)

BLIP2 = Source("transformers' BLIP-2", "qformer.layernorm.weight", _QFORMER)
INSTRUCT = Source(
    "transformers' InstructBLIP",
    "qformer.embeddings.layernorm.weight",
    ((r"^enter\.0\.", r"qformer.embeddings.layernorm."), *_QFORMER),
)
RETRIEVAL = Source(
    "transformers' BLIP-2 for retrieval",
    "itm_head.weight",
    (
        (r"^words\.(word|position)\.", r"embeddings.\1_embeddings."),
        (r"^heads\.picture\.", r"vision_projection."),
        (r"^heads\.text\.", r"text_projection."),
        (r"^heads\.match\.", r"itm_head."),
        *_QFORMER[:-1],
    ),
)
BERT = Source(
    "BERT",
    "embeddings.token_type_embeddings.weight",
    (
        (r"^enter\.0\.", r"embeddings.LayerNorm."),
        *_attention("attention", r"encoder.layer.\1.attention", "self"),
        *_feed("(?:text_)?feed", r"encoder.layer.\1.{}"),
        (r"^words\.(word|position)\.", r"embeddings.\1_embeddings."),
        (r"^heads\.transform\.", r"cls.predictions.transform.dense."),
        (r"^heads\.norm\.", r"cls.predictions.transform.LayerNorm."),
        (r"^heads\.bias$", r"cls.predictions.bias"),
    ),
)
OURS = Source("a model of Isthmus with a Q-Former", "picture_norm.weight", ((r"^", r""),))
SOURCES = (INSTRUCT, RETRIEVAL, BLIP2, BERT, OURS)
"""In the order in which they are tried: the retrieval model has BLIP-2's sign as well."""
BEFORE = {"", "model.", "bert."}
"""What classes put before their names; ours are found by `connectors.`."""
PERHAPS = re.compile(r"words\.|layers\.\d+\.text_feed\.|heads\.")
"""Our names of what a source may leave out altogether."""
ENTRIES = ("words.word.weight", "heads.bias")
"""One row per entry of the vocabulary."""


def source(state: Mapping[str, Tensor], called: str = "the checkpoint") -> tuple[Source, dict[str, Tensor]]:
    """What these tensors are, and the same by the names that the source's table has.

    Raises:
        ConfigError: none of `SOURCES`.
    """
    for each in SOURCES:
        for name in sorted(state):
            before = name.removesuffix(each.sign)
            if before == name or (before not in BEFORE and not (each is OURS and before.startswith("connectors."))):
                continue
            found = {name.removeprefix(before): tensor for name, tensor in state.items()}
            return each, _of_bert(found) if each is BERT else found
    raise ConfigError(
        f"{called} holds no Q-Former, and no BERT that one could begin as",
        f"name a folder or hub model of {', '.join(each.title for each in SOURCES)}",
    )


def _of_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms under their present names, and the first token type in the positions."""
    new = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    found = {re.sub(r"LayerNorm\.(?:gamma|beta)$", lambda old: new[old[0]], name): each for name, each in state.items()}
    place = "embeddings.position_embeddings.weight"
    if place in found:
        found[place] = found[place] + found[BERT.sign][0]
    return found


@torch.no_grad()
def take_over(
    former: nn.Module, state: Mapping[str, Tensor], project: bool = False, called: str = "the checkpoint"
) -> set[str]:
    """Give a Q-Former, or a prompt teacher, the weights of one of `SOURCES`; the names of what was taken are returned.

    What the source has not stays as it is: all but attention and feed-forwards of BERT, the text half of BLIP-2's
    second stage. So does an entry of the vocabulary that only one of both has: the last, with which captions start.

    Args:
        former: its weights are overwritten.
        state: the tensors by their names.
        project: the projection to the LLM too.
        called: how messages name the tensors.

    Raises:
        ConfigError: they are of an unknown kind; a weight is missing, or has another shape.
    """
    kind, there = source(state, called)
    have = {_part(name) for name, _ in former.named_parameters() if kind.theirs(name) in there}
    taken = set()
    for name, parameter in former.named_parameters():
        other = kind.theirs(name)
        left = name.startswith("project.") and not project
        if left or other is None or (PERHAPS.match(name) and _part(name) not in have):
            continue
        found, place = there.get(other), parameter.data
        if found is not None and found.ndim > place.ndim:  # theirs are queries of a batch of one
            found = found.squeeze(0)
        if found is not None and name in ENTRIES and abs(len(found) - len(place)) == 1:
            rows = min(len(found), len(place))
            found, place = found[:rows], place[:rows]
        if found is None or found.shape != place.shape:
            raise ConfigError(
                f"the Q-Former's {name} is {list(parameter.shape)}, {called}'s {other} "
                + ("none" if found is None else f"{list(found.shape)}"),
                "give the joint the shape of the Q-Former there"
                + (", and name its tokenizer: aligner.options.tokenizer" if name in ENTRIES else ""),
            )
        place.copy_(found)
        taken.add(name)
    return taken


def begin(
    model: nn.Module, sources: str | tuple[str, ...] | None, tensors: Callable[[str], Mapping[str, Tensor]]
) -> None:
    """Let every Q-Former in a newborn model begin as `sources`, the later ones over the earlier, and say so in a line.

    A prompt teacher begins as BERT where that is among them.

    Args:
        model: what holds them.
        sources: folders or hub names; None does nothing.
        tensors: reads one of them.

    Raises:
        ConfigError: there is no Q-Former, or one that does not fit.
    """
    if sources is None:
        return
    states = {name: tensors(name) for name in ([sources] if isinstance(sources, str) else sources)}
    formers = [module for module in model.modules() if isinstance(module, QFormer | PromptTeacher)]
    if not any(isinstance(former, QFormer) for former in formers):
        raise ConfigError(f"there is no Q-Former to begin as {sources}", "leave aligner.options.qformer out")
    for former in formers:
        teaches = isinstance(former, PromptTeacher)
        origin = dict.fromkeys((name for name, _ in former.named_parameters()), "")
        for called, state in states.items():
            if not teaches or source(state, called)[0] is BERT:
                origin |= dict.fromkeys(take_over(former, state, called=called), called)
        if any(origin.values()):
            print(f"{'prompt teacher' if teaches else 'Q-Former'}: {_told(origin)}", file=sys.stderr)


def _told(origin: Mapping[str, str]) -> str:
    """Which parts are whose, the newborn last."""
    told = []
    for called in [*dict.fromkeys(filter(None, origin.values())), ""]:
        parts = _parts(name for name, whose in origin.items() if whose == called)
        told += [f"{', '.join(parts)} {f'of {called}' if called else 'newborn'}"] if parts else []
    return "; ".join(told)


def _parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(_part, names)))


def _part(name: str) -> str:
    """The part of a Q-Former that a parameter belongs to, as a glob names it: `layers.*.cross`."""
    inside = re.match(r"layers\.\d+\.(\w+)", name)
    if inside:
        return f"layers.*.{inside[1]}"
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
