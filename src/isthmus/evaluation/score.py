"""The likelihood of answers under a model, with the prompt computed once for all of its candidate answers.

One rule, fixed in advance: a candidate's score is the sum of the log-probabilities of its tokens and of the
end-of-turn token, given the prompt. That is the probability that the model says exactly this and stops. Dividing by
length, or subtracting a blank-picture score, would be other questions, and choosing among such rules after the fact
moves results by tens of points.

Candidates are branches of one row (`Sample.branches`): they share the prompt and do not see each other. An
encoder-decoder reads the prompt once, and its decoder tells each candidate from the same states. The head runs at the
scored positions alone, and its softmax is in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isthmus import sites
from isthmus.data.collate import Look, route_of
from isthmus.evaluation.controls import key
from isthmus.evaluation.keeping import Answered
from isthmus.model import VLM
from isthmus.objectives.contrastive import late
from isthmus.objectives.lm import supervised
from isthmus.prepare.threads import Item, Result, side_by_side
from isthmus.types import IGNORE, Batch, DataError, Output, Sample, Turn

RULE = "sum of the log-probabilities of the answer's tokens and its end-of-turn token, given the prompt"
COSINE_RULE = (
    "mean over an answer's tokens (as within a sentence) of the largest cosine of their input embeddings, centred over "
    "the task's answers, with any connected token; a token weighs more the fewer answers hold it; the LLM is not run"
)
BATCH = 16
"""Prompts per forward, unless somebody says otherwise."""
TOLD = 64
"""Candidates that the decoder of an encoder-decoder tells side by side, each beside a copy of its prompt's states."""


@dataclass(frozen=True)
class Question:
    """A prompt that ends with the user's turn, and answers to be scored after it."""

    sample: Sample
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Of one question: the score of each choice, the tokens each sums over, and the time it took."""

    values: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: float


@dataclass
class Group:
    """Questions with the same prompt and pictures: one row, whose branches are the union of their choices."""

    sample: Sample
    members: list[int] = field(default_factory=list)
    choices: dict[str, None] = field(default_factory=dict)

    @property
    def row(self) -> Sample:
        """The prompt with every choice as an answer."""
        first, *others = self.answered
        return self.sample.but(turns=first, branches=tuple(others))

    @property
    def answered(self) -> list[tuple[Turn, ...]]:
        """The prompt followed by each choice, as conversations."""
        return [(*self.sample.turns, Turn.say("assistant", choice)) for choice in self.choices]


class Scorer:
    """Scores answers under one model. It leaves the model in evaluation mode.

    Args:
        model: a `VLM` with its processor.
        look: how media become pixels or features; the processor's own by default.
        reply: free generation for samples that end with the user's turn; None where it failed.
        batch_size: prompts per forward.

    Attributes:
        part: what is known of the answers from an interrupted run, and takes those that come; `tasks.run` sets it.
    """

    part = Answered()

    def __init__(
        self,
        model: VLM,
        look: Look | None = None,
        *,
        reply: Callable[[Sequence[Sample]], Sequence[str | None]] | None = None,
        batch_size: int = BATCH,
    ) -> None:
        self.model, self.look, self.reply, self.batch_size = model, look, reply, batch_size
        self.renderer = model.processor.renderer()
        self.collator = model.processor.collator(look)

    def longest_first(self, prompts: Sequence[Sample]) -> list[int]:
        """Places of prompts that are answered freely: the worst memory shows at once, a batch's are nearly as long."""
        lengths = [*map(self.model.processor.collator(self.look, open_answer=True).lengths, prompts)]
        return sorted(range(len(prompts)), key=lengths.__getitem__, reverse=True)

    # ------------------------------------------------------------------------------------------ likelihood

    @torch.inference_mode()
    def likelihoods(self, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[Scores]:
        """Scores of every question's choices, in the order given; `advance` hears of finished questions.

        Raises:
            DataError: a sample cannot be rendered.
        """
        self.model.eval()
        found: list[Scores | None] = [None] * len(questions)
        batches = list(self._batches(_groups(questions)))
        told = _as_here(partial(self._scored, questions), self.model.device.type)
        most = None if self.model.device.type == "cpu" else 1  # an accelerator would hold all at once
        with closing(side_by_side(told, batches, most)) as rows:
            for scores in rows:
                for member, (values, tokens, seconds) in scores.items():
                    found[member] = Scores(tuple(values), tuple(tokens), seconds)
                if advance is not None:
                    advance(len(scores))
        return [scores for scores in found if scores is not None]

    def _scored(self, questions: Sequence[Question], groups: Sequence[Group]) -> dict[int, Sequence[Any]]:
        """Scores, tokens and seconds of the groups' questions, by their number."""
        members = [member for group in groups for member in group.members]
        return dict(zip(members, self.part.batch(members, partial(self._told_apart, groups, questions))))

    def _told_apart(self, groups: Sequence[Group], questions: Sequence[Question]) -> list[tuple[Any, ...]]:
        """Scores, tokens and seconds of the groups' questions, in the order of their members."""
        start = time.perf_counter()
        scores, tokens = (self._score_told if self.model.config.is_encoder_decoder else self._score)(groups)
        seconds = (time.perf_counter() - start) / sum(len(group.members) for group in groups)
        found = []
        for group, values, counts in zip(groups, scores.tolist(), tokens.tolist()):
            place = {choice: number for number, choice in enumerate(group.choices)}
            for member in group.members:
                at = [place[choice] for choice in questions[member].choices]
                found.append(([values[k] for k in at], [counts[k] for k in at], seconds))
        return found

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Longest rows first: the worst memory shows at once, and rows of a batch are nearly as long."""
        ordered = sorted(groups, key=self._length, reverse=True)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _length(self, group: Group) -> int:
        """Tokens of a group's row; those of an encoder-decoder's prompt, since it has no row of branches."""
        alone = self.model.config.is_encoder_decoder
        return self.collator.lengths(group.sample.but(turns=group.answered[0]) if alone else group.row)

    def _score(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Sums of log-probabilities [G, A] of every group's choices, and how many tokens each sums over."""
        batch = self.collator([group.row for group in groups]).to(self.model.device)
        output = self.model.run(batch)
        scored_BT = supervised(batch)
        assert output.hidden_BTD is not None and batch.labels_BT is not None
        values_M = log_probabilities(
            output.head, output.hidden_BTD[:, :-1][scored_BT], batch.labels_BT[:, 1:][scored_BT]
        )
        row_M, column_M = scored_BT.nonzero(as_tuple=True)
        if batch.branch_BT is None:
            branch_M = torch.zeros_like(row_M)
        else:
            branch_M = (batch.branch_BT[row_M, column_M + 1] - 1).clamp(min=0)
        width = max(len(group.choices) for group in groups)
        cell_M = row_M * width + branch_M
        # Answers that the prompt itself holds come first, in the shared beginning, and are not what is asked for.
        told = torch.tensor([self._answered(group.sample) for group in groups], device=row_M.device)
        asked_M = _rank(cell_M) >= torch.where(branch_M == 0, told[row_M], 0)
        sums = torch.zeros(len(groups) * width, dtype=torch.float64, device=row_M.device)
        sums.index_add_(0, cell_M[asked_M], values_M[asked_M].double())
        counts = torch.bincount(cell_M[asked_M], minlength=len(sums))
        return sums.view(len(groups), width).cpu(), counts.view(len(groups), width).cpu()

    def _score_told(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """The same of an encoder-decoder: its encoder reads each prompt once, for all the choices."""
        model = self.model
        batch = model.processor.prompts([group.sample for group in groups], self.look).to(model.device)
        connected = model.connect(batch)
        read_BTD = model.read(batch, model.embed(batch, connected), connected)
        told = [
            (row, column, self.renderer.render(turns).decoder_ids or [])
            for row, group in enumerate(groups)
            for column, turns in enumerate(group.answered)
        ]
        shape = len(groups), max(len(group.choices) for group in groups)
        sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.long)
        for start in range(0, len(told), TOLD):
            rows, columns, ids = zip(*told[start : start + TOLD])
            values_A, counts_A = self._tell(batch, read_BTD, torch.tensor(rows, device=read_BTD.device), ids)
            sums[rows, columns], counts[rows, columns] = values_A.cpu(), counts_A.cpu()
        return sums, counts

    def _tell(
        self, batch: Batch, read_BTD: Tensor, row_A: Tensor, ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Sums of log-probabilities [A] of answers, each told from the states of its prompt's row, and their tokens."""
        told = [torch.tensor(one, device=row_A.device) for one in ids]
        ids_AU = pad_sequence(told, batch_first=True, padding_value=IGNORE)
        route_BT = batch.route_BT
        route_AT = None if route_BT is None else route_BT[row_A]
        shown_AU = ids_AU.masked_fill(ids_AU == IGNORE, 0)  # nothing real looks at padding on the right
        hidden_AUD = self.model.tell(shown_AU, read_BTD[row_A], batch.segment_BT[row_A], route_AT, None)
        scored_AU = ids_AU[:, 1:] != IGNORE
        head = sites.head(self.model.llm)
        values_M = log_probabilities(head, hidden_AUD[:, :-1][scored_AU], ids_AU[:, 1:][scored_AU])
        at_M = scored_AU.nonzero()[:, 0]
        sums_A = torch.zeros(len(ids), dtype=torch.float64, device=row_A.device).index_add_(0, at_M, values_M.double())
        return sums_A, scored_AU.sum(1)

    def _answered(self, sample: Sample) -> int:
        """Supervised tokens of the answers inside a prompt."""
        if not any(turn.role == "assistant" for turn in sample.turns):
            return 0
        return sum(self.renderer.render(sample.turns, open_answer=True).trained)

    # ------------------------------------------------------------------------------------------ the joint alone

    @torch.inference_mode()
    def cosines(self, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[Scores]:
        """The joint without the LLM: cosine of pictures and candidate answers in the LLM's input space.

        Raises:
            DataError: a question has no picture.
        """
        self.model.eval()
        names = list(dict.fromkeys(choice for question in questions for choice in question.choices))
        told = [self._name(questions[0].sample, name) for name in names]
        column = {name: m for m, name in enumerate(names)}
        found: list[Scores] = []
        for start in range(0, len(questions), self.batch_size):
            asked = questions[start : start + self.batch_size]
            rows = self.part.batch(range(start, start + len(asked)), partial(self._seen, asked, told))
            for question, (row, seconds) in zip(asked, rows):
                values = tuple(row[column[choice]] for choice in question.choices)
                found.append(Scores(values, (0,) * len(values), seconds))
            if advance is not None:
                advance(len(asked))
        return found

    def _seen(self, asked: Sequence[Question], names: Sequence[Tensor]) -> list[tuple[list[float], float]]:
        """Of each question, its picture's cosine with every name, and the seconds."""
        clock = time.perf_counter()
        prompts = [question.sample for question in asked]
        batch = self.model.processor.prompts(prompts, self.look).to(self.model.device)
        rows = _cosines(self.model.run(batch, need="connected"), batch, names).tolist()
        return [(row, (time.perf_counter() - clock) / len(asked)) for row in rows]

    def _name(self, sample: Sample, name: str) -> Tensor:
        """The trained tokens of an answer, written as within a sentence, where most words have been seen."""
        rendered = self.renderer.render((*sample.turns, Turn.say("assistant", f" {name}")))
        ids = [token for token, trained in zip(rendered.ids, rendered.trained) if trained]
        return torch.tensor(ids, device=self.model.device)


def _as_here(work: Callable[[Item], Result], device: str) -> Callable[[Item], Result]:
    """The same in a thread: without gradients, and under the autocast that holds here."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def there(item: Item) -> Result:
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=enabled):
            return work(item)

    return there


def timed(
    reply: Callable[[Sequence[Sample]], Sequence[str | None]], asked: Sequence[Sample]
) -> list[tuple[str | None, float]]:
    """Replies, and the seconds that each took."""
    clock = time.perf_counter()
    replies = reply(asked)
    return [(one, (time.perf_counter() - clock) / len(asked)) for one in replies]


def _prompt_key(sample: Sample) -> Hashable:
    """Equal for samples whose prompts, pictures and kinds of task are equal."""
    return route_of(sample), tuple((turn.role, tuple(key(part) for part in turn.parts)) for turn in sample.turns)


def _groups(questions: Sequence[Question]) -> list[Group]:
    """Questions by prompt and pictures, each with the union of its questions' choices."""
    groups: dict[Hashable, Group] = {}
    for member, question in enumerate(questions):
        group = groups.setdefault(_prompt_key(question.sample), Group(question.sample))
        group.members.append(member)
        group.choices.update(dict.fromkeys(question.choices))
    return list(groups.values())


def _rank(cell_M: Tensor) -> Tensor:
    """How many earlier entries have the same value: [3, 3, 5, 3] -> [0, 1, 0, 2]."""
    order = cell_M.argsort(stable=True)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = cell_M[order][1:] != cell_M[order][:-1]
    steps = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order)
    rank[order] = steps - torch.where(starts, steps, 0).cummax(0).values
    return rank


def log_probabilities(head: Callable[[Tensor], Tensor], states_MD: Tensor, ids_M: Tensor, chunk: int = 64) -> Tensor:
    """Log-probability of each token given the state before it, in float32, a chunk of logits at a time."""
    parts = []
    for states, ids in zip(states_MD.split(chunk), ids_M.split(chunk)):
        scores = torch.log_softmax(head(states), -1, dtype=torch.float32)
        parts.append(scores.gather(1, ids[:, None])[:, 0])
    return torch.cat(parts)


def _cosines(output: Output, batch: Batch, names: Sequence[Tensor]) -> Tensor:
    """Each row's best picture against every name, [B, M]."""
    row_N = batch.media["image"].row_N if "image" in batch.media else torch.zeros(0, dtype=torch.long)
    counts = torch.bincount(row_N, minlength=len(batch.ids))
    if not bool((counts > 0).all()):
        missing = batch.ids[int((counts == 0).nonzero()[0])]
        raise DataError(f"{missing}: no picture to compare with names", "cosine needs a picture in every item")
    with torch.autocast(row_N.device.type, enabled=False):
        cosine_NM = late(output.connected["image"], names, output.embed)
    index_NM = row_N[:, None].expand_as(cosine_NM)
    return cosine_NM.new_full((len(counts), len(names)), -1).scatter_reduce(0, index_NM, cosine_NM, "amax")
