"""The real model: a shared prefix with pictures and left padding equals whole conversations run alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as Pillow

import tiny
from isthmus import compose
from isthmus.config import Recipe
from isthmus.evaluation.score import Question, Scorer
from isthmus.model import VLM
from isthmus.types import Image, Sample, Turn

CHOICES = ("yes", "no, it is not", "a red thing", "three")


@pytest.fixture(scope="module", params=("llama", "qwen2", "opt"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    llm = tiny.llm_folder(folder / "llm", request.param)
    encoder = tiny.vision_folder(folder / "encoder", "clip")
    return compose(Recipe.model_validate({"llm": {"source": str(llm)}, "encoder": {"source": str(encoder)}}))


def questions() -> list[Question]:
    def picture(shade: int) -> Image:
        return Image(Pillow.new("RGB", (30, 20), (shade, 255 - shade, 60)))

    turns = (
        (Turn.say("user", picture(10), "Is it?"),),
        (Turn.say("user", "What might be in this picture here?", picture(90)),),
        (Turn.say("user", picture(5), picture(240), "Two?"), Turn.say("assistant", "yes"), Turn.say("user", "Sure?")),
        (Turn.say("system", "Be brief."), Turn.say("user", "No picture at all.")),
    )
    return [Question(Sample(turn, id=f"q{n}"), CHOICES) for n, turn in enumerate(turns)]


@torch.no_grad()
def alone(model: VLM, sample: Sample, answer: str) -> float:
    """The conversation as training sees it, in one call without a cache; only its last answer is counted."""
    whole = sample.but(turns=(*sample.turns, Turn.say("assistant", answer)))
    batch = model.processor.collator()([whole])
    output = model.run(batch)
    assert output.hidden_BTD is not None and batch.labels_BT is not None
    logits = output.head(output.hidden_BTD[0, :-1]).log_softmax(-1)
    labels = batch.labels_BT[0, 1:]
    prompt = len(model.processor.renderer().render(sample.turns, open_answer=True).ids)
    return sum(logits[t, labels[t]].item() for t in range(prompt - 1, len(labels)) if labels[t] >= 0)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "rows": 3}])
def test_shared_prefix_equals_whole_conversations(model: VLM, options: dict[str, int]) -> None:
    scorer = Scorer(model, model.processor.renderer(), model.processor.prompts, **options)  # type: ignore[arg-type]
    for asked, scores in zip(questions(), scorer.likelihoods(questions()), strict=True):
        expected = [alone(model, asked.sample, choice) for choice in asked.choices]
        assert scores.values == pytest.approx(expected, abs=2e-5)
        assert len({round(value, 3) for value in scores.values}) == len(CHOICES)


def test_the_joint_alone_sees_pictures(model: VLM) -> None:
    scorer = Scorer(model, model.processor.renderer(), model.processor.prompts)
    first, second = scorer.cosines(questions()[:2])
    assert first.values != second.values and all(-1 <= value <= 1 for value in first.values)
