"""How long a run needs until it has taken its first step again, over a data set of many rows in a file.

    python benchmarks/resume.py [--rows N] [--pictures N] [--steps N] [--repeats N] [--json FILE]

A toy model (its own time is all but nothing) is started on a fresh cache, stopped after some steps, and then resumed,
every time in a process of its own. Seconds count from `Run` to the end of the first optimizer step, imports apart. The
target is that of the project: 10 s at 100 000 rows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

TARGET = 10.0


def prepare(folder: Path, rows: int, pictures: int) -> None:
    """Toy parts, and `rows` conversations about `pictures` different pictures."""
    from PIL import Image

    from isthmus.training import toy

    recipe = toy.toy(folder / "toy", rows=1)
    images = folder / "images"
    images.mkdir()
    for number in range(pictures):
        colour = (number % 256, number // 256 % 256, number // 65536)
        Image.new("RGB", (toy.SIDE, toy.SIDE), colour).save(images / f"{number}.png")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            question = "<image>\nWhat is in this picture?" + " Be exact." * (number % 5)
            said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is number {number}."}]
            row = {"id": str(number), "image": f"{number % pictures}.png", "conversations": said}
            stream.write(json.dumps(row) + "\n")
    source = {"name": str(folder / "data.jsonl"), "images": str(images)}
    stage = recipe.stages[0].but(data=[source], budget={"epochs": 1}, batch_size=16, save_every=None)
    recipe.but(stages=[stage]).save(folder / "recipe.json")


def start(job: dict[str, Any]) -> dict[str, Any]:
    """Start or go on, and be interrupted after so many steps."""
    os.environ["ISTHMUS_HOME"] = str(Path(job["folder"]) / "home")
    import torch
    from rich.console import Console

    from isthmus.config import read
    from isthmus.training import log
    from isthmus.training.run import Run

    done: list[float] = []
    real = log.Metrics.write

    def write(self: log.Metrics, row: log.Row) -> None:
        real(self, row)
        if "loss" in row:
            done.append(time.perf_counter() - began)
            if len(done) == job["steps"]:
                signal.raise_signal(signal.SIGINT)

    log.Metrics.write = write  # type: ignore[method-assign]
    recipe = read(Path(job["folder"]) / "recipe.json")
    began = time.perf_counter()
    run = Run(recipe, Path(job["folder"]) / "run", torch.device("cpu"), Console(quiet=True))
    model = run.newborn()
    assert run.train(model, run.look(model)) is None
    return {"first step": done[0], "peak MiB": harness.peak_mib(), "steps": len(done)}


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 200, "optimizer steps before the run is stopped")
    made.add_argument("--rows", type=int, default=100_000, help="conversations in the file")
    made.add_argument("--pictures", type=int, default=10_000, help="different pictures that they are about")
    options = made.parse_args(arguments)
    if options.tiny:
        options.rows, options.pictures, options.steps, options.repeats = 400, 20, 3, 1
    where, script = harness.machine(), Path(__file__).resolve()
    with tempfile.TemporaryDirectory(prefix="isthmus-resume-") as scratch:
        prepare(Path(scratch), options.rows, options.pictures)
        fresh = harness.child(script, {"folder": scratch, "steps": options.steps})
        again = [harness.child(script, {"folder": scratch, "steps": 1}) for _ in range(options.repeats)]
    resumed = harness.Spread.of([one["first step"] for one in again])
    met = resumed.median < TARGET
    rows = [
        ["start with empty caches", f"{fresh['first step']:.3g}", f"{fresh['peak MiB']:.0f}"],
        ["resume", str(resumed), f"{max(one['peak MiB'] for one in again):.0f}"],
    ]
    print(harness.in_words(where))
    print(f"{options.rows:,} rows, {options.pictures:,} pictures, stopped after {options.steps} steps")
    print(harness.table(["until the first step is done", "seconds", "peak MiB"], rows))
    print(f"target for resume: {TARGET:g} s, {'met' if met else 'missed'}")
    result = {"machine": where, "rows": options.rows, "pictures": options.pictures, "stopped_after": options.steps}
    print(harness.save("resume", result | {"fresh": fresh, "resumed": resumed, "target": TARGET, "met": met}, options))
    return int(not met)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        Path(sys.argv[2]).write_text(json.dumps(start(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        sys.exit(main())
