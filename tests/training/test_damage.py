"""Ways to damage a checkpoint: each is noticed, the file is named, and the checkpoint before is gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import small
import torch
from test_momentum import OPTIONS, stage
from test_resume import go

from isthmus.config import Recipe
from isthmus.training import checkpoint, optimizer
from isthmus.training.checkpoint import Checkpoints, State
from isthmus.training.step import Step

FILES = (checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.DRIFTING, checkpoint.STATE, checkpoint.MANIFEST)


def flip(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, random: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def delete(file: Path, random: Random) -> None:
    file.unlink()


Harm = Callable[[Path, Random], None]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with a slow copy and a queue, and a folder with its checkpoints of the third and the fourth step."""
    folder = tmp_path_factory.mktemp("run")
    recipe = small.parts(folder / "parts").but(aligner={"name": "blip2", "options": OPTIONS})
    go(recipe, stage(save_every=1 / 6), folder, stop_at=3)
    sound = folder / "checkpoints"
    assert sorted(path.name for path in sound.iterdir()) == ["step-0000003", "step-0000004"]
    assert all({path.name for path in saved.iterdir()} == set(FILES) for saved in sound.iterdir())
    return recipe, sound


class Going:
    """Goes on in a copy of the checkpoints, as often as asked."""

    def __init__(self, recipe: Recipe, sound: Path, folder: Path):
        self.sound, self.folder, self.said = sound, folder, list[str]()
        step = Step(small.build(recipe), stage().objectives)
        trained = optimizer.choose(step, stage())
        step.accompany()
        self.checkpoints = Checkpoints(folder, step, trained, optimizer.adamw(trained, (0.9, 0.999)), self.said.append)

    def after(self, *harms: tuple[str, str, Harm], random: Random) -> State:
        """Where it goes on once some files are harmed: (folder, file, how)."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.sound, self.folder)
        for folder, file, harm in harms:
            harm(self.folder / folder / file, random)
        self.said.clear()
        return self.checkpoints.resume()

    def holds(self, step: int) -> bool:
        """Whether the weights are those of that step."""
        weights = safetensors.torch.load_file(self.sound / f"step-{step:07d}" / checkpoint.WEIGHTS)
        moving = self.checkpoints._moving()
        return all(torch.equal(moving[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_damaged_checkpoints(kept: tuple[Recipe, Path], tmp_path: Path, count: int) -> None:
    going, random = Going(*kept, tmp_path / "checkpoints"), Random(count)
    assert going.after(random=random).step == 4 and going.holds(4) and not going.said
    cases: list[tuple[str, Harm]] = [(file, delete) for file in FILES]
    cases += [(FILES[number % 5], (flip, truncate)[number // 5 % 2]) for number in range(count - len(FILES))]
    for file, harm in cases:
        state = going.after(("step-0000004", file, harm), random=random)
        assert state.step == 3 and going.holds(3), (file, harm)
        (line,) = going.said
        # a manifest that still reads as one blames the file that it no longer fits
        named = going.folder / "step-0000004" / ("" if file == checkpoint.MANIFEST else file)
        assert line.startswith(str(named)) and line.endswith("going back to the checkpoint before"), (file, harm, line)
        assert [path.name for path in going.folder.iterdir()] == ["step-0000003"]


def test_what_others_put_beside_checkpoints_is_left_alone(kept: tuple[Recipe, Path], tmp_path: Path) -> None:
    going = Going(*kept, tmp_path / "checkpoints")

    def copy(file: Path, random: Random) -> None:
        shutil.copytree(file.parent, file.parent.with_name("step-0000009.bak"))

    assert going.after(("step-0000004", checkpoint.STATE, copy), random=Random(0)).step == 4
    assert (going.folder / "step-0000009.bak").is_dir() and not going.said


def test_where_none_is_sound_it_begins_again(kept: tuple[Recipe, Path], tmp_path: Path) -> None:
    going = Going(*kept, tmp_path / "checkpoints")
    harms = [(f"step-000000{step}", checkpoint.MOMENTS, flip) for step in (3, 4)]
    assert going.after(*harms, random=Random(0)) == State()
    assert [checkpoint.MOMENTS in line for line in going.said] == [True, True]
    assert not list(going.folder.iterdir())


def test_a_manifest_is_no_use_for_another_checkpoint(kept: tuple[Recipe, Path], tmp_path: Path) -> None:
    """What is sound by itself but not what was saved: files of the step before."""
    going = Going(*kept, tmp_path / "checkpoints")

    def older(file: Path, random: Random) -> None:
        shutil.copy(file.parent.parent / "step-0000003" / file.name, file)

    for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.STATE):
        assert going.after(("step-0000004", file, older), random=Random(0)).step == 3
        assert str(going.folder / "step-0000004" / file) in going.said[0]
    assert json.loads((going.sound / "step-0000004" / checkpoint.STATE).read_text())["step"] == 4
