"""Shikra: LLaVA's numbers between two new words, coordinates as text from end to end, and the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

import composed
import isthmus
import tiny
from composed import MIX, stir
from isthmus import planning
from isthmus.config import Recipe
from isthmus.data.boxes import Decimals, Regions
from isthmus.recipes.shikra import shikra
from isthmus.types import Box, Image, Sample, Turn

MAN = Box((0.25, 0.5, 0.75, 1.0), "the man")


@torch.no_grad()
def test_pictures_stand_as_in_llava_between_two_words():
    ours, llava = composed.model("llama", "shikra"), composed.model("llama", "llava", {"projector": "linear"})
    llava.connectors.load_state_dict(ours.connectors.state_dict())
    start, end = (tiny.VOCAB, tiny.VOCAB + 1)
    assert ours.processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [start, end]
    batch = ours.processor.collator()([MIX[0]])
    (row,) = batch.input_ids_BT
    first, last = (row == start).nonzero().item(), (row == end).nonzero().item()
    assert (row[first + 1 : last] == ours.placeholder("image")).all() and last - first - 1 == ours.queries("image")
    seen = [vlm.run(vlm.processor.collator()([MIX[0]]), need="connected").connected["image"] for vlm in (ours, llava)]
    assert torch.equal(*seen)
    embedded = ours.embed(batch, {"image": seen[0]})[0]
    words = ours.llm.get_input_embeddings().weight
    torch.testing.assert_close(embedded[first], words.mean(0))  # new words start at the mean
    assert torch.equal(embedded[first + 1 : last], seen[0][0])


@pytest.mark.parametrize(
    ("size", "written"), [((40, 20), "0.250,0.500,0.750,0.750"), ((20, 40), "0.375,0.500,0.625,1.000")]
)
def test_coordinates_are_those_of_the_padded_square_in_question_and_answer(size, written):
    vlm = composed.model("llama", "shikra", aspect="pad")
    picture = Image(Pillow.new("RGB", size))
    turns = (Turn.say("user", picture, "who is ", MAN, "?"), Turn.say("assistant", "see ", MAN))
    rendered = vlm.processor.renderer().render(turns)
    text = vlm.processor.decode(rendered.ids)
    assert text.count(f"the man[{written}]") == 2
    assert vlm.processor.regions.read(text, picture) == [Box(MAN.xyxy)] * 2
    trained = [token for token, learn in zip(rendered.ids, rendered.trained) if learn]
    assert vlm.processor.decode(trained).startswith(f"see the man[{written}]")


def test_the_format_is_saved_with_the_model(tmp_path: Path):
    vlm = stir(composed.model("llama", "shikra", {"digits": 2}, aspect="crop"))
    vlm.save_pretrained(tmp_path)
    processor = isthmus.load(tmp_path).processor
    assert processor.regions == Regions(Decimals(digits=2), "crop")
    sample = Sample((Turn.say("user", MIX[0].media[0], MAN), Turn.say("assistant", "yes")))
    assert "the man[0.25,0.50,0.75,1.00]" in processor.decode(processor.renderer().render(sample.turns).ids)


def test_published_parameters():
    plan = planning.plan(shikra("published"))
    assert plan.parts["connectors.image"] == 1024 * 4096 + 4096
    assert plan.parts["llm"] == pytest.approx(6.74e9, rel=0.01)
    assert plan.parts["llm grafts"] == 2 * 2 * 4096  # two words, read and written
    assert plan.total == pytest.approx(6.74e9 + 0.30e9 + 4.2e6, rel=0.01)
    assert plan.tokens == {"image": 256}
    assert [sorted(stage.by_part) for stage in plan.stages] == [["connectors.image", "llm", "llm grafts"]] * 2


def test_the_embedded_recipe_makes_a_round_trip(tmp_path: Path):
    recipe = shikra()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.model_validate_json((tmp_path / "recipe.json").read_text()) == recipe
    assert {"rec", "reg"} <= {task.name for task in recipe.eval}
