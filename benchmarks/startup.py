"""How long it takes until something happens: `import isthmus` beyond torch and transformers, and `isthmus --help`.

    python benchmarks/startup.py [--repeats N] [--json FILE]

Every measurement is a fresh process, after one that is not counted and fills the disk cache. The targets are those of
the project: 2 s for the import without torch and transformers, 0.5 s for the whole of `isthmus --help`.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import harness

TARGETS = {"import isthmus, own share": 2.0, "isthmus --help": 0.5}
TIMED = """
import sys, time
began = time.perf_counter()
for name in sys.argv[1:]:
    __import__(name)
print(time.perf_counter() - began)
"""


def importing(*names: str) -> float:
    """Seconds to import these packages one after another in a fresh process, the interpreter's start not counted."""
    done = subprocess.run([sys.executable, "-c", TIMED, *names], capture_output=True, text=True, check=True)
    return float(done.stdout)


def helping() -> float:
    """Seconds that `isthmus --help` takes, from the shell's point of view."""
    command = Path(sysconfig.get_path("scripts")) / "isthmus"
    began = time.perf_counter()
    subprocess.run([command, "--help"], capture_output=True, check=True)
    return time.perf_counter() - began


def once() -> dict[str, float]:
    """All measurements of one repeat."""
    torch, peers, whole = importing("torch"), importing("torch", "transformers"), importing("isthmus")
    return {
        "import torch": torch,
        "import transformers, after torch": peers - torch,
        "import isthmus, whole": whole,
        "import isthmus, own share": whole - peers,
        "isthmus --help": helping(),
    }


def _judged(name: str, met: dict[str, bool]) -> list[str]:
    """The target of a row, and whether it is met."""
    return [f"{TARGETS[name]:g}", "met" if met[name] else "missed"] if name in met else ["", ""]


def main(arguments: list[str] | None = None) -> int:
    made = harness.parser(__doc__, 1, "not used here")
    made.set_defaults(repeats=5)
    options = made.parse_args(arguments)
    where, repeats = harness.machine(), 1 if options.tiny else options.repeats
    once()
    turns = [once() for _ in range(repeats)]
    found = {name: harness.Spread.of([turn[name] for turn in turns]) for name in turns[0]}
    met = {name: found[name].median < limit for name, limit in TARGETS.items()}
    rows = [[name, str(spread), *_judged(name, met)] for name, spread in found.items()]
    print(harness.in_words(where))
    print(f"seconds, median (smallest–largest) of {repeats} fresh processes")
    print(harness.table(["what", "seconds", "target", ""], rows))
    print(harness.save("startup", {"machine": where, "seconds": found, "targets": TARGETS, "met": met}, options))
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
