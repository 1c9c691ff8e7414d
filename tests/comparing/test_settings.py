"""The settings of a comparison: whatever of a recipe changes what is learnt is in some row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.comparing import advice
from isthmus.comparing.settings import settings
from isthmus.config import LoRA, Recipe, Stage, Train
from isthmus.recipes.flamingo import flamingo
from isthmus.recipes.llava import llava
from isthmus.recipes.parts import ATTENTION_LORA

BASE = Recipe(
    name="one",
    stages=[
        {
            "name": "sft",
            "data": ["scenes"],
            "train": {"connectors.*": {"weight_decay": 0.1}, "llm.*": {"mode": {"r": 4}}},
            "budget": {"steps": 9},
            "batch_size": 8,
        }
    ],
)
STAGE: dict[str, Any] = {
    "name": "other",
    "data": ["easy-vqa"],
    "train": {"connectors.*": {}},
    "objectives": ["contrastive"],
    "budget": {"steps": 8},
    "batch_size": 4,
    "schedule": "linear",
    "warmup": 0.5,
    "floor": 0.5,
    "betas": (0.5, 0.5),
    "clip": None,
    "max_length": 99,
    "overlong": "drop",
    "mixing": 0.5,
    "batching": "packed",
    "max_media": 3,
    "template": "plain",
    "after_media": True,
    "evaluate_every": None,
}
NOT_OF_STAGES = {"lr", "accumulate", "save_every", "recompute", "joint"}
"""Rates are tried; the gradient stays as it is; a joint's own."""
RECIPE: dict[str, Any] = {
    "encoder": "another",
    "more_encoders": {"audio": "whisper"},
    "llm": "another",
    "system": "Be brief.",
    "start": "runs/earlier/sft/model",
    "stages": [],
    "eval": ["presence"],
}
NOT_OF_RECIPES = {"name", "about", "aligner", "engine", "seed", "dtype"}
"""The joint and its name; what changes nothing; what the comparison or the runs themselves tell."""
TRAIN: dict[str, Any] = {"weight_decay": 0.2, "decay_all": True, "mode": "frozen"}
NOT_OF_TRAINING = {"lr"}
ADAPTER: dict[str, Any] = {"r": 8, "alpha": 8.0, "dropout": 0.5, "dora": True}


def differing(one: Recipe, two: Recipe) -> list[str]:
    return [setting.name for setting in settings({"one": one, "two": two}) if not setting.matches]


def training(**changes: Any) -> Recipe:
    """The recipe with another way to train its first glob."""
    (stage,) = BASE.stages
    first = stage.train["connectors.*"].but(**changes)
    return BASE.but(stages=[stage.but(train={**stage.train, "connectors.*": first})])


def test_every_field_that_changes_what_is_learnt_is_in_a_row() -> None:
    (stage,) = BASE.stages
    assert set(Stage.model_fields) == set(STAGE) | NOT_OF_STAGES
    assert set(Recipe.model_fields) == set(RECIPE) | NOT_OF_RECIPES
    assert set(Train.model_fields) == set(TRAIN) | NOT_OF_TRAINING
    assert set(LoRA.model_fields) == set(ADAPTER)
    assert differing(BASE, BASE) == []
    for name, value in STAGE.items():
        assert differing(BASE, BASE.but(stages=[stage.but(**{name: value})])), name
    for name, value in RECIPE.items():
        assert differing(BASE, BASE.but(**{name: value})), name
    for name, value in TRAIN.items():
        assert differing(BASE, training(**{name: value})) == ["what trains"], name
    for name, value in ADAPTER.items():
        assert differing(training(mode=LoRA()), training(mode=LoRA(**{name: value}))) == ["what trains"], name


@pytest.mark.parametrize(
    ("name", "value", "row", "told"),
    [
        ("evaluate_every", None, "validation of stage sft", ("after every 0.25 of it", "at its end")),
        ("evaluate_every", 0.5, "validation of stage sft", ("after every 0.25 of it", "after every 0.5 of it")),
    ],
)
def test_how_often_a_stage_is_validated_is_told(name: str, value: Any, row: str, told: tuple[str, str]) -> None:
    other = BASE.but(stages=[BASE.stages[0].but(**{name: value})])
    found = {setting.name: setting for setting in settings({"one": BASE, "two": other})}
    assert tuple(found[row].values.values()) == told and differing(BASE, other) == [row]


def test_the_model_to_start_with_is_told() -> None:
    other = BASE.but(start="runs/earlier/sft/model")
    found = {setting.name: setting for setting in settings({"one": BASE, "two": other})}
    assert found["starts with"].values == {"one": "its parts", "two": "runs/earlier/sft/model"}
    assert differing(BASE, other) == ["starts with"]


def test_what_trains_is_told_stage_by_stage() -> None:
    every, last = llava(), llava().stages[-1]
    attention = every.but(stages=[*every.stages[:-1], last.but(train={"connectors.*": {}, **ATTENTION_LORA})])
    found = {"every": every, "attention": attention, "none": flamingo()}
    (row,) = [setting for setting in settings(found) if setting.name == "what trains"]
    before = "warm and align: `connectors.*` (full); sft: `connectors.*` (full)"
    assert row.values == {
        "every": f"{before}, `llm.*layers.*` (LoRA of rank 16)",
        "attention": f"{before}, `llm.*self_attn.*` (LoRA of rank 16)",
        "none": "sft: `connectors.*` (full), `llm.*.grafts.gated.*` (full)",
    }
    (stage,) = training(weight_decay=0.1, decay_all=True).stages
    (row,) = [s for s in settings({"one": BASE.but(stages=[stage])}) if s.name == "what trains"]
    first = "`connectors.*` (full, weight decay 0.1, of biases and norms too)"
    assert row.values["one"] == f"sft: {first}, `llm.*` (LoRA of rank 4)"


def test_recipes_that_train_other_parts_are_said_so_in_one_sentence() -> None:
    other = training(mode="frozen")
    outcome: Any = SimpleNamespace(settings=settings({"one": BASE, "two": other}))
    assert advice._mismatch(outcome) == [
        "Settings differ in what trains: the differences are those of whole recipes, not of their joints alone."
    ]
