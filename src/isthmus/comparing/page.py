"""The page of a comparison: one file, no script, style and figures inside, light and dark, read as well as seen.

Everything that comes from recipes, data or models is escaped; figures come from `figures`.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.comparing import figures, page_method
from isthmus.comparing.advice import signed
from isthmus.comparing.outcome import Cell, Contrast, Cost, Line, Outcome, Shown
from isthmus.costs import TEXT
from isthmus.evaluation import html
from isthmus.evaluation.drawing import count
from isthmus.evaluation.escaping import escape
from isthmus.evaluation.html import clock, credits_table, picture, section
from isthmus.evaluation.results import Column
from isthmus.evaluation.seeds import Gap, Level
from isthmus.evaluation.statistics import short

FRONTS: tuple[tuple[str, str, Callable[[Cost], float]], ...] = (
    ("computation of an answer’s first token", "GFLOP of a prefill with one picture", lambda cost: cost.prefill / 1e9),
    ("memory per picture", "MiB kept while an answer is written", lambda cost: cost.kept / 2**20),
    ("trained parameters", "million parameters trained", lambda cost: cost.trained / 1e6),
    ("computation of the training", "TFLOP of one run", lambda cost: cost.training / 1e12),
)
CONTROLS: dict[Column, str] = {"before": "before training", "blind": "blank picture", "shuffled": "another’s picture"}


def render(outcome: Outcome) -> str:
    """The whole page."""
    sections = [
        section("Quality", _quality(outcome)),
        section("Quality and cost", _fronts(outcome)),
        section("What each joint costs", _costs(outcome)),
        section("Was the picture used", _seen(outcome)),
        section("Answered differently", _contrasts(outcome)) if outcome.contrasts else "",
        section("Training", page_method.curves(outcome))
        + (section("Learning rates", page_method.rates(outcome)) if outcome.rates else ""),
        section("Do the settings match", page_method.settings(outcome)),
        section("Where every number comes from", page_method.method(outcome)),
        section("Attribution and licences", credits_table(outcome.credits)) if outcome.credits else "",
    ]
    runs = f"{len(outcome.runs)} runs, {' and '.join(dict.fromkeys(run.revision for run in outcome.runs))}"
    return html.document(
        f"Comparison of {outcome.title}",
        _head(outcome) + "\n" + "".join(sections),
        f"Made by Isthmus · {escape(runs)} · data <code>{escape(outcome.runs[0].data_hash)}</code>",
        "compare.css",
    )


def _head(outcome: Outcome) -> str:
    facts = {
        "joints": str(len(outcome.names)),
        "trainings of each": str(len(outcome.seeds)),
        "of training per run": outcome.budget,
        "items per seed": f"{outcome.mean.items:,}",
    }
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in outcome.advice)
    return (
        f'<header><p class="kind">Isthmus comparison</p><h1>{escape(outcome.title)}</h1>'
        f'<ul class="advice">{said}</ul><dl class="facts">{tiles}</dl></header>'
    )


# ---------------------------------------------------------------------------------------------- quality


def _quality(outcome: Outcome) -> str:
    heads = "".join(
        f'<th scope="col"{" class=mean" if line is outcome.mean else ""}>{escape(line.label)}'
        f"<small>{line.items:,} items{'' if line.higher else f', {escape(line.unit)}, lower is better'}</small></th>"
        for line in outcome.table
    )
    body = "".join(
        f'<tr><th scope="row">{figures.key(number)}{escape(name)}'
        + ("<small>the baseline</small>" if name == outcome.baseline else "")
        + "</th>"
        + "".join(_score(line, name, line is outcome.mean) for line in outcome.table)
        + "</tr>\n"
        for number, name in enumerate(outcome.names)
    )
    return f"""<figure>{figures.forest(outcome.mean, outcome.names, outcome.baseline)}
<figcaption>{_mean_words(outcome)}</figcaption></figure>
<div class="wide" tabindex="0"><table class="scores">
<caption>{_quality_words(outcome)}</caption>
<thead><tr><th scope="col">joint</th>{heads}</tr></thead>
<tbody>{body}{_chance(outcome)}</tbody></table></div>
{_differences(outcome)}{_besides(outcome)}"""


def _mean_words(outcome: Outcome) -> str:
    seeds = (
        "Thin: 95 % interval over seeds (Student’s t). "
        if len(outcome.seeds) > 1
        else "One seed: no interval over seeds. "
    )
    return (
        f"{escape(_sentence(outcome.mean.label))}. {seeds}Thick: over items (bootstrap of seeds and clusters). "
        f"Dashed: {escape(outcome.baseline)}."
    )


def _quality_words(outcome: Outcome) -> str:
    if len(outcome.seeds) < 2:
        return (
            "After training; small figures are 95 % intervals over items alone. There are no verdicts: with one seed "
            "nothing is known of how much another training would differ."
        )
    return (
        "After training, the mean over seeds; small figures are 95 % intervals, over seeds or over items, of each end "
        "what reaches further. Better and worse: than "
        f"{escape(outcome.baseline)}, where other seeds and other items would say the same; the chance that one or "
        "more of these words are wrong is at most 5 %, if the number of seeds was settled beforehand. No word: not "
        "decided."
    )


def _sentence(text: str) -> str:
    """With a capital at its beginning, and all else as it was."""
    return text[:1].upper() + text[1:]


def _score(line: Line, name: str, mean: bool) -> str:
    cell = line.cells[name]
    verdict = f'<small class="{cell.verdict}">{cell.verdict}</small>' if cell.verdict in ("better", "worse") else ""
    unscored = f'<small class="unscored">{cell.unscored} not scored</small>' if cell.unscored else ""
    return (
        f"<td{' class=mean' if mean else ''}><b>{short(cell.level.value)}</b><small>{_interval(cell.level)}</small>"
        f"{verdict}{unscored}</td>"
    )


def _interval(level: Level) -> str:
    low, high = level.ends
    return f"{short(low, 2)} to {short(high, 2)}"


def _chance(outcome: Outcome) -> str:
    cells = "".join(
        f"<td{' class=mean' if line is outcome.mean else ''}>{'·' if line.chance is None else short(line.chance)}</td>"
        for line in outcome.table
    )
    return f'<tr><th scope="row">chance</th>{cells}</tr>\n'


def _differences(outcome: Outcome) -> str:
    """Every paired difference with both intervals and p-values."""
    rows = [
        (name, line, line.cells[name])
        for line in outcome.table
        for name in outcome.names
        if line.cells[name].gap is not None
    ]
    if not rows:
        return ""
    body = "".join(_difference(name, line, cell) for name, line, cell in rows)
    return f"""<details><summary>Every difference from {escape(outcome.baseline)}</summary>
<div class="wide" tabindex="0"><table class="costs">
<caption>Seed by seed{_paired_words(outcome)}. p is the larger of that over seeds
and that over items; adjusted after Holm over all rows of its family (the mean; the single tasks), 5 % for both
families together.</caption>
<thead><tr><th scope="col">joint and task</th><th scope="col">difference</th><th scope="col">over seeds</th>
<th scope="col">over items</th><th scope="col">p</th><th scope="col">adjusted</th><th scope="col">verdict</th></tr>
</thead>
<tbody>{body}</tbody></table></div></details>
"""


def _besides(outcome: Outcome) -> str:
    """What benchmarks report besides, a row for each figure."""
    body = "".join(
        f'<tr><th scope="row">{escape(figure)}<small>{escape(line.label)}</small></th>'
        + "".join(f"<td>{_figure(line.cells[name], figure)}</td>" for name in outcome.names)
        + "</tr>\n"
        for line in outcome.lines
        for figure in dict.fromkeys(figure for cell in line.cells.values() for figure in cell.besides)
    )
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in outcome.names)
    return f"""<details><summary>Further figures of the benchmarks</summary>
<div class="wide" tabindex="0"><table class="costs">
<caption>After training, the means over seeds, without intervals; none where an answer was not scored.</caption>
<thead><tr><th scope="col">figure and task</th>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>
"""


def _figure(cell: Cell, figure: str) -> str:
    return short(cell.besides[figure]) if figure in cell.besides else "·"


def _paired_words(outcome: Outcome) -> str:
    return " on the same items" if all(line.paired for line in outcome.table) else "; items differ between joints"


def _difference(name: str, line: Line, cell: Cell) -> str:
    gap = cell.gap
    assert gap is not None  # only those are listed
    over_seeds = "one seed" if gap.low is None or gap.high is None else f"{signed(gap.low)} to {signed(gap.high)}"
    return (
        f'<tr><th scope="row">{escape(name)}<small>{escape(line.label)}</small></th><td><b>{signed(gap.value)}</b></td>'
        f"<td>{over_seeds}</td><td>{signed(gap.items_low)} to {signed(gap.items_high)}</td><td>{_p(gap.p)}</td>"
        f"<td>{_p(cell.adjusted)}</td><td>{cell.verdict or 'not decided'}</td></tr>\n"
    )


def _p(value: float | None) -> str:
    if value is None or value >= 1:
        return "1"
    return "&lt; .001" if value < 0.001 else short(value)


# ---------------------------------------------------------------------------------------------- cost


def _fronts(outcome: Outcome) -> str:
    plots = "".join(
        f"<figure><figcaption><b>{escape(_sentence(title))}</b></figcaption>"
        + figures.front(
            outcome.mean, outcome.names, {name: of(cost) for name, cost in outcome.costs.items()}, unit, title
        )
        + "</figure>"
        for title, unit, of in FRONTS
    )
    return (
        f'<p class="note">{escape(_sentence(outcome.mean.label))}, with its interval over items, over what it costs. '
        "The dashed line joins those that nothing cheaper is as good as, by their means; it says nothing of chance.</p>"
        f'{figures.legend(outcome.names)}<div class="plots">{plots}</div>\n'
    )


def _costs(outcome: Outcome) -> str:
    heads = "".join(
        f'<th scope="col">{head}<small>{small}</small></th>'
        for head, small in (
            ("parameters", "of the whole"),
            ("trained", "and their share"),
            ("training", "TFLOP"),
            ("training", "samples, time"),
            ("peak memory", "GB, training"),
            ("prefill", "GFLOP: encoder, joint, LLM"),
            ("prefill", "measured, ms"),
            ("a token", "measured, ms"),
            ("kept per picture", "MiB: cache, aside"),
        )
    )
    body = "".join(
        f'<tr><th scope="row">{figures.key(number)}{escape(name)}<small>{escape(outcome.about[name])}</small></th>'
        f"{_cost(outcome.costs[name])}</tr>\n"
        for number, name in enumerate(outcome.names)
    )
    speed = next((cost.speed for cost in outcome.costs.values() if cost.speed), None)
    measured = (
        "" if speed is None else f" Measured: {escape(speed.method)}; {speed.arithmetic}, threads: {speed.threads}."
    )
    return f"""<div class="wide" tabindex="0"><table class="costs">
<caption>Counted: one picture and {TEXT} text tokens, 2 operations per multiply-add, attention densely; cache in
bfloat16. Training: steps times what one computes, counted as <code>isthmus plan</code> counts it (where it cannot, as
the log does), without encoding cached pictures and without validation, the mean over seeds.{measured}</caption>
<thead><tr><th scope="col">joint</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>
"""


def _cost(cost: Cost) -> str:
    speed = cost.speed
    cells = (
        (count(cost.parameters), ""),
        (count(cost.trained), f"{cost.share:.2%}"),
        (f"{cost.training / 1e12:,.3g}", ""),
        (f"{cost.samples:,.0f}", clock(cost.seconds)),
        (f"{cost.memory / 1e9:.2f}", ""),
        (
            f"{cost.prefill / 1e9:,.1f}",
            f"{cost.encoder / 1e9:,.1f} + {cost.joint / 1e9:,.2f} + {cost.llm / 1e9:,.1f}",
        ),
        ("·" if speed is None else f"{speed.prefill:,.0f}", ""),
        ("·" if speed is None else f"{speed.decode:,.1f}", ""),
        (f"{cost.kept / 2**20:,.2f}", f"{cost.cache / 2**20:,.2f} + {cost.aside / 2**20:,.2f}"),
    )
    return "".join(f"<td>{value}{f'<small>{small}</small>' if small else ''}</td>" for value, small in cells)


# ---------------------------------------------------------------------------------------------- controls


def _seen(outcome: Outcome) -> str:
    columns = [column for column in CONTROLS if any(column in cell.others for cell in outcome.mean.cells.values())]
    heads = "".join(f'<th scope="col">{CONTROLS[column]}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}<small>{escape(line.label)}</small></th>'
        + _level(line.cells[name].level)
        + "".join(_level(line.cells[name].others.get(column)) for column in columns)
        + f"<td>{_gain(line.cells[name].seen)}</td></tr>\n"
        for line in outcome.table
        for name in outcome.names
    )
    return f"""<details><summary>Each joint beside its own baselines</summary>
<div class="wide" tabindex="0"><table class="costs">
<caption>Means over seeds with 95 % intervals. The gain is paired, item by item, from the same model with a grey
picture, over the items that both were asked: what looking adds.</caption>
<thead><tr><th scope="col">joint and task</th><th scope="col">after training</th>{heads}
<th scope="col">gain over blank</th></tr></thead><tbody>{body}</tbody></table></div></details>
"""


def _level(level: Level | None) -> str:
    return "<td>·</td>" if level is None else f"<td>{short(level.value)}<small>{_interval(level)}</small></td>"


def _gain(gap: Gap | None) -> str:
    if gap is None:
        return "·"
    low, high = gap.ends
    return f"{signed(gap.value)}<small>{signed(low)} to {signed(high)}</small>"


# ---------------------------------------------------------------------------------------------- item by item


def _contrasts(outcome: Outcome) -> str:
    note = (
        f"Under seed {outcome.seeds[0]}. Of the items that differ, the seed draws up to three of each side. Where an "
        "answer is right by a share, a half and more counts as right."
    )
    return f'<p class="note">{note}</p>' + "".join(_contrast(each, outcome.baseline) for each in outcome.contrasts)


def _contrast(contrast: Contrast, baseline: str) -> str:
    cards = "".join(map(_shown, contrast.shown)) or '<p class="note">No item was answered differently.</p>'
    return (
        f'<div class="contrast"><h3>{escape(contrast.name)} and {escape(baseline)}</h3>'
        f'<p class="note below">Of {contrast.items:,} items {escape(contrast.name)} alone had {contrast.won:,} right, '
        f'{escape(baseline)} alone {contrast.lost:,}.</p><div class="cards">{cards}</div></div>\n'
    )


def _shown(shown: Shown) -> str:
    seen = "" if shown.picture is None else picture(shown.picture, f"Picture of the question: {shown.question}")
    said = "".join(
        f'<dt>{escape(name)}</dt><dd class="{"right" if name == shown.right else "wrong"}">'
        f'<span role="img" aria-label="{"right" if name == shown.right else "wrong"}">'
        f"{'✓' if name == shown.right else '✗'}</span> {escape(reply)}</dd>"
        for name, reply in shown.said.items()
    )
    return (
        f'<article class="card">{seen}'
        f'<div><p class="kind">{escape(shown.label)}</p><h4>{escape(shown.question)}</h4>'
        f'<dl class="verdicts"><dt>truth</dt><dd>{escape(shown.answer)}</dd>{said}</dl></div></article>\n'
    )
