"""Classes that one process alone knows take part in comparisons of that process alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparing_runs import recipes, small
from isthmus.aligner import JOINTS
from isthmus.aligners.llava import LLaVA
from isthmus.comparing import engine
from isthmus.objectives import TERMS, Objective
from isthmus.types import ConfigError


@pytest.mark.parametrize("kind", ["local", "ray"])
@pytest.mark.parametrize("what", ["aligner", "objective"])
def test_what_other_processes_do_not_know_is_refused_before_any_run(
    tmp_path: Path, embedded: None, monkeypatch: pytest.MonkeyPatch, what: str, kind: str
) -> None:
    base, _ = recipes(tmp_path)
    monkeypatch.setitem(JOINTS.registered, "own", type("Own", (LLaVA,), {"name": "own"}))
    monkeypatch.setitem(TERMS.registered, "own", type("Own", (Objective,), {"name": "own"}))
    stage = base.stages[0]
    changes = {"aligner": {"aligner": "own"}, "objective": {"stages": (stage.but(objectives=["lm", "own"]),)}}
    monkeypatch.setattr(engine, "spawn", lambda *_: pytest.fail("a run was begun"))
    with pytest.raises(ConfigError, match=f"two: the {what} 'own' is registered in this process alone") as caught:
        small(tmp_path, base, base.but(name="two", **changes[what]), engine=kind)
    assert 'engine="here"' in caught.value.remedy and "entry point" in caught.value.remedy
