"""LoRA (Hu et al., arXiv 2106.09685, github.com/microsoft/LoRA) and DoRA (Liu et al., arXiv 2402.09353,
github.com/NVlabs/DoRA) as the innermost graft on Linears, read and written in peft's adapter format.

Differs:
    - masters keep the dtype they were made with (float32) and are cast to the input's dtype where they are used;
    - DoRA under dropout scales the base's whole result, while peft sends the dropped input through the base too.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import sites
from isthmus.config import LoRA, nearest
from isthmus.graft import Graft, at, graft, ungraft
from isthmus.quantised import Packed
from isthmus.types import ConfigError, Side

PREFIX = "base_model.model."
"""What peft puts before the name of a module."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LowRank(Graft):
    """W x + (alpha / r) B A dropout(x) on a Linear; with DoRA every output's weight vector has a trained norm.

    B is zero at birth, and DoRA's magnitudes are the norms of W, so nothing changes before training.
    """

    innermost = True
    reads_side = False

    def __init__(self, host: nn.Linear, how: LoRA):
        super().__init__()
        self.how, self.scale = how, how.alpha / how.r
        device, dtype = next(host.parameters()).device, torch.float32
        self.A = nn.Parameter(torch.empty(how.r, host.in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(host.out_features, how.r, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if how.dora:
            self.magnitude = nn.Parameter(_norm(_weight(host)))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        y = base(x, *args, **kw)
        low = F.linear(F.dropout(x, self.how.dropout, self.training), self.A.to(x.dtype))
        update = F.linear(low, (self.scale * self.B).to(x.dtype))
        if not self.how.dora:
            return y + update
        bias = 0 if host.bias is None else host.bias
        norm = _norm(_weight(host) + self.update()).detach()  # held constant, section 4.3 of the paper
        ratio = (self.magnitude / norm).to(y.dtype)
        return y + (ratio - 1) * (y - bias) + ratio * update  # equals y to the last bit where ratio is 1

    def update(self) -> Tensor:
        """(alpha / r) B A, [out, in]."""
        return self.scale * (self.B @ self.A)

    def merged(self, host: nn.Linear) -> Tensor:
        """The host's weight with this update in it, [out, in]."""
        weight = _weight(host) + self.update()
        if self.how.dora:
            weight = weight * (self.magnitude / _norm(weight))[:, None]
        return weight.to(host.weight.dtype)


def attach(root: nn.Module, globs: str | Iterable[str], how: LoRA, name: str = "lora") -> list[str]:
    """Put LoRA on every Linear whose dotted name matches one of the globs, and return their names.

    Output heads take part only where a glob is their exact name: a head is often tied to the embedding, which a
    merge would change too.

    Raises:
        ConfigError: a glob matches no Linear, or a Linear already has a graft of that name.
    """
    globs = [globs] if isinstance(globs, str) else list(globs)
    linears, heads = sites.linears(root), sites.heads(root)
    chosen: dict[str, nn.Linear] = {}
    for glob in globs:
        matches = {
            path: linear
            for path, linear in linears.items()
            if path == glob or (fnmatch.fnmatchcase(path, glob) and linear not in heads)
        }
        if not matches:
            raise ConfigError(f"{glob!r} matches no Linear{nearest(glob, list(linears))}", "LoRA changes Linears only")
        chosen |= matches
    for path, linear in chosen.items():
        graft(root, path, name, LowRank(linear, how))
    return list(chosen)


def hosts(root: nn.Module, name: str = "lora") -> dict[str, nn.Linear]:
    """The Linears that carry LoRA of that name, by dotted name.

    Raises:
        ConfigError: there is none.
    """
    found = {path: host for path, host in sites.linears(root).items() if isinstance(at(host).get(name), LowRank)}
    if not found:
        raise ConfigError(f"{type(root).__name__} has no LoRA named {name!r}", "attach it first")
    return found


@torch.no_grad()
def merge(root: nn.Module, name: str = "lora") -> list[str]:
    """Fold LoRA into the weights of its hosts and take it off; their names are returned.

    Raises:
        ConfigError: nothing to merge; or a host carries another addition, whose `base` would then hold the update
            (an expert that routes tokens past the base, DoRA, which reads the base's norm); or a host's weight is
            shared, or packed in 4 or 8 bits, which an update would not survive. Nothing is changed in that case.
    """
    found = hosts(root, name)
    for path, host in found.items():
        _check_mergeable(root, path, host, name)
    for path, host in found.items():
        host.weight.copy_(_adapter(host, name).merged(host))
        ungraft(root, path, name)
    return list(found)


# ---------------------------------------------------------------------------------------------- peft's format


Found: TypeAlias = dict[str, tuple[LoRA, dict[str, Tensor]]]
"""An adapter by the dotted name of its Linear: how it is shaped, and its tensors by our field."""


def to_peft(root: nn.Module, name: str, folder: Path, base: str | None = None) -> None:
    """Write LoRA as peft does; `root` is the model that `PeftModel.from_pretrained` will be given, `base` its name.

    Raises:
        ConfigError: no LoRA of that name; or parts of it differ in more than rank and alpha.
    """
    adapters = {path: _adapter(host, name) for path, host in hosts(root, name).items()}
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


def from_peft(root: nn.Module, folder: Path, name: str = "lora") -> list[str]:
    """Attach the LoRA or DoRA that peft (or `to_peft`) wrote, and return the names of its Linears.

    Raises:
        ConfigError: it uses an option that is not LoRA or DoRA on Linears, or does not fit the model.
    """
    found = read_peft(folder)
    for how, paths in grouped(found).items():
        attach(root, paths, how, name)
    fill(root, found, name)
    return list(found)


def read_peft(folder: Path) -> Found:
    """What an adapter folder of peft holds. Rank-stabilised scales (arXiv 2312.03732) become a larger alpha.

    Raises:
        ConfigError: it uses an option that is not LoRA or DoRA on Linears.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder}: no {WEIGHTS}", "save the adapter as safetensors first")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    _check_plain(config, folder)
    dora = bool(config.get("use_dora"))
    paths = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    expected = {PREFIX + path + key for path in paths for key in _keys(dora)}
    if expected != set(tensors):
        raise ConfigError(
            f"{folder / WEIGHTS} has missing or unknown keys {sorted(expected ^ set(tensors))[:3]}",
            "only LoRA and DoRA on Linears can be read",
        )
    found: Found = {}
    for path in paths:
        r = int(_pattern(config.get("rank_pattern"), path, config["r"]))
        alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
        alpha = alpha * math.sqrt(r) if config.get("use_rslora") else alpha
        how = LoRA(r=r, alpha=alpha, dropout=config.get("lora_dropout", 0.0), dora=dora)
        found[path] = how, {field: tensors[PREFIX + path + key] for key, field in _keys(dora).items()}
    return found


def grouped(found: Found) -> dict[LoRA, list[str]]:
    """The names of an adapter's Linears by how they are shaped."""
    groups: dict[LoRA, list[str]] = {}
    for path, (how, _) in found.items():
        groups.setdefault(how, []).append(path)
    return groups


@torch.no_grad()
def fill(root: nn.Module, found: Found, name: str) -> None:
    """Copy an adapter's tensors into LoRA that is attached already.

    Raises:
        ConfigError: a shape differs.
    """
    for path, (_, tensors) in found.items():
        adapter = _adapter(root.get_submodule(path), name)
        for field, value in tensors.items():
            parameter = getattr(adapter, field)
            if parameter.shape != value.shape:
                raise ConfigError(
                    f"{path}: the adapter's shape {tuple(value.shape)} is not {tuple(parameter.shape)}",
                    "load it into the model it was trained on",
                )
            parameter.copy_(value)


READ = {"peft_type", "bias", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights"}
READ |= {"rank_pattern", "alpha_pattern"}
"""Options of peft that are looked at."""
IDLE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
IDLE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
IDLE |= {"loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying"}
"""Options that say nothing about a finished adapter: the names of its tensors say where it lies."""
BIRTHS = (None, True, False, "gaussian", "orthogonal", "eva")
"""How an adapter may have begun; the others of peft change the base's weights as well."""


def _check_plain(config: dict[str, Any], folder: Path) -> None:
    """Whether nothing is asked for that would be lost: whatever is not known must be off."""
    wrong = [key for key, value in config.items() if value and key not in READ | IDLE]
    wrong += ["peft_type"] * (config.get("peft_type") != "LORA")
    wrong += ["bias"] * (config.get("bias", "none") != "none")
    wrong += ["init_lora_weights"] * (config.get("init_lora_weights") not in BIRTHS)
    if wrong:
        raise ConfigError(f"{folder / CONFIG} uses {wrong}", "only LoRA and DoRA on Linears can be read")


def _pattern(patterns: dict[str, float] | None, path: str, default: float) -> float:
    """The first pattern that is the end of a Linear's name, from a dot on, as peft reads them."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(matches, default)


def _keys(dora: bool) -> dict[str, str]:
    """Peft's names behind a module's, and ours."""
    more = {".lora_magnitude_vector": "magnitude"} if dora else {}
    return {".lora_A.weight": "A", ".lora_B.weight": "B"} | more


# ---------------------------------------------------------------------------------------------- parts


def _adapter(host: nn.Module, name: str) -> LowRank:
    adapter = at(host)[name]
    assert isinstance(adapter, LowRank)
    return adapter


def _weight(host: nn.Linear) -> Tensor:
    if not host.weight.is_floating_point():
        raise ConfigError("another library holds the host's weight in codes", "use `bits` of the recipe instead")
    return host.weight.detach().float()


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.norm(weight, dim=1)


def _check_mergeable(root: nn.Module, path: str, host: nn.Linear, name: str) -> None:
    if isinstance(host, Packed):
        raise ConfigError(
            f"{path} is held in {host.bits} bits, and the merged weight would be rounded again",
            "isthmus.quantised.dequantise(model) first, as `isthmus export` does",
        )
    others = {other: each for other, each in at(host).items() if other != name and (each.reads_host or each.innermost)}
    additive = all(isinstance(each, LowRank) and not each.how.dora for each in others.values())
    if others and not (additive and not _adapter(host, name).how.dora):
        raise ConfigError(
            f"{path} carries {sorted(others)} too, which would run on the merged weight",
            "keep LoRA unmerged, or take the others off first",
        )
    shared = [other for other, each in root.named_modules() if each._parameters.get("weight") is host.weight]
    if len(shared) > 1:
        raise ConfigError(f"the weight of {path} is shared by {shared}", "keep LoRA on it unmerged")
