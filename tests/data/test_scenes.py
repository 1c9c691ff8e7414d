"""Scenes against their own pixels: boxes, colours, counts and places are read off the picture or worked out by hand."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageChops

from isthmus.data import concepts, questions, scenes, sprites
from isthmus.errors import ConfigError, IsthmusError
from isthmus.types import Drawn

pytestmark = pytest.mark.usefixtures("embedded")
SEEN = tuple(filter(concepts.countable, concepts.concepts("train")))
STYLE = "openmoji"


def layouts(count: int) -> list[scenes.Scene]:
    return [scenes.layout(f"test {i}", SEEN, 224, STYLE) for i in range(count)]


def asker(scene: scenes.Scene, main: str = "", varied: bool = True) -> questions.Asker:
    return questions.Asker(scene, SEEN, main, varied)


def test_boxes_are_exactly_the_drawn_pixels() -> None:
    for scene in layouts(12):
        for index, (name, box) in enumerate(scene.boxes):
            without = replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])
            changed = ImageChops.difference(scene.draw(), without.draw()).convert("L").point(lambda v: 255 * (v > 2))
            seen, told = changed.getbbox(), [edge * scene.size for edge in box]
            assert seen is not None
            assert max(abs(a - b) for a, b in zip(seen, told)) <= 2, name  # soft edges may fade into the background


def test_objects_do_not_overlap_and_stay_inside() -> None:
    for scene in layouts(200) + [scenes.crowd(f"c {i}", SEEN, 224, STYLE)[0] for i in range(200)]:
        boxes = [box for _, box in scene.boxes]
        assert 2 <= len(boxes) <= 6
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            for other in boxes[i + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_a_scene_is_its_description() -> None:
    first, again = layouts(3), layouts(3)
    assert first == again and len({scene.key for scene in first}) == 3
    assert isinstance(first[0], Drawn)
    assert first[0].draw().tobytes() == again[0].draw().tobytes()
    assert first[0].draw().size == (224, 224) and first[0].draw().mode == "RGB"
    for change in (
        {"style": "noto"},
        {"size": 225},
        {"background": replace(first[0].background, seed=1)},
        {"objects": first[0].objects[1:]},
    ):
        assert replace(first[0], **change).key != first[0].key


@pytest.mark.parametrize("texture", ["flat", "gradient", "noise", "stripes"])
@pytest.mark.parametrize("colour", list(scenes.COLOURS))
def test_the_background_is_nearest_to_its_own_name(colour: str, texture: scenes.Texture) -> None:
    pixels = np.asarray(scenes.Background(colour, texture, 3).draw(64), float).reshape(-1, 3)
    palette = np.array(list(scenes.COLOURS.values()), float)
    nearest = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(-1)
    assert (nearest == list(scenes.COLOURS).index(colour)).mean() > 0.97


def test_relations_are_true_of_the_boxes() -> None:
    """Every answer is worked out again from the text and the boxes alone."""
    answers: Counter[str] = Counter()
    for scene in layouts(400):
        question = asker(scene, varied=False).ask("relation")
        answers[question.answer] += 1
        boxes = dict(scene.boxes)
        one, other = sorted(
            (name for name in boxes if f"the {name}" in question.text), key=lambda n: question.text.index(f"the {n}")
        )
        a, b = boxes[one], boxes[other]
        truth = {"left": a[2] <= b[0], "right": a[0] >= b[2], "above": a[3] <= b[1], "below": a[1] >= b[3]}
        if question.choices == ("yes", "no"):
            (asked,) = [place for place in truth if f" {place} " in question.text.removeprefix(f"Is the {one}")]
            assert truth[asked] == (question.answer == "yes"), question
        else:
            assert truth[question.answer], question
            assert set(question.choices) in ({"left", "right"}, {"above", "below"})
    yes, no = answers["yes"], answers["no"]
    assert yes + no == pytest.approx(200, abs=50) and yes == pytest.approx(no, abs=50)


def test_presence_is_balanced_and_true() -> None:
    answers: Counter[str] = Counter()
    asked: dict[str, Counter[str]] = {"yes": Counter(), "no": Counter()}
    for scene in layouts(600):
        question = asker(scene, varied=False).ask("presence")
        answers[question.answer] += 1
        thing = question.text.removeprefix("Does the picture show ").removesuffix("?")
        asked[question.answer][thing] += 1
        shown = {concepts.some(name) for name, _ in scene.boxes}
        assert (thing in shown) == (question.answer == "yes")
    assert answers["yes"] == pytest.approx(300, abs=60)
    # Neither answer has favourites: knowing the thing alone tells nothing.
    assert max(asked["yes"].values()) <= 6 and max(asked["no"].values()) <= 6


def test_a_checklist_is_true_of_the_boxes_and_gives_nothing_but_yes_and_no_to_learn() -> None:
    answers: Counter[str] = Counter()
    for scene in layouts(300):
        question = asker(scene, varied=False).ask("checklist")
        shown = {concepts.some(name) for name, _ in scene.boxes}
        lines = question.answer.split("\n")
        checked = dict(zip(lines[::2], lines[1::2], strict=True))
        assert {thing for thing, answer in checked.items() if answer == "yes"} == shown
        assert set(checked.values()) == {"yes", "no"} and len(checked) == len(lines) / 2
        assert [part.text for part in question.filled if not part.given] == lines[1::2]
        assert "".join(part.text for part in question.filled) == question.answer
        answers.update(checked.values())
    assert answers["yes"] == pytest.approx(answers["no"], rel=0.1)


def test_counting_is_true_and_even() -> None:
    answers: Counter[str] = Counter()
    for index in range(600):
        scene, main = scenes.crowd(f"count {index}", SEEN, 224, STYLE)
        question = asker(scene, main, varied=False).ask("counting")
        name = concepts.names()[main]
        assert question.text == f"How many {concepts.several(name)} are there?"
        assert questions.NUMBERS.index(question.answer) == sum(shown == name for shown, _ in scene.boxes)
        answers[question.answer] += 1
    assert set(answers) == set(questions.NUMBERS) and min(answers.values()) > 60


def test_a_caption_names_everything() -> None:
    scene, main = next(
        (scene, main)
        for i in range(50)
        for scene, main in [scenes.crowd(f"x {i}", SEEN, 224, STYLE)]
        if scene.counts.get(main) == 3
    )
    caption = asker(scene, main).ask("caption")
    assert f"hree {concepts.several(concepts.names()[main])}" in caption.answer
    assert all(concepts.names()[char] in caption.answer for char in scene.counts if char != main)
    assert f"{scene.background.colour} background." in caption.answer and not caption.choices


def test_naming_has_ten_distinct_choices_of_the_split() -> None:
    unseen = concepts.concepts("unseen")
    for index, char in enumerate(unseen[:40]):
        scene = scenes.compose(f"n {index}", [char], 224, STYLE)
        question = questions.Asker(scene, unseen, char, False).ask("naming")
        names = {concepts.some(concepts.names()[other]): concepts.names()[other] for other in unseen}
        assert question.text == "What is this?" and names[question.answer] == concepts.names()[char]
        assert len(set(question.choices)) == 10 and question.answer in question.choices
        bare = [names[choice] for choice in question.choices]
        assert not any(concepts.alike(a, b) for a in bare for b in bare if a != b)


def test_options_are_the_choices_in_the_order_of_the_question() -> None:
    places: Counter[int] = Counter()
    for index, char in enumerate(SEEN[:200]):
        scene = scenes.compose(f"o {index}", [char], 224, STYLE)
        question = asker(scene, varied=False).ask("options")
        listed = (
            question.text.removeprefix("Which of these is it: ").removesuffix("?").replace(" or ", ", ").split(", ")
        )
        assert tuple(listed) == question.choices and len(set(listed)) == 10
        assert question.answer == concepts.some(concepts.names()[char])
        places[listed.index(question.answer)] += 1
    assert len(places) == 10 and max(places.values()) < 45  # its place in the list tells nothing


def test_concepts_are_split_by_themselves_alone() -> None:
    seen, unseen = set(concepts.concepts("train")), set(concepts.concepts("unseen"))
    assert seen == set(concepts.concepts("val")) == set(concepts.concepts("test"))
    assert not seen & unseen and seen | unseen == set(concepts.names())
    assert 0.08 < len(unseen) / len(concepts.names()) < 0.12
    for char in ("🦊", "🎸"):
        held_out = int(hashlib.sha256(f"held out {char}".encode()).hexdigest(), 16) % 10 == 0
        assert (char in unseen) == held_out


def test_names_are_clean_and_distinct() -> None:
    names = concepts.names()
    assert len(names) > 1000 and len(set(names.values())) == len(names)
    for name in names.values():
        assert name == name.lower().strip() and not name.endswith(" symbol")
    assert set(concepts.MENDED) <= set(names)
    assert (names["🦊"], names["🐶"], names["😂"]) == ("fox", "dog face", "face with tears of joy")


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("fox", "a fox", "foxes"),
        ("elephant", "an elephant", "elephants"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("x-ray", "an x-ray", "x-rays"),
        ("strawberry", "a strawberry", "strawberries"),
        ("monkey", "a monkey", "monkeys"),
        ("kitchen knife", "a kitchen knife", "kitchen knives"),
        ("police officer", "a police officer", "police officers"),
        ("snowman", "a snowman", "snowmen"),
        ("mouse", "a mouse", "mice"),
        ("octopus", "an octopus", "octopuses"),
        ("glass of milk", "a glass of milk", "glasses of milk"),
        ("grapes", "grapes", "grapes"),
        ("bread", "bread", "bread"),
        ("european castle", "a european castle", "european castles"),
    ],
)
def test_articles_and_plurals(name: str, one: str, many: str) -> None:
    assert name in concepts.names().values()
    assert (concepts.some(name), concepts.several(name)) == (one, many)


def test_every_concept_has_a_drawing() -> None:
    blank = [char for char in concepts.names() if sprites.aspect(char, STYLE) <= 0.05]
    assert not blank
    drawing = sprites.sprite("🦊", STYLE, 40, 50)
    assert drawing.size == (40, 50) and drawing.mode == "RGBA"
    alpha = np.asarray(drawing.getchannel("A"))
    assert all(edge.max() > 40 for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))  # cut to the drawing


def test_an_unknown_style_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'twemoji'"):
        sprites.check_style("twemojy")


def test_another_style_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(IsthmusError, match=r"isthmus\[styles\]"):
        sprites.sprite("🦊", "noto", 40, 40)
