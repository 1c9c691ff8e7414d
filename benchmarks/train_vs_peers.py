"""Stages `align` and `sft` of ours against transformers' Trainer and TRL's SFTTrainer on LlavaForConditionalGeneration.

    python benchmarks/train_vs_peers.py [--quick] [--stages align sft] [--sizes tiny small base] [--lengths 64 256 1024]
        [--spreads narrow wide] [--llm lora|full] [--steps N] [--repeats N] [--json FILE]

Same weights (theirs, imported), samples, order, batches, optimizer, schedule and clipping on all sides, SmolLM2-135M
under a random CLIP tower. `align` trains the projector; `sft` the projector and LoRA of rank 16 on every Linear of the
LLM's layers (peft's on their side, born equal), or with `--llm full` the whole LLM. Every variant runs in a process of
its own, and variants take turns within a repeat. Before any speed is quoted, loss curves must agree: to 1e-4 over 50
float32 steps of a small model, then over the measured steps themselves, to 1e-4 in float32, and in bfloat16 to
the distance of Trainer's bfloat16 curve from its float32 one. Otherwise the speed is withheld and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import train_worker

WORKER = harness.HERE / "train_worker.py"
STAGES, SIZES, LENGTHS, SPREADS = ("align", "sft"), ("tiny", "small", "base"), (64, 256, 1024), ("narrow", "wide")
CHECK_DISTINCT, CHECK_BATCH = 10, 8
"""The loss check goes five times over ten batches: 50 steps."""
TOLERANCE = 1e-4
"""Largest difference of two float32 losses at the same step."""
ROUNDING, CHAOS = 2e-2, 0.2
"""Two bfloat16 curves may lie as far from each other as Trainer's lies from its own float32 one, within these bounds:
beyond the upper one, rounding decides what is learned and curves say nothing."""
RATE, CHECK_RATE = 1e-4, 1e-3
"""Learning rates: the first is low enough that a rounding error stays one over the steps that are measured."""
MOVED = 0.05
"""A loss check whose curve falls less than this over the same batches could agree without having learned."""
WARM = 2
"""Steps that are not timed; the last one is not either."""


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    stage: str
    size: str
    length: int
    """Mean tokens of text per sample; the picture's come on top."""
    spread: str
    llm: str = "lora"

    def __str__(self) -> str:
        return f"{self.stage}-{self.size}-{self.length}-{self.spread}"


@dataclass(frozen=True)
class Variant:
    """One way to train; those with another `side` than `ours` are peers."""

    name: str
    dtype: str
    side: str = "ours"
    weights: str = ""
    """How frozen parts are stored, where not in `dtype`; under bfloat16 all sides compute with autocast."""
    cached: bool = False
    batching: str = "bucketed"
    attention: str = "isthmus"
    head: str = "supervised"
    onednn: bool = False
    """Whether Linears in float32 are computed by `isthmus.kernels_linear.use_onednn`."""

    @property
    def peer(self) -> bool:
        return self.side != "ours"


BOTH = (
    Variant("HF Trainer", "float32", "trainer"),
    Variant("TRL", "float32", "trl"),
    Variant("ours", "float32"),
    Variant("ours, cache", "float32", cached=True),
)
"""Every setting's rows, in each dtype that is measured there."""
ONEDNN = Variant("ours, cache, oneDNN", "float32", cached=True, onednn=True)
UNSORTED = tuple(
    replace(variant, batching="shuffled", name=f"{variant.name}, unsorted") for variant in (BOTH[0], BOTH[1], BOTH[3])
) + (Variant("ours, cache, packed", "float32", cached=True, batching="packed"),)
"""Batches as they come, where lengths differ much: what bucketing is worth to each side, and packing instead."""
FLAG = Variant("HF Trainer, bf16=True alone", "bfloat16", "trainer", "float32")
ABLATIONS = (
    Variant("ours, cache, sdpa", "bfloat16", cached=True, attention="sdpa"),
    Variant("ours, cache, full head", "bfloat16", cached=True, head="full"),
    Variant("ours, cache, sdpa, full head", "bfloat16", cached=True, attention="sdpa", head="full"),
)
"""Ours with one gain taken away at a time, and both."""
TINY = (BOTH[0], BOTH[2], ONEDNN, UNSORTED[0], UNSORTED[3])


def variants_of(setting: Setting, options: argparse.Namespace) -> list[Variant]:
    """The rows of a setting: everything in both dtypes at the shortest even lengths, elsewhere bfloat16 alone.

    Their float32 curve is the yardstick of their bfloat16 one, so it is always there.
    """
    if options.tiny:
        return [*TINY, *_in_bfloat16((BOTH[0], BOTH[3]))]
    if options.quick:
        return [BOTH[0], ONEDNN, *_in_bfloat16((*BOTH[:2], BOTH[3]))]
    base = (setting.length, setting.spread) == (LENGTHS[0], SPREADS[0])
    rows = [*((*BOTH, ONEDNN) if base else BOTH[:1]), *_in_bfloat16(BOTH)]
    if base and setting.stage == "align":
        rows += [FLAG, *(ABLATIONS if setting.size == "small" else ())]
    if setting.spread == "wide":
        rows += [UNSORTED[0], *_in_bfloat16(UNSORTED)]
    return rows


def _in_bfloat16(variants: Sequence[Variant]) -> list[Variant]:
    return [replace(variant, dtype="bfloat16") for variant in variants]


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
    """One setting in its folder: `steps` over `distinct` batches."""

    setting: Setting
    folder: Path
    steps: int
    distinct: int
    batch: int
    perturb: float
    fresh: bool
    """Whether every run has a process of its own."""
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.made = self._answer(self._job() | {"side": "prepare"})

    def _job(self) -> dict[str, Any]:
        return asdict(self.setting) | {
            "folder": str(self.folder),
            "steps": self.steps,
            "distinct": self.distinct,
            "batch": self.batch,
            "lr": CHECK_RATE if self.setting.size == "check" else RATE,
            "perturb": self.perturb,
        }

    def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        return harness.child(WORKER, job) if self.fresh else train_worker.answer(job)

    def batches(self, variant: Variant) -> dict[str, Any]:
        """What is known of the batches that a variant reads."""
        return self.made["bucketed" if variant.batching == "bucketed" else "shuffled"]

    def probe(self, variant: Variant) -> int:
        """The timed step whose batch has the median width: there the share of the ceiling is measured."""
        widths = self.batches(variant)["widths"]
        timed = sorted(range(WARM, self.steps - 1), key=lambda step: widths[step % self.distinct])
        return timed[len(timed) // 2]

    def run(self, variant: Variant, ceiling: bool) -> dict[str, Any]:
        """Train once: losses, seconds per step, memory."""
        full = self.setting.stage == "sft" and self.setting.llm == "full"
        job = self._job() | asdict(variant) | {"ceiling": ceiling, "probe": self.probe(variant)}
        job["weights"] = "float32" if full else variant.weights or variant.dtype
        job["placeholder"] = self.made["placeholder"]
        job["order"] = self.made["orders"]["bucketed" if variant.batching == "bucketed" else "shuffled"]
        return self._answer(job)

    def speed(self, variant: Variant, run: dict[str, Any]) -> dict[str, float]:
        """Rates over the timed steps of one run, whole passes over the batches; `seconds` starts at step 1."""
        timed, batches = run["seconds"][WARM - 1 :], self.batches(variant)
        passes = len(timed) / self.distinct
        rates = {
            "samples_per_second": self.batch * len(timed) / sum(timed),
            "tokens_per_second": passes * batches["tokens"] / sum(timed),
            "supervised_tokens_per_second": passes * batches["supervised"] / sum(timed),
            "peak_mib": run["peak_mib"],
        }
        if run.get("pictures"):
            rates["pictures_cached_per_second"] = run["pictures"] / run["fill_seconds"]
            epoch = 1 / rates["samples_per_second"] + 1 / rates["pictures_cached_per_second"]
            rates["samples_per_second_with_filling"] = 1 / epoch
        if run["ceiling_seconds"] is not None:
            rates["ceiling_share"] = run["ceiling_seconds"] / run["seconds"][self.probe(variant) - 1]
        return rates


def check(bench: Bench) -> dict[str, Any]:
    """The loss check that stands before everything: float32 steps of a small model, on every side."""
    peer, *others = (bench.run(variant, ceiling=False)["losses"] for variant in BOTH)
    names = [variant.name for variant in BOTH[1:]]
    found = [compare(peer, losses, TOLERANCE) for losses in others]
    fell = statistics.mean(peer[: bench.distinct]) - statistics.mean(peer[-bench.distinct :])
    return {
        "steps": bench.steps,
        "fell": fell,
        "agreements": {name: each.plain() for name, each in zip(names, found)},
        "losses": {BOTH[0].name: peer, **dict(zip(names, others))},
        "holds": fell >= MOVED and all(each.holds for each in found),
    }


def measure(bench: Bench, variants: Sequence[Variant], repeats: int) -> list[dict[str, Any]]:
    """All variants in turns, `repeats` times; each against the best peer of its dtype in the same repeat.

    Curves are compared with Trainer's over the same samples per step.
    """
    turns = [[bench.run(variant, ceiling=repeat == 0) for variant in variants] for repeat in range(repeats)]
    curves = [run["losses"] for run in turns[0]]
    rows = []
    for place, variant in enumerate(variants):
        runs = [turn[place] for turn in turns]
        agreement = compare(*_yardstick(variants, curves, variant, runs[0]["losses"]))
        row: dict[str, Any] = asdict(variant) | {"agreement": agreement.plain(), "losses": runs[0]["losses"]}
        rows.append(row)
        if not agreement.holds:
            row["refused"] = f"loss differs by {agreement.difference:.1e}, more than {agreement.tolerance:.1e}"
            continue
        speeds = [bench.speed(variant, run) for run in runs]
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


def _yardstick(
    variants: Sequence[Variant], curves: Sequence[list[float]], variant: Variant, found: list[float]
) -> tuple[list[float], list[float], float]:
    """Trainer's curve over the same samples in the same dtype, the curve to judge, and how far apart they may be."""
    sorted_ = variant.batching == "bucketed"
    peers = {
        other.dtype: curve
        for other, curve in zip(variants, curves)
        if other.side == "trainer" and not other.weights and (other.batching == "bucketed") == sorted_
    }
    if variant.dtype == "float32":
        return peers["float32"], found, TOLERANCE
    rounding = compare(peers["float32"], peers["bfloat16"], 0.0).difference
    return peers["bfloat16"], found, min(CHAOS, max(ROUNDING, rounding))


def _best_peer(bench: Bench, variants: Sequence[Variant], turn: Sequence[dict[str, Any]], dtype: str) -> float:
    """Samples per second of the fastest peer in this dtype."""
    peers = ((variant, run) for variant, run in zip(variants, turn) if variant.peer and variant.dtype == dtype)
    return max(bench.speed(variant, run)["samples_per_second"] for variant, run in peers)


# ---------------------------------------------------------------------------------------------- what is said

HEADER = ("dtype", "variant", "samples/s", "× best peer", "tokens/s", "peak MiB", "× peers'", "of ceiling")


def title(bench: Bench) -> str:
    """The setting in a line."""
    setting, made = bench.setting, bench.made
    llm = "" if setting.stage == "align" else f" and {'LoRA' if setting.llm == 'lora' else 'the whole LLM'}"
    return (
        f"stage {setting.stage} (projector{llm}), tower {setting.size} ({made['tower_parameters'] / 1e6:.0f} M), "
        f"{setting.length} tokens of text {setting.spread}; of all tokens "
        f"{made['bucketed']['supervised'] / made['bucketed']['tokens']:.0%} supervised; padding "
        f"{made['bucketed']['padding']:.0%} bucketed, {made['shuffled']['padding']:.0%} unsorted"
    )


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table rows of one setting."""
    said = []
    for row in rows:
        what = [row["dtype"], row["name"]]
        if "refused" in row:
            said.append([*what, "refused", row["refused"], "", "", "", ""])
            continue
        said.append(
            [
                *what,
                str(row["samples_per_second"]),
                str(row["ratio"]),
                f"{row['tokens_per_second'].median:,.0f}",
                f"{row['peak_mib'].median:,.0f}",
                f"{row['memory_ratio']:.2f}",
                f"{row['ceiling_share'].median:.0%}",
            ]
        )
        if "samples_per_second_with_filling" in row:
            rate = row["samples_per_second_with_filling"]
            said.append([row["dtype"], "  first epoch, filling the cache", str(rate), "", "", "", "", ""])
    return said


def settings_of(options: argparse.Namespace) -> Iterator[Setting]:
    """Lengths by spreads under the small tower, and the other towers at the first of each."""
    for stage in options.stages:
        for length, spread in itertools.product(options.lengths, options.spreads):
            first = (length, spread) == (options.lengths[0], options.spreads[0])
            grid = "small" if "small" in options.sizes else options.sizes[0]
            for size in options.sizes if first else (grid,):
                yield Setting(stage, size, length, spread, options.llm)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `--quick` and `--tiny` make it shorter."""
    made = harness.parser(__doc__, 8, "timed steps per run")
    made.add_argument("--quick", action="store_true", help="one row of ours per stage within minutes")
    made.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    made.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="vision towers")
    made.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="mean tokens of text")
    made.add_argument("--spreads", nargs="+", choices=SPREADS, default=list(SPREADS), help="of the lengths")
    made.add_argument("--llm", choices=("lora", "full"), default="lora", help="how `sft` trains the LLM")
    made.add_argument("--batch", type=int, default=8, help="samples per step")
    made.add_argument("--perturb", type=float, default=0.0, help="added to our joint's bias: the check must refuse")
    options = made.parse_args(arguments)
    if options.quick:
        made.set_defaults(sizes=["small"], lengths=[64], spreads=["narrow"], steps=5, repeats=2)
        options = made.parse_args(arguments)  # what is given stays
    if options.tiny:
        options.sizes, options.lengths, options.spreads = ["check"], [24], ["wide"]
        options.batch, options.steps = 4, 4
    return options


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    where = harness.machine()
    print(harness.in_words(where), flush=True)
    steps, fresh = options.steps + WARM + 1, not options.tiny
    result: dict[str, Any] = {"machine": where, "steps": options.steps, "batch": options.batch}
    result |= {"checks": {}, "settings": {}}
    with tempfile.TemporaryDirectory(prefix="isthmus-train-") as scratch:
        for stage in options.stages:
            small = Setting(stage, "check", 24, "wide", options.llm)
            distinct, batch = (3, 4) if options.tiny else (CHECK_DISTINCT, CHECK_BATCH)
            folder = Path(scratch) / f"check-{stage}"
            checked = check(Bench(small, folder, 5 * distinct, distinct, batch, options.perturb, fresh))
            result["checks"][stage] = checked
            print(_in_words(stage, checked), flush=True)
        for setting in settings_of(options):
            if not result["checks"][setting.stage]["holds"]:
                continue
            folder = Path(scratch) / str(setting)
            bench = Bench(setting, folder, steps, options.steps, options.batch, options.perturb, fresh)
            rows = measure(bench, variants_of(setting, options), options.repeats)
            made = {name: part for name, part in bench.made.items() if name != "orders"}
            result["settings"][str(setting)] = {"setting": asdict(setting), "made": made, "rows": rows}
            print(f"\n{title(bench)}\nmedian (smallest–largest) of {options.repeats} repeats of {options.steps} steps")
            print(harness.table(HEADER, lines(rows)), flush=True)
            harness.save("train_vs_peers", result, options)
    print(harness.save("train_vs_peers", result, options))
    refused = any("refused" in row for each in result["settings"].values() for row in each["rows"])
    return int(refused or not all(checked["holds"] for checked in result["checks"].values()))


def _in_words(stage: str, checked: dict[str, Any]) -> str:
    """The loss check in one line."""
    differences = ", ".join(f"{name} {each['difference']:.1e}" for name, each in checked["agreements"].items())
    end = "agreed" if checked["holds"] else "REFUSED, no speed is quoted"
    return (
        f"{stage}: loss check over {checked['steps']} float32 steps: largest differences {differences} of "
        f"{TOLERANCE:.0e}; the loss fell by {checked['fell']:.2f}; {end}"
    )


if __name__ == "__main__":
    sys.exit(main())
