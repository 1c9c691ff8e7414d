"""Samples as they train, with their pictures: in the terminal, or as a page that is one file without script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image as Pillow
from rich.style import Style
from rich.text import Text as RichText

from isthmus.assembly import rebuild
from isthmus.config import Recipe, Stage
from isthmus.data.chat import STYLES
from isthmus.data.collate import Collator
from isthmus.data.media import open_image
from isthmus.evaluation import html
from isthmus.evaluation.escaping import escape
from isthmus.planning import outline, processor
from isthmus.training.run import limits
from isthmus.types import DataError, Image, Sample

COLUMNS = 32
"""Of a picture in the terminal; two pixels stand above each other in each of its cells."""
CLASSES = {style: name for name, style in STYLES.items()}
"""What the page calls the terminal's styles of tokens; its sheet has colours of them for light and dark."""


def collator(recipe: Recipe, stage: Stage) -> Collator:
    """What writes a stage's samples in a run, from the parts' configs and the LLM's tokenizer; no weights are read."""
    model = outline(recipe)
    for each in recipe.stages[: recipe.stages.index(stage) + 1]:
        if each.joint:
            rebuild(model, each.joint)
    return processor(model, recipe).collator(None, stage.template, **limits(stage))


def fate(sample: Sample, collator: Collator) -> str:
    """What becomes of a sample that is too long; nothing of another."""
    collator.shortened.discard(sample.id)
    try:
        length = collator.lengths(sample)
    except DataError as error:
        return f"stops training: {error.cause}; {error.remedy}"
    if not length:
        return f"left out: longer than max_length {collator.max_length}"
    return "trained without its oldest turns: too long with them" if sample.id in collator.shortened else ""


def pictures(sample: Sample) -> Iterator[Pillow.Image]:
    """A sample's pictures, decoded."""
    return (open_image(medium.source, sample.id) for medium in sample.media if isinstance(medium, Image))


def blocks(picture: Pillow.Image) -> RichText:
    """A picture as coloured half blocks."""
    height = max(2, round(COLUMNS * picture.height / picture.width / 2) * 2)
    small = picture.resize((COLUMNS, min(height, 2 * COLUMNS)), Pillow.Resampling.BOX)
    text = RichText()
    for y in range(0, small.height, 2):
        for x in range(small.width):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*small.getpixel((x, y + dy))) for dy in (0, 1))  # type: ignore[misc]
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def page(samples: Sequence[Sample], collator: Collator, title: str) -> str:
    """A page of samples: pictures, and the tokens in the colours of the terminal."""
    body = "".join(_sample(sample, collator) for sample in samples)
    lead = "Green tokens carry loss; a picture stands as [image × its tokens]."
    head = f"<header><p class='kind'>What trains</p><h1>{escape(title)}</h1><p class='lead'>{lead}</p></header>"
    return html.document(title, f"{head}\n{body}", "Made by Isthmus")


def _sample(sample: Sample, collator: Collator) -> str:
    shown = "".join(html.picture(picture, sample.id) for picture in pictures(sample))
    text = collator.preview(sample)
    tokens, end = "", 0
    for span in sorted(text.spans):
        tokens += escape(text.plain[end : span.start])
        tokens += f'<span class="{CLASSES[str(span.style)]}">{escape(text.plain[span.start : span.end])}</span>'
        end = span.end
    heading, met = f"<h2>{escape(sample.id)}</h2>", fate(sample, collator)
    heading += f"<p>{escape(met)}</p>" if met else ""
    return f'<section>{heading}<p>{shown}</p><pre class="tokens">{tokens}</pre></section>\n'
