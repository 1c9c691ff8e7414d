"""What the demo reaches in five minutes of training: seeds 0, 1 and 2, each task beside its controls.

    python benchmarks/demo_quality.py [--minutes 5] [--seeds 0 1 2] [--collect] [--json FILE] [KEY=VALUE ...]

Runs the demo recipe once per seed, one after another, into `runs/quality/seed-N`; an interrupted run goes on, and a
finished one is not done again. `--collect` only reads the reports. Means over seeds have a t-interval at 95 %.
Training data and initial weights follow from the seed, test items do not: reports of other items are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

COLUMNS = ("before", "after", "blind", "shuffled", "cosine")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The 97.5 % quantile of Student's t with n - 1 degrees of freedom."""


@dataclass(frozen=True)
class Target:
    """A result that the project promises: `label` after training above a bound, or above another column."""

    label: str
    words: str
    bound: float | None = None
    column: str = ""
    strictly: bool = False

    def met(self, means: Mapping[str, float]) -> bool:
        bound = means[self.column] if self.bound is None else self.bound
        return means["after"] > bound if self.strictly else means["after"] >= bound


TARGETS = (
    Target("easy-VQA, official test", "easy-VQA in total ≥ .90", 0.90),
    Target("easy-VQA without yes/no", "easy-VQA without yes/no ≥ .90", 0.90),
    Target("Presence", "presence > .85", 0.85, strictly=True),
    Target("Naming unseen concepts", "naming of unseen concepts > cosine of the joint", column="cosine", strictly=True),
)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its t-interval; the interval is absent for one seed."""

    value: float
    half_width: float | None
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        half = None
        if len(values) > 1:
            half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), half, tuple(values))

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.half_width is None else f"{self.value:.3f} ± {self.half_width:.3f}"


def train(seed: int, minutes: float, folder: Path, overrides: Sequence[str]) -> None:
    """One run of the demo recipe, in this process."""
    import torch
    from rich.console import Console

    from isthmus.experiment import experiment
    from isthmus.recipes.demo import demo
    from isthmus.recipes.parts import TASKS

    recipe = demo(minutes).but(seed=seed, eval=TASKS).override(overrides)  # baselines on all items, too
    if experiment(recipe, folder, torch.device("cpu"), Console()) is None:
        raise SystemExit(130)


def run_all(options: argparse.Namespace) -> None:
    """Every seed that has no report yet, each in a process of its own."""
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        if not (folder / "report.json").is_file():
            command = [sys.executable, __file__, *options.overrides, "--one", str(seed)]
            command += ["--minutes", str(options.minutes), "--out", str(options.out)]
            subprocess.run(command, check=True)


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Rows over all reports: per task its columns as means over seeds, and the targets.

    Raises:
        SystemExit: a report is missing, or the reports are not of the same test items or seeds.
    """
    lacking = [str(folder) for folder in folders if not (folder / "report.json").is_file()]
    if lacking:
        raise SystemExit(f"no report in {', '.join(lacking)}; run without --collect")
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    if len({report["data_hash"] for report in reports}) > 1:
        raise SystemExit("the reports are of different test items and cannot be averaged; delete the older ones")
    if len({report["seed"] for report in reports}) < len(reports):
        raise SystemExit("two reports have the same seed, so they are no repeats; delete one")
    rows = [row for place in range(len(reports[0]["rows"])) for row in _rows([each["rows"][place] for each in reports])]
    return {
        "seeds": [report["seed"] for report in reports],
        "fingerprints": [report["fingerprint"] for report in reports],
        "data_hash": reports[0]["data_hash"],
        "method": reports[0]["method"],
        "seconds": [report["seconds"] for report in reports],
        "steps": [{curve["stage"]: len(curve["train"]) for curve in report["curves"]} for report in reports],
        "rows": rows,
        "targets": [_judge(target, rows) for target in TARGETS],
    }


def _rows(same: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One task over seeds, and each figure that it reports besides."""
    first = same[0]
    if len({row["label"] for row in same}) > 1:
        raise SystemExit(f"the reports hold different tasks: {[row['label'] for row in same]}")
    kept = {key: first[key] for key in ("unit", "n", "chance")}
    figures = {first["label"]: [row["cells"] for row in same]}
    figures |= {
        f"{first['label']}, {name}": [row["besides"].get(name, {}) for row in same] for name in first["besides"]
    }
    return [kept | {"label": label, **_over_seeds(cells)} for label, cells in figures.items()]


def _over_seeds(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of one figure, and how far `after` is above the joint alone, seed by seed."""
    means = _means(same)
    if "cosine" not in means:
        return {"means": means, "above_cosine": None}
    pairs = zip(means["after"].seeds, means["cosine"].seeds)
    return {"means": means, "above_cosine": Mean.of([after - cosine for after, cosine in pairs])}


def _means(same: Sequence[Mapping[str, Any]]) -> dict[str, Mean]:
    """Per column that every seed has, the mean of its values."""
    columns = [column for column in COLUMNS if all(cells.get(column) for cells in same)]
    return {column: Mean.of([cells[column]["value"] for cells in same]) for column in columns}


def _judge(target: Target, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a target is met by the mean, and by how many of the seeds."""
    found = [row["means"] for row in rows if row["label"] == target.label]
    if not found:
        return {"target": target.words, "met": False, "seeds": "not measured"}
    means = found[0]
    seeds = len(means["after"].seeds)
    each = [target.met({name: mean.seeds[place] for name, mean in means.items()}) for place in range(seeds)]
    overall = target.met({name: mean.value for name, mean in means.items()})
    return {"target": target.words, "met": overall, "seeds": f"{sum(each)} of {seeds} seeds"}


def table(found: Mapping[str, Any]) -> str:
    """The results and the targets in markdown."""
    rows = [
        [
            row["label"],
            f"{row['n']:,}",
            *(str(row["means"].get(column, "")) for column in COLUMNS),
            "" if row["above_cosine"] is None else str(row["above_cosine"]),
            "" if row["chance"] is None else f"{row['chance']:.3f}",
        ]
        for row in found["rows"]
    ]
    judged = [[each["target"], "met" if each["met"] else "missed", each["seeds"]] for each in found["targets"]]
    return "\n\n".join(
        [
            harness.table(["task", "items", *COLUMNS, "after − cosine", "chance"], rows),
            harness.table(["target, by the mean", "", "each seed alone"], judged),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("overrides", nargs="*", help="dotted overrides of the recipe")
    made.add_argument("--minutes", type=float, default=5.0, help="of training per seed (5)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2")
    made.add_argument("--out", type=Path, default=Path("runs/quality"), help="parent folder of the runs")
    made.add_argument("--collect", action="store_true", help="only read the reports that are there")
    made.add_argument("--json", type=Path, help="where the numbers go instead of results/demo_quality.json")
    made.set_defaults(tiny=False)
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.one is not None:
        train(options.one, options.minutes, options.out / f"seed-{options.one}", options.overrides)
        return 0
    where = harness.machine()
    if not options.collect:
        run_all(options)
    found = collect([options.out / f"seed-{seed}" for seed in options.seeds])
    print(harness.in_words(where))
    print(f"mean over seeds {found['seeds']} ± half of the t-interval at 95 %; {options.minutes:g} minutes of training")
    print(f"{found['method'].get('arithmetic', '')}\n")
    print(table(found))
    print(harness.save("demo_quality", {"machine": where, "minutes": options.minutes, **found}, options))
    return int(not all(each["met"] for each in found["targets"]))


if __name__ == "__main__":
    sys.exit(main())
