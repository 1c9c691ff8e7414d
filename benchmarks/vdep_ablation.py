"""LLaVA against VDEP in its settings: equal steps, several seeds, each paired with its own seed's LLaVA.

    python benchmarks/vdep_ablation.py [--quick] [--steps 300] [--seeds 0 1 2] [--settings LLaVA VDEP ...] [--write]
        [--minutes M] [--jobs 2]

Stages before the last one are the same in all settings; each seed trains them once, into `runs/vdep/`. An interrupted
run goes on, and a finished one is not done again. Whatever is finished is collected; `--collect` does nothing else,
and `--write` turns the figures into `docs/results/vdep.md`. `--quick` is for twenty minutes on two cores: fewer tokens,
steps, pictures and settings, and a smaller mix of questions. How settings are compared is said in `effects`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import effects
import harness

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
WORDS = {
    "next": "next vector",
    "copied": "next vector, copied",
    "own": "own vector",
    "spread": "spread of vectors",
    "rank": "their effective rank",
}
"""How figures of the image term are called in the tables."""
NUMBERS = ("steps", "warm", "align", "pool", "pictures", "batch", "items")
"""Options that a figure depends on."""
QUICK: dict[str, Any] = {
    "steps": 60,
    "warm": 150,
    "align": 10,
    "pool": 5,
    "pictures": 600,
    "batch": 4,
    "seeds": [0, 1, 2, 3],
    "settings": ["LLaVA", "VDEP", "alpha 1", "shift 0"],
    "jobs": 2,
    "out": Path("runs/vdep-quick"),
}
"""What `--quick` changes."""


def stages(seed: int, setting: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The recipe of the stages that all share, and that of a setting's own last stage."""
    from isthmus.config import Budget
    from isthmus.recipes.vdep import vdep

    pooled = [f"aligner.options.pool={options.pool}"]
    shared, recipe = (vdep(**told).but(seed=seed).override(pooled) for told in (SETTINGS["LLaVA"], SETTINGS[setting]))
    steps = {"warm": options.warm, "align": options.align, "sft": options.steps}
    told = [
        stage.but(
            data=[smaller(source, options.pictures) for source in stage.data],
            batch_size=stage.batch_size if stage.name == "warm" else options.batch,
            budget=Budget(steps=steps[stage.name]),
            evaluate_every=None,
            save_every=None,
        )
        for stage in recipe.stages
    ]
    return shared.but(stages=tuple(told[:-1])), recipe.but(stages=(told[-1],))


def smaller(source: Any, pictures: int) -> Any:
    """The source with at most so many pictures."""
    if source.limit is not None:
        return source.but(limit=min(source.limit, pictures))
    return source.but(options={**source.options, "count": min(source.options["count"], pictures)})


def run(seed: int, setting: str, options: argparse.Namespace) -> None:
    """Train and measure one setting, in this process."""
    import torch
    from rich.console import Console

    from isthmus.assembly import load
    from isthmus.config import TaskConfig
    from isthmus.evaluation.measure import build, measure
    from isthmus.experiment import pictures
    from isthmus.training.run import Run

    shared, own = stages(seed, setting, options)
    first = Run(shared, options.out / f"seed-{seed}/shared", torch.device("cpu"), Console())
    newborn = first.newborn()
    look = first.look(newborn)
    begun = first.train(newborn, look)
    folder = where(seed, setting, options).parent
    last = Run(own, folder, torch.device("cpu"), Console())
    trained = last.train(begun, look) if begun is not None else None
    if trained is None:
        raise SystemExit(130)
    built = build([TaskConfig(name=name, limit=options.items, controls=()) for name in TASKS], seed=0)
    last.fill(look, pictures(task for task, _ in built))
    model = load(last.model_of(own.stages[0]), last.dtype)
    measured = measure(model, built, 0, folder / "predictions", look=look, settings={"weights": own.fingerprint()})
    rows = effects.outcomes(measured) | image_term(model, look, last.dtype)
    effects.keep(folder / "figures.json", rows, asked(options), fingerprint=own.fingerprint(), dtype=str(last.dtype))


def image_term(model: Any, look: Any, dtype: Any) -> effects.Rows:
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
        found |= {name: told["vdep_distance"], "copied": told["vdep_copy"]}
        found |= {"spread": told["vdep_spread"], "rank": told["vdep_rank"]}
    return {WORDS[name]: effects.alone(value) for name, value in found.items()}


def where(seed: int, setting: str, options: argparse.Namespace) -> Path:
    return options.out / f"seed-{seed}" / setting.replace(" ", "-").lower() / "figures.json"


def asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in NUMBERS}


# ---------------------------------------------------------------------------------------------- collecting


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per setting that all its seeds have finished: levels, and gaps to LLaVA of the same seed."""
    found = {}
    for setting in options.settings:
        files = [where(seed, setting, options) for seed in options.seeds]
        if all(file.is_file() for file in files):
            found[setting] = [effects.read(file, asked(options)) for file in files]
    return effects.compare(found, "LLaVA", WORDS.values())


def page(result: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], left: Sequence[str]) -> str:
    """The page of the results."""
    tasks = [name for name in cases[0]["levels"] if name not in WORDS.values()]
    tried = len(tasks) * sum(bool(case["gaps"]) for case in cases)
    lacking = f"\nNot trained under all seeds: {', '.join(left)}.\n" if left else ""
    return f"""# VDEP against LLaVA

Written by `python benchmarks/vdep_ablation.py --write`; do not edit it by hand. The numbers are in
[`vdep_ablation.json`](../../benchmarks/results/vdep_ablation.json), what VDEP is in [its page](../systems/vdep.md).

SmolLM2-135M and EfficientNet-Lite0, {result["pool"] ** 2} tokens per picture, at most {result["pictures"]} pictures of
every source. All settings of a seed share the stages `warm` ({result["warm"]} steps of 128) and `align`
({result["align"]} of {result["batch"]}); then come {result["steps"]} steps of {result["batch"]} samples of `sft`, with
the term or without it. Seeds {", ".join(map(str, result["seeds"]))}; {result["items"]} items per task, the same ones.

In brackets is the wider of two intervals at 95 %: of Student's t over seeds, and of a bootstrap over seeds and items.
Rows in nats are minus the log of the right answer's probability (for captions per token, for choices among them): less
is better, and they tell small differences earlier than accuracies, which are the others.

The last columns are of {LOOK} held-out pictures, in the term's own unit (mean square of vectors of root mean square 1):
how far states are from the next vector, how far the next vector is from the one before it (what copying would reach),
how far states are from their own vector, and whether vectors collapse.

## Levels, then differences from LLaVA of the same seed

In bold where the interval of a difference leaves zero out. {tried} differences of tasks are looked at; of so many, one
in twenty would be bold if nothing differed at all.

{effects.tables(cases)}

## What can be told

{effects.verdict(cases, WORDS.values())}
{lacking}
{harness.in_words(result["machine"])}
"""


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=300, help="of the last stage (300)")
    made.add_argument("--warm", type=int, default=200, help="steps of the first stage (200)")
    made.add_argument("--align", type=int, default=20, help="steps of the second stage (20)")
    made.add_argument("--batch", type=int, default=7, help="samples per step of the second stage and the last (7)")
    made.add_argument("--pool", type=int, default=7, help="tokens of a picture's side (7)")
    made.add_argument("--pictures", type=int, default=6000, help="of every source, at most (6000)")
    made.add_argument("--items", type=int, default=200, help="per task (200)")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="all of them")
    effects.arguments(made, "runs/vdep")
    options = effects.parse(made, arguments, QUICK)
    result = {"machine": harness.machine(), "seeds": options.seeds, **asked(options)}
    return effects.carry_out(__file__, arguments, options, cells(options), lambda: report(result, options))


def cells(options: argparse.Namespace) -> Iterator[effects.Work]:
    """Setting by setting, all seeds of one before the next, so that whatever is finished can be compared."""
    for setting in options.settings:
        for seed in options.seeds:
            yield where(seed, setting, options), lambda seed=seed, setting=setting: run(seed, setting, options)


def report(result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Save and print what is finished; 1 where something is left to do."""
    cases = collect(options)
    left = [setting for setting in options.settings if setting not in [case["cell"] for case in cases]]
    print(effects.tables(cases))
    print(harness.save("vdep_ablation", {**result, "cases": cases}, options))
    if options.write and cases:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(result, cases, left), encoding="utf-8")
        print(PAGE)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
