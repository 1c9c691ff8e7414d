"""What strangers can do to `isthmus serve`, at full size, against a real process on a tiny model.

    python benchmarks/attack_server.py [--only S1 S2 ...] [--steps REQUESTS] [--bodies N] [--json FILE] [--tiny]

S1: URLs of pictures that lead inward, with a canary that listens on loopback. S2: many clients at once, whose answers
must be those that each would hear alone. S3: clients that leave in every way, and sockets that send a byte a second.
S4: every limit, one below, at it and one above. S5: keys, Host headers and paths. S6: thousands of bodies drawn by
schemathesis from the server's own description. All of it stays on loopback. `attack_checkpoints.py` is the same for
directories of models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attack_limits
import attack_load
import attack_reach
import attacked
import harness

ATTACKS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "S1": attack_reach.urls,
    "S2": attack_load.crowd,
    "S3": attack_load.leaving,
    "S4": attack_limits.limits,
    "S5": attack_reach.doors,
    "S6": attack_limits.bodies,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the attacks, print a table, write what was found; 1 if one of them got anywhere."""
    made = harness.parser(__doc__, 50, "requests of each client in S2")
    made.add_argument("--bodies", type=int, default=5000, help="of S6")
    made.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    options = made.parse_args(arguments)
    result: dict[str, Any] = {"machine": harness.machine(), "attacks": {}}
    with tempfile.TemporaryDirectory(prefix="isthmus-attack-") as folder:
        model = attacked.build(Path(folder))
        for name in options.only:
            where, begun = harness.machine(), time.monotonic()
            found = ATTACKS[name](model, options)
            seconds = round(time.monotonic() - begun, 1)
            result["attacks"][name] = found | {"seconds": seconds, "date": where["date"], "load": where["load_before"]}
            result["attacks"] = _earlier(options) | result["attacks"]
            harness.save("attack_server", result, options)  # what is done stays if a later one is interrupted
    print(harness.in_words(result["machine"]), end="\n\n")
    print(harness.table(["attack", "what", "found", "seconds", "promise"], list(lines(result["attacks"]))))
    return 0 if all(result["attacks"][name]["passed"] for name in options.only) else 1


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    """What the attacks that are left out this time found last time, each with its own date."""
    file = options.json or harness.RESULTS / "attack_server.json"
    if options.tiny or len(options.only) == len(ATTACKS) or not file.is_file():
        return {}
    return json.loads(file.read_text())["attacks"]


def lines(attacks: dict[str, Any]) -> Iterator[list[str]]:
    for name in filter(attacks.__contains__, ATTACKS):
        found = attacks[name]
        yield [name, found["what"], found["found"], f"{found['seconds']:.0f}", "kept" if found["passed"] else "missed"]


if __name__ == "__main__":
    sys.exit(main())
