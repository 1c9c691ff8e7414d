"""LLaVA against VDEP in its settings: equal steps, several seeds, each paired with its own seed's LLaVA.

    python benchmarks/vdep_ablation.py [--steps 300] [--seeds 0 1 2] [--settings LLaVA VDEP ...] [--pool 7] [--write]

Stages before the last one are the same in all settings; each seed trains them once, into `runs/vdep/`. An interrupted
run goes on, and a finished one is not done again. Whatever is finished is collected; `--collect` does nothing else,
and `--write` turns the figures into `docs/results/vdep.md`. Means over seeds have a t-interval at 95 %, and so have the
differences from LLaVA, which are formed seed by seed: both sides have the same first stages and the same samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from demo_quality import Mean

SETTINGS: dict[str, dict[str, Any]] = {
    "LLaVA": {"alpha": 0},
    "VDEP": {},
    "shift 0": {"shift": 0},
    "alpha 1": {"alpha": 1.0},
    "ratio 1": {"ratio": 1.0},
    "attached": {"detach": False, "distance": "cosine"},
    "alpha 0.01": {"alpha": 0.01},
    "ratio 0.25": {"ratio": 0.25},
    "by batch": {"mix_by": "batch"},
    "pictures alone": {"text": False},
    "cosine": {"distance": "cosine"},
    "before the norm": {"layer": "before"},
}
"""What each differs in from the recipe `vdep`, the first ones first; alpha 0 is LLaVA."""
TASKS = ("easy-vqa", "presence", "relation", "caption")
PAGE = Path(__file__).resolve().parent.parent / "docs/results/vdep.md"
LOOK = 64
"""Held-out pictures that the image term is measured on."""
HIGHER = ("easy-VQA, official test", "easy-VQA without yes/no", "Presence", "Relations")
WORDS = {
    "next": "next vector",
    "next, copied": "next vector, copied",
    "own": "own vector",
    "spread": "spread of vectors",
    "rank": "their effective rank",
}
"""How figures of the image term are called in the tables."""


def stages(seed: int, setting: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The recipe of the stages that all share, and that of a setting's own last stage."""
    from isthmus.config import Budget
    from isthmus.recipes.vdep import vdep

    recipe = vdep(**SETTINGS[setting]).but(seed=seed).override([f"aligner.options.pool={options.pool}"])
    steps = {"warm": options.warm, "align": options.align, "sft": options.steps}
    told = [
        stage.but(budget=Budget(steps=steps[stage.name]), evaluate_every=None, save_every=None)
        for stage in recipe.stages
    ]
    shared = vdep(alpha=0).but(seed=seed).override([f"aligner.options.pool={options.pool}"])
    return shared.but(stages=tuple(told[:-1])), recipe.but(stages=(told[-1],))


def run(seed: int, setting: str, options: argparse.Namespace) -> None:
    """Train and measure one setting, in this process."""
    import torch
    from rich.console import Console

    from isthmus.assembly import load
    from isthmus.config import TaskConfig
    from isthmus.evaluation.measure import build, measure
    from isthmus.evaluation.results import rows
    from isthmus.experiment import pictures
    from isthmus.training.run import Run

    shared, own = stages(seed, setting, options)
    first = Run(shared, options.out / f"seed-{seed}/shared", torch.device("cpu"), Console())
    newborn = first.newborn()
    look = first.look(newborn)
    begun = first.train(newborn, look)
    folder = where(seed, setting, options)
    last = Run(own, folder, torch.device("cpu"), Console())
    trained = last.train(begun, look) if begun is not None else None
    if trained is None:
        raise SystemExit(130)
    built = build([TaskConfig(name=name, limit=options.items, controls=()) for name in TASKS], seed=0)
    last.fill(look, pictures(task for task, _ in built))
    model = load(last.model_of(own.stages[0]), last.dtype)
    measured = measure(model, built, 0, folder / "predictions", look=look, settings={"weights": own.fingerprint()})
    values = {row.label: row.cells["after"].value for task, runs in measured.values() for row in rows(task, runs)}
    figures = {"fingerprint": own.fingerprint(), "dtype": str(last.dtype), "tasks": values}
    figures["image"] = image_term(model, look, last.dtype)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def image_term(model: Any, look: Any, dtype: Any) -> dict[str, float]:
    """What states tell of held-out pictures: of the next vector and of their own; and how the vectors are."""
    import torch

    from isthmus.config import ObjectiveConfig, Source
    from isthmus.data.sets import open_set
    from isthmus.training.step import Step

    sources = [Source(name="naming", split="val"), Source(name="scenes", split="val", options={"kinds": ["caption"]})]
    samples = [sample for source in sources for sample in list(open_set(source, 0)[: LOOK // 2])]
    batch = model.processor.collator(look)(samples)
    found: dict[str, float] = {}
    for name, shift in (("next", 1), ("own", 0)):
        step = Step(model, [ObjectiveConfig(name="vdep", options={"ratio": 1.0, "shift": shift})])
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            step.eval()(batch, step.scales([batch]))
        told = step.figures()
        found |= {name: told["vdep_distance"], "next, copied": told["vdep_copy"]}
        found |= {"spread": told["vdep_spread"], "rank": told["vdep_rank"]}
    return found


def where(seed: int, setting: str, options: argparse.Namespace) -> Path:
    return options.out / f"seed-{seed}" / setting.replace(" ", "-").lower()


# ---------------------------------------------------------------------------------------------- collecting


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per setting that all its seeds have finished: means, and differences from LLaVA seed by seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for setting in options.settings:
        files = [where(seed, setting, options) / "figures.json" for seed in options.seeds]
        if all(file.is_file() for file in files):
            read = [json.loads(file.read_text()) for file in files]
            found[setting] = [{**one["tasks"], **one["image"]} for one in read]
    base = found.get("LLaVA")
    return [
        {
            "setting": setting,
            "differs": SETTINGS[setting],
            "means": {name: Mean.of([one[name] for one in seeds]) for name in seeds[0]},
            "differences": {
                name: Mean.of([ours[name] - theirs[name] for ours, theirs in zip(seeds, base)]) for name in seeds[0]
            }
            if base and setting != "LLaVA"
            else {},
        }
        for setting, seeds in found.items()
    ]


def clear(difference: Mean) -> bool:
    """Whether zero lies outside of the interval."""
    return difference.half_width is not None and abs(difference.value) > difference.half_width


def tables(cases: Sequence[Mapping[str, Any]]) -> str:
    """Means, and below them the differences from LLaVA; those whose interval leaves zero out are in bold."""
    if not cases:
        return "nothing is finished yet"
    names = list(cases[0]["means"])
    header = ["setting", *(WORDS.get(name, name) for name in names)]
    means = [[case["setting"], *(str(case["means"][name]) for name in names)] for case in cases]
    apart = [
        [case["setting"], *(f"**{each}**" if clear(each) else str(each) for each in case["differences"].values())]
        for case in cases
        if case["differences"]
    ]
    both = [harness.table(header, means)]
    return "\n\n".join([*both, harness.table(header, apart)] if apart else both)


def verdict(cases: Sequence[Mapping[str, Any]]) -> str:
    """In words, what can be told apart from LLaVA."""
    lines = []
    for case in cases:
        told = [name for name, each in case["differences"].items() if clear(each) and name not in WORDS]
        better = [name for name in told if (case["differences"][name].value > 0) == (name in HIGHER)]
        worse = [name for name in told if name not in better]
        if case["differences"]:
            said = "; ".join(
                f"{word} on {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names
            )
            lines.append(f"- {case['setting']}: {said or 'no task can be told apart from LLaVA'}.")
    return "\n".join(lines)


def page(result: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """The page of the results."""
    tasks = [name for name in cases[0]["means"] if name not in WORDS] if cases else []
    tried = len(tasks) * sum(bool(case["differences"]) for case in cases)
    return f"""# VDEP against LLaVA

Written by `python benchmarks/vdep_ablation.py --write`; do not edit it by hand. The numbers are in
[`vdep_ablation.json`](../../benchmarks/results/vdep_ablation.json), what VDEP is in [its page](../systems/vdep.md).

SmolLM2-135M and EfficientNet-Lite0, {result["pool"] ** 2} tokens per picture. All settings of a seed share the stages
`warm` ({result["warm"]} steps) and `align` ({result["align"]}); then come {result["steps"]} steps of `sft`, with the
term or without it. Seeds {", ".join(map(str, result["seeds"]))}; {result["items"]} items per task; ± is half of a
t-interval at 95 % over seeds. Captions are in nats per token, less is better; the other tasks are accuracies.

The last columns are of {LOOK} held-out pictures, in the term's own unit (mean square of vectors of root mean square 1):
how far states are from the next vector, how far the next vector is from the one before it (what copying would reach),
how far states are from their own vector, and whether vectors collapse.

## Means, then differences from LLaVA of the same seed

In bold where the interval of a difference leaves zero out. {tried} differences of tasks are looked at; of so many, one
in twenty would be bold if nothing differed at all.

{tables(cases)}

## What can be told

{verdict(cases)}

{harness.in_words(result["machine"])}
"""


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=300, help="of the last stage (300)")
    made.add_argument("--warm", type=int, default=200, help="steps of the first stage (200)")
    made.add_argument("--align", type=int, default=20, help="steps of the second stage (20)")
    made.add_argument("--pool", type=int, default=7, help="tokens of a picture's side (7)")
    made.add_argument("--items", type=int, default=200, help="per task (200)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 1 2")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="all of them")
    made.add_argument("--out", type=Path, default=Path("runs/vdep"), help="parent folder of the runs")
    made.add_argument("--collect", action="store_true", help="only read what is finished")
    made.add_argument("--write", action="store_true", help="write docs/results/vdep.md")
    made.add_argument("--json", type=Path, help="where the numbers go instead of results/vdep_ablation.json")
    made.set_defaults(tiny=False)
    options = made.parse_args(arguments)
    result = {"machine": harness.machine(), "seeds": options.seeds}
    result |= {name: getattr(options, name) for name in ("steps", "warm", "align", "pool", "items")}
    for setting in () if options.collect else options.settings:
        for seed in options.seeds:
            if not (where(seed, setting, options) / "figures.json").is_file():
                run(seed, setting, options)
        report(result, options)
    return report(result, options)


def report(result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Save and print what is finished."""
    cases = collect(options)
    print(tables(cases))
    print(harness.save("vdep_ablation", {**result, "cases": cases}, options))
    if options.write and cases:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(result, cases), encoding="utf-8")
    return int(len(cases) < len(options.settings))


if __name__ == "__main__":
    sys.exit(main())
