"""The gap of one model: every measure on the same pictures, as plain values and as files beside each other."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from isthmus import sites
from isthmus.data.collate import Look
from isthmus.data.media import Aspect, open_image
from isthmus.evaluation.gap import effects, measures, states
from isthmus.evaluation.gap.states import Pair, Seen
from isthmus.evaluation.measure import arithmetic_of
from isthmus.files import write_text
from isthmus.model import VLM

NEIGHBOURS = 5
TOP = 10
"""A word is found by the lens where one of its tokens is among so many."""
WORDS = 3
"""Words of each token that are drawn."""
RANKED = 16
"""Pictures of which every token is read through the lens: their states in all layers are kept."""
MUTE = ("a", "an", "the", "and", "with", "of", "in")
"""Words that say nothing of a picture."""
COMMON = f"no word of the first {RANKED} answers stands in half of all answers or fewer"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Layer:
    """One layer; what does not apply to a joint is None."""

    number: int
    gap: float | None
    cosine: float | None
    spread_image: float | None
    spread_words: float | None
    cka: float
    neighbours: float
    mass: float | None
    """Share of the attention where the answer begins, mean over heads and pictures."""
    rank: float | None
    """Median place of what is `telling` in what a picture's tokens would say, the best over words and tokens."""
    found: float | None
    """Share of pictures with a token among whose `TOP` words is one that is `telling`."""


@dataclass(frozen=True)
class Shown:
    """One picture with what was made of it."""

    picture: Pillow.Image
    question: str
    words: str
    lens: dict[int, list[list[tuple[str, float]]]]
    """By layer, each token's `WORDS` likeliest words and their probabilities; at the input, the nearest and cosines."""
    attention: Tensor | None
    occlusion: Tensor


@dataclass(frozen=True)
class Gap:
    """Everything that was measured of one model."""

    model: str
    joint: str
    fingerprint: str
    data: str
    pairs: int
    grid: tuple[int, int] | None
    aspect: Aspect
    """How its encoder sees a picture that is not square."""
    places: float
    """The picture's share of the positions that the answer's beginning can look at."""
    layers: tuple[Layer, ...]
    nll: float
    effects: dict[str, effects.Effect]
    skipped: dict[str, str]
    """What does not apply to this joint or to these answers, and why."""
    shown: tuple[Shown, ...] = field(repr=False)

    @property
    def chance(self) -> float:
        """Mutual neighbours of unrelated representations."""
        return NEIGHBOURS / (self.pairs - 1)

    def plain(self) -> dict[str, Any]:
        """What `gap.json` holds."""
        fields = {name: value for name, value in vars(self).items() if name not in ("layers", "effects", "shown")}
        return fields | {
            "chance_of_neighbours": self.chance,
            "layers": [asdict(layer) for layer in self.layers],
            "effects": {name: asdict(effect) for name, effect in self.effects.items()},
            "shown": [_plain(shown) for shown in self.shown],
        }


def measure(
    model: VLM,
    name: str,
    data: str,
    pairs: Sequence[Pair],
    *,
    fingerprint: str = "",
    pictures: int = 4,
    cells: int = 6,
    look: Look | None = None,
    progress: Progress = lambda what: None,
) -> Gap:
    """Every measure of a model.

    Args:
        pictures: how many are drawn, and looked at token by token.
        cells: rows and columns of the occlusion map.

    Raises:
        ConfigError: the LLM is an encoder-decoder.
        DataError: there are too few pairs.
    """
    progress("states and attention by layer")
    seen = states.see(model, pairs, keep=max(pictures, RANKED), look=look)
    progress("what the words of each token are")
    wanted = telling(model, pairs)[:RANKED]
    layers = tuple(_layer(model, seen, wanted, number) for number in range(len(seen.words_ND)))
    progress("blank, exchanged and shuffled pictures")
    nll, found = effects.effects(model, pairs)
    shown = []
    for place, pair in enumerate(pairs[:pictures]):
        progress(f"picture {place + 1} of {pictures}, hiding {cells * cells} places")
        shown.append(_show(model, seen, pair, place, cells, look))
    return Gap(
        model=name,
        joint=model.aligner.name,
        fingerprint=fingerprint,
        data=data,
        pairs=len(pairs),
        grid=states.grid(model) if model.aligner.splices else None,
        aspect=model.config.encoder("image").aspect,
        places=seen.places,
        layers=layers,
        nll=nll,
        effects=found,
        skipped=_skipped(model, seen, wanted),
        shown=tuple(shown),
    )


def write(gaps: Sequence[Gap], page: str, pictures: Mapping[str, Pillow.Image], folder: Path) -> tuple[Path, Path]:
    """Write `gap.json`, `gap.html` and `pictures/NAME.png` into the folder; the first two paths are returned."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / "pictures" / f"{name}.png")
    plain = {"models": [gap.plain() for gap in gaps], "neighbours": NEIGHBOURS, "top": TOP}
    texts = {"gap.json": json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False), "gap.html": page}
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / "gap.json", folder / "gap.html"


def chosen_layers(count: int) -> list[int]:
    """The layers whose words are drawn: the input, a third, two thirds, the last."""
    last = count - 1
    return sorted({0, round(last / 3), round(2 * last / 3), last})


# ---------------------------------------------------------------------------------------------- one layer


def _layer(model: VLM, seen: Seen, wanted: Sequence[Collection[int]], number: int) -> Layer:
    words_ND = seen.words_ND[number]
    image_ND = seen.image_ND[number] if seen.image_ND else seen.joint_ND
    apart = asdict(measures.modality_gap(image_ND, words_ND)) if seen.image_ND else {}
    ranked = seen.tokens_KQD and any(wanted)
    ranks = _ranks(model, seen.tokens_KQD[number], wanted, number) if ranked else None
    return Layer(
        number=number,
        gap=apart.get("gap"),
        cosine=apart.get("cosine"),
        spread_image=apart.get("spread_x"),
        spread_words=apart.get("spread_y"),
        cka=measures.linear_cka(image_ND, words_ND),
        neighbours=measures.mutual_knn(image_ND, words_ND, NEIGHBOURS),
        mass=seen.mass_NH[number - 1].mean().item() if seen.mass_NH and number else None,
        rank=None if ranks is None else ranks.double().median().item(),
        found=None if ranks is None else (ranks <= TOP).double().mean().item(),
    )


@torch.no_grad()
def _ranks(model: VLM, tokens_KQD: Tensor, wanted: Sequence[Collection[int]], layer: int) -> Tensor:
    """Per picture of which a word is wanted, the best place of any of them in what any of its tokens would say."""
    found = []
    for tokens_QD, ids in zip(tokens_KQD, wanted):
        if ids:
            scores_QV = _said(model, tokens_QD, layer)
            found.append(measures.ranks(scores_QV, torch.tensor([*ids])).min())
    return torch.stack(found)


@torch.no_grad()
def _said(model: VLM, states_MD: Tensor, layer: int) -> Tensor:
    """How likely each word is for states of a layer, [M, V]; at the input, how near."""
    if not layer:
        return measures.nearest_words(states_MD.to(model.device), sites.words(model.llm)).cpu()
    norm, head = sites.norm(model.llm), sites.head(model.llm)
    states_MD = states_MD.to(model.device, next(norm.parameters()).dtype)
    with arithmetic_of(model):
        return measures.logit_lens(states_MD, norm, head).exp().cpu()


def telling(model: VLM, pairs: Sequence[Pair]) -> list[set[int]]:
    """Per pair, what its answer's words begin with, each as it stands within a sentence.

    What stands so in more than half of the answers is left out: it would be found whatever a picture shows.
    """
    begun = [
        {first for word in pair.words.split() if word.lower() not in MUTE for first in _first(model, word)}
        for pair in pairs
    ]
    answers = Counter(itertools.chain.from_iterable(begun))
    return [{token for token in tokens if 2 * answers[token] <= len(pairs)} for tokens in begun]


def _first(model: VLM, word: str) -> list[int]:
    """A word's first token that is more than the space before it, which some tokenizers keep apart."""
    tokenizer = model.processor.tokenizer
    tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
    return [token for token in tokens if tokenizer.decode([token], skip_special_tokens=True).strip()][:1]


# ---------------------------------------------------------------------------------------------- one picture


def _show(model: VLM, seen: Seen, pair: Pair, place: int, cells: int, look: Look | None) -> Shown:
    mapped = bool(seen.mass_NH) and states.grid(model) is not None
    words = {
        number: _words(model, seen.tokens_KQD[number][place], number)
        for number in (chosen_layers(len(seen.words_ND)) if seen.tokens_KQD else ())
    }
    return Shown(
        picture=open_image(pair.picture.source),
        question=pair.prompt.turns[-1].text.strip(),
        words=pair.words,
        lens=words,
        attention=states.attention_map(model, pair.prompt.turns, look)[0] if mapped else None,
        occlusion=effects.occlusion_map(model, pair, cells),
    )


def _words(model: VLM, tokens_QD: Tensor, layer: int) -> list[list[tuple[str, float]]]:
    best = _said(model, tokens_QD, layer).topk(WORDS)
    decode = model.processor.tokenizer.decode
    return [
        [(decode([token]).strip(), share) for token, share in zip(tokens, shares)]
        for tokens, shares in zip(best.indices.tolist(), best.values.tolist())
    ]


def _skipped(model: VLM, seen: Seen, wanted: Sequence[Collection[int]]) -> dict[str, str]:
    """What does not apply to the joint, or to the answers."""
    if not seen.image_ND:
        aside = states.ASIDE.format(name=model.aligner.name)
        return {
            "centroids": f"{aside}; CKA and neighbours compare the connector’s output with each layer’s words",
            "lens": aside,
            "attention": aside,
        }
    reasons = {}
    if not any(wanted):
        reasons["the place of the right word"] = COMMON
    if not seen.mass_NH:
        reasons["attention"] = states.UNTOLD
    if states.grid(model) is None:
        reasons["places"] = states.UNPLACED.format(name=model.aligner.name)
    return reasons


def _plain(shown: Shown) -> dict[str, Any]:
    return {
        "question": shown.question,
        "words": shown.words,
        "lens": {
            str(number): [[[word, round(share, 4)] for word, share in words] for words in tokens]
            for number, tokens in shown.lens.items()
        },
        "attention": None if shown.attention is None else shown.attention.tolist(),
        "occlusion": shown.occlusion.tolist(),
    }
