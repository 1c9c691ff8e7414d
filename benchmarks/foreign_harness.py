"""A served model evaluated by lmms-eval, and both scorers on the very same replies.

    python -m venv harness && harness/bin/pip install -c constraints.txt lmms-eval
    python benchmarks/foreign_harness.py MODEL --harness harness/bin/python [--steps ITEMS] [--json FILE]

The model answers through `isthmus serve`; lmms-eval (its `openai` model, unmodified, in an environment of its own) asks
easy-VQA's official test questions by a task YAML of ours. Then its `exact_match` is compared with our `exact` item by
item, and its replies with those that the model gives without a server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import yaml

import harness
import isthmus
from isthmus.config import TaskConfig
from isthmus.data.media import open_image
from isthmus.evaluation.answers import match
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.tasks import Item
from isthmus.speakers.local import Local
from isthmus.types import Image

NAME, WORDS = "served", 8
"""What the model is called, and the longest answer in tokens."""


def task_folder(folder: Path, items: list[Item]) -> None:
    """A task of lmms-eval: pictures and questions in a Parquet file, its YAML, and the functions that it names."""
    rows = [
        {"id": item.prompt.id, "image": _png(item), "question": item.words.strip(), "answer": item.answer}
        for item in items
    ]
    form = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=form).to_parquet(folder / "items.parquet")
    task = {
        "task": "isthmus_items",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": WORDS, "temperature": 0},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    }
    functions = "doc_to_visual: !function utils.pictures\ndoc_to_text: !function utils.question\n"
    (folder / "items.yaml").write_text(yaml.safe_dump(task) + functions)
    shutil.copy(harness.HERE / "lmms_eval_task.py", folder / "utils.py")


def _png(item: Item) -> dict[str, Any]:
    (shown,) = (medium for medium in item.prompt.media if isinstance(medium, Image))
    raw = BytesIO()
    open_image(shown.source, item.prompt.id).save(raw, "png")
    return {"bytes": raw.getvalue(), "path": None}


def ask(python: str, folder: Path, address: str) -> list[dict[str, Any]]:
    """lmms-eval's own record of every item.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    command = [
        python, str(harness.HERE / "lmms_eval_run.py"), "--model", "openai",
        "--model_args", f"model_version={NAME},base_url={address}/v1,num_concurrent=4,max_retries=3",
        "--tasks", "isthmus_items", "--include_path", str(folder), "--batch_size", "1",
        "--log_samples", "--output_path", str(folder / "out"),
    ]  # fmt: skip
    surroundings = {**os.environ, "OPENAI_API_KEY": "EMPTY", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    found = sorted((folder / "out").rglob("*samples*.jsonl"))
    if done.returncode or not found:
        raise SystemExit(f"lmms-eval failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in found[-1].read_text().splitlines()]
    if failed := [record for record in records if "REQUEST_FAILED" in str(record["filtered_resps"])]:
        raise SystemExit(f"{len(failed)} requests failed, the first: {failed[0]['filtered_resps']}")
    return records


def wait(address: str, server: subprocess.Popen[Any]) -> None:
    """Until the server answers."""
    for _ in range(240):
        if server.poll() is not None:
            raise SystemExit("the server ended")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def main() -> int:
    parser = harness.parser(__doc__, 64, "items")
    parser.add_argument("model", help="a directory that `isthmus train` wrote")
    parser.add_argument("--harness", required=True, help="the Python of the environment that has lmms-eval")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    count = 4 if options.tiny else options.steps
    items = list(named("easy-vqa")(TaskConfig(name="easy-vqa", limit=count), 0).items)
    address = f"http://127.0.0.1:{options.port}"
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        task_folder(Path(scratch), items)
        serve = [sys.executable, "-m", "isthmus", "serve", options.model, "--name", NAME, "--port", str(options.port)]
        server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait(address, server)
            records = ask(options.harness, Path(scratch), address)
        finally:
            server.terminate()
            server.wait()
    alone = Local(isthmus.load(options.model), max_new_tokens=WORDS).say_all([item.prompt for item in items])
    rows = []
    for record in records:
        item, solo = items[record["doc_id"]], alone[record["doc_id"]]
        reply = record["filtered_resps"][0] if isinstance(record["filtered_resps"], list) else record["filtered_resps"]
        rows.append({"id": item.prompt.id, "reply": reply, "alone": solo, "answer": item.answer,
                     "theirs": bool(record["exact_match"]), "ours": match(reply, item.answer)})  # fmt: skip
    found = {
        "items": len(rows),
        "accuracy": sum(row["theirs"] for row in rows) / len(rows),
        "scorers_agree": sum(row["theirs"] == row["ours"] for row in rows),
        "replies_equal": sum(row["reply"] == row["alone"] for row in rows),
        "rows": rows,
        "machine": harness.machine(),
    }
    print(f"{found['items']} items, accuracy {found['accuracy']:.3f} by lmms-eval")
    print(f"scorers agree on {found['scorers_agree']}; replies as without a server: {found['replies_equal']}")
    harness.save("foreign_harness", found, options)
    return int(found["scorers_agree"] < found["items"])


if __name__ == "__main__":
    sys.exit(main())
