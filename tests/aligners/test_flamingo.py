"""Flamingo against transformers' Idefics with the same weights, and by what its gates and its media mask promise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

import composed
from composed import MIX, picture, sample, stir
from isthmus import parts, planning
from isthmus.aligners.flamingo import Flamingo, Gated
from isthmus.config import LLMConfig, ObjectiveConfig, Source
from isthmus.connectors.resampler import Perceiver
from isthmus.data.sets import open_set
from isthmus.graft import at
from isthmus.recipes.flamingo import flamingo
from isthmus.training.run import limits
from isthmus.training.step import Step
from isthmus.types import IGNORE, ConfigError, Context, Features, Side

SMALL = {"latents": 4, "depth": 2, "heads": 2, "head_width": 8}
IDEFICS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "qk_layer_norms": False,
    "alpha_type": "float",
    "vision_config": {"embed_dim": 24},
    "perceiver_config": {"qk_layer_norms_perceiver": False},
    "attn_implementation": "eager",
}


def newborn(family: str = "llama", **options):
    return composed.model(family, "flamingo", SMALL | options)


def logits(model, batch):
    output = model.run(batch)
    return output.head(output.hidden_BTD)


@torch.no_grad()
def noisy(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def read_attention(ours, theirs, out: str) -> None:
    ours.q.weight.copy_(theirs.q_proj.weight)
    ours.kv.weight.copy_(torch.cat([theirs.k_proj.weight, theirs.v_proj.weight]))
    ours.out.weight.copy_(getattr(theirs, out).weight)


# ---------------------------------------------------------------------------------------------- parity


@torch.no_grad()
def test_the_resampler_equals_idefics():
    torch.manual_seed(0)
    theirs = noisy(IdeficsPerceiverResampler(IdeficsConfig(**IDEFICS), 24, depth=3, n_heads=2, head_dim=8, n_latents=5))
    ours = Perceiver(24, latents=5, depth=3, heads=2, head_width=8)
    ours.latents.copy_(theirs.latents)
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    for layer, (attention, feed) in zip(ours.layers, theirs.blocks, strict=True):
        layer.norm_x.load_state_dict(attention.context_layer_norm.state_dict())
        layer.norm_latents.load_state_dict(attention.latents_layer_norm.state_dict())
        read_attention(layer.attention, attention, "output_proj")
        layer.feed[0].load_state_dict(feed.ln.state_dict())
        layer.feed[1].load_state_dict(feed.fc.state_dict())
        layer.feed[2] = nn.ReLU()  # theirs differs from the paper's GELU
        layer.feed[3].load_state_dict(feed.c_proj.state_dict())
    x_NSE = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(Features(x_NSE), Context()), theirs(x_NSE), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_gated_block_equals_idefics():
    torch.manual_seed(0)
    theirs = noisy(IdeficsGatedCrossAttentionLayer(IdeficsConfig(**IDEFICS), layer_idx=0)).eval()
    ours = Gated(32, 24, heads=4, head_width=8)
    read_attention(ours.attention, theirs.cross_attn, "o_proj")
    ours.norm = theirs.input_layernorm  # theirs are RMS norms and a gated MLP
    ours.feed = nn.Sequential(theirs.post_attention_layernorm, theirs.mlp)
    ours.attention_gate.copy_(theirs.alpha_cross_attn)
    ours.feed_gate.copy_(theirs.alpha_dense)
    x_BTD, vision_BKQD = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 24)
    mask_BTK = torch.zeros(2, 6, 3, dtype=torch.bool)
    mask_BTK[0, 2:4, 0] = mask_BTK[0, 4:, 1] = mask_BTK[1, 3:, 0] = True
    side = Side(torch.zeros(2, 6), torch.ones(2, 6), None, vision_BKQD, mask_BTK)
    found = ours(None, lambda x: x, x_BTD, side=side)
    hidden = torch.zeros(2, 1, 6, 12).masked_fill(~mask_BTK.repeat_interleave(4, -1)[:, None], torch.finfo().min)
    expected = theirs(
        x_BTD,
        image_hidden_states=vision_BKQD.flatten(1, 2),
        image_attention_mask=hidden,
        cross_attention_gate=mask_BTK.any(-1).float(),
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the resampler


@torch.no_grad()
def test_the_resampler_sees_a_set_and_its_latents_are_interchangeable():
    torch.manual_seed(0)
    ours, x_NSE = Perceiver(24, latents=5, depth=2, heads=2, head_width=8), torch.randn(2, 7, 24)
    before = ours(Features(x_NSE), Context())
    torch.testing.assert_close(ours(Features(x_NSE[:, torch.randperm(7)]), Context()), before)
    order = torch.randperm(5)
    ours.latents.copy_(ours.latents[order])
    torch.testing.assert_close(ours(Features(x_NSE), Context()), before[:, order])


@torch.no_grad()
def test_padding_of_a_smaller_picture_is_not_read():
    torch.manual_seed(0)
    ours, x_NSE = Perceiver(24, latents=5, depth=2, heads=2, head_width=8, inner=16), torch.randn(2, 7, 24)
    found = ours(Features(x_NSE, lengths_N=torch.tensor([7, 4])), Context())
    torch.testing.assert_close(found[1:], ours(Features(x_NSE[1:, :4]), Context()))


# ---------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
@torch.no_grad()
def test_a_newborn_equals_the_bare_llm_on_pictures_too(family):
    model, bare = newborn(family), parts.load_llm(LLMConfig(source=str(composed.llm_folder(family))), torch.float32)
    batch = model.processor.collator()([MIX[2]])
    extra = {} if batch.decoder_ids_BU is None else {"decoder_input_ids": batch.decoder_ids_BU}
    assert torch.equal(logits(model, batch), bare(input_ids=batch.input_ids_BT, use_cache=False, **extra).logits)


def test_gates_learn_first_and_wake_what_is_behind_them():
    model = newborn()
    behind = [p for name, p in model.named_parameters() if "grafts.gated.attention." in name]
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 6 and len(behind) == 9
    for parameter in (*gates, *behind):
        parameter.requires_grad_(True)
    optimizer, batch = torch.optim.SGD([*gates, *behind], lr=1e-5), model.processor.collator()(MIX)
    target = torch.randn(logits(model, batch).shape)
    for awake in (False, True):
        optimizer.zero_grad()
        (logits(model, batch) * target).sum().backward()
        assert all(gate.grad.any() for gate in gates)
        assert all(bool(weight.grad.any()) == awake for weight in behind)
        optimizer.step()


@torch.no_grad()
def test_gates_that_begin_open_let_a_newborn_look():
    model = newborn(gate=1.0)
    gates = {name: gate for name, gate in model.named_parameters() if "_gate" in name}
    assert gates and all(torch.equal(gate, torch.ones(1)) for gate in gates.values())
    red, blue = (logits(model, model.processor.collator()([sample(picture(seed), "?")])) for seed in (1, 2))
    assert not torch.allclose(red, blue)


@torch.no_grad()
def test_words_without_a_picture_pass_the_feed_forward_network_once_it_is_open():
    model = newborn()
    batch = model.processor.collator()([MIX[1]])
    before = logits(model, batch)
    for name, parameter in model.named_parameters():
        if name.endswith("attention_gate"):
            parameter.fill_(1.0)
    assert torch.equal(logits(model, batch), before)
    stir(model)
    assert not torch.allclose(logits(model, batch), before)


@torch.no_grad()
def test_a_base_in_bfloat16_stays_close_to_float32():
    exact, rough = stir(newborn()), stir(composed.model("llama", "flamingo", SMALL, dtype=torch.bfloat16))
    assert rough.llm.dtype == torch.bfloat16 and next(rough.connectors.parameters()).dtype == torch.float32
    batch = exact.processor.collator()(MIX)
    found, expected = logits(rough, batch).float(), logits(exact, batch)
    assert torch.nn.functional.cosine_similarity(found, expected, -1)[batch.segment_BT > 0].mean() > 0.99


# ---------------------------------------------------------------------------------------------- who sees which picture


def test_the_mask_lets_only_the_last_picture_be_seen():
    at_BK = torch.tensor([[1, 3], [2, -1], [-1, -1]])
    position_BT = torch.arange(5).expand(3, 5)
    mask = Flamingo(Flamingo.Options()).media_mask(position_BT, torch.ones(3, 5), at_BK)
    expected = torch.zeros(3, 5, 2, dtype=torch.bool)
    expected[0, 1:3, 0] = expected[0, 3:, 1] = expected[1, 2:, 0] = True
    assert torch.equal(mask, expected)


@torch.no_grad()
def test_words_after_a_second_picture_know_the_first_through_the_llm_alone():
    model = stir(newborn(every=3))
    collator = model.processor.collator()
    one, other = (collator([sample(picture(first), "and", picture(3), "?")]) for first in (1, 9))
    second = int(one.media["image"].at_N[1])
    between = int(one.media["image"].at_N[0])
    assert [sorted(at(layer)) for layer in model.llm.model.layers] == [[], [], ["gated"]]
    look = model.llm.model.layers[2].grafts["gated"].look
    x_BTD = torch.randn(1, one.input_ids_BT.shape[1], 32)
    seen = [look(x_BTD, batch.side.vision_BKQD, batch.side.media_mask_BTK) for batch in map(model.run, (one, other))]
    assert torch.equal(seen[0][:, second:], seen[1][:, second:])
    assert not torch.allclose(seen[0][:, between:second], seen[1][:, between:second])
    assert not seen[0][:, :between].any()
    dense = stir(newborn())
    before, after = (dense.run(batch).hidden_BTD for batch in (one, other))
    assert not torch.allclose(before[:, second:], after[:, second:])


@torch.no_grad()
def test_a_picture_that_no_word_belongs_to_changes_nothing():
    model = stir(newborn())
    batch = model.processor.collator()([MIX[2]])
    images, length = batch.media["image"], batch.input_ids_BT.shape[1]
    far = replace(images, at_N=torch.tensor([length + 5, int(images.at_N[1])]))
    changed = replace(far, pixels=torch.stack([images.pixels[0] + 1, images.pixels[1]]))
    found = [logits(model, replace(batch, media={"image": each})) for each in (far, changed)]
    assert torch.equal(*found) and not torch.equal(found[0], logits(model, batch))


# ---------------------------------------------------------------------------------------------- compose and published


def test_too_sparse_blocks_are_refused():
    with pytest.raises(ConfigError, match="every 4 layers of 3"):
        newborn(every=4)


@pytest.mark.parametrize(("size", "blocks"), [("published", 1.12e9), ("published-4b", 0.898e9)])
def test_published_parameters(size, blocks):
    plan = planning.plan(flamingo(size))
    assert plan.parts["connectors.image"] == pytest.approx(63.0e6, rel=0.01)
    assert plan.parts["llm grafts"] == pytest.approx(blocks, rel=0.01)
    (stage,) = plan.stages
    assert stage.trained == plan.parts["connectors.image"] + plan.parts["llm grafts"]
    assert plan.tokens == {"image": 64}


@pytest.mark.parametrize("size", ["published", "published-4b"])
def test_published_pages_are_learnt_from_their_first_picture_on(size, tmp_path):
    composed.picture(1).source.save(tmp_path / "a.png")
    shown = {"image_name": "a.png", "matched_text_index": 1}
    page = {"text_list": ["a heading", "a fox"], "image_info": [shown]}
    (tmp_path / "mmc4.jsonl").write_text(json.dumps(page) + "\n")
    (stage,) = flamingo(size).stages
    (one,) = open_set(Source(name=str(tmp_path / "mmc4.jsonl"), images=tmp_path), seed=0)
    model = newborn()
    batch = model.processor.collator(template=stage.template, **limits(stage))([one])
    read, learnt = (
        model.processor.tokenizer.decode(ids)
        for ids in (batch.input_ids_BT[batch.modality_BT == 0], batch.labels_BT[batch.labels_BT != IGNORE])
    )
    assert "a heading" in read and learnt == "a fox" + model.processor.tokenizer.eos_token


def test_the_log_of_a_step_tells_how_far_each_gate_is_open():
    model = newborn()
    step = Step(model, [ObjectiveConfig(name="lm")])
    assert set(step.figures().values()) == {0.0}
    blocks = [block for module in model.llm.modules() for block in at(module).values() if isinstance(block, Gated)]
    for number, block in enumerate(blocks):
        torch.nn.init.constant_(block.attention_gate, 0.1 + number)
        torch.nn.init.constant_(block.feed_gate, -0.2)
    expected = {f"gate_attention_{number}": math.tanh(0.1 + number) for number in range(len(blocks))}
    expected |= {f"gate_feed_{number}": math.tanh(-0.2) for number in range(len(blocks))}
    assert step.figures() == pytest.approx(expected)
