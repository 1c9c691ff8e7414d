"""The renderer against `apply_chat_template`, and label safety as a property (R7)."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from tiny_tokenizers import CHATML, LLAMA3, byte_level, metaspace, unigram, zoo

import composed
from isthmus.data import template
from isthmus.data.boxes import Regions, Thousandths
from isthmus.data.chat import Renderer, cut
from isthmus.types import Box, ConfigError, DataError, Image, Layout, Modality, Tag, Text, Turn, Video

PICTURE = Image(Pillow.new("RGB", (2, 2)))
IMAGE = 1_000_000


def renderer(tokenizer, count=3, before="", after="", **options):
    return Renderer(tokenizer, {"image": Layout(count, before, after)}, {"image": IMAGE}, **options)


def messages(turns):
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def learnt(rendered, tokenizer):
    ids = rendered.ids if rendered.decoder_ids is None else rendered.decoder_ids
    return tokenizer.decode([token for token, learn in zip(ids, rendered.trained) if learn], skip_special_tokens=True)


TALK = (
    Turn.say("user", "What is in the picture?"),
    Turn.say("assistant", "A red fox.\n\nAnd two boats: äöü 日本."),
    Turn.say("user", "How many dogs?\n"),
    Turn.say("assistant", "three"),
)
SYSTEM = Turn.say("system", "Be brief.")
UNENDED = {"glm"}  # ends no answer at the end of a conversation, so an end token is added


@pytest.mark.parametrize("name", sorted(zoo()))
@pytest.mark.parametrize("template", ["chat", "document"])
def test_a_line_break_behind_a_picture_stands_once(name, template):
    """LLaVA's data bring one where its layout puts one too; their second one, or that of another layout, is kept."""
    ours, bare = (renderer(zoo()[name], after=after, template=template) for after in ("\n", ""))

    def ids(renderer, *parts):
        return renderer.render((Turn.say("user", *parts), Turn.say("assistant", "a dog"))).ids

    assert ids(ours, PICTURE, "\nWhat?") == ids(ours, PICTURE, "What?") == ids(bare, PICTURE, "\nWhat?")
    assert ids(ours, PICTURE, "\n", PICTURE, "What?") == ids(ours, PICTURE, PICTURE, "What?")
    assert ids(ours, PICTURE, "\n\nWhat?") == ids(bare, PICTURE, "\n\nWhat?") != ids(ours, PICTURE, "What?")
    broken, whole = [PICTURE, "\nWhat?"], [PICTURE, "What?"]
    assert ours.render_string(broken).ids == ours.render_string(whole).ids == bare.render_string(broken).ids


@pytest.mark.parametrize("name", sorted(set(zoo()) - {"none"}))
@pytest.mark.parametrize("with_system", [False, True])
def test_ids_equal_apply_chat_template(name, with_system):
    tokenizer = zoo()[name]
    if name == "llama2" and with_system:
        with pytest.raises(ConfigError, match="System role not supported"):
            renderer(tokenizer).render((SYSTEM, *TALK))
        return
    turns = (SYSTEM, *TALK) if with_system else TALK
    ids = tokenizer.apply_chat_template(messages(turns), return_dict=False)
    assert renderer(tokenizer).render(turns).ids == ids + [tokenizer.eos_token_id] * (name in UNENDED)
    prompt = tokenizer.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True, return_dict=False)
    assert renderer(tokenizer).render(turns[:-1], open_answer=True).ids == prompt


def test_bos_is_never_doubled_and_trained_is_answer_and_its_end():
    tokenizer = zoo()["vicuna"]
    assert tokenizer.bos_token_id is not None
    rendered = renderer(tokenizer).render(TALK)
    assert rendered.ids.count(tokenizer.bos_token_id) == 1
    assert sum(token == tokenizer.eos_token_id for token, learn in zip(rendered.ids, rendered.trained) if learn) == 2
    assert (
        learnt(rendered, tokenizer) == " A red fox.\n\nAnd two boats: äöü 日本. three"
    )  # the template's space is said


def test_chatml_by_hand():
    tokenizer = zoo()["chatml"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def plain(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    rendered = renderer(tokenizer, 2, "<|im_start|>", "!").render(
        (SYSTEM, Turn.say("user", PICTURE, "dogs?"), Turn.say("assistant", "three"))
    )
    system = [start, *plain("system\nBe brief."), end, *plain("\n")]
    user = [start, *plain("user\n"), start, IMAGE, IMAGE, *plain("!dogs?"), end, *plain("\n")]
    head, answer, tail = [start, *plain("assistant\n")], [*plain("three"), end], plain("\n")
    assert rendered.ids == system + user + head + answer + tail
    untrained = len(system + user + head)
    assert rendered.trained == [False] * untrained + [True] * len(answer) + [False] * len(tail)
    at = len(system) + len([start, *plain("user\n"), start])
    assert rendered.spans == [(at, at + 2)]
    assert [i for i, kind in enumerate(rendered.modality) if kind == Modality.IMAGE] == [at, at + 1]
    assert rendered.media == (PICTURE,)


@pytest.mark.parametrize("name", sorted(zoo()))
def test_users_cannot_type_control_tokens(name):
    tokenizer = zoo()[name]
    make = renderer(tokenizer)
    control = set(tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    words = sorted(control) + ["<image>", "plain"]
    calm = make.render((Turn.say("user", "x"), Turn.say("assistant", "x")))
    typed = make.render((Turn.say("user", " ".join(words)), Turn.say("assistant", "".join(words))))
    special = set(tokenizer.convert_tokens_to_ids(sorted(control))) - {None, tokenizer.unk_token_id}
    assert sum(token in special for token in typed.ids) == sum(token in special for token in calm.ids)
    assert "".join(words) in tokenizer.decode(typed.ids)
    assert IMAGE not in typed.ids


def test_a_copy_for_a_worker_still_sees_no_control_tokens():
    codec = copy.deepcopy(renderer(zoo()["chatml"]))._chat.codec
    assert codec._backend.encode_special_tokens


def test_texts_that_come_again_are_encoded_alike_and_room_for_them_is_bounded(monkeypatch):
    monkeypatch.setattr(template, "REMEMBERED", 3)
    codec = renderer(zoo()["chatml"])._chat.codec
    for text in ("a red fox", "the owl", "a red fox", *map(str, range(10)), "a red fox"):
        for follows in (True, False):
            assert codec.plain(text, follows) == codec._encode(text, follows)
            codec.plain(text, follows).append(-1)  # what a caller does with its ids touches nothing
    assert len(codec._met) <= 3


def test_unigram_vocabulary_holds_control_tokens_as_words_and_still_none_is_typed():
    tokenizer = unigram()
    assert 1 in tokenizer("a </s>b", split_special_tokens=True, add_special_tokens=False).input_ids  # the danger
    make = renderer(tokenizer, decoder_start=0)
    rendered = make.render((Turn.say("user", "red </s>fox</s>"), Turn.say("assistant", "</s>a")))
    assert rendered.ids.count(1) == 1 and rendered.ids[-1] == 1
    assert rendered.decoder_ids.count(1) == 1 and rendered.decoder_ids[-1] == 1


def test_encoder_decoder_by_hand():
    tokenizer = unigram()
    make = renderer(tokenizer, 2, decoder_start=0)
    turns = (Turn.say("user", PICTURE, "what is this"), Turn.say("assistant", "a red fox"))
    rendered = make.render(turns)
    assert rendered.ids == [IMAGE, IMAGE, *tokenizer("what is this").input_ids]
    assert rendered.decoder_ids == [0, *tokenizer("a red fox").input_ids]
    assert rendered.trained == [False, *[True] * (len(rendered.decoder_ids) - 1)]
    opened = make.render(turns[:1], open_answer=True)
    assert (opened.ids, opened.decoder_ids, opened.trained) == (rendered.ids, [0], [False])
    with pytest.raises(DataError, match="inside an answer"):
        make.render((turns[0], Turn.say("assistant", PICTURE)))


def test_fallback_is_the_documented_one():
    tokenizer = zoo()["none"]
    rendered = renderer(tokenizer).render((SYSTEM, *TALK[:2]))
    text = "Be brief. USER: What is in the picture? ASSISTANT: A red fox.\n\nAnd two boats: äöü 日本.</s>"
    assert tokenizer.decode(rendered.ids) == text
    bos = metaspace(None)
    assert renderer(bos).render(TALK[:2]).ids[0] != bos.bos_token_id  # this tokenizer adds none by itself


def test_contents_are_trimmed_where_the_template_trims():
    tokenizer = zoo()["llama3"]
    turns = (Turn.say("user", " \n hi \n"), Turn.say("assistant", "  yes  "))
    assert renderer(tokenizer).render(turns).ids == tokenizer.apply_chat_template(messages(turns), return_dict=False)
    assert learnt(renderer(tokenizer).render(turns), tokenizer) == "yes"


@pytest.mark.parametrize("name", sorted(set(zoo()) - {"none"}))
def test_what_a_form_already_says_is_in_the_answer_and_is_not_learnt(name):
    tokenizer = zoo()[name]
    filled = (Text("a dog: ", given=True), "no", Text("; a cat: ", given=True), "yes")
    rendered = renderer(tokenizer).render((TALK[0], Turn.say("assistant", *filled)))
    plain = renderer(tokenizer).render((TALK[0], Turn.say("assistant", "a dog: no; a cat: yes")))
    words, same = (tokenizer.decode(one.ids).replace(" ", "") for one in (rendered, plain))
    assert words == same  # but for the spaces that some tokenizers put before every piece
    form = tokenizer.decode([token for token, learn in zip(rendered.ids, rendered.trained) if not learn])
    assert "a dog:" in form and "a cat:" in form
    said = learnt(rendered, tokenizer)
    assert "no" in said and "yes" in said and "dog" not in said and "cat" not in said
    assert "a dog: no; a cat: yes" in learnt(plain, tokenizer)


@pytest.mark.parametrize("parts", [(), (Image(b""),)])
def test_of_an_answer_whose_words_are_given_nothing_is_learnt_its_end_neither(parts):
    make = renderer(zoo()["llama3"])
    given = make.render((TALK[0], Turn("assistant", (*parts, Text("a dog", given=True)))))
    said = make.render((TALK[0], Turn("assistant", (*parts, Text("a dog")))))
    assert given.ids == said.ids and any(said.trained) and not any(given.trained)


def test_last_thinking_block_is_said_by_the_model():
    tokenizer = zoo()["thinking"]
    assert learnt(renderer(tokenizer).render(TALK), tokenizer).endswith("<think>\n\n</think>\n\nthree")


def test_a_prompt_is_a_prefix_even_where_the_tokenizers_own_is_not():
    """GPT-2's word rule reads "\\n\\n" at the end of a prompt as one word, and as two before an answer."""
    tokenizer = byte_level(LLAMA3, ["<|end_header_id|>", "<|eot_id|>"], eos_token="<|eot_id|>", bos_token="<s>")
    turns = (Turn.say("user", "hi"), Turn.say("assistant", "yes"))
    own = tokenizer.apply_chat_template(messages(turns), return_dict=False)
    prompt = tokenizer.apply_chat_template(messages(turns[:1]), add_generation_prompt=True, return_dict=False)
    assert own[: len(prompt)] != prompt  # the danger
    make = renderer(tokenizer)
    assert make.render(turns[:1], open_answer=True).ids == prompt
    whole = make.render(turns)
    assert whole.ids[: len(prompt)] == prompt
    assert tokenizer.decode(whole.ids) == tokenizer.decode(own)
    assert learnt(whole, tokenizer) == "yes"


@pytest.mark.parametrize(
    "template, cause",
    [
        ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}", "drops.*system"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "drops or changes"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "reorders"),
        ("{% for m in messages %}{{ m.content | replace(' ', '_') }}{% endfor %}", "white space"),
        ("{{ nothing.there }}", "refuses"),
    ],
)
def test_a_template_that_loses_contents_is_refused(template, cause):
    tokenizer = byte_level(template, eos_token="</s>")
    with pytest.raises(ConfigError, match=cause):
        renderer(tokenizer).render((SYSTEM, *TALK))


def test_refusals():
    tokenizer = byte_level(CHATML)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        renderer(tokenizer)
    make = renderer(zoo()["chatml"])
    with pytest.raises(ConfigError, match="no encoder for video"):
        make.render((Turn.say("user", Video("clip.mp4")),))
    with pytest.raises(DataError, match="after an answer"):
        make.render(TALK, open_answer=True)
    with pytest.raises(DataError, match="empty"):
        make.render(())


def test_plain_is_media_then_answer():
    tokenizer = zoo()["chatml"]
    make = renderer(tokenizer, 2, template="plain")
    turns = (Turn.say("user", "Describe it.", PICTURE), Turn.say("assistant", "a fox"))
    answer = tokenizer("a fox").input_ids + [tokenizer.eos_token_id]
    rendered = make.render(turns)
    assert rendered.ids == [IMAGE, IMAGE, *answer]
    assert rendered.trained == [False, False, *[True] * len(answer)]
    assert make.render(turns[:1], open_answer=True).ids == [IMAGE, IMAGE]
    with pytest.raises(DataError, match="no assistant turn"):
        make.render(turns[:1])


def test_plain_learns_the_first_answer_of_a_conversation_with_any_llm():
    turns = (SYSTEM, Turn.say("user", PICTURE, "what is this"), Turn.say("assistant", "a red fox"), *TALK[2:])
    decoder, both = (renderer(unigram(), 2, template="plain", **more) for more in ({}, {"decoder_start": 0}))
    one, other = decoder.render(turns), both.render(turns)
    assert learnt(one, unigram()) == learnt(other, unigram()) == "a red fox"
    assert other.ids == [IMAGE, IMAGE, unigram().eos_token_id]


@pytest.mark.parametrize("text", ["a red fox and what is this", "red fox", "fox"])
def test_a_prefix_is_read_and_the_rest_of_the_caption_is_learnt(text):
    tokenizer, words = unigram(), text.split()
    turns = (Turn.say("user", PICTURE, "what is this"), Turn.say("assistant", text))
    decoder, both = (renderer(tokenizer, 2, template="prefix", **more) for more in ({}, {"decoder_start": 0}))
    for rendered in (decoder.render(turns), both.render(turns)):
        given = rendered.ids if rendered.decoder_ids else [i for i, t in zip(rendered.ids, rendered.trained) if not t]
        assert given[:2] == [IMAGE, IMAGE]
        first, rest = tokenizer.decode(given[2:], skip_special_tokens=True).split(), learnt(rendered, tokenizer).split()
        assert first + rest == words and rest and bool(first) == (len(words) > 1)
        told = rendered.decoder_ids or rendered.ids
        assert told[-1] == tokenizer.eos_token_id and rendered.trained[-1]
        assert sum(rendered.trained) == len(tokenizer(" ".join(rest)).input_ids)  # the rest and its end, no more
    assert both.render(turns[:1], open_answer=True).ids == [IMAGE, IMAGE, tokenizer.eos_token_id]


def test_captions_are_cut_between_any_two_words_and_always_alike():
    texts = [f"a  b\nc d {number} " for number in range(200)]
    cuts = [cut(text) for text in texts]
    assert {len(first.split()) for first, _ in cuts} == {1, 2, 3, 4}
    assert [first + rest for first, rest in cuts] == texts and [cut(text) for text in texts] == cuts
    assert cut("") == ("", "") and cut("fox ") == ("", "fox ")


def test_a_prefix_of_more_than_words_is_refused():
    for part in (PICTURE, Text("a form: ", given=True)):
        with pytest.raises(DataError, match="no first words"):
            renderer(unigram(), template="prefix").render((TALK[0], Turn.say("assistant", part, "so")))


def test_documents_keep_every_picture_and_text_in_its_order():
    tokenizer = zoo()["chatml"]
    make = renderer(tokenizer, 2, template="documents")
    turns = [Turn.say(*said) for said in (("user", PICTURE), ("assistant", "a fox"), ("user", PICTURE, "Next: "))]
    rendered = make.render((*turns, Turn.say("assistant", "a hen")))
    fox, asked, hen = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a fox", "Next: ", "a hen"))
    assert rendered.ids == [IMAGE, IMAGE, *fox, IMAGE, IMAGE, *asked, *hen, tokenizer.eos_token_id]
    learnt = [token for token, trained in zip(rendered.ids, rendered.trained) if trained]
    assert learnt == [*fox, *hen, tokenizer.eos_token_id] and len(rendered.media) == 2
    assert make.render(tuple(turns), open_answer=True).ids == [IMAGE, IMAGE, *fox, IMAGE, IMAGE, *asked]


def test_layouts_may_depend_on_the_medium_and_tags_and_boxes_are_text():
    tokenizer = zoo()["chatml"]
    make = Renderer(tokenizer, {"image": lambda medium: Layout(medium.source.width)}, {"image": IMAGE})
    box = Box((0.0, 0.25, 0.5, 1.0))
    rendered = make.render((Turn.say("user", PICTURE, Tag("fox", 0.5), " at ", box), Turn.say("assistant", "yes")))
    assert rendered.ids.count(IMAGE) == 2
    assert "fox at [0.000,0.250,0.500,1.000]<|im_end|>" in tokenizer.decode([i for i in rendered.ids if i != IMAGE])
    own = renderer(tokenizer, regions=Regions(Thousandths())).render((Turn.say("user", box),))
    assert "<box>(0,250),(500,999)</box>" in tokenizer.decode(own.ids)


def test_a_joint_that_stays_aside_marks_the_place_with_text():
    tokenizer = zoo()["chatml"]
    rendered = renderer(tokenizer, 0, "<|im_start|>").render((Turn.say("user", "a", PICTURE, "b"),))
    (span,) = rendered.spans
    assert span[0] == span[1] and rendered.ids[span[0] - 1] == tokenizer.bos_token_id
    assert IMAGE not in rendered.ids


def test_preview_marks_trained_text_and_media():
    tokenizer = zoo()["chatml"]
    make = renderer(tokenizer)
    text = make.preview(make.render((Turn.say("user", PICTURE, "what?"), Turn.say("assistant", "a fox"))))
    styled = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styled["[image × 3]"] == "cyan"
    assert styled["a fox<|im_end|>"] == "bold green"
    assert {style for words, style in styled.items() if "what?" in words} == {"dim"}


# ------------------------------------------------------------------------------------------- R7, label safety

PIECES = st.sampled_from([*"ab .,\n\t:<|>/äß日 ", "</s>", "<|im_end|>", "<|user|>", "<image>", "USER:", "red fox"])
WORDS = st.lists(PIECES, max_size=12).map("".join)
ANSWERS = WORDS.filter(str.strip)


@st.composite
def conversations(draw, system=True):
    turns = [Turn.say("system", draw(ANSWERS))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(st.one_of(WORDS, st.just(PICTURE)), min_size=1, max_size=3))
        turns += [Turn.say("user", *parts), Turn.say("assistant", draw(ANSWERS))]
    return tuple(turns)


def check_label_safety(name, turns, template):
    tokenizer = zoo()[name]
    make = renderer(tokenizer, 2, template=template)
    rendered = make.render(turns)
    assert len(rendered.ids) == len(rendered.trained) == len(rendered.modality)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    answers = answers[:1] if template == "plain" else answers

    groups, last = [], False
    for token, learn, kind in zip(rendered.ids, rendered.trained, rendered.modality):
        assert (token == IMAGE) == (kind == Modality.IMAGE)
        assert not (learn and token == IMAGE)
        if learn and not last:
            groups.append([])
        if learn:
            groups[-1].append(token)
        last = learn
    said = [tokenizer.decode(group[:-1]) for group in groups]  # the last one is the end of the turn
    assert [text.removeprefix("<think>\n\n</think>").strip() for text in said] == [text.strip() for text in answers]
    for group in groups:
        assert group[-1] in tokenizer.all_special_ids or group[-1] in tokenizer.added_tokens_decoder

    assert sum(end - start for start, end in rendered.spans) == rendered.ids.count(IMAGE) == 2 * len(rendered.media)
    if template == "chat":
        prompt = make.render(turns[:-1], open_answer=True).ids
        assert len(prompt) < len(rendered.ids) and rendered.ids[: len(prompt)] == prompt


NAMES = st.sampled_from(sorted(zoo()))
TEMPLATES = st.sampled_from(["chat", "chat", "plain"])


@given(st.data(), NAMES, TEMPLATES)
@settings(max_examples=300, deadline=None)
def test_label_safety(data, name, template):
    check_label_safety(name, data.draw(conversations(system=name != "llama2")), template)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(st.data(), NAMES, TEMPLATES)
@settings(max_examples=10_000, deadline=None)
def test_label_safety_at_length(data, name, template):
    check_label_safety(name, data.draw(conversations(system=name != "llama2")), template)


def test_an_answer_of_weight_0_teaches_nothing() -> None:
    made = composed.model().processor.renderer()
    turns = [
        Turn.say("user", "one?"),
        Turn("assistant", (Text("no", given=True),)),
        Turn.say("user", "two?"),
        Turn.say("assistant", "yes"),
    ]
    rendered = made.render(turns)
    alone = made.render(turns[2:])
    learnt = [token for token, trained in zip(rendered.ids, rendered.trained) if trained]
    assert learnt == [token for token, trained in zip(alone.ids, alone.trained) if trained] != []
