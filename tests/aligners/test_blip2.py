"""The Q-Former against transformers' own, weights mapped; what queries and text may know of each other."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

import composed
import isthmus
import tiny
from composed import picture, sample
from isthmus import planning
from isthmus.config import ObjectiveConfig, Recipe
from isthmus.connectors.qformer import InstructedQFormer, QFormer, Shape
from isthmus.connectors.qformer_weights import BLIP2, INSTRUCT, take_over
from isthmus.model import VLM
from isthmus.objectives import itc, itm, named
from isthmus.objectives._captions import same
from isthmus.recipes.blip2 import blip2, instructblip, minigpt4
from isthmus.training.step import Step
from isthmus.types import ConfigError, Context, Features, Output

E, D, S, Q, T, N = 20, 32, 7, 3, 5, 2
SHAPE = Shape(queries=Q, layers=3, width=16, heads=2, inner=24, dropout=0.0, vocabulary=50, positions=12)
SAME = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": E,
    "cross_attention_frequency": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def copy_weights(ours: QFormer, other: torch.nn.Module, instruct: bool) -> set[str]:
    """Give theirs our weights; the names of theirs that got none are returned."""
    table = INSTRUCT if instruct else BLIP2
    named = {table.theirs(name) or name: parameter for name, parameter in ours.state_dict().items()}
    state = {name.removeprefix("qformer."): p for name, p in named.items() if name.startswith("qformer.")}
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return set(missing.missing_keys)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.fixture
def features() -> Features:
    return Features(torch.randn(N, S, E, generator=torch.Generator().manual_seed(1)))


IDS = torch.tensor([[4, 7, 9, 11, 2], [4, 8, 2, -1, -1]])


@torch.no_grad()
def test_the_queries_equal_those_of_transformers_blip2(features):
    ours = stirred(QFormer(E, D, SHAPE))
    other = Blip2QFormerModel(Blip2QFormerConfig(**SAME)).eval()
    assert copy_weights(ours, other, instruct=False) == set()
    expected = other(
        query_embeds=ours.queries.expand(N, -1, -1), encoder_hidden_states=ours.picture_norm(features.x_NSE)
    ).last_hidden_state
    torch.testing.assert_close(ours.see(features)[-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(features, Context()), ours.project(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_instructed_queries_equal_those_of_transformers_instructblip(features):
    ours = stirred(InstructedQFormer("image", E, D, SHAPE))
    other = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SAME)).eval()
    left = copy_weights(ours, other, instruct=True)
    assert left and all(re.match(r"encoder\.layer\.2\.(intermediate|output)\.", name) for name in left)
    mask = torch.cat([torch.ones(N, Q, dtype=torch.long), (IDS >= 0).long()], 1)
    expected = other(
        input_ids=IDS.clamp(min=0),
        attention_mask=mask,
        query_embeds=ours.queries.expand(N, -1, -1),
        encoder_hidden_states=ours.picture_norm(features.x_NSE),
    ).last_hidden_state[:, :Q]
    found = ours(features, Context({"image": IDS}))
    torch.testing.assert_close(found, ours.project(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_whole_text_half_equals_that_of_transformers(features):
    ours = stirred(QFormer(E, D, SHAPE, "whole"))
    other = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SAME)).eval()
    assert copy_weights(ours, other, instruct=True) == set()
    real = (IDS >= 0).long()
    queries = ours.queries.expand(N, -1, -1)
    both = other(
        input_ids=IDS.clamp(min=0),
        attention_mask=torch.cat([torch.ones(N, Q, dtype=torch.long), real], 1),
        query_embeds=queries,
        encoder_hidden_states=ours.picture_norm(features.x_NSE),
    ).last_hidden_state
    torch.testing.assert_close(ours.see(features, IDS)[-1], both, atol=1e-5, rtol=1e-5)
    alone = other(input_ids=IDS.clamp(min=0), attention_mask=real).last_hidden_state
    torch.testing.assert_close(ours.read(IDS)[IDS >= 0], alone[IDS >= 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_writing_behind_the_queries_equals_one_joint_pass_under_the_published_mask(features):
    former = stirred(QFormer(E, D, SHAPE, "whole"))
    states = former.see(features)
    written = former.read(IDS, behind=states)
    # queries see queries; text sees all queries and the text up to itself
    mask = torch.zeros(N, Q + T, Q + T, dtype=torch.bool)
    mask[:, :, :Q] = True
    mask[:, Q:, Q:] = torch.ones(T, T, dtype=torch.bool).tril()
    joint = former.see(features, IDS, mask)[-1]
    torch.testing.assert_close(written[IDS >= 0], joint[:, Q:][IDS >= 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[-1], joint[:, :Q], atol=1e-5, rtol=1e-5)
    other = IDS.clone()
    other[:, 2] = 33
    changed = former.read(other, behind=states)
    assert torch.equal(changed[:, :2], written[:, :2]) and (changed[:, 2] - written[:, 2]).abs().max() > 1e-3
    assert (former.see(features, other)[-1][:, :Q] - former.see(features, IDS)[-1][:, :Q]).abs().max() > 1e-3


@torch.no_grad()
def test_the_order_of_the_pictures_tokens_is_nothing_and_that_of_queries_is_kept(features):
    former = stirred(QFormer(E, D, SHAPE))
    plain = former(features, Context())
    shuffled = Features(features.x_NSE[:, torch.randperm(S)])
    torch.testing.assert_close(former(shuffled, Context()), plain, atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 1])
    former.queries.copy_(former.queries[order].clone())
    torch.testing.assert_close(former(features, Context()), plain[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_pictures_and_of_instructions_changes_nothing(features):
    former = stirred(InstructedQFormer("image", E, D, SHAPE))
    both = former(Features(features.x_NSE, lengths_N=torch.tensor([S, 4])), Context({"image": IDS}))
    alone = former(Features(features.x_NSE[1:, :4]), Context({"image": IDS[1:, :3]}))
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_questions_about_one_picture_give_two_sets_of_queries(features):
    former = stirred(InstructedQFormer("image", E, D, SHAPE))
    one, other = former(
        Features(features.x_NSE[:1].expand(2, -1, -1)), Context({"image": torch.tensor([[4, 7], [4, 8]])})
    )
    assert (one - other).abs().max() > 1e-3


def test_a_qformer_without_text_refuses_it_with_the_remedy(features):
    with pytest.raises(ConfigError, match="no text half"):
        QFormer(E, D, SHAPE).read(IDS)
    with pytest.raises(ConfigError, match="do not divide"):
        QFormer(E, D, SHAPE.but(heads=3))


# ---------------------------------------------------------------------------------------------- first stage

CAPTIONED = {**SHAPE.model_dump(), "text": True, "vocabulary": tiny.VOCAB + 1, "positions": 32}
PAIRS = tuple(sample(picture(n), answer=text) for n, text in enumerate(["a cat", "the dog is here", "on the left"], 1))


@pytest.fixture(scope="module")
def first_stage() -> VLM:
    return composed.stir(composed.model("llama", "blip2", CAPTIONED))


def step_of(model: VLM, *names: str) -> Step:
    return Step(model, [ObjectiveConfig(name=name) for name in names])


def test_captions_are_read_between_two_ends_in_the_llms_vocabulary(first_stage):
    batch = first_stage.processor.collator()(PAIRS)
    ids = batch.extra_text["image"]
    assert len(ids) == 3 and ids[:, 0].tolist() == [tiny.BOS] * 3
    assert [int(row[row >= 0][-1]) for row in ids] == [tiny.EOS] * 3
    middles = [row[row >= 0][1:-1].tolist() for row in ids]
    assert first_stage.processor.batch_decode(middles) == ["a cat", "the dog is here", "on the left"]
    assert first_stage.processor.prompts(PAIRS).extra_text == {}


@torch.no_grad()
def test_contrast_is_the_published_formula(first_stage):
    batch, step = first_stage.processor.collator()(PAIRS), step_of(first_stage, "itc")
    former, ids = first_stage.connectors["image"], batch.extra_text["image"]
    z = former.heads.picture(former.see(first_stage.encode("image", batch.media["image"]))[-1])
    w = former.heads.text(former.read(ids)[:, 0])
    z, w = z / z.norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)
    logits = torch.tensor([[max(q @ w[j] for q in z[i]) for j in range(3)] for i in range(3)]) / 0.37
    smooth = torch.full((3, 3), 0.1 / 3) + 0.9 * torch.eye(3)
    expected = -(smooth * logits.log_softmax(1)).sum() / 2 - (smooth * logits.T.log_softmax(1)).sum() / 2
    former.heads.temperature.fill_(0.37)
    found = itc.ITC(itc.ITC.Options()).loss(step, Output(None, {}, None, None), batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_equal_texts_are_positives_in_contrast_and_never_negatives_in_matching():
    ids = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 4]])
    assert same(ids).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    matching, likely = named("itm", {}), torch.zeros(4, 4)
    likely[0, 2] = 50.0
    torch.manual_seed(0)
    for _ in range(200):
        drawn = itm.hard(likely, ~same(ids), matching.chance(4)[0]).tolist()
        assert all(ids[own].tolist() != ids[other].tolist() for own, other in enumerate(drawn))


def test_wrong_pairs_are_drawn_by_the_softmax_of_their_likeness():
    torch.manual_seed(0)
    likely, wrong = torch.tensor([0.5, 9.0, -1.0, 2.0]).expand(2000, 4), torch.tensor([True, False, True, True])
    chance = named("itm", {}).chance(2000)[1, :, :4]
    shares = itm.hard(likely, wrong.expand(2000, 4), chance).bincount(minlength=4) / 2000
    expected = torch.where(wrong, likely[0].exp(), 0) / likely[0, wrong].exp().sum()
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_matching_has_one_right_pair_in_three_and_refuses_a_batch_of_one_text(first_stage):
    collate, step = first_stage.processor.collator(), step_of(first_stage, "itm")
    matching = step.terms["itm"]
    assert matching.count(collate(PAIRS)) == 9
    assert matching.count(collate([PAIRS[0], PAIRS[0]])) == 0
    with torch.no_grad():  # a head that always says "right" by a margin of 4 is wrong in two of three
        first_stage.connectors["image"].heads.match.weight.zero_()
        first_stage.connectors["image"].heads.match.bias.copy_(torch.tensor([0.0, 4.0]))
    loss = matching.loss(step, Output(None, {}, None, None), collate(PAIRS))
    right, wrong = torch.tensor([0.0, 4.0]).log_softmax(0).neg().flip(0)
    torch.testing.assert_close(loss, 3 * right + 6 * wrong)


def test_writing_starts_with_its_own_word_and_predicts_every_later_one(first_stage):
    batch, writing = first_stage.processor.collator()(PAIRS), named("itg", {"smoothing": 0.0})
    former, ids = first_stage.connectors["image"], batch.extra_text["image"]
    assert writing.count(batch) == int((ids >= 0).sum()) - 3
    begun = ids.clone()
    begun[:, 0] = tiny.VOCAB
    mask = torch.zeros(3, Q + ids.shape[1], Q + ids.shape[1], dtype=torch.bool)
    mask[:, :, :Q], mask[:, Q:, Q:] = True, torch.ones_like(mask[:, Q:, Q:]).tril()
    states = former.see(first_stage.encode("image", batch.media["image"]), begun, mask)[-1][:, Q:]
    logits = former.heads.write(states, former.words)
    expected = sum(
        -logits[n, t].log_softmax(-1)[ids[n, t + 1]]
        for n in range(3)
        for t in range(ids.shape[1] - 1)
        if ids[n, t + 1] >= 0
    )
    found = writing.loss(step_of(first_stage, "itg"), Output(None, {}, None, None), batch)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_first_stage_trains_every_part_but_the_projection(first_stage):
    model = composed.stir(composed.model("llama", "blip2", CAPTIONED))
    step, batch = step_of(model, "itc", "itm", "itg"), model.processor.collator()(PAIRS)
    model.connectors.requires_grad_(True)
    total, shares = step(batch, step.scales([batch]))
    total.backward()
    silent = {name for name, p in model.connectors.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"image.project.weight", "image.project.bias"} and all(shares.values())


# ---------------------------------------------------------------------------------------------- the whole


@torch.no_grad()
def test_the_whole_equals_transformers_blip2(tmp_path):
    config = Blip2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": tiny.IMAGE,
            "patch_size": tiny.PATCH,
            "layer_norm_eps": 1e-5,
        },
        qformer_config={**SAME, "encoder_hidden_size": 32},
        text_config=tiny.llm("opt").config.to_dict(),
        num_query_tokens=Q,
        image_token_index=tiny.VOCAB - 1,
    )
    other = stirred(Blip2ForConditionalGeneration(config))
    other.save_pretrained(tmp_path)
    tiny.processor("clip").save_pretrained(tmp_path)
    llm = tmp_path / "llm"
    other.language_model.save_pretrained(llm)
    tiny.tokenizer().save_pretrained(llm)
    recipe = composed.recipe("opt", "blip2", SHAPE.model_dump()).but(
        encoder={"source": str(tmp_path), "layer": -1, "class_token": "keep"}, llm={"source": str(llm)}
    )
    ours = isthmus.compose(recipe)
    take_over(ours.connectors["image"], other.state_dict(), project=True)
    batch = ours.processor.collator()([sample(picture(1), "what is it?")])
    expected = other(
        pixel_values=batch.media["image"].pixels,
        input_ids=batch.input_ids_BT.masked_fill(batch.modality_BT > 0, tiny.VOCAB - 1),
    ).logits
    output = ours.run(batch)
    torch.testing.assert_close(output.head(output.hidden_BTD), expected, atol=1e-5, rtol=1e-5)
    options = {**SHAPE.model_dump(), "qformer": str(tmp_path)}
    frozen = isthmus.compose(recipe.but(aligner={"name": "minigpt4", "options": options})).connectors["image"]
    state = frozen.state_dict()
    for name, tensor in ours.connectors["image"].state_dict().items():
        assert torch.equal(state[name], tensor) != name.startswith("project."), name
    options["vocabulary"] = tiny.VOCAB
    hears = isthmus.compose(recipe.but(aligner={"name": "instructblip", "options": options})).connectors["image"]
    taken = {name for name, tensor in hears.state_dict().items() if name in state and torch.equal(state[name], tensor)}
    assert taken == {name for name in state if not name.startswith("project.")}, "its text half stays newborn"
    with pytest.raises(ConfigError, match="query_tokens"):
        isthmus.compose(recipe.but(aligner={"name": "minigpt4", "options": {**options, "queries": 5}}))


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        # ViT-g and 188 M with heads are the paper's figures; 105.1 M of queries' path and a projection, spec B2.1
        (blip2("published"), {"first": 188e6, "second": 105.1e6 + 2560 * 769}),
        (blip2("published", "flan-t5-xl"), {"first": 188e6, "second": 105.1e6 + 2048 * 769}),
        # 185.7 M with text and 4096 x 769, less the feed-forward that no gradient reaches
        (instructblip("published"), {"sft": 185.7e6 + 4096 * 769 - (2 * 768 * 3072 + 3072 + 3 * 768)}),
        (minigpt4("published"), {"align": 3.15e6, "sft": 3.15e6}),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_published_recipes_train_the_published_number_of_parameters(recipe, trained):
    plan = planning.plan(recipe)
    assert {stage.name: stage.trained for stage in plan.stages} == pytest.approx(trained, rel=0.01)
    assert plan.tokens == {"image": 32} and plan.parts["encoders.image"] == pytest.approx(986e6, rel=0.01)


def test_embedded_recipes_are_whole():
    for recipe in (blip2(), blip2(first=False), instructblip(), minigpt4()):
        assert planning.plan(recipe).tokens == {"image": 9}
