"""Whether a comparison notices that a picture is another one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image as Pillow

from isthmus.comparing import shown
from isthmus.comparing.plan import Common, Plan
from isthmus.config import Source, TaskConfig
from isthmus.recipes.llava import llava
from isthmus.types import ConfigError, Image, Sample, Turn


def test_a_picture_that_was_overwritten_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that names it is as it was; put back, all is as before, whenever it was written."""
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    place = tmp_path / "comparison"
    said = [{"image": f"{n}.bmp", "question": "what?", "answer": "cat"} for n in range(3)]
    for n in range(3):
        Pillow.new("RGB", (8, 8), (9 * n, 0, 0)).save(tmp_path / f"{n}.bmp")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(said))
    mine = Source(name=str(file), images=str(tmp_path))
    asked = TaskConfig(name="exact", options={"data": {"name": str(file), "images": str(tmp_path)}})
    recipe = llava().but(name="one")
    stage = recipe.stages[-1].but(data=(mine,))
    plan = Plan(
        recipes={"one": recipe.but(stages=(stage,))},
        common=Common(eval=(asked,)),
        budget="5-steps",
        seeds=(0,),
        baseline="one",
    )
    (place / "one" / "seed0").mkdir(parents=True)
    (place / "one" / "seed0" / "run.json").touch()
    plan.check_data(place)
    stamps = plan._stamps()
    before = (tmp_path / "1.bmp").read_bytes()
    Pillow.new("RGB", (8, 8), (0, 99, 0)).save(tmp_path / "1.bmp")
    with pytest.raises(ConfigError, match="what is asked about is not what the runs in"):
        plan.check_data(place)
    changed = {what for what, digits in plan._stamps().items() if stamps[what] != digits}
    assert changed == {"what is asked about", *(what for what in stamps if what.endswith(" shows"))}
    assert len(changed) == 2 and len(stamps) == 4
    (tmp_path / "1.bmp").write_bytes(before)
    os.utime(tmp_path / "1.bmp", (1, 1))
    plan.check_data(place)


def test_files_are_known_by_their_ends_and_a_missing_one_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.bmp"
    samples = [Sample((Turn.say("user", Image(file), "?"),))]
    known = set()
    for written in (b"", b"a", bytes(3 * shown.END), b"a" + bytes(3 * shown.END - 1), bytes(3 * shown.END - 1) + b"a"):
        file.write_bytes(written)
        known.add(shown.digits(samples))
    file.unlink()
    assert len(known | {shown.digits(samples)}) == 6
    assert shown.digits([Sample((Turn.say("user", "?"),))]) is None
