"""What real llama.cpp answers from our GGUF files, beside the model that they were made of.

    python -m venv llama && llama/bin/pip install -c constraints.txt xllamacpp
    python benchmarks/gguf_vs_llamacpp.py --llama llama/bin/python [--steps PICTURES] [--words N] [--json FILE]

A LLaVA over a small random tower (SigLIP's, then CLIP's) and the embedded SmolLM2, with a random joint whose vectors
are as large as words' and one fixed seed, is exported and asked several questions, each about another picture of the
encoder's own size, and about one picture that is not square. Compared are the prompt's token ids, the log-probabilities
of the likeliest first words, and greedy tokens. llama.cpp runs in an environment of its own, in float32 with a float32
cache.

llama.cpp puts CLIP's class token behind the patches (its issue 25814), so for CLIP the same numbers are given of a
model whose class token was misplaced in the same way: what remains between that and llama.cpp is ours.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import harness
import isthmus
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, Recipe
from isthmus.exporting import gguf
from isthmus.exporting.gguf_check import Sight
from isthmus.model import VLM
from isthmus.pretrained import quiet
from isthmus.types import Context, Image, Media, Sample, Turn

SIDE, LIKELIEST = 112, 100
"""Of pictures in pixels; first words whose log-probabilities are compared."""
QUESTIONS = (
    "What is in this picture? It holds 1234 things.",
    "Describe the picture in one sentence.",
    "Is there a dog? Answer with yes or no.",
    "Which colour do you see most of?",
    "How many people are there, and what are they doing?",
    "Write a short story about what happens here.",
    "Name three objects, separated by commas.",
    "What time of the day may it be, and why do you think so?",
)
"""Asked in turn."""
AGREEING = 0.99
"""Of the first words that the model and its files must have in common."""
MARKER = "<picture>"
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
SIZE = {"image_size": SIDE, "patch_size": 14}
SQUARE = {"height": SIDE, "width": SIDE}
TOWERS = {
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, **SIZE)),
        SiglipImageProcessorPil(size=SQUARE),
    ),
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, **SIZE, initializer_factor=3.0)),
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    ),
}


class Misplaced(Sight):
    """What sees, with the class token behind the patches; still the first of all is left out."""

    def _embedded(self, pixels: Tensor) -> Tensor:
        weight, bias = self.tensors["v.patch_embd.weight"], self.tensors.get("v.patch_embd.bias")
        x = F.conv2d(pixels, weight, bias, stride=self.fields["vision.patch_size"]).flatten(2).mT
        x = torch.cat([x, self.tensors["v.class_embd"].expand(len(x), 1, -1)], 1)
        return self._norm(x + self.tensors["v.position_embd.weight"], "v.pre_ln")


@torch.no_grad()
def built(tower: str, folder: Path) -> VLM:
    """A model whose joint gives vectors as large as the LLM's words."""
    make, processor = TOWERS[tower]
    torch.manual_seed(0)
    make().save_pretrained(folder / tower)
    processor.save_pretrained(folder / tower)
    parts = {"encoder": EncoderConfig(source=str(folder / tower)), "llm": LLMConfig(source="smollm2-135m-instruct")}
    model = isthmus.compose(Recipe(**parts, aligner=AlignerConfig(name="llava")), torch.float32)
    some = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    last = model.connectors["image"].layers[2]
    scale = model.llm.get_input_embeddings().weight.std() / seen(model, some).std()
    last.weight *= scale
    last.bias *= scale
    return model


def seen(model: VLM, pixels: Tensor) -> Tensor:
    """pixels [N, 3, H, W] -> y [N, Q, D]."""
    at_N = torch.zeros(len(pixels), dtype=torch.long)
    return model.connectors["image"](model.encode("image", Media(at_N, at_N, at_N, pixels=pixels)), Context())


def pictures(count: int) -> list[Pillow.Image]:
    """Smooth random pictures; all but the last are of the encoder's size."""
    random = np.random.default_rng(0)
    sizes = [(SIDE, SIDE)] * (count - 1) + [(SIDE * 3 // 2, SIDE)]
    coarse = [random.integers(0, 256, (height // 16, width // 16, 3), np.uint8) for width, height in sizes]
    return [Pillow.fromarray(grid).resize(size, Pillow.Resampling.BICUBIC) for grid, size in zip(coarse, sizes)]


def prompt(model: VLM, question: str) -> str:
    """The text of the turn, with a marker where the picture stands."""
    return model.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{MARKER}\n{question}"}], tokenize=False, add_generation_prompt=True
    )


@torch.inference_mode()
def ours(model: VLM, picture: Pillow.Image, question: str, words: int, sight: Sight | None = None) -> dict[str, Any]:
    """What the model answers: token ids, log-probabilities [V] of the first word, greedy tokens."""
    processor = model.processor
    batch = processor.prompts([Sample((Turn.say("user", Image(picture), question),))])
    ids, pixels = batch.input_ids_BT, batch.media["image"].pixels
    vectors = seen(model, pixels) if sight is None else sight(pixels)
    at_BT = ids == model.placeholder("image")
    given = model.llm.get_input_embeddings()(ids.masked_fill(at_BT, 0))
    given[at_BT] = vectors.flatten(0, 1)
    told = model.llm.generate(
        inputs_embeds=given,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=words,
        do_sample=False,
        pad_token_id=processor.pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {
        "ids": ids[~at_BT].tolist(),
        "first": told.logits[0][0].log_softmax(-1),
        "tokens": told.sequences[0].tolist(),
    }


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far apart two answers are."""
    pairs = zip_longest(mine["tokens"], theirs["tokens"])
    longest = max(len(mine["tokens"]), len(theirs["tokens"]))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), longest)
    apart = [abs(mine["first"][int(token)].item() - at) for token, at in theirs["first"].items()]
    best = mine["first"].topk(2).values
    return {
        "token_ids_equal": mine["ids"] == theirs["ids"],
        "largest_difference": max(apart, default=None),
        "margin_of_the_first_word": (best[0] - best[1]).item(),
        "equal_greedy_tokens": same,
        "of": longest,
    }


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many of the first words are the same, by what stands on our side."""
    kinds = [how for how in ("plain", "class_token_misplaced") if how in rows[0]]
    return {how: sum(row[how]["equal_greedy_tokens"] > 0 for row in rows) / len(rows) for how in kinds}


def run(tower: str, count: int, words: int, llama: str) -> dict[str, Any]:
    """One tower from making the model to the comparison."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        folder = Path(scratch)
        model = built(tower, folder)
        model.save_pretrained(folder / "model")
        with quiet():
            written = gguf.export(folder / "model", folder / "gguf")
        shown = pictures(count)
        questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(count)]
        job = {"folder": str(folder / "gguf"), "texts": [prompt(model, each) for each in questions], "marker": MARKER,
               "pictures": [_png(each) for each in shown], "words": words, "likeliest": LIKELIEST}  # fmt: skip
        misplaced = Misplaced(folder / "gguf" / gguf.SIGHT) if written.caveat else None
        sights = {"plain": None} | ({} if misplaced is None else {"class_token_misplaced": misplaced})
        with _asked(llama, folder, job) as said:
            mine = [
                {how: ours(model, picture, question, words, sight) for how, sight in sights.items()}
                for picture, question in zip(shown, questions)
            ]
        rows = [
            {"size": picture.size} | {how: compare(found, theirs) for how, found in each.items()}
            for picture, each, theirs in zip(shown, mine, said["answers"], strict=True)
        ]
        files = {file.name: file.stat().st_size for file in (folder / "gguf").glob("*.gguf")}
    return {"tower": tower, "rows": rows, "bytes": files, "export_difference": written.parity.difference,
            "caveat": written.caveat, "llama": said["build"]}  # fmt: skip


def _png(picture: Pillow.Image) -> str:
    raw = BytesIO()
    picture.save(raw, "png")
    return base64.b64encode(raw.getvalue()).decode()


@contextmanager
def _asked(python: str, folder: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """llama.cpp answers while the block computes; what it said is there at the end of the block."""
    given, found, log = folder / "job.json", folder / "said.json", folder / "log"
    given.write_text(json.dumps(job))
    script = str(harness.HERE / "gguf_llamacpp_worker.py")
    said: dict[str, Any] = {}
    with log.open("wb") as told, subprocess.Popen([python, script, given, found], stdout=told, stderr=told) as process:
        try:
            yield said
        except BaseException:
            process.kill()
            raise
        if process.wait():
            raise SystemExit(f"llama.cpp failed:\n{log.read_text(errors='replace')[-3000:]}")
    said |= json.loads(found.read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser(__doc__, 3, "pictures, the last of which is not square")
    parser.add_argument("--words", type=int, default=16, help="longest greedy answer, in tokens")
    parser.add_argument("--llama", default=sys.executable, help="the Python of the environment that has xllamacpp")
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    options = parser.parse_args(arguments)
    count = 2 if options.tiny else options.steps
    towers = [run(tower, count, options.words, options.llama) for tower in options.towers]
    for each in towers:
        each["first_words_equal"] = shares(each["rows"][:-1])
    lines = [
        (each["tower"], how, "its own size" if square else "not square", str(len(found)), *told(found))
        for each in towers for square in (True, False) for how in ("plain", "class_token_misplaced")
        if (found := [row[how] for row in (each["rows"][:-1] if square else each["rows"][-1:]) if how in row])
    ]  # fmt: skip
    print(harness.table(("tower", "our side", "pictures", "number", *HEADER), lines))
    harness.save("gguf_vs_llamacpp", {"towers": towers, "machine": harness.machine()}, options)
    return int(not all(map(kept, towers)))


def kept(tower: dict[str, Any]) -> bool:
    """Whether the model and its files agree on pictures of its size, once llama.cpp's class token is taken away."""
    rows = [row.get("class_token_misplaced", row["plain"]) for row in tower["rows"][:-1]]
    same = sum(row["equal_greedy_tokens"] > 0 for row in rows)
    return same >= AGREEING * len(rows) and all(row["token_ids_equal"] for row in rows)


HEADER = ("ids equal", "first words equal", "largest difference of log-probabilities", "whole answers equal")


def told(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a table says of some pictures."""
    yield str(sum(row["token_ids_equal"] for row in rows))
    yield str(sum(row["equal_greedy_tokens"] > 0 for row in rows))
    yield f"{max(row['largest_difference'] or 0.0 for row in rows):.4f}"
    yield str(sum(row["equal_greedy_tokens"] == row["of"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
