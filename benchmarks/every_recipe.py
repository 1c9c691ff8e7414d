"""Every recipe on embedded parts for a minute: does it train, is it saved, does it load and answer?

    python benchmarks/every_recipe.py [--minutes 1] [--recipes NAME ...] [--collect] [--json FILE]

Runs `isthmus train NAME --minutes 1` for one recipe after another into `runs/every/NAME`, with few questions of its
first task, then loads the model that is left in a process of its own and asks it something. A recipe that came through
is not run again, one that was interrupted goes on, and `--collect` only reads what is there. With `--recipes`, what the
file of numbers holds of others stays. A minute is too short to
learn much: what is shown is that every recipe works, and what a minute of it holds on this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

ITEMS = 4
"""Questions of the one task that is measured."""
OUTCOME = "outcome.json"
HEADER = ("recipe", "stage", "trained, of the whole", "steps", "s per step", "loss, first → last", "answers", "minutes")


def names() -> list[str]:
    """The recipes on embedded parts."""
    from isthmus import recipes

    return [name for name, build in recipes.BOOK.items() if build().llm.architecture is None]


def overrides(name: str) -> list[str]:
    """What leaves a recipe one task, with few questions."""
    from isthmus.cli.options import recipe_of

    first = recipe_of(name, None).eval[0].but(limit=ITEMS, controls=[])
    return [f"eval={json.dumps([first.model_dump(mode='json')])}"]


def run(name: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Train one recipe, or go on with it, and look at what is left."""
    began = time.monotonic()
    command = ["train", name, *overrides(name), "--minutes", str(minutes), "--out", str(folder)]
    done = subprocess.run([sys.executable, "-m", "isthmus", *command], capture_output=True, text=True)
    found: dict[str, Any] = {"recipe": name, "exit": done.returncode, "minutes": (time.monotonic() - began) / 60}
    if done.returncode:
        return found | {"said": (done.stdout + done.stderr)[-2000:]}
    try:
        return found | harness.child(harness.HERE / "every_worker.py", {"folder": str(folder)})
    except SystemExit as failed:
        return found | {"exit": 1, "said": str(failed)}


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The outcomes that are there, in order."""
    files = [folder / OUTCOME for folder in folders]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def others(file: Path, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The outcomes of other recipes that an earlier call wrote down."""
    known = json.loads(file.read_text())["recipes"] if file.is_file() else []
    return [found for found in known if found["recipe"] not in folders]


def lines(found: dict[str, Any]) -> list[list[str]]:
    """The rows of a recipe: one per stage."""
    if found["exit"]:
        cause = next((line for line in found["said"].splitlines() if line.startswith("error")), "")
        return [[f"`{found['recipe']}`", "", "", "", "", f"exit code {found['exit']}: {cause}", "no", ""]]
    rows = []
    for stage in found["stages"]:
        share = f"{stage['trained'] / 1e6:,.2f} M ({stage['trained'] / stage['whole']:.2%})"
        loss = f"{stage['first']:.2f} → {stage['last']:.2f}"
        rows.append(["", stage["stage"], share, str(stage["steps"]), f"{stage['seconds_per_step']:.2f}", loss, "", ""])
    rows[0][0] = f"`{found['recipe']}`"
    rows[-1][-2:] = ["yes" if found["answer"]["reply"] else "nothing", f"{found['minutes']:.1f}"]
    return rows


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=1.0, help="of training per recipe (1)")
    made.add_argument("--recipes", nargs="+", help="names or files, instead of all on embedded parts")
    made.add_argument("--out", type=Path, default=Path("runs/every"), help="parent folder of the runs")
    made.add_argument("--collect", action="store_true", help="only read what is there")
    made.add_argument("--json", type=Path, help="where the numbers go instead of results/every_recipe.json")
    made.set_defaults(tiny=False)
    options = made.parse_args(arguments)
    where = harness.machine()
    folders = {name: options.out / Path(name).name for name in options.recipes or names()}
    for name, folder in folders.items():
        if options.collect or any(not found["exit"] for found in collect([folder])):
            continue
        found = run(name, options.minutes, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOME).write_text(json.dumps(found, indent=1))
        print(f"{name}: exit code {found['exit']} after {found['minutes']:.1f} minutes", flush=True)
    outcomes = collect(list(folders.values()))
    places = {name: place for place, name in enumerate(names())}
    kept = others(options.json or harness.RESULTS / "every_recipe.json", folders) if options.recipes else []
    every = sorted([*kept, *outcomes], key=lambda found: places.get(found["recipe"], len(places)))
    print(harness.in_words(where), f"{options.minutes:g} minutes of training each\n", sep="\n")
    print(harness.table(HEADER, [line for found in every for line in lines(found)]))
    print(harness.save("every_recipe", {"machine": where, "minutes": options.minutes, "recipes": every}, options))
    return int(len(outcomes) < len(folders) or any(found["exit"] for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
