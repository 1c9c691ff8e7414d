"""What a recipe from somebody else's file may say: names that are no paths, numbers that are numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.config import Recipe, read
from isthmus.recipes import BOOK
from isthmus.types import ConfigError

STAGE = "stages: [{{name: one, data: [scenes], train: {{'connectors.*': 1e-3}}, budget: {{steps: 1}}, {field}}}]"


def refused(folder: Path, text: str) -> str:
    file = folder / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "..", ".", "a/b", "a\\\\b", ".hidden", "-rf", " x", "", "a\\0b", "a\\nb", "n" * 101],
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Runs are kept in a folder of the recipe's name."""
    assert "name: String should" in refused(tmp_path, f'name: "{name}"')


@pytest.mark.parametrize("name", ["llava-1.5_7b", "it's mine", "größe 2", "模型", "a..b", "x" * 100])
def test_a_name_is_one_folder_below_where_runs_are_kept(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.yaml"
    Recipe(name=name).save(file)
    folder = tmp_path / read(file).name
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()


def test_names_of_the_book_are_kept() -> None:
    for name in ("llava", "vdep", "lion", "flamingo"):
        assert BOOK[name]().name


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("field", ["lr", "clip", "warmup", "mixing", "evaluate_every", "save_every"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, field: str, value: str) -> None:
    assert f"stages.0.{field}: Input should be a finite number" in refused(
        tmp_path, STAGE.format(field=f"{field}: {value}")
    )


@pytest.mark.parametrize(
    "field",
    ["evaluate_every: 0", "evaluate_every: 1.01", "save_every: 0", "save_every: 2", "clip: 0", "clip: -1", "lr: 0"]
    + ["betas: [0.9, 1]", "betas: [-0.1, 0.9]", "warmup: 1", "batch_size: 0"],
)
def test_a_number_out_of_bounds_is_refused(tmp_path: Path, field: str) -> None:
    assert "Input should be" in refused(tmp_path, STAGE.format(field=field))
    assert read_one(tmp_path, "warmup: 0.5").stages[0].warmup == 0.5


def read_one(folder: Path, field: str) -> Recipe:
    file = folder / "ours.yaml"
    file.write_text(STAGE.format(field=field), encoding="utf-8")
    return read(file)


@pytest.mark.parametrize("budget", ["{minutes: .inf}", "{epochs: .nan}", "{epochs: .inf}", "{steps: -1}"])
def test_a_budget_ends(tmp_path: Path, budget: str) -> None:
    text = STAGE.format(field="lr: 1e-3").replace("{steps: 1}", budget)
    assert "stages.0.budget" in refused(tmp_path, text)
