"""LION: an instructed Q-Former beside an aggregator of earlier layers, adapters mixed by task kind, and hints of tags.

Chen et al. 2024, arXiv 2311.11860. Official code: github.com/JiuTian-VL/JiuTian-LION, `models/lion_t5.py`.

Differs:
    - the kind of task belongs to each segment, so that batches and packed rows may mix kinds; the release reads the
      first sample's;
    - route 0 is image-level and route 1 region-level; the release numbers them the other way round;
    - without tags the sentence about them is left out; the release stops there;
    - works on decoder-only LLMs too: adapters then read what the layer's own norm before the feed-forward is given;
    - FlanT5 keeps its own approximation of GELU, which the release replaces;
    - the learned word is drawn like the LLM's words; the release draws it with a deviation of 1;
    - both branches live in one model, and a stage chooses with `shown` which of them the LLM sees; the release trains
      two models and merges them;
    - without `tokenizer`, the Q-Former reads the LLM's own vocabulary, and without `qformer` it is newborn (see
      `instructblip`);
    - `normalise` is ours, off by default (see `connectors.pool`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isthmus import parts, sites, tokens
from isthmus.aligner import Addition, Aligner
from isthmus.connectors import Connector, qformer_weights
from isthmus.connectors.aggregator import Aggregation, Aggregator
from isthmus.connectors.pool import Normalised, settle
from isthmus.connectors.qformer import Begun, InstructedQFormer
from isthmus.data.hints import Hints
from isthmus.encoders import Encoder
from isthmus.graft import Graft, arithmetic
from isthmus.types import Context, Features, Layout, Reading, Route, Side

if TYPE_CHECKING:
    from isthmus.model import VLM

HINT = "<hint>"
"""The learned word."""
SENTENCE = "you are allowed to use or partially use the following tags: [{}]. "
ADAPTERS = len(Route)
"""One per task kind, in the routes' order."""
Branch = Literal["qformer", "aggregator", "both"]


class Dual(Connector):
    """The tokens of the Q-Former, then those of the aggregator; either may be absent, or there and not shown.

    Args:
        branches: the connectors by name, in the order of their tokens.
        shown: names of those whose tokens the LLM sees.
    """

    reads_context: ClassVar[bool] = True

    def __init__(self, branches: dict[str, Connector], shown: tuple[str, ...]):
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.shown = shown

    def tokens(self, s: int) -> int:
        return sum(branch.tokens(s) for branch in self._shown())

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] and its taps -> y [N, Q + S, D]."""
        return torch.cat([branch(features, context) for branch in self._shown()], 1)

    def _shown(self) -> Iterator[Any]:
        return (self.get_submodule(name) for name in self.shown)


class Adapter(nn.Module):
    """scale * W_up relu(W_down x + b) + b', zero at birth.

    Args:
        width: D.
        bottleneck: units between the two matrices.
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width, bias=False)
        self.bias, self.scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(1))
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.scale * self.up(torch.relu(self.down(x_BTD))) + self.bias


class _Own(threading.local):
    """One slot per thread."""

    x: Tensor | None = None


class Heard:
    """What a layer's norm was given, kept for the addition behind it while the layer runs; each thread has its own.

    Recomputing a layer repeats both in their order. `torch.compile` cannot trace a slot per thread (see `graft`).
    """

    def __init__(self) -> None:
        self._own = _Own()
        self._traced: Tensor | None = None

    def keep(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._traced = x
        else:
            self._own.x = x

    def take(self) -> Tensor:
        if torch.compiler.is_compiling() or self._own.x is None:
            x, self._traced = self._traced, None
        else:
            x, self._own.x = self._own.x, None
        assert x is not None  # the norm runs before the layer ends
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Heard:
        return Heard()


class Listen(Graft):
    """Keeps what a norm is given for the mixture on its layer; it has no parameters."""

    reads_side = False

    def __init__(self, heard: Heard):
        super().__init__()
        self.heard = heard

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        self.heard.keep(x)
        return base(x, *args, **kw)


class Mixture(Graft):
    """Adapters beside a feed-forward, on its un-normalised input: `y + sum over k of G[k, route] * H_k(x)`.

    Args:
        width: D.
        bottleneck: units inside an adapter.
        mixture: `none` is one adapter for all kinds; `hard` one per kind; `routed` mixes them by learned vectors of
            width D per adapter and kind, one-hot at birth.
        heard: where the input comes from, if the host is not given it.
    """

    def __init__(
        self, width: int, bottleneck: int, mixture: Literal["none", "hard", "routed"], heard: Heard | None = None
    ):
        super().__init__()
        count = 1 if mixture == "none" else ADAPTERS
        self.adapters = nn.ModuleList(Adapter(width, bottleneck) for _ in range(count))
        self.heard = heard
        one_hot = torch.eye(count) if count > 1 else torch.ones(1, ADAPTERS)
        self.router: Tensor
        if mixture == "routed":
            self.router = nn.Parameter(one_hot.unsqueeze(-1).repeat(1, 1, width))
        else:
            self.register_buffer("router", one_hot.unsqueeze(-1), persistent=False)

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        y = base(x, *args, **kw)
        y_BTD, *rest = y if isinstance(y, tuple) else (y,)  # a layer of Falcon-H1 returns its states in a tuple
        x_BTD = x if self.heard is None else self.heard.take().view_as(y_BTD)
        y_BTD = y_BTD + self.mix(x_BTD, side).to(y_BTD.dtype)
        return (y_BTD, *rest) if isinstance(y, tuple) else y_BTD

    def mix(self, x_BTD: Tensor, side: Side | None) -> Tensor:
        """What the adapters add to the states, [B, T, D]; a position without a route is image-level."""
        routes = None if side is None else side.route_BT
        route_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device)
        if routes is not None:
            route_BT = (routes == Route.REGION).long()
        with arithmetic(x_BTD):
            parts = [share_RD[route_BT] * adapter(x_BTD) for share_RD, adapter in zip(self.router, self.adapters)]
        return torch.stack(parts).sum(0)


class LION(Aligner):
    """Dual-level visual knowledge: spatial tokens with adapters that do not quarrel, and tags that may be doubted."""

    name = "lion"
    family = "perceiver"
    also = "tool"
    asleep = (
        "llm.*.grafts.lion.router",
        "llm.*.grafts.lion.adapters.*.down.*",
        "llm.*.grafts.lion.adapters.*.scale",
        *(f"connectors.*.aggregator.*layers.*.{part}.*" for part in ("query", "key", "value", "expand")),
    )

    class Options(Begun):
        length: int = Field(128, ge=1)
        """Tokens of an instruction that the Q-Former reads, the last ones."""
        tokenizer: str | None = None
        """Whose vocabulary the Q-Former reads, as a folder or a hub name; None is the LLM's own."""
        visual_input: Branch = "both"
        """Which branches there are."""
        shown: Branch | None = None
        """Which of them the LLM sees; None is all. A stage may change this."""
        aggregator: Aggregation = Aggregation()
        """Its layers read the encoder's `taps`, the first of them first."""
        mixture: Literal["none", "hard", "routed"] = "routed"
        """One adapter for all kinds of task, one per kind, or both mixed by a learned router."""
        bottleneck: int = Field(64, ge=1)
        """Units inside an adapter."""
        tags: Literal["none", "hard", "soft"] = "soft"
        """Leave a picture's tags out, put them into a sentence, or let a learned word lead that sentence."""
        normalise: bool = False

        @model_validator(mode="after")
        def _there(self) -> Any:
            if self.shown not in (None, self.visual_input) and self.visual_input != "both":
                raise ValueError(f"shown is {self.shown}, but visual_input is {self.visual_input}")
            return self

    @property
    def routes(self) -> bool:
        return bool(self.options.mixture != "none")

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        options, branches = self.options, {}
        if options.visual_input != "aggregator":
            branches["qformer"] = self._settled(InstructedQFormer(kind, encoder.width, width, options), encoder, width)
        if options.visual_input != "qformer":
            taps = list(encoder.tap_widths.items())
            joint = Aggregator(encoder.width, width, taps, options.aggregator)
            branches["aggregator"] = self._settled(joint, encoder, width)
        shown = tuple(branches) if options.shown in (None, "both") else (options.shown,)
        return Dual(branches, shown)

    def _settled(self, joint: Connector, encoder: Encoder, width: int) -> Connector:
        return Normalised(joint, encoder.width, width) if self.options.normalise else joint

    def layout(self, kind: str, tokens: int) -> Layout:
        """Soft tokens alone, with no line break behind them."""
        return Layout(tokens)

    def reading(self) -> Reading | None:
        if self.options.visual_input == "aggregator":
            return None
        return Reading(self.options.length, tokenizer=self.options.tokenizer)

    def new_tokens(self) -> tuple[str, ...]:
        return (HINT,) if self.options.tags == "soft" else ()

    def hints(self) -> Hints:
        """`According to <hint>, you are allowed to use or partially use the following tags: [a, b]. `"""
        sentences = {"none": "", "hard": SENTENCE.capitalize(), "soft": f"According to {HINT}, {SENTENCE}"}
        return Hints(sentence=sentences[self.options.tags], separator=", ")

    def grafts(self, llm: nn.Module, encoders: nn.ModuleDict, width: int) -> Iterator[Addition]:
        sides: tuple[Literal["encoder", "decoder"], ...] = ("decoder",)
        if llm.config.is_encoder_decoder:  # type: ignore[union-attr]
            sides = ("encoder", "decoder")
        for stack in (sites.layers(llm, side) for side in sides):
            for index, layer in enumerate(stack.modules):
                yield from self._of_layer(f"llm.{stack.path}.{index}", layer, width)

    def _of_layer(self, path: str, layer: nn.Module, width: int) -> Iterator[Addition]:
        """On a feed-forward that holds its norm and its residual; else on the layer, which does."""
        place = sites.feed(layer)
        if place.holds_norm:
            yield Addition(f"{path}.{place.path}", "lion", self._mixture(width, None))
            return
        heard = Heard()
        yield Addition(f"{path}.{place.path}", "listen", Listen(heard))
        yield Addition(path, "lion", self._mixture(width, heard))

    def _mixture(self, width: int, heard: Heard | None) -> Mixture:
        return Mixture(width, self.options.bottleneck, self.options.mixture, heard)

    def birth(self, model: VLM) -> None:
        """Weights are taken over, where some are named; the learned word is drawn apart from the others; normalised
        branches start where words are.

        Raises:
            ConfigError: the Q-Former cannot hold the vocabulary that it reads.
        """
        if self.options.visual_input != "aggregator":
            parts.check_vocabulary(model.llm, self.options.tokenizer, self.options.vocabulary)
        if self.options.tags == "soft":
            tokens.initialise(model.llm, "normal")
        settle(model.connectors, sites.words(model.llm))
        qformer_weights.begin(model, self.options.qformer, parts.tensors)
