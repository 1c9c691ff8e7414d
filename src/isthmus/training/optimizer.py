"""What trains and how: an ordered map of globs becomes parameter groups, a schedule, and a table to read."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from isthmus import lora, sites
from isthmus.config import LoRA, Stage, Train, nearest
from isthmus.errors import abbreviated
from isthmus.graft import ungraft
from isthmus.model import VLM
from isthmus.training.parallel import norm, whole
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, IsthmusError

Schedule = Literal["cosine", "linear", "constant"]
GLOBS = "globs go over parameter names, such as connectors.*, llm.* and encoders.*"
FOREIGN = {
    "connectors.*": "mm_projector multi_modal_projector merger",
    "encoders.image.*": "vision_tower vision_model visual",
    "llm.*": "language_model",
    "llm.*layers.*": "all-linear",
}
"""Globs, and what LLaVA, transformers and peft call what they match."""


@dataclass(frozen=True)
class Trained:
    """One parameter that trains, by its name in the Step."""

    name: str
    parameter: nn.Parameter
    lr: float
    weight_decay: float
    kinds: frozenset[str] = frozenset()
    """Of media, if it is used with media alone."""


@dataclass(frozen=True)
class _Rule:
    """One line of `Stage.train`; `graft` is the name of the LoRA that it attached."""

    glob: str
    how: Train
    graft: str | None

    def claims(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.glob) or self.owns(name)

    def owns(self, name: str) -> bool:
        return self.graft is not None and f".grafts.{self.graft}." in name

    def trains(self, name: str) -> bool:
        return self.owns(name) if self.graft else self.how.mode == "full"


def choose(step: Step, stage: Stage) -> list[Trained]:
    """Attach the stage's LoRA, freeze everything, and wake what the stage trains, as float32 masters.

    The last glob that matches a parameter decides; what none matches is frozen, and so is what an encoder holds beside
    the states that it returns (`Encoder.needless`). The stage's LoRA stays only on Linears where some of it trains.
    Objectives' own parameters train at the stage's rate, but for those that their objective holds still.

    Raises:
        ConfigError: a glob matches nothing (the nearest name is suggested), or others decide on all that it would
            train, or what an encoder returns depends on none of it; or nothing trains.
    """
    _check_foreign(step.vlm, stage)
    needless = set(_needless(step.vlm, stage))
    rules = list(_rules(step.vlm, stage, needless))
    names = [name for name, _ in step.vlm.named_parameters()]
    for rule in rules:
        if not any(map(rule.claims, names)):
            raise ConfigError(
                f"stage {stage.name}: {rule.glob!r} matches no parameter{nearest(rule.glob, _globs(names))}",
                GLOBS,
            )
    reached = [name for name in names if name not in needless]
    deciding = {name: rule for rule in rules for name in reached if rule.claims(name)}  # the last one stays
    for rule in rules:
        meant = {name for name in names if rule.claims(name) and rule.trains(name)}
        if meant and meant <= needless:
            raise _needs_none(stage, rule.glob)
        if meant and not any(deciding.get(name) is rule for name in meant):
            raise ConfigError(
                f"stage {stage.name}: {rule.glob!r} trains nothing: globs behind it decide on all that it matches",
                "the last glob that matches decides: put this one behind them, or leave it out",
            )
    own = list(_of_objectives(step, stage))
    step.requires_grad_(False)
    chosen = [*_of_model(step, stage, deciding), *own]
    if not chosen:
        raise ConfigError(f"stage {stage.name} trains nothing", "give at least one glob a rate: connectors.*: 1e-3")
    if packed := [each.name for each in chosen if not each.parameter.is_floating_point()]:
        raise ConfigError(
            f"stage {stage.name}: weights that are held in 4 or 8 bits cannot train: {abbreviated(packed)}",
            "train them with LoRA (mode: {r: 16}), or leave bits out of the recipe",
        )
    for rule in rules:
        if rule.graft:
            _keep_trained(step.vlm, rule.graft, {each.name.removeprefix("vlm.") for each in chosen})
    for each in chosen:
        each.parameter.requires_grad_(True)
        each.parameter.data = each.parameter.data.float()
    fully = [rule.glob for rule in rules if rule.how.mode == "full"]
    step.vlm.config.trained = list(dict.fromkeys([*step.vlm.config.trained, *fully]))
    return chosen


def anew(step: Step, trained: Sequence[Trained]) -> list[Trained]:
    """The same, with the parameters that the step has now: sharding replaces them by other objects."""
    parameters = dict(step.named_parameters())
    return [replace(each, parameter=parameters[each.name]) for each in trained]


def adamw(trained: Sequence[Trained], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with one group per rate and decay; `base_lr` of a group is its rate before schedule."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for each in trained:  # one kernel cannot take sharded and whole tensors
        kind = each.lr, each.weight_decay, isinstance(each.parameter, DTensor)
        groups.setdefault(kind, []).append(each.parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay, _), parameters in groups.items()
        ],
        betas=betas,
        fused=True,
    )


def rate(step: int, steps: int, warmup: float, schedule: Schedule, floor: float = 0.0) -> float:
    """The factor of the learning rate at a step counted from 0, as transformers' schedules compute it.

    `floor` is what it falls to, 0 in transformers; LAVIS calls that times the rate `min_lr`. Unlike there, the last
    step is never one of the warm-up: with a single one nothing would be learnt.
    """
    rising = min(math.ceil(steps * warmup), steps - 1)
    if step < rising:
        return step / rising
    done = (step - rising) / max(1, steps - rising)
    match schedule:
        case "cosine":
            return floor + (1 - floor) * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
        case "linear":
            return floor + (1 - floor) * max(0.0, 1 - done)
        case "constant":
            return 1.0


def table(step: Step, trained: Sequence[Trained]) -> Table:
    """What trains, by part: parameters, trained parameters, their share of the part, and the rates."""
    rates: dict[str, float] = {each.name: each.lr for each in trained}
    parts: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in step.named_parameters():
        parts.setdefault(_part(name), []).append((name, parameter.numel()))
    view = Table(title="What trains")
    for column in ("part", "parameters", "trained", "share", "learning rate"):
        view.add_column(column, justify="left" if column == "part" else "right")
    for part, members in parts.items():
        lrs = sorted({rates[name] for name, _ in members if name in rates})
        view.add_row(part, *_counts(members, rates), ", ".join(f"{lr:g}" for lr in lrs) or "frozen")
    view.add_section()
    view.add_row("all", *_counts([member for members in parts.values() for member in members], rates), "")
    return view


# ---------------------------------------------------------------------------------------------- health of gradients


PATIENCE = 20
"""Steps after which a trainable tensor whose gradient was always zero is worth a warning."""


class Watch:
    """Finds what trains in name only: outside of the graph at once, behind a zero that stays zero after a while.

    A tensor is missed only once every kind of medium has been seen, and never if the joint says that it sleeps at
    birth.
    """

    def __init__(self, step: Step, trained: Sequence[Trained]):
        self.awake = [each for each in trained if not _asleep(step.vlm, each.name)]
        self.unreached, self.silent = self.awake, self.awake
        self.unseen = set(step.vlm.connectors)
        self.steps = 0

    def look(self, batches: Sequence[Batch]) -> str | None:
        """After the backward of an optimizer step: a warning, or None.

        Raises:
            IsthmusError: no gradient reaches some tensors; they are named.
        """
        self.steps += 1
        self.unreached = [each for each in self.unreached if each.parameter.grad is None]
        # absent or exactly zero: behind a zero gate, or LoRA's A while B is zero
        self.silent = [each for each in self.silent if _zero(each.parameter.grad)]
        self.unseen -= {kind for batch in batches for kind in batch.media}
        if self.unreached and not self.unseen:
            raise IsthmusError(
                f"{len(self.unreached)} trainable tensors got no gradient: {_list(self.unreached)}",
                "no objective of the stage depends on them; freeze them, or add data or an objective that does",
            )
        if self.steps == PATIENCE and self.silent:
            return f"warning: the gradient of {_list(self.silent)} has been zero for {PATIENCE} steps"
        return None

    def end(self, adamw: torch.optim.Optimizer) -> str | None:
        """At the end of a stage, however short or often interrupted it was: a warning, or None.

        What no gradient has ever reached has no moments. Checkpoints keep these, and all processes have the same.
        """
        left = [each for each in self.awake if not adamw.state.get(each.parameter)]
        if not left:
            return None
        some = any(adamw.state.get(each.parameter) for each in self.awake)
        what = f"{len(left)} trainable tensors are as they were" if some else "nothing was trained"
        return (
            f"warning: {what}, for no gradient has reached {_list(left)}; "
            "`isthmus data preview` shows whether samples have the media that these are for"
        )


def norms(trained: Sequence[Trained]) -> dict[str, Tensor]:
    """The gradient's norm: `grad_norm` of all, and `grad_norm_<part>` of connectors, llm, encoders, heads, objectives.

    Every tensor's norm is computed once, and nothing waits for the device.
    """
    parts: dict[str, list[Tensor]] = {}
    for each in trained:
        gradients = parts.setdefault(each.name.removeprefix("vlm.").partition(".")[0], [])
        if each.parameter.grad is not None:
            gradients.append(each.parameter.grad)
    none = torch.zeros((), device=trained[0].parameter.device)  # torch has the norm of nothing on the CPU
    each_part = {part: norm(gradients) if gradients else none for part, gradients in parts.items()}
    whole_norm = torch.linalg.vector_norm(torch.stack(list(each_part.values())))
    return {"grad_norm": whole_norm, **{f"grad_norm_{part}": value for part, value in each_part.items()}}


# ---------------------------------------------------------------------------------------------- inside


def _rules(vlm: VLM, stage: Stage, needless: Set[str]) -> Iterator[_Rule]:
    """The stage's map in order, each LoRA attached under a name of its own."""
    for glob, how in stage.train.items():
        graft = None
        if isinstance(how.mode, LoRA):
            hosts = _hosts(vlm, glob, needless)
            if not hosts:
                raise _needs_none(stage, glob)
            graft = _free_name(stage.name, [adapter["name"] for adapter in vlm.config.lora])
            vlm.add_lora(hosts, how.mode, graft)
        yield _Rule(glob, how, graft)


def _hosts(vlm: VLM, glob: str, needless: Set[str]) -> list[str]:
    """What LoRA's glob stands for: itself, or Linears one by one if encoders do not need all that it matches."""
    heads = sites.heads(vlm)
    linears = {path: each for path, each in sites.linears(vlm).items() if each not in heads}
    own = {
        path: {f"{path}.{name}" for name, _ in linear.named_parameters(recurse=False)}
        for path, linear in linears.items()
        if fnmatch.fnmatchcase(path, glob)
    }
    kept = [path for path, parameters in own.items() if not parameters <= needless]
    return kept if len(kept) < len(own) else [glob]


def _needless(vlm: VLM, stage: Stage) -> Iterator[str]:
    """Parameters on which nothing depends that their encoder returns; only of encoders that the stage is about."""
    for kind, encoder in vlm.encoders.items():
        part = f"encoders.{kind}."
        names = [
            f"{part}{name}" for named in (encoder.named_parameters(), encoder.named_modules()) for name, _ in named
        ]
        if any(fnmatch.fnmatchcase(name, glob) for name in names for glob in stage.train):
            yield from (f"{part}{name}" for name in encoder.needless())


def _needs_none(stage: Stage, glob: str) -> ConfigError:
    return ConfigError(
        f"stage {stage.name}: {glob!r} trains nothing: what the encoder returns does not depend on what it matches",
        "leave it out, or name a deeper state in encoder.layer or encoder.taps",
    )


def _check_foreign(vlm: VLM, stage: Stage) -> None:
    """Globs over names that other toolkits have."""
    names = [name for named in (vlm.named_parameters(), vlm.named_modules()) for name, _ in named]
    for glob in stage.train:
        meant = [ours for ours, theirs in FOREIGN.items() if set(theirs.split()) & {*glob.replace("*", ".").split(".")}]
        if meant and not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise ConfigError(f"stage {stage.name}: {glob!r} matches no parameter; did you mean {meant[0]!r}?", GLOBS)


def _keep_trained(vlm: VLM, graft: str, trained: Set[str]) -> None:
    """Take LoRA off the Linears where none of it trains, in the model and in its config."""
    inside, hosts = f".grafts.{graft}.", lora.hosts(vlm, graft)
    kept = {name.partition(inside)[0] for name in trained if inside in name}
    if dead := [path for path in hosts if path not in kept]:
        for path in dead:
            ungraft(vlm, path, graft)
        globs = {"globs": [path for path in hosts if path in kept]}
        vlm.config.lora = [each | globs if each["name"] == graft else each for each in vlm.config.lora]


def _of_model(step: Step, stage: Stage, deciding: Mapping[str, _Rule]) -> Iterator[Trained]:
    kinds = step.seen_with()
    for name, parameter in step.vlm.named_parameters():
        rule = deciding.get(name)
        if rule and rule.trains(name):
            decay = rule.how.weight_decay if parameter.ndim > 1 or rule.how.decay_all else 0.0
            lr, used_with = rule.how.lr or stage.lr, frozenset(kinds.get(parameter, ()))
            yield Trained(f"vlm.{name}", parameter, lr, decay, used_with)


def let_rest(trained: Sequence[Trained], kinds: Set[str]) -> None:
    """Leave what is used with media alone as it is, where these kinds, which no process has seen in this step, are all.

    One process has no gradient there. Several have zeros (`Step._idle`, `Step._untouched`), under which AdamW would go
    on moving.
    """
    for each in trained:
        if each.kinds and each.kinds <= kinds:
            each.parameter.grad = None


def _of_objectives(step: Step, stage: Stage) -> Iterator[Trained]:
    for name, parameter in step.objectives.named_parameters():
        if parameter.requires_grad:
            yield Trained(f"objectives.{name}", parameter, stage.lr, 0.0)


def _free_name(stage: str, taken: Sequence[str]) -> str:
    """The stage's name as an identifier, with `_2` and so on behind it when an earlier LoRA took it."""
    name = stage.replace("-", "_")
    candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _globs(names: Iterable[str]) -> list[str]:
    """Globs that people mean: every dotted prefix, with `.*` behind it."""
    prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    return sorted(f"{prefix}.*" for prefix in prefixes)


def _zero(gradient: Tensor | None) -> bool:
    return gradient is None or not whole(gradient).any()


def _asleep(vlm: VLM, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.removeprefix("vlm."), glob) for glob in vlm.aligner.asleep)


def _list(some: Sequence[Trained]) -> str:
    """The first names."""
    return ", ".join(each.name for each in some[:4]) + " ..." * (len(some) > 4)


def _part(name: str) -> str:
    """`connectors.image`, `llm`, `llm + sft` (what a graft added), `objectives.contrastive`."""
    steps = name.removeprefix("vlm.").split(".")
    part = steps[0] if steps[0] == "llm" else ".".join(steps[:2])
    return f"{part} + {steps[steps.index('grafts') + 1]}" if "grafts" in steps else part


def _counts(members: Sequence[tuple[str, int]], rates: dict[str, float]) -> tuple[str, str, str]:
    total = sum(count for _, count in members)
    moving = sum(count for name, count in members if name in rates)
    return f"{total:,}", f"{moving:,}", f"{moving / total:.2%}"
