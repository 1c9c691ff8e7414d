"""Boxes as text and back: errors of a round trip, grammars, malformed replies, wide and tall pictures."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from isthmus.aligners.cogvlm import CogVLM
from isthmus.data import media
from isthmus.data.boxes import Brackets, Decimals, Links, Regions, Thousandths, overlap
from isthmus.data.media import Frame, upright_size
from isthmus.types import Box, Grounding, Image, Turn

SHAPES = [(300, 120), (120, 300), (97, 64), (64, 64)]


def boxes(count: int, least: float = 0.0) -> list[Box]:
    dice = random.Random(0)
    found = []
    while len(found) < count:
        x1, x2 = sorted((dice.random(), dice.random()))
        y1, y2 = sorted((dice.random(), dice.random()))
        if min(x2 - x1, y2 - y1) > least:
            found.append(Box((x1, y1, x2, y2)))
    return found


def picture(size: tuple[int, int], seed: int = 0) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def error(one: Box, other: Box) -> float:
    return max(abs(a - b) for a, b in zip(one.xyxy, other.xyxy))


def test_decimals_make_a_round_trip_within_half_a_digit():
    for box in boxes(200):
        (again,) = Decimals().read(Decimals().write([box]))
        assert error(box, again) <= 5e-4 + 1e-12


def test_decimals_as_the_paper_writes_them():
    man = Box((0.22, 0.066, 0.541, 0.93), "the man")
    assert Decimals().write([man]) == "the man[0.220,0.066,0.541,0.930]"
    two = [Box((0, 0, 0.5, 0.5)), Box((0.5, 0.5, 1, 1))]
    assert Decimals().write(two) == "[0.000,0.000,0.500,0.500;0.500,0.500,1.000,1.000]"
    assert Decimals().read(f"I see {Decimals().write(two)}.") == two
    assert Decimals().write([Box((0.1, 0.2, 0.1, 0.2))]) == "[0.100,0.200]"
    assert Decimals().read("here [0.1,0.2]") == [Box((0.1, 0.2, 0.1, 0.2))]
    assert Decimals().read("[0,0.,1,1.0]") == [Box((0, 0, 1, 1))]


@pytest.mark.parametrize(
    "reply",
    ["", "left", "[0.1,0.2,0.3]", "[0.1,0.2,0.3,0.4", "[.1,.2,.3,.4]", "[10.1,0.2,0.3,0.4]", "[0.1,0.2,2.0,0.4]",
     "[0.5,0.1,0.2,0.3]", "[a,b,c,d]", "[-0.1,0,1,1]", "[0.1,0.2,0.3,0.4,0.5]"],
)  # fmt: skip
def test_malformed_decimals_are_no_box(reply):
    assert Decimals().read(reply) == []


def test_thousandths_are_integers_below_a_thousand():
    assert Thousandths().write([Box((0, 0.066, 0.541, 1), "it")]) == "<ref>it</ref><box>(0,66),(541,999)</box>"
    assert Thousandths().read("<ref>it</ref><box>(0,66),(541,999)</box>") == [Box((0, 0.066, 0.541, 0.999), "it")]
    assert Thousandths().read("<box>(9,9),(1,1)</box> <box>(1000,0),(1,1)</box>") == []
    for box in boxes(50):
        (again,) = Thousandths().read(Thousandths().write([box]))
        assert error(box, again) <= 1e-3


def test_brackets_as_cogvlm_writes_them():
    man = Box((0.22, 0.066, 0.541, 1), "the man")
    assert Brackets().write([man]) == "the man[[220,066,541,999]]"
    assert Brackets().write([man, Box((0, 0, 0.5, 0.5))]) == "the man[[220,066,541,999;000,000,500,500]]"
    assert Brackets().read("a [[220,066,541,999;000,000,500,500]] and [[001,002,003,004]].") == [
        Box((0.22, 0.066, 0.541, 0.999)), Box((0, 0, 0.5, 0.5)), Box((0.001, 0.002, 0.003, 0.004))
    ]  # fmt: skip
    for box in boxes(200):
        (again,) = Brackets().read(Brackets().write([box]))
        assert all(abs(was - now) <= (5e-4 if was < 0.9985 else 1e-3) + 1e-12 for was, now in zip(box.xyxy, again.xyxy))
    for reply in ("[220,066,541,930]", "[[220,66,541,930]]", "[[1000,066,541,930]]", "[[541,066,220,930]]", "[[1,2]]"):
        assert Brackets().read(reply) == []
    assert isinstance(CogVLM(CogVLM.Options()).boxes(), Brackets)


def test_links_as_the_paper_writes_them():
    # https://arxiv.org/abs/2306.14824, section 2: a phrase, then the two location tokens of its region
    link = Links().write([Box((0.40, 0.04, 0.99, 0.83), " a snowman")])
    assert link == "<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>"
    (again,) = Links().read(f"<grounding> An image of{link} warming himself")
    assert again == Box((0.390625, 0.046875, 0.984375, 0.828125), " a snowman")
    two = Links().write([Box((0, 0, 0.5, 0.5)), Box((0.5, 0.5, 1, 1))])
    assert two.count("<patch_index_") == 4 and two.count("</delimiter_of_multi_objects/>") == 1
    assert len(Links().read(two)) == 2
    assert (
        len(Links(grid=4).tokens) == 16 + 6 and set(Links().write(boxes(1)).split("|")) & set(Links().tokens) == set()
    )


@pytest.mark.parametrize(
    "reply",
    ["<object><patch_index_0001></object>", "<object></object>", "<patch_index_0001><patch_index_0002>",
     "<object><patch_index_0863><patch_index_0044></object>", "<object><patch_index_0000><patch_index_9999></object>"],
)  # fmt: skip
def test_malformed_links_are_no_box(reply):
    assert Links().read(reply) == []


def test_links_quantise_within_their_cells():
    seen = set()
    for box in boxes(500):
        first, last = Links().cells(box)
        edges = first % 32 == last % 32 or first // 32 == last // 32
        (again,) = Links().read(Links().write([box]))
        seen.add(edges)
        assert error(box, again) <= (1 / 32 if edges else 1 / 64) + 1e-5
    assert seen == {True, False}


def test_small_boxes_lose_most_by_quantising():
    """A box of a tenth of the picture's side keeps about two thirds of its overlap, a large one nearly all."""

    def kept(low: float, high: float) -> float:
        pairs = [
            (box, *Links().read(Links().write([box])))
            for box in boxes(4000)
            if low < box.xyxy[2] - box.xyxy[0] < high and low < box.xyxy[3] - box.xyxy[1] < high
        ]
        return sum(overlap(*pair) for pair in pairs) / len(pairs)

    assert 0.5 < kept(0.08, 0.12) < 0.8 < 0.9 < kept(0.5, 1.0)


def test_overlap():
    one = Box((0, 0, 0.5, 0.5))
    assert overlap(one, one) == 1 and overlap(one, Box((0.5, 0.5, 1, 1))) == 0
    assert overlap(one, Box((0.25, 0, 0.75, 0.5))) == pytest.approx(1 / 3)
    assert overlap(Box((0, 0, 0, 0)), Box((0, 0, 0, 0))) == 0


# ---------------------------------------------------------------------------------------------- into the square


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", SHAPES)
def test_a_region_covers_the_same_pixels_in_the_square(size, aspect):
    """A red rectangle, found again by its colour in what the encoder sees."""
    box = (0.4, 0.35, 0.6, 0.7)
    drawn = Pillow.new("RGB", size, "white")
    corners = [round(value * size[n % 2]) for n, value in enumerate(box)]
    drawn.paste((255, 0, 0), tuple(corners))
    box = tuple(corner / size[n % 2] for n, corner in enumerate(corners))
    seen = np.asarray(media.square(drawn, aspect, 400, (255, 255, 255), Pillow.Resampling.NEAREST))
    rows, columns = np.nonzero(seen[..., 1] < 128)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    expected = Frame.of(size, aspect).onto(box)
    assert expected is not None
    assert max(abs(a - 400 * b) for a, b in zip(found, expected)) <= 1.01


@pytest.mark.parametrize("aspect", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("style", [Decimals(), Links(), Thousandths(), Brackets()])
def test_written_and_read_again_it_is_the_picture_s_own_region(style, size, aspect):
    regions = Regions(style, aspect)
    shown = Image(picture(size))
    box = Box((0.42, 0.41, 0.57, 0.62), "it")
    (turn,) = regions.spell((Turn.say("user", shown, "see ", box),))
    (again,) = regions.read(turn.text, shown)
    loss = {"decimals": 5e-4, "thousandths": 1e-3, "brackets": 1e-3, "links": 1 / 32}[style.kind]
    stretch = max(size) / min(size) if aspect == "pad" else 1
    assert error(box, again) <= loss * stretch + 1e-5


def test_what_a_crop_leaves_of_a_region_is_written_and_what_it_loses_is_not():
    wide = Image(picture((300, 100)))
    crop = Regions(Decimals(), "crop")
    spelled = crop.spell((Turn.say("user", wide, Box((0, 0, 0.5, 1), "half"), Box((0, 0, 0.3, 1), "gone")),))
    assert spelled[0].text == "half[0.000,0.000,0.500,1.000]gone"
    (left,) = crop.read("[0.000,0.000,0.500,1.000]", wide)
    assert left.xyxy == pytest.approx((1 / 3, 0, 0.5, 1))
    pad = Regions(Decimals(), "pad")
    assert pad.read("[0.000,0.000,1.000,0.200]", wide) == []  # in the margin above the picture
    assert pad.spell((Turn.say("user", wide, Box((0, 0, 1, 1))),))[0].text == "[0.000,0.333,1.000,0.667]"


@pytest.mark.parametrize("point", [(0.1, 0.5), (0.9, 0.5)])
def test_a_point_outside_the_crop_is_not_moved_to_its_edge(point):
    wide = Image(picture((300, 100)))
    crop = Regions(Decimals(), "crop")
    (turn,) = crop.spell((Turn.say("user", wide, Box((*point, *point), "it"), Box((0.5, 0.5, 0.5, 0.5), "here")),))
    assert turn.text == "ithere[0.500,0.500]"


def test_a_point_in_the_margin_is_none_and_one_at_the_edge_survives_its_rounding():
    wide = Image(picture((300, 100)))
    pad = Regions(Decimals(), "pad")
    assert pad.read("[0.500,0.100]", wide) == [] == pad.read("[0.500,0.900]", wide)
    assert pad.read("[0.500,0.329]", wide) == []
    (turn,) = pad.spell((Turn.say("user", wide, Box((0.5, 0, 0.5, 0))),))
    assert turn.text == "[0.500,0.333]"  # a third of a thousandth above the picture
    assert pad.read(turn.text, wide) == [Box((0.5, 0, 0.5, 0))]


def test_a_region_belongs_to_the_picture_before_it():
    wide, tall, box = Image(picture((200, 100))), Image(picture((100, 200))), Box((0, 0, 1, 1))
    turns = (
        Turn.say("user", box, wide, "and ", box, tall, box, box),
        Turn.say("assistant", box),
    )
    first, second = Regions(Decimals(), "pad").spell(turns)
    across, down = "0.000,0.250,1.000,0.750", "0.250,0.000,0.750,1.000"
    assert first.text == f"[{across}]and [{across}][{down};{down}]" and second.text == f"[{down}]"
    assert first.media == (wide, tall)


def test_a_wish_for_regions_is_a_word_for_those_that_have_one():
    turns = (Turn.say("user", "where?", Grounding()),)
    assert Regions(Links()).spell(turns)[0].text == "where?<grounding>"
    assert Regions(Decimals()).spell(turns)[0].text == "where?"
    plain = (Turn.say("user", "hi"),)
    assert Regions(Links()).spell(plain) == plain


def test_formats_survive_as_plain_values():
    for style in (Decimals(digits=2), Links(grid=8), Thousandths(), Brackets()):
        assert Regions.of(style.model_dump(), "pad") == Regions(style, "pad")


def test_sizes_are_those_of_upright_pictures(tmp_path: Path):
    drawn = picture((30, 20))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    drawn.save(tmp_path / "turned.jpg", exif=exif)
    drawn.save(tmp_path / "plain.png")
    for name, size in (("turned.jpg", (20, 30)), ("plain.png", (30, 20))):
        assert upright_size(tmp_path / name) == size == media.open_image(tmp_path / name).size
        assert upright_size((tmp_path / name).read_bytes()) == size
    assert upright_size(drawn) == (30, 20)
    with pytest.raises(media.DataError, match="no such picture"):
        upright_size(tmp_path / "none.png")
