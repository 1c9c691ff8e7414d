"""Measuring a remote speaker, as a baseline for models trained here: the same items, controls, files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

from isthmus.config import TaskConfig
from isthmus.evaluation import tasks
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.grounding import Locate
from isthmus.evaluation.measure import Measured, Progress, advancing, controlled
from isthmus.evaluation.results import Column
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Free, Task
from isthmus.speakers.remote import Remote
from isthmus.types import ConfigError, Sample


class Listener(Scorer):
    """Takes free replies from a speaker; there is no model here whose probabilities could be read."""

    def __init__(self, speaker: Remote):
        self.reply, self.batch_size = speaker.replies, 4 * speaker.config.concurrency

    def longest_first(self, prompts: Sequence[Sample]) -> list[int]:
        """As they come: how long they are is the other side's matter."""
        return list(range(len(prompts)))


def measure(
    speaker: Remote,
    built: Sequence[tuple[Task, TaskConfig]],
    seed: int,
    folder: Path,
    progress: Progress | None = None,
) -> Measured:
    """Predictions of every task and of its controls, under the column `after`; refused items are not scored.

    Complete prediction files are reused; of a file that was not finished, the speaker's cache has the answers.

    Raises:
        ConfigError: a task needs more than text. Nothing has been asked then.
        IsthmusError: see `Remote.say`.
    """
    for task, _ in built:
        _check_needs_text_alone(task, speaker)
    found = Measured()
    for task, config in built:
        asking = _as_long(speaker, task)
        listener = Listener(asking)
        conditions = {None: task} | controlled(task, config)
        runs: dict[Column, list[Prediction]] = {
            control or "after": tasks.run(
                asked,
                listener,
                control=control,
                folder=folder / "after",
                settings=asking.config.identity(),
                seed=seed,
                advance=advancing(f"{task.name} {control or 'after'}", len(asked.items), progress),
            )
            for control, asked in conditions.items()
        }
        found[task.name] = task, runs
    return found


def _as_long(speaker: Remote, task: Task) -> Remote:
    """The same speaker, answering in as many tokens as a model of our own may, unless its settings say how many."""
    if "max_tokens" in speaker.config.model_fields_set:
        return speaker
    own = copy(speaker)
    own.config = speaker.config.model_copy(update={"max_tokens": task.longest})
    return own


def _check_needs_text_alone(task: Task, speaker: Remote) -> None:
    if not isinstance(task, Free) or isinstance(task, Locate):
        raise ConfigError(
            f"task {task.name!r} reads log-probabilities or the model's own regions; {speaker.config.model} gives text",
            "measure it on tasks with free replies, such as naming-free, vqa or options",
        )
