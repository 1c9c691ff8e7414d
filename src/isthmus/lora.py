"""LoRA (Hu et al., arXiv 2106.09685, github.com/microsoft/LoRA) and DoRA (Liu et al., arXiv 2402.09353,
github.com/NVlabs/DoRA) as the innermost graft on Linears, merged in any order.

Differs:
    - masters keep the dtype they were made with (float32) and are cast to the input's dtype where they are used;
    - DoRA under dropout scales the base's whole result, while peft sends the dropped input through the base too.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import sites
from isthmus.config import LoRA, nearest
from isthmus.graft import Graft, at, graft, ungraft
from isthmus.quantised import Packed
from isthmus.types import ConfigError, Side


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
            self.magnitude = nn.Parameter(self.norm(host))

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        y = base(x, *args, **kw)
        low = F.linear(F.dropout(x, self.how.dropout, self.training), self.A.to(x.dtype))
        update = F.linear(low, (self.scale * self.B).to(x.dtype))
        if not self.how.dora:
            return y + update
        bias = 0 if host.bias is None else host.bias
        ratio = self.ratio(host).to(y.dtype)
        return y + (ratio - 1) * (y - bias) + ratio * update  # equals y to the last bit where ratio is 1

    def update(self) -> Tensor:
        """(alpha / r) B A, [out, in]."""
        return self.scale * (self.B @ self.A)

    def ratio(self, host: nn.Linear) -> Tensor:
        """What DoRA multiplies each output by, [out]: magnitude over norm; ones without DoRA."""
        return self.magnitude / self.norm(host) if self.how.dora else torch.ones_like(self.B[:, 0])

    def norm(self, host: nn.Linear) -> Tensor:
        """Of the host's own weight with this update, [out], whatever other LoRA lies beneath."""
        return torch.linalg.norm(_weight(host) + self.update(), dim=1).detach()  # held constant, section 4.3


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
    found = {path: host for path, host in sites.linears(root).items() if name in adapters(host)}
    if not found:
        raise ConfigError(f"{type(root).__name__} has no LoRA named {name!r}", "attach it first")
    return found


def adapters(host: nn.Module) -> dict[str, LowRank]:
    """The LoRA of a Linear by name, innermost first."""
    return {name: each for name, each in at(host).items() if isinstance(each, LowRank)}


@torch.no_grad()
def merge(root: nn.Module, name: str = "lora") -> list[str]:
    """Fold LoRA into the weights of its hosts and take it off; their names are returned.

    Other LoRA on the same hosts stays, and may be merged before or after in any order: what all of it computes without
    dropout does not change. A DoRA that stays divides by the norm of another weight then, so its magnitudes are scaled.

    Raises:
        ConfigError: nothing to merge; or a host carries an addition of another kind, whose `base` would then hold the
            update (an expert that routes tokens past the base); or a host's weight is shared, or packed in 4 or 8
            bits, which an update would not survive; or a DoRA inside it has a magnitude of zero, so that
            no weight beneath could hold the update. Nothing is changed in that case.
    """
    found = hosts(root, name)
    for path, host in found.items():
        _check_mergeable(root, path, host, name)
    for path, host in found.items():
        _fold(host, name)
        ungraft(root, path, name)
    return list(found)


def _fold(host: nn.Linear, name: str) -> None:
    """Change the weight so that the host computes without LoRA `name` what it computed with it.

    All LoRA of a host together is one weight: from the innermost on, W <- ratio * (W + update). What `name` makes of it
    is the new weight, after the steps of those inside it, which will be made again, are undone.
    """
    every = adapters(host)
    ratios = {each: every[each].ratio(host) for each in every}
    inner = _inner(host, name)
    weight = _weight(host)
    for each in [*inner, name]:
        weight = ratios[each][:, None] * (weight + every[each].update())
    for each in reversed(inner):
        weight = weight / ratios[each][:, None] - every[each].update()
    host.weight.copy_(weight)
    for each in every.keys() - {name}:
        if every[each].how.dora:
            every[each].magnitude.copy_(ratios[each] * every[each].norm(host))


def _inner(host: nn.Module, name: str) -> list[str]:
    """The names of the LoRA that `name` lies on."""
    names = list(adapters(host))
    return names[: names.index(name)]


# ---------------------------------------------------------------------------------------------- checks


def _weight(host: nn.Linear) -> Tensor:
    if not host.weight.is_floating_point():
        raise ConfigError("another library holds the host's weight in codes", "use `bits` of the recipe instead")
    return host.weight.detach().float()


def _check_mergeable(root: nn.Module, path: str, host: nn.Linear, name: str) -> None:
    if isinstance(host, Packed):
        raise ConfigError(
            f"{path} is held in {host.bits} bits, and the merged weight would be rounded again",
            "isthmus.quantised.dequantise(model) first, as `isthmus export` does",
        )
    every = adapters(host)
    others = {other for other, each in at(host).items() if other not in every and (each.reads_host or each.innermost)}
    if others:
        raise ConfigError(
            f"{path} carries {sorted(others)} too, which would run on the merged weight",
            "keep LoRA unmerged, or take the others off first",
        )
    if silent := [other for other in _inner(host, name) if not every[other].ratio(host).all()]:
        raise ConfigError(f"{path} carries {silent} inside, with magnitudes of zero", f"merge {silent[0]!r} first")
    shared = [other for other, each in root.named_modules() if each._parameters.get("weight") is host.weight]
    if len(shared) > 1:
        raise ConfigError(f"the weight of {path} is shared by {shared}", "keep LoRA on it unmerged")
