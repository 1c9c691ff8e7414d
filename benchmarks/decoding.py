"""One step of decoding in float32, for one answer and for several together: PyTorch's Linears, and ours.

    python benchmarks/decoding.py [--steps N] [--repeats N] [--json FILE]

SmolLM2-135M's shape with random weights and its head, each row behind a past of 128 tokens. Ours is
`isthmus.kernels_linear`, whose products of up to four rows exchange the factors; more are oneDNN's on AMD with AVX-512.
Before anything is timed the logits must agree to 1e-4.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import harness
from isthmus import kernels_linear

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPE |= {"num_hidden_layers": 30, "vocab_size": 49152}
TINY_SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_SHAPE |= {"num_hidden_layers": 2, "vocab_size": 300}
ROWS, TINY_ROWS = (1, 2, 3, 4, 8, 16), (1, 7)
PAST = 128
"""Tokens that each row holds already."""
KINDS = {"PyTorch": nn.Linear, "ours": kernels_linear.Linear}
TOLERANCE = 1e-4
"""Largest difference between logits, relative to the largest."""


class Decoder:
    """One LLM and the pasts of some rows."""

    def __init__(self, shape: dict[str, int], rows: int):
        torch.manual_seed(0)
        self.llm = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).eval()
        self.linears = [module for module in self.llm.modules() if type(module) is nn.Linear]
        self.past, self.next = torch.randint(shape["vocab_size"], (rows, PAST)), torch.zeros(rows, 1, dtype=torch.long)

    @torch.inference_mode()
    def run(self, kind: str, steps: int) -> tuple[float, Tensor]:
        """Milliseconds of a step, over so many after one that is not counted, and the last one's logits [B, V]."""
        for linear in self.linears:
            linear.__class__ = KINDS[kind]
        cache = DynamicCache(config=self.llm.config)
        self.llm(input_ids=self.past, past_key_values=cache, logits_to_keep=1)
        logits, began = self._step(cache), time.perf_counter()
        for _ in range(steps):
            logits = self._step(cache)
        return (time.perf_counter() - began) / steps * 1e3, logits

    def _step(self, cache: DynamicCache) -> Tensor:
        return self.llm(input_ids=self.next, past_key_values=cache).logits[:, -1]


def measure(shape: dict[str, int], rows: int, steps: int, repeats: int) -> dict[str, Any]:
    """Both ways in turns, if they agree."""
    decoder = Decoder(shape, rows)
    theirs, ours = (decoder.run(kind, 1)[1] for kind in KINDS)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if error > TOLERANCE:
        return {"rows": rows, "error": error, "refused": f"error {error:.1e}, more than {TOLERANCE:.0e}"}
    turns = [{kind: decoder.run(kind, steps)[0] for kind in KINDS} for _ in range(repeats)]
    spreads = {kind: harness.Spread.of([turn[kind] for turn in turns]) for kind in KINDS}
    ratio = harness.Spread.of([turn["PyTorch"] / turn["ours"] for turn in turns])
    return {"rows": rows, "error": error, "milliseconds": spreads, "ratio": ratio}


def main(arguments: list[str] | None = None) -> int:
    options = harness.parser(__doc__, 12, "tokens per measurement").parse_args(arguments)
    where = harness.machine()
    shape, sizes = (TINY_SHAPE, TINY_ROWS) if options.tiny else (SHAPE, ROWS)
    cases = [measure(shape, rows, options.steps, options.repeats) for rows in sizes]
    print(harness.in_words(where))
    print(f"milliseconds of a step, median (smallest–largest) of {options.repeats} repeats of {options.steps}")
    print(harness.table(["rows", *KINDS, "PyTorch / ours"], [line(found) for found in cases]))
    print(harness.save("decoding", {"machine": where, "past": PAST, "cases": cases}, options))
    return int(any("refused" in found for found in cases))


def line(found: dict[str, Any]) -> list[str]:
    """A table row."""
    if "refused" in found:
        return [str(found["rows"]), found["refused"], "", ""]
    return [str(found["rows"]), *(str(found["milliseconds"][kind]) for kind in KINDS), str(found["ratio"])]


if __name__ == "__main__":
    sys.exit(main())
