"""Stage `align` of ours against transformers' Trainer with LlavaForConditionalGeneration: only the projector trains.

    python benchmarks/align_vs_hf.py [--steps N] [--repeats N] [--sizes tiny small base] [--json FILE]

Same weights (theirs, imported), data, order, batches, optimizer, schedule and clipping on both sides, SmolLM2-135M
under a random CLIP tower of three sizes. Every variant runs in a process of its own, and variants take turns within a
repeat. Before any speed is quoted, loss curves must agree: to 1e-4 over 50 float32 steps of a small model, then over
the measured steps themselves, to 1e-4 in float32, and in bfloat16 to twice the distance of their own curve from their
float32 one. Otherwise the speed is withheld and the exit code is 1.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import align_worker
import harness

WORKER = harness.HERE / "align_worker.py"
SIZES = ("tiny", "small", "base")
CHECK_DISTINCT, CHECK_BATCH = 10, 8
"""The loss check goes five times over ten batches: 50 steps."""
TOLERANCE = 1e-4
"""Largest difference of two float32 losses at the same step."""
ROUNDING, CHAOS = 2e-2, 0.2
"""The tolerance in bfloat16 is twice the distance of their bfloat16 curve from their float32 one, within these bounds:
beyond the upper one, rounding decides what is learned and curves say nothing."""
RATES = {"check": 1e-3}
"""Learning rate by size, else `RATE`: low enough that a rounding error stays one over the steps that are measured."""
RATE = 1e-4
MOVED = 0.05
"""A loss check whose curve falls less than this over the same batches could agree without having learned."""
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

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def compare(peer: Sequence[float], found: Sequence[float], tolerance: float) -> Agreement:
    """Two loss curves of equal length."""
    if len(peer) != len(found):
        raise SystemExit(f"{len(found)} steps were trained, the peer trained {len(peer)}")
    return Agreement(max(abs(a - b) for a, b in zip(peer, found)), tolerance)


@dataclass
class Bench:
    """One model size: its prepared folder, and how it is run: `steps` over `distinct` batches."""

    size: str
    folder: Path
    steps: int
    distinct: int
    batch: int
    perturb: float
    fresh: bool
    """Whether every run has a process of its own; only then memory means anything."""
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.made = harness.child(WORKER, self._job() | {"side": "prepare"})

    def _job(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "folder": str(self.folder),
            "steps": self.steps,
            "distinct": self.distinct,
            "batch": self.batch,
            "lr": RATES.get(self.size, RATE),
            "perturb": self.perturb,
        }

    @property
    def probe(self) -> int:
        """The timed step whose batch has the median width: there the share of the ceiling is measured."""
        timed = sorted(range(WARM, self.steps - 1), key=lambda step: self.made["widths"][step])
        return timed[len(timed) // 2]

    def run(self, variant: Variant, ceiling: bool) -> dict[str, Any]:
        """Train once: losses, seconds per step, memory."""
        job = self._job() | asdict(variant) | {"placeholder": self.made["placeholder"], "ceiling": ceiling}
        if ceiling:
            job["probe"] = self.probe
        return harness.child(WORKER, job) if self.fresh else align_worker.answer(job)

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


def check(bench: Bench) -> dict[str, Any]:
    """The loss check that stands before everything: float32 steps of a small model, with and without cache."""
    names = [variant.name for variant in VARIANTS[1:3]]
    peer, *others = (bench.run(variant, ceiling=False)["losses"] for variant in VARIANTS[:3])
    found = [compare(peer, losses, TOLERANCE) for losses in others]
    fell = statistics.mean(peer[: bench.distinct]) - statistics.mean(peer[-bench.distinct :])
    return {
        "steps": bench.steps,
        "fell": fell,
        "agreements": {name: each.plain() for name, each in zip(names, found)},
        "losses": {"HF": peer, **dict(zip(names, others))},
        "holds": fell >= MOVED and all(each.holds for each in found),
    }


def measure(bench: Bench, variants: Sequence[Variant], repeats: int) -> list[dict[str, Any]]:
    """All variants in turns, `repeats` times; each against the best peer of its dtype in the same repeat."""
    turns = [[bench.run(variant, ceiling=repeat == 0) for variant in variants] for repeat in range(repeats)]
    reference, tolerances = _tolerances(variants, [run["losses"] for run in turns[0]])
    rows = []
    for place, variant in enumerate(variants):
        runs = [turn[place] for turn in turns]
        agreement = compare(reference, runs[0]["losses"], tolerances[variant.dtype])
        row: dict[str, Any] = asdict(variant) | {"agreement": agreement.plain(), "losses": runs[0]["losses"]}
        rows.append(row)
        if not agreement.holds:
            row["refused"] = f"loss differs by {agreement.difference:.1e}, more than {agreement.tolerance:.1e}"
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


def _tolerances(variants: Sequence[Variant], curves: Sequence[list[float]]) -> tuple[list[float], dict[str, float]]:
    """Their float32 curve, and how far from it a curve may be in each dtype."""
    peers = {variant.name: curve for variant, curve in zip(variants, curves) if variant.peer}
    reference, rounded = peers["HF float32"], peers.get("HF bfloat16")
    rounding = 0.0 if rounded is None else 2 * compare(reference, rounded, 0.0).difference
    return reference, {"float32": TOLERANCE, "bfloat16": min(CHAOS, max(ROUNDING, rounding))}


def _best_peer(bench: Bench, variants: Sequence[Variant], turn: Sequence[dict[str, Any]], dtype: str) -> float:
    """Samples per second of the fastest peer in this dtype."""
    peers = [run for variant, run in zip(variants, turn) if variant.peer and variant.dtype == dtype]
    return max(bench.speed(run)["samples_per_second"] for run in peers)


# ---------------------------------------------------------------------------------------------- what is said

HEADER = (
    "tower",
    "dtype",
    "variant",
    "samples/s",
    "× best HF",
    "supervised tokens/s",
    "peak MiB",
    "× HF's",
    "of ceiling",
)


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
    made.add_argument("--batch", type=int, default=8, help="samples per step")
    made.add_argument("--ablate", nargs="*", choices=SIZES, default=["small"], help="towers with the ablation rows")
    made.add_argument("--perturb", type=float, default=0.0, help="added to our joint's bias: the check must refuse")
    options = made.parse_args(arguments)
    where = harness.machine()
    print(harness.in_words(where), flush=True)
    if options.tiny:
        options.sizes, options.batch, options.steps = ["check"], 4, 4
    fresh, batch, repeats, steps = not options.tiny, options.batch, options.repeats, options.steps + WARM + 1
    result: dict[str, Any] = {"machine": where, "steps": options.steps, "batch": batch, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="isthmus-align-") as scratch:
        folder, distinct = Path(scratch), 3 if options.tiny else CHECK_DISTINCT
        check_batch = 4 if options.tiny else CHECK_BATCH
        small = Bench("check", folder / "loss-check", 5 * distinct, distinct, check_batch, options.perturb, fresh)
        result["check"] = checked = check(small)
        print(_in_words(checked), flush=True)
        for size in options.sizes if checked["holds"] else ():
            bench = Bench(size, folder / size, steps, steps, batch, options.perturb, fresh)
            variants = VARIANTS[:4] if options.tiny else VARIANTS + (ABLATIONS if size in options.ablate else ())
            rows = measure(bench, variants, repeats)
            result["sizes"][size] = {"model": bench.made, "rows": rows}
            print(f"median (smallest–largest) of {repeats} repeats of {steps - WARM - 1} steps of {batch} samples")
            print(harness.table(HEADER, lines(bench, rows)), flush=True)
            harness.save("align_vs_hf", result, options)
    print(harness.save("align_vs_hf", result, options))
    refused = [row for size in result["sizes"].values() for row in size["rows"] if "refused" in row]
    return int(bool(refused) or not checked["holds"])


def _in_words(checked: dict[str, Any]) -> str:
    """The loss check in one line."""
    differences = ", ".join(f"{name} {each['difference']:.1e}" for name, each in checked["agreements"].items())
    end = "agreed" if checked["holds"] else "REFUSED, no speed is quoted"
    return (
        f"loss check over {checked['steps']} float32 steps: largest differences {differences} of "
        f"{TOLERANCE:.0e}; the loss fell by {checked['fell']:.2f}; {end}"
    )


if __name__ == "__main__":
    sys.exit(main())
