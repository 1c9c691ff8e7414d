"""Published layouts, written as their authors publish them, and the samples that each record holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from isthmus.data import formats, instructions
from isthmus.data.formats import FileOptions
from isthmus.types import Box, ConfigError, Image, Sample, Text, Video

ONE = FileOptions(instructions="one")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    return tmp_path


def picture(folder: Path, name: str, size: tuple[int, int] = (100, 50)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size).save(path)
    return path


def write(folder: Path, tree: Any, name: str = "data.json", indent: int | None = 1) -> Path:
    path = folder / name
    path.write_text(json.dumps(tree, indent=indent), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[Sample]:
    return formats.load(path, None, ONE.but(**options))


def asked(sample: Sample) -> tuple[str, str]:
    """The question and the answer of one exchange."""
    return sample.turns[0].text, sample.turns[1].text


def boxes(sample: Sample) -> list[Box]:
    return [part for turn in sample.turns for part in turn.parts if isinstance(part, Box)]


# ---------------------------------------------------------------------------------------------- conversations


def test_sharegpt_has_its_own_system_field(folder: Path) -> None:
    path = write(
        folder,
        [
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            }
        ],
    )
    (sample,) = read(path)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
    ]


def test_ms_swift_regions_are_pixels_unless_they_say_otherwise(folder: Path) -> None:
    picture(folder, "a.png"), picture(folder, "b.png", (10, 10))
    messages = [
        {"role": "user", "content": "<image><image>Where is <ref-object>?"},
        {"role": "assistant", "content": "Here: <ref-object><bbox>, not <bbox>."},
    ]
    record = {"images": ["a.png", "b.png"], "messages": messages}
    pixels = {"ref": ["a dog", "the dog"], "bbox": [[10, 5, 60, 45], [1, 2, 3, 4]], "image_id": [0, 1]}
    norm = {"ref": ["a dog", "the dog"], "bbox": [[0.1, 0.1, 0.6, 0.9], [0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"}
    path = write(folder, [{**record, "objects": pixels}, {**record, "objects": norm}])
    for sample in read(path):
        assert sample.turns[0].parts[-3:] == (Text("Where is "), Text("a dog"), Text("?"))
        assert sample.turns[1].parts[1] == Box((0.1, 0.1, 0.6, 0.9), "the dog")
        assert boxes(sample)[1] == Box((0.1, 0.2, 0.3, 0.4))
    thousand = write(folder, [{**record, "objects": {**pixels, "bbox": [[100, 100, 600, 900], [100, 200, 300, 400]]}}])
    assert boxes(read(thousand, boxes="thousandths")[0])[0].xyxy == (0.1, 0.1, 0.6, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [[10, 5, 160, 45]]}, "lies outside 100 × 50"),
        ({"bbox": [[60, 5, 10, 45]]}, "ends before it begins"),
        ({"bbox": [[1, 2, 3]]}, "not four numbers"),
        ({"bbox": []}, "1 <bbox> in the text, 0 in objects"),
        ({"bbox_type": "cm"}, "unknown bbox_type 'cm'"),
        ({"bbox": [[1, 2, 3, float("nan")]]}, "not finite"),
        ({"bbox": [[0.1, 0.2, 0.5, 0.9]]}, "one pixel of 100 × 50 at most"),
        ({"bbox": [[10, 5, 10, 45]]}, "no width"),
        ({"bbox": [[100.5, 5, 101, 45]]}, "no width"),
        ({"bbox": [[10, 5, 60, 5]]}, "no height"),
    ],
)
def test_faulty_regions_are_told(folder: Path, change: dict[str, Any], message: str) -> None:
    picture(folder, "a.png")
    messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    path = write(folder, [{"images": ["a.png"], "messages": messages, "objects": {"bbox": [[1, 2, 3, 4]], **change}}])
    (fault,) = formats.check(path)
    assert message in fault.message and fault.remedy


def test_texts_beside_images(folder: Path) -> None:
    picture(folder, "a.png")
    texts = [{"user": "What?", "assistant": "A cat.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    (sample,) = read(write(folder, [{"images": ["a.png"], "texts": texts}]))
    assert sample.turns[0].parts == (Image(folder / "a.png"), Text("What?"))
    assert [turn.text for turn in sample.turns] == ["What?", "A cat.", "Sure?", "Yes."]


# ---------------------------------------------------------------------------------------------- documents


def test_mmc4_puts_each_picture_before_its_text(folder: Path) -> None:
    picture(folder, "a.jpg"), picture(folder, "b.jpg")
    info = [{"image_name": "b.jpg", "matched_text_index": 2}, {"image_name": "a.jpg", "matched_text_index": 0}]
    record = {"text_list": ["One.", "Two.", "Three."], "image_info": info, "url": "x", "similarity_matrix": []}
    (sample,) = read(write(folder, record, "data.jsonl", None))
    shape = [
        (turn.role, [getattr(part, "source", getattr(part, "text", None)) for part in turn.parts])
        for turn in sample.turns
    ]
    assert shape == [
        ("user", [folder / "a.jpg"]),
        ("assistant", ["One. Two."]),
        ("user", [folder / "b.jpg"]),
        ("assistant", ["Three."]),
    ]


def test_obelics_pictures_and_texts_stand_side_by_side(folder: Path) -> None:
    picture(folder, "a.jpg"), picture(folder, "b.jpg")
    good = {"images": [None, "a.jpg", None, "b.jpg"], "texts": ["Before.", None, "After.", None], "metadata": "[]"}
    bad = {"images": ["a.jpg", None], "texts": ["Both.", "x"]}
    path = write(folder, [good, bad])
    (fault,) = formats.check(path)
    assert "side by side" in fault.message
    (sample,) = read(write(folder, [good]))
    assert [(turn.role, turn.text, len(turn.media)) for turn in sample.turns] == [
        ("user", "", 0),
        ("assistant", "Before.", 0),
        ("user", "", 1),
        ("assistant", "After.", 0),
    ]  # nothing is said of the last picture


# ---------------------------------------------------------------------------------------------- tables


def test_coco_captions(folder: Path) -> None:
    picture(folder, "000000000009.jpg")
    tree = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "x"}],
        "images": [{"id": 9, "file_name": "000000000009.jpg", "height": 50, "width": 100}],
        "annotations": [
            {"image_id": 9, "id": 661611, "caption": "Closeup of bins of food. "},
            {"image_id": 9, "id": 661977, "caption": "A meal."},
            {"image_id": 7, "id": 5, "caption": "Lost."},
        ],
    }
    path = write(folder, tree)
    (fault,) = formats.check(path)
    line = path.read_text().split("\n").index('   "id": 5,')
    assert fault.message == "no image has the id 7" and abs(fault.line - line) <= 1 and fault.id == "5"
    (fault,) = formats.check(write(folder, tree, indent=None))
    assert (fault.line, fault.id) == (1, "5")
    tree["annotations"].pop()
    for indent in (None, 1):
        first, second = read(write(folder, tree, indent=indent))
        assert first.id == "661611" and first.media == (Image(folder / "000000000009.jpg"),)
        assert asked(first) == ("Describe the picture in one sentence.", "Closeup of bins of food.")
        assert second.meta["image_id"] == 9 and second.meta["kind"] == "caption"


def test_coco_instances_become_regions_without_crowds(folder: Path) -> None:
    picture(folder, "9.jpg")
    annotation = {"image_id": 9, "area": 1, "segmentation": []}
    tree = {
        "images": [{"id": 9, "file_name": "9.jpg", "height": 50, "width": 100}],
        "annotations": [
            {**annotation, "id": 1, "category_id": 90, "bbox": [10, 5, 50, 40], "iscrowd": 0},
            {**annotation, "id": 2, "category_id": 3, "bbox": [0, 0, 100, 50], "iscrowd": 1},
            {**annotation, "id": 3, "category_id": 3, "bbox": [99, 0, 1.2, 50], "iscrowd": 0},
            {**annotation, "id": 4, "category_id": 3, "bbox": [29.5, 38.3, 1.03, 0.0], "iscrowd": 0},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}],
    }
    (sample,) = read(write(folder, tree))
    assert boxes(sample) == [Box((0.1, 0.1, 0.6, 0.9), "toothbrush"), Box((0.99, 0.0, 1.0, 1.0), "car")]


def test_refcoco_needs_its_instances_and_is_never_unpickled(folder: Path) -> None:
    picture(folder, "COCO_train2014_000000000009.jpg")
    refs = [
        {
            "ref_id": 4,
            "ann_id": 77,
            "image_id": 9,
            "category_id": 1,
            "file_name": "COCO_train2014_000000000009_0.jpg",
            "split": "testA",
            "sent_ids": [1, 2],
            "sentences": [
                {"sent_id": 1, "raw": "The lady", "sent": "the lady", "tokens": ["the", "lady"]},
                {"sent_id": 2, "raw": "left", "sent": "left", "tokens": ["left"]},
            ],
        }
    ]
    instances = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 50, "width": 100}],
        "annotations": [{"id": 77, "image_id": 9, "category_id": 1, "bbox": [10, 5, 50, 40], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "person"}],
    }
    beside = write(folder, instances, "instances.json")
    path = write(folder, refs, "refs.json", None)
    first, second = read(path, beside=beside)
    assert asked(first)[0] == "Where is the lady?" and second.id == "4/2" and second.meta["split"] == "testA"
    assert boxes(first) == [Box((0.1, 0.1, 0.6, 0.9), "the lady")]
    with pytest.raises(ConfigError, match="instances.json"):
        read(path)


def test_vqav2_joins_questions_and_answers(folder: Path) -> None:
    picture(folder, "COCO_val2014_000000262148.jpg")
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = [
        {"answer": word, "answer_confidence": "yes", "answer_id": n}
        for n, word in enumerate(["down"] * 7 + ["table"] * 3)
    ]
    annotation = {
        "question_id": 262148000,
        "image_id": 262148,
        "question_type": "none of the above",
        "answer_type": "other",
        "multiple_choice_answer": "down",
        "answers": answers,
    }
    questions = {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "questions": [question],
    }
    beside = write(folder, {"info": {}, "annotations": [annotation]}, "annotations.json", None)
    (sample,) = read(write(folder, questions, indent=None), beside=beside)
    assert asked(sample) == ("Where is he looking? Answer in a word or two.", "down")
    assert sample.meta["answers"] == ["down"] * 7 + ["table"] * 3 and sample.id == "262148000"


def test_gqa(folder: Path) -> None:
    picture(folder, "2354786.jpg")
    entry = {
        "imageId": "2354786",
        "question": "Is the sky dark?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "isBalanced": True,
        "types": {"structural": "verify"},
    }
    (sample,) = read(write(folder, {"02930152": entry}))
    assert sample.id == "02930152" and asked(sample)[1] == "yes" and sample.meta["full_answer"] == "Yes, it is."


def test_textvqa_takes_the_commonest_answer(folder: Path) -> None:
    picture(folder, "003a8ae2ef43b901.jpg")
    entry = {
        "question": "what is the brand?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette"],
        "question_id": 34602,
        "answers": ["nous les gosses", "dakota", "dakota"],
        "set_name": "val",
    }
    (sample,) = read(write(folder, {"dataset_type": "val", "dataset_name": "textvqa", "data": [entry]}))
    assert asked(sample)[1] == "dakota" and sample.meta["kind"] == "reading"


def test_textcaps(folder: Path) -> None:
    picture(folder, "c9c1e0ed1bc7c8d5.jpg")
    entry = {
        "image_id": "c9c1e0ed1bc7c8d5",
        "image_path": "train/c9c1e0ed1bc7c8d5.jpg",
        "caption_str": "A sign says stop.",
        "reference_strs": ["A sign says stop.", "Stop."],
        "caption_id": 3,
        "image_classes": [],
        "set_name": "val",
    }
    (sample,) = read(write(folder, {"data": [entry]}))
    assert asked(sample)[1] == "A sign says stop." and sample.meta["references"][1] == "Stop."


def test_vsr(folder: Path) -> None:
    picture(folder, "000000085637.jpg")
    record = {
        "image": "000000085637.jpg",
        "image_link": "http://x",
        "caption": "The banana is left of the truck.",
        "label": 0,
        "relation": "left of",
        "annotator_id": 1,
        "vote_true_validator_id": [],
        "vote_false_validator_id": [1],
    }
    path = write(folder, record, "dev.jsonl", None)
    (sample,) = read(path)
    assert asked(sample)[1] == "No" and "left of the truck" in asked(sample)[0] and sample.meta["relation"] == "left of"
    (fault,) = formats.check(write(folder, {**record, "label": 2}, "dev.jsonl", None))
    assert "not 0 or 1" in fault.message


def test_visual_genome(folder: Path) -> None:
    picture(folder, "1.jpg")
    regions = [
        {"region_id": 1382, "width": 50, "height": 40, "image_id": 1, "phrase": "the clock is green", "y": 5, "x": 10}
    ]
    qas = [
        {
            "a_objects": [],
            "question": "What colour?",
            "image_id": 1,
            "qa_id": 986768,
            "answer": "Green.",
            "q_objects": [],
        }
    ]
    objects = [{"synsets": [], "h": 40, "object_id": 1058549, "names": ["clock"], "w": 50, "y": 5, "x": 10}]
    (region,) = read(write(folder, [{"id": 1, "regions": regions}]))
    assert boxes(region) == [Box((0.1, 0.1, 0.6, 0.9))] and region.turns[1].text == "the clock is green"
    (question,) = read(write(folder, [{"id": 1, "qas": qas}]))
    assert asked(question)[1] == "Green."
    (thing,) = read(write(folder, [{"image_id": 1, "objects": objects, "image_url": "x"}]))
    assert boxes(thing) == [Box((0.1, 0.1, 0.6, 0.9), "clock")]
    path = write(folder, [{"id": 1, "regions": [*regions, {"x": 1}, {**regions[0], "region_id": 2}]}])
    assert [fault.message for fault in formats.check(path)] == ["an item of regions is malformed"]


def test_scienceqa_with_and_without_a_picture(folder: Path) -> None:
    picture(folder, "train/1/image.png")
    entry = {
        "question": "Which state?",
        "choices": ["Maine", "Ohio"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "x",
        "skill": "y",
        "lecture": "",
        "solution": "z",
        "split": "train",
    }
    first, second = read(write(folder, {"1": entry, "2": {**entry, "image": None, "hint": ""}}))
    assert asked(first) == ("Look.\nWhich state?\nA. Maine\nB. Ohio\nAnswer with the letter of the right choice.", "B")
    assert first.media == (Image(folder / "train/1/image.png"),) and not second.media
    assert asked(second)[0].startswith("Which state?") and second.meta["choices"] == ["Maine", "Ohio"]


def test_ocr_vqa(folder: Path) -> None:
    picture(folder, "761183272.jpg")
    entry = {
        "imageURL": "http://x/51.jpg",
        "questions": ["Who wrote this?", "What is the title?"],
        "answers": ["Sandra", "Mom"],
        "title": "Mom",
        "authorName": "Sandra",
        "genre": "Calendars",
        "split": 1,
    }
    first, second = read(write(folder, {"761183272": entry}))
    assert asked(first)[1] == "Sandra" and second.id == "761183272/1" and second.meta["split"] == "train"
    (first, _) = read(write(folder, {"761183272": entry | {"imageURL": "http://x/51.gif"}}))
    assert first.media == (Image(folder / "761183272.jpg"),)  # as its downloader saves all of them


# ---------------------------------------------------------------------------------------------- captions, videos, CSV


def test_flickr_in_its_four_dresses(folder: Path) -> None:
    picture(folder, "1000092795.jpg")
    (folder / "results.token").write_text('1000092795.jpg#0\tTwo men , one "tall" .\n1000092795.jpg#1\tMen.\n')
    (folder / "results.csv").write_text("image_name| comment_number| comment\n1000092795.jpg| 0| Two men, one tall.\n")
    sentences = [
        {"tokens": ["two"], "raw": "Two men.", "imgid": 0, "sentid": 0},
        {"raw": "Men.", "imgid": 0, "sentid": 1},
    ]
    split = {
        "images": [
            {"sentids": [0, 1], "imgid": 0, "sentences": sentences, "split": "train", "filename": "1000092795.jpg"}
        ],
        "dataset": "flickr30k",
    }
    assert [asked(one)[1] for one in read(folder / "results.token")] == ['Two men , one "tall" .', "Men."]
    assert [asked(one)[1] for one in read(folder / "results.csv")] == ["Two men, one tall."]
    assert [asked(one)[1] for one in read(write(folder, split))] == ["Two men.", "Men."]
    split["images"][0]["filepath"] = "val2014"  # COCO's
    assert read(write(folder, split))[0].media == (Image(folder / "1000092795.jpg"),)
    picture(folder, "val2014/1000092795.jpg")
    assert read(write(folder, split))[0].media == (Image(folder / "val2014/1000092795.jpg"),)
    several = {"filename": "1000092795.jpg", "caption": ["Two men.", "Men."], "img_id": "0", "split": "train"}
    assert [one.id for one in read(write(folder, [{"id": "x", **several}]))] == ["x/0", "x/1"]


def test_answers_may_be_numbers_or_lists_and_pictures_lists_of_one(folder: Path) -> None:
    picture(folder, "a.png"), picture(folder, "b.png")
    records = [
        {"image": "a.png", "question": "How many?", "answer": 3},
        {"image": ["a.png"], "question": "How many?", "answer": ["3", "three", 3]},
        {"images": ["a.png", "b.png"], "question": "How many?", "answers": [{"answer": "3"}], "answer": None},
        {"images": ["a.png", "b.png"], "question": "How many in <image>, and in <image>?", "answer": "3"},
        {"image": ["a.png"], "caption": "A cat."},
    ]
    found = read(write(folder, records))
    assert [asked(sample)[1] for sample in found] == ["3"] * 4 + ["A cat."]
    assert found[1].meta["answers"] == ["3", "three", "3"]
    assert [[medium.source.name for medium in sample.media] for sample in found] == [  # type: ignore[union-attr]
        ["a.png"],
        ["a.png"],
        ["a.png", "b.png"],
        ["a.png", "b.png"],
        ["a.png"],
    ]
    assert isinstance(found[2].turns[0].parts[1], Image) and isinstance(found[3].turns[0].parts[0], Text)
    (fault,) = formats.check(write(folder, [{"image": ["a.png", "b.png"], "caption": "Cats."}]))
    assert "2 pictures of one caption" in fault.message


def test_csv_faults_have_their_line(folder: Path) -> None:
    picture(folder, "a.png")
    path = folder / "data.csv"
    path.write_text('image,question,answer\na.png,"Is it\nred?",no\na.png,What?\nb.png,What?,x\n')
    faults = formats.check(path)
    assert [(fault.line, fault.message.split(" in ")[0]) for fault in faults] == [
        (4, "2 cells under 3 names"),
        (5, "no picture b.png"),
    ]


def test_videos(folder: Path) -> None:
    (folder / "000001_000050").mkdir()
    for name in ("000001_000050/1066674784.mp4", "video1.mp4"):
        (folder / name).write_bytes(b"mp4")
    (folder / "webvid.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n1066674784,http://x,PT00H,000001_000050,A boat.\n"
    )
    (webvid,) = read(folder / "webvid.csv")
    assert webvid.media == (Video(folder / "000001_000050/1066674784.mp4"),) and asked(webvid)[1] == "A boat."
    vtt = {
        "info": {},
        "videos": [{"video_id": "video1", "split": "train", "url": "x"}],
        "sentences": [{"caption": "a car", "video_id": "video1", "sen_id": 7}],
    }
    (clip,) = read(write(folder, vtt))
    assert clip.media == (Video(folder / "video1.mp4"),) and clip.meta["split"] == "train"
    said = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A car."}]
    (chat,) = read(write(folder, [{"video": "video1.mp4", "conversations": said}]))
    assert chat.turns[0].parts == (Video(folder / "video1.mp4"), Text("\nWhat?"))


def test_folders_of_pictures(folder: Path) -> None:
    root = folder / "pool"
    picture(root, "red_fox/1.png"), picture(root, "wolf/2.png")
    (root / "wolf/2.txt").write_text("A grey wolf.")
    assert [asked(one)[1] for one in read(root)] == ["red fox", "A grey wolf."]
    picture(root, "lost.png")
    assert "nothing is said of lost.png" in formats.check(root)[0].message


# ---------------------------------------------------------------------------------------------- telling layouts apart


def test_a_named_format_is_insisted_on(folder: Path) -> None:
    path = write(folder, [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}])
    assert read(path, format="messages")
    (fault,) = formats.check(path, None, FileOptions(format="vsr"))
    assert "does not look like vsr" in fault.message
    (unknown,) = formats.check(write(folder, {"rows": [{"a": 1}], "b": {}}))
    assert "no known layout" in unknown.message


def test_damaged_tables_are_told_where(folder: Path) -> None:
    path = folder / "data.json"
    entry = '{"image_id": 1, "caption": "x", "id": 1}'
    images = '{"images": [{"id": 1, "file_name": "a.png"}]'
    path.write_text(f'{images},\n"annotations": [\n{entry},\n{entry[:14]} "caption"')
    assert (formats.check(path)[-1].line, "not JSON" in formats.check(path)[-1].message) == (4, True)
    path.write_text('{"images": [],\n"annotations": [{"image_id": 1, "caption": 3, "id": 1}]}')
    assert formats.check(path)


# ---------------------------------------------------------------------------------------------- wordings


def test_wordings_are_many_stable_and_partly_held_out(folder: Path) -> None:
    picture(folder, "a.png")
    path = write(folder, [{"id": str(n), "image": "a.png", "caption": "x"} for n in range(300)])
    many = [asked(one)[0] for one in read(path, instructions="many")]
    again = [asked(one)[0] for one in read(path, instructions="many")]
    held = {asked(one)[0] for one in read(path, instructions="held_out")}
    assert many == again and set(many) == set(instructions.wordings("caption", held_out=False))
    assert held == set(instructions.wordings("caption", held_out=True)) and not held & set(many)
    assert max(map(many.count, set(many))) < 300 * 0.2


@pytest.mark.parametrize("task", instructions.WORDINGS)
def test_every_task_has_distinct_wordings_that_put_every_field(task: str) -> None:
    known = instructions.WORDINGS[task]
    assert len(known) >= 7 and len(set(known)) == len(known)
    fields = [set(instructions.FIELD.findall(one)) for one in known]
    assert all(some == fields[0] for some in fields)


def test_braces_in_a_question_are_text(folder: Path) -> None:
    record = {"task": "question", "fields": {"question": "What is {choices} or {x}?"}, "answer": "y"}
    (sample,) = read(write(folder, [record]))
    assert asked(sample)[0] == "What is {choices} or {x}? Answer in a word or two."
    for broken, message in (
        ({**record, "fields": {}}, "question is missing"),
        ({**record, "task": "no"}, "unknown task"),
    ):
        assert message in formats.check(write(folder, [broken]))[0].message
