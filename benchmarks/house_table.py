"""The house table: every joint on the embedded parts under one small budget, as `docs/results/joints.md`.

    python benchmarks/house_table.py [JOINT ...] [--seeds 5] [--budget 30e12flops] [--items 200] [--jobs 2]
        [--minutes 85] [--prepare]

It is `isthmus compare` with settings that two cores can carry, and it may be said to it at any time: finished runs are
never done again, and joints or seeds that are new join the table. Joints come two by two, and the page is written after
each two, so that it is whole whenever the script is stopped; with `--minutes` no two are begun that would not be
finished in time. `--prepare` does what a busy machine can do as well: it counts the operations of each recipe's steps
and encodes all pictures.

What is equal: operations per run; encoder, LLM and arithmetic; the questions of all stages that train by the
language-model loss; the evaluation; two learning rates tried at half the budget each. What is each recipe's
own: its stages, what they train, how they share the budget, and the names that a stage without the LLM learns from.

Two cores with instructions for bfloat16 take some ten minutes a joint with four seeds (longer for `cogvlm`, whose
optimizer has 106 million parameters to move in every step), and two or three times that without. Five seeds are what
lets differences be decided: over three, a difference between six joints has to be fourteen times its own error, over
five six times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

PAGE = harness.HERE.parent / "docs/results/joints.md"
NUMBERS = harness.RESULTS / "joints.json"
JOINTS = (
    *("llava", "flamingo", "qwen-vl", "ee-mllm", "blip2-second", "cogvlm", "llama-adapter", "saisa"),
    *("mplug-owl", "naavit", "llava-linear", "minigpt4-first", "kosmos2", "shikra", "vdep"),
)
"""The first is the baseline; then the ones that differ most. InstructBLIP is not among them: its joint reads the
question, so that the questions about a picture cannot share its tokens, as they do here."""
ONE_STAGE = "llava-sft-only"
"""LLaVA without the stages that only the projector learns in, all of the budget in `sft`."""
TASKS = ("easy-vqa", "presence")
RATES, SHARE = (1.0, 3.0), 0.5
"""Recipes are made for five minutes; a shorter training may want larger rates. A trial has some thirty steps of `sft`:
with ten, at a fifth of the budget, one rate of one joint ended at .52 and at 1.11 under two orders of the same data."""
BASELINES = 40
"""Items of each task that the model before training and the blank picture are asked; they cost as much as others."""
TOGETHER = 2
"""Joints that are added at a time."""


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "joints",
        nargs="*",
        default=list(JOINTS),
        help=f"recipes by name or .yaml file, or {ONE_STAGE}; beside {JOINTS[0]}",
    )
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--budget", default="30e12flops", help="of each run, as `isthmus compare` reads it")
    made.add_argument("--items", type=int, default=200, help="per task")
    made.add_argument("--jobs", type=int, default=2, help="runs at a time")
    made.add_argument("--minutes", type=float, help="begin nothing that would not be finished by then")
    made.add_argument("--prepare", action="store_true", help="count and encode only")
    made.add_argument("--out", type=Path, default=Path("runs/compare/house"))
    made.add_argument("--page", type=Path, default=PAGE)
    made.add_argument("--json", type=Path, default=NUMBERS)
    made.add_argument("--tiny", action="store_true", help="no search, in this process; its numbers mean nothing")
    return made.parse_args(words)


def recipe(name: str) -> Any:
    """A recipe by its name or file, or the one that is this table's own."""
    from isthmus.cli.options import recipe_of

    if name != ONE_STAGE:
        return recipe_of(name, None)
    llava = recipe_of("llava", None)
    return llava.but(name=name, about=f"{llava.about}, without the first stages", stages=llava.stages[-1:])


def sources() -> list[Any]:
    """The questions that all joints learn from: shapes and their colours, and what is in a scene."""
    from isthmus.config import Source
    from isthmus.recipes.parts import SCENES

    present = {"kinds": ["presence"], "together": True, "count": SCENES}
    return [
        Source(name="easy-vqa", limit=1500, options={"together": True}),
        Source(name="scenes", options=present),
    ]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `compare` is told, whichever joints take part."""
    from isthmus.config import TaskConfig

    few = min(BASELINES, options.items)
    tasks = [TaskConfig(name=name, limit=options.items, baseline_limit=few, controls=("blind",)) for name in TASKS]
    told = {"budget": options.budget, "seeds": options.seeds, "tasks": tasks, "out": options.out, "baseline": None}
    if options.tiny:
        return {**told, "tasks": tasks[1:2], "factors": (), "engine": "here"}
    return {
        **told,
        "data": sources(),
        "factors": RATES,
        "share": SHARE,
        "overrides": ["dtype=bfloat16"],
        "at_once": options.jobs,
    }


# ---------------------------------------------------------------------------------------------- ahead of time


def prepare(joints: Sequence[Any], options: argparse.Namespace) -> None:
    """Operations of every recipe's steps, and the features of all pictures, for the runs to find."""
    import torch
    from rich.console import Console

    from isthmus.comparing.checks import Place, operations
    from isthmus.comparing.compare import common_of, planned
    from isthmus.comparing.plan import TRIAL_SEED

    told = settings(options)
    common = common_of(joints, None, told["tasks"], None, told["data"], told["overrides"])
    plan = planned(joints, common, told["budget"], range(told["seeds"]), None, RATES, SHARE)
    operations(plan, Place(options.out, torch.device("cpu"), Console()))
    recipes = [plan.recipe(name) for name in plan.recipes]
    for recipe in {recipe.encoder.model_dump_json(): recipe for recipe in recipes}.values():
        for seed in (TRIAL_SEED, *plan.seeds):
            encode(recipe.but(seed=seed))


def encode(recipe: Any) -> None:
    """All pictures of a recipe's stages and tasks into the feature cache."""
    import torch
    from rich.console import Console

    from isthmus.evaluation.measure import build
    from isthmus.experiment import pictures
    from isthmus.training.run import Run, mix_of

    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Path(folder), torch.device("cpu"), Console())
        look = run.look(run.newborn())
        run.fill(look, pictures(task for task, _ in build(recipe.eval, recipe.seed)))
        for stage in recipe.stages:
            run.fill(look, mix_of(stage, recipe.seed).media())


# ---------------------------------------------------------------------------------------------- the table


def grow(joints: Sequence[Any], options: argparse.Namespace) -> int:
    """Compare ever more joints until all, or the time, are spent; how many are in the table."""
    from rich.console import Console

    from isthmus.comparing.compare import compare

    began, longest, done = time.monotonic(), 0.0, 0
    while done < len(joints):
        start = time.monotonic()
        if options.minutes and done and start - began + longest > 60 * options.minutes:
            print(f"{len(joints) - done} joints are left for another call: no time")
            break
        done = min(done + TOGETHER, len(joints))
        compare(joints[:done], **settings(options), console=Console())
        publish(options)
        longest = max(longest, time.monotonic() - start)
        print(f"{done} joints after {(time.monotonic() - began) / 60:.1f} minutes: {options.page}", flush=True)
    return done


def publish(options: argparse.Namespace) -> None:
    """The page, the report beside it, and the numbers, from what the comparison wrote."""
    from isthmus.comparing.table import markdown

    tree = json.loads((options.out / "compare.json").read_text(encoding="utf-8"))
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(tree, markdown(tree), options), encoding="utf-8")
    shutil.copy(options.out / "compare.html", options.page.with_suffix(".html"))
    shutil.copy(options.out / "compare.json", options.json)


def page(tree: dict[str, Any], table: str, options: argparse.Namespace) -> str:
    """The comparison's Markdown under an introduction of our own."""
    _, _, rest = table.partition("\n- ")
    report = options.page.with_suffix(".html").name
    return f"""# The house table: {len(tree["names"])} joints on the embedded parts

Written by `benchmarks/house_table.py` from its runs; do not edit it by hand. [The report]({report}) has the same
numbers with plots, pictures and every difference: download it and open it in a browser.

Every joint was trained {len(tree["seeds"])} times with {tree["budget"]} a run, between EfficientNet-Lite0 and
SmolLM2-135M. That is minutes, not days: the table shows how far each joint comes from so little, and not where
any of them ends. Do not carry its order over to large models without a comparison of your own ([how](../compare.md)).

What is compared are recipes. Through the LLM all of them learn from the same questions about coloured shapes and drawn
scenes. Some have a stage `warm` before, in which the joint alone learns names and captions of pictures by contrast:
that costs few operations, and the others never see it. Of `{tree["baseline"]}` a run is
{stages(tree)}.

- {rest}"""


def stages(tree: dict[str, Any]) -> str:
    """How long the baseline's stages are."""
    of = {setting["name"]: setting["values"].get(tree["baseline"]) for setting in tree["settings"]}
    told = [
        f"{of[f'length of stage {name}']} of {of[f'samples per step of stage {name}']} in `{name}`"
        for name in str(of["stages"]).split(", ")
    ]
    return ", ".join(told)


def main(words: Sequence[str] | None = None) -> int:
    options = options_of(words)
    names = options.joints if options.tiny else dict.fromkeys([JOINTS[0], *options.joints])
    joints = [recipe(name) for name in names]
    if options.prepare:
        prepare(joints, options)
    else:
        grow(joints, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
