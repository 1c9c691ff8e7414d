"""Every task by the name that recipes call it."""

from __future__ import annotations

from collections.abc import Container

from isthmus.config import nearest
from isthmus.evaluation import files, grounding, multiple, tasks, text, yes_no
from isthmus.evaluation.tasks import Builder
from isthmus.types import ConfigError

ON_FILES: dict[str, Builder] = {**files.TASKS, **yes_no.TASKS, **multiple.TASKS}
"""Those that ask about a file of the user's, `options.data`."""
ON_TEXTS: dict[str, Builder] = text.TASKS
"""Those that read raw text, `options.text`."""
TASKS: dict[str, Builder] = {**tasks.TASKS, **grounding.TASKS, **ON_FILES, **ON_TEXTS}

BENCHMARKS = {
    "exact": "gqa ocrbench",
    "vqa": "vqav2 vqa2 textvqa vizwiz okvqa",
    "anls": "docvqa infographicvqa infovqa stvqa",
    "relaxed": "chartqa plotqa",
    "yes-no": "pope mme vsr",
    "options": "mmbench seedbench mmmu scienceqa ai2d",
    "captions": "coco nocaps textcaps flickr30k",
    "refer": "refcoco refcoco+ refcocog",
}
"""Tasks, and the benchmarks that score as they do."""


def named(name: str) -> Builder:
    """The builder of a task: `named("naming")(TaskConfig(name="naming"), seed)`.

    Raises:
        ConfigError: there is no such task; the nearest name is given, or the one that a benchmark scores by.
    """
    bare = name.lower().replace("-", "").replace("_", "")
    if name not in TASKS and (rule := [task for task, some in BENCHMARKS.items() if bare in some.split()]):
        raise ConfigError(
            f"no task named {name!r}: it is a benchmark, which {rule[0]!r} scores",
            f"ask about its file: --tasks {rule[0]} --data FILE",
        )
    if name not in TASKS:
        raise ConfigError(f"no task named {name!r}{nearest(name, list(TASKS))}", f"tasks are {sorted(TASKS)}")
    return TASKS[name]


def check_options(name: str, given: Container[str]) -> None:
    """Whether a task is given what it asks about, in the words of `isthmus eval`.

    Raises:
        ConfigError: there is no such task; it asks about a file and none is named; or it does not, and one is.
    """
    named(name)
    if name in ON_FILES and "data" not in given:
        raise ConfigError(f"task {name} asks about a file of yours, and none is named", "name it with --data FILE")
    if name in ON_TEXTS and "text" not in given:
        raise ConfigError(f"task {name} reads a text, and none is named", "name it with --text FILE, without --tasks")
    if name not in ON_FILES and "data" in given:
        about = "a text" if name in ON_TEXTS else "embedded pictures"
        raise ConfigError(
            f"task {name} asks about {about}, not about your file",
            f"leave --data away, or name how its replies are scored: --tasks {', '.join(ON_FILES)}",
        )
