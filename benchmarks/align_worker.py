"""One side of `align_vs_hf.py` in a process of its own: `align_worker.py JOB RESULT`, both JSON.

`prepare` (in `align_parts`) makes one model in both forms and the batches that both sides read; `theirs` trains it with
transformers' Trainer, `ours` with `run_stage`. With the feature cache, the look-up of the cached rows is in the step.

`seconds` are whole turns of the training loop, for steps 1 to n - 2: from one `on_step_end` of Trainer to the next, and
from one question to our feed to the next.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import harness
from align_parts import Prepared, open_data, prepare
from ceiling import best_seconds
from isthmus.types import IGNORE

WARMUP, BETAS, CLIP = 0.1, (0.9, 0.999), 1.0

# ---------------------------------------------------------------------------------------------- theirs


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of transformers' Trainer over the prepared batches."""
    from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    folder, steps, size = Path(job["folder"]), job["steps"], job["batch"]
    read = Prepared(job)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "theirs", dtype=torch.bfloat16 if job["weights"] == "bfloat16" else torch.float32
    )
    model.config.text_config.use_cache = False
    model.requires_grad_(False)
    joint = model.model.multi_modal_projector.float().requires_grad_(True)
    _exact(joint, folder / "theirs")  # float32 masters, as ours
    image_token = model.config.image_token_id
    losses: list[Tensor] = []
    ends: list[float] = []

    class Rows(torch.utils.data.Dataset):
        """Row r of the run as tensors that only need to be stacked."""

        def __len__(self) -> int:
            return steps * size

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            step, row = divmod(index, size)
            if row == 0:
                self.batch = _for_theirs(read, step, job["placeholder"], image_token)
            return {name: tensor[row] for name, tensor in self.batch.items()}

    class Recorded(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *unused: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    trainer = Recorded(
        model,
        TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=size,
            train_sampling_strategy="sequential",
            learning_rate=job["lr"],
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            optim="adamw_torch_fused",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=CLIP,
            bf16=job["dtype"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
            seed=0,
        ),
        train_dataset=Rows(),
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        callbacks=[Clock()],
    )
    loaded = harness.peak_mib()
    trainer.train()
    peak = harness.peak_mib()  # before the ceiling allocates anything

    def learn() -> None:
        inputs = _for_theirs(read, job["probe"], job["placeholder"], image_token)
        trainer.training_step(trainer.model_wrapped, inputs, (inputs["labels"] != IGNORE).sum())

    return {
        "losses": [float(loss) for loss in losses],
        "seconds": [later - earlier for earlier, later in zip(ends, ends[1:-1])],
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ceiling_seconds": _ceiling(job, learn),
    }


def _for_theirs(read: Prepared, step: int, placeholder: int, image_token: int) -> dict[str, Tensor]:
    """A batch of ours in the words of transformers: its image token, a mask of what is real."""
    ids = read("ids", step)
    return {
        "input_ids": ids.masked_fill(ids == placeholder, image_token),
        "attention_mask": (read("segment", step) > 0).long(),
        "labels": read("labels", step),
        "pixel_values": read("pixels", step),
    }


def _exact(joint: torch.nn.Module, folder: Path) -> None:
    """Fill the joint with the float32 weights on disk, which loading in bfloat16 has rounded."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = {key.rpartition("multi_modal_projector.")[2]: key for key in file.keys() if "projector" in key}  # noqa: SIM118
        joint.load_state_dict({name: file.get_tensor(key) for name, key in keys.items()})


# ---------------------------------------------------------------------------------------------- ours


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of `run_stage` over the prepared batches, or over cached features of the same pictures."""
    from rich.console import Console

    import isthmus
    from isthmus.config import Budget, Source, Stage, Train
    from isthmus.training import log, loop
    from isthmus.training.step import Step

    folder, steps = Path(job["folder"]), job["steps"]
    dtype = getattr(torch, job["dtype"])
    model = isthmus.load(folder / "ours", dtype)
    _exact_joint(model, folder / "ours")
    model.llm.set_attn_implementation(job["attention"])
    if job["perturb"]:
        model.connectors["image"].layers[2].bias.data += job["perturb"]
    stage = Stage(
        name="align",
        data=(Source(name="prepared"),),
        train={"connectors.*": Train()},
        budget=Budget(steps=steps),
        lr=job["lr"],
        batch_size=job["batch"],
        warmup=WARMUP,
        betas=BETAS,
        clip=CLIP,
        evaluate_every=None,
        save_every=None,
    )
    loaded = harness.peak_mib()
    began = time.perf_counter()
    feed = Feed(model, job)
    filled = time.perf_counter() - began if job["cached"] else 0.0
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    with full_head() if job["head"] == "full" else _nothing():
        loop.run_stage(model, stage, feed, run, steps=steps, dtype=dtype, console=Console(file=io.StringIO()))
        peak = harness.peak_mib()  # before the ceiling allocates anything
        step = Step(model, stage.objectives)
        step.ready()

        def learn() -> None:
            batch = feed(job["probe"], 0)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                total, _ = step(batch, step.scales([batch]))
            total.backward()

        ceiling = _ceiling(job, learn)
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


class Feed:
    """The prepared batches as `Batch`; with pixels, or with features that are cached when the feed is made."""

    micros = 1

    def __init__(self, model: Any, job: dict[str, Any]):
        from isthmus.prepare.features import FeatureCache

        self.read, self.pictures = Prepared(job), 0
        self.asked: list[float] = []
        self.cache: FeatureCache | None = None
        if job["cached"]:
            folder, data = Path(job["folder"]), open_data()
            refs = json.loads((folder / "refs.json").read_text())
            self.media = [[medium for ref in batch for medium in data.sample(tuple(ref)).media] for batch in refs]
            shutil.rmtree(folder / "features", ignore_errors=True)
            self.cache = FeatureCache(model.encoders["image"], folder / "features")
            self.pictures = self.cache.fill([medium for batch in self.media for medium in batch])

    def __call__(self, step: int, micro: int) -> Any:
        from isthmus.types import Batch, Media

        self.asked.append(time.perf_counter())
        row = self.read("row", step)
        pixels, features = None, None
        if self.cache is None:
            pixels = self.read("pixels", step)
        else:
            _, features = self.cache("image", self.media[step % self.read.distinct])
        media = Media(row, torch.ones_like(row), self.read("at", step), pixels, features)
        ids = self.read("ids", step)
        return Batch(
            input_ids_BT=ids,
            segment_BT=self.read("segment", step),
            modality_BT=self.read("modality", step),
            labels_BT=self.read("labels", step),
            media={"image": media},
            ids=tuple(f"{step}/{number}" for number in range(len(ids))),
        )


def _exact_joint(model: Any, folder: Path) -> None:
    """The float32 weights on disk, whatever loading did to them."""
    joint = model.connectors["image"].float()
    with safe_open(folder / "model.safetensors", "pt") as file:
        prefix = "connectors.image."
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        joint.load_state_dict({key.removeprefix(prefix): file.get_tensor(key) for key in keys})


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


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _ceiling(job: dict[str, Any], learn: Callable[[], object]) -> float | None:
    """Best time of the matrix products in one more step, where asked for."""
    return best_seconds(learn) if job["ceiling"] else None


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Do what the job's `side` says."""
    return {"prepare": prepare, "theirs": theirs, "ours": ours}[job["side"]](job)


if __name__ == "__main__":
    found = answer(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
