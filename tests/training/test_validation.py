"""What is held out: each source by itself, in batches that training could take, and without what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from isthmus.config import Recipe
from isthmus.forecast.batches import draw
from isthmus.training import validation
from isthmus.training.log import read_rows
from isthmus.training.parallel import World
from isthmus.training.run import Run, limits, mix_of, train
from isthmus.training.step import held_out
from isthmus.training.toy import toy
from isthmus.training.validation import Validation
from isthmus.types import Batch, DataError, NothingToLearn

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    made = toy(tmp_path / "toy")
    return made.but(stages=[made.stages[0].but(budget={"steps": 2}, save_every=None)])


def test_sources_count_by_their_shares() -> None:
    found = Validation({"a": lambda step: 1.0, "b": lambda step: 3.0}, {"a": 9.0, "b": 1.0})(None)  # type: ignore[arg-type]
    assert found == pytest.approx({"validation_loss": 1.2, "validation_loss_a": 1.0, "validation_loss_b": 3.0})
    assert Validation({"a": lambda step: 1.5}, {"a": 9.0})(None) == {"validation_loss": 1.5}  # type: ignore[arg-type]

    def silent(step: Any) -> float:
        raise NothingToLearn("no token is supervised")

    some = Validation({"a": silent, "b": lambda step: 3.0}, {"a": 9.0, "b": 1.0})
    assert some(None) == {"validation_loss": 3.0, "validation_loss_b": 3.0}  # type: ignore[arg-type]
    with pytest.raises(NothingToLearn, match="nothing to learn from"):
        Validation({"a": silent}, {"a": 1.0})(None)  # type: ignore[arg-type]


def test_a_picture_that_cannot_be_read_is_told() -> None:
    def damaged(step: Any) -> float:
        raise DataError("a.png: damaged")

    with pytest.raises(DataError, match="a.png: damaged"):
        Validation({"a": damaged, "b": lambda step: 3.0}, {"a": 9.0, "b": 1.0})(None)  # type: ignore[arg-type]


class Drawing:
    """A step that draws in each batch as often as the batch says, in one process of several."""

    def __init__(self, rank: int, size: int):
        self.world, self.sound, self.drawn = Counted(rank, size), True, dict[str, list[float]]()
        self.own: Sequence[Any] = ()

    def eval(self) -> None: ...

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(())

    def scales(self, batches: Sequence[Any]) -> dict[str, float]:
        self.own = batches
        return {}

    def __call__(self, batch: Any, scales: dict[str, float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        drawn = torch.rand(batch.draws).tolist()
        if batch in self.own:  # else it counts nothing
            self.drawn[batch.name] = drawn
        return torch.zeros(()), {}


class Counted(World):
    """Of several processes that never meet."""

    def total(self, counts: Sequence[Any]) -> list[Any]:
        return list(counts)


@dataclass
class Named:
    name: str
    draws: int

    def to(self, device: torch.device) -> Named:
        return self


def test_what_is_drawn_for_any_source_does_not_depend_on_the_processes() -> None:
    sources = {"a": 3, "b": 4, "c": 2}
    batches = {name: [Named(f"{name}{n}", 2 + n) for n in range(count)] for name, count in sources.items()}
    validate = Validation({name: held_out(each) for name, each in batches.items()}, dict.fromkeys(sources, 1.0))

    def drawn(rank: int, size: int) -> dict[str, list[float]]:
        step = Drawing(rank, size)
        torch.manual_seed(7)
        validate(step)  # type: ignore[arg-type]
        return step.drawn

    alone = drawn(0, 1)
    assert len({row[0] for row in alone.values()}) == len(alone) == 9
    for size in (2, 3):
        for rank in range(size):
            share = drawn(rank, size)
            assert share and share == {name: alone[name] for name in share}
    torch.manual_seed(7)  # the first source's, and so a single one's, by hand
    for number, seed in enumerate(torch.randint(2**62, (3,)).tolist()):
        assert alone[f"a{number}"] == torch.rand(2 + number, generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_long_source_of_small_weight_does_not_choose_the_model(recipe: Recipe, tmp_path: Path) -> None:
    (stage,) = recipe.stages
    short = Path(stage.data[0].name)
    long = short.with_name("long.jsonl")
    rows = [json.loads(line) for line in short.read_text().splitlines()]
    for row in rows:
        row["conversations"][1]["value"] *= 20
    long.write_text("\n".join(map(json.dumps, rows)))
    data = [{"name": str(short), "weight": 0.9}, {"name": str(long), "weight": 0.1}]
    train(recipe.but(stages=[stage.but(data=data)]), tmp_path / "run", CPU)
    for row in (row for row in read_rows(tmp_path / "run/align/metrics.jsonl") if "validation_loss" in row):
        each = row["validation_loss_data.jsonl"], row["validation_loss_long.jsonl"]
        assert row["validation_loss"] == pytest.approx(0.9 * each[0] + 0.1 * each[1]) and each[0] != each[1]


@pytest.mark.parametrize("size, accumulate", [(1, 1), (4, 2)])
def test_no_more_at_once_than_in_training_and_nothing_that_is_dropped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, accumulate: int
) -> None:
    (stage,) = recipe.stages
    file = Path(stage.data[0].name)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::3]:
        row["conversations"][0]["value"] += " word" * 60
    file.write_text("\n".join(map(json.dumps, rows)))
    stage = stage.but(
        batch_size=size, accumulate=accumulate, overlong="drop", max_length=256, data=[{"name": str(file)}]
    )
    seen: list[Batch] = []
    monkeypatch.setattr(validation, "held_out", lambda batches: seen.extend(batches))
    model = Run(recipe.but(stages=[stage]), tmp_path / "run", CPU, small.quiet()).newborn()
    collator = model.processor.collator(model.processor.look, stage.template, **limits(stage))
    assert validation.of(stage, mix_of(stage, 0).sets, collator, 0) is not None
    assert seen and all(len(batch.ids) <= size // accumulate for batch in seen)
    assert all(batch.input_ids_BT.shape[1] <= 256 for batch in seen)


def test_a_plan_takes_the_samples_that_training_takes(recipe: Recipe, tmp_path: Path) -> None:
    """Pictures of which nothing is said are samples for an objective about pictures."""
    pictures = Path(recipe.stages[0].data[0].name).parent
    changes = {"data": [{"name": "pictures", "images": pictures}], "objectives": ["vdep"], "batch_size": 2}
    stage = recipe.stages[0].but(**changes)
    bare = recipe.but(stages=[stage])
    model = Run(bare, tmp_path / "run", CPU, small.quiet()).newborn()
    assert draw(bare, stage, model, 2).steps
