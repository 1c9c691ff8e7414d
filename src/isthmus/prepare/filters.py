"""Which samples to keep: operators that give every sample a number, and rules that say which numbers stay.

Data-Juicer, Chen et al. 2023, arXiv 2309.02033; official code: github.com/modelscope/data-juicer.
DataComp, Gadre et al. 2023, arXiv 2304.14108 (the best share by CLIP score rather than a fixed threshold).

Numbers do not depend on how samples are dealt out, except those of copies, which are counted in the order of the data.
Differs: no operator needs a download; languages are told apart by a package that brings its model along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image as Pillow

from isthmus.assembly import load
from isthmus.data.media import open_image, upright_size
from isthmus.prepare import languages
from isthmus.prepare.copies import SamePicture, SameText
from isthmus.prepare.curation import curated, repeated
from isthmus.prepare.loss import mean_loss
from isthmus.types import ConfigError, Image, Sample, Turn

if TYPE_CHECKING:
    from isthmus.model import VLM

BATCH = 32
BLUR_SIDE = 256
"""Pictures are made this small before their sharpness is measured, so that it does not depend on their size."""
NOTHING = float("nan")
"""The number of a sample that an operator says nothing of, such as the sharpness of a text; no rule drops it."""


class Measure(Protocol):
    """An operator: one number per sample, in order."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]: ...


# ---------------------------------------------------------------------------------------------- words


def answer(sample: Sample) -> str:
    """What is learnt: the assistant's words."""
    return "\n".join(turn.text for turn in sample.turns if turn.role == "assistant")


def words(sample: Sample) -> float:
    """Words of the answers."""
    return float(len(answer(sample).split()))


def repetition(sample: Sample) -> float:
    """Share of the answers' three-word sequences that were there before."""
    return repeated(answer(sample))


def uncurated(sample: Sample) -> float:
    """1 where an answer is no description that MiniGPT-4's curation would leave, else 0."""
    return float(bool(curated(answer(sample))))


def alphanumeric(sample: Sample) -> float:
    """Share of letters and digits among the answers' characters that are no spaces."""
    said = "".join(answer(sample).split())
    return sum(map(str.isalnum, said)) / len(said) if said else NOTHING


def spoken(code: str) -> Measure:
    """How likely the answers are in a language.

    Raises:
        ConfigError: the code is unknown, or the identifier is not installed.
    """
    likely = languages.likelihood(code)

    def one(sample: Sample) -> float:
        found = likely(answer(sample))
        return NOTHING if found is None else found

    return one_by_one(one)


# ---------------------------------------------------------------------------------------------- pictures


def side(sample: Sample) -> float:
    """The shortest side of its pictures, in pixels."""
    return min((float(min(upright_size(picture.source))) for picture in _pictures(sample)), default=NOTHING)


def aspect(sample: Sample) -> float:
    """Long side over short side, of the narrowest picture."""
    sizes = (upright_size(picture.source) for picture in _pictures(sample))
    return max((max(size) / min(size) for size in sizes), default=NOTHING)


def sharpness(sample: Sample) -> float:
    """Variance of the second differences of grey levels, of the most blurred picture."""
    return min((_laplacian(open_image(picture.source)) for picture in _pictures(sample)), default=NOTHING)


def _laplacian(picture: Pillow.Image) -> float:
    picture = picture.convert("L")
    picture.thumbnail((BLUR_SIDE, BLUR_SIDE))
    grey = np.pad(np.asarray(picture, np.float64), 1, mode="edge")
    middle = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle).var())


def _pictures(sample: Sample) -> list[Image]:
    return [medium for medium in sample.media if isinstance(medium, Image)]


# ---------------------------------------------------------------------------------------------- pictures and words


class ClipScore:
    """The cosine between picture and answer in a two-tower model's common space; the least of several pictures.

    Args:
        model, tokenizer, images: a CLIP or SigLIP of transformers, and what prepares its inputs.
    """

    def __init__(self, model: Any, tokenizer: Any, images: Any) -> None:
        self.model, self.tokenizer, self.images = model.eval(), tokenizer, images
        self.length = model.config.text_config.max_position_embeddings

    @classmethod
    def load(cls, folder: str, device: torch.device) -> ClipScore:
        """From a folder that transformers saved."""
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except (OSError, ValueError) as error:
            remedy = f"name a CLIP's folder, or fetch it first: hf download {folder}"
            raise ConfigError(f"{folder}: {str(error).splitlines()[0][:200]}", remedy) from None
        return cls(model, tokenizer, images)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        shown = [(number, picture) for number, sample in enumerate(samples) for picture in _pictures(sample)]
        found = [NOTHING] * len(samples)
        if not shown:
            return found
        said = self.tokenizer(
            [answer(samples[number]) for number, _ in shown],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        pixels = self.images([open_image(picture.source) for _, picture in shown], return_tensors="pt")
        out = self.model(**said.to(self.model.device), **pixels.to(self.model.device))
        cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).tolist()
        for (number, _), cosine in zip(shown, cosines):
            found[number] = min(cosine, found[number]) if found[number] == found[number] else cosine
        return found


class Dependence:
    """How much a model's joint sees of an answer: log p(answer | picture) - log p(answer | grey), per token."""

    def __init__(self, model: VLM) -> None:
        self.model, self.collator = model.eval(), model.processor.collator()

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self._one(sample) if _pictures(sample) else NOTHING for sample in samples]

    def _one(self, sample: Sample) -> float:
        seen, unseen = (mean_loss(self.model, self.collator, [one]) for one in (sample, _greyed(sample)))
        return unseen - seen


def _greyed(sample: Sample) -> Sample:
    """The same conversation about grey pictures of the same sizes."""

    def grey(turn: Turn) -> Turn:
        parts = (
            Image(Pillow.new("RGB", upright_size(part.source), (127, 127, 127))) if isinstance(part, Image) else part
            for part in turn.parts
        )
        return Turn(turn.role, tuple(parts))

    return sample.but(turns=tuple(map(grey, sample.turns)))


# ---------------------------------------------------------------------------------------------- rules


def one_by_one(measure: Callable[[Sample], float]) -> Measure:
    """An operator from what it says of one sample."""
    return lambda samples: list(map(measure, samples))


PLAIN: dict[str, Callable[[], Measure]] = {
    "words": lambda: one_by_one(words),
    "repetition": lambda: one_by_one(repetition),
    "uncurated": lambda: one_by_one(uncurated),
    "alphanumeric": lambda: one_by_one(alphanumeric),
    "side": lambda: one_by_one(side),
    "aspect": lambda: one_by_one(aspect),
    "sharpness": lambda: one_by_one(sharpness),
    "same-picture": SamePicture,
    "same-text": SameText,
}
"""Operators that need no model, by name."""
MODELS = ("score", "dependence")
"""Those that need one: a CLIP, or a model of ours."""
NAMES = (*PLAIN, *MODELS, f"{languages.PREFIX}en (or another code)")
"""All of them, as they are told."""


def measure(name: str, clip: str | None, joint: str | None, device: torch.device) -> Measure:
    """An operator by its name; `clip` and `joint` are the folders of models that `score` and `dependence` ask.

    Raises:
        ConfigError: it is unknown, or its model is not named.
    """
    if name in PLAIN:
        return PLAIN[name]()
    if name.startswith(languages.PREFIX):
        return spoken(name.removeprefix(languages.PREFIX))
    folder = {"score": clip, "dependence": joint}.get(name)
    if folder is None:
        needs = {"score": "--clip FOLDER", "dependence": "--joint DIRECTORY"}
        known = f"operators are {', '.join(NAMES)}"
        raise ConfigError(f"cannot measure {name!r}", f"name its model: {needs[name]}" if name in needs else known)
    return ClipScore.load(folder, device) if name == "score" else Dependence(load(folder, device=device))


NUMBER = r"\d*\.?\d+"
RULE = re.compile(rf"([a-z-]+)=(?:(-?{NUMBER})?\.\.(-?{NUMBER})?|top({NUMBER})%|({NUMBER})sigma)")


@dataclass(frozen=True)
class Rule:
    """Which numbers of an operator stay: those in a range, the best share of all, or those near the mean."""

    operator: str
    low: float | None = None
    high: float | None = None
    top: float | None = None
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`words=3..60`, `score=0.25..`, `score=top70%`, `sharpness=3sigma`.

        Raises:
            ConfigError: it is none of these, the operator is unknown, or the share is more than all.
        """
        found = RULE.fullmatch(text)
        if found is None or not (found[1] in (*PLAIN, *MODELS) or found[1].startswith(languages.PREFIX)):
            raise ConfigError(
                f"no rule is written {text!r}",
                f"write OPERATOR=LOW..HIGH, =top70% or =3sigma; operators are {', '.join(NAMES)}",
            )
        rule = cls(found[1], *(None if number is None else float(number) for number in found.groups()[1:]))
        if rule.top is not None and rule.top > 100:
            raise ConfigError(f"{text} asks for more than all", "write a share of at most 100, such as =top70%")
        return rule

    def keeps(self, values: np.ndarray) -> np.ndarray:
        """Which of these numbers stay, [N] of bool."""
        low, high = self._range(values)
        return np.isnan(values) | ((values >= low) & (values <= high))

    def _range(self, values: np.ndarray) -> tuple[float, float]:
        known = values[~np.isnan(values)]
        if self.sigma is not None and len(known):
            return known.mean() - self.sigma * known.std(), known.mean() + self.sigma * known.std()
        if self.top is not None and len(known):
            return float(np.quantile(known, 1 - self.top / 100)), np.inf
        return -np.inf if self.low is None else self.low, np.inf if self.high is None else self.high


@dataclass(frozen=True)
class Kept:
    """What rules leave of data: which samples, and how many each rule dropped that no earlier one had."""

    numbers: np.ndarray
    dropped: Mapping[str, int]


def measured(samples: Iterable[Sample], measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
    """Every operator's number of every sample, [N] each."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for batch in _batches(samples):
        for name, measure in measures.items():
            found[name] += measure(batch)
    return {name: np.array(values, np.float64) for name, values in found.items()}


def kept(stats: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> Kept:
    """What is left after all rules."""
    stays = np.ones(len(next(iter(stats.values()), ())), bool)
    dropped: dict[str, int] = {}
    for rule in rules:
        now = stays & rule.keeps(stats[rule.operator])
        dropped[rule.operator] = dropped.get(rule.operator, 0) + int(stays.sum() - now.sum())
        stays = now
    return Kept(np.flatnonzero(stays), dropped)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    rows = iter(samples)
    while batch := list(islice(rows, BATCH)):
        yield batch
