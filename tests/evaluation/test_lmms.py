"""lmms-eval loads a directory of ours by its own registry, and is told what the model says without it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

import composed
import isthmus
from isthmus.speakers.local import Local
from isthmus.types import Turn


def test_the_registry_finds_it_and_it_answers(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from isthmus.evaluation import lmms

    composed.stir(composed.model()).save_pretrained(tmp_path / "model")
    registry = ModelRegistryV2()
    registry.register_manifest(lmms.manifest)
    found = registry.get_model_class("isthmus").create_from_arg_string(
        f"pretrained={tmp_path / 'model'}", {"batch_size": 2, "device": "cpu"}
    )
    pictures = [composed.picture(seed).source for seed in range(3)]
    found.task_dict = {"own": {"test": [{"image": picture} for picture in pictures]}}
    greedy = {"max_new_tokens": 8, "temperature": 0}
    ways = [greedy, greedy | {"until": ["\n\n"]}, greedy]
    requests = [
        SimpleNamespace(args=(f"What {n}?", way, lambda row: [row["image"]], n, "own", "test"))
        for n, way in enumerate(ways)
    ]
    model = isthmus.load(tmp_path / "model")
    alone = [
        Local(model, max_new_tokens=8).say([Turn.say("user", composed.picture(n), f"What {n}?")]) for n in range(3)
    ]
    assert found.generate_until(requests) == [alone[0], alone[1].partition("\n\n")[0].strip(), alone[2]]
    with pytest.raises(NotImplementedError, match="isthmus eval"):
        found.loglikelihood([])


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the file defines, with as little in place of lmms-eval as it needs to be imported."""
    needed = {"api.model": {"lmms": object}, "models.registry_v2": {"ModelManifest": lambda *given, **named: given}}
    for name, content in needed.items():
        module = ModuleType(f"lmms_eval.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return runpy.run_path(str(Path(isthmus.__file__).parent / "evaluation" / "lmms.py"))


def test_tokens_are_drawn_from_as_many_as_transformers_draws_from_by_itself(bridge: dict[str, Any]) -> None:
    decoding, most = bridge["_decoding"], GenerationConfig._get_default_generation_params()["top_k"]
    assert decoding({"temperature": 0.7, "top_p": 0.9}) == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": most,
    }
    assert decoding({"temperature": 0.7, "top_k": 5})["top_k"] == 5
    for greedy in ({}, {"temperature": 0, "top_p": 1.0, "top_k": 5, "do_sample": True}, {"temperature": None}):
        assert decoding(greedy | {"until": ["\n"], "max_new_tokens": 8}) == {"do_sample": False, "max_new_tokens": 8}
