"""Masked words: which are hidden, what is read in their place, and the loss of BERT's own head over them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

import composed
import tiny
from composed import picture, sample
from isthmus.config import ObjectiveConfig
from isthmus.connectors.qformer import Shape
from isthmus.connectors.qformer_weights import INSTRUCT
from isthmus.model import VLM
from isthmus.objectives import mlm, named
from isthmus.training.step import Step
from isthmus.types import Output

Q = 3
SHAPE = Shape(queries=Q, layers=3, width=16, heads=2, inner=24, dropout=0.0, vocabulary=tiny.VOCAB + 1, positions=32)
PAIRS = tuple(sample(picture(n), answer=text) for n, text in enumerate(["a cat", "the dog is here", "on the left"], 1))
IDS = torch.tensor([[4, 7, 9, 11, 12, 13, 2], [4, 8, 2, -1, -1, -1, -1], [4, 2, -1, -1, -1, -1, -1]])


def nothing() -> Output:
    """The output of a forward of which terms ask everything themselves."""
    return Output(None, {}, None, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> VLM:
    return composed.stir(composed.model("llama", "blip2", {**SHAPE.model_dump(), "text": True}))


def test_words_are_what_stands_between_the_ends() -> None:
    assert mlm.words(IDS).int().tolist() == [[0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert mlm.words(torch.tensor([[4]])).tolist() == [[False]]


def test_a_share_of_every_text_is_hidden_and_at_least_a_word() -> None:
    assert mlm.quota(mlm.words(IDS), 0.15).tolist() == [1, 1, 0]
    assert mlm.quota(mlm.words(IDS), 0.5).tolist() == [2, 1, 0]
    torch.manual_seed(0)
    draws = torch.stack([mlm.draw(mlm.words(IDS), 0.5) for _ in range(400)])
    assert (draws.sum(2) == torch.tensor([2, 1, 0])).all() and not (draws & ~mlm.words(IDS)).any()
    often = draws[:, 0, 1:6].float().mean(0)  # each of five words in two draws of five
    torch.testing.assert_close(often, torch.full((5,), 0.4), atol=0.08, rtol=0)  # three standard errors


def test_of_hidden_words_eight_in_ten_are_masked_and_one_is_any_word() -> None:
    torch.manual_seed(0)
    ids = torch.full((100, 100), 5)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 10:60] = True
    read = mlm.replace(ids, hidden, mask=999, vocabulary=50)
    assert torch.equal(read[~hidden], ids[~hidden])
    masked, kept = (read[hidden] == 999).float().mean(), (read[hidden] == 5).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1 + 0.1 / 50, abs=0.015)
    others = read[hidden & (read != 999) & (read != 5)]
    assert others.min() == 0 and others.max() == 49 and len(others.unique()) == 49


def test_the_loss_is_that_of_transformers_qformer_over_the_hidden_words(model: VLM) -> None:
    batch, objective = model.processor.collator()(PAIRS), named("mlm", {"share": 0.4})
    former, ids = model.connectors["image"], batch.extra_text["image"]
    other = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            encoder_hidden_size=32,
            cross_attention_frequency=2,
            vocab_size=tiny.VOCAB + 1,
            max_position_embeddings=32,
        )
    ).eval()
    state = {INSTRUCT.theirs(name) or name: p for name, p in former.state_dict().items()}
    other.load_state_dict({n.removeprefix("qformer."): p for n, p in state.items() if n.startswith("qformer.")})
    torch.manual_seed(5)
    hidden = mlm.draw(mlm.words(ids), 0.4)
    read = mlm.replace(ids, hidden, mask=tiny.VOCAB, vocabulary=tiny.VOCAB)
    assert (read == tiny.VOCAB).any() and not torch.equal(read, ids)
    with torch.no_grad():
        states = other(
            input_ids=read.clamp(min=0),
            attention_mask=torch.cat([torch.ones(3, Q, dtype=torch.long), (ids >= 0).long()], 1),
            query_embeds=former.queries.expand(3, -1, -1),
            encoder_hidden_states=former.picture_norm(model.encode("image", batch.media["image"]).x_NSE),
        ).last_hidden_state[:, Q:]
    expected = torch.zeros(())
    for text, place in hidden.nonzero().tolist():
        state = former.heads.norm(F.gelu(former.heads.transform(states[text, place])))
        logits = former.words.word.weight @ state + former.heads.bias
        expected = expected - logits.log_softmax(0)[ids[text, place]]
    torch.manual_seed(5)
    found = objective.loss(Step(model, [ObjectiveConfig(name="mlm")]), nothing(), batch)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert objective.count(batch) == int(hidden.sum()) > 3


def test_hidden_words_are_read_from_the_picture_too(model: VLM) -> None:
    batch = model.processor.collator()(PAIRS)
    former, ids = model.connectors["image"], batch.extra_text["image"]
    features, hidden = model.encode("image", batch.media["image"]), mlm.draw(mlm.words(ids), 0.4)
    one = mlm.guess(former, features, ids, hidden)
    other = mlm.guess(former, features.map(lambda x: x.flip(0)), ids, hidden)
    assert (one - other).abs().max() > 1e-3


def test_berts_own_mask_can_be_named(model: VLM) -> None:
    batch, step = model.processor.collator()(PAIRS), Step(model, [ObjectiveConfig(name="mlm")])
    asked: list[torch.Tensor] = []
    former = model.connectors["image"]
    with former.words.word.register_forward_pre_hook(lambda module, args: asked.append(args[0])):
        for options, entry in (({}, tiny.VOCAB), ({"mask": 103}, 103)):
            torch.manual_seed(0)
            named("mlm", {"share": 0.9, **options}).loss(step, nothing(), batch)
            assert (asked[-1] == entry).sum() > 3
    assert not (asked[1] == tiny.VOCAB).any()


def test_validation_asks_the_data_alone(model: VLM) -> None:
    batch, objective = model.processor.collator()(PAIRS), named("mlm", {"alpha": 0.4})
    step = Step(model, [ObjectiveConfig(name="mlm", options={"alpha": 0.4})])
    step.accompany()
    composed.stir(step.companions["momentum"].connectors)

    def loss(term: mlm.MLM) -> float:
        torch.manual_seed(0)
        return term.loss(step, nothing(), batch).item()

    hard, soft = loss(named("mlm", {})), loss(objective)
    assert loss(objective.eval()) == hard != soft


def test_the_same_step_hides_the_same_words_and_a_batch_without_media_none(model: VLM) -> None:
    batch, step = model.processor.collator()(PAIRS), Step(model, [ObjectiveConfig(name="mlm")])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(named("mlm", {"share": 0.5}).loss(step, nothing(), batch).item())
    assert found[0] == found[1] != found[2]
    batch.media, batch.extra_text = {}, {}
    assert named("mlm", {}).count(batch) == 0 and named("mlm", {}).loss(step, nothing(), batch) == 0
