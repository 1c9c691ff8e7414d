"""What the answer loses when the picture is changed: blanked, exchanged, its patches shuffled, or one of them masked.

Occlusion: Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2, here with the answer's log-probability per token as the
output. Pictures are changed before the encoder sees them, so this asks any joint the same question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image as Pillow
from torch import Tensor

from isthmus.data.media import Aspect, Frame, open_image
from isthmus.evaluation import controls
from isthmus.evaluation.gap.states import Pair
from isthmus.evaluation.measure import arithmetic_of
from isthmus.evaluation.score import Question, Scorer
from isthmus.evaluation.statistics import critical
from isthmus.model import VLM
from isthmus.types import DataError, Image, Sample, Turn

TILES = 4
"""Rows and columns that a picture is cut into to shuffle it."""
GREY = (controls.GREY,) * 3


@dataclass(frozen=True)
class Effect:
    """How much the negative log-likelihood per token of the right answer rises, in nats: mean and 95 % interval (t)."""

    rise: float
    low: float
    high: float


def nll(model: VLM, prompts: Sequence[Sample], words: Sequence[str]) -> Tensor:
    """Negative log-likelihood per token of each answer, its end included, in nats [N]."""
    questions = [Question(prompt, (said,)) for prompt, said in zip(prompts, words, strict=True)]
    with arithmetic_of(model):
        scores = Scorer(model).likelihoods(questions)
    return torch.tensor([-each.values[0] / each.tokens[0] for each in scores], dtype=torch.float64)


def effects(model: VLM, pairs: Sequence[Pair], seed: int = 0) -> tuple[float, dict[str, Effect]]:
    """The answers' mean NLL per token with their pictures, and what it rises by with each change of them.

    Raises:
        DataError: more than half of the pairs show the same picture, or a picture is too small to shuffle.
    """
    prompts, words = [pair.prompt for pair in pairs], [pair.words for pair in pairs]
    try:
        exchanged = controls.shuffled(prompts, seed)
    except DataError as error:  # whose remedy is for `isthmus eval`
        raise DataError(
            error.cause, "measure the gap over different pictures, as `states.pairs` chooses them"
        ) from None
    changed = {
        "blank picture": controls.blind(prompts),
        "another’s picture": exchanged,
        "patches shuffled": [with_picture(p, shuffle(p, TILES, seed)) for p in prompts],
    }
    own_N = nll(model, prompts, words)
    found = {name: _effect(nll(model, others, words) - own_N) for name, others in changed.items()}
    return own_N.mean().item(), found


def occlusion_map(model: VLM, pair: Pair, cells: int = 6) -> Tensor:
    """What hiding each cell costs the answer: its NLL's rise per token, [cells, cells].

    The grid lies over the square that the encoder sees; in a margin there is nothing to hide, and so no cost.
    """
    picture, aspect = open_image(pair.picture.source), model.config.encoder("image").aspect
    places = [(row, column) for row in range(cells) for column in range(cells)]
    masked = {place: mask(picture, *place, cells, aspect) for place in places}
    prompts = {place: with_picture(pair.prompt, one) for place, one in masked.items() if one is not None}
    found_N = nll(model, [pair.prompt, *prompts.values()], [pair.words] * (len(prompts) + 1))
    rises = torch.zeros(cells, cells)
    for (row, column), value in zip(prompts, (found_N[1:] - found_N[0]).tolist(), strict=True):
        rises[row, column] = value
    return rises


def mask(picture: Pillow.Image, row: int, column: int, cells: int, aspect: Aspect) -> Pillow.Image | None:
    """The picture with what it has in one cell of a grid over its square in grey; None if it has nothing there."""
    edges = (column / cells, row / cells, (column + 1) / cells, (row + 1) / cells)
    found = Frame.of(picture.size, aspect).back(edges)
    if found is None:
        return None
    left, top, right, bottom = (round(picture.size[n % 2] * value) for n, value in enumerate(found))
    changed = picture.copy()
    changed.paste(GREY, (left, top, right, bottom))
    return changed


def shuffle(prompt: Sample, tiles: int, seed: int) -> Pillow.Image:
    """The prompt's picture, cut into tiles that all change places.

    Raises:
        DataError: it is smaller than the tiles.
    """
    (shown,) = prompt.pictures
    picture = open_image(shown.source)
    if min(picture.size) < tiles:
        raise DataError(f"a picture of {picture.size} pixels has no {tiles} x {tiles} tiles", "use larger pictures")
    size = picture.width // tiles, picture.height // tiles
    places = [(column * size[0], row * size[1]) for row in range(tiles) for column in range(tiles)]
    order = random.Random(seed).sample(range(len(places)), len(places))
    turned = {place: order[(number + 1) % len(order)] for number, place in enumerate(order)}  # one cycle: none stays
    changed = picture.copy()
    for place, origin in turned.items():
        left, top = places[origin]
        changed.paste(picture.crop((left, top, left + size[0], top + size[1])), places[place])
    return changed


def with_picture(prompt: Sample, picture: Pillow.Image) -> Sample:
    """The prompt with another picture in the place of its own."""
    turns = tuple(
        Turn(turn.role, tuple(Image(picture) if isinstance(part, Image) else part for part in turn.parts))
        for turn in prompt.turns
    )
    return prompt.but(turns=turns)


def _effect(rise_N: Tensor) -> Effect:
    mean, error = rise_N.mean().item(), rise_N.std().item() / math.sqrt(len(rise_N))
    half = critical(len(rise_N) - 1) * error
    return Effect(mean, mean - half, mean + half)
