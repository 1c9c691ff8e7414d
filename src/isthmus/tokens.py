"""New tokens as grafts on the input embedding and the head; the base's own rows stay as they are, byte for byte.

`add_tokens` gives the LLM rows, `name_tokens` the tokenizer the strings for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isthmus import sites
from isthmus.graft import Graft, at, graft
from isthmus.types import ConfigError, Side

NAME = "tokens"
Init = Literal["mean", "normal"]


class NewRows(Graft):
    """Rows [n, D] behind the V of a base: its own, or those of another graft where the base is tied."""

    reads_side = False

    def __init__(self, owner: NewRows | None, like: Tensor, n: int):
        super().__init__()
        # A tuple hides the owner from `state_dict`: tied rows are one entry, as tied base weights are one parameter.
        self.owner = () if owner is None else (owner,)
        if owner is None:
            self.weight = nn.Parameter(torch.zeros(n, like.shape[1], device=like.device, dtype=torch.float32))

    @property
    def rows(self) -> Tensor:
        return self.owner[0].rows if self.owner else self.weight


class NewInputs(NewRows):
    """Embeds ids V .. V + n - 1 by its rows, and any id beyond (a medium's placeholder) as zeros."""

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        is_new = x >= host.num_embeddings
        y = base(x.masked_fill(is_new, 0), *args, **kw)
        padded = F.pad(self.rows, (0, 0, 0, 1))
        new = F.embedding((x - host.num_embeddings).clamp(0, len(padded) - 1), padded)
        scale = getattr(host, "embed_scale", 1.0)  # Gemma's embedding scales what it looks up
        return torch.where(is_new[..., None], (new * scale).to(y.dtype), y)


class NewOutputs(NewRows):
    """Appends n columns to the logits."""

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        return torch.cat([base(x, *args, **kw), F.linear(x, self.rows.to(x.dtype))], -1)


def name_tokens(
    tokenizer: PreTrainedTokenizerBase, first: int, names: Sequence[str], control: Collection[str] = ()
) -> None:
    """Teach a tokenizer the ids first, first + 1, ... that `add_tokens` gave the LLM; again is no change.

    A tokenizer with fewer entries than the LLM has rows is filled up with control tokens that nobody can type.

    Args:
        first: the LLM's V.
        names: the new strings, in order.
        control: those of them that, typed by a user, stay text.

    Raises:
        ConfigError: a name is an entry already, or the tokenizer has more entries than the LLM has rows.
    """
    wanted = list(range(first, first + len(names)))
    if not names or tokenizer.convert_tokens_to_ids(list(names)) == wanted:
        return
    known = set(tokenizer.get_vocab())
    if taken := sorted(known & set(names)):
        raise ConfigError(f"{taken[0]!r} is an entry of the LLM's vocabulary already", "choose another LLM")
    highest = max(tokenizer.get_vocab().values())
    if highest >= first:
        raise ConfigError(
            f"the tokenizer has an entry {highest}, but the LLM only {first} rows", "resize the LLM's embedding first"
        )
    fill = [f"<|unused-{index}|>" for index in range(highest + 1, first)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in fill])
    tokenizer.add_tokens([AddedToken(name, special=name in control, normalized=False) for name in names])
    if tokenizer.convert_tokens_to_ids(list(names)) != wanted:
        raise ConfigError("the tokenizer gives new entries other ids than the LLM", "choose another LLM")


def add_tokens(llm: PreTrainedModel, n: int, init: Init = "mean") -> int:
    """Give the LLM n more tokens and return the first new id, V; they can be read, and written.

    Ids from V + n on are embedded as zeros and have no logit, so that a placeholder can stand in `input_ids` but can
    never be sampled. With n = 0 nothing is attached. Input and output rows are tied where the base's are.

    Raises:
        ConfigError: tokens were added before, or the head's size is not the embedding's.
    """
    embedding, output = sites.embedding(llm), llm.get_output_embeddings()
    if n == 0:
        return embedding.num_embeddings
    if output is None or output.out_features != embedding.num_embeddings:
        raise ConfigError(
            f"{type(llm).__name__} has no head of the embedding's size {embedding.num_embeddings}", "choose another LLM"
        )
    weight = embedding.weight
    owner = NewInputs(None, weight, n)
    graft(llm, embedding, NAME, owner)
    for module in llm.modules():  # an encoder-decoder looks the same rows up in several modules
        if isinstance(module, nn.Embedding) and module.weight is weight and module is not embedding:
            graft(llm, module, NAME, NewInputs(owner, weight, n))
    tied = output.weight is weight
    graft(llm, output, NAME, NewOutputs(owner if tied else None, output.weight, n))
    bias = getattr(llm, "final_logits_bias", None)
    if isinstance(bias, Tensor):  # BART's family adds it behind the head, a buffer of the vocabulary's size
        llm.register_buffer("final_logits_bias", F.pad(bias, (0, n)))
    initialise(llm, init)
    return embedding.num_embeddings


@torch.no_grad()
def initialise(llm: PreTrainedModel, init: Init = "mean") -> None:
    """Draw the new rows from the base's own: their mean, or a Gaussian with their mean and deviation.

    `add_tokens` does it; call it again where the base's weights were loaded afterwards.
    """
    for host in (sites.embedding(llm), llm.get_output_embeddings()):
        new = at(host)[NAME]
        if isinstance(new, NewRows) and not new.owner:
            base = host.weight.float()
            new.weight.copy_(base.mean(0).expand_as(new.weight))
            if init == "normal":
                new.weight.add_(torch.randn_like(new.weight) * base.std(0))
