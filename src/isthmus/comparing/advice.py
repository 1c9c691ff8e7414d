"""What a comparison says in plain words, and what it does not say because the data do not decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from isthmus.comparing.budget import Amount
from isthmus.comparing.outcome import Cell, Cost, Line, Outcome, Rates, sees
from isthmus.evaluation.seeds import Level
from isthmus.evaluation.statistics import short

NAMED = 4
"""Settings that differ and are named in the recommendation; the page has them all."""
FEW = 20
"""Steps of a trial's last stage below which its loss says little of its rate: with ten, one rate of one joint ended at
.52 and at 1.11 under two orders of the same data."""
APART = 1.5
"""A run has come apart where its validation loss is so many times that of the much shorter trial of its rate."""
ALIKE = 1.02
"""Prices that differ by less are the same."""


def advice(outcome: Outcome) -> tuple[str, ...]:
    """The recommendation, a sentence or two each, the most important first."""
    said = [_mean(outcome), *_cheapest(outcome), *_tasks(outcome), *_unseen(outcome), *_rates(outcome)]
    return (
        *said,
        *_unmet(outcome),
        *_mismatch(outcome),
        *(f"{name} is left out: {why}." for name, why in outcome.left_out.items()),
    )


def signed(value: float) -> str:
    return ("" if value < 0 else "+") + short(value)


def reach(level: Level) -> str:
    """A level with its interval."""
    return f"{short(level.value)} ({short(level.ends[0])} to {short(level.ends[1])})"


def _mean(outcome: Outcome) -> str:
    """Who is better than the baseline over all tasks."""
    line, base = outcome.mean, outcome.baseline
    if len(outcome.names) < 2:
        return "There is one joint, so that there is nothing to compare it with."
    if len(outcome.seeds) < 2:
        best = _best(line, outcome.names)
        most = "highest" if line.higher else "lowest"
        return (
            f"The data do not decide: every joint was trained once, and another seed makes another model. {best} has "
            f"the {most} {line.label}, {short(line.cells[best].level.value)}, which may be luck. Train with "
            "--seeds 3 or more; the same command with more seeds goes on from here."
        )
    better = [name for name in outcome.names if line.cells[name].verdict == "better"]
    worse = [name for name in outcome.names if line.cells[name].verdict == "worse"]
    if not better and not worse:
        return f"The data do not decide between {base} and the others ({line.label}): {_undecided(outcome, line)}"
    said = []
    if better:
        best = _best(line, better)
        said.append(
            f"Take {best}: its {line.label} is {reach(line.cells[best].level)}, {_by(line.cells[best])} than {base}."
        )
        if others := [name for name in better if name != best]:
            said.append(
                f"{_list(others)} {'is' if len(others) == 1 else 'are'} better than {base}, too; these were not "
                "compared with each other."
            )
    else:
        said.append(f"Keep {base}: no joint is better over all tasks.")
    if worse:
        said.append(f"{_list(worse)} {'is' if len(worse) == 1 else 'are'} worse than {base}.")
    if open_ := [name for name in outcome.names if name not in (*better, *worse, base)]:
        said.append(f"Between {base} and {_list(open_)} the data do not decide.")
    return " ".join(said)


def _undecided(outcome: Outcome, line: Line) -> str:
    """Why there is no verdict."""
    if unscored := max(cell.unscored for cell in line.cells.values()):
        return f"up to {unscored} answers of a joint were not scored, which could decide it either way."
    return f"over {len(outcome.seeds)} seeds no difference is larger than chance explains. {_widest(line)}"


def _best(line: Line, names: Sequence[str]) -> str:
    sign = 1 if line.higher else -1
    return max(names, key=lambda name: sign * line.cells[name].level.value)


def _by(cell: Cell) -> str:
    assert cell.gap is not None  # it has a verdict
    low, high = cell.gap.ends
    return f"{signed(cell.gap.value)} ({signed(low)} to {signed(high)}) {cell.verdict}"


def _widest(line: Line) -> str:
    """How small a difference could have been seen."""
    ends = [cell.gap.ends for cell in line.cells.values() if cell.gap is not None]
    widest = max((high - low) / 2 for low, high in ends)
    reach = f"±\N{NO-BREAK SPACE}{short(widest)}"
    return f"The intervals of the differences reach {reach} at the widest; more seeds and items narrow them."


def _cheapest(outcome: Outcome) -> list[str]:
    """Among those that the data cannot tell from the best, what they can be told apart by: the price."""
    line = outcome.mean
    leader = next((name for name in outcome.names if line.cells[name].verdict == "better"), outcome.baseline)
    if leader != outcome.baseline or len(outcome.seeds) < 2:
        return []
    level_with = [name for name in outcome.names if line.cells[name].verdict in (None, "not decided")]
    if len(level_with) < 2:
        return []
    said = [
        *_least(outcome, level_with, "compute", "least for a picture and its question", "GFLOP", _prefill),
        *_least(outcome, level_with, "keep", "least of a picture while answering", "MiB", _kept),
    ]
    return [f"Where quality does not decide, cost may: of {_list(level_with)}, {', and '.join(said)}."] if said else []


def _least(
    outcome: Outcome, names: Sequence[str], verb: str, what: str, unit: str, price: Callable[[Cost], float]
) -> Iterator[str]:
    """Who is cheapest, where they differ by more than a trifle."""
    prices = {name: price(outcome.costs[name]) for name in names}
    least = min(prices.values())
    cheap = [name for name in names if prices[name] <= ALIKE * least]
    if len(cheap) < len(names):
        yield f"{_list(cheap)} {verb}{'s' if len(cheap) == 1 else ''} {what} ({least:,.2f} {unit})"


def _prefill(cost: Cost) -> float:
    return cost.prefill / 1e9


def _kept(cost: Cost) -> float:
    return cost.kept / 2**20


def _tasks(outcome: Outcome) -> list[str]:
    """Verdicts on single tasks."""
    found = []
    for name in outcome.names:
        for word in ("better", "worse"):
            labels = [line.label for line in outcome.lines if line.cells[name].verdict == word]
            if labels:
                found.append(f"{name} is {word} than {outcome.baseline} in {_quoted(labels)}.")
    return [" ".join(["Task by task:", *found])] if found else []


def _unseen(outcome: Outcome) -> list[str]:
    """Tasks in which no joint is clearly better with its picture than with a blank one."""
    if len(outcome.seeds) < 2:
        return []
    blind = [
        line.label for line in outcome.lines if line.higher and not any(sees(cell.seen) for cell in line.cells.values())
    ]
    if not blind:
        return []
    return [
        f"In {_quoted(blind)} no joint is clearly better with the picture than with a blank one: differences there say "
        "nothing about seeing."
    ]


def _rates(outcome: Outcome) -> Iterator[str]:
    """What the trials of learning rates leave open."""
    if alike := [name for name, rates in outcome.rates.items() if rates.alike]:
        yield (
            f"All learning rates that were tried for {_list(alike)} ended with the same loss, so that none was chosen. "
            "Lengthen the trials with --share or --budget."
        )
    short = {name: rates.steps for name, rates in outcome.rates.items() if rates.steps < FEW and not rates.alike}
    if short:
        yield (
            f"Trials of the learning rates of {_list([*short])} had {max(short.values())} steps or fewer in their last "
            "stage, which hardly tells rates apart. Lengthen them with --share or --budget."
        )
    apart = {name: _apart(outcome, name) for name in outcome.rates}
    for name, (count, ended) in apart.items():
        if count:
            yield (
                f"{count} of {ended} runs of {name} came apart, ending far above the trial of the learning rate, which "
                "is too high for a whole run. Compare again with lower factors in --grid."
            )
    edge = {name: rates for name, rates in outcome.rates.items() if rates.at_edge and not apart[name][0]}
    if told := [*_beyond(edge, max, "larger"), *_beyond(edge, min, "smaller")]:
        yield f"The best learning rates lie at the edge of what was tried. {' '.join(told)} Widen --grid."


def _beyond(edge: Mapping[str, Rates], outermost: Callable[[Iterable[float]], float], word: str) -> Iterator[str]:
    """For whom one end of the factors was the best."""
    for factor in sorted({outermost(rates.losses) for rates in edge.values()}):
        if names := [name for name, rates in edge.items() if rates.chosen == factor == outermost(rates.losses)]:
            yield f"None {word} than {factor:g} was tried for {_list(names)}."


def _apart(outcome: Outcome, name: str) -> tuple[int, int]:
    """How many of a joint's runs came apart, of how many that tell a validation loss."""
    trial = outcome.rates[name].losses[outcome.rates[name].chosen]
    ended = [run.validation for run in outcome.runs if run.name == name and run.validation is not None]
    return sum(trial is not None and loss > APART * trial for loss in ended), len(ended)


def _unmet(outcome: Outcome) -> list[str]:
    """Which runs computed more or less than the budget, where it is in operations."""
    if not outcome.unmet:
        return []
    each = [f"of {name} took {Amount(value, 'flops')}" for name, value in outcome.unmet.items()]
    return [
        f"The budget of {outcome.budget} is not met: runs {_list(each)}, because a stage has whole steps. "
        "A larger budget comes nearer."
    ]


def _mismatch(outcome: Outcome) -> list[str]:
    other = [setting.name for setting in outcome.settings if not setting.matches]
    if not other:
        return []
    named = other if len(other) <= NAMED else [*other[:NAMED], f"{len(other) - NAMED} more"]
    return [
        f"Settings differ in {_list(named)}: the differences are those of whole recipes, not of their joints alone."
    ]


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _quoted(labels: Sequence[str]) -> str:
    """Labels of tasks, which have commas of their own."""
    return _list([f"“{label}”" for label in labels])
