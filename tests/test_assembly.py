"""What a stage may set of the joint: the model that goes on is the one that is saved, or the stage is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import composed
import isthmus
from isthmus.assembly import rejoin
from isthmus.config import LoRA
from isthmus.model import VLM
from isthmus.types import ConfigError
from test_contract import BROAD, JOINTS, newborn

ADAPTER = {"lower": 1, "prompts": 3}
LATENTS = {"latents": 5, "depth": 2, "heads": 2, "head_width": 8}
POOL = {"size": 24}
FITTING = [
    ("ee_mllm", {}, {"visual": "ffn"}),
    ("ee_mllm", {}, {"free": True}),
    ("ee_mllm", {"normalise": True}, {"words": 0.05, "visual": "ffn"}),
    ("flamingo", LATENTS, {"gate": 0.5}),
    ("cogvlm", {}, {"split": False}),
    ("cogvlm", {}, {"start": "random"}),
    ("saisa", {"inner": 16}, {"normalise": True}),
    ("victor", POOL, {"share": 0.5}),
    ("llava", {"normalise": True}, {"words": 0.05}),
]
CHANGING = [
    ("ee_mllm", {}, {"layers": [0]}),
    ("ee_mllm", {}, {"compute": "rule"}),
    ("ee_mllm", {"visual": "keys"}, {"visual": "ffn"}),
    ("ee_mllm", {"layers": [0]}, {"layers": None}),
    ("flamingo", LATENTS, {"every": 2}),
    ("cogvlm", {}, {"every": 2}),
    ("cogvlm", {}, {"where": "attention"}),
    ("llama_adapter", {**ADAPTER, "tune": "bias"}, {"tune": "none"}),
    ("llama_adapter", ADAPTER, {"tune": "bias"}),
    ("victor", POOL, {"size": None}),
]


def stirred(joint: str, options: dict[str, Any]) -> VLM:
    return composed.stir(composed.model(aligner=joint, options=options))


def logits(model: VLM) -> torch.Tensor:
    """With gradients: some joints ask whether they are recorded."""
    output = model.run(model.processor.collator()(composed.MIX))
    return output.head(output.hidden_BTD).detach()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("joint", "options", "change"), FITTING)
def test_the_model_that_goes_on_is_the_one_that_is_saved(joint, options, change, recorded, tmp_path):
    model = stirred(joint, options)
    rejoin(model, change)
    whole = composed.model(aligner=joint, options={**options, **change})
    whole.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(logits(model), logits(whole))
        assert torch.equal(logits(isthmus.load(tmp_path)), logits(whole))


@pytest.mark.parametrize(("joint", "options", "change"), CHANGING)
def test_what_adds_or_takes_away_a_part_is_refused_and_nothing_is_changed(joint, options, change):
    model = stirred(joint, options)
    before, modules = logits(model), dict(model.named_modules())
    with pytest.raises(ConfigError, match=f"change what {joint} consists of"):
        rejoin(model, change)
    assert torch.equal(logits(model), before) and modules == dict(model.named_modules())
    assert set(model.config.aligner["options"]) == set(options)


@pytest.mark.parametrize(("joint", "family"), sorted(BROAD))
def test_no_other_option_changes_nothing(joint, family):
    model = composed.stir(newborn(joint, family))
    model.add_lora(["llm.*"], LoRA(r=2), "first")
    before = {name: tensor.clone() for name, tensor in composed.stir(model).state_dict().items()}
    told, frozen = logits(model), [name for name, each in model.named_parameters() if not each.requires_grad]
    rejoin(model, dict(JOINTS[joint].options))
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), told)
    assert frozen == [name for name, each in model.named_parameters() if not each.requires_grad]


@pytest.mark.parametrize(
    ("joint", "options", "change", "globs"),
    [
        ("llava", {"normalise": True}, {"words": 0.05}, ["connectors.*"]),
        ("victor", POOL, {"share": 0.5}, ["heads.tell", "connectors.*"]),
        ("ee_mllm", {}, {"visual": "ffn"}, ["connectors.*", "llm.*"]),
    ],
)
@torch.no_grad()
def test_lora_of_earlier_stages_stays_on(joint, options, change, globs, tmp_path):
    def adapted(options: dict[str, Any]) -> VLM:
        model = composed.model(aligner=joint, options=options)
        model.add_lora(globs, LoRA(r=2), "first")
        model.add_lora(globs[:1], LoRA(r=3, dora=True), "second")
        return model

    model, whole = composed.stir(adapted(options)), adapted({**options, **change})
    whole.load_state_dict(model.state_dict())
    rejoin(model, change)
    assert torch.equal(logits(model), logits(whole))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(isthmus.load(tmp_path)), logits(whole))
