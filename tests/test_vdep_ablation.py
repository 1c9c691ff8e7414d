"""The ablation's figures: differences are formed seed by seed, and only what its interval tells apart is called so."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.evaluation.answers import Prediction
from isthmus.objectives import named

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
NUMBERS = {"steps": 60, "warm": 5, "align": 5, "pool": 5, "pictures": 9, "batch": 4, "items": 1}


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("vdep_ablation")


def effects_besides() -> tuple[str, ...]:
    return importlib.import_module("vdep_ablation").BESIDES


def leave(effects: Any, folder: Path, setting: str, captions: list[float], presence: list[float]) -> None:
    for seed, (nll, right) in enumerate(zip(captions, presence)):
        at = folder / f"seed-{seed}" / setting
        at.mkdir(parents=True)
        rows = {"Captions, nats": nll, "Presence": right} | dict.fromkeys(effects_besides(), 1.0)
        effects.keep(at / "figures.json", {name: effects.alone(value) for name, value in rows.items()}, NUMBERS)


def test_differences_are_paired_and_judged_by_their_interval(ablation: Any, tmp_path: Path, monkeypatch: Any) -> None:
    leave(ablation.effects, tmp_path, "llava", [1.0, 2.0, 3.0], [0.5, 0.6, 0.7])
    leave(ablation.effects, tmp_path, "vdep", [0.9, 1.9, 2.9], [0.6, 0.5, 0.7])  # seeds differ by ten times the effect
    leave(ablation.effects, tmp_path, "shift-0", [1.0, 2.0], [0.5, 0.5])  # not all seeds are finished
    leave(ablation.effects, tmp_path, "llava-few-captions", [3.0, 3.0, 3.0], [0.5, 0.5, 0.5])
    leave(ablation.effects, tmp_path, "vdep-few-captions", [2.0, 2.0, 2.0], [0.5, 0.5, 0.5])
    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    told = ["--collect", "--write", "--out", str(tmp_path), "--json", str(tmp_path / "a.json")]
    told += [part for name, value in NUMBERS.items() for part in (f"--{name}", str(value))]
    told += ["--settings", "LLaVA", "VDEP", "shift 0", "LLaVA, few captions", "VDEP, few captions"]
    assert ablation.main(told) == 1
    result = json.loads((tmp_path / "a.json").read_text())
    assert [case["cell"] for case in result["cases"]] == [
        *("LLaVA", "VDEP"),
        *("LLaVA, few captions", "VDEP, few captions"),
    ]
    assert result["cases"][3]["gaps"]["Captions, nats"]["value"] == -1  # from the first of its own group
    gaps = result["cases"][1]["gaps"]
    captions, presence = gaps["Captions, nats"], gaps["Presence"]
    assert [captions["value"], captions["low"], captions["high"]] == pytest.approx([-0.1] * 3)
    assert presence["high"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3) == -presence["low"]
    page = (tmp_path / "page.md").read_text()
    assert "- VDEP: better on Captions, nats" in page and "Not trained under all seeds: shift 0." in page
    assert "**-0.100 [-0.100, -0.100]**" in page and "0.000 [-0.248, 0.248]" in page and "**0.000" not in page
    assert result["cases"][0]["levels"]["Captions, nats"]["each"] == [1.0, 2.0, 3.0]
    drawing = (tmp_path / "page.svg").read_text()
    assert drawing.count('<g class="better">') == 2 and drawing.count('<g class="open">') == 2  # captions, presence
    with pytest.raises(SystemExit, match="was made with"):
        ablation.main([*told, "--items", "2"])


def test_settings_differ_from_the_recipe_in_what_they_say(ablation: Any) -> None:
    options = ablation.argparse.Namespace(pool=7, warm=1, align=1, steps=5, pictures=50, batch=3)
    shared = {setting: ablation.stages(0, setting, options) for setting in ablation.SETTINGS}
    groups = ablation.GROUPS.values()
    assert all(len({shared[name][0].fingerprint() for name in settings}) == 1 for settings in groups)
    assert len({last.fingerprint() for _, last in shared.values()}) == len(ablation.SETTINGS)
    assert [term.name for term in shared["LLaVA"][1].stages[0].objectives] == ["lm"]
    frozen = [shared[name][1].stages[0] for name in ablation.ALIGN]
    assert all(set(stage.train) == {"connectors.*"} for stage in frozen)
    assert [[term.weight for term in stage.objectives] for stage in frozen] == [[1.0], [1.0, 0.1], [1.0, 1.0]]
    assert all(last.stages[0].budget.steps == 5 and last.stages[0].batch_size == 3 for _, last in shared.values())
    sources = [source for legs in shared["VDEP"] for stage in legs.stages for source in stage.data]
    assert {source.limit or source.options["count"] for source in sources} == {50}
    *few, pictures = shared["VDEP, few captions and bare pictures"][1].stages[0].data
    assert {source.limit or source.options["count"] for source in few} == {5}
    assert {source.get("limit") or source["options"]["count"] for source in pictures.options["of"]} == {50}


def test_what_the_paper_leaves_open_is_swept(ablation: Any) -> None:
    options = ablation.argparse.Namespace(pool=7, warm=1, align=1, steps=5, pictures=50, batch=3)
    given = [ablation.stages(0, setting, options)[1].stages[0].objectives for setting in ablation.TERM]
    terms = [named(term.name, term.options) for objectives in given for term in objectives if term.name == "vdep"]
    assert {term.options.distance for term in terms} == {"mse", "cosine", "smooth-l1"}
    assert {term.options.layer for term in terms} == {"last", "before", 20}
    for what, values in {"shift": {0, 1}, "detach": {True, False}, "mix_by": {"sample", "batch"}}.items():
        assert {getattr(term.options, what) for term in terms} == values


def test_quick_changes_what_was_not_given_and_shares_seeds_out(ablation: Any, monkeypatch: Any, tmp_path: Path) -> None:
    started: list[tuple[list[str], str]] = []

    class Job:
        def __init__(self, command: list[str], env: dict[str, str]):
            started.append((command, env["OMP_NUM_THREADS"]))

        def wait(self) -> int:
            return 0

        def terminate(self) -> None: ...

    monkeypatch.setattr(ablation.effects, "subprocess", SimpleNamespace(Popen=Job))
    monkeypatch.setattr(ablation.effects.os, "cpu_count", lambda: 2)
    told = ["--quick", "--steps", "7", "--out", str(tmp_path), "--json", str(tmp_path / "a.json")]
    assert ablation.main(told) == 1  # nothing was trained
    assert [(command[-2:], threads) for command, threads in started] == [(["0", "2"], "1"), (["1", "3"], "1")]
    assert all(command[2:9] == told for command, _ in started)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["steps"] == 7 and result["pool"] == ablation.QUICK["pool"] and result["cases"] == []


def test_rows_in_nats_are_the_right_choices_share_among_the_choices(ablation: Any) -> None:
    made = ablation.effects._nats([prediction("a", (0.0, math.log(3)), "yes"), prediction("b", (0.0, 0.0), "no")])
    assert made.totals == pytest.approx((math.log(4), math.log(2))) and made.clusters == ("a", "b")


def prediction(name: str, scores: tuple[float, float], answer: str) -> Prediction:
    return Prediction(name, "presence", None, "?", ("yes", "no"), scores, "yes", answer, 1.0, name)


def test_work_goes_on_where_it_stopped_and_ends_in_time(ablation: Any, tmp_path: Path, monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(ablation.effects.time, "monotonic", lambda: now[0])
    done: list[int] = []

    def make(number: int) -> None:
        now[0] += 60
        done.append(number)
        (tmp_path / str(number)).touch()

    def run(minutes: float) -> None:
        cells = [(tmp_path / str(number), lambda number=number: make(number)) for number in range(5)]
        ablation.effects.work(cells, minutes, lambda: None)

    run(2.5)  # a third one would end after three minutes
    assert done == [0, 1]
    run(60)
    assert done == [0, 1, 2, 3, 4]
