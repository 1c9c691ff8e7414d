"""The prompt teacher against transformers' BERT and by hand; what each of its stages moves, and what it must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import composed
import isthmus
import tiny
from composed import picture, sample
from isthmus import planning, sites
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.connectors.prompt_teacher import PromptTeacher
from isthmus.connectors.qformer import Shape
from isthmus.model import VLM
from isthmus.objectives._prompts import sentences
from isthmus.objectives.prompt_lm import reconstruction, written
from isthmus.recipes.blip2 import blip2
from isthmus.recipes.p_former import p_former
from isthmus.training import combination
from isthmus.training.optimizer import adamw, choose
from isthmus.training.step import Step
from isthmus.types import IGNORE, Batch, ConfigError, DataError, NothingToLearn

D, Q = tiny.WIDTH, 3
BEGIN = tiny.BOS
SHAPE = Shape(
    queries=Q, layers=2, width=16, heads=2, inner=24, dropout=0.0, vocabulary=tiny.VOCAB + 1, positions=32, contrast=8
)
TEACHER = ("prompt_contrast", "prompt_words", "prompt_lm")
SENTENCES = tuple(
    sample(answer=text) for text in ("a cat", "the dog is here", "on the left", "two birds", "red", "she was out")
)
PAIRS = tuple(sample(picture(n), answer=text) for n, text in enumerate(["a cat", "the dog is here", "on the left"], 1))
IDS = torch.tensor([[4, 7, 9, 11, 2], [4, 8, 2, -1, -1]])


def newborn(family: str = "llama", **options) -> VLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return composed.model(family, "p_former", {**SHAPE.model_dump(), **options})


def step_of(model: VLM, *names: str) -> Step:
    return Step(model, [ObjectiveConfig(name=name) for name in names])


def batch_of(model: VLM, samples=SENTENCES, **settings) -> Batch:
    return model.processor.collator(template="plain", **settings)(samples)


def teacher_stage(**changes) -> Stage:
    fields = {
        "name": "teacher",
        "data": ("none",),
        "train": {"heads.teacher.*": {}},
        "objectives": TEACHER,
        "template": "plain",
        "budget": Budget(steps=60),
        "lr": 1e-2,
    }
    return Stage(**{**fields, **changes})


@pytest.fixture
def stirred() -> PromptTeacher:
    teacher = PromptTeacher(SHAPE, D)
    torch.manual_seed(0)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return teacher.eval()


# ---------------------------------------------------------------------------------------------- the teacher


@torch.no_grad()
def test_it_reads_as_transformers_bert_does(stirred):
    config = BertConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    other = BertModel(config, add_pooling_layer=False).eval()
    names = (
        ("words.word", "embeddings.word_embeddings"),
        ("words.position", "embeddings.position_embeddings"),
        ("enter.0", "embeddings.LayerNorm"),
        ("attention.query", "attention.self.query"),
        ("attention.key", "attention.self.key"),
        ("attention.value", "attention.self.value"),
        ("attention.out", "attention.output.dense"),
        ("attention.norm", "attention.output.LayerNorm"),
        ("feed.expand", "intermediate.dense"),
        ("feed.contract", "output.dense"),
        ("feed.norm", "output.LayerNorm"),
    )
    state = {}
    for name, parameter in stirred.named_parameters():
        if name.startswith(("words.", "enter.", "layers.")):
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            state[name.replace("layers.", "encoder.layer.")] = parameter
    assert other.load_state_dict(state, strict=False).missing_keys == ["embeddings.token_type_embeddings.weight"]
    other.embeddings.token_type_embeddings.weight.zero_()
    expected = other(IDS.clamp(min=0), attention_mask=(IDS >= 0).long()).last_hidden_state[:, 0]
    torch.testing.assert_close(stirred.read(IDS), expected, atol=1e-5, rtol=1e-5)
    by_hand = torch.stack([F.linear(c, *stirred.spread.parameters()).view(Q, 16) for c in expected])
    by_hand = stirred.project(torch.tanh(stirred.bend(by_hand)))
    torch.testing.assert_close(stirred(IDS), by_hand, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_the_prompt_is_as_long_as_configured_whatever_the_text(queries):
    teacher = PromptTeacher(SHAPE.but(queries=queries), D).eval()
    for length in (1, 5, 20):
        assert teacher(torch.full((2, length), 9)).shape == (2, queries, D)
    model = newborn(queries=queries)
    assert model.heads["teacher"](torch.full((2, 5), 9)).shape[1] == model.queries("image") == queries


@torch.no_grad()
def test_padding_changes_no_prompt_and_every_word_does(stirred):
    torch.testing.assert_close(stirred(IDS)[1], stirred(IDS[1:, :3])[0], atol=1e-5, rtol=1e-5)
    for place in range(IDS.shape[1]):
        other = IDS.clone()
        other[0, place] = 33
        assert (stirred(other)[0] - stirred(IDS)[0]).abs().max() > 1e-3


def test_a_quarter_of_the_words_is_hidden_but_never_the_first_nor_padding(stirred):
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (500, 20))
    ids[250:, 12:] = -1
    hidden = stirred.mask(ids, 0.25)
    changed = hidden != ids
    assert not changed[:, 0].any() and not changed[250:, 12:].any() and (hidden[changed] == SHAPE.vocabulary - 1).all()
    assert changed[:, 1:][ids[:, 1:] >= 0].float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert changed[:, 1].any() and changed[:250, 19].any()
    assert torch.equal(stirred.mask(ids, 0.0), ids)


# ---------------------------------------------------------------------------------------------- sentences alone


def test_sentences_are_what_is_said_without_a_picture_in_order():
    model = newborn()
    collator = model.processor.collator(template="plain")
    one, two, three, four, *_ = SENTENCES
    batch = collator.rows([[one, PAIRS[0], two], [PAIRS[1]], [three, four]])
    ids = sentences(batch)
    decode = model.processor.batch_decode
    said = ["a cat", "the dog is here", "on the left", "two birds"]
    assert ids[:, 0].tolist() == [tiny.BOS] * 4
    assert decode([row[row >= 0][1:-1] for row in ids]) == said
    assert decode([row[:-1] for _, row in written(batch, BEGIN)]) == said
    assert len(batch.extra_text["image"]) == 2
    step = step_of(model, "prompt_match", *TEACHER)
    counts = {"prompt_match": 2, "prompt_contrast": 4, "prompt_words": 4}
    assert {name: step.terms[name].count(batch) for name in counts} == counts


def test_reconstruction_is_the_loss_that_transformers_computes():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_lm").eval(), batch_of(model)
    scales = step.scales([batch])
    found, _ = step(batch, scales)
    total, words = 0.0, 0
    for ids, (begin, text) in zip(sentences(batch), written(batch, BEGIN)):
        prompt = model.heads["teacher"](ids[None])
        embed = sites.embedding(model.llm)
        embeds = torch.cat([embed(begin)[None], prompt, embed(text)[None]], 1)
        labels = torch.cat([torch.full((len(begin) + Q,), -100), text])[None]
        total += model.llm(inputs_embeds=embeds, labels=labels).loss.item() * len(text)
        words += len(text)
    assert scales == {"prompt_lm": 1 / words} and found.item() == pytest.approx(total / words, rel=1e-4)


def test_what_begins_every_text_stands_before_the_prompt_as_before_soft_tokens():
    model = composed.stir(newborn())
    batch = batch_of(model)
    opened = replace(
        batch,
        input_ids_BT=F.pad(batch.input_ids_BT, (1, 0), value=BEGIN),
        segment_BT=F.pad(batch.segment_BT, (1, 0), value=1),
        labels_BT=F.pad(batch.labels_BT, (1, 0), value=IGNORE),
    )
    for (begin, text), (none, same) in zip(written(opened, BEGIN), written(batch, BEGIN), strict=True):
        assert begin.tolist() == [BEGIN] and not len(none) and torch.equal(text, same)
    step = step_of(model, "prompt_lm").eval()
    (with_one, without) = (step(each, step.scales([each]))[0].item() for each in (opened, batch))
    assert with_one != pytest.approx(without, rel=1e-4)


def test_prompts_are_drawn_to_the_nearest_words_and_words_stay():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_words").eval(), batch_of(model)
    words = sites.embedding(model.llm).weight.requires_grad_(True)
    total, _ = step(batch, step.scales([batch]))
    total.backward()
    with torch.no_grad():
        prompt = model.heads["teacher"](sentences(batch)).flatten(0, 1)
        squares = ((prompt[:, None] - words[None]) ** 2).mean(-1)
    assert total.item() == pytest.approx(squares.amin(1).mean().item(), rel=1e-5)
    assert words.grad is None and model.heads["teacher"].project.weight.grad.any()


def test_contrast_is_the_published_formula():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_contrast").eval(), batch_of(model)
    teacher = model.heads["teacher"]
    found, _ = step(batch, step.scales([batch]))
    z = F.normalize(teacher.contrast(teacher.read(sentences(batch))), dim=-1)
    expected = F.cross_entropy(z @ z.T / teacher.temperature, torch.arange(len(z)), label_smoothing=0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_words_are_hidden_in_training_alone():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_lm"), batch_of(model)
    choose(step, teacher_stage(objectives=("prompt_lm",)))
    scales = step.scales([batch])
    step.ready()
    assert len({step(batch, scales)[0].item() for _ in range(4)}) > 1
    step.eval()
    assert len({step(batch, scales)[0].item() for _ in range(4)}) == 1


def test_the_first_stage_moves_the_teacher_alone_and_the_llm_then_writes_from_its_prompts():
    model = newborn(queries=6, width=32, inner=64)
    step, batch = step_of(model, *TEACHER), batch_of(model, SENTENCES[:3])
    trained = choose(step, teacher_stage())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(trained, (0.9, 0.999))
    torch.manual_seed(0)
    step.ready()
    for _ in range(80):
        step(batch, step.scales([batch]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    step.eval()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert (
        moved
        == {each.name.removeprefix("vlm.") for each in trained}
        == {name for name in before if name.startswith("heads.teacher.")}
    )
    with torch.no_grad():
        output, texts = model.run(batch, need="connected"), written(batch, BEGIN)
        prompt = model.heads["teacher"](sentences(batch))
        taught, none, other = (
            reconstruction(step, output, p, texts, 256) for p in (prompt, torch.zeros_like(prompt), prompt.roll(1, 0))
        )
    assert taught < none / 2 and taught < 0.6 * other, "prompts tell of their own sentence"


# ---------------------------------------------------------------------------------------------- with pictures


def test_the_match_moves_the_connector_and_never_the_teacher():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_match"), batch_of(model, PAIRS)
    model.connectors.requires_grad_(True)
    model.heads.requires_grad_(True)
    total, _ = step(batch, step.scales([batch]))
    total.backward()
    assert all(parameter.grad is None for parameter in model.heads.parameters())
    assert model.connectors["image"].project.weight.grad.any() and model.connectors["image"].queries.grad.any()
    with torch.no_grad():
        expected = F.mse_loss(model.connect(batch)["image"], model.heads["teacher"](batch.extra_text["image"]))
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_match_goes_slot_by_slot():
    model = composed.stir(newborn())
    step, batch = step_of(model, "prompt_match"), batch_of(model, PAIRS)
    model.heads["teacher"].forward = lambda ids_NT: model.connect(batch)["image"]
    assert step(batch, step.scales([batch]))[0] == 0
    model.heads["teacher"].forward = lambda ids_NT: model.connect(batch)["image"].flip(1)
    assert step(batch, step.scales([batch]))[0] > 1e-3


def test_a_frozen_teacher_neither_forgets_nor_drops_out():
    model = newborn(dropout=0.5)
    step, batch = step_of(model, "itc", "itm", "itg", "prompt_match"), batch_of(model, PAIRS)
    first = p_former().stage("first")
    choose(step, first)
    step.ready()
    assert not model.heads["teacher"].training and model.connectors["image"].training
    ids = batch.extra_text["image"]
    assert torch.equal(model.heads["teacher"](ids), model.heads["teacher"](ids))
    total, shares = step(batch, step.scales([batch]))
    total.backward()
    silent = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not silent and all(shares.values())


def test_a_saved_model_takes_its_teacher_along(tmp_path):
    model = composed.stir(newborn())
    batch = batch_of(model)
    model.save_pretrained(tmp_path)
    again = isthmus.load(tmp_path)
    ids = sentences(batch_of(again))
    assert torch.equal(ids, sentences(batch))
    assert torch.equal(again.heads["teacher"](ids), model.heads["teacher"](ids))


# ---------------------------------------------------------------------------------------------- refusals, recipes


def test_what_cannot_be_taught_is_refused_with_the_remedy():
    model = newborn()
    with pytest.raises(NothingToLearn, match="no sentence without a picture"):
        step_of(model, *TEACHER).scales([batch_of(model, PAIRS)])
    plain = newborn(text=False)
    assert not plain.heads and plain.processor.reading is None
    for name in (*TEACHER, "prompt_match"):
        with pytest.raises(ConfigError, match="no prompt teacher"):
            step_of(plain, name)
        recipe = p_former().but(stages=(teacher_stage(objectives=(name,)),))
        with pytest.raises(ConfigError, match="stage teacher: this joint has no prompt teacher"):
            combination.check(recipe, plain, torch.device("cpu"))
    with pytest.raises(ConfigError, match="decoder-only"):
        step_of(newborn("t5"), "prompt_lm")
    with pytest.raises(ConfigError, match=f"needs {tiny.VOCAB + 1}"):
        newborn(vocabulary=tiny.VOCAB)


def test_several_answers_in_one_sample_are_no_sentence():
    model = newborn()
    step = step_of(model, "prompt_lm", "prompt_match")
    one, other = SENTENCES[:2]
    with pytest.raises(DataError, match="several answers in one sample"):
        step.scales([batch_of(model, (SENTENCES[2], one.but(branches=(other.turns,))))])
    asked = picture(1)
    pictured = sample(asked, "what?", answer="a cat")
    both = pictured.but(branches=(sample(asked, "where?", answer="on the left").turns,))
    batch = model.processor.collator()((both, one))
    assert batch.branch_BT.any() and len(written(batch, BEGIN)) == 1, "those with a picture may have them"


def test_the_published_teacher_is_bert_with_three_heads():
    plan = planning.plan(p_former("published"))
    config = BertConfig()
    with torch.device("meta"):
        bert = BertModel(config)
    newly = 768  # the entry that starts a caption
    types = 2 * 768  # not there: both rows of the token types
    spread, project, contrast = 768 * 24576 + 24576, 768 * 2560 + 2560, 768 * 256 + 256
    size = sum(p.numel() for p in bert.parameters()) + newly - types + spread + project + contrast + 1
    trained = {stage.name: stage.trained for stage in plan.stages}
    assert trained["teacher"] == plan.parts["heads.teacher"] == size
    # 188 M with heads is BLIP-2's figure; then 105.1 M of the queries' path and a projection (spec B2.1)
    assert trained["first"] == pytest.approx(188e6, rel=0.01)
    assert trained["second"] == pytest.approx(105.1e6 + 2560 * 769, rel=0.01)
    assert plan.tokens == {"image": 32}


@pytest.mark.parametrize("size", ["embedded", "published"])
def test_lambda_is_an_ablation(size):
    guided, other, without = p_former(size), p_former(size, weight=10), p_former(size, weight=0)
    assert [_weights(guided), _weights(other), _weights(without)] == [[10, 100], [10, 10], []]
    assert without.aligner == blip2(size).aligner and len({r.name for r in (guided, other, without)}) == 3
    assert [stage.name for stage in without.stages] == [stage.name for stage in guided.stages[1:]]
    for one, two in zip(without.stages, guided.stages[1:]):
        assert (one.data, one.budget, one.lr, one.batch_size) == (two.data, two.budget, two.lr, two.batch_size)
    assert planning.plan(without).tokens == planning.plan(guided).tokens


def _weights(recipe) -> list[float]:
    terms = (term for stage in recipe.stages for term in stage.objectives)
    return [term.weight for term in terms if term.name == "prompt_match"]
