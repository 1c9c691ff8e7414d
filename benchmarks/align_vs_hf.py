"""Stage `align` of ours against transformers' Trainer with LlavaForConditionalGeneration: only the projector trains.

    python benchmarks/align_vs_hf.py [--steps N] [--repeats N] [--sizes tiny small base] [--json FILE]

Same weights (theirs, imported), data, order, batches, optimizer, schedule and clipping on both sides, SmolLM2-135M
under a random CLIP tower of three sizes. Every variant runs in a process of its own, and variants take turns within a
repeat. Before any speed is quoted, loss curves must agree: to 1e-4 over 50 float32 steps of a small model, then to 1e-4
(float32) or 2e-2 (bfloat16) over the measured steps themselves; otherwise the speed is withheld and the exit code is 1.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness

WORKER = harness.HERE / "align_worker.py"
SIZES = ("tiny", "small", "base")
CHECK_STEPS, CHECK_BATCH = 50, 8
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of two losses at the same step."""
MOVED = 0.05
"""A curve that moves less than this between its ends could agree without having learned."""
WARM = 2
"""Steps that are not timed; the last one is not either."""


@dataclass(frozen=True)
class Variant:
    """One way to train; `peer` variants are theirs."""

    name: str
    dtype: str
    side: str = "ours"
    weights: str = "float32"
    """Of theirs: how frozen parts are stored; under bfloat16 both sides compute with autocast."""
    cached: bool = False
    attention: str = "isthmus"
    head: str = "supervised"

    @property
    def peer(self) -> bool:
        return self.side == "theirs"


VARIANTS = (
    Variant("HF float32", "float32", "theirs"),
    Variant("ours", "float32"),
    Variant("ours, cache", "float32", cached=True),
    Variant("HF bfloat16", "bfloat16", "theirs", "bfloat16"),
    Variant("HF bf16=True alone", "bfloat16", "theirs"),
    Variant("ours", "bfloat16"),
    Variant("ours, cache", "bfloat16", cached=True),
)
ABLATIONS = tuple(
    Variant(f"ours, cache, {what}", dtype, cached=True, **change)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16")
    for what, change in (
        ("sdpa", {"attention": "sdpa"}),
        ("full head", {"head": "full"}),
        ("sdpa, full head", {"attention": "sdpa", "head": "full"}),
    )
)
"""Ours with one gain taken away at a time, and both."""


@dataclass(frozen=True)
class Agreement:
    """How far a loss curve is from the peer's, and whether that is close enough."""

    difference: float
    tolerance: float
    moved: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def compare(peer: Sequence[float], found: Sequence[float], tolerance: float) -> Agreement:
    """Two loss curves of equal length."""
    if len(peer) != len(found):
        raise SystemExit(f"{len(found)} steps were trained, the peer trained {len(peer)}")
    moved = statistics.mean(peer[:5]) - statistics.mean(peer[-5:])
    return Agreement(max(abs(a - b) for a, b in zip(peer, found)), tolerance, moved)


@dataclass
class Bench:
    """One model size: its prepared folder and how it is run."""

    size: str
    folder: Path
    steps: int
    batch: int
    perturb: float
    made: dict[str, Any]

    @classmethod
    def prepare(cls, size: str, folder: Path, steps: int, batch: int, perturb: float) -> Bench:
        job = {"side": "prepare", "size": size, "folder": str(folder), "steps": steps, "batch": batch}
        folder.mkdir()
        return cls(size, folder, steps, batch, perturb, harness.child(WORKER, job))

    @property
    def probe(self) -> int:
        """The timed step whose batch has the median width: there the share of the ceiling is measured."""
        timed = sorted(range(WARM, self.steps - 1), key=lambda step: self.made["widths"][step])
        return timed[len(timed) // 2]

    def run(self, variant: Variant, ceiling: bool) -> dict[str, Any]:
        """Train once: losses, seconds per step, memory."""
        job = asdict(variant) | {"folder": str(self.folder), "steps": self.steps, "batch": self.batch}
        job |= {"placeholder": self.made["placeholder"], "probe": self.probe, "ceiling": ceiling}
        return harness.child(WORKER, job | {"perturb": self.perturb})

    def speed(self, run: dict[str, Any]) -> dict[str, float]:
        """Rates over the timed steps of one run; `seconds` starts at step 1."""
        timed = run["seconds"][WARM - 1 :]
        supervised = sum(self.made["supervised"][WARM : self.steps - 1])
        rates = {
            "samples_per_second": self.batch * len(timed) / sum(timed),
            "supervised_tokens_per_second": supervised / sum(timed),
            "peak_mib": run["peak_mib"],
        }
        if run.get("pictures"):
            rates["pictures_cached_per_second"] = run["pictures"] / run["fill_seconds"]
            epoch = 1 / rates["samples_per_second"] + 1 / rates["pictures_cached_per_second"]
            rates["samples_per_second_with_filling"] = 1 / epoch
        if run["ceiling_seconds"] is not None:
            rates["ceiling_share"] = run["ceiling_seconds"] / run["seconds"][self.probe - 1]
        return rates


def check(folder: Path, perturb: float) -> dict[str, Any]:
    """The loss check that stands before everything: 50 float32 steps of a small model, with and without cache."""
    bench = Bench.prepare("check", folder, CHECK_STEPS, CHECK_BATCH, perturb)
    peer, *others = (bench.run(variant, ceiling=False) for variant in VARIANTS[:3])
    found = [compare(peer["losses"], other["losses"], TOLERANCE["float32"]) for other in others]
    learned = found[0].moved >= MOVED
    return {
        "steps": CHECK_STEPS,
        "agreements": {variant.name: each.plain() for variant, each in zip(VARIANTS[1:3], found)},
        "losses": {"HF": peer["losses"]} | {v.name: run["losses"] for v, run in zip(VARIANTS[1:3], others)},
        "holds": learned and all(each.holds for each in found),
        "learned": learned,
    }


def measure(bench: Bench, variants: Sequence[Variant], repeats: int) -> list[dict[str, Any]]:
    """All variants in turns, `repeats` times; each against the best peer of its dtype in the same repeat."""
    turns = [[bench.run(variant, ceiling=repeat == 0) for variant in variants] for repeat in range(repeats)]
    rows = []
    for place, variant in enumerate(variants):
        runs = [turn[place] for turn in turns]
        first = next(index for index, other in enumerate(variants) if other.peer and other.dtype == variant.dtype)
        agreement = compare(turns[0][first]["losses"], runs[0]["losses"], TOLERANCE[variant.dtype])
        row: dict[str, Any] = asdict(variant) | {"agreement": agreement.plain(), "losses": runs[0]["losses"]}
        rows.append(row)
        if not agreement.holds:
            row["refused"] = f"loss differs by {agreement.difference:.1e}, more than {agreement.tolerance:.0e}"
            continue
        speeds = [bench.speed(run) for run in runs]
        best = [_best_peer(bench, variants, turn, variant.dtype) for turn in turns]
        row |= {name: harness.Spread.of([speed[name] for speed in speeds if name in speed]) for name in speeds[0]}
        row["ratio"] = harness.Spread.of([s["samples_per_second"] / peer for s, peer in zip(speeds, best)])
        row["memory_ratio"] = row["peak_mib"].median / min(
            harness.Spread.of([turn[index]["peak_mib"] for turn in turns]).median
            for index, other in enumerate(variants)
            if other.peer and other.dtype == variant.dtype
        )
        row["seconds_per_step"] = [run["seconds"] for run in runs]
    return rows


def _best_peer(bench: Bench, variants: Sequence[Variant], turn: Sequence[dict[str, Any]], dtype: str) -> float:
    """Samples per second of the fastest peer in this dtype."""
    peers = [run for variant, run in zip(variants, turn) if variant.peer and variant.dtype == dtype]
    return max(bench.speed(run)["samples_per_second"] for run in peers)


# ---------------------------------------------------------------------------------------------- what is said

HEADER = ("tower", "dtype", "variant", "samples/s", "× best HF", "supervised tokens/s", "peak MiB", "× HF's", "of ceiling")


def lines(bench: Bench, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table rows of one tower."""
    tower = f"{bench.size} ({bench.made['tower_parameters'] / 1e6:.0f} M)"
    said = []
    for row in rows:
        what = [tower, row["dtype"], row["name"]]
        if "refused" in row:
            said.append([*what, "refused", row["refused"], "", "", "", ""])
            continue
        said.append(
            [
                *what,
                str(row["samples_per_second"]),
                str(row["ratio"]),
                f"{row['supervised_tokens_per_second'].median:,.0f}",
                f"{row['peak_mib'].median:,.0f}",
                f"{row['memory_ratio']:.2f}",
                f"{row['ceiling_share'].median:.0%}",
            ]
        )
        if "samples_per_second_with_filling" in row:
            rate = row["samples_per_second_with_filling"]
            said.append([*what[:2], "  first epoch, filling the cache", str(rate), "", "", "", "", ""])
    return said


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 10, "timed steps per run")
    made.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="vision towers")
    made.add_argument("--batch", type=int, default=16, help="samples per step")
    made.add_argument("--ablate", nargs="*", choices=SIZES, default=["small"], help="towers with the ablation rows")
    made.add_argument("--perturb", type=float, default=0.0, help="added to our joint's bias: the check must refuse")
    options = made.parse_args(arguments)
    where = harness.machine()
    print(harness.in_words(where), flush=True)
    steps, batch = options.steps + WARM + 1, options.batch
    sizes: list[str] = options.sizes
    if options.tiny:
        steps, batch, sizes = 3 + WARM + 1, 4, ["check"]
    result: dict[str, Any] = {"machine": where, "steps": options.steps, "batch": batch, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="isthmus-align-") as scratch:
        result["check"] = checked = check(Path(scratch) / "loss-check", options.perturb)
        print(f"loss check, {CHECK_STEPS} float32 steps: {_in_words(checked)}", flush=True)
        for size in sizes if checked["holds"] else ():
            bench = Bench.prepare(size, Path(scratch) / size, steps, batch, options.perturb)
            variants = VARIANTS + (ABLATIONS if size in options.ablate else ())
            rows = measure(bench, variants, options.repeats)
            result["sizes"][size] = {"model": bench.made, "rows": rows}
            print(f"median (smallest–largest) of {options.repeats} repeats of {steps - WARM - 1} steps of {batch} samples")
            print(harness.table(HEADER, lines(bench, rows)), flush=True)
            harness.save("align_vs_hf", result, options.json)
    print(harness.save("align_vs_hf", result, options.json))
    refused = [row for size in result["sizes"].values() for row in size["rows"] if "refused" in row]
    return int(bool(refused) or not checked["holds"])


def _in_words(checked: dict[str, Any]) -> str:
    """The loss check in one line."""
    differences = ", ".join(f"{name} {each['difference']:.1e}" for name, each in checked["agreements"].items())
    moved = f"the loss fell by {next(iter(checked['agreements'].values()))['moved']:.2f}"
    return f"largest differences {differences}; {moved}; {'agreed' if checked['holds'] else 'REFUSED, no speed is quoted'}"


if __name__ == "__main__":
    sys.exit(main())
