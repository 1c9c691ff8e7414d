"""Demonstrations: which, in what order, that none gives the answer away, and that a copier learns from them alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image as Pillow

import composed
from isthmus.config import TaskConfig
from isthmus.data import concepts
from isthmus.data.scenes import COLOURS, Scene
from isthmus.evaluation import catalogue, controls, measure
from isthmus.evaluation.fewshot import Shots, build, shown
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Choice, Cut, Generate, Item, item, run
from isthmus.types import ConfigError, DataError, Image, Sample, Turn


def picture(shade: int) -> Image:
    return Image(Pillow.new("RGB", (6, 6), (shade, 0, 60)))


def sample(name: str, shade: int, answer: str, choices: tuple[str, ...] = (), cluster: str = "") -> Sample:
    return Sample(
        (Turn.say("user", picture(shade), f"{name}?"), Turn.say("assistant", answer)),
        id=name,
        meta={"choices": choices, "answer": answer, "cluster": cluster or name},
    )


def task(*samples: Sample) -> Choice:
    return Choice("t", tuple(map(item, samples)), (Cut("T"),))


def texts(one: Item) -> list[str]:
    return [turn.text for turn in one.prompt.turns]


YES_NO = ("yes", "no")
SHELF = [sample(f"d{n}", 100 + n, YES_NO[n % 2], YES_NO) for n in range(40)]


# ---------------------------------------------------------------------------------------------- prompts


def test_a_prompt_is_demonstrations_and_then_the_question() -> None:
    asked = task(sample("q", 1, "yes", YES_NO))
    made = shown(asked, SHELF[:2], Shots(shots=2), seed=0)
    one, two = (texts_of(sample) for sample in SHELF[:2])
    assert texts(made.items[0]) in ([*one, *two, "q?"], [*two, *one, "q?"])
    assert [turn.role for turn in made.items[0].prompt.turns] == ["user", "assistant", "user", "assistant", "user"]
    assert len(made.items[0].prompt.media) == 3 and made.items[0].prompt.media[-1] is asked.items[0].prompt.media[0]
    assert (made.name, made.cuts[0].label) == ("t-2-shots", "T, 2 shots")
    assert (made.items[0].answer, made.items[0].choices) == ("yes", YES_NO)


def texts_of(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns]


def test_zero_shots_are_the_question_or_two_texts_without_pictures() -> None:
    asked = task(sample("q", 1, "yes", YES_NO))
    assert shown(asked, SHELF, Shots(shots=0), 0).items == asked.items
    two = shown(asked, SHELF, Shots(shots=0, zero="texts"), 0).items[0]
    assert len(two.prompt.turns) == 5 and len(two.prompt.media) == 1
    same = shown(asked, SHELF, Shots(shots=2), 0).items[0]
    assert texts(two) == texts(same)


def test_unasked_leaves_pictures_and_answers() -> None:
    made = shown(task(sample("q", 1, "yes", YES_NO)), SHELF, Shots(shots=2, asked=False), 0).items[0]
    assert [text in YES_NO for text in texts(made)] == [False, True, False, True, False]
    assert texts(made)[::2] == ["", "", ""] and len(made.prompt.media) == 3


def test_a_system_turn_stays_in_front() -> None:
    one = task(sample("q", 1, "yes", YES_NO)).items[0]
    prompt = one.prompt.but(turns=(Turn.say("system", "Be brief."), *one.prompt.turns))
    made = shown(Choice("t", (replace(one, prompt=prompt),), (Cut("T"),)), SHELF, Shots(shots=1), 0).items[0]
    assert [turn.role for turn in made.prompt.turns] == ["system", "user", "assistant", "user"]


def test_system_turns_of_demonstrations_are_left_out() -> None:
    told = [one.but(turns=(Turn.say("system", "Shout."), *one.turns)) for one in SHELF]
    asked = task(sample("q", 1, "yes", YES_NO))
    assert shown(asked, told, Shots(shots=3), 0).items == shown(asked, SHELF, Shots(shots=3), 0).items


def test_more_shots_stand_in_front_of_the_same_ones() -> None:
    asked = task(*(sample(f"q{n}", n, "yes", YES_NO) for n in range(5)))
    few, many = (shown(asked, SHELF, Shots(shots=k), 3) for k in (4, 8))
    for one, other in zip(few.items, many.items):
        assert other.prompt.turns[-9:] == one.prompt.turns and len(other.prompt.turns) == 17
    assert len({texts(one)[0] for one in few.items}) > 1, "each item has its own"
    assert shown(asked, SHELF, Shots(shots=4), 3).items == few.items
    assert shown(asked, SHELF, Shots(shots=4), 4).items != few.items


# ---------------------------------------------------------------------------------------------- leaks


def test_the_draw_does_not_know_a_closed_answer() -> None:
    yes, no = (shown(task(sample("q", 1, answer, YES_NO)), SHELF, Shots(shots=8), 0) for answer in YES_NO)
    assert texts(yes.items[0]) == texts(no.items[0])
    asked = task(*(sample(f"q{n}", n, "yes", YES_NO) for n in range(60)))
    told = Counter(t for one in shown(asked, SHELF, Shots(shots=4), 0).items for t in texts(one)[1::2])
    assert 0.35 < told["yes"] / 240 < 0.65  # 3 sigma is 0.097


def test_no_demonstration_says_one_of_an_items_own_choices() -> None:
    shelf = [sample(f"d{n}", 100 + n, f"thing {n}", (f"thing {n}", f"thing {n + 1}")) for n in range(12)]
    asked = task(sample("q", 1, "thing 3", ("thing 3", "thing 5")))
    made = shown(asked, shelf, Shots(shots=10), 0)
    assert {*texts(made.items[0])[1::2]} == {f"thing {n}" for n in range(12)} - {"thing 3", "thing 5"}
    with pytest.raises(DataError, match="10 of 11 demonstrations"):
        shown(asked, shelf, Shots(shots=11), 0)
    free = Choice("t", (replace(asked.items[0], choices=()),), (Cut("T"),))
    assert "thing 3" not in texts(shown(free, shelf, Shots(shots=11), 0).items[0])


def test_nothing_is_shown_twice_nor_what_is_asked() -> None:
    shelf = [sample(f"d{n}", 100 + n, YES_NO[n % 2], YES_NO, cluster=f"c{n // 4}") for n in range(40)]
    made = shown(task(sample("q", 1, "yes", YES_NO, cluster="c0")), shelf, Shots(shots=9), 0)
    told = {int(text[1:-1]) // 4 for text in texts(made.items[0])[:-1:2]}
    assert told == set(range(1, 10))


@pytest.mark.parametrize("name", ["naming", "naming-free", "easy-vqa", "relation", "caption", "rec", "reg"])
def test_tasks_by_name_draw_from_training_and_keep_to_the_rule(name: str) -> None:
    plain, made = (build(TaskConfig(name=name, limit=6, options=o), 0) for o in ({}, {"shots": 4}))
    assert type(plain) is type(made) and made.name == f"{name}-4-shots" and not made.cosine
    for one, other in zip(plain.items, made.items, strict=True):
        assert other.prompt.turns[-1] == one.prompt.turns[-1] and len(other.prompt.turns) == 9
        assert len({controls.key(medium) for medium in other.prompt.media}) == 5
        if name.startswith("naming"):
            assert not {*one.choices} & {*texts(other)[1::2]}


def test_what_cannot_be_drawn_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="shots: Field required"):
        build(TaskConfig(name="naming", options={"asked": False}), 0)
    monkeypatch.setitem(catalogue.TASKS, "own", lambda config, seed: task(sample("q", 1, "yes", YES_NO)))
    with pytest.raises(ConfigError, match="no training split"):
        build(TaskConfig(name="own", options={"shots": 1}), 0)
    own = {"shots": 1, "of": "naming"}
    assert len(build(TaskConfig(name="own", options=own), 0).items[0].prompt.turns) == 3


def test_a_set_that_is_named_keeps_its_own_options() -> None:
    options = {"shots": 1, "size": 64, "of": "easy-vqa"}  # which has pictures of one size
    made = build(TaskConfig(name="relation", limit=2, options=options), 0)
    assert all(len(one.prompt.turns) == 3 for one in made.items)
    own = build(TaskConfig(name="relation", limit=2, options={"shots": 1, "size": 64}), 0)
    assert {medium.source.size for one in own.items for medium in one.prompt.media} == {64}  # type: ignore[union-attr]


def test_tasks_of_one_name_are_refused() -> None:
    options = ({"shots": 1}, {"shots": 2}, {"shots": 1, "asked": False})
    configs = [TaskConfig(name="naming", limit=2, options=one) for one in options]
    assert [made.name for made, _ in measure.build(configs[:2], 0)] == ["naming-1-shots", "naming-2-shots"]
    with pytest.raises(ConfigError, match=r"several tasks are named naming-1-shots:.*\n.*leave one out"):
        measure.build(configs, 0)


# ---------------------------------------------------------------------------------------------- controls and scores


def test_controls_change_the_demonstrations_pictures_too() -> None:
    asked = shown(task(*(sample(f"q{n}", n // 2, "yes", YES_NO) for n in range(8))), SHELF, Shots(shots=3), 0)
    prompts = [one.prompt for one in asked.items]
    for before, after in zip(prompts, controls.blind(prompts)):
        assert {medium.source.key for medium in after.media} == {"blank-6x6-128"}  # type: ignore[union-attr]
        assert texts_of(after) == texts_of(before)
    for before, after in zip(prompts, controls.shuffled(prompts, 0)):
        assert controls.key(before.media[-1]) != controls.key(after.media[-1]), "what is asked about is another"
        assert [m.source for m in after.media[:-1]] != [m.source for m in before.media[:-1]]


@torch.no_grad()
@pytest.mark.parametrize("aligner", ["llava", "flamingo"])
def test_the_shared_prefix_scores_demonstrations_like_whole_conversations(aligner: str) -> None:
    model = composed.stir(composed.model(aligner=aligner))
    choices = ("yes", "no, it is not", "a red thing")
    shelf = [sample(f"d{n}", 100 + 9 * n, choices[n % 3], choices) for n in range(9)]
    asked = task(sample("q", 1, "yes", choices), sample("a longer question", 200, "yes", choices[::-1]))
    made = shown(asked, shelf, Shots(shots=3), 0)
    alone = Choice("t", made.items[:1], (Cut("T"),))
    prefixes, genuine = [], model.run

    def watched(batch, **how):
        prefixes.append((batch.branch_BT == 0).sum(1).tolist())
        return genuine(batch, **how)

    model.run = watched  # type: ignore[method-assign]
    found = run(made, Scorer(model))
    model.run = genuine  # type: ignore[method-assign]
    for one, prediction in zip(made.items, found, strict=True):
        for choice, score in zip(one.choices, prediction.scores):
            whole = one.prompt.but(turns=(*one.prompt.turns, Turn.say("assistant", choice)))
            batch = model.processor.collator()([whole])
            output = model.run(batch)
            logits = output.head(output.hidden_BTD[0, :-1]).log_softmax(-1)
            begin = len(model.processor.renderer().render(one.prompt.turns, open_answer=True).ids)
            expected = sum(logits[t - 1, batch.input_ids_BT[0, t]] for t in range(begin, whole_length(batch)))
            assert score == pytest.approx(float(expected), abs=1e-4)
    rendered = model.processor.renderer().render(alone.items[0].prompt.turns, open_answer=True)
    assert max(prefixes[0]) >= len(rendered.ids) - 1, "demonstrations are read once for all choices"


def whole_length(batch) -> int:
    """Up to the end-of-turn token of the last answer."""
    return int((batch.labels_BT[0] != -100).nonzero()[-1]) + 1


# ---------------------------------------------------------------------------------------------- an oracle


class Copier:
    """Sees pictures perfectly and says of the last one whatever demonstrations say of theirs; it guesses otherwise."""

    batch_size = 16

    def __init__(self) -> None:
        self.dice = random.Random(0)

    def longest_first(self, prompts: Sequence[Sample]) -> list[int]:
        return list(range(len(prompts)))

    def reply(self, samples: Sequence[Sample]) -> list[str]:
        return [self.say(one) for one in samples]

    def say(self, prompt: Sample) -> str:
        told = prompt.turns[1:-1:2]
        ways = [way for way in (colour, name) if told and all(way(m) == t.text for m, t in zip(prompt.media, told))]
        return (ways or [self.dice.choice([colour, name])])[0](prompt.media[-1])


def colour(medium: Image) -> str:
    return medium.source.background.colour if isinstance(medium.source, Scene) else "gray"


def name(medium: Image) -> str:
    return concepts.some(medium.source.objects[0].name) if isinstance(medium.source, Scene) else "nothing"


def accuracy(config: TaskConfig, control: str | None = None) -> float:
    made = build(config, 0)
    asked = Generate(made.name, made.items, made.cuts, contains=False)
    found = run(asked, Copier(), control=control)  # type: ignore[arg-type]
    return sum(one.right is True for one in found) / len(found)


@pytest.mark.parametrize("task_name", ["naming-free", "colour"])
def test_a_copier_is_right_with_shots_and_guesses_without(task_name: str) -> None:
    def config(shots: int, **more: object) -> TaskConfig:
        return TaskConfig(name=task_name, limit=120, options={"shots": shots, "asked": False, **more})

    assert accuracy(config(4)) == 1.0
    assert accuracy(config(0)) == pytest.approx(0.5, abs=0.14)  # two ways to guess; 3 sigma
    assert accuracy(config(0, zero="texts")) == pytest.approx(0.5, abs=0.14), "texts show no picture to learn from"
    chance = 0.0 if task_name == "naming-free" else 1 / len(COLOURS)
    assert accuracy(config(4), "blind") <= chance + 0.1, "blank demonstrations teach nothing"
