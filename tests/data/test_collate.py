"""The promises of `Batch`, against what the renderer says of each sample alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from tiny_tokenizers import unigram, zoo

from isthmus.data.chat import Renderer
from isthmus.data.collate import Collator
from isthmus.types import IGNORE, ConfigError, DataError, Features, Image, Layout, Modality, Sample, Turn

IMAGE = 1_000_000
PAD = 0


def picture(value):
    return Image(Pillow.new("RGB", (1, 1), (value, 0, 0)))


def look(kind, media):
    """Each picture's red value, so that order can be told."""
    assert kind == "image"
    return torch.tensor([medium.source.getpixel((0, 0))[0] for medium in media]).view(-1, 1, 1, 1), None


def collator(name="chatml", count=2, reader=look, template="chat", **options):
    renderer = Renderer(zoo()[name], {"image": Layout(count)}, {"image": IMAGE}, template=template)
    return Collator(renderer, reader, PAD, **options)


def sample(question="what?", answer="a fox", *pictures, id="one", **meta):
    return Sample((Turn.say("user", *pictures, question), Turn.say("assistant", answer)), id, meta)


LONG = Sample(
    (
        Turn.say("system", "Be brief."),
        Turn.say("user", picture(1), "what is in the first picture?"),
        Turn.say("assistant", "a red fox"),
        Turn.say("user", picture(2), "and here?"),
        Turn.say("assistant", "two boats"),
        Turn.say("user", "sure?"),
        Turn.say("assistant", "yes"),
    ),
    "long",
)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_the_rendered_samples_and_padding(side):
    make = collator(side=side)
    samples = [sample(id="a"), sample("how many dogs are there?", "three", picture(5), id="b"), LONG]
    batch = make(samples)
    assert batch.ids == ("a", "b", "long") and batch.route_BT is None and batch.decoder_ids_BU is None
    width = batch.input_ids_BT.shape[1]
    for row, one in enumerate(samples):
        alone = make.renderer.render(one.turns)
        real = slice(width - len(alone.ids), width) if side == "left" else slice(0, len(alone.ids))
        labels = [token if learn else IGNORE for token, learn in zip(alone.ids, alone.trained)]
        for tensor, expected, filler in (
            (batch.input_ids_BT, alone.ids, PAD),
            (batch.labels_BT, labels, IGNORE),
            (batch.modality_BT, alone.modality, Modality.TEXT),
            (batch.segment_BT, [1] * len(alone.ids), 0),
        ):
            assert tensor[row, real].tolist() == expected
            outside = torch.ones(width, dtype=torch.bool)
            outside[real] = False
            assert (tensor[row, outside] == filler).all()
    seen = batch.media["image"]
    assert seen.pixels.flatten().tolist() == [5, 1, 2]
    assert seen.row_N.tolist() == [1, 2, 2] and seen.segment_N.tolist() == [1, 1, 1]
    for row, at in zip(seen.row_N, seen.at_N):
        assert (batch.input_ids_BT[row, at : at + 2] == IMAGE).all() and batch.input_ids_BT[row, at - 1] != IMAGE


def test_packed_rows_are_segments_and_borders_are_not_learnt():
    make = collator(template="plain")
    one, two, three = (
        sample(answer="a fox", id="a"),
        sample("q", "b", picture(7), id="b"),
        sample(answer="three", id="c"),
    )
    batch = make.rows([[one, two], [three]])
    ids = [make.renderer.render(s.turns).ids for s in (one, two, three)]
    assert batch.input_ids_BT[0].tolist() == ids[0] + ids[1]
    assert batch.segment_BT[0].tolist() == [1] * len(ids[0]) + [2] * len(ids[1])
    assert batch.ids == ("a", "b", "c")
    seen = batch.media["image"]
    assert (seen.row_N.item(), seen.segment_N.item(), seen.at_N.item()) == (0, 2, len(ids[0]))
    # `plain` starts with a trained token, which only another sample or nothing stands before.
    assert batch.labels_BT[0, 0] == IGNORE and batch.labels_BT[1, 0] == IGNORE
    assert batch.labels_BT[0, 1] == ids[0][1]


def test_prompts_are_open_left_padded_and_without_labels():
    make = collator(open_answer=True)
    asked = Sample((Turn.say("user", picture(3), "what is this?"),), "open")
    batch = make([asked, sample()])
    assert batch.labels_BT is None
    tokenizer = make.renderer.tokenizer
    for row, turns in enumerate((asked.turns, sample().turns[:1])):
        ids = make.renderer.render(turns, open_answer=True).ids
        assert batch.input_ids_BT[row, -len(ids) :].tolist() == ids
        assert batch.segment_BT[row].tolist() == [0] * (batch.segment_BT.shape[1] - len(ids)) + [1] * len(ids)
    assert tokenizer.decode(batch.input_ids_BT[1]).endswith("assistant\n")
    with pytest.raises(DataError, match="sample open: .* max_length is 8"):
        collator(open_answer=True, max_length=8, overlong="drop")([asked])


def test_routes():
    batch = collator()([sample(route=1), sample("a longer question than that", id="two")])
    real = batch.segment_BT > 0
    assert (batch.route_BT[0][real[0]] == 1).all() and (batch.route_BT[0][~real[0]] == 0).all()
    assert (batch.route_BT[1] == 0).all()
    for wrong in ("vqa", 2, -1, 0.5, None):
        with pytest.raises(DataError, match="sample one: its route"):
            collator()([sample(route=wrong)])


def test_overlong_error_names_the_sample():
    with pytest.raises(DataError, match=r"sample long: \d+ tokens, max_length is 20") as caught:
        collator(max_length=20)([LONG])
    assert "overlong" in caught.value.remedy


def test_overlong_drop_leaves_the_sample_out_and_counts_it():
    make = collator(max_length=40, overlong="drop")
    assert make([sample(), LONG]).ids == ("one",)
    assert make.lengths(LONG) == 0 and make.lengths(sample()) == len(make.renderer.render(sample().turns).ids)
    assert make.dropped == {"long"}
    with pytest.raises(DataError, match="every sample of the batch"):
        make([LONG])


def test_overlong_oldest_drops_whole_exchanges_with_their_media():
    render = collator().renderer.render
    endings = [(*LONG.turns[:1], *LONG.turns[start:]) for start in (1, 3, 5)]
    sizes = [len(render(turns).ids) for turns in endings]
    assert sizes == sorted(sizes, reverse=True)
    for limit, expected in ((sizes[0], 0), (sizes[0] - 1, 1), (sizes[1], 1), (sizes[1] - 1, 2), (sizes[2], 2)):
        make = collator(max_length=limit, overlong="oldest")
        batch = make([LONG])
        assert batch.input_ids_BT[0].tolist() == render(endings[expected]).ids
        left = batch.media["image"].pixels.flatten().tolist() if "image" in batch.media else []
        assert left == [[1, 2], [2], []][expected]
        assert make.shortened == ({"long"} if expected else set())
    last = collator(max_length=sizes[2] - 1, overlong="oldest")
    with pytest.raises(DataError, match="every sample of the batch"):
        last([LONG])
    assert last.dropped == {"long"}


def test_a_sample_with_nothing_to_learn_is_refused_by_name():
    with pytest.raises(DataError, match="sample mute: a sample with nothing to learn"):
        collator()([sample(), Sample((Turn.say("user", "hm"),), "mute")])
    with pytest.raises(DataError, match="sample mute: the conversation has no assistant turn"):
        collator(template="plain")([Sample((Turn.say("user", "hm"),), "mute")])


@pytest.mark.parametrize("template", ["chat", "documents"])
def test_before_the_first_picture_nothing_is_learnt_where_only_what_follows_it_is_asked_for(template):
    before = (Turn.say("user", "a word first?"), Turn.say("assistant", "a long introduction"))
    behind = (Turn.say("user", picture(3)), Turn.say("assistant", "a fox"))
    make = collator(template=template, after_media=True)

    def learnt(*turns):
        batch = make([Sample(turns, "one")])
        assert batch.input_ids_BT.tolist() == collator(template=template)([Sample(turns, "one")]).input_ids_BT.tolist()
        return make.renderer.tokenizer.decode(batch.labels_BT[batch.labels_BT != IGNORE])

    assert learnt(*before, *behind) == learnt(*behind)
    assert "fox" in learnt(*behind) and "introduction" in learnt(*before), "without a picture all is learnt"
    packed = make.rows([[Sample((*before, *behind), "one"), Sample(before, "two")]])
    told = make.renderer.tokenizer.decode(packed.labels_BT[packed.labels_BT != IGNORE])
    assert told == learnt(*behind) + learnt(*before)
    pair = Renderer(unigram(), {"image": Layout(2)}, {"image": IMAGE}, decoder_start=0)
    asked = sample("what?", "a fox", picture(1))
    labels = [Collator(pair, look, PAD, after_media=chosen)([asked]).labels_BT for chosen in (False, True)]
    assert torch.equal(*labels), "a decoder of its own has every picture before it"


def test_what_was_read_must_be_what_was_placed():
    short = collator(reader=lambda kind, media: (torch.zeros(1, 3, 2, 2), None))
    with pytest.raises(DataError, match="samples long: 2 images, but 1 were read"):
        short([LONG])
    cached = collator(reader=lambda kind, media: (None, Features(torch.zeros(len(media), 4, 8))))
    assert cached([LONG]).media["image"].features.x_NSE.shape == (2, 4, 8)


def test_encoder_decoder():
    tokenizer = unigram()
    renderer = Renderer(tokenizer, {"image": Layout(2)}, {"image": IMAGE}, decoder_start=0)
    make = Collator(renderer, look, PAD)
    samples = [sample("what is this", "a red fox", picture(9)), sample("what", "a", id="two")]
    batch = make(samples)
    answers = [tokenizer(text).input_ids for text in ("a red fox", "a")]
    width = 1 + len(answers[0])
    gap = width - 1 - len(answers[1])
    assert batch.decoder_ids_BU.tolist() == [[0, *answers[0]], [0, *answers[1], *[PAD] * gap]]
    assert batch.labels_BT.tolist() == [[IGNORE, *answers[0]], [IGNORE, *answers[1], *[IGNORE] * gap]]
    assert batch.input_ids_BT[0].tolist() == [IMAGE, IMAGE, *tokenizer("what is this").input_ids]
    with pytest.raises(ConfigError, match="cannot read packed rows"):
        make.rows([samples])
    prompts = Collator(renderer, look, PAD, open_answer=True)(samples)
    assert prompts.labels_BT is None and prompts.decoder_ids_BU.tolist() == [[0], [0]]


# ------------------------------------------------------------------------------------------- R7, label safety

WORDS = st.lists(st.sampled_from(["a", " fox", "\n", "日", "<|im_end|>", "</s>", "<image>"]), min_size=1, max_size=8)
NAMES = sorted(set(zoo()) - {"thinking"})  # whose answers hold more than the user wrote


@st.composite
def samples(draw):
    turns = []
    for _ in range(draw(st.integers(1, 4))):
        pictures = draw(st.lists(st.integers(0, 255).map(picture), max_size=2))
        answer = "".join(draw(WORDS.filter(lambda words: "".join(words).strip())))
        turns += [Turn.say("user", *pictures, "".join(draw(WORDS))), Turn.say("assistant", answer)]
    return Sample(tuple(turns), "random")


def check_label_safety(name, template, overlong, one, max_length):
    make = collator(name, template=template, overlong=overlong, max_length=max_length)
    tokenizer = make.renderer.tokenizer
    whole = len(make.renderer.render(one.turns).ids)
    if whole > max_length and overlong == "error":
        with pytest.raises(DataError, match="sample random"):
            make([one])
        return
    if not make.lengths(one):
        assert whole > max_length and make.dropped == {"random"}
        return
    batch = make([one])
    ids, labels = batch.input_ids_BT[0], batch.labels_BT[0]
    assert len(ids) == make.lengths(one) <= max_length
    trained = labels != IGNORE
    assert trained.any() and torch.equal(labels[trained], ids[trained])
    assert not (trained & (batch.modality_BT[0] != Modality.TEXT)).any()
    seen = batch.media.get("image")
    kept = [] if seen is None else seen.pixels.flatten().tolist()
    pictures = [medium.source.getpixel((0, 0))[0] for medium in one.media]
    assert (ids == IMAGE).sum() == 2 * len(kept) and (not kept or template == "plain" or pictures[-len(kept) :] == kept)

    runs = trained.int().diff(prepend=torch.zeros(1, dtype=torch.int))
    starts, stops = (runs == 1).nonzero().flatten().tolist(), (runs == -1).nonzero().flatten().tolist()
    groups = [ids[start:stop].tolist() for start, stop in zip(starts, [*stops, len(ids)])]
    said = [tokenizer.decode(group[:-1]).strip() for group in groups]
    answers = [turn.text.strip() for turn in one.turns if turn.role == "assistant"]
    if template == "chat":
        assert said == answers[-len(said) :]
    elif kept:  # else the first trained token has nothing before it, and is not learnt
        assert said == answers[:1] or overlong == "oldest" and said[0] in answers


CASE = (
    st.sampled_from(NAMES),
    st.sampled_from(["chat", "chat", "plain"]),
    st.sampled_from(["error", "drop", "oldest"]),
    samples(),
    st.integers(10, 150),
)


@given(*CASE)
@settings(max_examples=300, deadline=None)
def test_label_safety_through_truncation(name, template, overlong, one, max_length):
    check_label_safety(name, template, overlong, one, max_length)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(*CASE)
@settings(max_examples=10_000, deadline=None)
def test_label_safety_through_truncation_at_length(name, template, overlong, one, max_length):
    check_label_safety(name, template, overlong, one, max_length)
