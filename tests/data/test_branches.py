"""Samples that branch: the beginning once, then every conversation's own rest."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as Pillow

import tiny
from isthmus.data.chat import Renderer, share
from isthmus.data.collate import Collator
from isthmus.types import IGNORE, DataError, Image, Layout, Sample, Turn

PICTURE = Image(Pillow.new("RGB", (8, 8)))


def renderer() -> Renderer:
    return Renderer(tiny.tokenizer(), {"image": Layout(4, after="\n")}, {"image": 320})


def asked(question: str, answer: str, picture: Image = PICTURE) -> tuple[Turn, ...]:
    return Turn.say("user", picture, question), Turn.say("assistant", answer)


def test_every_branch_is_its_conversation_up_to_its_last_answer():
    render = renderer().render
    conversations = [render(asked("What is it?", "a cat")), render(asked("What colour?", "red"))]
    merged = share(conversations)
    shared = merged.branch.count(0)
    for number, alone in enumerate(conversations, start=1):
        own = [place for place, branch in enumerate(merged.branch) if branch in (0, number)]
        last = max(place for place, learnt in enumerate(alone.trained) if learnt) + 1
        assert alone.ids[last:]  # what closes the turn, which nothing reads
        assert [merged.ids[place] for place in own] == alone.ids[:last]
        assert [merged.trained[place] for place in own] == alone.trained[:last]
        assert [merged.modality[place] for place in own] == alone.modality[:last]
    assert shared > merged.spans[0][1] - 1 and len(merged.ids) < sum(len(one.ids) for one in conversations)


def test_the_token_that_predicts_an_answer_stays_with_it():
    render = renderer().render
    merged = share([render(asked("What?", "a cat")), render(asked("What?", "a dog"))])
    for number in (1, 2):
        first = merged.branch.index(number)
        assert not merged.trained[first] and merged.trained[first + 1]


def test_media_must_stand_in_the_shared_beginning():
    other = Image(Pillow.new("RGB", (8, 8), "red"))
    render = renderer().render
    with pytest.raises(DataError, match="branches differ before or in their media"):
        share([render(asked("What?", "a cat")), render(asked("What?", "a cat", other))])


def test_collate_gives_branches_and_labels():
    sample = Sample(asked("What is it?", "a cat"), "x", branches=(asked("What colour?", "red"),))
    plain = Sample(asked("What is it?", "a cat"), "y")
    collator = Collator(renderer(), lambda kind, media: (torch.zeros(len(media), 3, 8, 8), None), 0)
    batch = collator([sample, plain])
    assert batch.branch_BT is not None and batch.branch_BT[0].unique().tolist() == [0, 1, 2]
    assert batch.branch_BT[1].unique().tolist() == [0]
    assert len(batch.media["image"]) == 2
    for number, text in ((1, "a cat"), (2, "red")):
        told = batch.labels_BT[0][(batch.branch_BT[0] == number) & (batch.labels_BT[0] != IGNORE)]
        assert renderer().tokenizer.decode(told, skip_special_tokens=True).strip() == text
    assert collator([plain]).branch_BT is None


def test_earlier_answers_are_shared_whole_or_not_at_all():
    def talk(first: str, second: str) -> tuple[Turn, ...]:
        return (*asked("What?", first), Turn.say("user", "Sure?"), Turn.say("assistant", second))

    def learnt(branch: int) -> str:
        pairs = zip(merged.ids, merged.trained, merged.branch)
        return renderer().tokenizer.decode([token for token, trained, own in pairs if trained and own == branch])

    render = renderer().render
    merged = share([render(talk("a cat", "yes")), render(talk("a cat", "yes, it is"))])
    assert [learnt(branch) for branch in range(3)] == ["a cat<|im_end|>", "yes<|im_end|>", "yes, it is<|im_end|>"]
    merged = share([render(talk("a cat", "yes")), render(talk("a dog", "no"))])
    assert [learnt(branch) for branch in range(3)] == [
        "",
        "a cat<|im_end|>yes<|im_end|>",
        "a dog<|im_end|>no<|im_end|>",
    ]
    assert not merged.trained[merged.branch.index(1)] and not merged.trained[merged.branch.index(2)]


def test_questions_that_are_still_open_stay_whole():
    def ask(question: str) -> tuple[Turn, ...]:
        return (*asked("What?", "a cat"), Turn.say("user", question))

    alone = [renderer().render(ask(question), open_answer=True) for question in ("Sure?", "Where is it?")]
    merged = share(alone, open_answer=True)
    for number, one in enumerate(alone, start=1):
        assert [token for token, branch in zip(merged.ids, merged.branch) if branch in (0, number)] == one.ids
