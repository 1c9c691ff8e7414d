"""One side of `train_vs_peers.py` in a process of its own: `train_worker.py JOB RESULT`, both JSON.

`prepare` (in `train_parts`) makes one model in both forms and the batches that all sides read; `train_peers` trains it
with transformers' Trainer or TRL's SFTTrainer, `ours` with `run_stage`. With the feature cache, the look-up of the
cached rows is in the step.

`seconds` are whole turns of the training loop, for steps 1 to n - 2: from one `on_step_end` of Trainer to the next, and
from one question to our feed to the next.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import harness
import train_peers
from isthmus import kernels_linear
from isthmus.data.pack import pack
from isthmus.types import IGNORE
from roofline import best_seconds
from train_parts import Prepared, pictures, prepare, stage_of

FILLERS = {"ids": 0, "segment": 0, "modality": 0, "labels": IGNORE}
"""The tensors that hold a batch's text, and what stands at padding."""


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of `run_stage` over the prepared batches, or over cached features of the same pictures."""
    from rich.console import Console

    from isthmus.training import log, loop

    folder, steps, dtype = Path(job["folder"]), job["steps"], getattr(torch, job["dtype"])
    model = load(job)
    if job["perturb"]:
        model.connectors["image"].layers[2].bias.data += job["perturb"]
    loaded = harness.peak_mib()
    began = time.perf_counter()
    feed = Feed(model, job)
    filled = time.perf_counter() - began if job["cached"] else 0.0
    run, stage = folder / "run", stage_of(job)
    shutil.rmtree(run, ignore_errors=True)
    with full_head() if job["head"] == "full" else nullcontext():
        loop.run_stage(model, stage, feed, run, steps=steps, dtype=dtype, console=Console(file=io.StringIO()))
        peak = harness.peak_mib()  # before the ceiling allocates anything
        ceiling = best_seconds(one_step(model, feed, job)) if job["ceiling"] else None
    rows = log.read_rows(run / "metrics.jsonl")
    return {
        "losses": [row["loss"] for row in rows],
        "seconds": [later - earlier for earlier, later in zip(feed.asked[1:], feed.asked[2:steps])],
        "fill_seconds": filled,
        "pictures": feed.pictures,
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ceiling_seconds": ceiling,
    }


def load(job: dict[str, Any]) -> Any:
    """Our form of the model: frozen parts in the run's dtype, the joint exactly as it is on disk."""
    import isthmus

    folder = Path(job["folder"]) / "ours"
    model = isthmus.load(folder, torch.float32 if job["weights"] == "float32" else getattr(torch, job["dtype"]))
    model.llm.set_attn_implementation(job["attention"])
    if job["onednn"]:
        kernels_linear.use_onednn(model)
    joint, prefix = model.connectors["image"].float(), "connectors.image."
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        joint.load_state_dict({key.removeprefix(prefix): file.get_tensor(key) for key in keys})
    return model


def one_step(model: Any, feed: Feed, job: dict[str, Any]) -> Any:
    """Forward and backward of the batch `job["probe"]`, of a model whose trained parameters are awake."""
    from isthmus.training.step import Step

    step, dtype = Step(model, stage_of(job).objectives), getattr(torch, job["dtype"])
    step.ready()

    def learn() -> None:
        batch = feed(job["probe"], 0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, _ = step(batch, step.scales([batch]))
        total.backward()

    return learn


class Feed:
    """The prepared batches as `Batch`; with pixels, or with features that are cached when the feed is made."""

    micros = 1

    def __init__(self, model: Any, job: dict[str, Any]):
        from isthmus.prepare.features import FeatureCache

        self.read, self.pictures, self.size = Prepared(job), 0, job["batch"]
        self.packed = job["batching"] == "packed"
        self.asked: list[float] = []
        self.cache: FeatureCache | None = None
        if job["cached"]:
            folder = Path(job["folder"])
            media = pictures(json.loads((folder / "refs.json").read_text()))
            self.media = [media[place] for place in job["order"]]
            shutil.rmtree(folder / "features", ignore_errors=True)
            self.cache = FeatureCache(model.encoders["image"], folder / "features")
            self.pictures = self.cache.fill(media)

    def __call__(self, step: int, micro: int) -> Any:
        from isthmus.types import Batch, Media

        self.asked.append(time.perf_counter())
        text = {name: self.read(name, step) for name in FILLERS}
        rows = [[row] for row in range(self.size)]
        if self.packed:
            rows, text = packed(text)
        order = [sample for row in rows for sample in row]
        at = (text["modality"].diff(dim=1, prepend=text["modality"][:, :1]) == 1).nonzero()
        pixels, features = None, None
        if self.cache is None:
            pixels = self.read("pixels", step)[order]
        else:
            first = step % self.read.distinct * self.size
            _, features = self.cache("image", [self.media[first + sample] for sample in order])
        segment_N = text["segment"][at[:, 0], at[:, 1]]
        return Batch(
            input_ids_BT=text["ids"],
            segment_BT=text["segment"],
            modality_BT=text["modality"],
            labels_BT=text["labels"],
            media={"image": Media(at[:, 0], segment_N, at[:, 1], pixels, features)},
            ids=tuple(f"{step}/{sample}" for sample in order),
        )


def packed(text: dict[str, Tensor]) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The same samples in as few rows of the same width as they fit into: samples by row, and the tensors."""
    lengths = (text["segment"] > 0).sum(1).tolist()
    rows = pack(lengths, [1] * len(lengths), max(lengths))
    for row in rows:
        for place, sample in enumerate(row, start=1):
            text["segment"][sample] *= place

    def joined(name: str) -> Tensor:
        pieces = [torch.cat([text[name][sample, : lengths[sample]] for sample in row]) for row in rows]
        return pad_sequence(pieces, batch_first=True, padding_value=FILLERS[name])

    return rows, {name: joined(name) for name in FILLERS}


@contextmanager
def full_head() -> Iterator[None]:
    """For the ablation: logits at every position and one cross-entropy over them, as transformers does it."""
    from isthmus.objectives import lm

    def loss(self: Any, step: Any, output: Any, batch: Any) -> Tensor:
        logits = output.head(output.hidden_BTD).float()[:, :-1].flatten(0, 1)
        target = batch.labels_BT[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")

    original = lm.NextToken.loss
    lm.NextToken.loss = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        lm.NextToken.loss = original  # type: ignore[method-assign]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Do what the job's `side` says."""
    return {"prepare": prepare, "ours": ours, "trainer": train_peers.train, "trl": train_peers.train}[job["side"]](job)


if __name__ == "__main__":
    found = answer(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
