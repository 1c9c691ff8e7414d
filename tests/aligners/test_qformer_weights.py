"""What a Q-Former begins as: from there BERT and BLIP-2 compute the same, and one of ours is equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

import composed
import isthmus
import tiny
from isthmus import planning
from isthmus.config import Recipe
from isthmus.connectors.qformer import QFormer
from isthmus.connectors.qformer_weights import take_over
from isthmus.model import VLM
from isthmus.recipes.blip2 import BERT as BERT_SOURCE
from isthmus.recipes.blip2 import blip2, instructblip
from isthmus.recipes.lion import lion
from isthmus.types import ConfigError

SHAPE: dict[str, Any] = {
    "queries": 3,
    "layers": 3,
    "width": 16,
    "heads": 2,
    "inner": 24,
    "dropout": 0.0,
    "positions": 12,
}
WHOLE = {**SHAPE, "text": True, "vocabulary": tiny.VOCAB + 1}
IDS = torch.tensor([[4, 7, 9, 11, 2], [4, 8, 2, -1, -1]])
BERT = BertConfig(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=tiny.VOCAB,
    max_position_embeddings=12,
)


def saved(folder: Path, kind: type[PreTrainedModel] = BertForMaskedLM, old: bool = False) -> tuple[str, Any]:
    """A BERT with weights that tell, in a folder; `old` names norms as the checkpoint on the hub does."""
    model = kind(BERT).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if old:
        file = folder / "model.safetensors"
        ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = load_file(file)
        for new, former in ends.items():
            state = {name.replace(new, former): tensor for name, tensor in state.items()}
        save_file(state, file)
    return str(folder), model


def newborn(joint: str, options: dict[str, Any], *qformer: str) -> VLM:
    return isthmus.compose(composed.recipe("llama", joint, {**options, **({"qformer": qformer} if qformer else {})}))


def former(model: VLM) -> Any:
    return model.connectors["image"]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in one.items() if name in other and torch.equal(tensor, other[name])}


def joint(model: VLM) -> dict[str, Tensor]:
    return former(model).state_dict()


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["names of today", "names of the hub"])
def test_a_text_half_that_begins_as_bert_reads_and_writes_as_bert(tmp_path: Path, old: bool, capfd: Any) -> None:
    folder, bert = saved(tmp_path, old=old)
    ours, without = newborn("blip2", WHOLE, folder), newborn("blip2", WHOLE)
    mask = (IDS >= 0).long()
    expected = bert.bert(IDS.clamp(min=0), attention_mask=mask).last_hidden_state[IDS >= 0]
    states = former(ours).read(IDS)[IDS >= 0]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    logits = bert(IDS.clamp(min=0), attention_mask=mask).logits[IDS >= 0]
    found = former(ours).heads.write(states, former(ours).words)
    torch.testing.assert_close(found[:, : tiny.VOCAB], logits, atol=1e-5, rtol=1e-5)
    # the entry that starts a caption, the queries' own path to the picture and their heads are newborn, and no more
    assert torch.equal(former(ours).words.word.weight[-1], former(without).words.word.weight[-1])
    assert former(ours).heads.bias[-1] == 0
    kept = ("queries", "picture_norm", "project", "heads.picture", "heads.text", "heads.match", "heads.temperature")
    same = equal(joint(ours), joint(without))
    assert same == {name for name in joint(ours) if name.startswith(kept) or ".cross." in name}
    for layer in former(ours).layers:
        assert torch.equal(layer.feed.expand.weight, layer.text_feed.expand.weight)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Q-Former: ")]
    taken, left = told[0].removeprefix("Q-Former: ").split(f" of {folder}; ")
    assert len(told) == 1 and {"words", "layers.*.text_feed", "heads.norm"} <= set(taken.split(", "))
    assert set(left.removesuffix(" newborn").split(", ")) == {*kept, "layers.*.cross"}


@torch.no_grad()
def test_a_bert_without_its_head_and_a_teacher_that_begins_as_it(tmp_path: Path) -> None:
    folder, bert = saved(tmp_path, BertModel)
    ours, without = newborn("p_former", WHOLE, folder), newborn("p_former", WHOLE)
    expected = bert(IDS.clamp(min=0), attention_mask=(IDS >= 0).long()).last_hidden_state
    torch.testing.assert_close(former(ours).read(IDS)[IDS >= 0], expected[IDS >= 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.heads["teacher"].read(IDS), expected[:, 0], atol=1e-5, rtol=1e-5)
    assert {"heads.bias", "heads.transform.weight"} <= equal(joint(ours), joint(without))


def test_a_qformer_that_was_trained_here_is_equal_to_the_bit(tmp_path: Path) -> None:
    first = composed.stir(newborn("blip2", WHOLE))
    first.save_pretrained(tmp_path)
    state, here = joint(first), str(tmp_path)
    project = {"project.weight", "project.bias"}
    for name in ("minigpt4", "blip2"):
        taken = joint(newborn(name, SHAPE, here))
        assert equal(taken, state) == taken.keys() - project, name
    whole = joint(newborn("blip2", WHOLE, here))
    assert equal(whole, state) == whole.keys() - project
    hears = joint(newborn("instructblip", {**SHAPE, "vocabulary": tiny.VOCAB}, here))  # it starts no captions
    assert equal(hears, state) == hears.keys() - project - {"words.word.weight"}
    assert torch.equal(hears["words.word.weight"], state["words.word.weight"][:-1])
    semantic = {**SHAPE, "vocabulary": tiny.VOCAB, "visual_input": "qformer", "normalise": True}
    lion = newborn("lion", semantic, here)
    inner = former(lion).qformer.inner.state_dict()
    assert equal(inner, state) == inner.keys() - project - {"words.word.weight"}
    lion.save_pretrained(tmp_path / "lion")
    again = joint(newborn("instructblip", {**SHAPE, "vocabulary": tiny.VOCAB}, str(tmp_path / "lion")))
    assert equal(again, inner) >= again.keys() - project


def test_of_several_the_later_stand_over_the_earlier(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "bert")
    second = composed.stir(newborn("blip2", SHAPE))
    second.save_pretrained(tmp_path / "second")
    hearing = {**SHAPE, "vocabulary": tiny.VOCAB}
    bert, both = (
        newborn("instructblip", hearing, folder),
        newborn("instructblip", hearing, folder, f"{tmp_path}/second"),
    )
    text = {name for name in joint(both) if name.startswith("words.") or ".text_feed." in name}
    assert equal(joint(both), joint(second)) == joint(both).keys() - text - {"project.weight", "project.bias"}
    assert text <= equal(joint(both), joint(bert))


def test_what_cannot_be_taken_over_is_named(tmp_path: Path) -> None:
    strange = str(composed.llm_folder("llama"))
    with pytest.raises(ConfigError, match="holds no Q-Former, and no BERT") as refused:
        newborn("blip2", SHAPE, strange)
    assert all(word in refused.value.remedy for word in ("BERT", "InstructBLIP", "retrieval", "Isthmus"))
    folder, _ = saved(tmp_path)
    with pytest.raises(ConfigError, match=r"words\.word\.weight is \[400, 16\].*\[320, 16\]") as refused:
        newborn("blip2", {**WHOLE, "vocabulary": 400}, folder)
    assert "tokenizer" in refused.value.remedy
    with pytest.raises(ConfigError, match="no Q-Former to begin as"):
        newborn("lion", {**SHAPE, "visual_input": "aggregator"}, folder)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (blip2(), instructblip()),
        (blip2(), instructblip(aware=False)),
        (blip2().override(["encoder.layer=head"]), lion()),
    ],
    ids=lambda recipe: recipe.name,
)
def test_embedded_recipes_take_the_first_stage_of_blip2_as_their_pages_say(first: Recipe, then: Recipe) -> None:
    trained = {
        name: each for name, each in planning.outline(first).state_dict().items() if name.startswith("connectors.")
    }
    (queries,) = (module for module in planning.outline(then).modules() if isinstance(module, QFormer))
    taken = take_over(queries, trained)
    assert taken == {name for name, _ in queries.named_parameters() if not name.startswith("project.")}
    assert {"queries", "layers.0.cross.key.weight"} <= taken


def test_published_recipes_that_hear_begin_as_bert_under_a_blip2() -> None:
    """As LAVIS does: a BLIP-2's second stage has no text half, BERT gives it."""
    for recipe, former in ((instructblip("published"), "blip2-opt-2.7b"), (lion("published"), "blip2-flan-t5-xl")):
        options = recipe.aligner.options
        assert options["qformer"] == [BERT_SOURCE, f"Salesforce/{former}"] and options["tokenizer"] == BERT_SOURCE
