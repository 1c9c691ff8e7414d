"""Every task by the name that recipes call it."""

from __future__ import annotations

from isthmus.config import nearest
from isthmus.evaluation import files, grounding, multiple, tasks, text
from isthmus.evaluation.tasks import Builder
from isthmus.types import ConfigError

TASKS: dict[str, Builder] = {**tasks.TASKS, **grounding.TASKS, **files.TASKS, **multiple.TASKS, **text.TASKS}


def named(name: str) -> Builder:
    """The builder of a task: `named("naming")(TaskConfig(name="naming"), seed)`.

    Raises:
        ConfigError: there is no such task; the nearest name is given.
    """
    if name not in TASKS:
        raise ConfigError(f"no task named {name!r}{nearest(name, list(TASKS))}", f"tasks are {sorted(TASKS)}")
    return TASKS[name]
