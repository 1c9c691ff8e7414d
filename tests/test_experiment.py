"""What an experiment says of its data: the hash of all that was asked, and questions as they were asked."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console

from isthmus import experiment
from isthmus.config import Recipe, TaskConfig
from isthmus.evaluation.results import examples
from isthmus.evaluation.tasks import Choice, Cut, Item, Task
from isthmus.experiment import data_hash, free_replies, named, processor
from isthmus.forecast import was
from isthmus.training.parallel import World
from isthmus.types import Audio, Box, Image, Sample, Turn

PICTURE = Image(Pillow.new("RGB", (8, 8)))
BEFORE = (Turn.say("user", PICTURE, "And this?"), Turn.say("assistant", "a dog"))


def asked(box: Box, before: tuple[Turn, ...] = (), choices: tuple[str, ...] = ("a cat", "a cow")) -> Task:
    turns = (*before, Turn.say("user", PICTURE, "What is at ", box, "?"))
    return Choice("t", (Item(Sample(turns, "one"), "a cat", choices, "one", "region"),), (Cut("T"),))


class Silent:
    """A speaker without words."""

    def __init__(self, *model: Any, **options: Any) -> None: ...

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        return [""] * len(samples)


LEFT, RIGHT = Box((0, 0, 0.5, 1)), Box((0.5, 0, 1, 1))


def test_the_hash_of_the_data_sees_regions_demonstrations_and_choices() -> None:
    tasks = [
        asked(LEFT),
        asked(RIGHT),
        asked(LEFT, BEFORE),
        asked(LEFT, (BEFORE[0], Turn.say("assistant", "a cow"))),
        asked(LEFT, choices=("a cat", "a hen")),
    ]
    assert len({data_hash([task]) for task in tasks}) == len(tasks)
    assert data_hash([asked(LEFT)]) == data_hash([replace(asked(LEFT), cuts=(Cut("Another label"),))])


def test_reports_show_the_region_that_was_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "Local", Silent)
    task = asked(LEFT, BEFORE)
    (said,) = free_replies(None, None, [(task, TaskConfig(name="t"))])  # type: ignore[arg-type]
    (shown,) = examples({"T": (task, {"after": [None]})})  # type: ignore[dict-item]
    assert said.prompt == shown.question == "What is at [0.000,0.000,0.500,1.000]?"


def test_free_replies_leave_out_what_shows_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "Local", Silent)
    heard = Sample((Turn.say("user", Audio(b"RIFF"), "What is heard?"),), "two")
    task = Choice("t", (Item(heard, "a bell", (), "two", "sound"), *asked(LEFT).items), (Cut("T"),))
    (said,) = free_replies(None, None, [(task, TaskConfig(name="t"))])  # type: ignore[arg-type]
    assert said.reference == "a cat"


@pytest.mark.parametrize(("trained", "shown"), [(None, False), (object(), True)])
def test_what_was_planned_is_set_beside_what_it_took_where_training_came_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, trained: object, shown: bool
) -> None:
    """A run that is interrupted has nothing to compare yet."""
    console = Console(record=True, file=io.StringIO())
    run = Mock(folder=tmp_path, console=console, recipe=Recipe(), world=World())
    run.train.return_value = trained
    monkeypatch.setattr(experiment, "_measure", lambda *_: {})
    monkeypatch.setattr(experiment, "summarise", Mock())
    monkeypatch.setattr(experiment, "reports", Mock())
    monkeypatch.setattr(was, "compare", lambda folder: [was.Stage("a", dict.fromkeys(NUMBERS), NUMBERS)])
    assert (experiment._done(run) is not None) == shown
    assert ("planned / was" in console.export_text()) == shown


def test_a_processor_is_told_by_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(experiment, "CPUS", told)
    assert processor() == "riscv64"
    one = "processor\t: {}\nvendor_id\t: AuthenticAMD\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9654 96-Core Processor\n"
    told.write_text("\n".join(one.format(number) for number in range(2)))
    assert processor() == "AMD EPYC 9654 96-Core Processor"
    told.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")  # as Arm's
    assert processor() == "riscv64"
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    assert processor() == "Intel64 Family 6"


def test_an_accelerator_is_told_by_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {0: "NVIDIA H200", 1: "NVIDIA A100-SXM4-80GB"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: models[device.index or 0])
    found = [named(torch.device(device)) for device in ("cpu", "cuda", "cuda:1")]
    assert found == ["cpu", "cuda: NVIDIA H200", "cuda:1: NVIDIA A100-SXM4-80GB"]


NUMBERS = {"steps_per_second": 1.0, "flops": 1.0, "peak": 1.0}
