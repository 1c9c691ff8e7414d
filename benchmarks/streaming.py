"""What data at size cost: memory while they are first read and while they are drawn from, and the time to resume.

    python benchmarks/streaming.py [--rows N] [--kinds KIND ...] [--steps N] [--repeats N] [--json FILE]

Shards of JSONL, of tars and of Parquet, with small conversations and no pictures, are read through once (`first`), and
then opened in a fresh process (`resume`), which draws the first batch of all and one in the midst of the second epoch.
Memory is what a process adds to what it held before: `own` pages are its memory, `mapped` ones belong to files and go
when somebody else needs the room. While rows are read through, it is also taken when a tenth of them is behind: what
grows with the rows would be a tenth there. The batches of 1, 2 and 4 ranks must hold the same samples.

Kinds that are not asked for keep the rows that the file has of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
MEMORY = ("own MiB at a tenth", "own MiB when read", "own MiB", "mapped MiB")
"""Own pages when a tenth of the rows was read, when all were, and at the end; and mapped ones then."""
TIMES = ("open s", "first batch s", "later batch s")
"""Until data are open, a first batch is there, and one in the midst of the second epoch, each from there on."""
TARGET = 10.0
"""Seconds until a resumed process has its batch."""


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
    """MiB of this process's own pages, once those that it has freed are given back, and of mapped files."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open data and draw from them at a step; what that took."""
    os.environ["ISTHMUS_HOME"] = job["home"]
    from isthmus.config import Source
    from isthmus.data import (
        arrow,  # noqa: F401 - its libraries are not what is measured
        indexes,
    )
    from isthmus.data.mix import Batches, Mix
    from isthmus.data.sets import open_set

    reading: dict[str, float] = {}

    class Watched(indexes.Writer):
        """Takes the memory when a tenth of the rows was read."""

        def add(self, *given: Any) -> None:
            super().add(*given)
            if self.samples == job["rows"] // 10:
                reading.update(resident())

    indexes.Writer = Watched  # type: ignore[misc]
    before, began = resident(), time.perf_counter()
    found = open_set(Source(name=job["folder"]), seed=0)
    opened, read = time.perf_counter() - began, resident()
    mix = Mix([found], [1.0], seed=0)
    start = mix.epoch_length * 3 // 2 // BATCH

    def length(ref: tuple[int, int]) -> int:
        return len(found[ref[1]].turns[1].text)

    def feed(world: int = 1, rank: int = 0) -> Batches:
        return Batches(mix, BATCH, length=length, world_size=world, rank=rank)

    def drawn(feed: Batches, step: int) -> list[str]:
        return [found[item].id for _, item in feed[step]]

    took = []
    for step in (0, start):
        began = time.perf_counter()
        first = drawn(feed(), step)
        took.append(time.perf_counter() - began)
    alone = feed()
    for step in range(start, start + job["steps"]):
        assert len(drawn(alone, step)) == BATCH
    after = resident()
    for world in (2, 4):
        assert sorted(first) == sorted(name for rank in range(world) for name in drawn(feed(world, rank), start))
    moments = {"": after, " when read": read} | ({" at a tenth": reading} if reading else {})
    told = dict(zip(TIMES, (opened, *took))) | {"samples": len(found)}
    return told | {
        f"{name} MiB{moment}": held[name] - before[name] for moment, held in moments.items() for name in held
    }


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 200, "batches that are drawn while memory is watched")
    made.add_argument("--rows", type=int, default=1_000_000)
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = made.parse_args(arguments)
    if options.tiny:
        options.rows, options.steps, options.repeats = 20_000, 2, 1
    os.nice(10)
    script, kept = Path(__file__).resolve(), options.json or harness.RESULTS / "streaming.json"
    known = json.loads(kept.read_text())["results"] if kept.is_file() and not options.tiny else []
    results = {one["kind"]: one for one in known}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="isthmus-streaming-") as scratch:
            folder, home = Path(scratch, "data"), Path(scratch, "home")
            prepare(folder, kind, options.rows)
            job = {"folder": str(folder), "home": str(home), "rows": options.rows, "steps": options.steps}
            told: dict[str, Any] = {"kind": kind, "rows": options.rows, "machine": harness.machine()}
            told["first"] = harness.child(script, job)
            resumed = [harness.child(script, job) for _ in range(options.repeats)]
            results[kind] = told | {"resume": max(resumed, key=_waited)}
    shown = [
        [one["kind"], f"{one['rows']:,}", when, *(_cell(one[when], column) for column in (*TIMES, *MEMORY))]
        for one in results.values()
        for when in ("first", "resume")
    ]
    met = all(_waited(one["resume"]) < TARGET for one in results.values())
    print(harness.in_words(next(reversed(results.values()))["machine"]))
    print(harness.table(["shards", "rows", "", *TIMES, *MEMORY], shown))
    print(f"target for resume: {TARGET:g} s, {'met' if met else 'missed'}")
    print(harness.save("streaming", {"results": list(results.values()), "target": TARGET, "met": met}, options))
    return int(not met)


def _waited(told: dict[str, Any]) -> float:
    """Seconds from the start of a resumed process until it has its batch."""
    return told["open s"] + told["later batch s"]


def _cell(told: dict[str, Any], column: str) -> str:
    value = told.get(column)
    return "" if value is None else f"{value:.3g}" if column in TIMES else f"{value:.1f}"


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        sys.exit(main())
