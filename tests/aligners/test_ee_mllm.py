"""EE-MLLM by its identities: skipping equals masking, media know nothing of each other, the spec's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PhiConfig

import composed
import isthmus
import tiny
from composed import MIX, picture, sample, stir
from isthmus import aligner as aligners
from isthmus import fuse, graft, sites
from isthmus.aligners.ee_mllm import flops
from isthmus.connectors import composite
from isthmus.evaluation.gap import states
from isthmus.evaluation.gap.states import Pair
from isthmus.model import VLM
from isthmus.recipes.ee_mllm import ee_mllm
from isthmus.types import Batch, ConfigError, Modality, Past, Sample, Side, Turn

UNTURNED = ("smollm3", "cohere2", "exaone4")
"""Families that turn no queries and keys in their second layer."""


def grown(family: str = "llama", **options: Any) -> VLM:
    return stir(composed.model(family, "ee_mllm", options))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def logits(model: VLM, batch: Batch, **how: Any) -> Tensor:
    output = model.run(batch, **how)
    return output.head(output.hidden_BTD)


def image_at(batch: Batch) -> Tensor:
    return batch.modality_BT == Modality.IMAGE


@contextmanager
def watched(model: VLM) -> Iterator[list[Tensor]]:
    """What every layer returns, in order."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in sites.layers(model.llm).modules
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def diagonal(batch: Batch) -> Tensor:
    """Composite attention as an additive mask [B, 1, T, T], written out cell by cell."""
    media, segment = image_at(batch).tolist(), batch.segment_BT.tolist()
    rows, length = batch.input_ids_BT.shape
    mask = torch.full((rows, 1, length, length), torch.finfo(torch.float32).min)
    for b in range(rows):
        for q in range(length):
            for kv in range(q + 1):
                if segment[b][q] == segment[b][kv] and (not media[b][q] or q == kv):
                    mask[b, 0, q, kv] = 0
    return mask


def masked_by_hand(model: VLM, batch: Batch, layers: range) -> Tensor:
    """Logits of the bare LLM on the spliced input, whose chosen layers are handed the mask that is written out."""
    chosen = [sites.attention(sites.layers(model.llm).modules[index]) for index in layers]
    mask = diagonal(batch)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, kw: (args, {**kw, "attention_mask": mask}), with_kwargs=True)
        for module in chosen
    ]
    embeds = model.embed(batch, model.connect(batch))
    found = model.llm(inputs_embeds=embeds, position_ids=fuse.positions(batch.segment_BT)).logits
    for hook in hooks:
        hook.remove()
    return found


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "opt", *UNTURNED])
@torch.no_grad()
def test_skipping_and_the_rule_equal_a_mask_written_out(family):
    batch = composed.model(family).processor.collator()([MIX[2]])  # two pictures, text around them
    skip, rule = grown(family), grown(family, compute="rule")
    expected = masked_by_hand(rule, batch, range(3))
    close(logits(rule, batch), expected)
    close(logits(skip, batch), expected)
    full = stir(composed.model(family, "llava"))
    assert (logits(full, batch) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_chosen_layers_alone_are_composite():
    batch = composed.model().processor.collator()([MIX[2]])
    close(logits(grown(layers=[1, 2]), batch), masked_by_hand(stir(composed.model()), batch, range(1, 3)))


def test_gradients_of_skipping_equal_those_of_the_rule():
    found = []
    for compute in ("skip", "rule"):
        model = grown(compute=compute).requires_grad_(True)
        batch = model.processor.collator()(MIX)
        logits(model, batch)[batch.segment_BT > 0].logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "isthmus"])
def test_packed_rows_and_every_kernel_that_takes_masks(kernel):
    model = grown()
    collator = model.processor.collator()
    expected = [logits(model, collator([one]))[0] for one in MIX[:2]]
    model.llm.set_attn_implementation(kernel)
    batch = collator.rows([MIX[:2]])
    found = logits(model, batch)[0]
    for number, alone in enumerate(expected, start=1):
        close(found[batch.segment_BT[0] == number], alone)


@torch.no_grad()
def test_without_a_picture_it_is_the_plain_llm():
    model, plain = grown(), tiny.llm()
    batch = model.processor.collator()([MIX[1]])
    close(logits(model, batch), plain(input_ids=batch.input_ids_BT, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("visual", ["self", "ffn", "keys"])
def test_what_a_layer_does_to_media_by_hand(visual):
    model = grown(visual=visual)
    batch = model.processor.collator()([MIX[0]])
    with watched(model) as states:
        model.run(batch)
    at = image_at(batch)
    before = model.embed(batch, model.connect(batch))[at]
    for layer, after in zip(sites.layers(model.llm).modules, states):
        expected, attention = before, layer.self_attn
        if visual == "self":
            value = attention.v_proj(layer.input_layernorm(before)).unflatten(-1, (2, 8))
            expected = expected + attention.o_proj(value[:, [0, 0, 1, 1]].flatten(1))  # 4 query heads share 2
        if visual != "keys":
            expected = expected + layer.mlp(layer.post_attention_layernorm(expected))
        before = after[at]
        close(before, expected)


# ---------------------------------------------------------------------------------------------- the same weights

PAIRS = [
    Pair(Sample((Turn.say("user", picture(number), "what is it?"),), f"p{number}"), words)
    for number, words in enumerate(("no", "a big house on the left " * 3))
]
"""A short answer: its column is beyond the rows of text. And a long one, beside which every column is a row of text."""


def weights(model: VLM, batch: Batch) -> list[Tensor]:
    """What each layer tells of its attention, [B, T, H, S]: rows of queries are chosen by what they are."""
    told: list[Tensor] = []
    with states.weighing(model, lambda _, weights_BHTS: told.append(weights_BHTS.transpose(1, 2))):
        model.run(batch)
    return told


@torch.no_grad()
def test_weights_of_skipping_are_those_of_the_rule_in_every_row():
    skip, rule = grown(), grown(compute="rule")
    batch = skip.processor.collator()(MIX)  # rows of different lengths, with one picture, none, and two
    real_BT = batch.segment_BT > 0
    found, expected = weights(skip, batch), weights(rule, batch)
    assert len(found) == len(expected) == 3
    for mine, theirs in zip(found, expected):
        assert mine.shape == theirs.shape
        close(mine[real_BT], theirs[real_BT])


@pytest.mark.parametrize("visual", ["ffn", "keys"])
@torch.no_grad()
def test_weights_of_media_that_ask_nothing_are_none(visual):
    model, rule = grown(visual=visual), grown(compute="rule")
    batch = rule.processor.collator()([MIX[2]])
    media_BT = image_at(batch)
    found = weights(model, batch)
    close(found[0][~media_BT], weights(rule, batch)[0][~media_BT])  # before layers differ in what they do to media
    assert not any(each[media_BT].any() for each in found)
    for each in found:
        close(each[~media_BT].sum(-1), torch.ones(int((~media_BT).sum()), 4))


@torch.no_grad()
def test_weights_behind_a_prefix_are_those_of_the_whole_row():
    model, told = grown(), []
    batch = model.processor.collator()([MIX[2]])
    embeds, cut = model.embed(batch, model.connect(batch)), int(batch.media["image"].at_N[1])
    past = Past(DynamicCache(config=model.llm.config))
    model.think(embeds[:, :cut], batch.segment_BT[:, :cut], batch.modality_BT[:, :cut], None, past)
    with states.weighing(model, lambda _, weights_BHTS: told.append(weights_BHTS.transpose(1, 2))):
        model.think(embeds[:, cut:], batch.segment_BT, batch.modality_BT, None, past)
    for mine, theirs in zip(told, weights(grown(compute="rule"), batch), strict=True):
        close(mine, theirs[:, cut:])


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS], ids=["short", "long"])
@torch.no_grad()
def test_the_gap_of_skipping_is_that_of_the_rule(pairs):
    skip, rule = (states.see(grown(compute=compute), pairs, keep=0) for compute in ("skip", "rule"))
    for mine, theirs in zip(skip.mass_NH, rule.mass_NH, strict=True):
        close(mine, theirs)
    assert len(skip.mass_NH) == 3 and skip.places == rule.places


# ---------------------------------------------------------------------------------------------- who knows of whom


@torch.no_grad()
def test_a_changed_media_token_changes_no_other_one_in_any_layer_and_the_text_behind():
    model = grown()
    batch = model.processor.collator()([MIX[2]])
    embeds = model.embed(batch, model.connect(batch))
    columns = image_at(batch)[0].nonzero().flatten()
    other = embeds.clone()
    other[0, columns[3]] += 1

    def states(x: Tensor) -> Tensor:
        with watched(model) as seen:
            model.think(x, batch.segment_BT, batch.modality_BT, None, Past(None))
        return torch.stack(seen)[:, 0]

    before, after = states(embeds), states(other)
    moved = (before - after).abs().amax(-1)  # [layers, T]
    rest = columns[columns != columns[3]]
    assert not moved[:, rest].any() and moved[:, columns[3]].min() > 1e-3
    assert moved[-1, columns[-1] + 1 :].min() > 1e-5


@torch.no_grad()
def test_text_does_not_care_for_the_order_of_a_pictures_tokens_if_their_positions_go_with_them():
    model = grown()
    batch = model.processor.collator()([MIX[0]])
    embeds = model.embed(batch, model.connect(batch))
    order = torch.arange(embeds.shape[1])
    columns = image_at(batch)[0].nonzero().flatten()
    order[columns] = columns.flip(0)

    def run(x: Tensor, positions: Tensor) -> Tensor:
        side = Side(batch.modality_BT, batch.segment_BT)
        return model.llm.base_model(inputs_embeds=x, position_ids=positions, side=side).last_hidden_state

    text = ~image_at(batch)[0]
    plain = run(embeds, order.sort().values[None])
    close(run(embeds[:, order], order[None])[:, text], plain[:, text])
    assert (run(embeds[:, order], order.sort().values[None])[:, text] - plain[:, text]).abs().max() > 1e-4


@torch.no_grad()
def test_a_pictures_keys_and_values_serve_another_question_and_another_beginning():
    model = grown()
    collator = model.processor.collator()
    first, second = (collator([sample(picture(1), text)]) for text in ("what is it?", "who, and why so?"))
    start = int(first.media["image"].at_N[0])
    cut = start + model.queries("image")
    past = model.run(_until(first, cut), keep=True).past
    found = logits(model, _after(second, cut), past=past)
    close(found, logits(model, second)[:, cut:])

    changed = replace(first, input_ids_BT=first.input_ids_BT.clone())
    changed.input_ids_BT[0, :start] = changed.input_ids_BT[0, :start].flip(0)
    other = model.run(_until(changed, cut), keep=True).past
    for mine, theirs in zip(past.cache.layers, other.cache.layers):
        close(mine.keys[:, :, start:cut], theirs.keys[:, :, start:cut])
        close(mine.values[:, :, start:cut], theirs.values[:, :, start:cut])
        assert (mine.values[:, :, :start] - theirs.values[:, :, :start]).abs().max() > 1e-3


def _until(batch: Batch, stop: int) -> Batch:
    cut = {name: getattr(batch, name)[:, :stop] for name in ("input_ids_BT", "segment_BT", "modality_BT")}
    return replace(batch, **cut, route_BT=None, labels_BT=None)


def _after(batch: Batch, start: int) -> Batch:
    return replace(batch, input_ids_BT=batch.input_ids_BT[:, start:], route_BT=None, labels_BT=None, media={})


@torch.no_grad()
def test_a_call_of_nothing_but_a_picture():
    model, reference = grown(), grown(compute="rule")
    batch = model.processor.collator()([MIX[0]])
    start = int(batch.media["image"].at_N[0])
    stop = start + model.queries("image")
    alone = {name: getattr(batch, name)[:, start:stop] for name in ("input_ids_BT", "segment_BT", "modality_BT")}
    alone = replace(batch, **alone, route_BT=None, labels_BT=None)
    close(logits(model, alone), logits(reference, alone))


# ---------------------------------------------------------------------------------------------- EE-MLLM-F


def test_free_learns_as_llava_and_answers_as_ee_mllm():
    free, full, composite_ = grown(free=True), stir(composed.model()), grown()
    batch = free.processor.collator()(MIX)
    real = batch.segment_BT > 0
    close(logits(free, batch)[real], logits(full, batch)[real])
    with torch.no_grad():
        close(logits(free, batch)[real], logits(composite_, batch)[real])


@pytest.mark.parametrize("options", [{}, {"normalise": True, "words": 0.1}])
@torch.no_grad()
def test_a_trained_llava_opens_as_ee_mllm(tmp_path, options):
    full = stir(composed.model("llama", "llava", options))
    full.save_pretrained(tmp_path, whole=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["aligner"]["name"] = "ee_mllm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch = full.processor.collator()([MIX[2]])
    close(logits(isthmus.load(tmp_path), batch), logits(grown(**options), batch))


# ---------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("how", ["full", "self", "ffn", "keys"])
@pytest.mark.parametrize(("text", "visual"), [(8, 16), (6, 80)])
@torch.no_grad()
@pytest.mark.parametrize("shared", [1, 2])
def test_counted_products_are_those_of_the_formula(how, text, visual, shared):
    llm = tiny.llm(num_key_value_heads=4 // shared)
    llm.set_attn_implementation("eager")  # sdpa's products are not counted on a CPU
    attach(llm, how)
    modality = torch.tensor([[0] * (text // 2) + [1] * visual + [0] * (text - text // 2)])
    side = {} if how == "full" else {"side": Side(modality, torch.ones_like(modality))}
    with FlopCounterMode(display=False) as counter:
        llm.model(inputs_embeds=torch.randn(1, text + visual, tiny.WIDTH), use_cache=False, **side)
    assert counter.get_total_flops() == pytest.approx(flops(tiny.WIDTH, 64, 3, text, visual, how, shared), rel=0.01)


def attach(llm: Any, how: str) -> None:
    for layer in sites.layers(llm).modules if how != "full" else ():
        graft.graft(llm, layer.self_attn, "composite", composite.MediaAttention(True, how == "self"))
        if how == "keys":
            graft.graft(llm, layer.mlp, "composite", composite.TextOnly())


@pytest.mark.parametrize(
    ("visual", "text", "how", "saved"),
    [(576, 64, "self", 9.5), (2880, 64, "self", 17.7), (4900, 64, "self", 23.3), (4900, 64, "ffn", 30.1),
     (576, 64, "keys", 75.5), (4900, 256, "self", 22.9)],
)  # fmt: skip
def test_savings_are_those_of_the_spec(visual, text, how, saved):
    ratio = flops(4096, 11008, 32, text, visual, how) / flops(4096, 11008, 32, text, visual, "full")
    assert 100 * (1 - ratio) == pytest.approx(saved, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "opt", *UNTURNED])
def test_keys_and_values_are_those_that_the_layer_itself_hands_to_its_cache(family):
    llm, kept, asked = tiny.llm(family), DynamicCache(), {}
    for index, layer in enumerate(sites.layers(llm).modules):
        attention = sites.attention(layer)
        attention.register_forward_pre_hook(partial(_note, asked, index), with_kwargs=True)
    llm(torch.arange(20, 30)[None], past_key_values=kept)
    for index, layer in enumerate(sites.layers(llm).modules):
        composite.check(layer)
        x, rotation = asked[index]
        turned = [each[0] for each in rotation] if composite.turns(sites.attention(layer)) else None
        found = composite.keys_and_values(sites.attention(layer), x[0], turned)
        for mine, theirs in zip(found, (kept.layers[index].keys, kept.layers[index].values), strict=True):
            close(mine.transpose(0, 1), theirs[0])
    assert composite.turns(sites.attention(sites.layers(llm).modules[1])) == (family in ("llama", "qwen3", "glm"))


def _note(asked: dict[int, Any], index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    asked[index] = (args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))


# ---------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="compute=rule goes with visual=self"):
        grown(compute="rule", visual="ffn")
    with pytest.raises(ConfigError, match=r"layers \[3\] of an LLM that has 3"):
        grown(layers=[0, 3])
    phi = PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    with pytest.raises(ConfigError, match="not made of q_proj"):
        composite.check(sites.layers(AutoModelForCausalLM.from_config(phi)).modules[0])


def test_an_attention_that_could_clip_but_does_not_is_carried():
    layer = sites.layers(tiny.llm("olmo", clip_qkv=None)).modules[0]
    assert composite.check(layer) == "self_attn"
    with pytest.raises(ConfigError, match="not made of q_proj"):
        composite.check(sites.layers(tiny.llm("olmo")).modules[0])


@pytest.mark.slow  # importing that kernel takes a quarter of a minute
def test_a_kernel_without_masks_over_chosen_rows_is_refused():
    model = grown()
    model.llm.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="flex_attention takes no mask over chosen rows"):
        model.run(model.processor.collator()([MIX[0]]))


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("size", ["embedded", "published"])
def test_recipes_name_a_joint_that_builds(size):
    for recipe in (ee_mllm(size), ee_mllm(size, free=True)):
        joint = aligners.build(recipe.aligner.name, recipe.aligner.options)
        assert joint.name == "ee_mllm" and joint.options.free == ("-f" in recipe.name)
        assert [stage.name for stage in recipe.stages][-2:] == ["align", "sft"]
