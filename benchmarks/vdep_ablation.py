"""LLaVA against VDEP in its settings: equal steps, several seeds, each paired with its own seed's LLaVA.

    python benchmarks/vdep_ablation.py [--quick] [--steps 240] [--seeds 0 1 2] [--settings LLaVA VDEP ...] [--write]
        [--minutes M] [--jobs 2]

Stages before the last one are the same in all settings; each seed trains them once, into `runs/vdep/`. An interrupted
run goes on, and a finished one is not done again. Whatever is finished is collected; `--collect` does nothing else,
and `--write` turns the figures into `docs/results/vdep.md` and the picture beside it. `--quick` has fewer tokens, steps
and pictures: on two cores some two minutes a setting and seed. How settings are compared is said in `effects`.

What is learnt are questions about coloured shapes, where things are in drawn scenes, and what scenes show: fewer kinds
than other recipes have, so that few steps suffice for LLaVA to read its pictures. `few captions` are settings in which
a tenth of the pictures come with words, in the stages before, too; `bare pictures` adds all of them without a word, in
every second sample of the last stage, so that the number of steps and of samples in each is the same. Such a run reads
its few words half as often: its control is `in half the samples`, the same run with a term that weighs nothing. In
settings `of align` the last stage is one more `align`: connectors alone learn, through an LLM that stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import effects
import harness

FEW = 0.1


@dataclass(frozen=True)
class Setting:
    """What differs from the recipe `vdep`, and what is learnt from."""

    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    """Of the pictures, that come with words."""
    bare: bool = False
    """Whether every second sample of the last stage is any of the pictures without words."""
    mute: bool = False
    """Whether the term weighs nothing, so that pictures without words take the place of others and teach nothing."""
    frozen: bool = False
    """Whether the LLM stays as it is in the last stage too, so that its term moves the connectors alone."""

    @property
    def shared(self) -> str:
        """Where the stages before lie, for all settings that have them in common."""
        return "shared" if self.share == 1 else f"shared-{self.share:g}"


TERM = {
    "LLaVA": Setting({"alpha": 0}),
    "VDEP": Setting(),
    "alpha 1": Setting({"alpha": 1.0}),
    "ratio 1": Setting({"ratio": 1.0}),
    "alpha 0.01": Setting({"alpha": 0.01}),
    "ratio 0.25": Setting({"ratio": 0.25}),
    "shift 0": Setting({"shift": 0}),
    "cosine": Setting({"distance": "cosine"}),
    "by batch": Setting({"mix_by": "batch"}),
    "before the norm": Setting({"layer": "before"}),
    "attached": Setting({"detach": False, "distance": "cosine"}),
    "pictures alone": Setting({"text": False}),
    "smooth-l1": Setting({"distance": "smooth-l1"}),
    "a middle layer": Setting({"layer": 20}),
}
"""What each differs in from the recipe `vdep`, the first ones first; alpha 0 is LLaVA."""
BARE = {
    "LLaVA, few captions": Setting({"alpha": 0}, FEW),
    "VDEP, few captions": Setting({}, FEW),
    "VDEP, few captions and bare pictures": Setting({}, FEW, bare=True),
}
CONTROL = {
    "LLaVA, few captions in half the samples": Setting({}, FEW, bare=True, mute=True),
    "VDEP, few captions and bare pictures": BARE["VDEP, few captions and bare pictures"],
}
ALIGN = {
    "LLaVA of align": Setting({"alpha": 0}, frozen=True),
    "VDEP of align": Setting(frozen=True),
    "alpha 1 of align": Setting({"alpha": 1.0}, frozen=True),
}
GROUPS = {
    "Settings of the term": TERM,
    "The LLM as it is": ALIGN,
    "Pictures without words": BARE,
    "Pictures without words, beside as many words": CONTROL,
}
"""What is compared, each with the first of its group."""
SETTINGS = TERM | ALIGN | BARE | CONTROL
TASKS = ("easy-vqa", "presence", "relation", "caption")
PAGE = Path(__file__).resolve().parent.parent / "docs/results/vdep.md"
LOOK = 64
"""Held-out pictures that the image term and the gap are measured on."""
WORDS = {
    "next": "next vector",
    "copied": "next vector, copied",
    "own": "own vector",
    "spread": "spread of vectors",
    "rank": "their effective rank",
}
"""How figures of the image term are called in the tables."""
DISTANCES = tuple(f"{where}, {when}" for where in ("input", "last layer") for when in ("before", "after"))
"""How the distances between the centres of pictures' and words' states are called."""
BESIDES = (*WORDS.values(), *DISTANCES)
NUMBERS = ("steps", "warm", "align", "pool", "pictures", "batch", "items")
"""Options that a figure depends on."""
QUICK: dict[str, Any] = {
    "steps": 60,
    "warm": 150,
    "align": 5,
    "pool": 5,
    "pictures": 600,
    "items": 150,
    "seeds": [0, 1, 2, 3],
    "jobs": 2,
    "out": Path("runs/vdep-quick"),
}
"""What `--quick` changes."""


def stages(seed: int, name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The recipe of the stages that all settings like this one share, and that of its own last stage."""
    from isthmus.config import Budget
    from isthmus.recipes.vdep import vdep

    setting = SETTINGS[name]
    changes = [f"aligner.options.pool={options.pool}", "dtype=bfloat16"]
    before, recipe = (vdep(**told).but(seed=seed).override(changes) for told in ({"alpha": 0}, setting.options))
    count = round(setting.share * options.pictures)
    steps = {"warm": options.warm, "align": options.align, "sft": options.steps}
    told = [
        stage.but(
            data=[smaller(each, count) for each in stage.data] if stage.name == "warm" else sources(count),
            batch_size=stage.batch_size if stage.name == "warm" else options.batch,
            budget=Budget(steps=steps[stage.name]),
            evaluate_every=None,
            save_every=None,
        )
        for stage in recipe.stages
    ]
    if setting.frozen:
        told[-1] = told[-2].but(objectives=told[-1].objectives, budget=told[-1].budget)
    if setting.bare:
        told[-1] = told[-1].but(data=[*told[-1].data, bare(options.pictures, weight=2.0)])
    if setting.mute:
        words, term = told[-1].objectives
        told[-1] = told[-1].but(objectives=[words, term.but(weight=0.0)])
    return before.but(stages=tuple(told[:-1])), recipe.but(stages=(told[-1],))


def sources(count: int) -> list[Any]:
    """So many pictures of shapes and of scenes each, with what is asked of them."""
    from isthmus.config import Source

    asked = {"kinds": ["relation", "caption"], "together": True, "count": count}
    return [
        Source(name="easy-vqa", limit=count, options={"together": True}),
        Source(name="scenes", options=asked),
    ]


def bare(count: int, weight: float) -> Any:
    """So many pictures of each source, without a word."""
    from isthmus.config import Source

    scenes = {"name": "scenes", "options": {"kinds": ["caption"], "count": count}}
    shapes = {"name": "easy-vqa", "limit": count, "options": {"kinds": ["caption"]}}
    return Source(name="pictures", weight=weight, options={"of": [shapes, scenes]})


def smaller(source: Any, pictures: int) -> Any:
    """The source with at most so many pictures."""
    if source.limit is not None:
        return source.but(limit=min(source.limit, pictures))
    return source.but(options={**source.options, "count": min(source.options["count"], pictures)})


def run(seed: int, name: str, options: argparse.Namespace) -> None:
    """Train and measure one setting, in this process."""
    import torch
    from rich.console import Console

    from isthmus.assembly import load
    from isthmus.config import TaskConfig
    from isthmus.evaluation.measure import build, measure
    from isthmus.experiment import pictures
    from isthmus.training.run import Run

    shared, own = stages(seed, name, options)
    first = Run(shared, options.out / f"seed-{seed}" / SETTINGS[name].shared, torch.device("cpu"), Console())
    newborn = first.newborn()
    look = first.look(newborn)
    begun = first.train(newborn, look)
    folder = where(seed, name, options).parent
    last = Run(own, folder, torch.device("cpu"), Console())
    trained = last.train(begun, look) if begun is not None else None
    if trained is None:
        raise SystemExit(130)
    built = build([TaskConfig(name=task, limit=options.items, controls=()) for task in TASKS], seed=0)
    last.fill(look, pictures(task for task, _ in built))
    before = distances(load(first.model_of(shared.stages[-1]), first.dtype), "before", look)
    model = load(last.model_of(own.stages[0]), last.dtype)
    measured = measure(model, built, 0, folder / "predictions", look=look, settings={"weights": own.fingerprint()})
    rows = effects.outcomes(measured) | image_term(model, look, last.dtype) | before | distances(model, "after", look)
    effects.keep(folder / "figures.json", rows, asked(options), fingerprint=own.fingerprint(), dtype=str(last.dtype))


def distances(model: Any, when: str, look: Any) -> effects.Rows:
    """Between the centres of pictures' and of their captions' states, at the LLM's input and behind its last layer."""
    from isthmus.evaluation.gap import states
    from isthmus.evaluation.gap.measures import modality_gap

    seen = states.see(model, states.pairs("scenes", LOOK), keep=1, look=look)
    found = [modality_gap(seen.image_ND[layer], seen.words_ND[layer]).gap for layer in (0, -1)]
    return {f"{place}, {when}": effects.alone(value) for place, value in zip(("input", "last layer"), found)}


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


def where(seed: int, name: str, options: argparse.Namespace) -> Path:
    folder = name.replace(",", "").replace(" ", "-").lower()
    return options.out / f"seed-{seed}" / folder / "figures.json"


def asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in NUMBERS}


# ---------------------------------------------------------------------------------------------- collecting


def collect(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By group, per setting that all its seeds have finished: levels, and gaps to the first of the group."""
    found = {}
    for group, settings in GROUPS.items():
        done = {}
        for name in settings:
            files = [where(seed, name, options) for seed in options.seeds]
            if name in options.settings and all(file.is_file() for file in files):
                done[name] = [effects.read(file, asked(options)) for file in files]
        if done:
            found[group] = effects.compare(done, next(iter(settings)), BESIDES)
    return found


def page(result: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]], left: Sequence[str]) -> str:
    """The page of the results."""
    lacking = f"\nNot trained under all seeds: {', '.join(left)}.\n" if left else ""
    return f"""# VDEP against LLaVA

Written by `python benchmarks/vdep_ablation.py --write`; do not edit it by hand. The numbers are in
[`vdep_ablation.json`](../../benchmarks/results/vdep_ablation.json), what VDEP is in [its page](../systems/vdep.md).

SmolLM2-135M and EfficientNet-Lite0, {result["pool"] ** 2} tokens per picture, {result["pictures"]} pictures of
shapes and as many of scenes. All settings of a seed share the stages `warm` ({result["warm"]} steps of 128) and `align`
({result["align"]} of {result["batch"]}); then come {result["steps"]} steps of {result["batch"]} samples of `sft`, with
the term or without it; *of align* means as many of `align` in its place, where connectors alone learn and the LLM stays
as it is. Seeds {", ".join(map(str, result["seeds"]))}; {result["items"]} items per task, the same ones.
Where there are few captions, {FEW:.0%} of the pictures come with words, in all stages.

In brackets is the wider of two intervals at 95 %: of Student's t over seeds, and of a bootstrap over seeds and items.
Rows in nats are minus the log of the right answer's probability (for captions per token, for choices among them): less
is better, and they tell small differences earlier than accuracies, which are the others. Differences are formed seed by
seed, and are in bold where their interval leaves zero out; of many, one in twenty would be bold if nothing differed.

![Differences from LLaVA with their intervals]({PAGE.with_suffix(".svg").name})

{chr(10).join(part(group, cases) for group, cases in groups.items())}
## What the columns are

Of {LOOK} held-out pictures, in the term's own unit (mean square of vectors of root mean square 1): how far states are
from the next vector, how far the next vector is from the one before it (what copying would reach), how far states are
from their own vector, and whether vectors collapse. Distances are those between the centres of pictures' states and of
their captions', all of length 1, before the last stage and after it ([how](../gap.md)): 0 is the same centre, 2 the
opposite.
{lacking}
{harness.in_words(result["machine"])}
"""


def part(group: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """What one group says: tasks, then what the term does to vectors and states."""
    tasks = tasks_of(cases)
    return f"""## {group}

{effects.tables(cases, tasks)}

{effects.verdict(cases, BESIDES) or f"- Only {cases[0]['cell']} is finished."}

### The term itself

{effects.tables(cases, tuple(WORDS.values()))}

### Distance between pictures and words

{effects.tables(cases, DISTANCES)}
"""


def tasks_of(cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(label for label in cases[0]["levels"] if label not in BESIDES)


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=240, help="of the last stage (240)")
    made.add_argument("--warm", type=int, default=200, help="steps of the first stage (200)")
    made.add_argument("--align", type=int, default=20, help="steps of the second stage (20)")
    made.add_argument("--batch", type=int, default=7, help="samples per step of the second stage and the last (7)")
    made.add_argument("--pool", type=int, default=7, help="tokens of a picture's side (7)")
    made.add_argument("--pictures", type=int, default=1500, help="of shapes, and of scenes (1500)")
    made.add_argument("--items", type=int, default=200, help="per task (200)")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="all of them")
    effects.arguments(made, "runs/vdep")
    options = effects.parse(made, arguments, QUICK)
    result = {"machine": harness.machine(), "seeds": options.seeds, **asked(options)}
    return effects.carry_out(__file__, arguments, options, cells(options), lambda: report(result, options))


def cells(options: argparse.Namespace) -> Iterator[effects.Work]:
    """Setting by setting, all seeds of one before the next, so that whatever is finished can be compared."""
    for name in options.settings:
        for seed in options.seeds:
            yield where(seed, name, options), lambda seed=seed, name=name: run(seed, name, options)


def report(result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Save and print what is finished; 1 where something is left to do."""
    groups = collect(options)
    cases = [case for some in groups.values() for case in some]
    left = [name for name in options.settings if name not in [case["cell"] for case in cases]]
    for group, some in groups.items():
        print(f"\n{group}\n\n{effects.tables(some)}")
    print(harness.save("vdep_ablation", {**result, "cases": cases}, options))
    if options.write and cases:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(result, groups, left), encoding="utf-8")
        PAGE.with_suffix(".svg").write_text(effects.forest(groups, tasks_of(cases)), encoding="utf-8")
        print(PAGE)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
