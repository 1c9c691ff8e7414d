"""Our scores of raw text beside those of lm-evaluation-harness, on one LLM and the same requests.

    python -m venv harness && harness/bin/pip install -c constraints.txt "lm-eval[hf]"
    python benchmarks/text_vs_lm_eval.py --harness harness/bin/python [--llm FOLDER] [--steps ITEMS] [--json FILE]

Python's own reference texts are read whole (its `loglikelihood_rolling`, ours `perplexity`), and four sentences are
told to go on (its `loglikelihood`, ours `next-sentence`); both sum the log-probabilities of the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness
from isthmus import parts
from isthmus.config import TaskConfig
from isthmus.evaluation import prose, text
from isthmus.evaluation.catalogue import named

THEIRS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
job = json.load(open(sys.argv[1]))
llm = HFLM(pretrained=job["llm"], device="cpu", dtype="float32", batch_size=4, max_length=job["window"])
def ask(kind, arguments):
    requests = [Instance(request_type=kind, doc={}, arguments=tuple(one), idx=n) for n, one in enumerate(arguments)]
    return getattr(llm, kind)(requests)
rolling = ask("loglikelihood_rolling", [(one,) for one in job["texts"]])
pairs = [value for value, greedy in ask("loglikelihood", job["pairs"])]
json.dump({"texts": [float(one) for one in rolling], "pairs": [float(one) for one in pairs]}, open(sys.argv[2], "w"))
"""


def requests(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Texts, and contexts with their continuations."""
    asked = {"options": {"text": text.DOCS}, "limit": count}
    read, chosen = (named(name)(TaskConfig(name=name, **asked), 0) for name in ("perplexity", "next-sentence"))
    pairs = [(item.prompt.turns[-1].text, f" {choice}") for item in chosen.items for choice in item.choices]
    return [item.prompt.turns[-1].text for item in read.items], pairs


def theirs(python: str, job: dict[str, object]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        given, found = Path(scratch) / "job.json", Path(scratch) / "found.json"
        given.write_text(json.dumps(job))
        surroundings = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-c", THEIRS, str(given), str(found)], capture_output=True, text=True, env=surroundings
        )
        if done.returncode:
            raise SystemExit(f"lm-eval failed:\n{done.stderr[-3000:]}")
        return json.loads(found.read_text())


def main() -> int:
    parser = harness.parser(__doc__, 12, "texts, and contexts with four continuations each")
    parser.add_argument("--harness", required=True, help="the Python of the environment that has lm-eval")
    parser.add_argument("--llm", default=parts.EMBEDDED_LLM, help="a folder, or the embedded LLM")
    options = parser.parse_args()
    folder, window = parts.folder(options.llm), 512
    texts, pairs = requests(2 if options.tiny else options.steps)
    other = theirs(options.harness, {"llm": str(folder), "window": window, "texts": texts, "pairs": pairs})
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reader = prose.Prose(prose.without_joint(llm), AutoTokenizer.from_pretrained(folder), "cpu", window, 4)
    ours = {
        "texts": [told.value for told in reader.texts(texts)],
        "pairs": [told.value for told in reader.continuations(pairs)],
    }
    apart = {
        kind: max(abs(one - two) / abs(two) for one, two in zip(ours[kind], other[kind], strict=True)) for kind in ours
    }
    best = [[values[n : n + 4].index(max(values[n : n + 4])) for n in range(0, len(pairs), 4)]
            for values in (ours["pairs"], other["pairs"])]  # fmt: skip
    agree = sum(one == two for one, two in zip(*best))
    found = {"texts": len(texts), "pairs": len(pairs), "relative_difference": apart, "same_choice": agree}
    print(f"{len(texts)} texts and {len(pairs)} continuations; largest relative difference {apart}")
    print(f"the same of four continuations is the likeliest in {agree} of {len(pairs) // 4}")
    harness.save("text_vs_lm_eval", {**found, "machine": harness.machine()}, options)
    return int(max(apart.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
