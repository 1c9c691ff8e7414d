"""Named sets: official sizes, splits that do not leak, answers that agree with the pixels, nothing drawn too early."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from isthmus.config import Source
from isthmus.data import concepts, scenes
from isthmus.data.sets import Set, cards, open_set
from isthmus.errors import ConfigError
from isthmus.types import Image, Sample

pytestmark = pytest.mark.usefixtures("embedded")
RGB = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}


def opened(name: str, seed: int = 0, split: str = "train", limit: int | None = None, **options: Any) -> Set:
    fields = {"name": name, "split": split, "limit": limit, "options": options}
    return open_set(Source.model_validate(fields), seed)


def picture(sample: Sample) -> Any:
    (medium,) = sample.media
    assert isinstance(medium, Image)
    return medium.source


def test_easy_vqa_has_its_official_sizes() -> None:
    train, val, test = (opened("easy-vqa", split=split) for split in ("train", "val", "test"))
    assert (len(train) + len(val), len(test)) == (38_575, 9_673)
    assert 0.03 < len(val) / 38_575 < 0.07
    images = [{sample.meta["cluster"] for sample in part} for part in (train, val, test)]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert (len(images[0] | images[1]), len(images[2])) == (4_000, 1_000)
    kinds = Counter(sample.meta["kind"] for sample in test)
    assert kinds["yesno"] / len(test) == pytest.approx(0.74, abs=0.02)
    assert all(sample.meta["answer"] in sample.meta["choices"] for sample in test)
    assert len(test[0].meta["choices"]) == 13


def test_easy_vqa_captions_agree_with_the_pixels() -> None:
    captions = opened("easy-vqa", kinds=["caption"])
    assert len(captions) > 2_000
    for sample in captions[:200]:
        article, colour, shape = sample.turns[-1].text.split()
        assert article == "a" and shape in {"circle", "rectangle", "triangle"}
        pixels = np.asarray(Pillow.open(picture(sample)).convert("RGB"), float).reshape(-1, 3)
        distance = {name: np.abs(pixels - rgb).sum(-1) for name, rgb in RGB.items()}
        covered = {name: (d < 60).sum() for name, d in distance.items()}
        assert max(covered, key=lambda name: covered[name]) == colour, sample.id


def test_questions_together_branch_off_their_picture_and_none_is_lost() -> None:
    single, joined = opened("easy-vqa", split="val"), opened("easy-vqa", split="val", together=True)
    assert sum(1 + len(sample.branches) for sample in joined) == len(single)
    told = {(sample.meta["cluster"], sample.turns[0].text, sample.turns[1].text) for sample in single}
    for sample in joined:
        for question, answer in (sample.turns, *sample.branches):
            assert question.media == sample.media
            assert (sample.meta["cluster"], question.text, answer.text) in told
    first = opened("scenes", together=True, repeat=2)[0]
    assert len(first.branches) == 5  # presence twice, colour, relation twice, caption
    asked = [question.text for question, _ in (first.turns, *first.branches)]
    assert len(set(asked)) == 6


@pytest.mark.parametrize("name", ["scenes", "naming"])
def test_nothing_is_drawn_before_it_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes.Scene, "draw", lambda self: pytest.fail("drawn"))
    assert opened(name)[12_345].meta["boxes"]


def test_questions_about_one_scene_share_its_picture() -> None:
    samples = opened("scenes", count=20)
    keys = Counter(picture(sample).key for sample in samples)
    assert len(keys) == 20 and set(keys.values()) == {4}
    assert Counter(sample.meta["kind"] for sample in samples) == Counter(
        presence=20, colour=20, caption=20, relation=10, counting=10
    )
    only = opened("scenes", count=20, kinds=["counting"])
    assert len(only) == 20 and {sample.meta["kind"] for sample in only} == {"counting"}


def test_training_follows_the_seed_and_evaluation_does_not() -> None:
    def keys(split: str, seed: int) -> list[str]:
        return [picture(opened("scenes", seed=seed, split=split)[index]).key for index in (0, 7, 99)]

    assert keys("train", 0) == keys("train", 0) != keys("train", 1)
    assert keys("test", 0) == keys("test", 1)
    assert len({key for split in ("train", "val", "test", "unseen") for key in keys(split, 0)}) == 12


def test_unseen_concepts_are_never_trained() -> None:
    def shown(split: str) -> set[str]:
        samples = opened("naming", split=split, count=1500)
        return {char for sample in samples for char in picture(sample).counts}

    assert shown("train") == set(concepts.concepts("train"))
    assert shown("unseen") == set(concepts.concepts("unseen"))
    for sample in opened("scenes", split="unseen", count=200):
        assert set(picture(sample).counts) <= set(concepts.concepts("unseen"))


def test_naming_shows_every_concept_equally_often() -> None:
    unseen = concepts.concepts("unseen")
    shown = Counter(sample.meta["cluster"] for sample in opened("naming", split="unseen", count=3 * len(unseen)))
    assert set(shown.values()) == {3}


def test_evaluation_words_its_questions_in_one_way() -> None:
    colours = {
        split: {s.turns[0].text for s in opened("scenes", split=split, count=80, kinds=["colour"])}
        for split in ("train", "test")
    }
    assert colours["test"] == {"What color is the background?"}
    assert len(colours["train"]) > 1


def test_ids_are_unique_and_slices_are_lists() -> None:
    samples = opened("scenes", count=50)
    assert len({sample.id for sample in samples}) == len(samples)
    assert [sample.id for sample in samples[3:6]] == [samples[i].id for i in (3, 4, 5)]
    assert samples[-1].id == samples[len(samples) - 1].id
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_a_limit_takes_the_first() -> None:
    whole, part = opened("easy-vqa", split="test"), opened("easy-vqa", split="test", limit=10)
    assert [sample.id for sample in part] == [whole[i].id for i in range(10)]
    assert part.card.size == 10 and len(opened("easy-vqa", split="test", limit=10**6)) == len(whole)


def test_cards_tell_licence_and_attribution() -> None:
    told = {card.name: card for card in cards()}
    assert told["scenes"].licence == "CC-BY-SA-4.0" and "OpenMoji" in told["scenes"].attribution
    assert told["easy-vqa"].licence == "MIT" and told["easy-vqa"].source == "easy-vqa 1.0"
    assert all(card.size > 10_000 for card in told.values())


def test_the_users_file_opens_by_its_path(tmp_path: Path) -> None:
    Pillow.new("RGB", (8, 8)).save(tmp_path / "x.png")
    row = {
        "id": "1",
        "image": "x.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Black."}],
    }
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    mine = open_set(Source.model_validate({"name": str(tmp_path / "mine.json"), "images": tmp_path}), 0)
    assert len(mine) == 1 and mine[0].turns[-1].text == "Black."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "easyvqa"}, "did you mean 'easy-vqa'"),
        ({"name": "scenes", "split": "dev"}, "no split 'dev'"),
        ({"name": "easy-vqa", "split": "unseen"}, "no split 'unseen'"),
        ({"name": "scenes", "options": {"knds": ["counting"]}}, "did you mean 'kinds'"),
        ({"name": "scenes", "options": {"kinds": ["dancing"]}}, "kinds"),
        ({"name": "naming", "options": {"styles": ["fluent-emoji"]}}, "did you mean 'fluent'"),
    ],
)
def test_a_wrong_name_says_what_is_right(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_set(Source.model_validate(fields), 0)
    assert caught.value.remedy
