"""A process of its own that looks at what `every_recipe.py` trained: JOB and RESULT are JSON files."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import isthmus
from isthmus import config
from isthmus.evaluation.measure import build
from isthmus.planning import plan
from isthmus.speakers.local import Local
from isthmus.training.log import read_rows

EDGE = 0.1
"""Share of a stage's steps that its first and its last loss are means over."""


def look(folder: Path) -> dict[str, Any]:
    """What a finished run amounts to, and what its model answers."""
    recipe = config.parse(json.loads((folder / "run.json").read_text())["recipe"])
    planned = plan(recipe)
    stages = [
        {"stage": stage.name, "trained": stage.trained, "whole": planned.total, **curve(folder / stage.name)}
        for stage in planned.stages
    ]
    model = isthmus.load(folder / recipe.stages[-1].name / "model")
    ((task, _),) = build(recipe.eval[:1], recipe.seed)
    asked = task.items[0]
    reply = Local(model, max_new_tokens=12).say(asked.prompt.turns)
    answer = {"question": asked.words, "reply": reply, "reference": asked.answer}
    return {"fingerprint": recipe.fingerprint(), "stages": stages, "answer": answer}


def curve(folder: Path) -> dict[str, Any]:
    """Steps of a stage, seconds for one of them, and where its loss began and ended."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    edge = max(1, round(EDGE * len(rows)))
    return {
        "steps": len(rows),
        "seconds_per_step": statistics.median(row["seconds"] for row in rows),
        "first": statistics.mean(row["loss"] for row in rows[:edge]),
        "last": statistics.mean(row["loss"] for row in rows[-edge:]),
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(look(Path(job["folder"]))))
