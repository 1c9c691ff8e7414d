"""Requests per second and time to the first token of `isthmus serve`, and of `transformers serve` on the same weights.

    python benchmarks/serving.py [--peer] [--llama PYTHON] [--clients 1 4 16] [--patch 32] [--steps N] [--tokens N]
        [--json FILE]

A random CLIP, a random two-layer projector and SmolLM2-135M (with `--tiny` a random Llama) are saved as ours and
exported as transformers' LLaVA. A picture is 49 tokens, with `--patch 16` 196, as many as for a CLIP or SigLIP of the
base size. With `--llama`, an environment that has xllamacpp, llama.cpp's own server is measured too, on our GGUF files;
the tower is then a SigLIP and pictures have its size, since llama.cpp misplaces CLIP's class token and scales pictures
in its own way (`docs/export.md`). The LLM's weights are then moved off bfloat16's numbers, in which our export would
keep them and llama.cpp compute.

Each server runs in a process of its own and answers the same streamed requests, greedily. Every client keeps one
connection (but with llama.cpp, which says that it keeps one and closes it) and sends one request after the other: first
each with a picture of its own, then all with one picture. The answers to a few requests, asked one by one, must be
ours, or a server's speed is not told in the table; each server's are then compared with what it says among many, and
the share that differs is reported. Every case is told as soon as it is measured, and what is done is kept if a later
one is interrupted.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image as Pillow
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import harness
import isthmus
from isthmus.exporting import gguf, llava
from isthmus.recipes import parts

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'media_marker' %}{{ p.text }}\n{% else %}<image>\n{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that takes texts and parts (llama.cpp's `media_marker` too), so that all servers make the same tokens."""
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 224
"""Of the pictures that the tower sees, in pixels."""
CHECKED = 6
AGREEING = 0.8
"""Of the answers that are checked: float32 sums differ between batch shapes, and a tie may fall either way."""
FIGURES = ("requests_per_second", "tokens_per_second", "first_token")
HEADER = ["server", "clients", "picture", "requests/s", "tokens/s", "first token, s"]


@dataclass(frozen=True)
class Heard:
    """One answer, and when it came."""

    text: str
    tokens: int
    first: float
    whole: float


def build(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The same model in the form that each server reads."""
    tiny, square = options.tiny, {"height": SIDE, "width": SIDE}
    shape = (TINY_TOWER if tiny else TOWER) | {"image_size": SIDE, "patch_size": options.patch}
    torch.manual_seed(0)
    if options.llama:
        SiglipVisionModel(SiglipVisionConfig(**shape)).save_pretrained(folder / "tower")
        SiglipImageProcessorPil(size=square).save_pretrained(folder / "tower")
    else:
        CLIPVisionModel(CLIPVisionConfig(**shape)).save_pretrained(folder / "tower")
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder / "tower")
    embedded = parts.embedded("bench", "", isthmus.config.AlignerConfig(name="llava"), ())
    llm = embedded.llm
    if tiny:
        tokenizer = AutoTokenizer.from_pretrained(isthmus.parts.folder(llm.source, llm.revision))
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(
            LlamaConfig(**shape, vocab_size=len(tokenizer), eos_token_id=2, initializer_range=0.3)
        ).save_pretrained(folder / "llm")
        tokenizer.save_pretrained(folder / "llm")
        llm = isthmus.config.LLMConfig(source=str(folder / "llm"))
    encoder = isthmus.config.EncoderConfig(source=str(folder / "tower"), aspect="crop", layer=-2)
    model = isthmus.compose(isthmus.Recipe(encoder=encoder, llm=llm, aligner=embedded.aligner))
    if options.llama:
        for parameter in model.llm.parameters():
            parameter.data.mul_(1 + 2**-12)
    model.processor.tokenizer.chat_template = model.processor.chat_template = TEMPLATE
    made = {"isthmus": folder / "ours"}
    model.save_pretrained(made["isthmus"], whole=True)
    if options.peer:
        made["transformers"] = folder / "theirs"
        llava.export(made["isthmus"], made["transformers"])
        (made["transformers"] / "chat_template.jinja").write_text(TEMPLATE)
    if options.llama:
        made["llama.cpp"] = folder / "gguf"
        gguf.export(made["isthmus"], made["llama.cpp"])
    return made


def picture(seed: int, size: tuple[int, int]) -> str:
    """Coarse noise as a data URL."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    raw = BytesIO()
    Pillow.fromarray(coarse).resize(size).save(raw, "png")
    return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()


def request(number: int, seed: int, tokens: int, size: tuple[int, int] = (320, 240)) -> dict[str, Any]:
    """Request `number` about the picture of `seed`."""
    question = f"Question {number}: what do you see in this picture, and what could it be used for?"
    content = [{"type": "image_url", "image_url": {"url": picture(seed, size)}}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def served(kind: str, model: Path, llama: str = "") -> Iterator[tuple[str, str]]:
    """The address of a server in a process of its own, and the model's name there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(sys.executable).with_name(kind)
    command = [script, "serve", str(model), "--port", port, "--dtype", "float32", "--device", "cpu"]
    if kind == "llama.cpp":
        command = [llama, harness.HERE / "serving_llamacpp_worker.py", str(model), port, str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit(f"{kind} serve ended before it listened")
        else:
            raise SystemExit(f"{kind} serve did not listen in time")
        yield address, str(model) if kind == "transformers" else model.name
    finally:
        process.terminate()
        process.wait(30)


def ask(client: httpx2.Client, address: str, body: dict[str, Any]) -> Heard:
    """One streamed answer."""
    begun, first, pieces, tokens = time.perf_counter(), 0.0, [], 0
    with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{address} answers {response.status_code}: {response.read().decode()[:300]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
            for choice in data.get("choices") or ():
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - begun
                    pieces.append(piece)
    return Heard("".join(pieces), tokens, first, time.perf_counter() - begun)


def load(address: str, name: str, clients: int, bodies: Sequence[dict[str, Any]], kept: bool = True) -> dict[str, Any]:
    """All requests by so many clients, each one after the other, over one connection unless none is `kept`."""
    limits = httpx2.Limits(max_keepalive_connections=int(kept))
    waiting: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    for numbered in enumerate(bodies):
        waiting.put(numbered)
    found: dict[int, Heard] = {}

    def client() -> None:
        with httpx2.Client(timeout=600, limits=limits) as http:
            while True:
                try:
                    number, body = waiting.get_nowait()
                except queue.Empty:
                    return
                found[number] = ask(http, address, {"model": name, **body})

    with ThreadPoolExecutor(clients) as threads:
        begun = time.perf_counter()
        for ended in [threads.submit(client) for _ in range(clients)]:
            ended.result()
        seconds = time.perf_counter() - begun
    heard = [found[number] for number in range(len(bodies))]
    return {
        "requests_per_second": len(heard) / seconds,
        "tokens_per_second": sum(one.tokens for one in heard) / seconds,
        "first_token": statistics.median(one.first for one in heard),
        "whole": statistics.median(one.whole for one in heard),
        "answers": [one.text for one in heard],
    }


def measure(kind: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every case of one server; `answers` are those asked alone."""
    size = (SIDE, SIDE) if options.llama else (320, 240)
    with served(kind, model, options.llama) as (address, name):
        hear = partial(load, address, name, kept=kind != "llama.cpp")
        checked = [request(number, number, options.tokens, size) for number in range(CHECKED)]
        result: dict[str, Any] = {"answers": hear(1, checked)["answers"], "cases": []}
        fresh = 1000
        for clients in options.clients:
            amount = max(clients * options.steps, CHECKED)
            for repeated in (False, True):
                seeds = [0 if repeated else fresh + number for number in range(amount)]
                fresh += amount
                bodies = [request(fresh + number, seed, options.tokens, size) for number, seed in enumerate(seeds)]
                case = hear(clients, bodies) | {"clients": clients, "repeated": repeated}
                case.pop("answers")
                result["cases"].append(case)
                print(" ".join(next(lines(kind, [{"cases": [case]}]))), flush=True)
        among = hear(max(options.clients), checked * 2)["answers"]
        result["flipped"] = sum(a != b for a, b in zip(among, result["answers"] * 2)) / len(among)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure in turns, print a table, write the numbers; 1 if the servers do not say the same."""
    options = parser().parse_args(arguments)
    where = harness.machine()
    with tempfile.TemporaryDirectory(prefix="isthmus-serving-") as folder:
        kinds = build(Path(folder), options)
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, model in kinds.items():
                runs[kind].append(measure(kind, model, options))
                agreeing = {kind: agreement(runs["isthmus"], each) for kind, each in runs.items() if each}
                result = {"machine": where, "agreeing": agreeing, "runs": runs}
                harness.save("serving_llamacpp" if options.llama else "serving", result, options)
    print(harness.in_words(where))
    told = [kind for kind, share in agreeing.items() if share >= AGREEING]
    for kind in kinds:
        print(f"{kind}: {agreeing[kind]:.0%} of {CHECKED} answers are ours" + ("" if kind in told else "; refused"))
    print(harness.table(HEADER, [line for kind in told for line in lines(kind, runs[kind])]))
    for kind, each in runs.items():
        flipped = max(run["flipped"] for run in each)
        print(f"{kind}: up to {flipped:.0%} of the answers among others differ from those alone")
    return int(len(told) < len(kinds))


def agreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """The share of the answers asked alone that are the same in the first repeat."""
    return sum(a == b for a, b in zip(ours[0]["answers"], theirs[0]["answers"])) / CHECKED


def lines(kind: str, runs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One server's rows: medians over the repeats."""
    for cases in zip(*(run["cases"] for run in runs)):
        spreads = [harness.Spread.of([case[name] for case in cases]) for name in FIGURES]
        whose = "one for all" if cases[0]["repeated"] else "each its own"
        yield [kind, str(cases[0]["clients"]), whose, *map(str, spreads)]


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, 4, "requests per client and case")
    made.add_argument("--peer", action="store_true", help="measure `transformers serve` too")
    made.add_argument("--llama", default="", help="the Python of an environment with xllamacpp: measure llama.cpp too")
    made.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    made.add_argument("--patch", type=int, choices=(16, 32), default=32, help="side of what is one token, in pixels")
    made.add_argument("--tokens", type=int, default=32, help="longest answer")
    return made


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
