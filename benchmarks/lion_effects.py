"""What LION's parts do: the mixture of adapters, the aggregator, and tags that may be wrong, at equal steps.

    python benchmarks/lion_effects.py [--quick] [--experiments conflict depth tags] [--cells NAME ...] [--steps 400]
        [--warm 200] [--pictures 2000] [--items 200] [--seeds 0 1 2] [--minutes M] [--jobs 2] [--collect] [--write]

Three experiments over the embedded parts: image-level and region-level tasks learnt together with one adapter, with one
per kind, with a router, and stage by stage; places learnt from several depths or from the last one; and tags left out,
in a sentence or behind a learned word, of which a share is wrong in training as in testing. Both branches first learn
to speak in words for some steps without the LLM, once per seed and encoder depths, and every cell starts there. Cells
are trained once per seed into `runs/lion/`. An interrupted run goes on, a finished one is not done again. `--collect`
only reads what is finished, `--write` turns it into `docs/results/lion.md`, where experiments that were not asked for
stay as they were measured. `--quick` is for twenty minutes on two
cores: few steps, pictures and cells. How cells are compared is said in `effects`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import effects
import harness

PAGE = Path(__file__).resolve().parent.parent / "docs/results/lion.md"
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
    pairs: tuple[tuple[str, str], ...] = ()
    """Cells that differ in one thing, of which the second is compared with the first as well."""


WRONG = (0, 25, 50, 75)
"""Of a hundred tags, how many are wrong."""


def _tagged(tags: str, percent: int) -> Cell:
    return Cell({"tags": tags, "wrong": percent / 100}, ("image",))


EXPERIMENTS = {
    "conflict": Experiment(
        "Do image-level and region-level tasks get in each other's way, and do adapters per kind cure it?",
        ("presence", "caption", "rec-nll", "reg"),
        {
            "one adapter": Cell({"tags": "none", "mixture": "none"}),
            "one per kind": Cell({"tags": "none", "mixture": "hard"}),
            "routed": Cell({"tags": "none"}),
            "routed, stage by stage": Cell({"tags": "none"}, ("image", "region", "all")),
        },
    ),
    "depth": Experiment(
        "Does the aggregator find places that the encoder's last layer has lost?",
        ("rec-nll", "reg"),
        {
            "last layer": Cell({"tags": "none", "aggregator": False}, ("region",)),
            "aggregator": Cell({"tags": "none"}, ("region",)),
        },
    ),
    "tags": Experiment(
        "Do tags help, what do wrong ones cost, and does the learned word soften that?",
        ("presence", "naming", "caption"),
        {"none": _tagged("none", 0)}
        | {f"{tags}, {percent} % wrong": _tagged(tags, percent) for percent in WRONG for tags in ("hard", "soft")},
        tuple((f"hard, {percent} % wrong", f"soft, {percent} % wrong") for percent in WRONG),
    ),
}
"""The cells in the order in which they are trained."""
NUMBERS = ("steps", "warm", "pictures", "items")
"""Options that a figure depends on."""
QUICK: dict[str, Any] = {
    "steps": 40,
    "warm": 150,
    "pictures": 400,
    "experiments": ["tags", "conflict"],
    "seeds": [0, 1, 2, 3],
    "cells": [
        "one adapter",
        "routed",
        "routed, stage by stage",
        "none",
        "hard, 0 % wrong",
        "hard, 50 % wrong",
        "soft, 50 % wrong",
    ],
    "jobs": 2,
    "out": Path("runs/lion-quick"),
}
"""What `--quick` changes."""


def warm_of(cell: Cell, seed: int, steps: int, pictures: int) -> Any:
    """The recipe of the stage that all cells of a seed share which read the encoder at the same depths."""
    from isthmus.config import Budget
    from isthmus.recipes import parts
    from isthmus.recipes.lion import lion

    recipe = lion(tags="none", mixture="none", aggregator=cell.options.get("aggregator", True))
    stage = parts.warm(1.0)
    scenes = [source.but(options={**source.options, "count": pictures}) for source in stage.data[:2]]
    stage = stage.but(data=scenes, budget=Budget(steps=steps), evaluate_every=None, save_every=None)
    return recipe.but(seed=seed, stages=(stage,), eval=())


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
    return options.out / experiment / name / f"seed-{seed}" / "figures.json"


def asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in NUMBERS}


def run(experiment: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one cell with one seed, in this process."""
    import torch
    from rich.console import Console

    from isthmus.evaluation.measure import build, measure
    from isthmus.experiment import pictures
    from isthmus.training.run import Run

    trial = EXPERIMENTS[experiment]
    cell, folder = trial.cells[name], where(experiment, name, seed, options).parent
    recipe = recipe_of(cell, seed, options.steps, options.pictures)
    this = Run(recipe, folder, torch.device("cpu"), Console())
    newborn = this.newborn()
    look = this.look(newborn)
    newborn.connectors.load_state_dict(warmed(cell, seed, options, look).connectors.state_dict())
    model = this.train(newborn, look)
    if model is None:
        raise SystemExit(130)
    built = build(tasks_of(trial, cell, options.items), seed=0)
    this.fill(look, pictures(task for task, _ in built))
    measured = measure(model, built, 0, folder / "predictions", look=look, settings={"weights": recipe.fingerprint()})
    more = {"fingerprint": recipe.fingerprint(), "dtype": str(this.dtype)}
    effects.keep(folder / "figures.json", effects.outcomes(measured), asked(options), **more)


def warmed(cell: Cell, seed: int, options: argparse.Namespace, look: Any) -> Any:
    """The model that all cells of a seed take their connectors from, trained by the first that asks."""
    import torch
    from rich.console import Console

    from isthmus.training.run import Run

    depths = "aggregator" if cell.options.get("aggregator", True) else "last-layer"
    folder = options.out / "warm" / depths / f"seed-{seed}"
    this = Run(warm_of(cell, seed, options.warm, options.pictures), folder, torch.device("cpu"), Console())
    model = this.train(this.newborn(), look)
    if model is None:
        raise SystemExit(130)
    return model


# ---------------------------------------------------------------------------------------------- collecting


def collect(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Per experiment, of the cells that all seeds have finished: `cells`, their levels and gaps to the first one, and
    `pairs`, gaps between two that differ in one thing.

    Raises:
        SystemExit: a cell was made with other numbers.
    """
    return {name: _collect(name, options) for name in options.experiments}


def _collect(experiment: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    found, trial = {}, EXPERIMENTS[experiment]
    for cell in trial.cells:
        files = [where(experiment, cell, seed, options) for seed in options.seeds]
        if all(file.is_file() for file in files):
            found[cell] = [effects.read(file, asked(options)) for file in files]
    pairs = [
        effects.compare({one: found[one], other: found[other]}, one)[1] | {"minus": one}
        for one, other in trial.pairs
        if one in found and other in found
    ]
    return {"cells": effects.compare(found, next(iter(trial.cells))), "pairs": pairs}


def picture(experiment: str) -> Path:
    """Where the drawing of an experiment lies."""
    return PAGE.with_name(f"lion_{experiment}.svg")


def page(trials: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the results, from every experiment's cells, numbers and machine."""
    told = "\n\n".join(section(name, trials[name]) for name in EXPERIMENTS if name in trials)
    return f"""# What LION's parts do

Written by `python benchmarks/lion_effects.py --write`; do not edit it by hand. The numbers are in
[`lion_effects.json`](../../benchmarks/results/lion_effects.json), what LION is in [its page](../systems/lion.md).

SmolLM2-135M, frozen, and EfficientNet-Lite0. The connectors alone learn first, once per seed, in steps of 128 pictures;
then every cell has as many steps of 6 samples as the others, and the same items per task.

In brackets is the wider of two intervals at 95 %: of Student's t over seeds, and of a bootstrap over seeds and items.
Rows in nats are minus the log of the right answer's probability (for captions per token, for choices among them): less
is better, and they tell small differences earlier than accuracies, which are the others. Differences are formed seed by
seed, and are in bold where their interval leaves zero out; of many, one in twenty would be bold if nothing differed.

{told}
"""


def section(name: str, trial: Mapping[str, Any]) -> str:
    """What an experiment asks, what came out, and with how much of everything."""
    experiment, cases = EXPERIMENTS[name], trial["cells"]
    done = [case["cell"] for case in cases]
    lacking = [cell for cell in experiment.cells if cell not in done]
    seen = f"![Differences from “{next(iter(experiment.cells))}”, with their intervals]({picture(name).name})"
    parts = [
        f"## {name.capitalize()}",
        experiment.asks,
        f"{trial['warm']} steps for the connectors alone, {trial['steps']} in every cell, over {trial['pictures']} "
        f"pictures of every source;\nseeds {', '.join(map(str, trial['seeds']))}; {trial['items']} items per task.",
        seen if len(done) > 1 else "",
        effects.tables(cases),
        effects.verdict(cases),
        _paired(trial["pairs"]),
        f"Not trained for all seeds yet: {', '.join(lacking)}." if lacking else "",
        harness.in_words(trial["machine"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _paired(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return ""
    named = {f"{case['cell']}, minus {case['minus']}": case for case in pairs}
    return effects.differences("two that differ in one thing", named, tuple(pairs[0]["gaps"]))


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="all of them")
    made.add_argument("--cells", nargs="+", help="only these, by name")
    made.add_argument("--steps", type=int, default=400, help="of every cell (400)")
    made.add_argument("--warm", type=int, default=200, help="steps of the connectors alone, before (200)")
    made.add_argument("--pictures", type=int, default=2000, help="of every source (2000)")
    made.add_argument("--items", type=int, default=200, help="per task (200)")
    effects.arguments(made, "runs/lion")
    options = effects.parse(made, arguments, QUICK)
    told = {"machine": harness.machine(), "seeds": options.seeds, **asked(options)}
    return effects.carry_out(__file__, arguments, options, _cells(options), lambda: _report(told, options))


def _cells(options: argparse.Namespace) -> Iterator[effects.Work]:
    """Cell by cell, all seeds of one before the next, so that whatever is finished can be compared."""
    for trial in options.experiments:
        for cell in _chosen(trial, options):
            for seed in options.seeds:
                made = lambda trial=trial, cell=cell, seed=seed: run(trial, cell, seed, options)  # noqa: E731
                yield where(trial, cell, seed, options), made


def _report(told: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Save and print what is finished; 1 where something is left to do."""
    found = collect(options)
    for name, trial in found.items():
        parts = EXPERIMENTS[name].asks, effects.tables(trial["cells"]), _paired(trial["pairs"])
        print(f"\n{name}:", "\n\n".join(filter(None, parts)))
    trials = _measured() | {name: {**told, **trial} for name, trial in found.items() if trial["cells"]}
    print(harness.save("lion_effects", {"experiments": trials}, options))
    if options.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(trials), encoding="utf-8")
        for name, cases in ((name, trial["cells"]) for name, trial in found.items() if len(trial["cells"]) > 1):
            picture(name).write_text(effects.forest({name.capitalize(): cases}, tuple(cases[0]["levels"])))
        print(PAGE)
    return int(any(_left(name, trial["cells"], options) for name, trial in found.items()))


def _measured() -> dict[str, dict[str, Any]]:
    """The experiments of which figures are kept already."""
    file = harness.RESULTS / "lion_effects.json"
    trials = json.loads(file.read_text(encoding="utf-8"))["experiments"] if file.is_file() else {}
    return {
        name: trial | {part: effects.restored(trial.get(part, ())) for part in ("cells", "pairs")}
        for name, trial in trials.items()
    }


def _left(experiment: str, cases: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """Cells that were asked for and are not finished under all seeds."""
    done = [case["cell"] for case in cases]
    return [cell for cell in _chosen(experiment, options) if cell not in done]


def _chosen(experiment: str, options: argparse.Namespace) -> list[str]:
    return [cell for cell in EXPERIMENTS[experiment].cells if options.cells is None or cell in options.cells]


if __name__ == "__main__":
    sys.exit(main())
