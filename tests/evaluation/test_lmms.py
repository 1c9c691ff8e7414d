"""lmms-eval loads a directory of ours by its own registry, and is told what the model says without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import composed
import isthmus
from isthmus.speakers.local import Local
from isthmus.types import Turn

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own")


def test_the_registry_finds_it_and_it_answers(tmp_path: Path) -> None:
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
