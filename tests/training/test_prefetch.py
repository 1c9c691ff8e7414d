"""Workers change nothing but the time: equal batches in order, our own errors, a quiet end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from isthmus.config import Recipe
from isthmus.training.prefetch import Prefetched
from isthmus.training.run import Feed, mix_of
from isthmus.training.toy import toy
from isthmus.types import Batch, DataError, IsthmusError


class Counted:
    """Batches that say who made them and which they are."""

    micros = 2

    def __init__(self, bad: tuple[int, int] = (-1, 0)):
        self.bad = bad

    def __call__(self, step: int, micro: int) -> Batch:
        if (step, micro) == self.bad:
            raise DataError(f"picture {step} is torn", "mend it")
        ids = torch.full((3, 5), 2 * step + micro)
        time.sleep(0.01 * (step % 2))  # later ones are ready first
        return Batch(ids, ids, ids, ids=(str(os.getpid()),))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def children() -> list[psutil.Process]:
    """The workers; other tests may have left helpers of multiprocessing running."""
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "pt_data_worker"]


def test_order_is_kept_and_the_start_is_where_one_asks() -> None:
    with Prefetched(Counted(), 3) as feed:
        for start in (1000, 4):
            for step in range(start, start + 6):
                for micro in range(2):
                    batch = feed(step, micro)
                    assert (batch.input_ids_BT == 2 * step + micro).all()
                    assert batch.ids != (str(os.getpid()),)
    assert not children()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", ["align", "tune"])
def test_batches_of_a_recipe_are_equal_with_0_1_and_4_workers(
    recipe: Recipe, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus import compose

    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path))
    model, stage = compose(recipe), recipe.stage(name)
    collator = model.processor.collator(None, stage.template, max_length=stage.max_length)
    places = [(step, micro) for step in (0, 1, 31, 32) for micro in range(stage.accumulate)]
    found = []
    for workers in (0, 1, 4):
        with Prefetched(Feed(stage, mix_of(stage, 0), collator, 0), workers) as feed:
            found.append([feed(*place) for place in places])
    for others in found[1:]:
        assert all(map(same, found[0], others))
    assert not same(found[0][0], found[0][1])


def test_an_error_comes_with_its_two_lines_when_its_turn_comes() -> None:
    with Prefetched(Counted(bad=(2, 1)), 2) as feed:
        for step, micro in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
            feed(step, micro)
        with pytest.raises(DataError) as error:
            feed(2, 1)
        assert (error.value.cause, error.value.remedy) == ("picture 2 is torn", "mend it")
        assert (feed(3, 0).input_ids_BT == 6).all()  # and it can go on


def test_a_killed_worker_is_said_in_two_lines() -> None:
    with pytest.raises(IsthmusError, match="a process that prepares batches is gone"), Prefetched(Counted(), 2) as feed:
        feed(0, 0), feed(0, 1)
        worker, _ = children()
        worker.kill()
        for place in range(2, 100):
            feed(*divmod(place, 2))
    assert not children()


class Cut(Iterator[Batch]):
    """Batches that end as a worker killed in the midst of handing one over ends them."""

    def __init__(self, error: Exception):
        self.error = error

    def __next__(self) -> Batch:
        raise self.error

    def _shutdown_workers(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.\nTraceback"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_worker_killed_while_it_hands_a_batch_over(error: Exception, told: bool) -> None:
    """Of workers killed at random some 3 in 100 die in there; what the feed raised in a worker stays what it is."""
    with pytest.raises(IsthmusError if told else type(error)), Prefetched(Counted(), 1) as feed:
        feed(0, 0)
        feed.close()
        feed._batches = Cut(error)
        feed(0, 1)


def test_signals_to_the_whole_group_leave_workers_alone_and_random_numbers_too() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with Prefetched(Counted(), 2) as feed:
        feed(0, 0), feed(0, 1)
        for worker in children():
            worker.send_signal(signal.SIGINT)
            worker.send_signal(signal.SIGTERM)
        for place in range(2, 30):
            assert (feed(*divmod(place, 2)).input_ids_BT == place).all()
        began = time.monotonic()
    assert time.monotonic() - began < 10 and not children()
    assert torch.equal(torch.rand(3), expected)
