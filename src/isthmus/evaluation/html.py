"""What the pages of reports share: one file without script or outside parts, its sections, pictures and tables.

Everything that comes from data or a model is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from PIL import Image as Pillow

from isthmus.evaluation import drawing
from isthmus.evaluation.escaping import escape
from isthmus.evaluation.results import Credit


def document(title: str, body: str, footer: str, *styles: str) -> str:
    """A whole page; `styles` are sheets of this folder's templates beside the common one."""
    folder = resources.files("isthmus.evaluation") / "templates"
    style = "".join(folder.joinpath(sheet).read_text(encoding="utf-8") for sheet in ("report.css", *styles))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · Isthmus</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def section(title: str, body: str) -> str:
    """A part of the page under a heading that names it."""
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</section>\n'


def picture(image: Pillow.Image, words: str) -> str:
    """A small copy of a picture inside the page."""
    return f'<img src="{drawing.data_url(image)}" alt="{escape(words)}" width="144" height="144">'


def pairs(texts: Mapping[str, str]) -> str:
    """Names and what belongs to them."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
    return f'<dl class="pairs">{lines}</dl>\n'


def credits_table(credits: Sequence[Credit]) -> str:
    """Whose work was used."""
    lines = "".join(
        f'<tr><th scope="row">{link(credit.name, credit.address)}'
        + (f"<small>{escape(credit.author)}</small>" if credit.author else "")
        + f"</th><td>{escape(credit.used_as)}</td><td>{escape(credit.licence)}</td></tr>\n"
        for credit in credits
    )
    return f"""<div class="wide" tabindex="0"><table class="credits">
<caption class="hidden">Works used and their licences</caption>
<thead><tr><th scope="col">work</th><th scope="col">used as</th><th scope="col">licence</th></tr></thead>
<tbody>{lines}</tbody></table></div>
"""


def link(name: str, address: str) -> str:
    """A link only to the web; anything else stays text."""
    return f'<a href="{escape(address)}">{escape(name)}</a>' if address.startswith("https://") else escape(name)


def clock(seconds: float) -> str:
    """312 -> 5 min 12 s"""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.3g} s"
