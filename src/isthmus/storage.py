"""Saving and loading a VLM as one Hugging Face directory.

By default a directory holds a delta: what was added or trained, plus references to the base parts by source and
fingerprint. Every key is accounted for on load; transformers' own loader would leave a delta's base keys random
without an error.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from isthmus import cards, changes, parts, quantised
from isthmus.config import LLMConfig, check
from isthmus.errors import abbreviated
from isthmus.files import sha256
from isthmus.processor import VLMProcessor
from isthmus.types import ConfigError, IsthmusError

if TYPE_CHECKING:
    from isthmus.model import VLM, VLMConfig

MANIFEST = "manifest.json"
"""Names and sha256 of the weight files beside it."""
DESCRIBED = (("text_config",), ("llm", "config"), ("encoders",), ("aligner", "name"))
"""Entries that config.json must have."""


def save(model: VLM, folder: Path, whole: bool | None = None, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write config, weights, generation settings, processor and a manifest of hashes.

    All of it is written beside the final place first, so that a full disk leaves an earlier save as it was.

    Args:
        whole: with all base weights, or without those that were never trained; None keeps the form of the model.
        state: the model's tensors by key, where they are gathered already.

    Raises:
        ConfigError: `whole`, while a base part is packed: codes are made anew from the source, never stored; or not
            whole, while there are no base parts to refer to; or `state` lacks a tensor; or other code has added to the
            model or resized it, so that it could not be loaded; or transformers refuses its generation settings.
            Nothing is written then.
        IsthmusError: a base part is not the one it was, or the folder cannot be written.
    """
    config = model.config
    came, trained, whole = config.whole, config.trained, config.whole if whole is None else whole
    if whole and quantised.hosts(model):
        raise ConfigError(
            "a base part in 4 or 8 bits is referred to, not saved whole",
            "save with whole=False, or make the parts dense with isthmus.quantised.dequantise(model)",
        )
    llm = None if whole else _confirm(config)
    changes.check(model, whole)
    _check_generation(model.generation_config)
    state = model.state_dict() if state is None else state
    try:
        kept = stored(model, False)
        if llm is not None:
            rest = [key for key in model.state_dict(keep_vars=True) if is_base(key) and key not in kept]
            config.trained = [*trained, *changes.differing(model, llm, rest, state)]
        else:  # the base is not read; what requires a gradient counts as trained
            awake = [name for name, each in model.named_parameters() if each.requires_grad and is_base(name)]
            config.trained = [*trained, *(name for name in awake if name not in kept)]
        if lost := sorted(stored(model, whole) - set(state)):
            raise ConfigError(f"state_dict lacks {abbreviated(lost)}", "pass the whole model's, or none")
        _place(model, folder, whole, state)
    finally:
        config.whole, config.trained = came, trained


def _place(model: VLM, folder: Path, whole: bool, state: Mapping[str, torch.Tensor]) -> None:
    """Write a folder beside its place, and put it there."""
    kept = stored(model, whole)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(".saving-*"):  # of a save that was killed
            shutil.rmtree(stray, ignore_errors=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            model.config.whole = whole
            _write(model, Path(staging), {key: tensor for key, tensor in state.items() if key in kept})
            if cards.ours(folder):
                (Path(staging) / cards.NAME).write_text(_card(model, folder), encoding="utf-8")
            for old in folder.glob("model*.safetensors*"):
                old.unlink()
            for new in Path(staging).iterdir():
                new.replace(folder / new.name)
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:  # Rust's, of a full disk
            raise
        raise IsthmusError(
            f"{folder}: cannot be written ({error})", "free some space or name another folder"
        ) from error


def _check_generation(settings: GenerationConfig) -> None:
    """Refuse settings that transformers would not save: inconsistent ones, unless they were loaded so."""
    if getattr(settings, "_original_object_hash", None) == hash(settings):
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"transformers refuses to save the generation settings: {' '.join(str(error).split())}",
            "correct model.generation_config: do_sample=True beside a temperature, for instance",
        ) from None


def _confirm(config: Any) -> LLMConfig:
    """Whether the base parts that a delta refers to are there as they were; the LLM's config.

    Raises:
        ConfigError: a part came with another model, which is not a base to refer to.
        IsthmusError: a part is not the one it was.
    """
    llm = LLMConfig(**config.llm["config"])
    if config.llm["weights"] is None or any(entry["weights"] is None for entry in config.encoders.values()):
        raise ConfigError("its base weights are nowhere else: it was imported whole", "save it with whole=True")
    parts.confirm("llm", parts.folder(llm.source, llm.revision), config.llm["weights"])
    for kind, entry in config.encoders.items():
        parts.confirm_encoder(kind, config.encoder(kind), entry["weights"])
    return llm


def _write(model: VLM, folder: Path, state: dict[str, torch.Tensor]) -> None:
    model.config.architectures = [type(model).__name__]
    base = [*model.llm.parameters(), *model.encoders.parameters()]  # what trained is float32 beside the others' dtype
    model.config.dtype = min((each.dtype for each in base if each.is_floating_point()), key=lambda one: one.itemsize)
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))


def _card(model: VLM, folder: Path) -> str:
    return cards.card(json.loads(model.config.to_json_string(use_diff=False)), cards.lineage(folder))


def fingerprint(source: str | Path) -> str:
    """Twelve hex digits that change with a saved model's config or weights, from its manifest of hashes."""
    folder = parts.folder(str(source), None)
    files = [file for name in ("config.json", MANIFEST) if (file := folder / name).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def load(
    cls: type[VLM],
    source: str | Path,
    dtype: torch.dtype | str,
    revision: str | None = None,
    attention: str | None = None,
    config: VLMConfig | None = None,
) -> VLM:
    """A model from a directory or hub name, in eval mode; every key is compared. `config` stands for the one there."""
    folder = parts.folder(str(source), revision)
    if not (folder / "config.json").is_file():
        models = sorted(folder.glob("**/model/config.json"), key=lambda file: file.stat().st_mtime)
        raise IsthmusError(
            f"{folder}: no config.json",
            f"name a model below it: {models[-1].parent}"
            if models
            else "name a directory that `isthmus train` or save_pretrained wrote",
        )
    described = parts.read_object(folder / "config.json")
    kind = described.get("model_type")
    if kind != cls.config_class.model_type:
        raise IsthmusError(
            f"{folder} is a {kind} model, not a joint one",
            "name it as a recipe's llm or encoder, or read it with `isthmus import`",
        )
    if lost := [".".join(path) for path in DESCRIBED if not _holds(described, path)]:
        raise IsthmusError(f"{folder / 'config.json'}: damaged (no {', '.join(lost)})", parts.AGAIN)
    config = cls.config_class.from_pretrained(folder) if config is None else config
    if attention := attention or config._attn_implementation_internal:
        chosen = check(LLMConfig, config.llm["config"] | {"attention": attention}, "attn_implementation")
        config.llm = config.llm | {"config": chosen.model_dump(mode="json")}
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype) if dtype != "auto" else config.dtype or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"no dtype is named {dtype!r}", "name bfloat16, float16, float32 or auto")
    if config.whole:
        llm_config = LLMConfig(**config.llm["config"])
        llm = parts.empty_llm(config.text_config, llm_config.attention, dtype)
        encoders = {
            kind: parts.empty_encoder(config.encoder(kind), entry["architecture"], folder, dtype)
            for kind, entry in config.encoders.items()
        }
    else:
        llm = parts.load_llm(_confirm(config), dtype)
        encoders = {kind: parts.load_encoder(config.encoder(kind), dtype) for kind in config.encoders}
    model = cls(config, llm, encoders)
    weights = read_weights(folder)
    _fill(model, weights, config.whole, folder)
    for kind, encoder in model.encoders.items():
        encoder.own = _own(kind, weights, config)
    model.processor = VLMProcessor.from_pretrained(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        parts.read_object(folder / GENERATION_CONFIG_NAME)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _holds(tree: Any, path: Sequence[str]) -> bool:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return bool(tree)


def _own(kind: str, weights: Mapping[str, torch.Tensor], config: VLMConfig) -> str:
    """A hash of what a directory holds of an encoder, LoRA's scales among it; empty where that is nothing."""
    if not (keys := sorted(key for key in weights if key.startswith(f"encoders.{kind}."))):
        return ""
    found = hashlib.sha256(json.dumps([keys, config.lora], sort_keys=True).encode())
    for key in keys:
        found.update(weights[key].contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def stored(model: VLM, whole: bool) -> set[str]:
    """The keys of a checkpoint: everything, or everything but base weights that were never trained.

    Of tied weights only the first name is stored.
    """
    keys, names = set(), set(model.config.trained)
    globs = [name for name in names if any(mark in name for mark in "*?[")]
    for key, first in changes.first_names(model).items():
        if first != key:
            continue
        if whole or not is_base(key) or key in names or any(fnmatch.fnmatch(key, glob) for glob in globs):
            keys.add(key)
    return keys


def is_base(key: str) -> bool:
    """Whether a parameter belongs to a pretrained part as it came, and not to what was added inside it."""
    return key.startswith(("llm.", "encoders.")) and ".grafts." not in key


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, checked against the manifest where there is one.

    Raises:
        IsthmusError: no weights, or a file is damaged; the file is named.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise IsthmusError(f"{folder}: no safetensors weights", "is this the directory of a finished stage?")
    manifest = folder / MANIFEST
    hashes = parts.read_object(manifest) if manifest.is_file() else {}
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if file.name in hashes and sha256(file) != hashes[file.name]:
            raise IsthmusError(f"{file}: damaged (its content is not what was saved)", parts.AGAIN)
        try:
            state |= load_file(file)
            _names_once(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise IsthmusError(f"{file}: cannot be read ({str(error).splitlines()[0]})", parts.AGAIN) from None
    if lost := set(hashes) - {file.name for file in files}:
        raise IsthmusError(f"{folder / min(lost)}: missing", parts.AGAIN)
    return state


def _names_once(file: Path) -> None:
    """Refuse a header that names a tensor twice: parsers differ in which of both they take."""

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(known := dict(pairs)) < len(pairs):
            raise ValueError(f"a name stands twice among {sorted(known)[:3]}")
        return known

    with file.open("rb") as stream:
        json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=entries)


def _fill(model: VLM, state: dict[str, Any], whole: bool, folder: Path) -> None:
    """Load a checkpoint's tensors, whose keys and shapes must be exactly the expected ones."""
    expected = stored(model, whole)
    own = model.state_dict()
    wrong = [f"missing {key}" for key in sorted(expected - set(state))]
    wrong += [f"unexpected {key}" for key in sorted(set(state) - expected)]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in sorted(expected & set(state))
        if state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise IsthmusError(
            f"{folder}: weights do not fit the config: {'; '.join(wrong[:5])}{more}",
            "config.json and the safetensors files must come from the same save",
        )
    model.load_state_dict(state, strict=False)
