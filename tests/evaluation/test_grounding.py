"""Referring and naming regions: right means enough overlap with the scene's own box, whatever the joint writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image as Pillow

import composed
from isthmus.config import Source, TaskConfig
from isthmus.data import sets
from isthmus.data.boxes import Decimals, overlap
from isthmus.evaluation import grounding, measure
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.grounding import Locate, truth
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Choice, Cut, Item, run
from isthmus.model import VLM
from isthmus.speakers.local import Local
from isthmus.types import IGNORE, Box, ConfigError, Grounding, Image, Sample, Turn

BOX = (0.2, 0.4, 0.6, 0.8)


@pytest.fixture(scope="module")
def model() -> VLM:
    """A joint that letter-boxes: coordinates in text are those of the padded square."""
    return composed.model("llama", "shikra", aspect="pad")


def samples(kind: str, count: int = 12, **options: Any) -> Sequence[Sample]:
    source = Source(name="scenes", split="test", options={"kinds": [kind], "count": count, **options})
    return sets.open_set(source, 0)[:]


def asked(size: tuple[int, int] = (40, 20)) -> Item:
    picture = Image(Pillow.new("RGB", size, "red"))
    return Item(Sample((Turn.say("user", picture, "Where is it?"),), "one", {"box": BOX}), "", (), "one", "refer")


def located(model: VLM, reply: str | None, item: Item) -> Any:
    (found,) = run(Locate("rec", (item,), (Cut("R"),)), Scorer(model, reply=lambda prompts: [reply] * len(prompts)))
    return found


def test_a_reply_is_read_in_the_coordinates_of_the_padded_square(model: VLM) -> None:
    # Twice as wide as high: y of the picture is a quarter of the square's margin plus half of it.
    right = located(model, "It is at [0.200,0.450,0.600,0.650].", asked())
    assert right.right and right.scores == pytest.approx((1.0,))
    shifted = located(model, "[0.300,0.450,0.700,0.650]", asked())
    assert shifted.scores == pytest.approx((0.3 / 0.5,)) and shifted.right
    assert not located(model, "[0.350,0.450,0.750,0.650]", asked()).right
    assert not located(model, "[0.200,0.450,0.600,0.650]", asked((20, 40))).right


@pytest.mark.parametrize("reply", ["", "on the left", "[0.2,0.4,0.6]", "[0.6,0.4,0.2,0.8]"])
def test_a_reply_without_a_region_is_wrong(model: VLM, reply: str) -> None:
    found = located(model, reply, asked())
    assert found.right is False and found.scores == (0.0,)


def test_no_reply_is_not_scored_and_none_at_all_is_refused(model: VLM) -> None:
    assert located(model, None, asked()).right is None
    with pytest.raises(ConfigError, match="free replies"):
        run(Locate("rec", (asked(),), (Cut("R"),)), Scorer(model))


def test_rec_asks_for_what_is_there_once_and_the_answer_is_right(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    task = named("rec")(TaskConfig(name="rec", limit=8), 0)
    assert isinstance(task, Locate) and len(task.items) == 8
    answers = [f"there: {Decimals().write([truth(item)])}" for item in task.items]
    place = {item.prompt.id: place for place, item in enumerate(task.items)}

    def reply(prompts: Sequence[Sample]) -> list[str | None]:
        assert all(prompt.turns[-1].role == "user" for prompt in prompts)
        return [answers[place[prompt.id]] for prompt in prompts]

    found = run(task, Scorer(model, reply=reply, batch_size=3))
    assert all(prediction.right and prediction.scores[0] > 0.95 for prediction in found)
    swapped = answers[1:] + answers[:1]
    wrong = run(task, Scorer(model, reply=lambda prompts: [swapped[place[one.id]] for one in prompts], batch_size=3))
    expected = [overlap(truth(a), truth(b)) for a, b in zip(task.items, [*task.items[1:], task.items[0]])]
    assert [prediction.scores[0] for prediction in wrong] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("joint", ["shikra", "kosmos2"])
def test_referring_scores_the_answer_as_the_model_learns_to_write_it(joint: str) -> None:
    """A stage's own loss over the same questions: labels there are what the joint's template makes of the region."""
    model = composed.model("llama", joint, aspect="pad")
    task = named("rec-nll")(TaskConfig(name="rec-nll", limit=3), 0)
    found = run(task, Scorer(model))
    learnt = samples("refer", 3)
    batch = model.processor.collator()(learnt)
    assert [each.id for each in found] == [each.id for each in learnt]
    written = [model.processor.tokenizer.decode(row[row != IGNORE]) for row in batch.labels_BT]
    assert all(each.answer in text for each, text in zip(found, written))
    assert all(each.right is None and each.scores[0] < 0 for each in found)


def test_reg_chooses_among_ten_names_with_the_others_of_the_picture(model: VLM) -> None:
    task = named("reg")(TaskConfig(name="reg", limit=3), 0)
    assert isinstance(task, Choice)
    for item in task.items:
        there = {name for name, _ in item.prompt.meta["boxes"]}
        assert len(item.choices) == 10 and item.answer in there < set(item.choices)
        (box,) = (part for part in item.prompt.turns[0].parts if isinstance(part, Box))
        assert dict(item.prompt.meta["boxes"])[item.answer] == box.xyxy
    assert len(run(task, Scorer(model))) == 3


def test_measured_replies_are_long_enough_for_a_box(model: VLM, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Silent(Local):
        def __init__(self, model: VLM, look: Callable[..., Any] | None, max_new_tokens: int) -> None:
            super().__init__(model, look, max_new_tokens=max_new_tokens)
            lengths.append(max_new_tokens)

        def say_all(self, asked: Sequence[Sample]) -> list[str]:
            return [""] * len(asked)

    monkeypatch.setattr(measure, "Local", Silent)
    configs = [TaskConfig(name="rec", limit=2, controls=()), TaskConfig(name="naming-free", limit=2, controls=())]
    measure.measure(model, measure.build(configs, 0), 0, tmp_path)
    written = Decimals().write([Box((0.123, 0.123, 0.456, 0.456), "the longest of names")])
    assert lengths[0] > len(written) and lengths[1] < lengths[0]
    assert grounding.Locate.longest == lengths[0]


# ---------------------------------------------------------------------------------------------- the questions


def test_referring_questions_hold_the_scene_s_own_box() -> None:
    for sample in samples("refer"):
        question, answer = sample.turns
        (box,) = answer.parts
        assert isinstance(box, Box) and isinstance(question.parts[-1], Grounding)
        name = box.label.removeprefix("the ")
        assert dict(sample.meta["boxes"])[name] == box.xyxy == sample.meta["box"]
        assert f"Where is the {name}?" == question.text
        assert [listed for listed, _ in sample.meta["boxes"]].count(name) == 1


def test_regions_are_asked_only_when_named() -> None:
    for options in ({}, {"together": True, "repeat": 3}):
        set_ = sets.open_set(Source(name="scenes", split="train", options={"count": 20, **options}), 0)
        parts = [part for one in set_ for turns in (one.turns, *one.branches) for turn in turns for part in turn.parts]
        assert not any(isinstance(part, Box | Grounding) for part in parts)


def test_many_regions_of_a_picture_are_branches_of_one_sample() -> None:
    for sample in samples("refer", together=True, repeat=3):
        assert len(sample.branches) == 2 and "box" not in sample.meta
        assert all(turns[0].media == sample.media for turns in sample.branches)
