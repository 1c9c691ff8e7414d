"""MMMU's own rule for open answers (as lmms-eval carries it) on many replies, beside ours.

    python -m venv harness && harness/bin/pip install -c constraints.txt lmms-eval
    python benchmarks/open_answers_vs_mmmu.py --harness harness/bin/python [--json FILE]

Every reply is made of a beginning, an answer and an ending; every answer is asked about every reply. What the official
code says of each pair is kept in tests/evaluation/open_answers.json, which a test holds ours to.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import harness
from isthmus.evaluation.metrics import open_answers

BEGINNINGS = ("", "The answer is ", "x = ", "So it could be ", "We add both.\nThus the result is ", "No idea, ")
SAID = ("12", "1,234.5", "-0.333", "1.5e3", "a cat", "The Red Cat", "B", "12.004", "")
ENDINGS = ("", ".", " metres", "\nThat is final")
TRUTHS = (["12"], ["1234.5"], ["-0.33"], ["1500", "fifteen hundred"], ["cat"], ["red cat"], ["b"], ["12.00"], ["2"])
THEIRS = """
import importlib.util, json, pathlib, shutil, sys, tempfile
from unittest.mock import MagicMock
folder = pathlib.Path(next(p for p in sys.path if (pathlib.Path(p) / "lmms_eval").is_dir())) / "lmms_eval/tasks/mmmu"
for name in ("llm_judge", "tasks", "tasks._task_utils", "tasks._task_utils.file_utils",
             "tasks._task_utils.mmmu_mcq_utils", ""):  # judges and the harness around, which the rule does not use
    sys.modules[f"lmms_eval.{name}".rstrip(".")] = MagicMock()
with tempfile.TemporaryDirectory() as scratch:
    copy = shutil.copy(folder / "utils.py", scratch)
    (pathlib.Path(scratch) / "_default_template_yaml").write_text("{}")  # the module reads it; the wheel lacks it
    spec = importlib.util.spec_from_file_location("mmmu_utils", copy)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
cases = json.load(sys.stdin)
said = [bool(official.eval_open(truth, official.parse_open_response(reply))) for reply, truth in cases]
print("\\n" + json.dumps(said))
"""
KEPT = harness.HERE.parent / "tests" / "evaluation" / "open_answers.json"


def main() -> int:
    parser = harness.parser(__doc__, 1, "unused")
    parser.add_argument("--harness", required=True, help="the Python of the environment that has lmms-eval")
    options = parser.parse_args()
    replies = ["".join(parts) for parts in itertools.product(BEGINNINGS, SAID, ENDINGS)]
    cases = [(reply, truth) for reply in replies for truth in TRUTHS]
    surroundings = {**os.environ, "OPENAI_API_KEY": "EMPTY", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [options.harness, "-c", THEIRS], input=json.dumps(cases), capture_output=True, text=True, env=surroundings
    )
    if done.returncode:
        raise SystemExit(f"lmms-eval failed:\n{done.stderr[-3000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [open_answers.right(reply, truth) for reply, truth in cases]
    differ = [case for case, one, other in zip(cases, ours, theirs) if one != other]
    KEPT.write_text(json.dumps({"replies": replies, "truths": TRUTHS, "right": "".join("01"[one] for one in theirs)}))
    print(f"{len(cases)} pairs, {sum(theirs)} right by the official code; ours differs on {len(differ)}: {differ[:5]}")
    found = {"pairs": len(cases), "right": sum(theirs), "differ": differ, "machine": harness.machine()}
    harness.save("open_answers", found, options)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
