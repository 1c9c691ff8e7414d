"""Adapters in peft's format: one put onto a part of a saved model, and all of a model's written as folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from isthmus import cards, lora, parts, storage
from isthmus.config import nearest
from isthmus.encoders.hf import Transformer
from isthmus.exporting import ANOTHER, adapters, peft_file
from isthmus.model import VLM
from isthmus.types import ConfigError


def import_adapter(source: Path, onto: str | Path, out: Path, part: str = "llm", name: str = "adapter") -> list[str]:
    """Put an adapter folder of peft onto a part of a saved model, write the result, and name its Linears.

    Args:
        source: the folder that peft wrote.
        onto: the model, ours.
        out: where the model with the adapter goes.
        part: `llm` or `encoders.<kind>`; peft's names start inside of it.
        name: what the adapter is called in the model.

    Raises:
        ConfigError: no such part; or the adapter is not LoRA or DoRA on Linears, or does not fit.
    """
    saved = peft_file.read(source)
    model = VLM.from_pretrained(onto)
    known = roots(model)
    if part not in known:
        raise ConfigError(f"no part named {part!r}{nearest(part, list(known))}", f"adapters go onto {list(known)}")
    placed = peft_file.place(model, saved, name, known[part], VLM.add_lora)
    model.save_pretrained(out)
    return placed


def export_adapters(source: str | Path, out: Path) -> dict[Path, int]:
    """Write every LoRA of a saved model as adapter folders of peft, `out/PART/NAME`, with how many Linears each has.

    Raises:
        ConfigError: there is none; or one lies outside of LLM and vision transformers, where peft could not find it;
            or its part has trained weights beside it, which peft's base would not have. Nothing is written then.
    """
    model = VLM.from_pretrained(source)
    places = roots(model)
    found: Counter[tuple[str, str]] = Counter()
    for name in adapters(model):
        for path in lora.hosts(model, name):
            part = next((part for part, root in places.items() if path.startswith(f"{root}.")), None)
            if part is None:
                raise ConfigError(f"LoRA {name!r} lies on {path}", f"peft can be given {list(places)}")
            found[part, name] += 1
    if not found:
        raise ConfigError(f"{source} has no LoRA", "`--to llava` writes a model without adapters")
    trained = sorted(filter(storage.is_base, storage.stored(model, whole=False)))
    for part, name in found:
        if own := [key for key in trained if key.startswith(f"{places[part]}.")]:
            raise ConfigError(f"{own[0]} was trained beside LoRA {name!r}, and peft keeps LoRA alone", ANOTHER)
    written: dict[Path, int] = {}
    for (part, name), hosts in found.items():
        base = model.config.llm if part == "llm" else model.config.encoders[part.split(".")[1]]
        folder = out / part / name
        peft_file.write(model.get_submodule(places[part]), name, folder, base["config"]["source"])
        adapter = cards.Export(f"an adapter of peft for {part}", "peft", _PEFT, merged=False)
        cards.write_export(parts.folder(str(source)), folder, adapter)
        written[folder] = hosts
    return written


_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/directory")"""


def roots(model: VLM) -> dict[str, str]:
    """The parts that are models of transformers, and where they are in ours."""
    towers = {f"encoders.{kind}": each for kind, each in model.encoders.items() if isinstance(each, Transformer)}
    return {"llm": "llm"} | {part: f"{part}.tower" for part in towers}
