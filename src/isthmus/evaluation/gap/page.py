"""The HTML page of the gap: one file, no script, figures inside, light and dark; one model, or two side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from importlib import resources
from io import BytesIO
from typing import NamedTuple

from PIL import Image as Pillow

from isthmus.evaluation.escaping import escape
from isthmus.evaluation.gap import drawing
from isthmus.evaluation.gap.effects import Effect
from isthmus.evaluation.gap.report import MUTE, NEIGHBOURS, RANKED, TOP, Gap, Layer, Shown

STYLE = """
.gap polyline { stroke-width: 2.2; }
.gap .line0 { stroke: var(--accent); } .gap .dot0, .legend .dot0 { fill: var(--accent); }
.gap .line1 { stroke: var(--other); stroke-dasharray: 5 3; } .gap .dot1, .legend .dot1 { fill: var(--other); }
.curves figcaption small { min-height: 3.1em; }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13.5rem, 100%), 1fr)); gap: 1rem; }
.sheets figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem; }
.sheets img { width: 100%; height: auto; aspect-ratio: 1; border-radius: 5px; display: block; margin-bottom: .4rem; }
.item { margin: 0 0 2.2rem; }
.item h4 { font-size: .9rem; font-weight: 500; color: var(--soft); margin: .9rem 0 .5rem; }
.item p { margin: .2rem 0 0; }
"""


class Chart(NamedTuple):
    """One curve over layers: its title, what it is, and how to read a value of it."""

    title: str
    about: str
    value: Callable[[Layer], float | None]
    chance: Callable[[Gap], float] | None = None
    log: bool = False


CHARTS = (
    Chart(
        "Distance of the centroids",
        "Of unit vectors, 0 to 2: how far pictures lie from their words.",
        lambda layer: layer.gap,
    ),
    Chart(
        "Spread of the pictures",
        "How far pictures lie from their own centroid, 0 to 1.",
        lambda layer: layer.spread_image,
    ),
    Chart(
        "Spread of the words", "How far words lie from their own centroid, 0 to 1.", lambda layer: layer.spread_words
    ),
    Chart(
        "Linear CKA",
        "Whether pictures lie to each other as their words do; 1 is the same, 0 (dashed) unrelated.",
        lambda layer: layer.cka,
        lambda gap: 0.0,
    ),
    Chart(
        "Shared neighbours",
        f"Of a picture’s {NEIGHBOURS} nearest, the share that are its words’ nearest too; dashed: unrelated.",
        lambda layer: layer.neighbours,
        lambda gap: gap.chance,
    ),
    Chart(
        "Attention to the picture",
        "Share of the attention where the answer begins; dashed, where models agree: if all places got the same.",
        lambda layer: layer.mass,
        lambda gap: gap.places,
    ),
    Chart(
        "Place of the right word",
        f"In what a token would say (logit lens; at the input, what is near): median of at most {RANKED} pictures; "
        "1 is first.",
        lambda layer: layer.rank,
        log=True,
    ),
    Chart(
        f"Right word among the first {TOP}",
        f"Share of at most {RANKED} pictures with a token that would say one of the answer’s words; see below which.",
        lambda layer: layer.found,
    ),
)


def render(gaps: Sequence[Gap]) -> str:
    """The whole page for one or two models over the same pictures."""
    style = resources.files("isthmus.evaluation").joinpath("templates/report.css").read_text(encoding="utf-8") + STYLE
    names = " and ".join(gap.model for gap in gaps)
    stamps = "".join(f" · {escape(gap.model)} <code>{escape(gap.fingerprint)}</code>" for gap in gaps)
    parts = [
        _section("Layer by layer", _key(gaps) + _charts(gaps)),
        _section("What the picture is worth to the answer", _effects(gaps)),
        _section("Token by token", _items(gaps)),
        _section("How it was measured", _method(gaps)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>The gap in {escape(names)} · Isthmus</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><p class="kind">Isthmus gap</p><h1>How far pictures are from their words</h1>
<p class="lead">{escape(_lead(gaps))}</p></header>
{"".join(parts)}
</main>
<footer>Made by Isthmus{stamps}</footer>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</section>\n'


def _lead(gaps: Sequence[Gap]) -> str:
    """What a reader should take away, in a sentence per model."""
    told = []
    for gap in gaps:
        best = max(gap.layers, key=lambda layer: layer.neighbours)
        blank = gap.effects["blank picture"]
        told.append(
            f"{gap.model}: pictures lie to each other most like their words in {_layer_name(best.number)} "
            f"({best.neighbours:.0%} shared neighbours, {gap.chance:.0%} by chance); {_blank(blank)}."
        )
    return " ".join(told)


def _blank(effect: Effect) -> str:
    """What a blank picture does to the right answer, as far as its interval decides."""
    size = f"{effect.rise:+.2f} nats per token, {effect.low:+.2f} to {effect.high:+.2f}"
    if effect.low > 0:
        return f"a blank picture costs the right answer ({size})"
    if effect.high < 0:
        return f"the right answer is likelier with a blank picture ({size})"
    return f"whether a blank picture costs the right answer is not decided ({size})"


def _layer_name(number: int) -> str:
    return f"layer {number}" if number else "the LLM’s input"


# ---------------------------------------------------------------------------------------------- curves


def _key(gaps: Sequence[Gap]) -> str:
    entries = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{drawing.mark(7, 7, number)}</svg>{escape(gap.model)}</li>'
        for number, gap in enumerate(gaps)
    )
    return f'<ul class="legend">{entries}</ul>'


def _charts(gaps: Sequence[Gap]) -> str:
    figures = []
    for chart in CHARTS:
        found = {gap.model: [(layer.number, chart.value(layer)) for layer in gap.layers] for gap in gaps}
        lines = {name: [(n, v) for n, v in line if v is not None] for name, line in found.items()}
        if any(lines.values()):
            levels = {chart.chance(gap) for gap in gaps if lines[gap.model]} if chart.chance else set()
            svg = drawing.curves(lines, chart.title, levels.pop() if len(levels) == 1 else None, chart.log)
            figures.append(
                f"<figure><figcaption><b>{escape(chart.title)}</b><small>{escape(chart.about)}</small></figcaption>"
                f"{svg}</figure>"
            )
    reasons = "".join(
        f'<p class="note below">{escape(gap.model)}, without {escape(what)}: {escape(why)}.</p>'
        for gap in gaps
        for what, why in gap.skipped.items()
    )
    return f'<div class="curves">{"".join(figures)}</div>{reasons}{_numbers(gaps)}'


def _numbers(gaps: Sequence[Gap]) -> str:
    """The curves as tables, for those who do not see them."""
    heads = "".join(f'<th scope="col" class="count">{escape(chart.title)}</th>' for chart in CHARTS)
    tables = []
    for gap in gaps:
        rows = "".join(
            f'<tr><th scope="row">{layer.number or "input"}</th>'
            + "".join(f'<td class="count">{_number(chart.value(layer))}</td>' for chart in CHARTS)
            + "</tr>"
            for layer in gap.layers
        )
        tables.append(
            f'<div class="wide" tabindex="0"><table><caption>{escape(gap.model)}</caption>'
            f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return f"<details><summary>The same as numbers</summary>{''.join(tables)}</details>"


def _number(value: float | None) -> str:
    return "·" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


# ---------------------------------------------------------------------------------------------- effects


def _effects(gaps: Sequence[Gap]) -> str:
    heads = "".join(f'<th scope="col" class="count">{escape(gap.model)}</th>' for gap in gaps)
    first = "".join(f'<td class="count">{gap.nll:.3f}</td>' for gap in gaps)
    rows = f'<tr><th scope="row">with its picture<small>nats per token of the right answer</small></th>{first}</tr>'
    for name in gaps[0].effects:
        cells = "".join(_effect(gap, name) for gap in gaps)
        rows += f'<tr><th scope="row">{escape(name)}<small>rise</small></th>{cells}</tr>'
    return (
        f'<p class="note">Negative log-likelihood of the right answer over {gaps[0].pairs} pictures, and by how much '
        "it rises when the picture is changed; in brackets the 95 % interval of the mean. What does not rise shows no "
        "use of the picture for the right answer.</p>"
        '<div class="wide" tabindex="0"><table><caption class="hidden">Effects of changing the picture</caption>'
        f'<thead><tr><th scope="col">picture</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _effect(gap: Gap, name: str) -> str:
    effect = gap.effects[name]
    return f'<td class="count">{effect.rise:+.3f} <small>[{effect.low:+.3f}, {effect.high:+.3f}]</small></td>'


# ---------------------------------------------------------------------------------------------- pictures


def _items(gaps: Sequence[Gap]) -> str:
    blocks = []
    for number, first in enumerate(gaps[0].shown):
        each = "".join(_model(gap, gap.shown[number], len(gaps) > 1) for gap in gaps)
        blocks.append(
            f'<div class="item"><h3>{escape(first.question) or f"Picture {number + 1}, without a question"}</h3>'
            f'<p class="note">right answer: {escape(first.words)}</p>{each}</div>'
        )
    note = (
        "What each token of the picture would say, from layer to layer: its likeliest words stand on its place, on "
        "darker ground the surer it is; at the input, the words that it is nearest to. Attention: where the first word "
        "of the answer looks, mean over heads and layers; the strongest place is fully coloured. Hidden places: red "
        "where hiding a place costs the answer, blue-green where it helps, against the largest."
    )
    return f'<p class="note">{note}</p>{"".join(blocks)}'


class Sheet(NamedTuple):
    """A figure of one picture."""

    name: str
    caption: str
    alt: str
    picture: Pillow.Image


def sheets(gap: Gap, shown: Shown) -> list[Sheet]:
    """The picture, its words at several layers where they have places, attention where there is some, occlusion."""
    picture = drawing.base(shown.picture, gap.aspect)
    found = [Sheet("picture", "the picture", f"The picture: {shown.words}", picture)]
    for layer, tokens in shown.lens.items() if gap.grid is not None else ():
        assert gap.grid is not None
        drawn = drawing.lens(picture, tokens, gap.grid)
        found.append(Sheet(f"words-{layer}", f"words, {_layer_name(layer)}", _first_words(layer, tokens), drawn))
    if shown.attention is not None:
        text = f"attention, {float(shown.attention.sum()):.0%} of all"
        found.append(Sheet("attention", text, f"Map of {text}", drawing.attention(picture, shown.attention)))
    text = f"hidden places, up to {float(shown.occlusion.abs().max()):.2f} nats"
    found.append(Sheet("occlusion", text, f"Map of {text}", drawing.occlusion(picture, shown.occlusion)))
    return found


def pictures(gaps: Sequence[Gap]) -> dict[str, Pillow.Image]:
    """Every sheet of every model, by the name of its file."""
    return {
        f"{gap.model.replace(' ', '-')}-{number}-{sheet.name}": sheet.picture
        for gap in gaps
        for number, shown in enumerate(gap.shown, start=1)
        for sheet in sheets(gap, shown)
    }


def _first_words(layer: int, tokens: Sequence[Sequence[tuple[str, float]]]) -> str:
    return f"Words at {_layer_name(layer)}: " + ", ".join(words[0][0] for words in tokens[:64])


def _model(gap: Gap, shown: Shown, named: bool) -> str:
    title = f"<h4>{escape(gap.model)}</h4>" if named else ""
    figures = "".join(map(_figure, sheets(gap, shown)))
    listed = ""
    if gap.grid is None:
        lines = [escape(_first_words(layer, tokens)) for layer, tokens in shown.lens.items()]
        listed = "".join(f'<p class="note">{line}</p>' for line in lines)
    return f'{title}<div class="sheets">{figures}</div>{listed}'


def _figure(sheet: Sheet) -> str:
    return (
        f'<figure><img src="{png(sheet.picture)}" alt="{escape(sheet.alt)}" width="432" height="432">'
        f"<figcaption>{escape(sheet.caption)}</figcaption></figure>"
    )


def png(picture: Pillow.Image) -> str:
    """A picture as text that a page can hold; words stay sharp."""
    file = BytesIO()
    picture.quantize(128).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------- method


def _method(gaps: Sequence[Gap]) -> str:
    facts = {
        "pictures": f"{gaps[0].pairs} of {gaps[0].data}, no two of them equal or with the same answer",
        "a picture’s state": "mean over its tokens in a layer’s output; layer 0 is the LLM’s input",
        "its words’ state": "mean over the answer’s tokens where the assistant says them without the picture",
        "centroids": "Liang et al. 2022, arXiv 2203.02053",
        "CKA": "Kornblith et al. 2019, arXiv 1905.00414, with the unbiased HSIC of Song et al. 2012",
        "neighbours": f"Huh et al. 2024, arXiv 2405.07987, k = {NEIGHBOURS}, cosine",
        "lens": "nostalgebraist 2020: the LLM’s last norm and head on inner states; nothing is trained for it. At the "
        "input: cosine with the words’ embeddings, from their centre",
        "right word": "the first token of any of the answer’s words that stands in at most half of all answers; "
        f"{', '.join(MUTE)} are none",
        "attention": "of transformers’ plain attention, at the last position before the answer",
        "hidden places": "Zeiler & Fergus 2014, arXiv 1311.2901; grey cells, the answer’s log-probability per token",
    }
    facts |= {f"model {gap.model}": f"joint {gap.joint}, fingerprint {gap.fingerprint or 'none'}" for gap in gaps}
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f'<dl class="pairs">{lines}</dl>\n'
