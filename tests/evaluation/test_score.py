"""Scores with a shared prompt equal whole conversations, each run alone."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from PIL import Image as Pillow

import composed
from isthmus.evaluation import score
from isthmus.evaluation.score import Question, Scorer, _rank
from isthmus.model import VLM
from isthmus.types import DataError, Image, Sample, Turn

CHOICES = ("yes", "no, it is not", "a red thing", "three")


def picture(shade: int) -> Image:
    return Image(Pillow.new("RGB", (30, 20), (shade, 255 - shade, 60)))


QUESTIONS = [
    Question(Sample(turns, id=f"q{number}"), choices)
    for number, (turns, choices) in enumerate(
        [
            ((Turn.say("user", picture(10), "Is it?"),), CHOICES),
            ((Turn.say("user", "What might be in this picture here?", picture(90)),), CHOICES),
            (
                (
                    Turn.say("user", picture(5), picture(240), "Two?"),
                    Turn.say("assistant", "yes"),
                    Turn.say("user", "Sure?"),
                ),
                CHOICES[:2],
            ),
            ((Turn.say("system", "Be brief."), Turn.say("user", "No picture at all.")), CHOICES),
            ((Turn.say("user", picture(77), "Describe."),), ("only one answer",)),
        ]
    )
]


@pytest.fixture(scope="module", params=("llama", "qwen2", "opt", "mistral", "gemma3_text"))
def model(request: pytest.FixtureRequest) -> VLM:
    return composed.stir(composed.model(request.param))


@torch.no_grad()
def alone(model: VLM, sample: Sample, answer: str) -> list[float]:
    """Log-probabilities of the last answer's tokens, from the whole conversation in one call."""
    whole = sample.but(turns=(*sample.turns, Turn.say("assistant", answer)))
    batch = model.processor.collator()([whole])
    output = model.run(batch)
    assert output.hidden_BTD is not None and batch.labels_BT is not None
    logits = output.head(output.hidden_BTD[0, :-1]).log_softmax(-1)
    labels = batch.labels_BT[0, 1:]
    prompt = len(model.processor.renderer().render(sample.turns, open_answer=True).ids)
    return [logits[t, labels[t]].item() for t in range(prompt - 1, len(labels)) if labels[t] >= 0]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_shared_prompts_equal_whole_conversations(model: VLM, batch_size: int) -> None:
    found = Scorer(model, batch_size=batch_size).likelihoods(QUESTIONS)
    for asked, scores in zip(QUESTIONS, found, strict=True):
        expected = [alone(model, asked.sample, choice) for choice in asked.choices]
        assert scores.values == pytest.approx([sum(values) for values in expected], abs=5e-5)
        assert scores.tokens == tuple(map(len, expected))
        assert len({round(value, 3) for value in scores.values}) == len(asked.choices)


@torch.no_grad()
def reply_by_hand(model: VLM, sample: Sample, answer: str) -> list[float]:
    """Log-probabilities of an answer's tokens by the encoder-decoder of transformers alone, one call per answer."""
    batch = model.processor.prompts([sample])
    tokenizer = model.processor.tokenizer
    labels = tokenizer(answer, return_tensors="pt").input_ids  # it ends with the end token
    embeds = model.embed(batch, model.connect(batch))
    logits = model.llm(inputs_embeds=embeds, labels=labels).logits[0].log_softmax(-1)
    return logits.gather(1, labels[0, :, None])[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_encoder_decoder_reads_each_prompt_once_for_all_choices(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed.stir(composed.model("flan-t5"))
    genuine, read = model.read, []
    monkeypatch.setattr(model, "read", lambda batch, *more: read.append(len(batch.ids)) or genuine(batch, *more))
    monkeypatch.setattr(score, "TOLD", 3)  # so that one question's choices are told in two turns
    found = Scorer(model, batch_size=batch_size).likelihoods(QUESTIONS)
    assert sum(read) == len(QUESTIONS)
    for asked, scores in zip(QUESTIONS, found, strict=True):
        expected = [reply_by_hand(model, asked.sample, choice) for choice in asked.choices]
        assert scores.values == pytest.approx([sum(values) for values in expected], rel=1e-5)
        assert scores.tokens == tuple(map(len, expected))


def test_equal_prompts_and_pictures_are_run_once() -> None:
    model, ran = composed.model(), []
    genuine = model.run
    model.run = lambda batch, **how: ran.append(batch.input_ids_BT.numel()) or genuine(batch, **how)  # type: ignore
    same = [
        Question(Sample((Turn.say("user", picture(5), "Name this."),), id=f"q{n}"), (f"a {n}", f"b {n}"))
        for n in range(6)
    ]
    together = Scorer(model).likelihoods(same)
    tokens = sum(ran)
    ran.clear()
    for question, scores in zip(same, together):
        assert Scorer(model).likelihoods([question])[0].values == pytest.approx(scores.values, abs=5e-5)
    assert tokens < sum(ran) / 2


@pytest.mark.parametrize("family", ["llama", "flan-t5"])
def test_questions_that_differ_in_their_kind_alone_are_scored_apart(family: str) -> None:
    """LION has an adapter for each kind."""
    options = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "vocabulary": 320, "bottleneck": 4}
    space = {"heads": 2, "inner": 24, "dropout": 0.0}
    joint = {**options, "aggregator": space, "dropout": 0.0}
    model = composed.stir(composed.model(family, "lion", joint, taps=(2, 1), layer=3))
    told = [Sample((Turn.say("user", picture(10), "Is it?"),), meta={"route": route}) for route in (0, 1)]
    both = Scorer(model).likelihoods([Question(one, CHOICES[:2]) for one in told])
    for one, scores in zip(told, both, strict=True):
        if family == "llama":
            expected = [sum(alone(model, one, choice)) for choice in CHOICES[:2]]
            assert scores.values == pytest.approx(expected, abs=1e-4)
        own = Scorer(model).likelihoods([Question(one, CHOICES[:2])])[0]
        assert scores.values == pytest.approx(own.values, abs=1e-4)
    assert abs(both[0].values[0] - both[1].values[0]) > 1e-2


def test_progress_counts_every_question_once() -> None:
    heard: list[int] = []
    Scorer(composed.model(), batch_size=2).likelihoods(QUESTIONS, heard.append)
    assert sum(heard) == len(QUESTIONS) and len(heard) > 1


def test_batches_are_scored_in_threads_under_the_autocast_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = composed.stir(composed.model("llama")), []
    scorer, whole = Scorer(model, batch_size=1), Scorer._score

    def score_and_tell(self: Scorer, groups: list[score.Group]) -> tuple[torch.Tensor, torch.Tensor]:
        here = threading.current_thread() is not threading.main_thread()
        seen.append((here, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return whole(self, groups)

    monkeypatch.setattr(Scorer, "_score", score_and_tell)
    plain = scorer.likelihoods(QUESTIONS)
    assert seen == [(True, False, True)] * len(QUESTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = scorer.likelihoods(QUESTIONS)
    assert seen[len(QUESTIONS) :] == [(True, True, True)] * len(QUESTIONS)
    assert [each.values for each in rough] != [each.values for each in plain]


def test_rank_counts_earlier_equals() -> None:
    assert _rank(torch.tensor([3, 3, 5, 3, 5])).tolist() == [0, 1, 0, 2, 1]


@torch.no_grad()
def test_cosines_equal_a_hand_calculation() -> None:
    model = composed.model()
    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[2]]
    found = Scorer(model, batch_size=2).cosines(asked)
    renderer, table = model.processor.renderer(), model.get_input_embeddings().weight
    names = list(dict.fromkeys(choice for question in asked for choice in question.choices))
    texts = []
    for name in names:
        rendered = renderer.render((Turn.say("user", "x"), Turn.say("assistant", f" {name}")))
        texts.append({i for i, trained in zip(rendered.ids, rendered.trained) if trained})
    words = sorted(set().union(*texts))
    centre = table[words].mean(0)
    rarity = {word: max(math.log(len(texts) / sum(word in text for text in texts)), 1e-6) for word in words}
    for question, scores in zip(asked, found, strict=True):
        pixels, _ = model.processor.look("image", question.sample.media)
        assert pixels is not None
        pictures = model.connectors["image"](model.encoders["image"](pixels), None) - centre
        for choice, value in zip(question.choices, scores.values, strict=True):
            text = texts[names.index(choice)]
            whole = sum(rarity[word] for word in text)
            expected = max(
                sum(
                    rarity[word] / whole * torch.cosine_similarity(places, table[word] - centre, dim=-1).max().item()
                    for word in text
                )
                for places in pictures
            )
            assert value == pytest.approx(expected, abs=1e-5)


def test_cosine_refuses_an_item_without_a_picture() -> None:
    with pytest.raises(DataError, match="q3: no picture"):
        Scorer(composed.model()).cosines(QUESTIONS[:4])
