"""Filling the feature cache: pictures per second, ours against a plain loop.

    python benchmarks/encoding.py [--steps N] [--repeats N] [--json FILE]

The demo's encoder and its pictures, each drawn or opened, preprocessed, encoded and written to disk. The plain loop
takes 32 pictures at a time, one step after another, with all cores in every step; what ours gains by smaller batches
and by threads side by side is also shown one at a time. Features must agree before a speed is told.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import harness
from isthmus import parts
from isthmus.data import media as pictures
from isthmus.data import views
from isthmus.encoders import Encoder
from isthmus.prepare import threads
from isthmus.prepare.features import FeatureCache
from isthmus.recipes.demo import demo
from isthmus.training.run import mix_of
from isthmus.types import Medium

PLAIN = 32
"""Pictures per forward of the plain loop, as data loaders commonly have them."""
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest distance relative to the norm."""
WAYS = ("plain", "small batches", "threads", "ours")


def drawn(count: int) -> list[Medium]:
    """So many different pictures of the demo's first stage, which is those of all stages."""
    found = {pictures.content_key(medium.source): medium for medium in mix_of(demo().stages[0], 0).media()}
    return random.Random(0).sample(list(found.values()), count)


@torch.inference_mode()
def plain(encoder: Encoder, media: Sequence[Medium], dtype: torch.dtype, file: Path) -> Tensor:
    """Features [N, S E], kept in a file as a loop of a few lines would."""
    rows = []
    for start in range(0, len(media), PLAIN):
        some = [pictures.open_image(medium.source) for medium in media[start : start + PLAIN]]
        pixels = torch.stack([views.pixels(picture, encoder.processor, encoder.aspect) for picture in some])
        rows.append(encoder(pixels.to(dtype)).x_NSE.flatten(1))
    found = torch.cat(rows)
    torch.save(found, file)
    return found


def run(way: str, encoder: Encoder, media: Sequence[Medium], dtype: torch.dtype) -> tuple[float, Tensor]:
    """Pictures per second, and the features."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        began = time.perf_counter()
        if way == "plain":
            found = plain(encoder, media, dtype, Path(scratch) / "features.pt")
            return len(media) / (time.perf_counter() - began), found
        cache = FeatureCache(encoder, Path(scratch), PLAIN if way == "threads" else None)
        with mock.patch.object(threads, "WORKERS", 1 if way == "small batches" else threads.WORKERS):
            cache.fill(media)
        speed = len(media) / (time.perf_counter() - began)
        return speed, cache("image", media)[1].x_NSE.flatten(1)


def measure(media: Sequence[Medium], dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Speeds of all ways, which take turns within a repeat, or why none is told."""
    encoder = parts.load_encoder(demo().encoder, dtype).eval()
    few = media[:PLAIN]
    expected = run("plain", encoder, few, dtype)[1].float()
    errors = {
        way: float((run(way, encoder, few, dtype)[1].float() - expected).norm() / expected.norm()) for way in WAYS[1:]
    }
    found: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "errors": errors}
    if max(errors.values()) > TOLERANCE[dtype]:
        return found | {"refused": f"features differ by {max(errors.values()):.1e}, more than {TOLERANCE[dtype]:.0e}"}
    turns = [{way: run(way, encoder, media, dtype)[0] for way in WAYS} for _ in range(repeats)]
    speeds = {way: harness.Spread.of([turn[way] for turn in turns]) for way in WAYS}
    return found | {"speeds": speeds, "gain": harness.Spread.of([turn["ours"] / turn["plain"] for turn in turns])}


def main(arguments: list[str] | None = None) -> int:
    options = harness.parser(__doc__, 512, "pictures per measurement").parse_args(arguments)
    where = harness.machine()
    media = drawn(8 if options.tiny else options.steps)
    cases = [measure(media, dtype, options.repeats) for dtype in DTYPES]
    rows = [
        [case["dtype"], "refused", case["refused"], "", "", ""]
        if "refused" in case
        else [case["dtype"], *(str(case["speeds"][way]) for way in WAYS), str(case["gain"])]
        for case in cases
    ]
    print(harness.in_words(where))
    print(f"pictures per second: median (smallest–largest) of {options.repeats} repeats over {len(media)} pictures")
    print(harness.table(["dtype", *WAYS, "ours / plain"], rows))
    print(harness.save("encoding", {"machine": where, "pictures": len(media), "cases": cases}, options))
    return int(any("refused" in case for case in cases))


if __name__ == "__main__":
    sys.exit(main())
