"""The peers of `train_vs_peers.py`: transformers' Trainer and TRL's SFTTrainer on LlavaForConditionalGeneration.

Both read prepared tensors through one dataset and one collator that only stacks. TRL's own way from a processor would
tokenise and resize within the step and pulls in torchvision, so it is given a tokenizer and finished batches instead,
which is the faster way for it. Its gradient checkpointing, on by default, is turned off: without it TRL is faster.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import harness
from isthmus.types import IGNORE
from roofline import best_seconds
from train_parts import ALPHA, BETAS, CLIP, RANK, WARMUP, Prepared


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of the peer named by the job's `side` over the prepared batches."""
    from transformers import TrainerCallback

    losses: list[Tensor] = []
    ends: list[float] = []
    base = trainer_class(job)

    class Recorded(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *unused: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    model = load(job)
    rows = Rows(job, model.config.image_token_id)
    given = numbered(rows) if job["side"] == "trl" else {"train_dataset": rows, "data_collator": stacked}
    trainer = Recorded(model, arguments(job), callbacks=[Clock()], **given)
    loaded = harness.peak_mib()
    trainer.train()
    peak = harness.peak_mib()  # before the ceiling allocates anything

    def learn() -> None:
        inputs = rows.batch_of(job["probe"])
        trainer.training_step(trainer.model_wrapped, inputs, (inputs["labels"] != IGNORE).sum())

    return {
        "losses": [float(loss) for loss in losses],
        "seconds": [later - earlier for earlier, later in zip(ends, ends[1:-1])],
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ceiling_seconds": best_seconds(learn) if job["ceiling"] else None,
    }


def trainer_class(job: dict[str, Any]) -> Any:
    """The class that trains."""
    if job["side"] == "trl":
        from trl import SFTTrainer

        return SFTTrainer
    from transformers import Trainer

    return Trainer


def arguments(job: dict[str, Any]) -> Any:
    """The same schedule, optimizer and clipping as ours, in the order of the batches, with nothing logged or saved."""
    common: dict[str, Any] = {
        "output_dir": str(Path(job["folder"]) / "trainer"),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "train_sampling_strategy": "sequential",
        "learning_rate": job["lr"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "optim": "adamw_torch_fused",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "seed": 0,
    }
    if job["side"] == "trl":
        from trl import SFTConfig

        prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTConfig(**common, **prepared, gradient_checkpointing=False)
    from transformers import TrainingArguments

    return TrainingArguments(**common)


def load(job: dict[str, Any]) -> Any:
    """Their form of the model: frozen parts as the job stores them, what trains as float32 masters."""
    from transformers import LlavaForConditionalGeneration

    folder = Path(job["folder"])
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "theirs", dtype=getattr(torch, job["weights"]), attn_implementation="sdpa"
    )
    model.config.text_config.use_cache = False
    model.requires_grad_(False)
    joint = model.model.multi_modal_projector.float()
    with safe_open(folder / "theirs" / "model.safetensors", "pt") as file:
        keys = {key.rpartition("multi_modal_projector.")[2]: key for key in file.keys() if "projector" in key}  # noqa: SIM118
        joint.load_state_dict({name: file.get_tensor(key) for name, key in keys.items()})
    learning = [joint]
    if job["stage"] == "sft" and job["llm"] == "full":
        learning += [model.model.language_model, model.lm_head]
    wrapped = adapted(model, folder) if job["stage"] == "sft" and job["llm"] == "lora" else model
    for module in learning:
        module.requires_grad_(True)
    return wrapped


def adapted(model: Any, folder: Path) -> Any:
    """The model under peft's LoRA, born with the same A as ours; B is zero on both sides."""
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\.layers\..*_proj"
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    born = load_file(folder / "adapter.safetensors")
    mine = {
        name.rpartition("language_model.")[2].removesuffix(".lora_A.default.weight"): parameter
        for name, parameter in wrapped.named_parameters()
        if name.endswith("lora_A.default.weight")
    }
    if mine.keys() != born.keys():
        raise SystemExit(f"peft adapts other Linears: {sorted(mine.keys() ^ born.keys())[:4]}")
    for name, parameter in mine.items():
        parameter.data.copy_(born[name])
    return wrapped


class Rows(torch.utils.data.Dataset):
    """Row r of the run as tensors that only need to be stacked."""

    def __init__(self, job: dict[str, Any], image_token: int):
        self.read, self.steps, self.size = Prepared(job), job["steps"], job["batch"]
        self.placeholder, self.image_token = job["placeholder"], image_token
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, row = divmod(index, self.size)
        if self._held[0] != step:
            self._held = step, self.batch_of(step)
        return {name: tensor[row] for name, tensor in self._held[1].items()}

    def batch_of(self, step: int) -> dict[str, Tensor]:
        """A batch of ours in the words of transformers: its image token, a mask of what is real."""
        ids = self.read("ids", step)
        return {
            "input_ids": ids.masked_fill(ids == self.placeholder, self.image_token),
            "attention_mask": (self.read("segment", step) > 0).long(),
            "labels": self.read("labels", step),
            "pixel_values": self.read("pixels", step),
        }


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator that has nothing left to do."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def numbered(rows: Rows) -> dict[str, Any]:
    """What TRL insists on: a dataset of `datasets`, here of numbers that the collator looks up, and a tokenizer, which
    has nothing to do."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from isthmus import assets

    return {
        "train_dataset": Dataset.from_dict({"number": list(range(len(rows)))}),
        "data_collator": lambda numbers: stacked([rows[each["number"]] for each in numbers]),
        "processing_class": AutoTokenizer.from_pretrained(assets.llm_folder()),
    }
