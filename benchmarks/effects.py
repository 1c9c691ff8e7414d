"""What scripts that compare settings of one system share: cells that go on where they stopped, intervals, tables.

A cell is one setting under one seed. It leaves `figures.json`: every row of its tasks item by item, so that cells are
compared on the same items and under the same seed. Intervals are those of `isthmus compare`: of Student's t over seeds
and of a bootstrap over seeds and items, whichever reaches further.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import harness
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.measure import Measured
from isthmus.evaluation.seeds import Gap, Level, Outcomes, gap, holm, level
from isthmus.files import write_text

Rows: TypeAlias = dict[str, Outcomes]
"""One cell's results by the label of their row."""
Work: TypeAlias = tuple[Path, Callable[[], None]]
"""Where a cell leaves its figures, and what makes them."""
Figure = TypeVar("Figure", Outcomes, Level, Gap)
NATS = ", nats"
"""Ends the label of rows in which less is better."""
LEVEL = 0.05


# ---------------------------------------------------------------------------------------------- one cell


def outcomes(measured: Measured) -> Rows:
    """Every row that was measured, and for choices the nats that the right one cost, too: a finer measure."""
    found: Rows = {}
    for task, runs in measured.values():
        for cut in task.cuts:
            chosen = [each for each in runs["after"] if cut.takes(each.kind)]
            if not chosen:
                continue
            label = cut.label.removesuffix(", NLL")
            found[label + (NATS if task.unit != "accuracy" else "")] = Outcomes.of(chosen, task.unit)
            if all(each.choices and each.answer in each.choices for each in chosen):
                found[label + NATS] = _nats(chosen)
    return found


def _nats(predictions: Sequence[Prediction]) -> Outcomes:
    """Minus the log of the right choice's probability among the choices."""
    totals = tuple(_surprise(each.scores, each.choices.index(each.answer)) for each in predictions)
    ids, clusters = (tuple(getattr(each, name) for each in predictions) for name in ("id", "cluster"))
    return Outcomes(ids, totals, (1.0,) * len(totals), clusters)


def _surprise(scores: Sequence[float], right: int) -> float:
    top = max(scores)
    return top + math.log(sum(math.exp(score - top) for score in scores)) - scores[right]


def alone(value: float) -> Outcomes:
    """A figure of a whole run, which has no items."""
    return Outcomes(("all",), (value,), (1.0,), (None,))


def keep(file: Path, rows: Rows, asked: Mapping[str, Any], **more: Any) -> None:
    """Leave a cell's figures, and what they depend on; whole or not at all."""
    told = {"asked": dict(asked), **more, "rows": {label: asdict(each) for label, each in rows.items()}}
    write_text(file, json.dumps(told) + "\n")


def read(file: Path, asked: Mapping[str, Any]) -> Rows:
    """A finished cell.

    Raises:
        SystemExit: it was made with other numbers.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["asked"] != dict(asked):
        raise SystemExit(
            f"{file.parent} was made with {told['asked']}, not {dict(asked)}; give those, or another --out"
        )
    return _restored(Outcomes, told["rows"])


def _restored(kind: type[Figure], saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Figures by label from their JSON, which has lists where they have tuples."""
    tuples = {
        label: {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for label, row in saved.items()
    }
    return {label: kind(**row) for label, row in tuples.items()}


# ---------------------------------------------------------------------------------------------- many cells


def arguments(made: argparse.ArgumentParser, out: str) -> None:
    """The options that such a script has besides its own numbers."""
    made.add_argument("--quick", action="store_true", help="small numbers and few settings: for twenty minutes in all")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2")
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no cell that would end later than this")
    made.add_argument("--jobs", type=int, default=1, help="seeds that run at once, sharing the cores out (1)")
    made.add_argument("--out", type=Path, default=Path(out), help="parent folder of the runs")
    made.add_argument("--collect", action="store_true", help="only read what is finished")
    made.add_argument("--write", action="store_true", help="write the page in docs/results/")
    made.add_argument("--json", type=Path, help="where the numbers go instead of benchmarks/results/")
    made.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # one of several jobs: it reports nothing
    made.set_defaults(tiny=False)


def parse(made: argparse.ArgumentParser, told: Sequence[str] | None, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Options, where `--quick` changes what those are that were not given."""
    if made.parse_known_args(told)[0].quick:
        made.set_defaults(**quick)
    return made.parse_args(told)


def shared_out(script: str, told: Sequence[str], options: argparse.Namespace) -> None:
    """As many processes as there are jobs, each with its seeds and its share of the cores; nothing with one job."""
    jobs = min(options.jobs, len(options.seeds))
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    started = []
    for job in range(jobs):
        seeds = [str(seed) for seed in options.seeds[job::jobs]]
        command = [sys.executable, script, *told, "--part", "--jobs", "1", "--seeds", *seeds]
        started.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}))
    try:
        if any(process.wait() for process in started):
            raise SystemExit("a job failed, see above; what is finished is kept")
    finally:
        for process in started:
            process.terminate()


def work(cells: Iterable[Work], minutes: float, after: Callable[[], object]) -> None:
    """Make the cells that are not finished, one after another, as long as the time allows; `after` each, report."""
    began, longest = time.monotonic(), 0.0
    for file, make in cells:
        if file.is_file():
            continue
        cell = time.monotonic()
        if cell - began + longest > 60 * minutes:
            print(f"{minutes:g} minutes are over; the same command goes on from here")
            return
        make()
        longest = max(longest, time.monotonic() - cell)
        after()


def carry_out(
    script: str,
    arguments: Sequence[str] | None,
    options: argparse.Namespace,
    cells: Iterable[Work],
    report: Callable[[], int],
) -> int:
    """Do the cells, or share their seeds out, and report what is finished; what `report` returned."""
    if options.jobs > 1 and not options.collect:
        shared_out(script, sys.argv[1:] if arguments is None else arguments, options)
    elif not options.collect:
        work(cells, options.minutes, lambda: options.part or report())
    return 0 if options.part else report()


# ---------------------------------------------------------------------------------------------- comparing


def compare(found: Mapping[str, Sequence[Rows]], first: str, besides: Collection[str] = ()) -> list[dict[str, Any]]:
    """Per cell its levels, and its gaps to the first one, with p-values after Holm over all but those `besides`."""
    base = found.get(first)
    cases = [
        {"cell": cell, "levels": {label: level([[rows[label] for rows in seeds]]) for label in seeds[0]}, "gaps": {}}
        for cell, seeds in found.items()
    ]
    if base is None:
        return cases
    for case, seeds in zip(cases, found.values()):
        if seeds is not base:
            case["gaps"] = {
                label: gap([[rows[label] for rows in seeds]], [[rows[label] for rows in base]]) for label in seeds[0]
            }
    judged = [(case, label) for case in cases for label in case["gaps"] if label not in besides]
    for case in cases:
        case["adjusted"] = {}
    for (case, label), p in zip(judged, holm([case["gaps"][label].p for case, label in judged])):
        case["adjusted"][label] = p
    return cases


def restored(saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `compare` returned, from its JSON."""
    return [
        {**case, "levels": _restored(Level, case["levels"]), "gaps": _restored(Gap, case["gaps"])} for case in saved
    ]


def is_clear(each: Gap) -> bool:
    """Whether zero lies outside of the interval."""
    low, high = each.ends
    return low > 0 or high < 0


def tables(cases: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> str:
    """Levels, and below them the gaps to the first cell, in bold those whose interval leaves zero out; of all rows, or
    of those with these labels."""
    if not cases:
        return "Nothing is finished yet."
    labels = tuple(labels if labels is not None else cases[0]["levels"])
    levels = [[case["cell"], *(_interval(case["levels"][label]) for label in labels)] for case in cases]
    told = [harness.table(["setting", *labels], levels)]
    apart = {case["cell"]: case for case in cases if case["gaps"]}
    return "\n\n".join([*told, differences(f"minus {cases[0]['cell']}", apart, labels)] if apart else told)


def differences(title: str, cases: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> str:
    """The gaps of these cases by what their rows are called, in bold those whose interval leaves zero out."""
    gaps = {name: [case["gaps"][label] for label in labels] for name, case in cases.items()}
    apart = [
        [name, *(f"**{_interval(each)}**" if is_clear(each) else _interval(each) for each in some)]
        for name, some in gaps.items()
    ]
    return harness.table([title, *labels], apart)


def _interval(each: Level | Gap) -> str:
    low, high = each.ends
    return f"{each.value:.3f} [{low:.3f}, {high:.3f}]"


# ---------------------------------------------------------------------------------------------- the picture

LEFT, PANEL, ROW, TOP = 280, 160, 24, 64
"""Pixels: width of names, of a panel, height of a row, and what is above the first."""
STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}.group{font-weight:600}
line{stroke:#8c959f;stroke-width:1.6}circle{fill:#8c959f}.zero{stroke:#8c959f;stroke-width:1;stroke-dasharray:3 3}
.better line{stroke:#0969da}.better circle{fill:#0969da}.worse line{stroke:#bc4c00}.worse circle{fill:#bc4c00}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.better line{stroke:#58a6ff}
.better circle{fill:#58a6ff}.worse line{stroke:#f0883e}.worse circle{fill:#f0883e}}"""


def forest(groups: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> str:
    """Every gap with its interval as an SVG, a panel per label, right of the dashed line what is better than a group's
    first cell; blue and orange are those whose interval leaves zero out."""
    shown = {group: [case for case in cases if case["gaps"]] for group, cases in groups.items()}
    shown = {group: cases for group, cases in shown.items() if cases}
    labels = [label for label in labels if all(label in case["gaps"] for cases in shown.values() for case in cases)]
    reach = {
        label: max(abs(end) for cases in shown.values() for case in cases for end in case["gaps"][label].ends) or 1.0
        for label in labels
    }
    drawn, y = [], TOP
    for group, cases in shown.items():
        drawn.append(
            f'<text class="group" x="8" y="{y + 4}">{escape(group)}, minus {escape(groups[group][0]["cell"])}</text>'
        )
        y += ROW
        for case in cases:
            drawn.append(f'<text x="20" y="{y + 4}">{escape(case["cell"])}</text>')
            drawn += [_whisker(case["gaps"][label], label, reach[label], at, y) for at, label in enumerate(labels)]
            y += ROW
    for at, label in enumerate(labels):
        middle = _middle(at)
        drawn.append(f'<line class="zero" x1="{middle}" x2="{middle}" y1="{TOP - 12}" y2="{y - 10}"/>')
        name, _, rest = label.partition(", ")
        for row, words in enumerate((name, rest)):
            drawn.append(
                f'<text class="small" text-anchor="middle" x="{middle}" y="{20 + 14 * row}">{escape(words)}</text>'
            )
        for side in (-1, 1):
            sign = "−" if (side < 0) != label.endswith(NATS) else "+"
            place = middle + side * (PANEL / 2 - 24)
            drawn.append(
                f'<text class="small" text-anchor="middle" x="{place}" y="{y + 4}">{sign}{reach[label]:.2g}</text>'
            )
    width, height = LEFT + PANEL * len(labels), y + 14
    told = f"Differences with 95 % intervals in {len(labels)} measures; the tables on the page have the numbers"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{told}"><style>{STYLE}</style>{"".join(drawn)}</svg>\n'
    )


def _middle(panel: int) -> float:
    return LEFT + PANEL * (panel + 0.5)


def _whisker(each: Gap, label: str, reach: float, panel: int, y: float) -> str:
    """A gap as a point on a line, with what is better to the right."""
    sign = -1 if label.endswith(NATS) else 1
    scale = sign * (PANEL / 2 - 8) / reach
    x, low, high = (_middle(panel) + scale * value for value in (each.value, *each.ends))
    kind = ("better" if sign * each.value > 0 else "worse") if is_clear(each) else "open"
    return (
        f'<g class="{kind}"><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{x:.1f}" cy="{y}" r="3.5"/></g>'
    )


def verdict(cases: Sequence[Mapping[str, Any]], besides: Collection[str] = ()) -> str:
    """In words, what can be told apart from the first cell, and what of that stays so after Holm's correction."""
    lines = []
    for case in (one for one in cases if one["gaps"]):
        clear = {name: each for name, each in case["gaps"].items() if is_clear(each) and name not in besides}
        sides = {"better": [], "worse": []}
        for name, each in clear.items():
            sides["worse" if (each.value > 0) == name.endswith(NATS) else "better"].append(
                name + (" (also after Holm)" if case["adjusted"][name] <= LEVEL else "")
            )
        said = "; ".join(f"{word} on {'; '.join(names)}" for word, names in sides.items() if names)
        lines.append(f"- {case['cell']}: {said or 'cannot be told apart from the first row'}.")
    return "\n".join(lines)
