"""What the papers say that their joints do, beside what came out here, as `docs/results/claims.md`.

    python benchmarks/claims.py [GROUP ...] [--seeds 4] [--budget 30e12flops] [--items 150] [--jobs 2]

A claim compares two recipes that differ in what it is about. Some are read from the house table's numbers; the others
come in groups, each of which is a comparison of its own that goes on where it stopped: same data, tasks and budget as
the house table's, every recipe at its own learning rates. Without a group the page is written from what is finished.

What decides was fixed before anything ran: easy-VQA's official test without its yes/no questions, which are what the
small models here can learn. A claim is confirmed or reversed where the difference would come out the same way with
other seeds and other questions (after Holm's correction over all claims measured); otherwise the data do not decide.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import house_table
from isthmus.evaluation.seeds import Gap, holm
from isthmus.files import write_text

PAGE = harness.HERE.parent / "docs/results/claims.md"
HOUSE = "house table"
LEVEL = 0.05
DECISIVE = "easy-VQA without yes/no"


@dataclass(frozen=True)
class Claim:
    """That `other` is worse than `base`, or at least not better, by whom and in which comparison."""

    says: str
    paper: str
    group: str
    base: str
    other: str

    @property
    def command(self) -> str:
        """What measures it."""
        script = f"house_table.py {self.other}" if self.group == HOUSE else f"claims.py {self.group}"
        return f"python benchmarks/{script}"


CLAIMS = (
    Claim("an MLP is at least as good as one Linear", "2310.03744", HOUSE, "llava", "llava-linear"),
    Claim("training the joint alone first helps", "2304.08485", HOUSE, "llava", house_table.ONE_STAGE),
    Claim("gates that start shut learn better than open ones", "2303.16199", "gates", "llama-adapter", "open-gates"),
    Claim("BLIP-2's first stage is needed", "2301.12597", "first-stage", "blip2", "blip2-second"),
    Claim("queries that hear the question do better", "2305.06500", "question", "instructblip", "instructblip-blind"),
)


def _gates() -> list[Any]:
    from isthmus.recipes.llama_adapter import llama_adapter

    shut = llama_adapter()
    return [shut, llama_adapter(gate=1.0).but(name="open-gates", about=f"{shut.about}, its gates open at birth")]


def _named(*names: str) -> Callable[[], list[Any]]:
    return lambda: [house_table.recipe(name) for name in names]


GROUPS: Mapping[str, Callable[[], list[Any]]] = {
    "gates": _gates,
    "first-stage": _named("blip2", "blip2-second"),
    "question": _named("instructblip", "instructblip-blind"),
}
ELSEWHERE = """## Measured on pages of their own

- **VDEP** is better than LLaVA at equal steps: [no difference told](vdep.md) at this size.
- **CogVLM** is better than a shallow joint at equal data: no sign of it in [the house table](joints.md): .27, where
  `llava-sft-only`, which has no stage for the joint alone either, has .33. The two were not compared with each other.
- **LION**'s tags help, and its learned word softens wrong ones: [tags help naming and captions](lion.md), half of them
  wrong as well; of the learned word no difference is told.
- **EE-MLLM** reads long pictures faster: [so it does](../systems/ee_mllm.md), and at few tokens it gains little.

## Hold by construction

Tests pin these to the bit or to rounding; no training could change them.

- The LLM's answers to text stay as they were in **Flamingo** and **CogVLM**, before and after training.
- **Flamingo**, **LLaMA-Adapter** and **LION**'s aggregator start as the model without them.
- **EE-MLLM-F** has no parameters that LLaVA has not.

## Not measured yet

The pages of the systems name the command for each of these: P-Former at little data, MiniGPT-4's second stage, Flamingo
over shots, Qwen-VL's places, boxes of Shikra against Kosmos-2, ALBEF's contrast before fusion. Of the claims that the
table above is for:

"""


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("groups", nargs="*", default=[], help=f"which to compare, of {', '.join(GROUPS)}")
    made.add_argument("--seeds", type=int, default=4)
    made.add_argument("--budget", default="30e12flops", help="of each run, as `isthmus compare` reads it")
    made.add_argument("--items", type=int, default=150, help="per task")
    made.add_argument("--jobs", type=int, default=2, help="runs at a time")
    made.add_argument("--out", type=Path, default=Path("runs/claims"))
    made.add_argument("--page", type=Path, default=PAGE)
    made.add_argument("--numbers", type=Path, default=harness.RESULTS, help="folder of each group's numbers")
    made.set_defaults(tiny=False)
    return made.parse_args(words)


def make(group: str, options: argparse.Namespace) -> None:
    """Compare a group's recipes and keep the numbers."""
    from rich.console import Console

    from isthmus.comparing.compare import compare

    folder = options.out / group
    told = house_table.settings(argparse.Namespace(**{**vars(options), "out": folder}))
    compare(GROUPS[group](), **{**told, "factors": ()}, console=Console())
    shutil.copy(folder / "compare.json", numbers(group, options))


def numbers(group: str, options: argparse.Namespace) -> Path:
    """Where a comparison's numbers are kept."""
    name = "joints" if group == HOUSE else f"claims_{group.replace('-', '_')}"
    return options.numbers / f"{name}.json"


# ---------------------------------------------------------------------------------------------- the page


def found(claim: Claim, options: argparse.Namespace) -> tuple[dict[str, Any], Gap] | None:
    """The comparison that a claim was measured in, and how much better `other` came out than `base`."""
    file = numbers(claim.group, options)
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"names": []}
    if not {claim.base, claim.other} <= set(tree["names"]):
        return None
    assert tree["baseline"] == claim.base, f"{file} compares with {tree['baseline']}"
    cells = next(line["cells"] for line in tree["lines"] if line["label"] == DECISIVE)
    return tree, Gap(**cells[claim.other]["gap"])


def page(options: argparse.Namespace) -> str:
    """All claims, those that were measured with what came out."""
    measured = {claim: it for claim in CLAIMS if (it := found(claim, options))}
    adjusted = dict(zip(measured, holm([gap.p for _, gap in measured.values()])))
    rows = [_row(claim, *measured[claim], adjusted[claim]) for claim in measured]
    header = ["claim", "paper", "here", "difference", "", "of what"]
    left = "".join(f"- {claim.says}: `{claim.command}`\n" for claim in CLAIMS if claim not in measured)
    return f"""# What the papers say, and what came out here

Written by `python benchmarks/claims.py`; do not edit it by hand. These are findings about SmolLM2-135M and
EfficientNet-Lite0 after minutes of training: they say whether a claim shows already at this size, not whether it is
true.

A difference is that of accuracies in {DECISIVE}, seed by seed and on the same items, with the wider of
two 95 % intervals (over seeds, over items). *Confirmed* and *reversed* stand after Holm's correction over all rows;
otherwise the data do not decide. The joint alone is trained against names and captions by contrast first, then
through the LLM: what helps there is mostly the contrast, on data of its own, which is Isthmus's and not LLaVA's.

{harness.table(header, rows) if rows else "Nothing is finished yet."}

{ELSEWHERE}{left or "- nothing is left"}"""


def _row(claim: Claim, tree: Mapping[str, Any], gap: Gap, p: float) -> list[str]:
    verdict = "not decided" if p > LEVEL else "**confirmed**" if gap.value < 0 else "**reversed**"
    paper = f"[{claim.paper}](https://arxiv.org/abs/{claim.paper})"
    what = f"{len(tree['seeds'])} seeds of {tree['budget']}, {claim.group}"
    low, high = gap.ends
    here = f"`{claim.other}` minus `{claim.base}`"
    return [claim.says, paper, here, f"{gap.value:+.2f} ({low:+.2f} to {high:+.2f})", verdict, what]


def main(words: Sequence[str] | None = None) -> int:
    options = options_of(words)
    for group in options.groups:
        make(group, options)
    write_text(options.page, page(options))
    print(options.page.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
