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
from pathlib import Path
from typing import Any, TypeAlias

import harness
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.measure import Measured
from isthmus.evaluation.seeds import Gap, Level, Outcomes, gap, holm, level
from isthmus.files import write_text

Rows: TypeAlias = dict[str, Outcomes]
"""One cell's results by the label of their row."""
Work: TypeAlias = tuple[Path, Callable[[], None]]
"""Where a cell leaves its figures, and what makes them."""
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
    return {
        label: Outcomes(**{name: _tuple(each) for name, each in row.items()}) for label, row in told["rows"].items()
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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


def is_clear(each: Gap) -> bool:
    """Whether zero lies outside of the interval."""
    low, high = each.ends
    return low > 0 or high < 0


def tables(cases: Sequence[Mapping[str, Any]]) -> str:
    """Levels, and below them the gaps to the first cell; in bold those whose interval leaves zero out."""
    if not cases:
        return "Nothing is finished yet."
    header = ["setting", *cases[0]["levels"]]
    told = [harness.table(header, [[case["cell"], *map(_interval, case["levels"].values())] for case in cases])]
    apart = [
        [case["cell"], *(f"**{_interval(each)}**" if is_clear(each) else _interval(each) for each in gaps.values())]
        for case in cases
        if (gaps := case["gaps"])
    ]
    return "\n\n".join([*told, harness.table([f"minus {cases[0]['cell']}", *header[1:]], apart)] if apart else told)


def _interval(each: Level | Gap) -> str:
    low, high = each.ends
    return f"{each.value:.3f} [{low:.3f}, {high:.3f}]"


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
