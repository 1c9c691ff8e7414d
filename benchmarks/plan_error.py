"""How far `isthmus plan` is from real runs: parameters, operations, memory and time of recipes on the embedded parts.

    python benchmarks/plan_error.py [--cases llava:sft cogvlm:sft] [--steps 8] [--dtype bfloat16] [--json FILE]

A case is one stage of a recipe over its own first batches. The plan, the count and the timed run each have a process
of their own. Operations are those that PyTorch's FlopCounterMode counts in the real loop, with a formula for the CPU's
fused attention, which it lacks. Memory is the largest resident set of the steps, without the hand-over behind them,
which may read the base once more. Time is the process's own time between two questions to the feed, on one thread,
which a busy machine moves less than a clock; so that is the time that the plan is held against, and its calibration
reads the thread's own clock too.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

CASES = ("llava:warm", "llava:align", "llava:sft", "flamingo:sft", "cogvlm:sft")
TARGETS = {"trained": 0.0, "flops": 0.02, "peak": 0.10, "seconds": 0.25}
"""Largest relative error of each figure."""
UNITS = {"trained": 1.0, "flops": 1e9, "peak": 2**20, "seconds": 1e-3}
TITLES = {"trained": "trained", "flops": "GFLOP per step", "peak": "peak MiB", "seconds": "ms per step"}
SETTLED = 2


def recipe_of(job: dict[str, Any]) -> Any:
    """The recipe with this stage alone."""
    from isthmus import recipes

    recipe = recipes.named(job["recipe"])
    stage = recipe.stage(job["stage"]).but(budget={"steps": job["steps"]}, evaluate_every=None, save_every=None)
    if job["tiny"]:
        stage = stage.but(batch_size=4, data=[each.but(limit=16) for each in stage.data])
    return recipe.but(stages=(stage,), eval=(), dtype=job["dtype"])


def planned(job: dict[str, Any]) -> dict[str, float]:
    """What the plan says."""
    import torch

    from isthmus.forecast import forecast

    began = time.process_time()
    (stage,) = forecast(recipe_of(job), torch.device("cpu"), job["calibration"]).stages
    return {
        "trained": stage.trained,
        "flops": stage.flops,
        "peak": stage.peak,
        "seconds": stage.step_seconds or 0.0,
        "memory": stage.memory,
        "parts": stage.seconds,
        "planning": time.process_time() - began,
    }


def ran(job: dict[str, Any]) -> dict[str, float]:
    """The same of a real run; with `count`, its operations in place of its time."""
    import torch
    from rich.console import Console
    from torch.utils.flop_counter import FlopCounterMode

    from isthmus.training import loop, machine
    from isthmus.training.run import Feed, Run, mix_of

    recipe, cpu, folder = recipe_of(job), torch.device("cpu"), Path(job["folder"])
    (stage,) = recipe.stages
    run = Run(recipe, folder, cpu, Console(quiet=True))
    model = run.newborn()
    look = run.look(model)
    collator = model.processor.collator(look, stage.template, max_length=stage.max_length, overlong=stage.overlong)
    feed = Timed(Feed(stage, mix_of(stage, recipe.seed), collator, recipe.seed))
    for step in range(job["steps"]):
        feed(step, 0)  # pictures are encoded, and samples made, before anything is measured
    machine.ceiling(cpu, run.dtype, folder / stage.name / "machine.json")
    feed.asked.clear()
    train = lambda: loop.run_stage(  # noqa: E731
        model, stage, feed, folder / stage.name, steps=job["steps"], device=cpu, dtype=run.dtype, console=run.console
    )
    if job["count"]:
        with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
            train()
        return {"flops": counter.get_total_flops() / job["steps"]}
    train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    times = [later - earlier for earlier, later in zip(feed.asked[SETTLED:], feed.asked[SETTLED + 1 :])]
    rows = [json.loads(line) for line in (folder / stage.name / "metrics.jsonl").read_text().splitlines()]
    peak = 1e9 * max(row["memory_gb"] for row in rows if "memory_gb" in row)
    return {"trained": trained, "peak": peak, "seconds": statistics.mean(times), "each": times}


class Timed:
    """A feed that notes the process's own time whenever it is asked for a step."""

    def __init__(self, feed: Any):
        self.feed, self.micros = feed, feed.micros
        self.asked: list[float] = []

    def __call__(self, step: int, micro: int) -> Any:
        if not micro:
            self.asked.append(time.process_time())
        return self.feed(step, micro)


def formulas() -> dict[Any, Callable[..., int]]:
    """Operations of the CPU's fused attention: two products forward, five backward, as PyTorch counts the others."""
    import torch
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *more: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *more: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def case(name: str, options: Any) -> dict[str, Any]:
    """Plan and run of one case, with the relative errors."""
    recipe, _, stage = name.partition(":")
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
        job = {"recipe": recipe, "stage": stage, "steps": options.steps, "dtype": options.dtype, "tiny": options.tiny}
        job |= {"calibration": 0.2 if options.tiny else 1.0}
        plan = harness.child(Path(__file__), job | {"what": "plan"})
        counted = harness.child(Path(__file__), job | {"what": "run", "count": True, "folder": f"{folder}/count"})
        was = harness.child(Path(__file__), job | {"what": "run", "count": False, "folder": f"{folder}/time"})
    was |= counted
    errors = {figure: plan[figure] / was[figure] - 1 for figure in TARGETS}
    met = {figure: abs(errors[figure]) <= limit for figure, limit in TARGETS.items()}
    return {"case": name, "planned": plan, "was": was, "errors": errors, "met": met}


def lines(found: dict[str, Any]) -> list[str]:
    """A row of the table: planned / was (error)."""
    cells = [found["case"]]
    for figure, unit in UNITS.items():
        pair = f"{found['planned'][figure] / unit:,.4g} / {found['was'][figure] / unit:,.4g}"
        missed = "" if found["met"][figure] else " missed"
        cells.append(f"{pair} ({found['errors'][figure]:+.1%}{missed})")
    return cells


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, 8, "optimizer steps of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="RECIPE:STAGE on the embedded parts")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="arithmetic of base parts")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.cases, options.steps = ["llava:align"], 4
    os.environ["OMP_NUM_THREADS"] = "1"
    where = harness.machine()
    found: list[dict[str, Any]] = []
    for name in options.cases:
        found.append(case(name, options))
        saved = harness.save("plan_error", {"machine": where, "targets": TARGETS, "cases": found}, options)
    header = ["case", *(f"{TITLES[figure]}, planned / was" for figure in UNITS)]
    print(harness.in_words(where), harness.table(header, [lines(each) for each in found]), sep="\n\n")
    print("saved to", saved)
    return 0 if all(all(each["met"].values()) for each in found) else 1


def worker(given: str, result: str) -> int:
    job = json.loads(Path(given).read_text())
    Path(result).write_text(json.dumps(planned(job) if job["what"] == "plan" else ran(job)))
    return 0


if __name__ == "__main__":
    child = len(sys.argv) == 3 and sys.argv[1].endswith(".json")
    sys.exit(worker(*sys.argv[1:]) if child else main())
