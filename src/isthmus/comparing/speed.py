"""How long one picture and a short prompt take until the first answered token, and every token after it: measured."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from isthmus.assembly import load
from isthmus.costs import TEXT, prompt
from isthmus.evaluation.measure import arithmetic_of
from isthmus.files import read_note, write_text
from isthmus.model import VLM
from isthmus.types import Batch

WARM, REPEATS, TOKENS = 1, 5, 17


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
    method: str = (
        f"median of {REPEATS} after {WARM} unmeasured; {TEXT} text tokens, {TOKENS - 1} further ones, one prompt"
    )


def speed_of(folder: Path, dtype: torch.dtype, device: torch.device, note: Path) -> Speed:
    """A saved model's speed, from a note of the same arithmetic, threads and kind of device, or measured and noted."""
    kept = read_note(note)
    if kept.keys() == {field.name for field in fields(Speed)}:
        known = Speed(**kept)
        here = str(dtype).removeprefix("torch."), torch.get_num_threads(), device.type
        if (known.arithmetic, known.threads, torch.device(known.device).type) == here:
            return known
    found = measure(load(folder, dtype, device))
    note.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(asdict(found), indent=1))
    return found


def measure(model: VLM) -> Speed:
    """Time a model that is alone on its device; short and long answers take turns, as machines change their speed."""
    batch = prompt(model, "image").to(model.device)
    turns = [[_seconds(model, batch, tokens) for tokens in (1, TOKENS)] for _ in range(WARM + REPEATS)][WARM:]
    further = statistics.median(long - short for short, long in turns) / (TOKENS - 1)
    return Speed(
        prefill=1000 * statistics.median(short for short, _ in turns),
        decode=1000 * max(0.0, further),
        arithmetic=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=str(model.device),
    )


def _seconds(model: VLM, batch: Batch, tokens: int) -> float:
    """An answer of so many tokens."""
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    began = time.perf_counter()
    with arithmetic_of(model):
        model.generate(batch, **limits, pad_token_id=model.processor.pad)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - began
