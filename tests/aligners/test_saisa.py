"""SAISA by its identities: media are keys and values made anew in every layer, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import composed
from composed import MIX, picture, sample, stir
from isthmus import aligner as aligners
from isthmus import fuse, sites
from isthmus.aligners.saisa import OwnView
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.model import VLM
from isthmus.recipes.saisa import saisa
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, Modality


def grown(family: str = "llama", **options: object) -> VLM:
    return stir(composed.model(family, "saisa", options))


def logits(model: VLM, batch: Batch) -> Tensor:
    output = model.run(batch)
    return output.head(output.hidden_BTD)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def by_hand(model: VLM, batch: Batch) -> Tensor:
    """Logits of one row: text goes through Llama's parts, every layer putting its own view of the picture beside it."""
    llm, at = model.llm.model, batch.modality_BT[0] == Modality.IMAGE
    features_ME = model.connect(batch)["image"].flatten(0, 1)
    text_TD = llm.embed_tokens(batch.input_ids_BT[0, ~at])
    cos, sin = llm.rotary_emb(text_TD, fuse.positions(batch.segment_BT))

    def turn(x_THd: Tensor, rows: Tensor) -> Tensor:
        one, two = x_THd.chunk(2, -1)
        return x_THd * cos[0, rows, None] + torch.cat([-two, one], -1) * sin[0, rows, None]

    for layer in llm.layers:
        attention = layer.self_attn
        whole_SD = text_TD.new_zeros(len(at), text_TD.shape[1])
        whole_SD[~at], whole_SD[at] = text_TD, layer.grafts["saisa"].projector(features_ME)
        normed_SD = layer.input_layernorm(whole_SD)
        q = turn(attention.q_proj(normed_SD[~at]).unflatten(-1, (4, 8)), ~at)
        k = turn(attention.k_proj(normed_SD).unflatten(-1, (2, 8)), at | True)[:, [0, 0, 1, 1]]
        v = attention.v_proj(normed_SD).unflatten(-1, (2, 8))[:, [0, 0, 1, 1]]
        scores = torch.einsum("thd,shd->hts", q, k) / 8**0.5
        later = torch.arange(len(at)) > (~at).nonzero()
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(later, -torch.inf).softmax(-1), v)
        text_TD = text_TD + attention.o_proj(mixed.flatten(1))
        text_TD = text_TD + layer.mlp(layer.post_attention_layernorm(text_TD))
    return model.llm.lm_head(llm.norm(text_TD))


@torch.no_grad()
def test_it_equals_the_formula_written_out():
    model = grown(inner=16)
    for one in (MIX[0], MIX[2]):
        batch = model.processor.collator()([one])
        text = batch.modality_BT[0] == Modality.TEXT
        close(logits(model, batch)[0, text], by_hand(model, batch))


def test_no_feed_forward_or_output_projection_learns_from_media():
    model = grown()
    batch = model.processor.collator()([MIX[0]])
    media = batch.modality_BT[0] == Modality.IMAGE
    seen: list[int] = []
    for layer in sites.layers(model.llm).modules:
        for module in (layer.mlp.up_proj, layer.self_attn.q_proj, layer.self_attn.o_proj):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    logits(model, batch)
    assert seen == [int((~media).sum())] * 9


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_layers_projector_learns_by_its_own_keys_and_values_alone(silent):
    model = grown().requires_grad_(True)
    layers = sites.layers(model.llm).modules
    attention = layers[silent].self_attn
    for linear in (attention.k_proj, attention.v_proj):
        linear.register_forward_hook(lambda _, args, out: out.detach())
    batch = model.processor.collator()([MIX[0]])
    logits(model, batch)[batch.modality_BT == Modality.TEXT].logsumexp(-1).sum().backward()
    for index, layer in enumerate(layers):
        gradient = layer.grafts["saisa"].projector[0].weight.grad
        assert (gradient is None or not gradient.any()) == (index == silent)


@torch.no_grad()
def test_ids_under_a_picture_say_nothing_and_each_picture_finds_its_place():
    model = grown()
    collator = model.processor.collator()
    one, other = (collator([sample(picture(a), "and", picture(b), "?")]) for a, b in ((1, 2), (2, 1)))
    assert (logits(model, one) - logits(model, other)).abs().max() > 1e-3
    llm = model.llm.model
    clean = logits(model, one)
    llm.embed_tokens.weight[0] += 1  # the row that stands under pictures
    text = one.modality_BT == Modality.TEXT
    assert not (one.input_ids_BT[text] == 0).any()
    hidden = model.run(one).hidden_BTD
    llm.embed_tokens.weight[0] -= 1
    assert torch.equal(model.run(one).head(hidden)[text], clean[text])


def test_parameters_are_those_of_the_paper():
    recipe = saisa("published")
    d, layers = recipe.llm.architecture["hidden_size"], recipe.llm.architecture["num_hidden_layers"]
    with torch.device("meta"):
        one = OwnView(recipe.encoder.architecture["hidden_size"], d, d)
    assert layers * sum(p.numel() for p in one.parameters()) == pytest.approx(671e6, rel=0.01)
    assert aligners.build("saisa", recipe.aligner.options).options.inner is None


def test_the_embedded_recipe_trains_what_the_joint_adds():
    recipe = saisa()
    aligners.build("saisa", recipe.aligner.options)
    assert all({"connectors.*", "llm.*.grafts.saisa.*"} <= stage.train.keys() for stage in recipe.stages)


def test_opt_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="feed-forward Linears on the layer itself"):
        composed.model("opt", "saisa")


@pytest.mark.parametrize("options", [{}, {"pool": 2}, {"normalise": True}, {"pool": 2, "normalise": True}], ids=str)
def test_in_half_precision_the_whole_llm_learns_the_same_as_in_single(options):
    """With float32 masters states are float32 beside features that autocast has left in half precision."""
    losses, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = composed.model("llama", "saisa", {"inner": 16, **options}, dtype=dtype)
        step = Step(model, [ObjectiveConfig(name="lm")])
        train = {"connectors.*": 1e-3, "llm.*": 1e-5}
        choose(step, Stage(name="one", data=("none",), train=train, budget=Budget(steps=1), lr=1e-2))
        stir(model)
        step.ready()
        batch = model.processor.collator()(MIX)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses[dtype], _ = step(batch, step.scales([batch]))
        losses[dtype].backward()
        layers = sites.layers(model.llm).modules
        gradients[dtype] = torch.cat([layer.grafts["saisa"].projector[0].weight.grad.flatten() for layer in layers])
    single, half = torch.float32, torch.bfloat16
    torch.testing.assert_close(losses[half], losses[single], rtol=0.02, atol=0)
    assert torch.cosine_similarity(gradients[half], gradients[single], 0) > 0.95
