"""How long one picture and a short prompt take until the first answered token, and every token after it: measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import torch

from isthmus.assembly import load
from isthmus.costs import TEXT, prompt
from isthmus.errors import ConfigError
from isthmus.evaluation.measure import arithmetic_of
from isthmus.experiment import named, processor
from isthmus.exporting import adapters, merge
from isthmus.files import read_note, write_text
from isthmus.model import VLM
from isthmus.types import Batch

ROUNDS, WARM, REPEATS, TOKENS = 3, 1, 2, 17
Turns: TypeAlias = list[tuple[float, float]]
"""Seconds of a short answer and of the long one behind it."""
METHOD = (
    f"median of {ROUNDS * REPEATS}, {REPEATS} of each joint in {ROUNDS} rounds over all, after {WARM} unmeasured in "
    f"each; {TEXT} text tokens, {TOKENS - 1} further ones, one prompt; LoRA merged where it can be"
)


@dataclass(frozen=True)
class Speed:
    """Medians, in milliseconds, on the machine and in the arithmetic that are named beside them."""

    prefill: float
    """The encoder, the joint and the LLM over one picture and `TEXT` text tokens, up to the first token."""
    decode: float
    """Each further token."""
    arithmetic: str
    threads: int
    device: str
    processor: str = ""
    when: str = ""
    """When the first of all the joints that took turns with this one was timed."""
    prefill_spread: float = 0.0
    """Milliseconds from the fastest round to the slowest."""
    decode_spread: float = 0.0
    merged: bool = True
    """Whether no LoRA stood beside the weights: some cannot be merged."""
    method: str = METHOD


def speeds(
    models: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    notes: Mapping[str, Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Speed]:
    """Saved models' speeds: noted when all of them took turns on a machine like this, or else measured so and noted.

    Args:
        models: their folders, by joint.
        notes: a file for each.
    """
    here: dict[str, Any] = {
        "arithmetic": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": named(device),
        "processor": processor(),
        "method": METHOD,
    }
    known = {name: read_note(note) for name, note in notes.items()}
    whole = {field.name for field in fields(Speed)}
    if (
        all(kept.keys() == whole and here.items() <= kept.items() for kept in known.values())
        and len({kept["when"] for kept in known.values()}) == 1
    ):
        return {name: Speed(**kept) for name, kept in known.items()}
    here["when"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    rounds: dict[str, list[Turns]] = {name: [] for name in models}
    unmerged = set()
    for number in range(ROUNDS):
        for place, (name, folder) in enumerate(models.items()):
            progress(number * len(models) + place, ROUNDS * len(models))
            model = ready(folder, dtype, device)
            rounds[name].append(measure(model))
            if adapters(model):
                unmerged.add(name)
            del model  # before the next one is loaded
    progress(ROUNDS * len(models), ROUNDS * len(models))
    found = {name: _speed(rounds[name], merged=name not in unmerged, **here) for name in models}
    for name, speed in found.items():
        notes[name].parent.mkdir(parents=True, exist_ok=True)
        write_text(notes[name], json.dumps(asdict(speed), indent=1))
    return found


def ready(folder: Path, dtype: torch.dtype, device: torch.device) -> VLM:
    """A saved model as it answers fastest: LoRA is merged, but for what cannot be."""
    model = load(folder, dtype, device)
    with suppress(ConfigError):
        merge(model)
    return model


def measure(model: VLM) -> Turns:
    """Time a model that is alone on its device; short and long answers take turns, as machines change their speed."""
    batch = prompt(model, "image").to(model.device)
    turns = [(_seconds(model, batch, 1), _seconds(model, batch, TOKENS)) for _ in range(WARM + REPEATS)]
    return turns[WARM:]


def _seconds(model: VLM, batch: Batch, tokens: int) -> float:
    """An answer of so many tokens."""
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    began = time.perf_counter()
    with arithmetic_of(model):
        model.generate(batch, **limits, pad_token_id=model.processor.pad)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - began


def _speed(rounds: Sequence[Turns], **known: Any) -> Speed:
    """Medians over all turns, and how far those of single rounds lie apart."""
    prefill, decode = _medians([turn for turns in rounds for turn in turns])
    spreads = [max(each) - min(each) for each in zip(*map(_medians, rounds))]
    return Speed(prefill, decode, prefill_spread=spreads[0], decode_spread=spreads[1], **known)


def _medians(turns: Turns) -> tuple[float, float]:
    """Milliseconds until the first token, and of each further one."""
    further = statistics.median(long - short for short, long in turns) / (TOKENS - 1)
    return 1000 * statistics.median(short for short, _ in turns), 1000 * max(0.0, further)


def told(timed: Mapping[str, Speed]) -> str:
    """Where and when joints were timed, which with LoRA beside their weights, and how far the rounds lie apart."""
    first = next(iter(timed.values()))
    beside = ", ".join(name for name, speed in timed.items() if not speed.merged)
    prefill = max(speed.prefill_spread / speed.prefill for speed in timed.values())
    decode = max((speed.decode_spread / speed.decode for speed in timed.values() if speed.decode), default=0.0)
    return (
        f"{first.when}, {first.processor}, {first.threads} threads, {first.device}, {first.arithmetic}; "
        + (f"LoRA of {beside} cannot be merged; " if beside else "")
        + f"rounds of one joint lie up to {prefill:.0%} (prefill) and {decode:.0%} (token) apart"
    )
