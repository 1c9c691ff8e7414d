"""The script behind `docs/results/lion.md`: equal steps in every cell, honest collecting, a page from figures alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from isthmus.prepare.tags import Tagging

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def effects(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("lion_effects")


def figures(effects, folder: Path, values: dict[str, list[float]], steps: int = 40) -> list[str]:
    """Write what runs would leave, and return the arguments that read it."""
    arguments = [
        "--experiments",
        "tags",
        "--steps",
        str(steps),
        "--items",
        "10",
        "--pictures",
        "5",
        "--warm",
        "3",
        "--out",
        str(folder),
    ]
    for cell, seeds in values.items():
        for seed, value in enumerate(seeds):
            name = cell.replace(" %", "").replace(",", "").replace(" ", "-")
            file = folder / "tags" / name / f"seed-{seed}" / "figures.json"
            file.parent.mkdir(parents=True)
            rows = {"Presence": effects.effects.alone(value), "Captions, nats": effects.effects.alone(3 - value)}
            effects.effects.keep(file, rows, {"steps": 40, "warm": 3, "pictures": 5, "items": 10})
    return [*arguments, "--collect", "--json", str(folder / "found.json")]


def test_every_cell_has_as_many_steps_and_the_stages_that_it_names(effects):
    for experiment in effects.EXPERIMENTS.values():
        for cell in experiment.cells.values():
            recipe = effects.recipe_of(cell, seed=2, total=101, pictures=30)
            assert [stage.name for stage in recipe.stages] == list(cell.legs)
            assert sum(stage.budget.steps for stage in recipe.stages) == 101
            assert {source.options["count"] for stage in recipe.stages for source in stage.data} == {30}
            assert recipe.seed == 2


def test_all_cells_begin_with_connectors_of_their_own_shape(effects):
    for name, cell in effects.EXPERIMENTS["depth"].cells.items():
        warm, recipe = effects.warm_of(cell, 1, 7, 30), effects.recipe_of(cell, 1, 9, 30)
        assert warm.encoder == recipe.encoder and warm.stages[0].budget.steps == 7, name
        parts = ("queries", "layers", "width", "aggregator", "normalise", "visual_input")
        assert [warm.aligner.options.get(part) for part in parts] == [
            recipe.aligner.options.get(part) for part in parts
        ]
    assert set(effects.QUICK["cells"]) <= {cell for trial in effects.EXPERIMENTS.values() for cell in trial.cells}


def test_cells_differ_in_what_they_are_named_for(effects):
    conflict, depth, tags = (effects.EXPERIMENTS[name].cells for name in ("conflict", "depth", "tags"))
    told = {name: effects.recipe_of(cell, 0, 9, 9).aligner.options["mixture"] for name, cell in conflict.items()}
    assert list(told.values()) == ["none", "hard", "routed", "routed"]
    assert [len(effects.recipe_of(cell, 0, 9, 9).encoder.taps) for cell in depth.values()] == [0, 2]
    for name, cell in tags.items():
        recipe = effects.recipe_of(cell, 0, 9, 9)
        asked = effects.tasks_of(effects.EXPERIMENTS["tags"], cell, 7)
        if name == "none":
            assert not any(source.tags for source in recipe.stages[0].data) and not asked[0].options
            continue
        how, _, percent = name.removesuffix(" % wrong").partition(", ")
        assert recipe.aligner.options["tags"] == how
        assert {Tagging(**source.tags).wrong for source in recipe.stages[0].data} == {int(percent) / 100}
        assert {task.options["tags"]["wrong"] for task in asked} == {int(percent) / 100}


def test_differences_are_paired_by_seed_and_bold_only_where_their_interval_leaves_zero_out(effects, tmp_path, capsys):
    """Seeds .5 .6 .7 against .6 .7 .81: differences .1 .1 .11, whose interval by hand is ± 4.303 * .00577 / sqrt(3)."""
    values = {"none": [0.5, 0.6, 0.7], "hard, 50 % wrong": [0.6, 0.7, 0.81], "soft, 50 % wrong": [0.7, 0.6, 0.5]}
    assert effects.main(figures(effects, tmp_path, values)) == 1  # other cells are left to do
    shown = capsys.readouterr().out
    assert "**0.103 [0.089, 0.118]**" in shown
    assert "0.000 [-0.497, 0.497]" in shown and "**0.000" not in shown
    (hard, soft) = json.loads((tmp_path / "found.json").read_text())["experiments"]["tags"]["cells"][1:]
    assert hard["gaps"]["Presence"]["value"] == pytest.approx(0.31 / 3)
    assert soft["cell"] == "soft, 50 % wrong"
    (pair,) = json.loads((tmp_path / "found.json").read_text())["experiments"]["tags"]["pairs"]
    assert (pair["minus"], pair["cell"]) == ("hard, 50 % wrong", "soft, 50 % wrong")
    assert pair["gaps"]["Presence"]["value"] == pytest.approx((0.1 - 0.1 - 0.31) / 3)


def test_a_cell_counts_only_when_all_its_seeds_are_there(effects, tmp_path):
    effects.main(figures(effects, tmp_path, {"none": [0.5, 0.6, 0.7], "hard, 0 % wrong": [0.6, 0.7]}))
    cases = json.loads((tmp_path / "found.json").read_text())["experiments"]["tags"]["cells"]
    assert [case["cell"] for case in cases] == ["none"]


def test_figures_of_other_steps_are_refused(effects, tmp_path):
    with pytest.raises(SystemExit, match="was made with"):
        effects.main(figures(effects, tmp_path, {"none": [0.5, 0.6, 0.7]}, steps=50))


def test_the_page_says_what_is_told_apart_and_what_was_not_trained(effects, tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "PAGE", tmp_path / "results" / "lion.md")
    values = {"none": [0.5, 0.6, 0.7], "hard, 50 % wrong": [0.6, 0.7, 0.81], "soft, 50 % wrong": [0.7, 0.6, 0.5]}
    effects.main([*figures(effects, tmp_path, values), "--write"])
    page = effects.PAGE.read_text()
    assert "- hard, 50 % wrong: better on Presence" in page and "Captions, nats" in page
    assert "- soft, 50 % wrong: cannot be told apart from the first row." in page
    assert "| soft, 50 % wrong, minus hard, 50 % wrong |" in page
    assert "Not trained for all seeds yet: hard, 0 % wrong," in page and "40 in every cell" in page


def test_experiments_that_were_not_asked_for_stay_as_they_were(effects, tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "PAGE", tmp_path / "results" / "lion.md")
    monkeypatch.setattr(effects.harness, "RESULTS", tmp_path)
    before = effects.main([*figures(effects, tmp_path, {"none": [0.5, 0.6, 0.7]}), "--write"])
    saved = json.loads((tmp_path / "found.json").read_text())
    kept = saved["experiments"] | {"depth": saved["experiments"]["tags"] | {"steps": 77}}
    (tmp_path / "lion_effects.json").write_text(json.dumps({"experiments": kept}))
    again = effects.main([*figures(effects, tmp_path / "more", {"none": [0.9, 0.9, 0.9]}), "--write"])
    depth, tags = effects.PAGE.read_text().split("## Tags")
    assert before == again == 1
    assert "0.600 [" in depth and "77 in every cell" in depth
    assert "0.900 [" in tags and "0.600 [" not in tags
