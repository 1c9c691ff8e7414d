"""Training from shards resumes to the bit, whatever they are packed in, and never waits at the end of one."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from test_resume import Line, equal, shaped, through

from isthmus.config import Recipe
from isthmus.training.toy import toy

SHARDS = (1, 7, 12)
"""Records of each; one has fewer than there are workers."""
MOMENTS = {"within a split step": [5], "twice, over an epoch's edge": [7, 1], "in both stages": [5, 11]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two stages of two epochs each over 20 rows in one file."""
    recipe = toy(tmp_path_factory.mktemp("toy"), rows=sum(SHARDS))
    changes = {"batch_size": 8, "budget": {"steps": 5}, "save_every": 0.4, "evaluate_every": None, "max_length": 256}
    return recipe.but(stages=[stage.but(**changes) for stage in recipe.stages])


@pytest.fixture(scope="module")
def alone(pair: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """What comes of the one file, without workers, when nothing happens."""
    return through(shaped(pair, "bucketed", 2, 0), tmp_path_factory.mktemp("whole") / "run")


def lines(file: Path, rows: list[dict[str, Any]], pictures: Path) -> None:
    for row in rows:
        (file.parent / row["image"]).write_bytes((pictures / row["image"]).read_bytes())
    file.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))


def tars(file: Path, rows: list[dict[str, Any]], pictures: Path) -> None:
    with tarfile.open(file.with_suffix(".tar"), "w") as tar:
        for row in rows:
            told = json.dumps({key: value for key, value in row.items() if key != "image"}).encode()
            for ending, data in (("json", told), ("png", (pictures / row["image"]).read_bytes())):
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def parquet(file: Path, rows: list[dict[str, Any]], pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = [{**row, "image": {"bytes": (pictures / row["image"]).read_bytes(), "path": None}} for row in rows]
    datasets.Dataset.from_list(held).to_parquet(file.with_suffix(".parquet"))


def sharded(recipe: Recipe, write: Callable[[Path, list[dict[str, Any]], Path], None], folder: Path) -> Recipe:
    """The same recipe over the same records in shards."""
    source = Path(recipe.stages[0].data[0].name)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    folder.mkdir()
    for number, size in enumerate(SHARDS):
        start = sum(SHARDS[:number])
        write(folder / str(number), rows[start : start + size], source.parent)
    return recipe.but(stages=[stage.but(data=[str(folder)]) for stage in recipe.stages])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_over_tars_with_a_worker_equals_one_file_left_alone(pair: Recipe, alone: Line, tmp_path: Path) -> None:
    recipe = shaped(sharded(pair, tars, tmp_path / "shards"), "bucketed", 2, 1)
    found = through(recipe, tmp_path / "run", MOMENTS["twice, over an epoch's edge"])
    assert len(found.losses) == 10
    equal(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("write", [lines, tars, parquet])
@pytest.mark.parametrize("moments", MOMENTS)
def test_all_shards(
    pair: Recipe,
    alone: Line,
    tmp_path: Path,
    workers: int,
    write: Callable[[Path, list[dict[str, Any]], Path], None],
    moments: str,
) -> None:
    recipe = shaped(sharded(pair, write, tmp_path / "shards"), "bucketed", 2, workers)
    equal(through(recipe, tmp_path / "run", MOMENTS[moments]), alone)
