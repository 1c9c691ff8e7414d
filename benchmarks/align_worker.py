"""One side of `align_vs_hf.py` in a process of its own: `align_worker.py JOB RESULT`, both JSON.

`prepare` makes one model in both forms and the batches that both sides read; `theirs` trains it with transformers'
Trainer, `ours` with `run_stage`. Tokenising, drawing and preprocessing pictures happen in `prepare` alone, so they are
timed on neither side; with the feature cache, what is in the step is the look-up of the cached rows.

`seconds` are whole turns of the training loop, for steps 1 to n - 2: from one `on_step_end` of Trainer to the next, and
from one question to our feed to the next. `row_seconds` are what our loop itself wrote down for the same steps.
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

import harness
import torch
from ceiling import best_seconds
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.types import IGNORE

LR, WARMUP, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.999), 1.0
IMAGE_TOKEN = "<empty_output>"
"""A token of SmolLM2's vocabulary that no text holds: transformers' LLaVA wants its image token inside."""
TOWERS = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "image_size": 64, "patch_size": 8},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 112, "patch_size": 16},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 32},
    "check": {"hidden_size": 64, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
}
"""CLIP vision towers with random weights, all but the last 12 blocks deep."""
CHECK_LLM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}
"""What becomes of SmolLM2's architecture for the loss check; its weights are random."""


# ---------------------------------------------------------------------------------------------- prepare


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write `theirs/`, `ours/` and `batches.safetensors` into the folder, weights equal in both forms."""
    from isthmus import exporting

    folder = Path(job["folder"])
    theirs, processor = build(job["size"])
    ours = exporting.from_llava(theirs, processor, "benchmark")
    difference = exporting.compare(ours, theirs)
    difference.require("the two forms of the model")
    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours", whole=True)
    counts = write_batches(ours, folder, job["steps"], job["batch"])
    tower = sum(parameter.numel() for parameter in theirs.model.vision_tower.parameters())
    return counts | {"logits_differ": difference.difference, "tower_parameters": tower}


def build(size: str) -> tuple[Any, Any]:
    """A LLaVA of transformers: SmolLM2-135M with its weights (random and small for `check`) under a random tower."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from isthmus import assets

    source = assets.llm_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tower, small = TOWERS[size], size == "check"
    text = LlamaConfig.from_pretrained(source, **(CHECK_LLM if small else {}))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **tower, intermediate_size=4 * tower["hidden_size"], num_hidden_layers=2 if small else 12
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    if not small:
        llm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.model.language_model.load_state_dict(llm.base_model.state_dict())
    side = tower["image_size"]
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model, LlavaProcessor(pictures, tokenizer, patch_size=tower["patch_size"], image_token=IMAGE_TOKEN)


def write_batches(ours: Any, folder: Path, steps: int, size: int) -> dict[str, Any]:
    """Length-bucketed batches of the demo's data as tensors; their samples' places in the data, for the cache."""
    from isthmus.data.mix import Batches

    data = open_data()
    collator = ours.processor.collator()
    batches = Batches(data.mix, size, "bucketed", length=lambda ref: collator.lengths(data.sample(ref)), window=steps)
    tensors: dict[str, Tensor] = {}
    refs = []
    for step in range(steps):
        refs.append(batches[step])
        batch = collator([data.sample(ref) for ref in batches[step]])
        image = batch.media["image"]
        parts = {"ids": batch.input_ids_BT, "segment": batch.segment_BT, "modality": batch.modality_BT}
        parts |= {"labels": batch.labels_BT, "row": image.row_N, "at": image.at_N, "pixels": image.pixels}
        tensors |= {f"{name}.{step}": part.contiguous() for name, part in parts.items()}
    save_file(tensors, folder / "batches.safetensors")
    (folder / "refs.json").write_text(json.dumps(refs))
    ids = [tensors[f"ids.{step}"] for step in range(steps)]
    real = sum(int((tensors[f"segment.{step}"] > 0).sum()) for step in range(steps))
    supervised = [int((tensors[f"labels.{step}"] != IGNORE).sum()) for step in range(steps)]
    return {
        "widths": [batch.shape[1] for batch in ids],
        "supervised": supervised,
        "padding": 1 - real / sum(batch.numel() for batch in ids),
        "placeholder": ours.placeholder("image"),
    }


def open_data() -> Any:
    """The demo's mix of easy-VQA and scenes."""
    from isthmus.recipes import demo
    from isthmus.training.run import mix_of

    return mix_of(demo().stage("align"), seed=0)


class Prepared:
    """The batches on disk, read as they are asked for."""

    def __init__(self, folder: Path):
        self._file = safe_open(folder / "batches.safetensors", "pt")

    def __call__(self, name: str, step: int) -> Tensor:
        return self._file.get_tensor(f"{name}.{step}")


# ---------------------------------------------------------------------------------------------- theirs


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of transformers' Trainer over the prepared batches."""
    from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    folder, steps, size = Path(job["folder"]), job["steps"], job["batch"]
    read = Prepared(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
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
            loss = super().compute_loss(*args, **kwargs)
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
            learning_rate=LR,
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
    inputs = _for_theirs(read, job["probe"], job["placeholder"], image_token)
    counted = (inputs["labels"] != IGNORE).sum()
    return {
        "losses": [float(loss) for loss in losses],
        "seconds": [later - earlier for earlier, later in zip(ends, ends[1:-1])],
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ceiling_seconds": _ceiling(job, lambda: trainer.training_step(trainer.model_wrapped, inputs, counted)),
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
        lr=LR,
        batch_size=job["batch"],
        warmup=WARMUP,
        betas=BETAS,
        clip=CLIP,
        evaluate_every=None,
        save_every=None,
    )
    loaded = harness.peak_mib()
    began = time.perf_counter()
    feed = Feed(model, folder, job["cached"], steps)
    filled = time.perf_counter() - began if job["cached"] else 0.0
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    with full_head() if job["head"] == "full" else _nothing():
        loop.run_stage(model, stage, feed, run, steps=steps, dtype=dtype, console=Console(file=io.StringIO()))
        peak = harness.peak_mib()  # before the ceiling allocates anything
        step, batch = Step(model, stage.objectives), feed(job["probe"], 0)
        step.ready()

        def learn() -> None:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                total, _ = step(batch, step.scales([batch]))
            total.backward()

        ceiling = _ceiling(job, learn)
    rows = log.read_rows(run / "metrics.jsonl")
    return {
        "losses": [row["loss"] for row in rows],
        "seconds": [later - earlier for earlier, later in zip(feed.asked[1:], feed.asked[2:steps])],
        "row_seconds": [row["seconds"] for row in rows][1:-1],
        "fill_seconds": filled,
        "pictures": feed.pictures,
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ceiling_seconds": ceiling,
    }


class Feed:
    """The prepared batches as `Batch`; with pixels, or with features that are cached when the feed is made."""

    micros = 1

    def __init__(self, model: Any, folder: Path, cached: bool, steps: int):
        from isthmus.prepare.features import FeatureCache

        self.read, self.asked, self.pictures = Prepared(folder), [], 0
        self.cache: FeatureCache | None = None
        if cached:
            data = open_data()
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
            _, features = self.cache("image", self.media[step])
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


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    answer = {"prepare": prepare, "theirs": theirs, "ours": ours}[asked["side"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(answer))
