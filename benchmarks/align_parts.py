"""What both sides of `align_vs_hf.py` read: one model in two forms, and batches as tensors on disk.

Tokenising, drawing and preprocessing pictures happen here alone, so they are timed on neither side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.types import IGNORE

IMAGE_TOKEN = "<empty_output>"
"""A token of SmolLM2's vocabulary that no text holds: transformers' LLaVA wants its image token inside."""
TOWERS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "image_size": 64, "patch_size": 8},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 112, "patch_size": 16},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 32},
    "check": {"hidden_size": 64, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
}
"""CLIP vision towers with random weights; `check` has 2 blocks, the others 12."""
CHECK_LLM: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}
"""What becomes of SmolLM2's architecture for the loss check; its weights are random."""


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
    counts = write_batches(ours, folder, job["distinct"], job["batch"])
    tower = sum(parameter.numel() for parameter in theirs.model.vision_tower.parameters())
    return counts | {"logits_differ": difference.difference, "tower_parameters": tower}


def build(size: str) -> tuple[Any, Any]:
    """A LLaVA of transformers: SmolLM2-135M with its weights (random and small for `check`) under a random tower."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from isthmus import assets

    source = assets.llm_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
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


def write_batches(ours: Any, folder: Path, count: int, size: int) -> dict[str, Any]:
    """Length-bucketed batches of easy-VQA and scenes as tensors; their samples' places in the data, for the cache."""
    from isthmus.data.mix import Batches

    data = open_data()
    collator = ours.processor.collator()
    batches = Batches(data.mix, size, "bucketed", length=lambda ref: collator.lengths(data.sample(ref)), window=count)
    tensors: dict[str, Tensor] = {}
    refs = []
    for step in range(count):
        refs.append(batches[step])
        batch = collator([data.sample(ref) for ref in batches[step]])
        image = batch.media["image"]
        parts = {"ids": batch.input_ids_BT, "segment": batch.segment_BT, "modality": batch.modality_BT}
        parts |= {"labels": batch.labels_BT, "row": image.row_N, "at": image.at_N, "pixels": image.pixels}
        tensors |= {f"{name}.{step}": part.contiguous() for name, part in parts.items()}
    save_file(tensors, folder / "batches.safetensors")
    (folder / "refs.json").write_text(json.dumps(refs))
    ids = [tensors[f"ids.{step}"] for step in range(count)]
    real = sum(int((tensors[f"segment.{step}"] > 0).sum()) for step in range(count))
    supervised = [int((tensors[f"labels.{step}"] != IGNORE).sum()) for step in range(count)]
    return {
        "widths": [batch.shape[1] for batch in ids],
        "supervised": supervised,
        "padding": 1 - real / sum(batch.numel() for batch in ids),
        "placeholder": ours.placeholder("image"),
    }


def open_data() -> Any:
    """The demo's kinds of data, with sizes of its own, so that a change of the demo does not change this figure."""
    from isthmus.config import Budget, Source, Stage
    from isthmus.training.run import mix_of

    sources = (Source(name="easy-vqa", weight=2.0), Source(name="scenes", weight=3.0, options={"count": 6000}))
    return mix_of(Stage(name="align", data=sources, train={}, budget=Budget(steps=1)), seed=0)


class Prepared:
    """The batches on disk, read as they are asked for, over and over where there are fewer than steps."""

    def __init__(self, job: dict[str, Any]):
        self._file, self.distinct = safe_open(Path(job["folder"]) / "batches.safetensors", "pt"), job["distinct"]

    def __call__(self, name: str, step: int) -> Tensor:
        return self._file.get_tensor(f"{name}.{step % self.distinct}")
