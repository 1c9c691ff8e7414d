"""Prefill of one picture and a question: full attention, composite attention by mask, and by what EE-MLLM skips.

    python benchmarks/prefill.py [--steps N] [--repeats N] [--layers N] [--json FILE]

SmolLM2-135M's shape with random weights in float32, 64 text tokens around 49 to 2,880 visual ones. `rule` masks what
`self` never computes; before anything is timed their states must agree to 1e-4. `ffn` is NAAViT, `keys` is what SAISA
does inside the LLM. Operations are those of the formula (attention counted densely), which a test holds to a counter.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import harness
from isthmus import fuse, graft, sites
from isthmus.aligners.ee_mllm import EEMLLM, flops
from isthmus.connectors import composite
from isthmus.types import Side

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TINY_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
VISUAL, TINY_VISUAL = (49, 196, 576, 1152, 2880), (9, 16)
TEXT, BEFORE = 64, 16
"""Text tokens in all, and those of them that stand before the picture."""
WAYS = ("full", "rule", "self", "ffn", "keys")
TOLERANCE = 1e-4
"""Largest difference between `rule` and `self`, relative to the largest state."""


class Prefill:
    """One stack of layers and one prompt, computed in any of `WAYS`."""

    def __init__(self, shape: dict[str, int], layers: int, visual: int):
        torch.manual_seed(0)
        self.visual = visual
        config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=64, attn_implementation="isthmus")
        self.llm = LlamaModel(config).eval()
        self.x_BTD = torch.randn(1, TEXT + visual, config.hidden_size)
        kinds = torch.tensor([0] * BEFORE + [1] * visual + [0] * (TEXT - BEFORE))[None]
        self.side = Side(kinds, torch.ones_like(kinds))
        self.positions_BT = fuse.positions(self.side.segment_BT)

    def prepare(self, way: str) -> None:
        """Put the additions of a way on the layers."""
        for layer in sites.layers(self.llm).modules:
            if way in ("self", "ffn", "keys"):
                graft.graft(self.llm, layer.self_attn, "composite", composite.MediaAttention(way == "self"))
            if way == "keys":
                graft.graft(self.llm, layer.mlp, "composite", composite.TextOnly())

    def clear(self) -> None:
        for module in list(self.llm.modules()):
            if "composite" in graft.at(module):
                graft.ungraft(self.llm, module, "composite")

    @torch.no_grad()
    def run(self, way: str) -> Tensor:
        """States [1, T, D], the building of masks included."""
        rule = None
        if way == "rule":
            rule = EEMLLM(EEMLLM.Options(compute="rule")).rule(self.side.segment_BT, self.side.modality_BT)
        mask = fuse.masks(self.llm.config, self.x_BTD, self.side.segment_BT, None, rule)
        lent: dict[str, Any] = {} if way in ("full", "rule") else {"side": self.side}
        given = {"inputs_embeds": self.x_BTD, "attention_mask": mask, "position_ids": self.positions_BT}
        return self.llm(**given, use_cache=False, **lent).last_hidden_state

    def states(self, way: str) -> Tensor:
        self.prepare(way)
        found = self.run(way)
        self.clear()
        return found

    def milliseconds(self, way: str, steps: int) -> float:
        """The mean over `steps` calls, after one that is not counted."""
        self.prepare(way)
        self.run(way)
        began = time.perf_counter()
        for _ in range(steps):
            self.run(way)
        spent = (time.perf_counter() - began) / steps * 1e3
        self.clear()
        return spent


def measure(shape: dict[str, int], layers: int, visual: int, steps: int, repeats: int) -> dict[str, Any]:
    """Operations, and where `self` equals `rule` the times; ways take turns within a repeat."""
    prefill = Prefill(shape, layers, visual)
    sizes = (shape["hidden_size"], shape["intermediate_size"], layers, TEXT, visual)
    shared = shape["num_attention_heads"] // shape["num_key_value_heads"]
    counts = {way: flops(*sizes, way, shared) for way in ("full", "self", "ffn", "keys")}
    expected = prefill.states("rule")
    error = float((prefill.states("self") - expected).abs().max() / expected.abs().max())
    found = {"visual": visual, "error": error, "flops": {**counts, "rule": counts["full"]}}
    if error > TOLERANCE:
        return found | {"refused": f"error {error:.1e}, more than {TOLERANCE:.0e}"}
    turns = [{way: prefill.milliseconds(way, steps) for way in WAYS} for _ in range(repeats)]
    return found | {"milliseconds": {way: harness.Spread.of([turn[way] for turn in turns]) for way in WAYS}}


def line(found: dict[str, Any]) -> list[str]:
    """A table row: milliseconds of each way, with its operations as a share of full attention's."""
    if "refused" in found:
        return [str(found["visual"]), found["refused"], *[""] * (len(WAYS) - 1)]
    share = {way: count / found["flops"]["full"] for way, count in found["flops"].items()}
    return [str(found["visual"]), *(f"{found['milliseconds'][way]}, {share[way]:.0%}" for way in WAYS)]


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, 2, "calls per measurement")
    parser.add_argument("--layers", type=int, default=30, help="layers of the LLM; SmolLM2-135M has 30")
    options = parser.parse_args(arguments)
    where = harness.machine()
    shape, sizes, layers, steps = SHAPE, VISUAL, options.layers, options.steps
    if options.tiny:
        shape, sizes, layers, steps = TINY_SHAPE, TINY_VISUAL, 2, 1
    cases = [measure(shape, layers, visual, steps, options.repeats) for visual in sizes]
    print(harness.in_words(where))
    print(
        f"{layers} layers, {TEXT} text tokens; milliseconds, median (smallest–largest) of {options.repeats} repeats of"
    )
    print(f"{steps} calls, and operations as a share of full attention's")
    print(harness.table(["visual tokens", *WAYS], [line(found) for found in cases]))
    print(harness.save("prefill", {"machine": where, "layers": layers, "text": TEXT, "cases": cases}, options))
    return int(any("refused" in found for found in cases))


if __name__ == "__main__":
    sys.exit(main())
