"""The parts of a comparison's page that say how it was done: losses, learning rates, settings, runs."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.comparing import figures
from isthmus.comparing.outcome import Outcome, Rates
from isthmus.evaluation.escaping import escape
from isthmus.evaluation.html import pairs


def curves(outcome: Outcome) -> str:
    """Losses of every stage."""
    plots = "".join(
        f"<figure><figcaption><b>{escape(drawn.stage)}</b></figcaption>{figures.losses(drawn, outcome.names)}</figure>"
        for drawn in outcome.curves
        if drawn.train
    )
    note = (
        "Training loss, smoothed, the mean over seeds; dashed: validation loss. Losses of joints are comparable where "
        "their data and objectives are the same."
    )
    return f'<p class="note">{note}</p>{figures.legend(outcome.names)}<div class="plots">{plots}</div>\n'


def rates(outcome: Outcome) -> str:
    """What was tried for the learning rates."""
    factors = list(next(iter(outcome.rates.values())).losses)
    heads = "".join(f'<th scope="col">× {factor:.3g}</th>' for factor in factors)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_loss(tried.losses.get(factor), factor == tried.chosen) for factor in factors)
        + f"<td>{tried.steps:,}</td><td>× {tried.chosen:.3g}{_open(tried)}</td></tr>\n"
        for name, tried in outcome.rates.items()
    )
    return f"""<div class="wide" tabindex="0"><table class="costs">
<caption>Validation loss of trials that last {outcome.share:.0%} of the budget each, under a seed of their own; all the
learning rates of a recipe are multiplied. Of those within a tenth of the lowest loss the one nearest to the recipe's
own is chosen, for each joint from the same factors at the same cost: {len(factors) * outcome.share:.0%} of a run on
top, once per joint.</caption>
<thead><tr><th scope="col">joint</th>{heads}<th scope="col">steps of the last stage</th><th scope="col">chosen</th></tr>
</thead><tbody>{body}</tbody></table></div>
"""


def _open(tried: Rates) -> str:
    """Why another rate may be as good."""
    why = "all alike" if tried.alike else "at the edge" if tried.at_edge else ""
    return f"<small>{why}</small>" if why else ""


def _loss(loss: float | None, chosen: bool) -> str:
    if loss is None:
        return "<td>diverged</td>"
    return f"<td>{'<b>' if chosen else ''}{loss:.4f}{'</b>' if chosen else ''}</td>"


def settings(outcome: Outcome) -> str:
    """What is equal for all joints, and what is not."""
    body = "".join(
        f'<tr><th scope="row">{escape(setting.name)}</th>'
        + (
            f'<td class="match">{escape(setting.within or "the same")}</td>'
            if setting.matches
            else '<td class="differ">differs</td>'
        )
        + f"<td>{_values(setting.values)}</td></tr>\n"
        for setting in outcome.settings
    )
    return f"""<div class="wide" tabindex="0"><table class="settings">
<caption>What a comparison of joints keeps equal. Under one seed all joints also draw the same items, and the same data
order where their mixes agree. Learning rates are each joint’s own.</caption>
<thead><tr><th scope="col">setting</th><th scope="col">match</th><th scope="col">value</th></tr></thead>
<tbody>{body}</tbody></table></div>
"""


def _values(values: Mapping[str, str]) -> str:
    """Who has which, or what all have."""
    told: dict[str, list[str]] = {}
    for name, value in values.items():
        told.setdefault(value, []).append(name)
    if len(told) == 1:
        return escape(*told)
    lines = "".join(f"<dt>{escape(', '.join(names))}</dt><dd>{escape(value)}</dd>" for value, names in told.items())
    return f"<dl>{lines}</dl>"


def method(outcome: Outcome) -> str:
    """How it was measured, and the runs that every number is of."""
    body = "".join(
        f'<tr><th scope="row">{escape(run.name)}</th><td>{run.seed}</td><td><code>{escape(run.fingerprint)}</code></td>'
        f"<td><code>{escape(run.data_hash)}</code></td><td>{escape(run.revision)}</td>"
        f"<td>{escape(_steps(run.steps))}</td><td>{'·' if run.validation is None else f'{run.validation:.4f}'}</td>"
        f"<td><code>{escape(run.folder)}</code></td></tr>\n"
        for run in outcome.runs
    )
    return f"""{pairs({**outcome.method, "budget": f"{outcome.budget} of training for each run"})}
<details><summary>Every run</summary><div class="wide" tabindex="0"><table class="runs">
<caption>Every number above is of these runs: the recipe’s fingerprint, a hash over all items, the seed and the code’s
revision say which.</caption>
<thead><tr><th scope="col">joint</th><th scope="col">seed</th><th scope="col">recipe</th><th scope="col">data</th>
<th scope="col">revision</th><th scope="col">steps</th><th scope="col">validation loss</th>
<th scope="col">folder</th></tr></thead><tbody>{body}</tbody></table></div></details>
"""


def _steps(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{stage} {number:,}" for stage, number in steps.items())
