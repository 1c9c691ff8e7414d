"""What is kept of a picture is found by its content and by how it is prepared: another preparation is another key."""

from __future__ import annotations

import pytest

import composed
from composed import picture
from isthmus.serving.pictures import Pictures


@pytest.fixture
def model():
    return composed.model("llama")


def key(model) -> str:
    return Pictures(model, 1 << 20).see(picture(1)).key


CHANGES = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "rescale_factor": 1 / 127.5,
    "do_normalize": False,
    "resample": 0,
}


def test_the_same_preparation_gives_the_same_key_and_another_picture_another(model):
    assert key(model) == key(composed.model("llama"))
    assert key(model) != Pictures(model, 1 << 20).see(picture(2)).key


@pytest.mark.parametrize("setting", CHANGES)
def test_a_key_depends_on_how_the_processor_prepares(setting, model):
    before = key(model)
    assert getattr(model.processor.image_processor, setting) != CHANGES[setting]
    setattr(model.processor.image_processor, setting, CHANGES[setting])
    assert key(model) != before


def test_a_key_depends_on_the_aspect(model):
    before = key(model)
    model.processor.aspect = next(each for each in ("pad", "crop", "squash") if each != model.processor.aspect)
    assert key(model) != before
