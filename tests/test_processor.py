"""One renderer behind two languages: our samples, and transformers' strings and messages, give the same inputs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import composed
import isthmus
from composed import picture
from isthmus.data import media
from isthmus.processor import VLMProcessor
from isthmus.types import ConfigError, DataError, Modality, Sample, Text, Turn


@pytest.fixture(scope="module")
def model():
    return composed.model("llama")


@pytest.fixture(scope="module")
def processor(model):
    return model.processor


ONE, TWO = picture(1, 40), picture(2, 24)
SAMPLES = (
    Sample((Turn.say("user", ONE, "what is it?"),)),
    Sample(
        (Turn.say("user", "hi"), Turn.say("assistant", "hello you"), Turn.say("user", "and ", TWO, "this, ", ONE, "?"))
    ),
)
MESSAGES = [
    [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "image", "image": part.source}
                for part in turn.parts
            ],
        }
        for turn in sample.turns
    ]
    for sample in SAMPLES
]


def equal(found, batch):
    images = batch.media["image"]
    assert torch.equal(found["input_ids"], batch.input_ids_BT)
    assert torch.equal(found["attention_mask"], (batch.segment_BT > 0).long())
    assert torch.equal(found["pixel_values"], images.pixels)
    assert found["image_at"].tolist() == torch.stack([images.row_N, images.at_N], 1).tolist()


def test_messages_give_what_the_collator_gives(processor):
    equal(processor.apply_chat_template(MESSAGES), processor.prompts(SAMPLES))
    equal(processor.apply_chat_template(MESSAGES[0]), processor.prompts(SAMPLES[:1]))


def test_a_templated_string_gives_what_the_collator_gives(processor):
    texts = []
    for sample in SAMPLES:
        flat = [
            {"role": t.role, "content": "".join(p.text if isinstance(p, Text) else "<image>" for p in t.parts)}
            for t in sample.turns
        ]
        texts.append(processor.tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True))
    equal(processor(images=[ONE.source, TWO.source, ONE.source], text=texts), processor.prompts(SAMPLES))
    equal(processor(images=ONE.source, text=texts[0]), processor.prompts(SAMPLES[:1]))


def test_the_batch_is_what_it_should_be(processor, model):
    """Against a reckoning by hand of the first row, and the pixels against the image processor's own."""
    found = processor(images=ONE.source, text="a<image>b")
    q, placeholder = model.queries("image"), model.placeholder("image")
    encode = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert found["input_ids"][0].tolist() == encode("a") + [placeholder] * q + encode("\nb")
    assert found["image_at"].tolist() == [[0, 1]] and found["attention_mask"].all()
    theirs = processor.image_processor(images=ONE.source, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found["pixel_values"], theirs, atol=1e-5, rtol=0)


def test_text_alone_has_no_pixels(processor):
    found = processor(text=["hi there", "hi"])
    assert set(found) == {"input_ids", "attention_mask"}
    lengths = [len(processor.tokenizer.encode(text, add_special_tokens=False)) for text in ("hi there", "hi")]
    assert found["attention_mask"].tolist() == [[1] * lengths[0], [0] * (lengths[0] - lengths[1]) + [1] * lengths[1]]


@pytest.mark.parametrize(
    ("images", "text"), [(ONE.source, "no marker"), (None, "<image>?"), ([ONE.source], "<image><image>")]
)
def test_markers_and_pictures_must_be_as_many(processor, images, text):
    with pytest.raises(DataError, match="markers for"):
        processor(images=images, text=text)


def test_pictures_come_as_lists_per_string_as_arrays_and_as_tensors(processor):
    expected = processor(images=[ONE.source, TWO.source, ONE.source], text=["<image>a<image>", "<image>b"])
    levels = [np.array(each.source) for each in (ONE, TWO)]
    turned = torch.from_numpy(levels[0]).permute(2, 0, 1)
    found = processor(images=[[levels[0], TWO.source], [turned]], text=["<image>a<image>", "<image>b"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(DataError, match=r"1 \+ 1 <image> markers for 2 \+ 0 pictures"):
        processor(images=[[ONE.source, TWO.source], []], text=["<image>a", "<image>b"])
    for wrong in (turned / 255, levels[0][None], 3):
        with pytest.raises(DataError, match="picture"):
            processor(images=wrong, text="<image>a")
    with pytest.raises(DataError, match="the text is a Image"):
        processor("<image>a", ONE.source)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_template_without_tokens_is_what_strings_are_made_of(family):
    """As in the scripts of transformers: first the string, whose parts hold no pictures, then string and pictures."""
    processor = composed.model(family).processor
    pictures = [medium.source for sample in SAMPLES for medium in sample.media]
    hollow = [
        [
            {
                **message,
                "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]],
            }
            for message in messages
        ]
        for messages in MESSAGES
    ]
    strings = processor.apply_chat_template(hollow, tokenize=False)
    found, expected = processor(images=pictures, text=strings), processor.apply_chat_template(MESSAGES)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert processor.apply_chat_template(hollow[0], tokenize=False) == strings[0]
    assert torch.equal(processor.apply_chat_template(MESSAGES, return_dict=False), expected["input_ids"])


ANSWERED = [[*messages, {"role": "assistant", "content": "a cat"}] for messages in MESSAGES]


def test_no_answer_is_opened_behind_an_answer(processor):
    """What a collator writes for training is the conversation, and no header behind it that nobody says."""
    strings = processor.apply_chat_template(ANSWERED, tokenize=False)
    written = [
        [
            {"role": turn.role, "content": "".join(p.text if isinstance(p, Text) else "<image>\n" for p in turn.parts)}
            for turn in (*sample.turns, Turn.say("assistant", "a cat"))
        ]
        for sample in SAMPLES
    ]
    own = processor.tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=False)
    assert strings == own and all(string.endswith("a cat<|im_end|>\n") for string in strings)
    pictures = [medium.source for sample in SAMPLES for medium in sample.media]
    found, expected = processor.apply_chat_template(ANSWERED), processor(images=pictures, text=strings)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("tokenize", [False, True])
def test_who_asks_for_an_open_answer_is_heard_or_refused(processor, tokenize):
    call = partial(processor.apply_chat_template, tokenize=tokenize)
    same = lambda a, b: a == b if not tokenize else torch.equal(a["input_ids"], b["input_ids"])  # noqa: E731
    assert same(call(MESSAGES), call(MESSAGES, add_generation_prompt=True))
    assert not same(call(MESSAGES[1]), call(MESSAGES[1], add_generation_prompt=False))
    assert same(call(ANSWERED), call(ANSWERED, add_generation_prompt=False))
    with pytest.raises(DataError, match="an answer cannot be opened after an answer"):
        call(ANSWERED, add_generation_prompt=True)
    with pytest.raises(DataError, match="1 of 2 conversations end with an answer"):
        call([MESSAGES[0], ANSWERED[0]])


def test_masks_of_answers_are_what_training_learns(processor, model):
    inputs = processor.apply_chat_template(ANSWERED, return_assistant_tokens_mask=True)
    masks = inputs.pop("assistant_masks").bool()
    said = [processor.decode(row[mask]) for row, mask in zip(inputs["input_ids"], masks)]
    assert said[:2] == ["a cat<|im_end|>", "hello you<|im_end|>a cat<|im_end|>"]
    labels = inputs["input_ids"].masked_fill(~masks, -100)
    logits = model(**inputs).logits[:, :-1][masks[:, 1:]]
    expected = torch.nn.functional.cross_entropy(logits, inputs["input_ids"][:, 1:][masks[:, 1:]])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    assert not processor.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True)["assistant_masks"].any()


def test_what_would_be_left_out_is_refused(processor, model):
    for wrong in ({"padding": "max_length", "max_length": 9}, {"truncation": True}, {"add_special_token": True}):
        for call in (partial(processor, ONE.source, "<image>a"), partial(processor.apply_chat_template, MESSAGES)):
            with pytest.raises(ConfigError, match=f"does not take .*{list(wrong)[-1]}"):
                call(**wrong)
    inputs = processor(ONE.source, "<image>a", padding=True, truncation=False, return_token_type_ids=True)
    with pytest.raises(ConfigError, match="forward of this model does not take output_hidden_states"):
        model(**inputs, output_hidden_states=True)
    for empty in ([], [[]], [MESSAGES[0], []], MESSAGES[0][0]):
        with pytest.raises(DataError, match="there are no messages"):
            processor.apply_chat_template(empty)
    with pytest.raises(ConfigError, match="does not take continue_final_message\nleave it out$"):
        processor.apply_chat_template(MESSAGES, continue_final_message=True)
    with pytest.raises(ConfigError, match="'llava' is no recipe"):
        isthmus.compose("llava")


def test_a_turn_holds_nothing_that_would_be_dropped():
    for part in (ONE.source, Path("cat.png"), b"PNG"):
        with pytest.raises(DataError, match="is no part of a turn\nwrap a picture or its path"):
            Turn.say("user", part, "what is it?")
    for part in (3, None):
        with pytest.raises(DataError, match="is no part of a turn\nwrap it"):
            Turn.say("user", part)
    with pytest.raises(DataError, match="no role is called 'usr'"):
        Turn.say("usr", "hi")


def test_a_marker_that_a_user_typed_in_a_conversation_is_text(processor, model):
    said = "what does <image> mean, and <|im_end|>?"
    found = processor.apply_chat_template([{"role": "user", "content": said}])
    assert "pixel_values" not in found and not (found["input_ids"] >= model.vocabulary).any()
    assert said in processor.decode(found["input_ids"][0])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((found["input_ids"] == end).sum()) == 1, "the template's own; the typed one is text"


def test_decode_leaves_placeholders_out(processor, model):
    batch = processor.prompts(SAMPLES[:1])
    text = processor.decode(batch.input_ids_BT[0], skip_special_tokens=True)
    assert text == "user\n\nwhat is it?\nassistant\n"
    assert processor.batch_decode(batch.input_ids_BT, skip_special_tokens=True) == [text]
    assert int((batch.modality_BT == Modality.IMAGE).sum()) == model.queries("image")


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_saved_processor_is_the_same_one(tmp_path, family, vision):
    ours = composed.model(family, vision=vision, aspect="squash").processor
    ours.save_pretrained(tmp_path)
    for again in (AutoProcessor.from_pretrained(tmp_path), VLMProcessor.from_pretrained(tmp_path)):
        assert type(again) is VLMProcessor
        for name in ("layouts", "placeholders", "aspect", "template", "decoder_start", "chat_template"):
            assert getattr(again, name) == getattr(ours, name), name
        assert type(again.image_processor) is type(ours.image_processor)
        assert again.image_processor.to_dict() == ours.image_processor.to_dict()
        batch, other = ours.prompts(SAMPLES), again.prompts(SAMPLES)
        assert torch.equal(batch.input_ids_BT, other.input_ids_BT)
        assert torch.equal(batch.media["image"].pixels, other.media["image"].pixels)


def test_a_prompt_for_an_encoder_decoder_opens_its_decoder():
    model = composed.model("t5")
    found = model.processor.apply_chat_template(MESSAGES)
    assert found["decoder_input_ids"].tolist() == [[model.config.text_config.decoder_start_token_id]] * 2


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
def test_the_aspect_is_the_encoders(aspect):
    wide = picture(3, 40).source.resize((64, 32))
    processor = composed.model("llama", aspect=aspect).processor
    found = processor(images=wide, text="<image>")["pixel_values"][0]
    assert torch.equal(found, media.pixels(wide, processor.image_processor, aspect))
    others = {"crop", "pad", "squash"} - {aspect}
    assert not any(torch.equal(found, media.pixels(wide, processor.image_processor, other)) for other in others)
