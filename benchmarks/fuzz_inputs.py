"""What hostile pictures, videos and tars do to the door that they pass: nothing but an error, soon, in little memory.

    python benchmarks/fuzz_inputs.py [--steps IMAGES] [--kinds KIND ...] [--json FILE]

Pictures of six formats and films of five are damaged in nine ways and headers claim what is not there (D1), bombs are
small files that would become large or long (D2), and tars try to leave their place (D3). Every kind runs in a process
of its own, so that a crash is seen, and says its slowest item, in seconds of the processor, and what it added to its
largest resident set. Everything follows from a seed. Kinds that are not asked for keep what the file has of them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness
from hostile_containers import claims, films, tars, videos
from hostile_pictures import Item, bombs, headers, mutated, seeds
from isthmus.data import formats, video
from isthmus.data.media import open_image, upright_size
from isthmus.types import DataError

SLOWEST = {"mutated": 2.0, "headers": 2.0, "bombs": 0.1, "tars": 2.0, "videos": 2.0, "claims": 0.1}
"""Seconds of the processor that an item may take."""
MORE = {"mutated": 1024.0, "headers": 1024.0, "bombs": 50.0, "tars": 50.0, "videos": 1024.0, "claims": 50.0}
"""MiB that a kind may add to the resident set of a process that has decoded one file of it."""
MADE: dict[str, Callable[[], Iterable[Item]]] = {"headers": headers, "bombs": bombs, "tars": tars, "claims": claims}
"""Files that are made beforehand, by another process."""
DRAWN: dict[str, Callable[[int], Iterable[Item]]] = {"mutated": mutated, "videos": videos}
"""So many damaged files, made as they are needed."""
FRAMES = 4
NAMES = re.compile(r"[^\w .,-]")


def look(data: bytes) -> str:
    """What comes of a picture."""
    try:
        upright_size(data)
        open_image(data, "it")
    except DataError as error:
        assert error.remedy and "\n" not in error.cause
        return "refused"
    return "read"


def watch(data: bytes) -> str:
    """What comes of a video."""
    try:
        video.facts(data)
        video.decoded(data, FRAMES)
    except DataError as error:
        assert error.remedy and "\n" not in error.cause
        return "refused"
    return "read"


def unpack(data: bytes) -> str:
    """What comes of a tar; files that it puts anywhere near are an escape."""
    with tempfile.TemporaryDirectory(prefix="isthmus-fuzz-") as scratch:
        file = Path(scratch) / "in" / "in" / "a.tar"
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
        before = sorted(Path(scratch).rglob("*"))
        faults = formats.check(file)
        if sorted(Path(scratch).rglob("*")) != before:
            return "escaped"
        return "refused" if faults else "read"


def work(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """All items of a kind, in this process; large ones are made in another and lie in a folder."""
    judge = {"tars": unpack, "videos": watch, "claims": watch}.get(kind, look)
    for good in films() if judge is watch else seeds()[:1]:
        judge(good)
    items = (
        DRAWN[kind](count) if kind in DRAWN else ((file.name, file.read_bytes()) for file in sorted(folder.iterdir()))
    )
    before = _reset()
    outcomes, slowest, others = Counter[str](), (0.0, ""), list[str]()
    for name, data in items:
        began = time.process_time()
        try:
            outcome = judge(data)
        except Exception as error:
            outcome = "other error"
            others.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
        slowest = max(slowest, (time.process_time() - began, name))
        outcomes[outcome] += 1
    return {
        "items": sum(outcomes.values()),
        "outcomes": outcomes,
        "other errors": others[:20],
        "slowest": slowest,
        "more MiB": round(_peak() - before, 1),
        "peak MiB": round(_peak(), 1),
    }


def _reset() -> float:
    """Forget the largest resident set so far; the present one in MiB. Where that cannot be done, the largest."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return harness.peak_mib()
    return _peak()


def _peak() -> float:
    """The largest resident set since `_reset`, in MiB."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return harness.peak_mib()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _measured(kind: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="isthmus-fuzz-") as folder:
        for number, (name, data) in enumerate(MADE.get(kind, tuple)()):
            (Path(folder) / f"{number:03d} {NAMES.sub('_', name)}").write_bytes(data)
        return harness.child(Path(__file__), {"kind": kind, "count": count, "folder": folder})


def passed(kind: str, found: dict[str, Any]) -> bool:
    """Whether a kind kept its promise."""
    bad = found["outcomes"].get("other error", 0) + found["outcomes"].get("escaped", 0)
    return not bad and found["slowest"][0] < SLOWEST[kind] and found["more MiB"] < MORE[kind]


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 20_000, "damaged pictures; of videos a tenth as many")
    made.add_argument("--kinds", nargs="+", choices=list(SLOWEST), default=list(SLOWEST))
    options = made.parse_args(arguments)
    count, kept = 200 if options.tiny else options.steps, options.json or harness.RESULTS / "fuzz_inputs.json"
    kinds = json.loads(kept.read_text())["kinds"] if kept.is_file() and not options.tiny else {}
    for kind in options.kinds:
        found = _measured(kind, count // 10 if kind == "videos" else count)
        kinds[kind] = found | {"passed": passed(kind, found), "machine": harness.machine()}
    print(harness.in_words(kinds[options.kinds[-1]]["machine"]), end="\n\n")
    rows = []
    for kind, found in kinds.items():
        told = ", ".join(f"{number:,} {outcome}" for outcome, number in found["outcomes"].items())
        seconds, name = found["slowest"]
        more, kept = f"{found['more MiB']:.0f}", "kept" if passed(kind, found) else "missed"
        rows.append([kind, f"{found['items']:,}", told, f"{seconds * 1000:.0f}", name, more, kept])
    print(harness.table(["kind", "items", "outcomes", "slowest ms", "which", "more MiB", "promise"], rows))
    print(f"\n{harness.save('fuzz_inputs', {'kinds': kinds}, options)}")
    return 0 if all(found["passed"] for found in kinds.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        job = json.loads(Path(sys.argv[1]).read_text())
        Path(sys.argv[2]).write_text(json.dumps(work(job["kind"], job["count"], Path(job["folder"]))))
    else:
        raise SystemExit(main())
