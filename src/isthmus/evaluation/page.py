"""The HTML page of a report: one file, no script, style and figures inside, light and dark.

Everything that comes from data or a model is escaped; figures come from `drawing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from isthmus.evaluation import drawing, html
from isthmus.evaluation.answers import Prediction, verdict
from isthmus.evaluation.drawing import count
from isthmus.evaluation.escaping import escape
from isthmus.evaluation.html import clock, credits_table, pairs, picture, section
from isthmus.evaluation.results import COLUMNS, Column, Example, Generation, Report, Row, headline, interval
from isthmus.evaluation.statistics import Estimate, short

HEADS: dict[Column, str] = {
    "before": "before",
    "after": "after",
    "blind": "blank",
    "shuffled": "shuffled",
    "cosine": "joint alone",
}
ROLES = {"encoder": "encoder", "joint": "joint", "llm": "language model", "adapter": "in the language model"}


def render(report: Report) -> str:
    """The whole page."""
    sections = [
        section("Results", _results(report)) if report.rows else "",
        section("What was joined", _parts(report)),
        section("Training", _curves(report)) if report.curves else "",
        section("Examples", _examples(report)) if report.examples else "",
        section("In its own words", _generations(report.generations)) if report.generations else "",
        section("How it was measured", _method(report)) if report.rows else "",
        section("Attribution and licences", credits_table(report.credits)) if report.credits else "",
    ]
    footer = (
        f"Made by Isthmus · recipe <code>{escape(report.fingerprint)}</code>\n"
        f" · data <code>{escape(report.data_hash)}</code> · seed {report.seed}\n"
        f" · revision <code>{escape(report.revision)}</code>"
    )
    return html.document(report.title, _head(report) + "\n" + "".join(sections), footer)


def _head(report: Report) -> str:
    share = 100 * report.trained / max(1, report.parameters)
    facts = [
        (f"{share:.2g} %", f"of {count(report.parameters)} parameters trained"),
        *((clock(spent), leg) for leg, spent in report.seconds.items()),
    ]
    tiles = "".join(f"<div><dt>{escape(text)}</dt><dd>{escape(value)}</dd></div>" for value, text in facts)
    return (
        f'<header><p class="kind">Isthmus report</p><h1>{escape(report.title)}</h1>'
        f'<p class="lead">{escape(report.sentence)}</p><dl class="facts">{tiles}</dl></header>'
    )


# ---------------------------------------------------------------------------------------------- results


def _results(report: Report) -> str:
    shown = [column for column in COLUMNS if any(column in row.cells for row in report.rows)]
    heads = "".join(f'<th scope="col" class="{column}">{HEADS[column]}</th>' for column in shown)
    accuracies = any(row.unit == "accuracy" for row in report.rows)
    axis = '<span class="axis"><span>0</span><span>1</span></span>' if accuracies else ""
    body = "".join(_row(row, shown) for row in report.rows)
    return f"""{drawing.legend(shown)}
<div class="wide" tabindex="0"><table class="results">
<caption class="hidden">Results by task and condition</caption>
<thead><tr><th scope="col">task</th><th scope="col">{axis}</th>{heads}<th scope="col" class="chance">chance</th></tr>
</thead>
<tbody>{body}</tbody></table></div>
<p class="note below">{_units(report.rows)}</p>
{_gains(report.rows)}"""


def _units(rows: Sequence[Row]) -> str:
    """What the numbers are, and what the controls were."""
    parts = []
    if any(row.unit == "accuracy" for row in rows):
        parts.append(
            "Mean score of an item from 0 to 1 (higher is better): where items are right or wrong, the share of right "
            "ones."
        )
    if any(row.unit != "accuracy" for row in rows):
        parts.append("Nats per token: negative log-likelihood (lower is better), on a scale of its own.")
    if any(row.besides for row in rows):
        parts.append("Below a row, without marks: what its task or benchmark reports besides.")
    parts.append(
        "Small figures are 95 % intervals. Blank and shuffled: after training, with a grey picture or another’s."
    )
    if any(row.fewest < row.n for row in rows):
        parts.append("Before, blank and shuffled were asked of some of the items, drawn among them.")
    return " ".join(parts)


def _besides(row: Row, shown: Sequence[Column]) -> str:
    """The row's further figures, each in a row of its own."""
    found = ""
    for name, values in row.besides.items():
        cells = "".join(f'<td class="{column}">{_figure(values, column)}</td>' for column in shown)
        found += f'<tr><th scope="row"><small>{escape(name)}</small></th><td class="figure"></td>{cells}'
        found += '<td class="chance"></td></tr>\n'
    return found


def _figure(values: Mapping[Column, Estimate | None], column: Column) -> str:
    if column not in values:
        return ""
    value = values[column]
    if value is None:
        return '<small class="unscored">not scored</small>'
    return f"{short(value.value)}<small>{interval(value)}</small>"


def _row(row: Row, shown: Sequence[Column]) -> str:
    cells = "".join(_cell(row.cells.get(column), column) for column in shown)
    chance = "" if row.chance is None else short(row.chance)
    groups = f"{row.n:,} items" + (f", {row.clusters:,} clusters" if row.clusters != row.n else "")
    groups += f", baselines {row.fewest:,}" if row.fewest < row.n else ""
    unit = "" if row.unit == "accuracy" else f" · {escape(row.unit)}"
    return (
        f'<tr><th scope="row">{escape(row.label)}<small>{groups}{unit}</small></th>'
        f'<td class="figure">{drawing.marks(row)}</td>{cells}<td class="chance">{chance}</td></tr>\n'
        + _besides(row, shown)
    )


def _cell(value: Estimate | None, column: Column) -> str:
    if value is None:
        return f'<td class="{column} none" title="not measured">·</td>'
    unscored = f'<small class="unscored">{value.unscored} not scored</small>' if value.unscored else ""
    return f'<td class="{column}"><b>{headline(value)}</b><small>{interval(value)}</small>{unscored}</td>'


def _gains(rows: Iterable[Row]) -> str:
    """What the picture adds, in sentences: paired differences from the controls, and the mean over kinds."""
    lines = []
    for row in rows:
        parts = [f"{_signed(row.gains[column])} over {HEADS[column]}" for column in COLUMNS if column in row.gains]
        if row.macro is not None:
            kinds = ", ".join(f"{escape(kind)} {headline(value)}" for kind, value in row.kinds.items())
            parts.append(f"mean over kinds {headline(row.macro)} ({kinds})")
        if parts:
            lines.append(f"<dt>{escape(row.label)}</dt><dd>{'; '.join(parts)}</dd>")
    if not lines:
        return ""
    return f'<details><summary>Paired differences and kinds</summary><dl class="pairs">{"".join(lines)}</dl></details>'


def _signed(value: Estimate) -> str:
    def one(x: float) -> str:
        return ("" if x < 0 else "+") + short(x)

    if value.unscored:
        text = f"{one(value.lowest)} to {one(value.highest)} ({value.unscored} of {value.n} not scored)"
    else:
        text = one(value.value)
    return f"<b>{text}</b> [{one(value.low)}, {one(value.high)}]"


# ---------------------------------------------------------------------------------------------- model and training


def _parts(report: Report) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(part.name)}<small>{escape(part.source)}</small></th>'
        f'<td>{ROLES[part.role]}</td><td class="count">{count(part.parameters)}</td>'
        f'<td class="count">{count(part.trained) if part.trained else "frozen"}</td>'
        f'<td class="count">{_share(part.trained, report.parameters)}</td></tr>\n'
        for part in report.parts
    )
    total = (
        f'<tr><th scope="row">Total</th><td></td><td class="count">{count(report.parameters)}</td>'
        f'<td class="count">{count(report.trained)}</td>'
        f'<td class="count">{_share(report.trained, report.parameters)}</td></tr>'
    )
    return f"""<figure>{drawing.isthmus(report.parts)}</figure>
<div class="wide" tabindex="0"><table class="parts"><caption class="hidden">Parts and their parameters</caption>
<thead><tr><th scope="col">part</th><th scope="col">role</th><th scope="col" class="count">parameters</th>
<th scope="col" class="count">trained</th><th scope="col" class="count">share of all</th></tr></thead>
<tbody>{lines}</tbody><tfoot>{total}</tfoot></table></div>
"""


def _share(trained: int, parameters: int) -> str:
    return f"{100 * trained / max(1, parameters):.2g} %" if trained else "–"


def _curves(report: Report) -> str:
    figures = "".join(
        f"<figure><figcaption><b>{escape(losses.stage)}</b> {escape(_last(losses.validation or losses.train))}"
        f"</figcaption>{drawing.curve(losses)}</figure>"
        for losses in report.curves
    )
    key = (
        '<ul class="legend"><li><i class="train"></i>training loss, smoothed</li>'
        '<li><i class="validation"></i>validation loss</li></ul>'
    )
    return f'{key}<div class="curves">{figures}</div>\n'


def _last(points: Sequence[tuple[float, float]]) -> str:
    return f"{points[0][1]:.2f} → {points[-1][1]:.2f}" if points else ""


# ---------------------------------------------------------------------------------------------- examples


def _examples(report: Report) -> str:
    cards = "".join(_example(example) for example in report.examples)
    return f'<p class="note">{escape(report.draw)}</p><div class="cards">{cards}</div>\n'


def _example(example: Example) -> str:
    after = example.after
    chart = drawing.bars(after.choices, after.scores, after.answer) if after.choices else ""
    before = _verdict("before", example.before) if example.before else ""
    return (
        f'<article class="card">{picture(example.picture, f"Picture of the question: {example.question}")}'
        f'<div><p class="kind">{escape(example.label)}</p><h3>{escape(example.question)}</h3>'
        f'<dl class="verdicts"><dt>truth</dt><dd>{escape(after.answer)}</dd>{before}{_verdict("after", after)}</dl>'
        f"{chart}</div></article>\n"
    )


def _verdict(when: str, prediction: Prediction) -> str:
    word = verdict(prediction.right)
    state, sign = {"right": ("right", "✓"), "wrong": ("wrong", "✗")}.get(word, ("unscored", "?"))
    said = "–" if prediction.prediction is None else escape(prediction.prediction)
    shown = f'<span role="img" title="{word}" aria-label="{word}">{sign}</span>'
    return f'<dt>{when}</dt><dd class="{state}">{shown} {said}</dd>'


def _generations(generations: Iterable[Generation]) -> str:
    cards = "".join(
        f'<article class="card said">{picture(said.picture, "Picture of the conversation") if said.picture else ""}'
        f"<div><h3>{escape(said.prompt)}</h3><blockquote>{escape(said.reply) or '(nothing)'}</blockquote>"
        + (f'<p class="note">reference: {escape(said.reference)}</p>' if said.reference else "")
        + "</div></article>\n"
        for said in generations
    )
    note = "Free replies, shown as they come. Ranking given answers is easier than writing them."
    return f'<p class="note">{note}</p><div class="cards">{cards}</div>\n'


# ---------------------------------------------------------------------------------------------- how and by whom


def _method(report: Report) -> str:
    stamps = {
        "recipe fingerprint": report.fingerprint,
        "data hash": report.data_hash,
        "seed": str(report.seed),
        "code revision": report.revision,
    }
    spent = {"time": ", ".join(f"{leg} {clock(seconds)}" for leg, seconds in report.seconds.items())}
    return pairs({**report.method, **(spent if report.seconds else {}), **stamps})
