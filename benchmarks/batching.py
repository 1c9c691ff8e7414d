"""Padded, bucketed and packed steps of a small decoder, forward with backward, at several spreads of length.

    python benchmarks/batching.py [--steps N] [--repeats N] [--json FILE]

A random LLM of SmolLM2's kind (4 layers, 576 wide, 9 query heads over 3 key heads) reads token ids alone; all of it
trains, in bfloat16 and in float32. A step is 16 samples of the mean length, drawn evenly between mean x (1 - spread)
and mean x (1 + spread). Every way of batching reads as many samples, in the order of `isthmus.data.mix.Batches`;
`packed` has one row per step. `packed, dense mask` is what a kernel without segments would have to do.
Packed and padded must agree on the summed loss of one step's samples first: to 1e-5 (float32) and 1e-2 (bfloat16).
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import harness
from isthmus import fuse, kernels
from isthmus.data.mix import Batches, Batching, Mix

SIZE, VOCAB, ITEMS = 16, 512, 4096
SHAPES = ((64, 0.0), (64, 0.9), (256, 0.5), (256, 0.9), (1024, 0.5))
TINY_SHAPES = ((8, 0.5),)
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
WAYS: dict[str, tuple[Batching, str]] = {
    "padded": ("shuffled", kernels.NAME),
    "bucketed": ("bucketed", kernels.NAME),
    "packed": ("packed", kernels.NAME),
    "packed, dense mask": ("packed", "sdpa"),
}
"""How samples are batched, and the attention that computes them."""


def decoder(dtype: torch.dtype, tiny: bool) -> PreTrainedModel:
    """The LLM; the same weights each time."""
    torch.manual_seed(0)
    scale = 8 if tiny else 1
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=576 // scale, intermediate_size=1536 // scale, num_hidden_layers=1 if tiny else 4,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=32768,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def lengths(mean: int, spread: float) -> list[int]:
    """Of every item, spread evenly and in no order."""
    share = [index * 2654435761 % 2**32 / 2**32 for index in range(ITEMS)]
    return [max(2, round(mean * (1 - spread + 2 * spread * each))) for each in share]


def order(batching: Batching, sizes: list[int]) -> Batches:
    longest = sum(sorted(sizes)[-SIZE:])
    return Batches(Mix([range(ITEMS)], [1], 0), SIZE, batching, lambda ref: sizes[ref[1]], max_length=longest)


def read(rows: list[list[int]], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and segments of rows of items, padded on the right; an item's ids depend on its number alone."""
    made = []
    for row in rows:
        ids = [torch.arange(sizes[item]) * (item + 7) % VOCAB for item in row]
        segments = [torch.full((sizes[item],), number) for number, item in enumerate(row, start=1)]
        made.append(torch.stack([torch.cat(ids), torch.cat(segments)]))
    width = max(one.shape[1] for one in made)
    both = torch.stack([F.pad(one, (0, width - one.shape[1])) for one in made])
    return both[:, 0], both[:, 1]


def loss(llm: PreTrainedModel, ids_BT: Tensor, segment_BT: Tensor) -> Tensor:
    """The sum over all tokens but the first of every segment."""
    embeds_BTD = llm.get_input_embeddings()(ids_BT)
    mask = fuse.masks(llm.config, embeds_BTD, segment_BT, None, None)
    positions_BT = fuse.positions(segment_BT)
    states = llm.base_model(inputs_embeds=embeds_BTD, attention_mask=mask, position_ids=positions_BT, use_cache=False)
    told = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
    logits = llm.lm_head(states.last_hidden_state[:, :-1][told])
    return F.cross_entropy(logits.float(), ids_BT[:, 1:][told], reduction="sum")


def error(llm: PreTrainedModel, sizes: list[int]) -> float:
    """How much the losses of one step's samples differ, padded and by every other way, at most."""
    found = []
    chosen = list(range(SIZE))
    for batching, attention in WAYS.values():
        llm.set_attn_implementation(attention)
        rows = [chosen] if batching == "packed" else [[item] for item in chosen]
        with torch.no_grad():
            found.append(float(loss(llm, *read(rows, sizes))))
    return max(abs(each - found[0]) / abs(found[0]) for each in found)


def seconds(llm: PreTrainedModel, way: str, sizes: list[int], steps: range) -> float:
    """A step of this way: the mean over `steps`, reading included."""
    batching, attention = WAYS[way]
    llm.set_attn_implementation(attention)
    batches = order(batching, sizes)
    batches.rows(steps[0])  # a window is planned at once
    began = time.perf_counter()
    for step in steps:
        loss(llm, *read([[item for _, item in row] for row in batches.rows(step)], sizes)).backward()
        llm.zero_grad()
    return (time.perf_counter() - began) / len(steps)


def measure(mean: int, spread: float, dtype: torch.dtype, steps: int, repeats: int, tiny: bool) -> dict[str, object]:
    """Padding and, where losses agree, samples per second; the ways take turns within a repeat."""
    llm, sizes = decoder(dtype, tiny), lengths(mean, spread)
    found: dict[str, object] = {"mean": mean, "spread": spread, "dtype": str(dtype).removeprefix("torch.")}
    found["error"] = difference = error(llm, sizes)
    if difference > TOLERANCE[dtype]:
        return found | {"refused": f"losses differ by {difference:.1e}, more than {TOLERANCE[dtype]:.0e}"}
    found["padding"] = {way: order(batching, sizes).padding_share(range(32)) for way, (batching, _) in WAYS.items()}
    for way in WAYS:
        seconds(llm, way, sizes, range(1))
    turns = [
        {way: SIZE / seconds(llm, way, sizes, range(turn * steps, (turn + 1) * steps)) for way in WAYS}
        for turn in range(repeats)
    ]
    found["samples_per_second"] = {way: harness.Spread.of([turn[way] for turn in turns]) for way in WAYS}
    found["packed_gain"] = harness.Spread.of([turn["packed"] / turn["bucketed"] for turn in turns])
    return found


def line(found: dict) -> list[str]:
    what = [f"{found['mean']} ± {found['spread']:.0%}", found["dtype"]]
    if "refused" in found:
        return [*what, "", found["refused"], "", "", "", ""]
    padding = f"{found['padding']['padded']:.0%} / {found['padding']['bucketed']:.0%}"
    return [*what, padding, *(str(found["samples_per_second"][way]) for way in WAYS), str(found["packed_gain"])]


def main(arguments: list[str] | None = None) -> int:
    options = harness.parser(__doc__, 4, "optimizer steps per measurement").parse_args(arguments)
    where = harness.machine()
    shapes, steps = (TINY_SHAPES, 1) if options.tiny else (SHAPES, options.steps)
    cases = []
    for mean, spread in shapes:
        for dtype in DTYPES:
            cases.append(measure(mean, spread, dtype, steps, options.repeats, options.tiny))
    header = ["tokens per sample", "dtype", "padding: padded / bucketed", *WAYS, "packed / bucketed"]
    print(harness.in_words(where))
    print(f"samples per second, median (smallest–largest) of {options.repeats} repeats of {steps} steps of {SIZE}")
    print(harness.table(header, [line(found) for found in cases]))
    print(harness.save("batching", {"machine": where, "cases": cases}, options))
    return int(any("refused" in found for found in cases))


if __name__ == "__main__":
    sys.exit(main())
