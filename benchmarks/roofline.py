"""The matrix-product ceiling of our training step, our share of it, and where the rest of the time goes.

    python benchmarks/roofline.py [--stage align sft] [--size small] [--length 64] [--dtype bfloat16] [--json FILE]

The ceiling is the sum over all matrix products of a step of the best time of each alone, with the same operands'
shapes, strides and dtype, on the same threads. Our share is the ceiling over the time of the step; 1 would mean that
nothing else took time. Attention inside a fused kernel counts as its two products forward and four backward. The step
is forward, backward, clipping and update of `train_vs_peers.py`'s model on its median batch, with cached features.
Where the rest goes is the profiler's own time of every operator, its least over the repeats. With one thread
(`OMP_NUM_THREADS=1`) step and ceiling are timed by the thread's own clock, which a busy machine hardly moves.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import harness

REPEATS = 5
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    torch.ops.mkldnn._linear_pointwise.default,
}
FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: False,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: True,
}


@dataclass(frozen=True)
class Operand:
    """What a product's time depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def like(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).fill_(0.01)


Product: TypeAlias = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""An operator, its arguments (tensors as `Operand`) and its keyword arguments."""


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside it, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            options = tuple(sorted((kwargs or {}).items()))
            self.counts[function, tuple(map(_described, args)), options] += 1
        elif function in FUSED:
            query, key = args[1:3] if FUSED[function] else args[:2]
            self.counts.update(_inside(query, key, FUSED[function]))
        return function(*args, **(kwargs or {}))


def best_seconds(work: Callable[[], object]) -> float:
    """Sum over all matrix products in `work()` of the best time of each alone."""
    return sum(times * best for _, times, best in products(work))


def products(work: Callable[[], object]) -> list[tuple[Product, int, float]]:
    """The distinct matrix products in `work()`: how often each is done, and the best seconds of one alone."""
    with Products() as seen:
        work()
    return [(product, times, _best(*product)) for product, times in seen.counts.items()]


def now() -> float:
    """Seconds on the clock that products and steps are timed by."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Operand.of(argument)
    return tuple(argument) if isinstance(argument, list) else argument


@torch.no_grad()
def _best(function: Any, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> float:
    real = [argument.like() if isinstance(argument, Operand) else argument for argument in arguments]
    times = []
    for _ in range(REPEATS):
        began = now()
        function(*real, **dict(options))
        times.append(now() - began)
    return min(times)


def _inside(query: Tensor, key: Tensor, backward: bool) -> Iterator[Product]:
    """The products that a fused attention kernel does, as batched products over all heads."""
    batch, length, keys, width = query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3]

    def product(rows: int, inner: int, columns: int) -> Product:
        left = Operand((batch, rows, inner), (rows * inner, inner, 1), query.dtype)
        right = Operand((batch, inner, columns), (inner * columns, columns, 1), query.dtype)
        return aten.bmm.default, (left, right), ()

    yield product(length, width, keys)  # scores, or the gradient of the weights
    yield product(length, keys, width)  # mixed values, or the gradient of the queries
    if backward:
        yield product(keys, length, width)  # the gradient of the keys
        yield product(keys, length, width)  # the gradient of the values


# ---------------------------------------------------------------------------------------------- where the rest goes

GROUPS = {
    "matrix products": r"(add)?mm_?|b(add)?b?mm_?|mkldnn_\w+|_linear_pointwise|\w*convolution\w*",
    "attention kernels": r"_scaled_dot_product\w*",
    "softmax and loss": r"_(log_)?softmax\w*|nll_loss\w*|exp_?",
    "activation": r"(silu|gelu)\w*",
    "copies and casts": r"copy_|cat|fill_|zero_|index\w*|masked_\w+|embedding\w*|gather",
    "sums and norms": r"sum|mean|pow|rsqrt|\w*norm",
    "by element": r"(mul|add|sub|div|neg|addcmul)_?",
    "optimizer": r"_fused_adamw\w*",
}
"""Operators of PyTorch by what they do, as patterns of their whole names."""


def group_of(operator: str) -> str:
    """The group of a profiler's operator; what is none of them is the host's: dispatch, views, autograd, Python."""
    kind, _, name = operator.rpartition("::")
    found = (group for group, names in GROUPS.items() if kind in ("aten", "mkldnn") and re.fullmatch(names, name))
    return next(found, "host")


def operators(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds that each operator itself takes in `work()`, the least over the repeats."""
    least: dict[str, float] = {}
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            work()
        for event in seen.key_averages():
            seconds = event.self_cpu_time_total / 1e6
            least[event.key] = min(seconds, least.get(event.key, seconds))
    return least


@dataclass
class Roofline:
    """One stage's step against its ceiling."""

    stage: str
    step: harness.Spread
    ceiling: float
    share: float
    groups: dict[str, float]
    operators: dict[str, float]
    products: list[dict[str, Any]]
    batch: list[int]
    """Rows and columns of the measured batch."""


def measure(stage: str, options: Any, scratch: Path) -> Roofline:
    """Prepare the model and batches, train the probe's step over and over."""
    import train_parts
    import train_worker

    folder = scratch / stage
    folder.mkdir()
    job = {"stage": stage, "size": options.size, "length": options.length, "spread": "narrow", "llm": "lora"}
    job |= {"folder": str(folder), "steps": 1, "distinct": 1, "batch": options.batch, "lr": 1e-4, "cached": True}
    job |= {"dtype": options.dtype, "weights": options.dtype, "attention": "isthmus", "batching": "bucketed"}
    job |= {"onednn": options.onednn}
    job |= {"probe": 0, "order": list(range(options.batch))}
    train_parts.prepare(job)
    learn = learner(train_worker.load(job), train_worker, job)
    learn()
    seconds = []
    for _ in range(options.steps):
        began = now()
        learn()
        seconds.append(now() - began)
    step = harness.Spread.of(seconds)
    found = products(learn)
    spent = operators(learn, REPEATS)
    groups: Counter[str] = Counter()
    for operator, own in spent.items():
        groups[group_of(operator)] += own
    ceiling = sum(times * best for _, times, best in found)
    width = train_parts.Prepared(job)("ids", 0).shape
    return Roofline(
        stage, step, ceiling, ceiling / step.median, dict(groups.most_common()), spent, _plain(found), list(width)
    )


def learner(model: Any, worker: Any, job: dict[str, Any]) -> Callable[[], None]:
    """One optimizer step as the loop does it: forward, backward, clipping, update."""
    from torch.nn.utils import clip_grad_norm_

    from isthmus.training import optimizer
    from isthmus.training.step import Step
    from train_parts import BETAS, CLIP, stage_of

    stage = stage_of(job)
    trained = optimizer.choose(Step(model, stage.objectives), stage)
    adamw = optimizer.adamw(trained, BETAS)
    forward_and_backward = worker.one_step(model, worker.Feed(model, job), job)

    def learn() -> None:
        forward_and_backward()
        clip_grad_norm_([each.parameter for each in trained], CLIP)
        adamw.step()
        adamw.zero_grad()

    return learn


def _plain(found: list[tuple[Product, int, float]]) -> list[dict[str, Any]]:
    """The products, the costliest first, with what each reaches."""
    rows = []
    for (function, arguments, _), times, best in sorted(found, key=lambda each: -each[1] * each[2]):
        shapes = [list(each.shape) for each in arguments if isinstance(each, Operand)]
        rows.append({"operator": str(function), "shapes": shapes, "times": times, "best_ms": best * 1e3})
    return rows


def said(found: Roofline, rows: int = 12) -> str:
    """The stage's tables."""
    median = found.step.median
    text = [
        f"\nstage {found.stage}, {found.batch[0]} rows x {found.batch[1]}: step {found.step} s, ceiling "
        f"{found.ceiling:.3g} s, share {found.share:.0%}",
        harness.table(
            ("where", "ms", "of the step"),
            [[name, f"{own * 1e3:.1f}", f"{own / median:.0%}"] for name, own in found.groups.items()],
        ),
        harness.table(
            ("operator", "ms", "of the step"),
            [
                [name, f"{own * 1e3:.1f}", f"{own / median:.0%}"]
                for name, own in sorted(found.operators.items(), key=lambda each: -each[1])[:rows]
            ],
        ),
        harness.table(
            ("matrix product", "shapes", "times", "best ms alone"),
            [
                [row["operator"], " ".join(map(str, row["shapes"])), str(row["times"]), f"{row['best_ms']:.3f}"]
                for row in found.products[:rows]
            ],
        ),
    ]
    return "\n\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 7, "timed steps")
    made.add_argument("--stage", nargs="+", choices=("align", "sft"), default=["align", "sft"])
    made.add_argument("--size", default="small", help="vision tower; its features are cached")
    made.add_argument("--length", type=int, default=64, help="tokens of text per sample")
    made.add_argument("--batch", type=int, default=8, help="samples per step")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    made.add_argument("--onednn", action="store_true", help="Linears in float32 by oneDNN (isthmus.kernels_linear)")
    options = made.parse_args(arguments)
    if options.tiny:
        options.size, options.length, options.batch, options.steps = "check", 16, 2, 2
    where = harness.machine()
    print(harness.in_words(where), flush=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-roofline-") as scratch:
        found = [measure(stage, options, Path(scratch)) for stage in options.stage]
    for each in found:
        print(said(each))
    print(harness.save("roofline", {"machine": where, "stages": found}, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
