"""Raw text under a model, without chat template and without picture: how likely it finds what comes next.

The rule is that of lm-evaluation-harness (official code EleutherAI/lm-evaluation-harness, `models/huggingface.py`): a
continuation's tokens are those that the whole text has beyond its context's; a text longer than the window is read in
windows that end where the next one's new tokens begin, each token told once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isthmus import fuse, parts, sites
from isthmus.config import LLMConfig
from isthmus.evaluation.keeping import Answered
from isthmus.evaluation.score import Scorer, log_probabilities
from isthmus.model import VLM
from isthmus.types import Batch, ConfigError

Head: TypeAlias = Callable[[Tensor], Tensor]
States: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Head]]
"""`states(ids_BT, segment_BT)`: hidden_BTD, and what turns hidden states into logits."""
WINDOW = 1024
"""Tokens that are read at once, unless the LLM reads fewer."""


@dataclass(frozen=True)
class Told:
    """The sum of log-probabilities of the tokens that were asked for, and how many they are."""

    value: float
    tokens: int


@dataclass(frozen=True)
class Row:
    """Ids, of which the last `told` are asked for, given those before them; and whose they are."""

    ids: tuple[int, ...]
    told: int
    owner: int


class Prose:
    """Scores raw text.

    Args:
        states: the model.
        tokenizer: its tokenizer.
        device: where the model is.
        window: tokens that it reads at once.
        batch_size: rows per forward.

    Attributes:
        part: as a `Scorer`'s; kept are rows, so that a long text goes on within itself.
    """

    part = Answered()

    def __init__(self, states: States, tokenizer: PreTrainedTokenizerBase, device: Any, window: int, batch_size: int):
        self.states, self.tokenizer, self.device = states, tokenizer, device
        self.window, self.batch_size = window, batch_size
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.begin, self.pad = begin, tokenizer.eos_token_id

    def texts(self, texts: Sequence[str], advance: Callable[[int], None] | None = None) -> list[Told]:
        """Every token of each text, the first one given the token that begins a text."""
        return self._told([row for owner, text in enumerate(texts) for row in self._windows(text, owner)], advance)

    def continuations(
        self, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None] | None = None
    ) -> list[Told]:
        """The second text of each pair, given the first."""
        return self._told([self._pair(*pair, owner) for owner, pair in enumerate(pairs)], advance)

    def _windows(self, text: str, owner: int) -> list[Row]:
        ids = self._begun(text)
        ends = [*range(self.window, len(ids) - 1, self.window), len(ids) - 1]
        starts = [0, *ends]
        return [
            Row(tuple(ids[max(0, end - self.window) : end + 1]), end - start, owner) for start, end in zip(starts, ends)
        ]

    def _pair(self, context: str, continuation: str, owner: int) -> Row:
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation  # blanks belong to the word behind them
        if bare:
            given, whole = (self.tokenizer(one, verbose=False)["input_ids"] for one in (bare, bare + continuation))
        else:
            given, whole = [self.begin], self._begun(continuation)
        return Row(tuple(whole[-self.window - 1 :]), min(len(whole) - len(given), self.window), owner)

    def _begun(self, text: str) -> list[int]:
        """A text's ids behind the token that begins a text."""
        return [self.begin, *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    @torch.inference_mode()
    def _told(self, rows: Sequence[Row], advance: Callable[[int], None] | None) -> list[Told]:
        """Longest rows first; sums by owner."""
        ordered = sorted(range(len(rows)), key=lambda place: len(rows[place].ids), reverse=True)
        left = [0] * (1 + max((row.owner for row in rows), default=-1))
        for row in rows:
            left[row.owner] += 1
        sums, tokens = [0.0] * len(left), [0] * len(left)
        for start in range(0, len(ordered), self.batch_size):
            places = ordered[start : start + self.batch_size]
            batch = [rows[place] for place in places]
            for row, (value,) in zip(batch, self.part.batch(places, partial(self._values, batch))):
                sums[row.owner] += value
                tokens[row.owner] += row.told
                left[row.owner] -= 1
                if advance is not None and not left[row.owner]:
                    advance(1)
        return [Told(*pair) for pair in zip(sums, tokens)]

    def _values(self, rows: Sequence[Row]) -> list[list[float]]:
        """The sum of each row's log-probabilities, [[value], ...]."""
        wide = max(len(row.ids) for row in rows) - 1
        ids_BT = torch.full((len(rows), wide), self.pad)
        labels_BT, segment_BT = torch.full_like(ids_BT, -1), torch.zeros_like(ids_BT)
        for place, row in enumerate(rows):
            ids, size = torch.tensor(row.ids), len(row.ids) - 1
            ids_BT[place, :size], segment_BT[place, :size] = ids[:-1], 1
            labels_BT[place, size - row.told : size] = ids[size + 1 - row.told :]
        ids_BT, labels_BT, segment_BT = (one.to(self.device) for one in (ids_BT, labels_BT, segment_BT))
        hidden_BTD, head = self.states(ids_BT, segment_BT)
        told_BT = labels_BT >= 0
        values_M = log_probabilities(head, hidden_BTD[told_BT], labels_BT[told_BT])
        sums_B = torch.zeros(len(rows), dtype=torch.float64, device=values_M.device)
        return sums_B.index_add_(0, told_BT.nonzero()[:, 0], values_M.double())[:, None].tolist()


class Alone(Scorer):
    """An LLM without a joint: it scores raw text and nothing else."""

    def __init__(self, prose: Prose):
        self.prose, self.reply, self.batch_size = prose, None, prose.batch_size


def of(scorer: Scorer) -> Prose:
    """What scores raw text for a scorer.

    Raises:
        ConfigError: the LLM is an encoder-decoder, which does not continue a text.
    """
    if isinstance(scorer, Alone):
        found = scorer.prose
    else:
        model, size = scorer.model.eval(), scorer.batch_size
        found = Prose(_with_joint(model), model.processor.tokenizer, model.device, _window(model.llm), size)
    found.part = scorer.part
    return found


def alone(model: VLM, dtype: torch.dtype, batch_size: int) -> Alone:
    """The LLM that a model was made of, as it was before any training, on the model's device.

    Raises:
        ConfigError: the LLM cannot be found.
        IsthmusError: its weights are not those that the model was trained on.
    """
    config = LLMConfig(**model.config.llm["config"])
    parts.confirm("llm", parts.folder(config.source, config.revision), model.config.llm["weights"])
    llm = parts.load_llm(config, dtype).to(model.device).eval()  # type: ignore[arg-type]
    return Alone(Prose(without_joint(llm), model.processor.tokenizer, model.device, _window(llm), batch_size))


def _window(llm: PreTrainedModel) -> int:
    if llm.config.is_encoder_decoder:
        raise ConfigError(
            "an encoder-decoder reads a prompt and does not continue a text", "measure raw text with a decoder-only LLM"
        )
    return min(WINDOW, llm.config.max_position_embeddings)


def _with_joint(model: VLM) -> States:
    def states(ids_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Head]:
        output = model.run(Batch(ids_BT, segment_BT, torch.zeros_like(ids_BT)))
        assert output.hidden_BTD is not None
        return output.hidden_BTD, output.head

    return states


def without_joint(llm: PreTrainedModel) -> States:
    """The same mask and positions as with a joint, so that equal weights give equal numbers."""

    def states(ids_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Head]:
        embeds_BTD = sites.embedding(llm)(ids_BT)
        mask = fuse.masks(llm.config, embeds_BTD, segment_BT, None, None)
        positions_BT = fuse.positions(segment_BT)
        output = sites.body(llm)(
            inputs_embeds=embeds_BTD, attention_mask=mask, position_ids=positions_BT, use_cache=False
        )
        return output.last_hidden_state, sites.head(llm)

    return states
