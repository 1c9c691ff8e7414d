"""What data at size cost: memory while they are first read and while they are drawn from, and the time to resume.

    python benchmarks/streaming.py [--rows N] [--steps N] [--repeats N] [--json FILE]

Shards of JSONL, of tars and of Parquet, with small conversations and no pictures, are read through once (`first`),
and then opened in a fresh process at a step in the midst of the second epoch (`resume`); the same over a hundredth of
the rows. Memory is what a process adds to what it held before: `own` pages are its memory, `mapped` ones belong to
files and go when somebody else needs the room. The batches of 1, 2 and 4 ranks at that step must hold the same samples.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import harness

SHARDS, BATCH = 8, 64
KINDS = ("jsonl", "tar", "parquet")
TARGET = 10.0
"""Seconds to the first batch of a resumed run."""


def record(number: int) -> dict[str, Any]:
    said = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
    return {"id": str(number), "messages": said}


def prepare(folder: Path, kind: str, rows: int) -> None:
    """Shards of nearly equal size."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        numbers = range(rows * shard // SHARDS, rows * (shard + 1) // SHARDS)
        {"jsonl": _lines, "tar": _tar, "parquet": _parquet}[kind](folder / f"{shard}.{kind}", numbers)


def _lines(file: Path, numbers: range) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record(number)) + "\n" for number in numbers)


def _tar(file: Path, numbers: range) -> None:
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            data = json.dumps(record(number)).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def _parquet(file: Path, numbers: range) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([record(number) for number in numbers]), file)


def resident() -> dict[str, float]:
    """MiB of this process's own pages and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open data and draw from them at a step; what that took."""
    os.environ["ISTHMUS_HOME"] = job["home"]
    from isthmus.config import Source
    from isthmus.data import arrow  # noqa: F401 - its libraries are not what is measured
    from isthmus.data.mix import Batches, Mix
    from isthmus.data.sets import open_set

    before, began = resident(), time.perf_counter()
    found = open_set(Source(name=job["folder"]), seed=0)
    opened = time.perf_counter() - began
    mix = Mix([found], [1.0], seed=0)
    start = mix.epoch_length * 3 // 2 // BATCH
    feeds = {
        world: [
            Batches(mix, BATCH, length=lambda ref: len(found[ref[1]].turns[1].text), world_size=world, rank=rank)
            for rank in range(world)
        ]
        for world in (1, 2, 4)
    }
    first = [found[item].id for _, item in feeds[1][0][start]]
    seconds = time.perf_counter() - began
    for step in range(start, start + job["steps"]):
        assert len([found[item] for _, item in feeds[1][0][step]]) == BATCH
    after = resident()
    same = {
        world: sorted(found[item].id for feed in ranks for _, item in feed[start]) for world, ranks in feeds.items()
    }
    assert same[1] == same[2] == same[4] == sorted(first)
    return {"open s": opened, "first batch s": seconds, "samples": len(found)} | {
        f"{name} MiB": after[name] - before[name] for name in after
    }


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 200, "batches that are drawn while memory is watched")
    made.add_argument("--rows", type=int, default=1_000_000)
    options = made.parse_args(arguments)
    if options.tiny:
        options.rows, options.steps, options.repeats = 20_000, 2, 1
    os.nice(10)
    where, script = harness.machine(), Path(__file__).resolve()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-streaming-") as scratch:
        for kind in KINDS:
            for rows in (options.rows // 100, options.rows):
                folder, home = Path(scratch, f"{kind}-{rows}"), Path(scratch, "home")
                prepare(folder, kind, rows)
                job = {"folder": str(folder), "home": str(home), "steps": options.steps}
                first = harness.child(script, job)
                resumed = [harness.child(script, job) for _ in range(options.repeats)]
                worst = max(resumed, key=lambda one: one["first batch s"])
                results.append({"kind": kind, "rows": rows, "first": first, "resume": worst})
    shown = [
        [
            one["kind"],
            f"{one['rows']:,}",
            when,
            f"{told['first batch s']:.3g}",
            f"{told['own MiB']:.1f}",
            f"{told['mapped MiB']:.1f}",
        ]
        for one in results
        for when, told in (("first", one["first"]), ("resume", one["resume"]))
    ]
    met = all(one["resume"]["first batch s"] < TARGET for one in results)
    print(harness.in_words(where))
    print(harness.table(["shards", "rows", "", "s to a batch", "own MiB", "mapped MiB"], shown))
    print(f"target for resume: {TARGET:g} s, {'met' if met else 'missed'}")
    result = {"machine": where, "rows": options.rows, "results": results, "target": TARGET, "met": met}
    print(harness.save("streaming", result, options))
    return int(not met)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        sys.exit(main())
