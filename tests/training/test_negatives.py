"""Terms that compare the samples of a batch, over several processes: the losses and gradients of one process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import small
import torch
from safetensors.torch import load_file, save_file

import composed
import tiny
from isthmus.config import Recipe
from isthmus.training.optimizer import anew, choose
from isthmus.training.parallel import World, spread, whole
from isthmus.training.step import Step
from isthmus.types import Batch, IsthmusError, Sample, Turn

SHAPE = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "contrast": 8, "positions": 32}
OPTIONS = {**SHAPE, "dropout": 0.0, "text": True, "vocabulary": tiny.VOCAB + 1}
SLOW = {"alpha": 0.4, "ramp": 4, "decay": 0.8, "queue": 6, "smoothing": 0.0, "temperature": (0.001, 0.5)}
LATE = {"match": "late", "learned": False}

TERMS: dict[str, tuple[str, list[Any]]] = {
    "contrastive": ("llava", ["contrastive"]),
    "late": ("llava", [{"name": "contrastive", "options": LATE}]),
    "itc": ("blip2", ["itc"]),
    "slow": ("blip2", [{"name": "itc", "options": SLOW}]),
    "itm": ("blip2", ["itm"]),
    "first": ("blip2", ["itc", "itm", "itg"]),
    "sentences": ("p_former", [{"name": "prompt_contrast", "options": {"masked": 0.0}}]),
}
"""Joints and objectives."""

USED = {
    "llava": ["connectors.*"],
    "itm": ["connectors.*.picture_norm.*", "connectors.*.layers.0.*", "connectors.*.heads.match.*"],
    "itc": ["connectors.*.layers.*", "connectors.*.heads.picture.*", "connectors.*.heads.text.*", "*.temperature"],
    "itg": ["connectors.*.words.*", "connectors.*.heads.transform.*"],
    "p_former": ["heads.teacher.layers.*", "heads.teacher.contrast.*", "heads.teacher.temperature"],
}
"""What trains: everything of these has a gradient."""

EVEN, RAGGED, LONELY, LAST = ([0, 2], [1, 3]), ([0, 2, 3], [1]), ([0, 1, 2], [-1]), ([-1], [3, 2, 1, 0])
PURE, EQUAL = ([0, 4], [1, 5]), ([0], [4])
"""Numbers of the samples that the two processes have in a step; -1 is a conversation without a picture. Where they are
pure, each process has one text alone, which only the other's differ from; where equal, all have."""


def train(name: str) -> dict[str, float]:
    joint, terms = TERMS[name]
    kinds = {"slow": ["itc"], "itc": ["itc"], "itm": ["itm"], "first": terms}.get(name, [joint])
    return {glob: 1e-2 for kind in kinds for glob in USED[kind]}


def steps(name: str) -> list[tuple[list[int], list[int]]]:
    if name == "sentences":
        return [EVEN, RAGGED, PURE]
    return [EVEN, RAGGED, LONELY, LAST, PURE, *([] if name == "itm" else [EQUAL]), EVEN]


def collate(vlm: Any, name: str, numbers: list[int]) -> Batch:
    make = sentence if name == "sentences" else small.sample
    return vlm.processor.collator(template="plain")([small.text(9) if n < 0 else make(n % 4) for n in numbers])


def sentence(number: int) -> Sample:
    said = ("a cat", "the dog is here", "on the left", "two birds")[number]
    return Sample((Turn.say("user", ""), Turn.say("assistant", said)), id=f"t{number}")


def gradients(world: World, recipe: Recipe, how: Any, folder: Path) -> None:
    """Of every step of every term the loss and the gradients, then what drifts; written down by the first process."""
    folder.mkdir(exist_ok=True)
    with world.started(torch.device("cpu")):
        for name in TERMS:
            found = of_term(world, recipe, how, name)
            if world.main:
                save_file(found, folder / f"{name}.safetensors")


def of_term(world: World, recipe: Recipe, how: Any, name: str) -> dict[str, torch.Tensor]:
    joint, terms = TERMS[name]
    made = small.stage(train=train(name), objectives=terms)
    aligner = {"name": joint, "options": {} if joint == "llava" else OPTIONS}
    vlm = composed.stir(small.build(recipe.but(aligner=aligner)))
    for key, parameter in vlm.named_parameters():
        if key.endswith("temperature"):
            torch.nn.init.constant_(parameter, 0.4)
    step = Step(vlm, made.objectives, world)
    trained = choose(step, made)
    step.accompany()
    run = spread(step, step.units(), world, torch.device("cpu"), how, True, step.uneven(), step.drifting())
    trained = anew(step, trained)
    updates = torch.optim.SGD([each.parameter for each in trained], lr=1e-3)
    step.ready()
    noted = {}
    for number, shares in enumerate(steps(name)):
        both = [n for pair in itertools.zip_longest(*shares) for n in pair if n is not None]
        batch = collate(vlm, name, both if world.size == 1 else shares[world.rank])
        torch.manual_seed(number + 100 * world.rank)
        scales = step.scales([batch])
        with run.micro(last=True):
            total, _ = run(batch, scales)
            total.backward()
        noted[f"{number}.loss"] = torch.tensor(world.total([total.item()])) / world.size
        noted |= {f"{number}.{each.name}": whole(each.parameter.grad).clone() for each in trained}
        updates.step()
        updates.zero_grad()
        step.after_step()
    return noted | {f"at the end, {key}": whole(tensor).clone() for key, tensor in step.drifting().items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def one(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    gradients(World(), recipe, "ddp", folder)
    return folder


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def two(request: pytest.FixtureRequest, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    assert ranks.start(2, gradients, recipe, request.param, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", TERMS)
def test_two_processes_have_the_gradients_of_one(one: Path, two: Path, name: str) -> None:
    """Also where they have different numbers of pictures, none at all, or texts that only another's differ from."""
    expected, found = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    largest = max(1.0, *(tensor.abs().max().item() for key, tensor in expected.items() if key[0].isdigit()))
    for key, tensor in expected.items():
        near = 1e-6 * largest
        torch.testing.assert_close(found[key], tensor, atol=near, rtol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
        assert tensor.any() or not key.startswith("0."), key


REFUSED = {
    "contrastive": ("llava", ["contrastive"], "DataError", "a sample among ('s1',) has no text to compare with"),
    "sentences": ("p_former", ["prompt_words", "itm"], "NothingToLearn", "no sentence without a picture among ('s1',)"),
}
"""Joints, terms of which the first cannot be about the second process's batch, and what every process says of that."""


def test_what_one_process_cannot_learn_from_is_told_by_all_in_one_kind_of_error(recipe: Recipe, tmp_path: Path) -> None:
    """Of one kind: a validation leaves out sources of which nothing can be learnt, and has to in all processes."""
    assert ranks.start(2, _refused, recipe, tmp_path) == [0, 0]
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == {name: [kind, cause] for name, (_, _, kind, cause) in REFUSED.items()}


def _refused(world: World, recipe: Recipe, folder: Path) -> None:
    told = {}
    with world.started(torch.device("cpu")):
        for name, (joint, terms, _, _) in REFUSED.items():
            aligner = {"name": joint, "options": {} if joint == "llava" else OPTIONS}
            step = Step(small.build(recipe.but(aligner=aligner)), small.stage(objectives=terms).objectives, world)
            samples = [small.sample(world.rank), *([sentence(0)] if world.main else [])]
            batch = step.vlm.processor.collator(template="plain")(samples)
            if name == "contrastive" and not world.main:
                batch.labels_BT.fill_(-100)
            try:
                step.scales([batch])
            except IsthmusError as error:
                told[name] = [type(error).__name__, error.cause]
            world.barrier()
    (folder / f"{world.rank}.json").write_text(json.dumps(told))


def test_rows_come_in_the_order_in_which_they_were_dealt_and_their_gradients_go_back(tmp_path: Path) -> None:
    assert ranks.start(3, _gather, tmp_path) == [0, 0, 0]
    for rank in range(3):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found["ids"].tolist() == [[1, 2], [3, -1], [4, -1]]
        assert found["rows"].tolist() == [1.0, 5.0, 6.0] and not found["none"].numel()
        # the sum over processes of a third of the sum of all squares
        assert found["gradient"].tolist() == [[2.0], [], [10.0, 12.0]][rank]


def _gather(world: World, folder: Path) -> None:
    """Whatever forgot to say where it is made would be on `meta`, which has no numbers."""
    ids = [torch.tensor([[1, 2]]), torch.zeros(0, 1, dtype=torch.long), torch.tensor([[3], [4]])][world.rank]
    own = torch.tensor([[1.0], [], [5.0, 6.0]][world.rank], requires_grad=True)
    none = torch.zeros(0, 3)
    with world.started(torch.device("cpu")):
        with torch.device("meta"):
            rows = world.all_gather(own)
            (rows.square().sum() / world.size).backward()
            found = {"ids": world.all_gather(ids, -1), "rows": rows.detach(), "none": world.all_gather(none)}
        found["gradient"] = own.grad
        save_file(found, folder / f"{world.rank}.safetensors")
