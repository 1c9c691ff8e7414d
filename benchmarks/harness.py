"""What every figure shares: the machine, a median with its spread, fresh processes, a table and a JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SOFTWARE = ("isthmus", "torch", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Spread:
    """The median of repeats, the smallest and the largest."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


def _short(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def parser(about: str | None, steps: int, steps_are: str) -> argparse.ArgumentParser:
    """The options that every figure has; `tiny` runs all of it in seconds, for tests."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--steps", type=int, default=steps, help=steps_are)
    made.add_argument("--repeats", type=int, default=3, help="measurements that median and spread are over")
    made.add_argument("--json", type=Path, help="where the numbers go instead of results/NAME.json")
    made.add_argument("--tiny", action="store_true", help="a few seconds in all; its numbers mean nothing")
    return made


def machine() -> dict[str, Any]:
    """Where and when: processor, cores, threads, how busy it was, versions, commit, command."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in SOFTWARE},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_kept, sys.argv[1:])]),
    }


def in_words(where: dict[str, Any]) -> str:
    """`machine()` in three lines."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    load = f"load {where['load_before']} before"
    return (
        f"{where['processor']}, {where['cores']} cores, {where['threads']} threads, {load}\n"
        f"python {where['python']}, {versions}, commit {where['commit']}\n{where['date']}, {where['command']}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its columns aligned to read in a terminal too."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def save(name: str, result: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write a figure's numbers and return where; those of a tiny run never replace real ones."""
    file = options.json or (Path(tempfile.gettempdir()) if options.tiny else RESULTS) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")
    return file


def child(script: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run `script JOB RESULT`, both JSON files, in a fresh process; what it says is shown only if it fails."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        given, found = Path(scratch) / "job.json", Path(scratch) / "result.json"
        given.write_text(json.dumps(job))
        done = subprocess.run([sys.executable, str(script), str(given), str(found)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script.name} failed on {job}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(found.read_text())


def peak_mib() -> float:
    """The largest resident set of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _processor() -> str:
    """The processor's name and the matrix extensions that it has."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in known.get("flags", "").split() if flag.startswith(("avx512_bf16", "avx512f", "amx"))]
    return f"{known.get('model name', platform.processor())} ({' '.join(flags) or 'no AVX-512'})"


def _kept(argument: str) -> str:
    """An argument of the command as results keep it: of an absolute path the name, as folders are nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _commit() -> str:
    """The commit that was measured, with a plus if files differ from it."""
    try:
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
