"""Interleaved documents: whose pictures, which texts, and what of them is learnt."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as Pillow

import composed
import tiny
from isthmus.config import Source
from isthmus.data.chat import Renderer
from isthmus.data.documents import DocumentOptions, Documents
from isthmus.data.sets import open_set, stamp
from isthmus.types import ConfigError, Image, Layout, Sample, Turn

FRUIT = tuple(
    Sample(
        (Turn.say("user", Image(Pillow.new("RGB", (4, 4), (shade, 0, 0))), "Which?"), Turn.say("assistant", answer)),
        branches=((Turn.say("user", "no picture", "Eh?"), Turn.say("assistant", "never")),) if shade == 99 else (),
    )
    for shade, answer in enumerate(("apple", "pear", "plum", "fig", "date", "lime", "kiwi"))
)
TOOLS = tuple(one.but(turns=(one.turns[0], Turn.say("assistant", f"tool {n}"))) for n, one in enumerate(FRUIT))


def documents(**options: object) -> Documents:
    sources = ({"name": "fruit", "weight": 3.0}, {"name": "tools", "weight": 1.0})
    return Documents("train", 0, DocumentOptions.model_validate({"of": sources, **options}), (FRUIT, TOOLS))


def test_a_document_alternates_pictures_and_texts_of_one_source() -> None:
    made = [documents(least=2, most=4).sample(index) for index in range(400)]
    assert {len(one.media) for one in made} == {2, 3, 4}
    known = {id(one.media[0].source): place for place, one in enumerate(FRUIT)}
    kinds = []
    for one in made:
        assert [turn.role for turn in one.turns] == ["user", "assistant"] * len(one.media)
        assert len({id(medium.source) for medium in one.media}) == len(one.media), "no picture twice"
        assert all(turn.text == "" for turn in one.turns[::2]), "nobody says what is wanted"
        places = [known[id(medium.source)] for medium in one.media]
        told = [turn.text for turn in one.turns[1::2]]
        assert told in ([FRUIT[p].turns[1].text for p in places], [f"tool {p}" for p in places])
        kinds.append(told[0].startswith("tool"))
    assert 0.2 < sum(kinds) / len(kinds) < 0.3  # a weight of one in four; the deviation is 0.022
    assert len({one.id for one in made}) == len(made)


def test_a_document_depends_on_seed_and_number_alone() -> None:
    again = [documents().sample(index) for index in (5, 2)]
    assert again == [documents().sample(5), documents().sample(2)]
    other = Documents("train", 1, documents().options, (FRUIT, TOOLS))
    assert [other.sample(n) for n in range(9)] != [documents().sample(n) for n in range(9)]


def test_questions_stay_where_they_are_asked() -> None:
    one = documents(asked=True).sample(0)
    assert {turn.text for turn in one.turns[::2]} == {"Which?"}


def test_a_document_is_of_the_kind_of_its_samples_where_they_tell_one() -> None:
    def meta(*routes: int | None) -> dict:
        shelf = [one.but(meta={} if route is None else {"route": route}) for one, route in zip(FRUIT, routes)]
        options = DocumentOptions.model_validate({"of": [{"name": "fruit"}], "least": 3, "most": 3})
        return Documents("train", 0, options, (shelf,)).sample(0).meta

    assert "route" not in meta(None, None, None)
    assert [meta(0, 0, 0)["route"], meta(1, 1, 1)["route"], meta(0, None, 0)["route"]] == [0, 1, 0]
    assert meta(0, 1, None)["route"] == 1  # one place is enough, as in any conversation


def test_system_turns_of_the_sources_are_left_out() -> None:
    told = tuple(one.but(turns=(Turn.say("system", "Be brief."), *one.turns)) for one in FRUIT)
    options = documents(of=["fruit"]).options
    plain, made = (Documents("train", 0, options, (shelf,)).sample(3) for shelf in (FRUIT, told))
    assert made == plain and {turn.role for turn in made.turns} == {"user", "assistant"}


def test_every_text_is_learnt_and_no_picture_is() -> None:
    renderer = Renderer(tiny.tokenizer(), {"image": Layout(3, after="\n")}, {"image": tiny.VOCAB})
    one = documents(least=3, most=3).sample(1)
    rendered = renderer.render(one.turns)
    told = renderer.tokenizer.decode([i for i, learnt in zip(rendered.ids, rendered.trained) if learnt])
    assert told == "".join(turn.text + "<|im_end|>" for turn in one.turns[1::2])
    assert not any(learnt for learnt, kind in zip(rendered.trained, rendered.modality) if kind)


@pytest.mark.parametrize("aligner", ["llava", "flamingo"])
def test_spliced_and_aside_joints_read_the_embedded_documents(aligner: str) -> None:
    made = open_set(Source(name="documents", options={"count": 3, "most": 3}), seed=0)
    assert len(made) == 3
    model = composed.stir(composed.model(aligner=aligner))
    batch = model.processor.collator()(list(made))
    assert len(batch.media["image"]) == sum(len(one.media) for one in made)
    with torch.no_grad():
        hidden_BTD = model.run(batch).hidden_BTD
    assert hidden_BTD is not None and torch.isfinite(hidden_BTD).all()


def test_documents_keep_to_their_split_and_share_its_pictures() -> None:
    def keys(name: str, split: str, **options: object) -> set[str]:
        opened = open_set(Source(name=name, split=split, options=options), seed=4)
        return {medium.source.key for one in opened for medium in one.media}  # type: ignore[union-attr]

    of = [{"name": "naming", "options": {"count": 40}}]
    for split in ("train", "val"):
        inside = keys("documents", split, of=of, count=200)
        assert inside == keys("naming", split, count=40)


def test_wrong_options_say_so() -> None:
    with pytest.raises(ConfigError, match="at least 4 pictures"):
        open_set(Source(name="documents", options={"least": 4, "most": 3}), 0)
    with pytest.raises(ConfigError, match="no data set is named 'nothing'"):
        open_set(Source(name="documents", options={"of": ["nothing"]}), 0)
    with pytest.raises(ConfigError, match="not of documents"):
        stamp([Source(name="documents", options={"of": ["naming", "documents"]})], 0)


def test_the_stamp_sees_files_inside(tmp_path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("one")
    source = Source(name="documents", options={"of": [str(file)]})
    before = stamp([source], 0)
    assert stamp([source], 0) == before
    file.write_text("another")
    assert stamp([source], 0) != before
