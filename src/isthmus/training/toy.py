"""A recipe so small that a run of its two stages takes a second: random parts, and pictures whose colour is asked.

For tests of the machinery, `isthmus torture` among them; such a model learns its colours and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from isthmus.config import Recipe
from isthmus.pretrained import quiet

WIDTH, SIDE = 32, 16
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "grey": (130, 130, 130)}
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def toy(folder: Path, rows: int = 40) -> Recipe:
    """The recipe, over parts and data that are written to `folder`.

    Its stages differ in what they stress: split batches and a validation, then packed rows under LoRA with dropout.
    """
    llm, encoder = _llm(folder / "llm"), _encoder(folder / "encoder")
    data = write_data(folder / "data", rows)
    align = {
        "name": "align",
        "train": {"connectors.*": 1e-2},
        "batch_size": 4,
        "accumulate": 2,
        "budget": {"steps": 8},
        "save_every": 1 / 8,
        "evaluate_every": 1 / 2,
    }
    tune = {
        "name": "tune",
        "train": {"connectors.*": 1e-3, "llm.*self_attn.*": {"lr": 1e-2, "mode": {"r": 2, "dropout": 0.1}}},
        "batch_size": 4,
        "batching": "packed",
        "max_length": 128,
        "budget": {"steps": 6},
        "save_every": 1 / 3,
        "evaluate_every": None,
    }
    return Recipe.model_validate(
        {
            "name": "toy",
            "llm": str(llm),
            "encoder": str(encoder),
            "dtype": "float32",
            "stages": [{**stage, "data": [str(data)]} for stage in (align, tune)],
        }
    )


def write_data(folder: Path, rows: int) -> Path:
    """A JSONL file of `rows` questions, of three lengths, about four pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{name}.png")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            name = list(COLOURS)[number % len(COLOURS)]
            question = "<image>\nWhich colour?" + " Look well!" * (number % 3)
            said = [{"from": "human", "value": question}, {"from": "gpt", "value": name}]
            stream.write(json.dumps({"id": str(number), "image": f"{name}.png", "conversations": said}) + "\n")
    return folder / "data.jsonl"


def _llm(folder: Path) -> Path:
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special ones, ChatML."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=start, eos_token=end, chat_template=TEMPLATE
    )


def _encoder(folder: Path) -> Path:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=SIDE // 2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder
