"""Likelihoods with a shared prefix equal those of every candidate appended and run whole, by transformers alone."""

from __future__ import annotations

import pytest
import torch
from fake_vlm import END, LETTER, FakeCollator, FakeRendered, FakeRenderer, FakeVLM, colour
from PIL import Image as Pillow

from isthmus.evaluation.score import Question, Scorer, cosine
from isthmus.types import DataError, Image, Modality, Sample, Turn

CHOICES = ("yes", "no", "a rather long answer", "b")


def picture(red: int, green: int) -> Image:
    return Image(Pillow.new("RGB", (4, 4), (red, green, 90)))


def question(name: str, *parts: Image | str, choices: tuple[str, ...] = CHOICES) -> Question:
    return Question(Sample((Turn.say("user", *parts),), id=name), choices)


QUESTIONS = [
    question("short", picture(250, 0), "Is it?"),
    question("long", picture(0, 250), "What could it be, if anything at all?"),
    question("blank", "No picture here."),
    question("two", picture(9, 9), "and", picture(99, 200), "differ?", choices=("no", "yes, they do", "b", "c")),
    question("few", picture(1, 2), "Which?", choices=("left", "right!")),
]


@pytest.fixture(scope="module")
def model() -> FakeVLM:
    return FakeVLM()


def scorer(model: FakeVLM, **options: int) -> Scorer:
    renderer = FakeRenderer()
    return Scorer(model, renderer, FakeCollator(renderer), **options)


@torch.no_grad()
def naive(model: FakeVLM, sample: Sample, answer: str) -> float:
    """The whole conversation in one unpadded call of the Llama without a cache."""
    rendered = FakeRenderer().render((*sample.turns, Turn.say("assistant", answer)))
    ids = torch.tensor(rendered.ids)
    embeds = model.llm.get_input_embeddings()(ids)
    if rendered.media:
        vectors = model.connect(torch.stack([colour(image) for image in rendered.media])[:, :, None, None])
        embeds[torch.tensor(rendered.modality) == Modality.IMAGE] = vectors.flatten(0, 1)
    logits = model.llm(inputs_embeds=embeds[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]].item() for t, trained in enumerate(rendered.trained) if trained)


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 2, "rows": 3}, {"rows": 1}])
def test_scores_equal_every_candidate_run_whole(model: FakeVLM, options: dict[str, int]) -> None:
    found = scorer(model, **options).likelihoods(QUESTIONS)
    for asked, scores in zip(QUESTIONS, found, strict=True):
        expected = [naive(model, asked.sample, choice) for choice in asked.choices]
        assert scores.values == pytest.approx(expected, abs=1e-5)
        assert scores.tokens == tuple(len(choice) + 1 for choice in asked.choices)  # letters, and the end


def test_scores_do_not_depend_on_the_other_questions(model: FakeVLM) -> None:
    together = scorer(model).likelihoods(QUESTIONS)
    for asked, scores in zip(QUESTIONS, together, strict=True):
        assert scorer(model).likelihoods([asked])[0].values == pytest.approx(scores.values, abs=1e-5)


def test_probabilities_of_all_one_token_answers_sum_to_at_most_one(model: FakeVLM) -> None:
    letters = tuple(chr(c) for c in range(ord("A"), ord("z")))
    scores = scorer(model).likelihoods([question("all", "?", choices=letters)])[0]
    assert 0 < torch.tensor(scores.values).exp().sum() <= 1


def test_equal_prompts_and_pictures_share_one_prefill(model: FakeVLM) -> None:
    same = [question(f"q{n}", picture(5, 5), "Name this.", choices=(f"a{n}", f"b{n}")) for n in range(6)]
    model.tokens_run = 0
    scorer(model).likelihoods(same)
    shared = model.tokens_run
    prompt = len(FakeRenderer().render(same[0].sample.turns, open_answer=True).ids)
    assert shared == prompt + 12 * 2  # one prompt; twelve candidates of two letters, whose end is not fed

    apart = [question(f"q{n}", picture(5, n), "Name this.", choices=("a", "b")) for n in range(6)]
    model.tokens_run = 0
    scorer(model).likelihoods(apart)
    assert model.tokens_run == 6 * (prompt + 2)


def test_progress_counts_every_question_once(model: FakeVLM) -> None:
    heard: list[int] = []
    scorer(model, batch_size=2).likelihoods(QUESTIONS, heard.append)
    assert sum(heard) == len(QUESTIONS) and len(heard) > 1


def test_a_template_that_rewrites_the_prompt_is_refused(model: FakeVLM) -> None:
    class Rewriting(FakeRenderer):
        def render(self, turns: tuple[Turn, ...], open_answer: bool = False) -> FakeRendered:
            rendered = super().render(turns, open_answer)
            rendered.ids[0] += open_answer
            return rendered

    renderer = Rewriting()
    with pytest.raises(DataError, match="prompt differently"):
        Scorer(model, renderer, FakeCollator(renderer)).likelihoods(QUESTIONS[:1])


@torch.no_grad()
def test_cosines_equal_a_hand_calculation_and_leave_the_llm_out(model: FakeVLM) -> None:
    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]
    model.tokens_run = 0
    found = scorer(model, batch_size=2).cosines(asked)
    assert model.tokens_run == 0

    names = sorted({choice for q in asked for choice in q.choices})
    table = model.llm.get_input_embeddings().weight
    vectors = torch.stack([table[[*(LETTER + ord(c) % 90 for c in name), END]].mean(0) for name in names])
    vectors = vectors - vectors.mean(0)
    for one, scores in zip(asked, found, strict=True):
        pixels = torch.stack([colour(image) for image in one.sample.media])[:, :, None, None]
        seen = model.connect(pixels).flatten(0, 1).mean(0)
        expected = [torch.cosine_similarity(seen, vectors[names.index(choice)], dim=0).item() for choice in one.choices]
        assert scores.values == pytest.approx(expected, abs=1e-5)


def test_cosine_refuses_an_item_without_a_picture(model: FakeVLM) -> None:
    with pytest.raises(DataError, match="blank: no picture"):
        scorer(model).cosines(QUESTIONS[:3])


def test_cosine_of_axes() -> None:
    axes = torch.eye(2).double()
    assert torch.allclose(
        cosine(axes * 3, torch.tensor([[5.0, 0], [1, 1]])), torch.tensor([[1, 0.5**0.5], [0, 0.5**0.5]]).double()
    )
