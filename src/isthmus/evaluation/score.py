"""The likelihood of answers under a model, with the prompt computed once for all of its candidate answers.

One rule, fixed in advance: a candidate's score is the sum of the log-probabilities of its tokens and of the
end-of-turn token, given the prompt. That is the probability that the model says exactly this and stops. Dividing by
length, or subtracting a blank-picture score, would be other questions, and choosing among such rules after the fact
moves results by tens of points.

Candidates are branches of one row (`Sample.branches`): they share the prompt and do not see each other. The head runs
at the scored positions alone, and its softmax is in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.data.collate import Look
from isthmus.evaluation.controls import key
from isthmus.model import VLM
from isthmus.objectives.contrastive import late
from isthmus.objectives.lm import supervised
from isthmus.types import Batch, DataError, Output, Sample, Turn

RULE = "sum of the log-probabilities of the answer's tokens and its end-of-turn token, given the prompt"
COSINE_RULE = (
    "mean over an answer's tokens (as within a sentence) of the largest cosine of their input embeddings, centred over "
    "the task's answers, with any connected token; a token weighs more the fewer answers hold it; the LLM is not run"
)


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
        answered = [(*self.sample.turns, Turn.say("assistant", choice)) for choice in self.choices]
        return self.sample.but(turns=answered[0], branches=tuple(answered[1:]))


class Scorer:
    """Scores answers under one model. It leaves the model in evaluation mode.

    Args:
        model: a `VLM` with its processor.
        look: how media become pixels or features; the processor's own by default.
        reply: free generation for samples that end with the user's turn; None where it failed.
        batch_size: prompts per forward.
    """

    def __init__(
        self,
        model: VLM,
        look: Look | None = None,
        *,
        reply: Callable[[Sequence[Sample]], Sequence[str | None]] | None = None,
        batch_size: int = 16,
    ) -> None:
        self.model, self.look, self.reply, self.batch_size = model, look, reply, batch_size
        self.renderer = model.processor.renderer()
        self.collator = model.processor.collator(look)

    # ------------------------------------------------------------------------------------------ likelihood

    @torch.inference_mode()
    def likelihoods(self, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[Scores]:
        """Scores of every question's choices, in the order given; `advance` hears of finished questions.

        Raises:
            DataError: a sample cannot be rendered, or the LLM is an encoder-decoder, which cannot read branches.
        """
        self.model.eval()
        found: list[Scores | None] = [None] * len(questions)
        for groups in self._batches(_groups(questions)):
            start = time.perf_counter()
            scores, tokens = self._score(groups)
            done = sum(len(group.members) for group in groups)
            seconds = (time.perf_counter() - start) / done
            for group, values, counts in zip(groups, scores.tolist(), tokens.tolist()):
                place = {choice: number for number, choice in enumerate(group.choices)}
                for member in group.members:
                    at = [place[choice] for choice in questions[member].choices]
                    found[member] = Scores(tuple(values[k] for k in at), tuple(counts[k] for k in at), seconds)
            if advance is not None:
                advance(done)
        return [scores for scores in found if scores is not None]

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Longest rows first: the worst memory shows at once, and rows of a batch are nearly as long."""
        ordered = sorted(groups, key=lambda group: self.collator.lengths(group.row), reverse=True)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _score(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Sums of log-probabilities [G, A] of every group's choices, and how many tokens each sums over."""
        batch = self.collator([group.row for group in groups]).to(self.model.device)
        output = self.model.run(batch)
        scored_BT = supervised(batch)
        assert output.hidden_BTD is not None and batch.labels_BT is not None
        values_M = _log_probabilities(output, output.hidden_BTD[:, :-1][scored_BT], batch.labels_BT[:, 1:][scored_BT])
        row_M, column_M = scored_BT.nonzero(as_tuple=True)
        if batch.branch_BT is None:
            branch_M = torch.zeros_like(row_M)
        else:
            branch_M = (batch.branch_BT[row_M, column_M + 1] - 1).clamp(min=0)
        width = max(len(group.choices) for group in groups)
        cell_M = row_M * width + branch_M
        # Answers that the prompt itself holds come first in a branch and are not what is asked for.
        told = torch.tensor([self._told(group.sample) for group in groups], device=row_M.device)
        asked_M = _rank(cell_M) >= told[row_M]
        sums = torch.zeros(len(groups) * width, dtype=torch.float64, device=row_M.device)
        sums.index_add_(0, cell_M[asked_M], values_M[asked_M].double())
        counts = torch.bincount(cell_M[asked_M], minlength=len(sums))
        return sums.view(len(groups), width).cpu(), counts.view(len(groups), width).cpu()

    def _told(self, sample: Sample) -> int:
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
            clock = time.perf_counter()
            part = questions[start : start + self.batch_size]
            prompts = [question.sample for question in part]
            batch = self.model.processor.prompts(prompts, self.look).to(self.model.device)
            cosine_BM = _cosines(self.model.run(batch, need="connected"), batch, told)
            spent = (time.perf_counter() - clock) / len(part)
            for question, row in zip(part, cosine_BM.tolist()):
                found.append(
                    Scores(tuple(row[column[c]] for c in question.choices), (0,) * len(question.choices), spent)
                )
            if advance is not None:
                advance(len(part))
        return found

    def _name(self, sample: Sample, name: str) -> Tensor:
        """The trained tokens of an answer, written as within a sentence, where most words have been seen."""
        rendered = self.renderer.render((*sample.turns, Turn.say("assistant", f" {name}")))
        ids = [token for token, trained in zip(rendered.ids, rendered.trained) if trained]
        return torch.tensor(ids, device=self.model.device)


def _prompt_key(sample: Sample) -> Hashable:
    """Equal for samples whose prompts and pictures are equal."""
    return tuple((turn.role, tuple(key(part) for part in turn.parts)) for turn in sample.turns)


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


def _log_probabilities(output: Output, states_MD: Tensor, ids_M: Tensor, chunk: int = 256) -> Tensor:
    """Log-probability of each token given the state before it, in float32, a chunk of logits at a time."""
    parts = []
    for start in range(0, len(ids_M), chunk):
        logits = output.head(states_MD[start : start + chunk]).float()
        chosen = logits.gather(1, ids_M[start : start + chunk, None])[:, 0]
        parts.append(chosen - logits.logsumexp(-1))
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
