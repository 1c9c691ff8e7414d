"""What all sides of `train_vs_peers.py` read: one model in two forms, and batches as tensors on disk.

Tokenising, drawing and preprocessing pictures happen here alone, so they are timed on neither side.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.types import IGNORE, Medium

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


SPREADS = {"narrow": (0.9, 1.1), "wide": (0.125, 1.875)}
"""Shortest and longest text as shares of the mean length; lengths are evenly spaced between them."""
RANK, ALPHA = 16, 32.0
"""LoRA of stage `sft`, on every Linear of the LLM's layers."""
WARMUP, BETAS, CLIP = 0.1, (0.9, 0.999), 1.0


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write `theirs/`, `ours/`, the batches and the newborn adapter into the folder, weights equal in both forms."""
    from isthmus import kernels_linear
    from isthmus.exporting import llava

    folder = Path(job["folder"])
    theirs, processor = build(job["size"])
    ours = llava.from_llava(theirs, processor, "benchmark")
    kernels_linear.use_pytorch(ours)  # as theirs computes
    difference = llava.compare(ours, theirs)
    difference.require("the two forms of the model")
    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours", whole=True)
    made = write_batches(ours, job)
    tower = sum(parameter.numel() for parameter in theirs.model.vision_tower.parameters())
    if job["stage"] == "sft" and job["llm"] == "lora":
        write_adapter(ours, job)
    return made | {"logits_differ": difference.difference, "tower_parameters": tower}


def stage_of(job: dict[str, Any]) -> Any:
    """The stage as our recipes say it: `align` trains the connector, `sft` the LLM's layers too."""
    from isthmus.config import Budget, LoRA, Source, Stage, Train

    llm = Train(mode=LoRA(r=RANK, alpha=ALPHA)) if job["llm"] == "lora" else Train()
    globs = {"connectors.*": Train()}
    if job["stage"] == "sft":
        globs["llm.model.layers.*" if job["llm"] == "lora" else "llm.*"] = llm
    return Stage(
        name=job["stage"],
        data=(Source(name="prepared"),),
        train=globs,
        budget=Budget(steps=job["steps"]),
        lr=job["lr"],
        batch_size=job["batch"],
        warmup=WARMUP,
        betas=BETAS,
        clip=CLIP,
        evaluate_every=None,
        save_every=None,
    )


def write_adapter(ours: Any, job: dict[str, Any]) -> None:
    """The LoRA that `run_stage` will give birth to, for peft to start from: A by name of its Linear; B is zero."""
    from isthmus.training import loop, optimizer
    from isthmus.training.step import Step

    stage = stage_of(job)
    torch.manual_seed(loop.derive(0, stage.name, "birth"))
    optimizer.choose(Step(ours, stage.objectives), stage)
    tail = f".grafts.{stage.name}.A"
    born = {name: parameter for name, parameter in ours.llm.named_parameters() if name.endswith(tail)}
    layers = {name.removeprefix("model.").removesuffix(tail): A.detach().contiguous() for name, A in born.items()}
    save_file(layers, Path(job["folder"]) / "adapter.safetensors")


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


def write_batches(ours: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Conversations about a picture, cut at the drawn lengths, in bucketed and in shuffled batches of tensors."""
    folder, count, size = Path(job["folder"]), job["distinct"], job["batch"]
    texts, refs = draw(ours, count * size, job["length"], job["spread"])
    (folder / "refs.json").write_text(json.dumps(refs))
    orders = {"bucketed": _bucketed(texts, size), "shuffled": list(range(len(texts)))}
    pixels = ours.processor.look("image", pictures(refs))[0]
    placeholder, queries = ours.placeholder("image"), ours.queries("image")
    tensors: dict[str, Tensor] = {}
    made: dict[str, Any] = {"placeholder": placeholder, "orders": orders}
    for name, order in orders.items():
        batches = [
            _rows([texts[k] for k in order[s : s + size]], placeholder, queries) for s in range(0, len(order), size)
        ]
        for step, batch in enumerate(batches):
            batch["pixels"] = pixels[order[step * size : (step + 1) * size]]
            tensors |= {f"{name}.{part}.{step}": tensor.contiguous() for part, tensor in batch.items()}
        real = sum(int((batch["segment"] > 0).sum()) for batch in batches)
        made[name] = {
            "widths": [batch["ids"].shape[1] for batch in batches],
            "tokens": real,
            "supervised": sum(int((batch["labels"] != IGNORE).sum()) for batch in batches),
            "padding": 1 - real / sum(batch["ids"].numel() for batch in batches),
        }
    save_file(tensors, folder / "batches.safetensors")
    return made


def draw(ours: Any, count: int, length: int, spread: str) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """`count` texts of the wanted lengths, cut from the demo's conversations one after another, and whose pictures
    go with them."""
    data = open_data()
    collator = ours.processor.collator(lambda kind, media: (torch.zeros(len(media), 1), None))
    low, high = (share * length for share in SPREADS[spread])
    lengths = torch.linspace(low, high, count).round().long().clamp(min=4)
    lengths = lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()
    refs = [data.mix[draw] for draw in range(count)]
    stream: list[int] = []
    for number in itertools.count():
        batch = collator([data.sample(data.mix[number])])
        stream += batch.input_ids_BT[batch.modality_BT == 0].tolist()
        if len(stream) >= sum(lengths):
            break
    texts = []
    for each in lengths:
        texts.append(stream[:each])
        stream = stream[each:]
    return texts, refs


def pictures(refs: list[tuple[int, int]]) -> list[Medium]:
    """The first picture of each of these samples."""
    data = open_data()
    return [data.sample(tuple(ref)).media[0] for ref in refs]


def _bucketed(texts: list[list[int]], size: int) -> list[int]:
    """Indices sorted by length into batches, the batches in random order."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(1)).tolist()
    return [index for number in shuffled for index in batches[number]]


def _rows(texts: list[list[int]], placeholder: int, queries: int) -> dict[str, Tensor]:
    """One sample a row: a token, the picture, the rest of the text, whose latter half carries loss."""
    shape = (len(texts), queries + max(map(len, texts)))
    ids, segment, modality = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.zeros(shape).long()
    labels = torch.full(shape, IGNORE)
    for row, text in enumerate(texts):
        whole = torch.tensor([text[0], *[placeholder] * queries, *text[1:]])
        answer = queries + len(text) // 2
        ids[row, : len(whole)], segment[row, : len(whole)] = whole, 1
        modality[row, 1 : 1 + queries] = 1
        labels[row, answer : len(whole)] = whole[answer:]
    return {"ids": ids, "segment": segment, "modality": modality, "labels": labels}


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
        self._order = "bucketed" if job["batching"] == "bucketed" else "shuffled"

    def __call__(self, name: str, step: int) -> Tensor:
        return self._file.get_tensor(f"{self._order}.{name}.{step % self.distinct}")
