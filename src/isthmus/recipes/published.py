"""What authors say that their joints train and cost, beside which ours are printed; with where each figure is from.

Costs of a picture are those of a 4,096 wide LLM of 32 layers in half precision, 0.5 MiB of keys and values per token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Trained parameters and what a picture adds to the cache, as published."""

    trained: str
    evidence: str
    """`paper` or `code`: the authors' own; `sizes`: worked out from the sizes that they give."""
    parameters: float | None = None
    """The figure as a number, where it is of the first stage's trainable parameters."""
    cache: str = "—"


_LLAVA = Figure("21.0 M in alignment", "sizes", 20.98e6, "288 MiB")

FIGURES = {
    "llava-v1-7b": Figure("4.2 M in alignment", "sizes", 4.20e6, "128 MiB"),
    "llava-1.5-7b": _LLAVA,
    "blip2-opt-2.7b": Figure("188 M with heads", "paper", 188e6, "—"),
    "blip2-flan-t5-xl": Figure("188 M with heads", "paper", 188e6, "—"),
    "blip2-opt-2.7b-second": Figure("107 M", "sizes", 107.1e6, "—"),
    "instructblip-vicuna-7b": Figure("190 M, 4.7 M of which no gradient reaches", "paper", 190e6, "16 MiB"),
    "p-former-opt-2.7b": Figure("107 M, and before it a teacher of 110 M and more", "sizes"),
    "p-former-opt-2.7b-without": Figure("188 M with heads", "paper", 188e6),
    "minigpt4-7b": Figure("3.15 M", "sizes", 3.15e6, "16 MiB"),
    "minigpt4-first-7b": Figure("3.15 M", "sizes", 3.15e6, "16 MiB"),
    "openflamingo-9b": Figure("63 M resampler and 1.12 B gated blocks", "sizes", 1.18e9, "kept aside"),
    "qwen-vl-7b": Figure("ViT (1.9 B) and 92 M", "sizes", None, "128 MiB"),
    "mplug-owl-7b": Figure("ViT (0.3 B) and 105 M", "sizes", 0.409e9, "32.5 MiB"),
    "cogvlm-17b": Figure("6.5 B experts and 143 M", "paper", 6.62e9, "613 MiB"),
    "llama-adapter-v1-7b": Figure("1.2 M", "code", 1.23e6, "≈ 0"),
    "llama-adapter-v2-7b": Figure("14 M, on an LLM that is not named", "paper", None, "≈ 0"),
    "llama-adapter-v2-chat-65b": Figure("14 M, 13.80 M by the shapes in the code", "paper", 13.8035e6, "≈ 0"),
    "ee-mllm-7b": Figure("as LLaVA-1.5", "paper", 20.98e6, "288 MiB"),
    "ee-mllm-f-7b": Figure("none", "paper", None, "288 MiB"),
    "naavit-7b": Figure("as LLaVA-1.5", "paper", None, "288 MiB"),
    "vdep-7b": Figure("as LLaVA-1.5", "paper", 20.98e6, "288 MiB"),
    "saisa-7b": Figure("671 M", "sizes", 671e6, "288 MiB"),
    "shikra-7b": Figure("projector and LLM", "code", None, "128 MiB"),
    "kosmos2-1.7b": Figure("all but most of CLIP", "code"),
    "lion-4b": Figure("Q-Former 188 M, aggregator 69 M, adapters 25 M", "sizes"),
}
"""By recipe."""
