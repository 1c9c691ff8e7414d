"""Every published system as a function that returns a `Recipe`, with its size and ablations as arguments.

`size="embedded"` runs on a laptop with parts that registry packages carry; `size="published"` is the system as its
authors trained it.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.config import Recipe, nearest
from isthmus.errors import ConfigError
from isthmus.recipes.albef import albef
from isthmus.recipes.asvr import asvr
from isthmus.recipes.blip2 import blip2, instructblip, minigpt4
from isthmus.recipes.cogvlm import cogvlm
from isthmus.recipes.demo import demo
from isthmus.recipes.ee_mllm import ee_mllm
from isthmus.recipes.flamingo import flamingo
from isthmus.recipes.kosmos2 import kosmos2
from isthmus.recipes.lion import lion
from isthmus.recipes.llama_adapter import llama_adapter
from isthmus.recipes.llava import llava
from isthmus.recipes.mplug_owl import mplug_owl
from isthmus.recipes.p_former import p_former
from isthmus.recipes.qwen_vl import qwen_vl
from isthmus.recipes.saisa import saisa
from isthmus.recipes.shikra import shikra
from isthmus.recipes.vdep import vdep
from isthmus.recipes.victor import victor

BOOK: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "llava": lambda: llava("embedded"),
    "llava-linear": lambda: llava("embedded", projector="linear"),
    "llava-1.5-7b": lambda: llava("published"),
    "llava-v1-7b": lambda: llava("published", projector="linear"),
    "blip2": blip2,
    "blip2-second": lambda: blip2(first=False),
    "blip2-opt-2.7b": lambda: blip2("published"),
    "blip2-opt-2.7b-second": lambda: blip2("published", first=False),
    "blip2-flan-t5-xl": lambda: blip2("published", "flan-t5-xl"),
    "albef": albef,
    "albef-without-momentum": lambda: albef(momentum=False),
    "albef-fusion-alone": lambda: albef(contrast=False),
    "instructblip": instructblip,
    "instructblip-blind": lambda: instructblip(aware=False),
    "instructblip-vicuna-7b": lambda: instructblip("published"),
    "p-former": p_former,
    "p-former-without": lambda: p_former(weight=0),
    "p-former-opt-2.7b": lambda: p_former("published"),
    "p-former-opt-2.7b-without": lambda: p_former("published", weight=0),
    "minigpt4": minigpt4,
    "minigpt4-first": lambda: minigpt4(curated=False),
    "minigpt4-7b": lambda: minigpt4("published"),
    "minigpt4-first-7b": lambda: minigpt4("published", curated=False),
    "flamingo": flamingo,
    "openflamingo-9b": lambda: flamingo("published"),
    "openflamingo-4b": lambda: flamingo("published-4b"),
    "qwen-vl": qwen_vl,
    "qwen-vl-blind-to-place": lambda: qwen_vl(positions=False),
    "qwen-vl-7b": lambda: qwen_vl("published"),
    "mplug-owl": mplug_owl,
    "mplug-owl-7b": lambda: mplug_owl("published"),
    "cogvlm": cogvlm,
    "cogvlm-17b": lambda: cogvlm("published"),
    "llama-adapter": llama_adapter,
    "llama-adapter-v2": lambda: llama_adapter("embedded", "v2"),
    "llama-adapter-v2-released": lambda: llama_adapter("embedded", "v2-released"),
    "llama-adapter-v1-7b": lambda: llama_adapter("published"),
    "llama-adapter-v2-7b": lambda: llama_adapter("published", "v2"),
    "llama-adapter-v2-released-7b": lambda: llama_adapter("published", "v2-released"),
    "llama-adapter-v2-chat-65b": lambda: llama_adapter("published", "v2-chat"),
    "ee-mllm": ee_mllm,
    "ee-mllm-f": lambda: ee_mllm(free=True),
    "ee-mllm-7b": lambda: ee_mllm("published"),
    "ee-mllm-f-7b": lambda: ee_mllm("published", free=True),
    "naavit": lambda: ee_mllm(visual="ffn"),
    "naavit-7b": lambda: ee_mllm("published", visual="ffn"),
    "saisa": saisa,
    "saisa-7b": lambda: saisa("published"),
    "shikra": shikra,
    "shikra-7b": lambda: shikra("published"),
    "vdep": vdep,
    "vdep-shift-0": lambda: vdep(shift=0),
    "vdep-without": lambda: vdep(alpha=0),
    "vdep-7b": lambda: vdep("published"),
    "victor": victor,
    "victor-7b": lambda: victor("published"),
    "asvr": asvr,
    "asvr-looks": lambda: asvr(of="looks"),
    "asvr-without": lambda: asvr(weight=0),
    "asvr-7b": lambda: asvr("published"),
    "kosmos2": kosmos2,
    "kosmos2-1.7b": lambda: kosmos2("published"),
    "lion": lion,
    "lion-single": lambda: lion(stages="single"),
    "lion-mixture-none-single": lambda: lion(mixture="none", stages="single"),
    "lion-last-layer": lambda: lion(aggregator=False),
    "lion-4b": lambda: lion("published"),
}
"""Recipes by the name that the command line knows."""
APART = {
    "asvr-without": "here without its term",
    "lion": "three stages, a router over two adapters",
    "lion-single": "all in one stage",
    "lion-mixture-none-single": "one adapter, all in one stage",
    "lion-last-layer": "without the aggregator: the encoder's last layer alone",
    "minigpt4": "a short curated last stage",
    "minigpt4-first": "without the curated last stage",
    "minigpt4-first-7b": "here without that stage",
}
"""What tells recipes apart whose own lines are the same; a recipe's own line stays as it is, for its fingerprint."""


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: no such recipe; the nearest is suggested.
    """
    if name not in BOOK:
        raise ConfigError(
            f"no recipe named {name!r}{nearest(name, list(BOOK))}", "`isthmus recipes` lists them; a file ends in .yaml"
        )
    return BOOK[name]()


def titles() -> dict[str, str]:
    """One line about every recipe, no two the same."""
    return {name: "; ".join(filter(None, (build().about, APART.get(name)))) for name, build in BOOK.items()}


def large() -> list[str]:
    """The names of those in their authors' size, whose LLM is described and not here."""
    return [name for name, build in BOOK.items() if build().llm.architecture is not None]
