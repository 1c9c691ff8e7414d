"""A number of minutes for a whole recipe: shares stay, and what is not in minutes is refused."""

from __future__ import annotations

import json
import sys

import pytest

import composed
from isthmus import recipes
from isthmus.cli import app
from isthmus.config import Recipe
from isthmus.errors import ConfigError
from isthmus.recipes.demo import demo
from isthmus.recipes.within import within


def minutes(recipe: Recipe) -> list[float]:
    return [stage.budget.minutes for stage in recipe.stages]


def test_stages_keep_their_shares_by_hand():
    recipe = composed.recipe()
    stage = {"data": ["x"], "train": {"connectors.*": 1e-3}}
    lengths = {"warm": 1.0, "align": 3.0, "sft": 4.0}
    stages = [{"name": name, "budget": {"minutes": length}, **stage} for name, length in lengths.items()]
    made = within(recipe.but(stages=stages), 2.0)
    assert minutes(made) == [0.25, 0.75, 1.0]
    assert made.but(stages=stages) == recipe.but(stages=stages)  # nothing else has changed


@pytest.mark.parametrize("length", [0.7, 3.0, 5.0])
def test_it_is_what_the_demo_means_by_minutes(length):
    assert within(demo(), length) == demo(length)


def test_every_embedded_recipe_can_be_made_to_last_a_minute():
    embedded = [name for name, build in recipes.BOOK.items() if build().llm.architecture is None]
    assert len(embedded) > 20
    for name in embedded:
        assert sum(minutes(within(recipes.named(name), 1.0))) == pytest.approx(1.0, abs=1e-5), name


@pytest.mark.parametrize("name", ["llava-1.5-7b", "mplug-owl-7b"])
def test_steps_and_epochs_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} cannot be made to last 2 minutes: the budget of stage"):
        within(recipes.named(name), 2.0)
    with pytest.raises(ConfigError, match="there is no stage"):
        within(composed.recipe(), 2.0)


def test_on_the_command_line(monkeypatch, capsys, tmp_path):
    """Refusals come before any work; overrides come after the minutes, and another number is another recipe."""

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["isthmus", "train", *words])
        try:
            app.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("llava-1.5-7b", "--minutes", "1") == 2
    assert "stages.NAME.budget={minutes: 1}" in capsys.readouterr().err

    picture = [{"from": "human", "value": "Say a colour."}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": str(n), "conversations": picture} for n in range(4)]))
    train = {"llm.*": 1e-3}
    one = {"name": "one", "data": [str(tmp_path / "data.json")], "train": train, "batch_size": 2}
    stages = [{**one, "budget": {"minutes": 0.1}}, {**one, "name": "two", "budget": {"minutes": 3.9}}]
    recipe = composed.recipe().but(stages=stages)
    recipe.save(tmp_path / "mine.yaml")
    out = str(tmp_path / "run")
    command = [str(tmp_path / "mine.yaml"), "stages.two.budget={steps: 2}", "--out", out, "--device", "cpu"]
    assert run(*command, "--minutes", "0.12") == 0
    known = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["stages"]
    assert [stage["budget"]["minutes"] for stage in known] == [0.003, None]
    frozen = [(tmp_path / "run" / name / "manifest.json").read_text() for name in ("one", "two")]
    assert json.loads(frozen[1])["steps"] == 2
    assert run(*command, "--minutes", "0.12") == 0
    assert [(tmp_path / "run" / name / "manifest.json").read_text() for name in ("one", "two")] == frozen
    assert run(*command, "--minutes", "0.2") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
