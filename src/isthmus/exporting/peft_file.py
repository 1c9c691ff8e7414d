"""Peft's adapter folders (github.com/huggingface/peft): LoRA and DoRA on Linears, read, placed on a model, and written.

Format: huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus import lora, sites
from isthmus.config import LoRA, Model, check, nearest
from isthmus.types import ConfigError

PREFIX = "base_model.model."
"""What peft puts before the name of a module."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"peft_type", "bias", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights"}
READ |= {"rank_pattern", "alpha_pattern"}
"""Options of peft that are looked at."""
IDLE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
IDLE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
IDLE |= {"loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying"}
"""Options that say nothing about a finished adapter: the names of its tensors say where it lies."""
BIRTHS = (None, True, False, "gaussian", "orthogonal", "eva")
"""How an adapter may have begun; the others of peft change the base's weights as well."""
REPEATS = 3
"""How many repetitions a pattern for names may have: the time for a name grows with its length to that power."""
DAMAGED = "save the adapter again with peft's save_pretrained, or copy the folder again"
PLAIN = "only LoRA and DoRA on Linears can be read; peft's merge_and_unload puts everything else into the base"


class Saved(NamedTuple):
    """An adapter folder of peft; names are dotted ones in the model that it was trained on."""

    linears: dict[str, tuple[LoRA, dict[str, Tensor]]]
    """How the LoRA of each Linear is shaped, and its tensors by our field, float32."""
    copies: dict[str, Tensor]
    """Parameters of the base: peft saves a head along that has LoRA, and the embedding of a changed vocabulary."""


def _quick(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """A foreign pattern, unless it could take for ever on the name of a module."""
    if re.search(r"\)[*+{]", pattern.pattern) or len(re.findall("[*+{]", pattern.pattern)) > REPEATS:
        raise ValueError(f"{pattern.pattern!r} repeats a group, or more than {REPEATS} times something")
    return pattern


Pattern = Annotated[re.Pattern[str], AfterValidator(_quick)]


class Options(BaseModel):
    """The options of peft that shape LoRA; `_check_plain` looks at the others."""

    model_config = ConfigDict(allow_inf_nan=False)

    r: int
    lora_alpha: float
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[Pattern, int] | None = None
    alpha_pattern: dict[Pattern, float] | None = None


def write(root: nn.Module, name: str, folder: Path, base: str | None = None) -> None:
    """Write LoRA as peft does; `root` is the model that `PeftModel.from_pretrained` will be given, `base` its name.

    Raises:
        ConfigError: no LoRA of that name; or parts of it differ in more than rank and alpha.
    """
    adapters = {path: lora.adapters(host)[name] for path, host in lora.hosts(root, name).items()}
    hows = [adapter.how for adapter in adapters.values()]
    how = max(hows, key=hows.count)
    if any((each.dora, each.dropout) != (how.dora, how.dropout) for each in hows):
        raise ConfigError(
            f"LoRA {name!r} is DoRA in some places only, or differs in dropout", "peft keeps one of either per adapter"
        )
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        tensors |= {PREFIX + path + key: getattr(adapter, field) for key, field in _keys(how.dora).items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": how.r,
        "lora_alpha": how.alpha,
        "rank_pattern": {path: each.how.r for path, each in adapters.items() if each.how.r != how.r},
        "alpha_pattern": {path: each.how.alpha for path, each in adapters.items() if each.how.alpha != how.alpha},
        "lora_dropout": how.dropout,
        "use_dora": how.dora,
        "target_modules": sorted(adapters),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def read(folder: Path) -> Saved:
    """What peft's `save_pretrained` (or `write`) wrote. Rank-stabilised scales (arXiv 2312.03732) become a larger
    alpha.

    Raises:
        ConfigError: a file is missing or damaged; or an option is not LoRA or DoRA on Linears.
    """
    tree, tensors = _files(folder)
    _check_plain(tree, folder)
    options = _checked(Options, tree, folder / CONFIG)
    keys = _keys(options.use_dora)
    first = next(iter(keys))
    paths = [key.removeprefix(PREFIX).removesuffix(first) for key in tensors if key.endswith(first)]
    expected = {PREFIX + path + key for path in paths for key in keys}
    copies = sorted(key for key in tensors.keys() - expected if key.startswith(PREFIX) and "lora_" not in key)
    if (wrong := expected ^ (tensors.keys() - set(copies))) or not paths:
        cause = f"has missing or unknown keys {sorted(wrong)[:3]}" if wrong else "holds no LoRA"
        raise ConfigError(f"{folder / WEIGHTS} {cause}", PLAIN)
    linears = {}
    for path in paths:
        fields = {field: tensors[PREFIX + path + key].float() for key, field in keys.items()}
        linears[path] = _shape(options, path, fields, folder / WEIGHTS), fields
    return Saved(linears, {key.removeprefix(PREFIX).replace(".base_layer.", "."): tensors[key] for key in copies})


@torch.no_grad()
def place(
    root: nn.Module,
    saved: Saved,
    name: str = "lora",
    inside: str = "",
    add: Callable[[Any, list[str], LoRA, str], object] = lora.attach,
) -> list[str]:
    """Attach what `read` read, and return the names of its Linears.

    Args:
        root: the model.
        saved: the adapter.
        name: what it is called in the model.
        inside: the dotted name of the module that the adapter's own names start in.
        add: attaches LoRA of one shape; `VLM.add_lora` where the model is to remember it.

    Raises:
        ConfigError: the adapter does not fit the model (nothing is changed then), or a Linear has LoRA of that name.
    """
    part = root.get_submodule(inside)
    _check_fits(part, saved)
    placed = {path: f"{inside}.{path}" if inside else path for path in saved.linears}
    groups: dict[LoRA, list[str]] = {}
    for path, (how, _) in saved.linears.items():
        groups.setdefault(how, []).append(placed[path])
    for how, paths in groups.items():
        add(root, paths, how, name)
    for path, (_, tensors) in saved.linears.items():
        adapter = lora.adapters(part.get_submodule(path))[name]
        for field, value in tensors.items():
            getattr(adapter, field).copy_(value)
    return list(placed.values())


# ---------------------------------------------------------------------------------------------- checks


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options of an adapter folder, and its tensors."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name}", "name the folder in which peft's save_pretrained put both files")
    file = folder / CONFIG
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        file = folder / WEIGHTS
        tensors = load_file(file)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read ({str(error).splitlines()[0]})", DAMAGED) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{folder / CONFIG}: not a JSON object", DAMAGED)
    return tree, tensors


def _check_plain(config: dict[str, Any], folder: Path) -> None:
    """Whether nothing is asked for that would be lost: whatever is not known must be off."""
    wrong = [key for key, value in config.items() if value and key not in READ | IDLE]
    wrong += ["peft_type"] * (config.get("peft_type") != "LORA")
    wrong += ["bias"] * (config.get("bias", "none") != "none")
    wrong += ["init_lora_weights"] * (config.get("init_lora_weights") not in BIRTHS)
    if wrong:
        raise ConfigError(f"{folder / CONFIG} uses {wrong}", PLAIN)


def _checked(model: type[Model], tree: dict[str, Any], file: Path) -> Model:
    try:
        return check(model, tree, str(file))
    except ConfigError as error:
        raise ConfigError(error.cause, DAMAGED) from None


def _shape(options: Options, path: str, fields: dict[str, Tensor], file: Path) -> LoRA:
    """How the LoRA of one Linear is shaped, if its tensors are shaped so too and hold numbers."""
    r = int(_pattern(options.rank_pattern, path, options.r))
    shapes = [list(each.shape) for each in fields.values()]
    out, width = (shapes[1] or [0])[0], (shapes[0] or [0])[-1]
    remedy = PLAIN if fields["A"].ndim > 2 else DAMAGED
    if shapes != [[r, width], [out, r], [out]][: len(shapes)] or 0 in (r, out, width):
        raise ConfigError(f"{file}: {path!r} has tensors of shapes {shapes}, and its rank is {r}", remedy)
    if not all(each.isfinite().all() for each in fields.values()):
        raise ConfigError(f"{file}: {path!r} has numbers that are not finite", DAMAGED)
    alpha = _pattern(options.alpha_pattern, path, options.lora_alpha) * (math.sqrt(r) if options.use_rslora else 1)
    how = {"r": r, "alpha": alpha, "dropout": options.lora_dropout, "dora": options.use_dora}
    return _checked(LoRA, how, file.with_name(CONFIG))


def _pattern(patterns: Mapping[re.Pattern[str], float] | None, path: str, default: float) -> float:
    """The first pattern that is the end of a Linear's name, from a dot on, as peft reads them."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key.pattern})$", path))
    return next(matches, default)


def _check_fits(part: nn.Module, saved: Saved) -> None:
    """Whether the model has the Linears that the adapter changes, and the base that the adapter was saved with."""
    remedy = "put the adapter onto the model that it was trained on"
    own = dict(part.named_parameters(remove_duplicate=False))
    shapes = {path: (each.out_features, each.in_features) for path, each in sites.linears(part).items()}
    for path, (_, tensors) in saved.linears.items():
        if path not in shapes:
            meant = nearest(path, list(shapes))
            raise ConfigError(
                f"the adapter changes {path!r}, and {type(part).__name__} has no such Linear{meant}", remedy
            )
        shape = len(tensors["B"]), tensors["A"].shape[1]
        if shape != shapes[path]:
            raise ConfigError(f"{path}: the adapter is for shape {shape}, and the model's is {shapes[path]}", remedy)
    for path, value in saved.copies.items():
        if path not in own or not _same(own[path], value.to(own[path].device)):
            raise ConfigError(f"the adapter holds {path!r} of its own, which is not the model's", PLAIN)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers, in the coarser of their dtypes."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


def _keys(dora: bool) -> dict[str, str]:
    """Peft's names behind a module's, and ours."""
    more = {".lora_magnitude_vector": "magnitude"} if dora else {}
    return {".lora_A.weight": "A", ".lora_B.weight": "B"} | more
