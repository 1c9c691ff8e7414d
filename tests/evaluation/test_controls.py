"""Blank pictures tell nothing, and exchanged ones are never one's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from isthmus.data.scenes import Background, Scene
from isthmus.evaluation.controls import blind, derangement, key, shuffled
from isthmus.types import DataError, Image, Sample, Turn


def sample(name: str, *colours: int, size: tuple[int, int] = (6, 4)) -> Sample:
    pictures = [Image(Pillow.new("RGB", size, (colour, 0, 0))) for colour in colours]
    return Sample((Turn.say("user", *pictures, f"What is {name}?"),), id=name, meta={"answer": name})


def colours(one: Sample) -> list[int]:
    return [medium.source.getpixel((0, 0))[0] for medium in one.media]  # type: ignore[union-attr]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60), st.integers(0, 5))
def test_derangement_exists_exactly_if_no_key_has_more_than_half(keys: list[int], seed: int) -> None:
    if 2 * max(Counter(keys).values()) > len(keys):
        with pytest.raises(DataError, match="same picture"):
            derangement(keys, seed)
        return
    partners = derangement(keys, seed)
    assert sorted(partners) == list(range(len(keys)))
    assert all(keys[partner] != own for own, partner in zip(keys, partners))
    assert partners == derangement(keys, seed)


def test_shuffled_exchanges_pictures_and_nothing_else() -> None:
    samples = [sample(f"s{n}", 10 * (n // 2)) for n in range(8)] + [sample("pair a", 1, 2), sample("pair b", 3, 4)]
    found = shuffled(samples, seed=3)
    assert sorted(c for s in found for c in colours(s)) == sorted(c for s in samples for c in colours(s))
    for before, after in zip(samples, found, strict=True):
        assert colours(before) != colours(after)
        assert (before.id, before.meta, before.turns[0].text) == (after.id, after.meta, after.turns[0].text)
    assert colours(found[8]) == [3, 4]
    assert [colours(s) for s in found] != [colours(s) for s in shuffled(samples, seed=4)]


def test_samples_without_pictures_are_left_alone() -> None:
    texts = [sample("a"), sample("b", 1), sample("c", 2)]
    assert shuffled(texts)[0] == texts[0] and blind(texts)[0] == texts[0]


def test_blind_keeps_size_and_words_and_loses_all_else() -> None:
    scene = Scene("never drawn", 32, "openmoji", (), Background("red", "flat", 0))
    drawn = Sample((Turn.say("user", "Look:", Image(scene), "?"),), id="scene")
    found = blind([sample("a", 9), sample("b", 200), drawn])
    pictures = [one.media[0].source.draw() for one in found]  # type: ignore[union-attr]
    assert [picture.size for picture in pictures] == [(6, 4), (6, 4), (32, 32)]
    assert all((np.asarray(picture) == 128).all() for picture in pictures)
    assert key(found[0].media[0]) == key(found[1].media[0]) != key(found[2].media[0])
    assert [part.text for part in found[2].turns[0].parts if not isinstance(part, Image)] == ["Look:", "?"]


def test_equal_pictures_have_equal_keys() -> None:
    one, same, other = (sample("x", colour).media[0] for colour in (5, 5, 6))
    assert key(one) == key(same) != key(other)


def test_an_item_with_a_number_of_pictures_of_its_own_borrows_its_last_one() -> None:
    """As in MMMU: nobody else has two, so that the first stays and the last is somebody's with one."""
    items = [*(sample(str(number), number) for number in range(5)), sample("two", 7, 8)]
    for seed in range(5):
        *ones, two = map(colours, shuffled(items, seed))
        assert sorted(ones) == [[0], [1], [2], [3], [4]] and all(one != [own] for own, one in enumerate(ones))
        assert two[0] == 7 and two[1] in range(5)
    assert shuffled(items, 0) == shuffled(items, 0)


def test_a_picture_that_all_others_show_too_cannot_be_borrowed() -> None:
    with pytest.raises(DataError, match="1 of 1 items show the same picture"):
        shuffled([sample("a", 1), sample("b", 2), sample("two", 7, 1), sample("c", 1)][2:], 0)
