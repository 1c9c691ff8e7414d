"""What a connector reads beside a picture: every word that is said, its regions spelled as the joint spells them."""

from __future__ import annotations

import pytest
from PIL import Image as Pillow

import composed
import tiny
from isthmus.data.boxes import Decimals, Regions
from isthmus.data.reading import Reader
from isthmus.types import Box, DataError, Image, Reading, Sample, Turn

WIDE = Image(Pillow.new("RGB", (40, 20)))
LEFT, RIGHT = Box((0, 0, 0.5, 1)), Box((0.5, 0, 1, 1))
# In the padded square the picture's height is from a quarter to three quarters.
LEFT_TEXT = "[0.000,0.250,0.500,0.750]"


def read(sample: Sample, **reading: str) -> dict[str, list[str]]:
    """What is read, a character per id."""
    plain = lambda text: [ord(letter) for letter in text]  # noqa: E731
    reader = Reader(Reading(64, **reading), plain, (ord("<"), ord(">")), Regions(Decimals(), "pad").spell)  # type: ignore[arg-type]
    found = reader([(sample, sample.media)])
    return {kind: ["".join(map(chr, row[row >= 0].tolist())) for row in rows] for kind, rows in found.items()}


def test_a_question_holds_its_region() -> None:
    asked = Sample((Turn.say("user", WIDE, "What is at ", LEFT, "?"), Turn.say("assistant", "a cat")))
    assert read(asked) == {"image": [f"What is at {LEFT_TEXT}?"]}


def test_an_answer_that_is_a_region_is_not_empty() -> None:
    turns = (Turn.say("user", WIDE, "Where?"), Turn.say("assistant", LEFT))
    assert read(Sample(turns), of="answer") == {"image": [f"<{LEFT_TEXT}>"]}
    without = Sample((Turn.say("user", "Where?"), Turn.say("assistant", Box((0, 0, 1, 1), "all"))))
    assert read(without, of="answer") == {"text": ["<all[0.000,0.000,1.000,1.000]>"]}


def test_a_whole_model_s_connector_reads_what_its_llm_is_told() -> None:
    small = {"queries": 3, "layers": 1, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0}
    options = {**small, "text": True, "vocabulary": tiny.VOCAB + 1, "positions": 64}
    processor = composed.model("llama", "blip2", options, aspect="pad").processor
    batch = processor.collator()([Sample((Turn.say("user", WIDE, "Where?"), Turn.say("assistant", LEFT)))])
    (ids,) = batch.extra_text["image"]
    assert processor.decode(ids[ids >= 0][1:-1]) == LEFT_TEXT
    assert LEFT_TEXT in processor.decode(batch.input_ids_BT[0])


@pytest.mark.parametrize(("template", "told"), [("plain", "first"), ("chat", "second")])
def test_a_caption_is_read_with_the_picture_that_it_is_of(template: str, told: str) -> None:
    """`plain` keeps the first picture and its answer; a conversation that is too long its last ones."""
    small = {"queries": 3, "layers": 1, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0}
    options = {**small, "text": True, "vocabulary": tiny.VOCAB + 1, "positions": 64}
    processor = composed.model("llama", "blip2", options).processor
    talks = [
        (Turn.say("user", composed.picture(n), "what?"), Turn.say("assistant", f"the {word}"))
        for n, word in enumerate(("first", "second"))
    ]
    sample = Sample(talks[0] + talks[1])
    cut = {"max_length": len(processor.collator()([Sample(talks[0])]).input_ids_BT[0]) + 8, "overlong": "oldest"}
    batch = processor.collator(None, template, **(cut if template == "chat" else {}))([sample])
    assert batch.media["image"].row_N.tolist() == [0]
    (ids,) = batch.extra_text["image"]
    assert processor.decode(ids[ids >= 0][1:-1]) == f"the {told}"


def test_questions_that_differ_in_their_region_alone_cannot_share_a_picture() -> None:
    one, other = ((Turn.say("user", WIDE, "What is at ", box), Turn.say("assistant", "it")) for box in (LEFT, RIGHT))
    assert read(Sample(one, branches=(one,))) == {"image": [f"What is at {LEFT_TEXT}"]}
    with pytest.raises(DataError, match="its questions share"):
        read(Sample(one, branches=(other,)))
