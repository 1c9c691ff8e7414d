"""What LION's parts do: the mixture of adapters, the aggregator, and tags that may be wrong, at equal steps.

    python benchmarks/lion_effects.py [--experiments conflict depth tags] [--cells NAME ...] [--steps 400]
        [--pictures 2000] [--items 200] [--seeds 0 1 2] [--collect] [--write]

Three experiments over the embedded parts: image-level and region-level tasks learnt together with one adapter, with one
per kind, with a router, and stage by stage; places learnt from several depths or from the last one; and tags left out,
in a sentence or behind a learned word, of which a share is wrong in training as in testing. Every cell is trained once
per seed into `runs/lion/`. An interrupted run goes on, and a finished one is not done again. `--collect` only reads
what is finished, `--write` turns it into `docs/results/lion.md`. Means over seeds have a t-interval at 95 %, and so
have the differences from each experiment's first cell, which are formed seed by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from demo_quality import Mean

PAGE = Path(__file__).resolve().parent.parent / "docs/results/lion.md"
LOWER = ("Captions, NLL",)
"""Rows in which less is better."""
SHARES = {"image": 0.3, "region": 0.3, "all": 0.4}
"""Of the steps, where stages follow each other."""


@dataclass(frozen=True)
class Cell:
    """One setting: arguments of the recipe `lion`, and which of its stages are trained."""

    options: dict[str, Any] = field(default_factory=dict)
    legs: tuple[str, ...] = ("all",)

    def steps(self, total: int) -> dict[str, int]:
        """Steps of each stage, `total` together."""
        if len(self.legs) == 1:
            return {self.legs[0]: total}
        counts = {leg: round(SHARES[leg] * total) for leg in self.legs}
        counts[self.legs[-1]] += total - sum(counts.values())
        return counts


@dataclass(frozen=True)
class Experiment:
    """Cells that are compared with the first of them, on the same tasks."""

    asks: str
    tasks: tuple[str, ...]
    cells: dict[str, Cell]


def _tagged(tags: str, percent: int) -> Cell:
    return Cell({"tags": tags, "wrong": percent / 100}, ("image",))


EXPERIMENTS = {
    "conflict": Experiment(
        "Do image-level and region-level tasks get in each other's way, and do adapters per kind cure it?",
        ("presence", "counting", "relation", "rec", "reg"),
        {
            "one adapter": Cell({"tags": "none", "mixture": "none"}),
            "one per kind": Cell({"tags": "none", "mixture": "hard"}),
            "routed": Cell({"tags": "none"}),
            "routed, stage by stage": Cell({"tags": "none"}, ("image", "region", "all")),
        },
    ),
    "depth": Experiment(
        "Does the aggregator find places that the encoder's last layer has lost?",
        ("rec", "reg"),
        {
            "last layer": Cell({"tags": "none", "aggregator": False}, ("region",)),
            "aggregator": Cell({"tags": "none"}, ("region",)),
        },
    ),
    "tags": Experiment(
        "Do tags help, what do wrong ones cost, and does the learned word soften that?",
        ("presence", "naming", "caption"),
        {"none": _tagged("none", 0)}
        | {
            f"{tags}, {percent} % wrong": _tagged(tags, percent)
            for percent in (50, 0, 25, 75)
            for tags in ("hard", "soft")
        },
    ),
}
"""The cells in the order in which they are trained."""
NUMBERS = ("steps", "pictures", "items", "seeds")
"""Options that a figure depends on."""


def recipe_of(cell: Cell, seed: int, total: int, pictures: int) -> Any:
    """The recipe of a cell with `total` steps in all, over so many pictures of each source."""
    from isthmus.config import Budget
    from isthmus.recipes.lion import lion

    recipe, steps = lion(**cell.options), cell.steps(total)
    stages = [
        stage.but(
            data=[source.but(options={**source.options, "count": pictures}) for source in stage.data],
            budget=Budget(steps=steps[stage.name]),
            evaluate_every=None,
            save_every=None,
        )
        for stage in recipe.stages
        if stage.name in steps
    ]
    return recipe.but(seed=seed, stages=stages, eval=())


def tasks_of(experiment: Experiment, cell: Cell, items: int) -> list[Any]:
    """The experiment's tasks; their pictures have tags where the cell's have, as wrong as in training."""
    from isthmus.config import TaskConfig

    tags = cell.options["tags"] != "none"
    options = {"tags": {"by": "scene", "wrong": cell.options["wrong"]}} if tags else {}
    return [TaskConfig(name=name, limit=items, controls=(), options=options) for name in experiment.tasks]


def where(experiment: str, cell: str, seed: int, options: argparse.Namespace) -> Path:
    name = cell.replace(" %", "").replace(",", "").replace(" ", "-")
    return options.out / experiment / name / f"seed-{seed}"


def run(experiment: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one cell with one seed, in this process."""
    import torch
    from rich.console import Console

    from isthmus.evaluation.measure import build, measure
    from isthmus.evaluation.results import rows
    from isthmus.experiment import pictures
    from isthmus.training.run import Run

    trial = EXPERIMENTS[experiment]
    cell, folder = trial.cells[name], where(experiment, name, seed, options)
    recipe = recipe_of(cell, seed, options.steps, options.pictures)
    this = Run(recipe, folder, torch.device("cpu"), Console())
    newborn = this.newborn()
    look = this.look(newborn)
    model = this.train(newborn, look)
    if model is None:
        raise SystemExit(130)
    built = build(tasks_of(trial, cell, options.items), seed=0)
    this.fill(look, pictures(task for task, _ in built))
    measured = measure(model, built, 0, folder / "predictions", look=look, settings={"weights": recipe.fingerprint()})
    values = {row.label: row.cells["after"].value for task, runs in measured.values() for row in rows(task, runs, 0)}
    figures = {"fingerprint": recipe.fingerprint(), "dtype": str(this.dtype), "tasks": values}
    figures |= {name: getattr(options, name) for name in ("steps", "pictures", "items")}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- collecting


def collect(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Per experiment, the cells that all seeds have finished: means, and differences from the first cell.

    Raises:
        SystemExit: a cell was trained for another number of steps.
    """
    return {name: _collect(name, options) for name in options.experiments}


def _collect(experiment: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[str, list[Mapping[str, float]]] = {}
    for cell in EXPERIMENTS[experiment].cells:
        files = [where(experiment, cell, seed, options) / "figures.json" for seed in options.seeds]
        if all(file.is_file() for file in files):
            read = [json.loads(file.read_text()) for file in files]
            if any(one[name] != getattr(options, name) for one in read for name in ("steps", "pictures", "items")):
                raise SystemExit(f"{files[0].parent.parent} has other steps, pictures or items; give those, or --out")
            found[cell] = [one["tasks"] for one in read]
    base = found.get(next(iter(EXPERIMENTS[experiment].cells)))
    return [
        {
            "cell": cell,
            "means": {row: Mean.of([one[row] for one in seeds]) for row in seeds[0]},
            "differences": {
                row: Mean.of([ours[row] - theirs[row] for ours, theirs in zip(seeds, base)]) for row in seeds[0]
            }
            if base is not None and seeds is not base
            else {},
        }
        for cell, seeds in found.items()
    ]


def is_clear(difference: Mean) -> bool:
    """Whether zero lies outside of the interval."""
    return difference.half_width is not None and abs(difference.value) > difference.half_width


def tables(cases: Sequence[Mapping[str, Any]]) -> str:
    """Means, and below them the differences from the first cell; in bold those whose interval leaves zero out."""
    if not cases:
        return "Not finished."
    header = ["setting", *cases[0]["means"]]
    told = [harness.table(header, [[case["cell"], *map(str, case["means"].values())] for case in cases])]
    apart = [
        [case["cell"], *(f"**{each}**" if is_clear(each) else str(each) for each in case["differences"].values())]
        for case in cases
        if case["differences"]
    ]
    return "\n\n".join([*told, harness.table([f"minus {cases[0]['cell']}", *header[1:]], apart)] if apart else told)


def verdict(cases: Sequence[Mapping[str, Any]]) -> str:
    """In words, what can be told apart from the first cell, and what was not trained at all."""
    lines = []
    for case in (one for one in cases if one["differences"]):
        clear = {row: each for row, each in case["differences"].items() if is_clear(each)}
        better = [row for row, each in clear.items() if (each.value > 0) != (row in LOWER)]
        worse = [row for row in clear if row not in better]
        said = "; ".join(
            f"{word} on {', '.join(rows)}" for word, rows in (("better", better), ("worse", worse)) if rows
        )
        lines.append(f"- {case['cell']}: {said or 'cannot be told apart from the first row'}.")
    return "\n".join(lines)


def page(result: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page of the results."""
    sections = []
    for name, cases in found.items():
        trial, done = EXPERIMENTS[name], [case["cell"] for case in cases]
        lacking = [cell for cell in trial.cells if cell not in done]
        left = f"Not trained for all seeds yet: {', '.join(lacking)}." if lacking else ""
        parts = [f"## {name.capitalize()}", trial.asks, tables(cases) if cases else "", verdict(cases), left]
        sections.append("\n\n".join(part for part in parts if part))
    told = "\n\n".join(sections)
    return f"""# What LION's parts do

Written by `python benchmarks/lion_effects.py --write`; do not edit it by hand. The numbers are in
[`lion_effects.json`](../../benchmarks/results/lion_effects.json), what LION is in [its page](../systems/lion.md).

SmolLM2-135M, frozen, and EfficientNet-Lite0; {result["steps"]} steps of 6 samples in every cell, over
{result["pictures"]} pictures of every source; seeds {", ".join(map(str, result["seeds"]))}; {result["items"]} items per
task; ± is half of a t-interval at 95 % over seeds.
Captions are in nats per token, less is better; the others are accuracies. Differences are formed seed by seed, and are
in bold where their interval leaves zero out; of many differences, one in twenty would be bold if nothing differed.

{told}

{harness.in_words(result["machine"])}
"""


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="all of them")
    made.add_argument("--cells", nargs="+", help="only these, by name")
    made.add_argument("--steps", type=int, default=400, help="of every cell (400)")
    made.add_argument("--pictures", type=int, default=2000, help="of every source (2000)")
    made.add_argument("--items", type=int, default=200, help="per task (200)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2")
    made.add_argument("--out", type=Path, default=Path("runs/lion"), help="parent folder of the runs")
    made.add_argument("--collect", action="store_true", help="only read what is finished")
    made.add_argument("--write", action="store_true", help="write docs/results/lion.md")
    made.add_argument("--json", type=Path, help="where the numbers go instead of results/lion_effects.json")
    made.set_defaults(tiny=False)
    options = made.parse_args(arguments)
    result = {"machine": harness.machine(), **{name: getattr(options, name) for name in NUMBERS}}
    for experiment, name, seed in () if options.collect else _wanted(options):
        if not (where(experiment, name, seed, options) / "figures.json").is_file():
            run(experiment, name, seed, options)
            _report(result, options)
    return _report(result, options)


def _wanted(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Cell by cell, all seeds of one before the next, so that whatever is finished can be compared."""
    return [
        (experiment, name, seed)
        for experiment in options.experiments
        for name in EXPERIMENTS[experiment].cells
        if options.cells is None or name in options.cells
        for seed in options.seeds
    ]


def _report(result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Save and print what is finished; 1 where something is left to do."""
    found = collect(options)
    for name, cases in found.items():
        print(f"\n{name}: {EXPERIMENTS[name].asks}\n\n{tables(cases)}")
    print(harness.save("lion_effects", {**result, "experiments": found}, options))
    if options.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(result, found), encoding="utf-8")
    return int(any(len(cases) < len(EXPERIMENTS[name].cells) for name, cases in found.items()))


if __name__ == "__main__":
    sys.exit(main())
