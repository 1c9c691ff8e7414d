"""The likelihood of answers under a model, with the prompt computed once for all of its candidate answers.

One rule, fixed in advance: a candidate's score is the sum of the log-probabilities of its tokens and of the
end-of-turn token, given the prompt. That is the probability that the model says exactly this and stops. Dividing by
length, or subtracting a blank-picture score, would be other questions, and choosing among such rules after the fact
moves results by tens of points.

Items that share prompt and pictures share one prefill. The first token's distribution is read off the prompt, the
others from one call on the repeated cache; the head sees only states that predict a scored token, in float32 softmax.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus.evaluation.controls import key
from isthmus.types import Batch, ConfigError, DataError, Output, Past, Sample, Turn

if TYPE_CHECKING:
    from isthmus.data.chat import Renderer
    from isthmus.model import VLM

RULE = "sum of the log-probabilities of the answer's tokens and its end-of-turn token, given the prompt"
COSINE_RULE = (
    "cosine of the mean connected token with the mean input embedding of the answer's tokens and end of turn, "
    "centred over the task's distinct answers; the LLM is not run"
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


@dataclass(frozen=True)
class Continuation:
    """The tokens that follow a prompt when an answer is given, up to the last that is scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass
class Group:
    """Questions with the same prompt and pictures: one prefill, the union of their choices."""

    sample: Sample
    length: int
    members: list[int] = field(default_factory=list)
    choices: dict[str, None] = field(default_factory=dict)


class Scorer:
    """Scores answers under one model. It leaves the model in evaluation mode.

    Args:
        model: a `VLM`.
        renderer: the model's renderer, which tells prompt from answer.
        collate: samples that end with the user's turn -> a left-padded batch, open for the answer.
        reply: free generation for samples that end with the user's turn; None where it failed.
        batch_size: prompts per prefill.
        rows: continuations per call on the repeated cache.
    """

    def __init__(
        self,
        model: VLM,
        renderer: Renderer,
        collate: Callable[[Sequence[Sample]], Batch],
        *,
        reply: Callable[[Sequence[Sample]], Sequence[str | None]] | None = None,
        batch_size: int = 8,
        rows: int = 128,
    ) -> None:
        self.model, self.renderer, self.collate, self.reply = model, renderer, collate, reply
        self.batch_size, self.rows = batch_size, rows
        self._continuations: dict[Hashable, Continuation] = {}

    # ------------------------------------------------------------------------------------------ likelihood

    @torch.inference_mode()
    def likelihoods(self, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[Scores]:
        """Scores of every question's choices, in the order given; `advance` hears of finished questions.

        Raises:
            DataError: the template writes the prompt differently once an answer follows.
        """
        self.model.eval()
        found: list[Scores | None] = [None] * len(questions)
        for groups in self._batches(self._groups(questions)):
            start = time.perf_counter()
            answers = [self._by_length(group) for group in groups]
            values = self._score([group.sample for group in groups], [[c for _, c in answer] for answer in answers])
            done = sum(len(group.members) for group in groups)
            seconds = (time.perf_counter() - start) / done
            for group, answer, row in zip(groups, answers, values.tolist()):
                score = {choice: value for (choice, _), value in zip(answer, row)}
                tokens = {choice: sum(continuation.scored) for choice, continuation in answer}
                for member in group.members:
                    choices = questions[member].choices
                    found[member] = Scores(tuple(score[c] for c in choices), tuple(tokens[c] for c in choices), seconds)
            if advance is not None:
                advance(done)
        return [scores for scores in found if scores is not None]

    def _groups(self, questions: Sequence[Question]) -> list[Group]:
        groups: dict[Hashable, Group] = {}
        for member, question in enumerate(questions):
            same = _prompt_key(question.sample)
            if same not in groups:
                length = len(self.renderer.render(question.sample.turns, open_answer=True).ids)
                groups[same] = Group(question.sample, length)
            groups[same].members.append(member)
            groups[same].choices.update(dict.fromkeys(question.choices))
        return list(groups.values())

    def _batches(self, groups: Iterable[Group]) -> Iterator[list[Group]]:
        """Longest first (the worst memory shows at once); within a batch all groups have equally many choices."""
        ordered = sorted(groups, key=lambda group: (len(group.choices), group.length), reverse=True)
        for _, same in groupby(ordered, key=lambda group: len(group.choices)):
            alike = list(same)
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _by_length(self, group: Group) -> list[tuple[str, Continuation]]:
        """The group's choices, short ones first, so that the calls over them pad little."""
        pairs = [(choice, self.continuation(group.sample, choice)) for choice in group.choices]
        return sorted(pairs, key=lambda pair: len(pair[1].ids))

    def _score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Continuation]]) -> Tensor:
        """answers [G][A] -> scores [G, A]."""
        batch = self.collate(samples).to(self.model.device)
        prompt = self.model.run(batch, keep=True)
        if prompt.hidden_BTD is None or prompt.past is None:
            raise ConfigError("this model keeps no past, and scoring shares the prompt's", "use a decoder-only LLM")
        first_GV = prompt.head(prompt.hidden_BTD[:, -1]).float().log_softmax(-1)
        scores = torch.zeros(len(answers), len(answers[0]), dtype=torch.float64)
        step = max(1, self.rows // len(answers))
        for start in range(0, len(answers[0]), step):
            chunk = [answer[start : start + step] for answer in answers]
            scores[:, start : start + step] = self._continue(batch, prompt.past, first_GV, chunk).cpu()
        return scores

    def _continue(self, batch: Batch, past: Past, first_GV: Tensor, chunk: Sequence[Sequence[Continuation]]) -> Tensor:
        """chunk [G][k] -> scores [G, k], from the prompt's next-token log-probabilities and its cache."""
        times = len(chunk[0])
        rows = [continuation for answers in chunk for continuation in answers]
        ids_RU, scored_RU = _padded(rows, self.model.device)
        group_R = torch.arange(len(chunk), device=ids_RU.device).repeat_interleave(times)
        scores_R = first_GV[group_R, ids_RU[:, 0]] * scored_RU[:, 0]
        if ids_RU.shape[1] > 1:
            real_RU = torch.tensor(
                [[t < len(row.ids) - 1 for t in range(ids_RU.shape[1] - 1)] for row in rows], device=ids_RU.device
            )
            more = Batch(
                input_ids_BT=ids_RU[:, :-1],
                segment_BT=_extended(batch.segment_BT, times, real_RU.long()),
                modality_BT=_extended(batch.modality_BT, times, torch.zeros_like(real_RU, dtype=torch.long)),
            )
            scores_R = scores_R + _later(self.model.run(more, past=past.repeat(times)), ids_RU, scored_RU)
        return scores_R.view(len(chunk), times)

    def continuation(self, sample: Sample, answer: str) -> Continuation:
        """What follows the prompt when `answer` is given. It depends on the answer and the turns' roles alone,
        because the renderer encodes each turn's text by itself."""
        same = (answer, tuple(turn.role for turn in sample.turns))
        if same not in self._continuations:
            self._continuations[same] = self._render_continuation(sample, answer)
        return self._continuations[same]

    def _render_continuation(self, sample: Sample, answer: str) -> Continuation:
        prompt = list(self.renderer.render(sample.turns, open_answer=True).ids)
        whole = self.renderer.render((*sample.turns, Turn.say("assistant", answer)), open_answer=False)
        if list(whole.ids[: len(prompt)]) != prompt:
            raise DataError(
                f"{sample.id}: the chat template writes the prompt differently once an answer follows",
                "use a template whose generation prompt is a prefix of the answered conversation",
            )
        scored = [bool(x) for x in whole.trained[len(prompt) :]]
        if not any(scored):
            raise DataError(f"{sample.id}: the answer {answer!r} has no token to score", "give a non-empty answer")
        end = len(scored) - scored[::-1].index(True)
        return Continuation(tuple(whole.ids[len(prompt) : len(prompt) + end]), tuple(scored[:end]))

    # ------------------------------------------------------------------------------------------ the joint alone

    @torch.inference_mode()
    def cosines(self, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[Scores]:
        """The joint without the LLM: cosine of pictures and candidate answers in the LLM's input space.

        Raises:
            DataError: a question has no picture.
        """
        self.model.eval()
        pictures: list[Tensor] = []
        seconds: list[float] = []
        for start in range(0, len(questions), self.batch_size):
            clock = time.perf_counter()
            part = questions[start : start + self.batch_size]
            batch = self.collate([question.sample for question in part]).to(self.model.device)
            output = self.model.run(batch, need="connected")
            pictures.append(_per_row(output, batch, [question.sample.id for question in part]))
            seconds += [(time.perf_counter() - clock) / len(part)] * len(part)
            if advance is not None:
                advance(len(part))
        names = list(dict.fromkeys(choice for question in questions for choice in question.choices))
        sample = questions[0].sample
        name_MD = torch.stack([self._name(output.embed, sample, name) for name in names])
        cosine_NM = cosine(torch.cat(pictures), name_MD - name_MD.mean(0)).cpu()
        column = {name: m for m, name in enumerate(names)}
        return [
            Scores(tuple(row[column[c]].item() for c in question.choices), (0,) * len(question.choices), spent)
            for question, row, spent in zip(questions, cosine_NM, seconds)
        ]

    def _name(self, embed: Callable[[Tensor], Tensor], sample: Sample, name: str) -> Tensor:
        """Mean input embedding of the tokens that are scored, as a contrastive stage compares them."""
        continuation = self.continuation(sample, name)
        ids = [token for token, scored in zip(continuation.ids, continuation.scored) if scored]
        return embed(torch.tensor(ids, device=self.model.device)).float().mean(0)


def cosine(pictures_ND: Tensor, names_MD: Tensor) -> Tensor:
    """[N, D] and [M, D] -> cosines [N, M], in float64, which autocast leaves alone."""
    pictures, names = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (pictures_ND, names_MD))
    return pictures @ names.T


def _prompt_key(sample: Sample) -> Hashable:
    """Equal for samples whose prompts and pictures are equal."""
    return tuple((turn.role, tuple(key(part) for part in turn.parts)) for turn in sample.turns)


def _padded(rows: Sequence[Continuation], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and which of them are scored, both [R, U]."""
    width = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (width - len(row.ids))] for row in rows]
    scored = [[*row.scored, *[False] * (width - len(row.scored))] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(scored, device=device)


def _extended(past_GT: Tensor, times: int, new_RU: Tensor) -> Tensor:
    """[G, T] and [G * times, U] -> [G * times, T + U]."""
    return torch.cat([past_GT.repeat_interleave(times, 0), new_RU.to(past_GT.dtype)], dim=1)


def _later(output: Output, ids_RU: Tensor, scored_RU: Tensor) -> Tensor:
    """Sum over all but the first token, [R], of the scored ones' log-probabilities."""
    at = scored_RU[:, 1:]
    later = torch.zeros(at.shape, device=at.device, dtype=torch.float64)
    if output.hidden_BTD is not None:
        later[at] = _log_probabilities(output, output.hidden_BTD[at], ids_RU[:, 1:][at]).double()
    return later.sum(1)


def _log_probabilities(output: Output, states_MD: Tensor, ids_M: Tensor, chunk: int = 256) -> Tensor:
    """Log-probability of each token given the state before it, in float32, a chunk of logits at a time."""
    parts = []
    for start in range(0, len(ids_M), chunk):
        logits = output.head(states_MD[start : start + chunk]).float()
        chosen = logits.gather(1, ids_M[start : start + chunk, None])[:, 0]
        parts.append(chosen - logits.logsumexp(-1))
    return torch.cat(parts)


def _per_row(output: Output, batch: Batch, ids: Sequence[str]) -> Tensor:
    """Mean connected token of each row's pictures, [B, D]."""
    mean_ND = output.connected["image"].float().mean(1)
    row_N = batch.media["image"].row_N
    counts = torch.bincount(row_N, minlength=len(ids))
    if not bool((counts > 0).all()):
        missing = ids[int((counts == 0).nonzero()[0])]
        raise DataError(f"{missing}: no picture to compare with names", "cosine needs a picture in every item")
    sums = torch.zeros(len(ids), mean_ND.shape[1], device=mean_ND.device).index_add_(0, row_N, mean_ND)
    return sums / counts[:, None]
