"""What a model makes of pictures and of their words, layer by layer: hooks that only observe, and attention's weights.

Layer 0 is the LLM's input, layer n what its n-th layer hands on. A picture's row is the mean of its tokens there; its
words' row is the mean over the answer's tokens where the assistant says them in a conversation without the picture.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from isthmus import parts, sites
from isthmus.assembly import load
from isthmus.config import Source
from isthmus.connectors.codebook import Coded
from isthmus.connectors.pool import Pool
from isthmus.connectors.token_pool import TokenPool
from isthmus.data import sets
from isthmus.data.collate import Look
from isthmus.data.media import content_key
from isthmus.evaluation.gap.measures import attention_mass
from isthmus.evaluation.measure import arithmetic_of
from isthmus.model import VLM, VLMConfig
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Image, Modality, Sample, Turn

Take: TypeAlias = Callable[[int, Tensor], None]
"""Called with the number of a layer and what was seen there."""
KINDS = {"naming": ("naming",), "scenes": ("caption",), "easy-vqa": ("caption",)}
"""What is asked of the embedded sets, so that the answer names what is to be seen."""
BATCH = 8


@dataclass(frozen=True)
class Pair:
    """A question about one picture, and the words that answer it."""

    prompt: Sample
    words: str

    @property
    def picture(self) -> Image:
        return self.prompt.pictures[0]

    @property
    def answered(self) -> Sample:
        return self.prompt.but(turns=(*self.prompt.turns, Turn.say("assistant", self.words)))

    @property
    def unseen(self) -> Sample:
        """The same conversation without the picture."""
        turns = tuple(
            Turn(turn.role, tuple(part for part in turn.parts if not isinstance(part, Image)))
            for turn in self.answered.turns
        )
        return self.prompt.but(turns=turns)


@dataclass
class Seen:
    """What was seen of N pictures in a model of L layers; lists are by layer, from 0 to L."""

    joint_ND: Tensor
    """The connector's output, mean over its tokens; its width is the connector's own where media stay aside."""
    image_ND: list[Tensor] = field(default_factory=list)
    """Empty where media stay aside: they have no states in the LLM."""
    words_ND: list[Tensor] = field(default_factory=list)
    tokens_KQD: list[Tensor] = field(default_factory=list)
    """Every token of the first K pictures."""
    mass_NH: list[Tensor] = field(default_factory=list)
    """By layer from 1: the share of attention that goes to the picture where the answer begins; empty where the joint
    or the LLM gives no weights."""
    places: float = 0.0
    """The picture's share of the positions that can be attended to there: the mass of even attention."""


def pairs(
    data: str, count: int, images: str | None = None, options: Mapping[str, Any] | None = None, split: str = "test"
) -> list[Pair]:
    """The first samples of a set that have one picture and an answer of their own: no two with the same picture, by its
    content, or the same words.

    Args:
        images, options: of a file: where its picture paths start from, and how it is read.
        split: of an embedded set; a file has no part of its own for tests, so all of it is taken.

    Raises:
        ConfigError: no such set.
        DataError: there are too few.
    """
    asked = {"kinds": KINDS[data]} if data in KINDS else {}
    source = Source(name=data, split=split, images=images, options={**asked, **(options or {})})
    found: dict[str, Pair] = {}
    shown, key = set[str](), functools.cache(content_key)
    for sample in sets.open_set(source, seed=0):
        pair = _pair(sample)
        if pair is not None and pair.words not in found:
            own = pair.picture.source
            named = key(own) if isinstance(own, str | Path) else content_key(own)
            if named not in shown:
                found[pair.words] = pair
                shown.add(named)
        if len(found) == count:
            break
    if len(found) < 8:
        raise DataError(
            f"{data} has {len(found)} different pictures with an answer of its own each; the gap needs 8",
            f"use {', '.join(KINDS)}, or a file with more of them",
        )
    return list(found.values())


def _pair(sample: Sample) -> Pair | None:
    """The first question and answer, where they are about one picture."""
    for place, turn in enumerate(sample.turns[:-1]):
        if turn.role == "user":
            prompt, answer = sample.but(turns=sample.turns[: place + 1], branches=()), sample.turns[place + 1].text
            alone = len(prompt.media) == 1 and isinstance(prompt.media[0], Image)
            return Pair(prompt, answer) if alone and answer.strip() else None
    return None


# ---------------------------------------------------------------------------------------------- seeing


@torch.no_grad()
def see(model: VLM, chosen: Sequence[Pair], keep: int, look: Look | None = None) -> Seen:
    """Run a model over the pictures, and over their words alone.

    Args:
        keep: of how many pictures every token's state is kept.

    Raises:
        ConfigError: the LLM is an encoder-decoder, whose two stacks have no layers in common to follow a picture by.
    """
    check(model.config)
    model.eval()
    collate = model.processor.collator(look)
    seen: list[_Batch] = []
    for start in range(0, len(chosen), BATCH):
        some = chosen[start : start + BATCH]
        pictures = collate([pair.answered for pair in some]).to(model.device)
        words = collate([pair.unseen for pair in some]).to(model.device)
        seen.append(_Batch.of(model, pictures, words, max(0, keep - start)))
    return _join(seen)


def check(config: PreTrainedConfig) -> None:
    """Refuse what cannot be followed, which a model's config tells.

    Raises:
        ConfigError: an encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise ConfigError(
            "the gap is followed through the layers of a decoder; this LLM is an encoder-decoder",
            "`isthmus eval` measures it with blank and shuffled pictures",
        )


def check_saved(source: str) -> None:
    """Refuse what cannot be followed before any weights are read.

    Raises:
        ConfigError: an encoder-decoder, or no such folder or model.
        IsthmusError: it is no joint model.
    """
    folder = parts.folder(source)
    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if told.get("model_type") != VLMConfig.model_type:
        load(source)  # which says what is wrong with it
    check(VLMConfig.from_pretrained(folder))


@dataclass
class _Batch:
    """What was seen in one batch; lists by layer."""

    joint: Tensor
    image: list[Tensor]
    words: list[Tensor]
    tokens: list[Tensor]
    mass: list[Tensor]
    places: Tensor

    @classmethod
    def of(cls, model: VLM, pictures: Batch, words: Batch, keep: int) -> _Batch:
        rows, image_BT = len(pictures.input_ids_BT), pictures.modality_BT == Modality.IMAGE
        asking_B = asking(pictures)
        seen = cls(torch.empty(0), [], [], [], [], _share(pictures, image_BT, asking_B))

        def picture(layer: int, states_BTD: Tensor) -> None:
            tokens_BQD = states_BTD[image_BT].unflatten(0, (rows, -1)).float().cpu()
            seen.image.append(tokens_BQD.mean(1))
            seen.tokens.append(tokens_BQD[:keep])

        def word(layer: int, states_BTD: Tensor) -> None:
            seen.words.append(_mean(states_BTD.float(), _spoken(model, words)).cpu())

        def weigh(layer: int, weights_BHTT: Tensor) -> None:
            seen.mass.append(attention_mass(weights_BHTT, asking_B, image_BT).cpu())

        inside = bool(model.aligner.splices)
        with arithmetic_of(model):
            with contextlib.ExitStack() as stack:
                if inside:
                    stack.enter_context(watching(model, picture))
                    stack.enter_context(weighing(model, weigh))
                output = model.run(pictures)
            with watching(model, word):
                model.run(words)
        seen.joint = output.connected["image"].float().mean(1).cpu()
        return seen


def _join(batches: Sequence[_Batch]) -> Seen:
    def layers(of: str) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(getattr(batch, of) for batch in batches), strict=True)]

    places = torch.cat([batch.places for batch in batches]).mean().item()
    joint = torch.cat([batch.joint for batch in batches])
    return Seen(joint, layers("image"), layers("words"), layers("tokens"), layers("mass"), places)


def asking(batch: Batch) -> Tensor:
    """The position of each row whose state is to say the answer's first token, or the last one of an open prompt."""
    if batch.labels_BT is None:
        return torch.full_like(batch.input_ids_BT[:, 0], batch.input_ids_BT.shape[1] - 1)
    return (batch.labels_BT != IGNORE).int().argmax(1) - 1


def _share(batch: Batch, image_BT: Tensor, asking_B: Tensor) -> Tensor:
    before_BT = torch.arange(image_BT.shape[1], device=image_BT.device) <= asking_B[:, None]
    real_BT = before_BT & (batch.segment_BT > 0)
    return ((image_BT & real_BT).sum(1) / real_BT.sum(1)).cpu()


def _spoken(model: VLM, batch: Batch) -> Tensor:
    """Where the answer's words stand; what ends a turn is none of them."""
    assert batch.labels_BT is not None  # collated with answers
    ends = torch.tensor(model.processor.tokenizer.all_special_ids, device=batch.labels_BT.device)
    return (batch.labels_BT != IGNORE) & ~torch.isin(batch.labels_BT, ends)


def _mean(states_BTD: Tensor, at_BT: Tensor) -> Tensor:
    weight_BT1 = at_BT[..., None].to(states_BTD.dtype)
    return (states_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


# ---------------------------------------------------------------------------------------------- hooks


@contextmanager
def watching(model: VLM, take: Take) -> Iterator[None]:
    """Hand every layer's states [B, T, D] to `take`, in order: the input as 0, each layer's output after it."""
    stack = sites.layers(model.llm).modules

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(0, args[0] if args else kwargs["hidden_states"])

    def leave(number: int) -> Callable[..., None]:
        return lambda module, args, output: take(number, output[0] if isinstance(output, tuple) else output)

    handles = [stack[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave(number)) for number, layer in enumerate(stack, start=1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weighing(model: VLM, take: Take) -> Iterator[None]:
    """Hand the attention weights [B, H, T, T] of each layer, from 1, to `take`, where a layer computes and tells them.

    Kernels keep their weights to themselves, so the LLM runs transformers' plain attention meanwhile.
    """
    before = model.llm.config._attn_implementation

    def told(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
                take(number, output[1])

        return look

    stack = sites.layers(model.llm).modules
    handles = [
        sites.attention(layer).register_forward_hook(told(number)) for number, layer in enumerate(stack, start=1)
    ]
    model.llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.llm.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------- places


def grid(model: VLM) -> tuple[int, int] | None:
    """Rows and columns of the picture's tokens, where each stands for a place of it; None where they are queries."""
    connector, encoder = model.connectors["image"], model.encoders["image"]
    rows, columns = encoder.grid
    while isinstance(connector, Coded | TokenPool):  # each token of the inner one stays where it is
        connector = connector.inner
    if isinstance(connector, Pool):
        side = connector.side
        return (side, side) if connector.inner.tokens(side * side) == side * side else None
    one_for_one = all(connector.tokens(s) == s for s in (rows * columns, 4 * rows * columns))
    return (rows, columns) if one_for_one and encoder.tokens == rows * columns else None


@torch.no_grad()
def attention_map(model: VLM, turns: Sequence[Turn], look: Look | None = None) -> list[Tensor]:
    """Where on its pictures a model looks as it begins to answer: rows x columns per picture, in order of appearance.

    A cell is the share of attention that its token gets from the last position of the prompt, mean over heads and
    layers; what is missing to 1 goes to text and other pictures.

    Raises:
        ConfigError: the joint's tokens have no places on the picture, or it gives no weights for them.
    """
    check(model.config)
    shape = grid(model)
    if reason := unweighed(model):
        raise ConfigError(
            f"there is no map of attention: {reason}", "use the occlusion map, which asks the answer alone"
        )
    if shape is None:
        raise ConfigError(
            f"there is no map of attention: {UNPLACED.format(name=model.aligner.name)}",
            "use the occlusion map, which asks the answer alone",
        )
    model.eval()
    batch = model.processor.prompts([Sample(tuple(turns))], look).to(model.device)
    shares: list[Tensor] = []

    def take(layer: int, weights_BHTT: Tensor) -> None:
        shares.append(weights_BHTT[0, :, -1].float().mean(0))

    with arithmetic_of(model), weighing(model, take):
        model.run(batch)
    if not shares:
        raise ConfigError(
            f"there is no map of attention: {UNTOLD}", "use the occlusion map, which asks the answer alone"
        )
    mean_T = torch.stack(shares).mean(0).cpu()
    starts = batch.media["image"].at_N.tolist() if batch.media else []
    return [mean_T[start : start + shape[0] * shape[1]].unflatten(0, shape) for start in starts]


UNPLACED = "the tokens of {name} do not stand one for one for places of the picture"
UNTOLD = "the layers of this joint compute attention in a way of their own that tells no weights"
ASIDE = "{name} keeps pictures beside the LLM's input, where they have no states in its layers"


def unweighed(model: VLM) -> str:
    """Why a joint that keeps media aside has no weights for them, or nothing."""
    return "" if model.aligner.splices else ASIDE.format(name=model.aligner.name)
