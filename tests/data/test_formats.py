"""Users' files: what is right is read exactly, and every fault is found with its line and id."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from isthmus.data import formats
from isthmus.data.records import Records
from isthmus.types import DataError, Image, Text, Turn


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Pillow.new("RGB", (2, 2)).save(folder / name)
    Pillow.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    return folder


def llava(question="<image>\nWhat?", answer="A fox.", **more):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "one", "image": "a.png", "conversations": said, **more}


def chat(*messages, **more):
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def told(*answers):
    """Messages of which some answers say whether they are to be learnt."""
    pairs = (({"role": "user", "content": "?"}, {"role": "assistant", "content": a, **how}) for a, how in answers)
    return {"messages": [message for pair in pairs for message in pair]}


def write(tmp_path, *records, lines=False):
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records), indent=2)
    path.write_text(text, encoding="utf-8")
    return path


def test_llava_json(tmp_path, images):
    several = llava("first <image> second <image>", images=["sub/b.png", "a.png"], id=7)
    del several["image"]
    silent = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    path = write(tmp_path, llava(), several, silent)
    one, two, three = formats.load(path, images)
    assert one.turns == (
        Turn("user", (Image(images / "a.png"), Text("\nWhat?"))),
        Turn.say("assistant", "A fox."),
    )
    assert one.id == "one" and one.meta["line"] == 2
    parts = Text("first "), Image(images / "sub/b.png"), Text(" second "), Image(images / "a.png")
    assert two.turns[0].parts == parts and two.id == "7"
    assert three.media == () and three.id.startswith("data:")


def test_messages_jsonl(tmp_path, images):
    buffer = BytesIO()
    Pillow.new("RGB", (1, 1)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "text", "text": "look "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "sub/b.png"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    path = write(
        tmp_path,
        chat(("system", "Be brief."), ("user", parts), ("assistant", "yes"), meta={"route": 2}),
        chat(("user", "<image>which?"), ("assistant", [{"type": "text", "text": "it"}]), images=["a.png"], id="x"),
        lines=True,
    )
    one, two = formats.load(path, images)
    assert [turn.role for turn in one.turns] == ["system", "user", "assistant"]
    sources = [medium.source for medium in one.media]
    assert sources == [images / "a.png", images / "sub/b.png", buffer.getvalue()]
    assert one.meta["route"] == 2 and two.meta["line"] == 2
    assert two.turns[0].parts == (Image(images / "a.png"), Text("which?"))


FAULTS = {
    "count low": (llava("What?"), "0 <image> in the text, 1 pictures", "once per picture"),
    "count high": (llava("<image><image>"), "2 <image> in the text, 1 pictures", "once per picture"),
    "missing file": (llava(image="no.png"), "no picture no.png", "check the path"),
    "absolute": (llava(image="/etc/passwd"), "outside the images folder", "below it"),
    "escape": (llava(image="sub/../../outside.png"), "outside the images folder", "below it"),
    "nul": (llava(image="a\0.png"), "no picture", "check the path"),
    "long": (llava(image="a" * 5000), "no picture", "check the path"),
    "network": (llava(image="https://example.org/a.png"), "lies on the network", "download"),
    "bad data url": (llava(image="data:image/png;base64,@@@"), "not base64", "data:image/png"),
    "empty answer": (llava(answer=" \n"), "an answer is empty", "write the answer"),
    "no answer": ({"conversations": [{"from": "human", "value": "hi"}]}, "no assistant turn", "add the answer"),
    "nobody": ({"conversations": []}, "no assistant turn", "add the answer"),
    "role": (chat(("tool", "x"), ("assistant", "y")), "unknown role 'tool'", "roles are"),
    "twice": (chat(("user", "x"), ("user", "y"), ("assistant", "z")), "turn 2 is user", "alternate"),
    "answer first": (chat(("assistant", "y")), "turn 1 is assistant", "alternate"),
    "late system": (chat(("user", "x"), ("system", "y"), ("assistant", "z")), "turn 2 is system", "system first"),
    "neither": ({"text": "hi"}, "neither conversations nor messages", "two forms"),
    "no object": ("hi", "not an object", "conversations"),
    "id": (llava(id=[1]), "id is neither", "text"),
    "value": (llava(answer=3), "not a text", "string"),
    "content": (chat(("user", 3)), "content is not a list", "array"),
    "no content": (chat(("user", "x"), ("assistant", None)), "content is missing", "leave the record out"),
    "part": (chat(("user", [{"type": "audio"}])), "unknown part 'audio'", "text, image"),
    "meta": (llava(meta=3), "meta is not", "meta"),
    "video": (chat(("user", "<video>What?"), ("assistant", "x")), "1 <video> in the text, 0 videos", "in videos"),
    "region": (chat(("user", "Where?"), ("assistant", "At <bbox>.")), "1 <bbox> in the text, 0 in", "once per bbox"),
    "sound": (chat(("user", "What?"), ("assistant", "x"), audios=["x.wav"]), "brings sound", "leave it out"),
    "sound's marker": (chat(("user", "<audio>What?"), ("assistant", "x")), "<audio> would be learnt", "sound"),
    "Qwen-VL's marker": (chat(("user", "<img>a.png</img>?"), ("assistant", "x")), "<img>a.png</img> would", "images"),
    "weight": ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "neither 0 nor 1", "weight 0 or 1"),
    "nothing learnt": (told(("no", {"weight": 0}), ("no", {"loss": False})), "no answer is learnt", "weight 1"),
    "two weights": (
        told(("no", {"weight": 1, "train": False}), ("y", {})),
        "weight and train of an answer",
        "keep one",
    ),
    "a picture beside words of weight 0": (
        told(([{"type": "text", "text": "x"}, {"type": "image", "image": "a.png"}], {"weight": 0})),
        "no answer is learnt",
        "weight 1",
    ),
    "two pictures of a part": (
        chat(("user", [{"type": "image", "image": "a.png", "path": "b.png"}]), ("assistant", "x")),
        "a part names its image as image and as path, which differ",
        "keep one",
    ),
    "order": (chat(("user", [{"type": "image", "index": 1}]), images=["a.png"]), "number 1 of images", "in order"),
    "slip": (chat(("user", "What?"), ("assistant", "x"), imgae="a.png"), "the key 'imgae' is not", "write 'image'"),
    "slip of a list": (chat(("user", "?"), ("assistant", "x"), IMAGES=["a.png"]), "no 'images'", "write 'images'"),
    "slip beside a caption": ({"image": "a.png", "text": "x", "converstions": []}, "'converstions'", "conversations"),
    "slip of settings": (llava(sytem="Be brief."), "the key 'sytem' is not read", "'system'"),
    "slip in a turn": (told(("no", {"wieght": 0}), ("yes", {})), "the key 'wieght' is not read", "'weight'"),
    "slip in a region": (
        chat(("user", "Where?"), ("assistant", [{"type": "box", "box": [1, 1, 2, 2], "untis": "x", "uint": "pixels"}])),
        "the key 'uint' is not read",
        "'unit'",
    ),
    "avoided": ({"prompt": "What?", "completion": "x", "label": False}, "to avoid", "leave it out"),
}


@pytest.mark.parametrize("record", [llava(image="a.png"), chat(("user", "What?"), ("assistant", "x"))])
def test_what_is_said_besides_may_have_any_name(record, tmp_path, images):
    """Keys of sets in use, and words that are near to those that are read."""
    told = dict.fromkeys(["model", "source", "dataset", "page", "stage", "usage", "img", "path", "url", "style"], "x")
    told |= dict.fromkeys(["width", "height", "score", "age", "system_id", "video_id", "image_id", "mate", "metal"], 1)
    told |= {"bbox": [1, 2], "image_1": "x", "image_source": "coco", "message": "ok", "tools": [], "metas": "x"}
    turn = {"name": "x", "refusal": "x", "tool_calls": [], "weights": "x", "loose": 1, "brain": "x", "markdown": "x"}
    turns = [one | turn for one in record.get("messages", record.get("conversations"))]
    changed = record | told | {next(key for key in ("messages", "conversations") if key in record): turns}
    path = write(tmp_path, record, changed)
    one, two = formats.load(path, images)
    assert one.turns == two.turns


def test_one_of_two_names_is_enough(tmp_path, images):
    """Who names a picture well may say more of pictures in words of their own."""
    path = write(tmp_path, llava(image1="x", Images=["x"], conversation=[]))
    assert len(formats.load(path, images)[0].media) == 1


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("lines", [False, True])
def test_every_fault_has_its_line_id_and_remedy(name, lines, tmp_path, images):
    record, message, remedy = FAULTS[name]
    path = write(tmp_path, llava(), record, llava(), lines=lines)
    (fault,) = formats.check(path, images)
    text = path.read_text().split("\n")
    assert fault.line == (2 if lines else text.index("  },") + 2)  # where the first record's closing brace is passed
    assert message in fault.message and remedy in fault.remedy
    if isinstance(record, dict) and isinstance(record.get("id"), str):
        assert fault.id == record["id"]
    with pytest.raises(DataError) as caught:
        formats.load(path, images)
    assert f"line {fault.line}" in caught.value.cause and message in caught.value.cause
    assert remedy in caught.value.remedy


def test_check_collects_all_and_load_names_the_first_few(tmp_path, images):
    path = write(tmp_path, *[llava("What?", id=f"r{number}") for number in range(10)], lines=True)
    assert [fault.id for fault in formats.check(path, images)] == [f"r{number}" for number in range(10)]
    with pytest.raises(DataError, match=r"r0.*r1.*r2.*10 faults in all") as caught:
        formats.load(path, images)
    assert "r3" not in caught.value.cause


def test_without_an_images_folder_paths_start_from_the_file(tmp_path, images):
    path = write(tmp_path, llava(image="images/a.png"), llava(image=str(tmp_path / "outside.png")))
    first, second = formats.load(path, None)
    assert first.media == (Image(tmp_path / "images/a.png"),)
    assert second.media == (Image(tmp_path / "outside.png"),)


def test_broken_files(tmp_path):
    path = tmp_path / "data.json"
    cases = {
        b'{"messages": []}\n\xff\xfe': (2, "not UTF-8"),
        b'[\n{"id": "a"},\n{"id" "b"}]': (3, "not JSON"),
        b'[\n{"id": "a"}\n{"id": "b"}]': (3, "no comma"),
        b'[\n{"id": "a"},\n': (3, "not JSON"),
        b'[\n{"id": "a"}': (2, "no comma"),
        b'{"id": "a"}\n{"id": ': (2, "not JSON"),
        b"[" * 100_000: (1, "not JSON"),
        b'{"id": ' + b"9" * 5000 + b"}": (1, "not JSON"),
    }
    for raw, (line, message) in cases.items():
        path.write_bytes(raw)
        last = formats.check(path, None)[-1]
        assert (last.line, message in last.message) == (line, True), (raw[:40], last)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no conversation"):
        formats.load(path, None)
    with pytest.raises(DataError, match="cannot be read"):
        formats.check(tmp_path / "missing.json", None)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_stands_behind_an_array_is_not_passed_over(tmp_path, monkeypatch, indent, mark):
    """Two files that `cat` made one; Python's own reader says so as well."""
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    parts = [mark + json.dumps([chat(("user", "a"), ("assistant", "b"), id=name)], indent=indent) for name in "xy"]
    path = tmp_path / "all.json"
    path.write_text(parts[0] + "\r\n\t \n")
    assert [sample.id for sample in formats.load(path)] == ["x"]
    assert len(Records(formats.Form(path))) == 1  # and keeps its index
    path.write_text("\n".join(parts) + "\n")
    with pytest.raises(json.JSONDecodeError, match="Extra data") as reference:
        json.loads(path.read_text().removeprefix(mark))
    (fault,) = formats.check(path)
    assert "behind the closing bracket" in fault.message and fault.line == reference.value.lineno
    for read in (formats.load, lambda path: Records(formats.Form(path))):
        with pytest.raises(DataError, match="behind the closing bracket"):
            read(path)


def test_what_stands_behind_tables_is_not_passed_over(tmp_path):
    notes = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 5, "image_id": 1, "caption": "x"}]}
    Pillow.new("RGB", (2, 2)).save(tmp_path / "a.png")
    path, text = tmp_path / "captions.json", json.dumps(notes, indent=1)
    path.write_text(text + "\n\n")
    assert [sample.id for sample in formats.load(path)] == ["5"]
    path.write_text(text + "\n" + text)
    (fault,) = formats.check(path)
    assert "behind the closing bracket" in fault.message and fault.line == text.count("\n") + 2


def test_a_byte_order_mark_and_odd_line_separators_are_fine(tmp_path):
    path = tmp_path / "data.jsonl"
    record = json.dumps(chat(("user", "a\u2028b"), ("assistant", "c")), ensure_ascii=False)
    path.write_text("\ufeff" + record + "\r\n\r\n" + record + "\r\n", encoding="utf-8")
    assert [sample.meta["line"] for sample in formats.load(path, None)] == [1, 3]


def test_answers_of_weight_0_are_read_and_not_learnt(tmp_path):
    record = told(
        ("a", {"weight": 0}),
        ("b", {"weight": 1}),
        ("c", {"loss": False}),
        ("d", {"loss": True}),
        ("e", {"train": False}),
        ("f", {}),
    )
    (sample,) = formats.load(write(tmp_path, record))
    assert [turn.parts for turn in sample.turns[1::2]] == [
        (Text("a", given=True),),
        (Text("b"),),
        (Text("c", given=True),),
        (Text("d"),),
        (Text("e", given=True),),
        (Text("f"),),
    ]


def test_a_part_of_content_stands_for_the_next_picture_or_brings_its_own(tmp_path, images):
    ask = {"type": "text", "text": "What?", "index": None}
    bare = [
        chat(("user", [part, ask]), ("assistant", "x"), images=["a.png"])
        for part in ({"type": "image"}, {"type": "image", "index": 0, "text": None}, {"type": "image", "image": None})
    ]
    url = (images / "a.png").resolve().as_uri()
    own = [
        chat(("user", [{"type": "image", key: name}, ask]), ("assistant", "x"))
        for key, name in (("url", "images/a.png"), ("path", "images/a.png"), ("image", url))
    ]
    twice = {"type": "image", "image": "images/a.png", "path": "images/a.png", "url": None}
    own.insert(0, chat(("user", [twice, ask]), ("assistant", "x")))
    turns = (Turn("user", (Image(images / "a.png"), Text("What?"))), Turn.say("assistant", "x"))
    for records, folder in ((bare, images), (own, None)):
        for sample in formats.load(write(tmp_path, *records), folder):
            assert sample.turns == turns
    assert "outside" in formats.check(write(tmp_path, own[-1]), images)[0].message


def test_trl_s_prompts_with_completions_and_preferences(tmp_path, images):
    ask, good, bad = {"role": "user", "content": "What?"}, *({"role": "assistant", "content": c} for c in ("a", "b"))
    path = write(
        tmp_path,
        {"prompt": [ask], "completion": [good], "images": ["a.png"]},
        {"prompt": "What?", "chosen": "a", "rejected": "b", "images": ["a.png"]},
        {"chosen": [ask, good], "rejected": [ask, bad], "images": ["a.png"], "score": None},
    )
    turns = (Turn("user", (Image(images / "a.png"), Text("What?"))), Turn.say("assistant", "a"))
    samples = formats.load(path, images)
    assert [sample.turns for sample in samples] == [turns] * 3
    assert [sample.pair for sample in samples] == [None, *[(Turn.say("assistant", "b"),)] * 2]
    (said,) = formats.load(
        write(tmp_path, {"messages": [ask, good], "images": ["a.png"]}), images, formats.FileOptions(format="trl")
    )
    assert said.turns == turns


def test_of_answers_in_a_trl_prompt_nothing_is_learnt(tmp_path):
    ask, early, good = {"role": "user", "content": "What?"}, *({"role": "assistant", "content": c} for c in ("a", "b"))
    prompt = [ask, early, ask]
    path = write(tmp_path, {"prompt": prompt, "completion": [good]}, {"prompt": prompt, "chosen": "b", "rejected": "c"})
    asked = Turn.say("user", "What?")
    for sample in formats.load(path):
        assert sample.turns == (asked, Turn("assistant", (Text("a", given=True),)), asked, Turn.say("assistant", "b"))


def test_pictures_that_no_marker_places_stand_first_where_that_is_asked_for(tmp_path, images):
    unmarked, marked = llava("What?"), llava("What is <image>?")
    (fault,) = formats.check(write(tmp_path, unmarked, marked), images)
    assert "prepend: true" in fault.remedy
    first, second = formats.load(write(tmp_path, unmarked, marked), images, formats.FileOptions(prepend=True))
    assert first.turns[0].parts == (Image(images / "a.png"), Text("What?"))
    assert second.turns[0].parts == (Text("What is "), Image(images / "a.png"), Text("?"))


def test_null_and_empty_are_as_good_as_not_there(tmp_path, images):
    messages = chat(("user", "<image>Where is <bbox>?"), ("assistant", "x"))["messages"]
    region = {"bbox": [[0, 0, 2, 1]]}
    plain = {"id": "one", "messages": messages, "image": "a.png", "objects": region}
    nulls = {"conversations": None, "meta": None, "videos": None, "images": [], "audios": []}
    odd = plain | nulls | {"objects": region | {"ref": None, "bbox_type": None, "image_id": None}}
    first, second = formats.load(write(tmp_path, plain, odd), images)
    assert first.turns == second.turns and second.id == "one"
    silent = {"id": None, "image": "", **chat(("user", "x"), ("assistant", "y"))}
    (silent,) = formats.load(write(tmp_path, silent), images)
    assert silent.id.startswith("data:") and not silent.media


def test_turns_in_memory():
    picture = Pillow.new("RGB", (1, 1))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "an <image> is text here"}]
    (turn,) = formats.turns([{"role": "user", "content": content}])
    assert turn == Turn("user", (Image(picture), Text("an <image> is text here")))
    with pytest.raises(DataError, match="holds no picture"):
        formats.turns([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(DataError, match="unknown role"):
        formats.turns([{"role": "tool", "content": "x"}])


JUNK = st.sampled_from([None, True, 0, -1.5, "", "user", "<image>", "a\0", [], [[]], [None], {}, {"type": "text"}])


@st.composite
def damaged(draw):
    """A good record in which one value somewhere has become something else, or has gone."""
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    good = draw(st.sampled_from([llava(), chat(("user", parts), ("assistant", "y"), images=[], id="x")]))
    root = {"record": json.loads(json.dumps(good))}
    holder, key = root, "record"
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    if draw(st.booleans()):
        holder[key] = draw(JUNK)
    else:
        del holder[key]
    return root.get("record", {})


@given(st.lists(damaged(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_escapes_as_a_traceback(tmp_path, records):
    path = write(tmp_path, *records)
    faults = formats.check(path, tmp_path)
    assert all(fault.message and fault.remedy for fault in faults)
    if not faults:
        assert len(formats.load(path, tmp_path)) == len(records)


def test_records_without_an_id_have_names_of_their_own_on_a_single_line_too(tmp_path):
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "line.json").write_text(json.dumps([{"conversations": said}] * 3))
    path = write(tmp_path, *[{"conversations": said}] * 3, lines=True)
    assert len({sample.id for sample in formats.load(tmp_path / "line.json")}) == 3
    assert [sample.id for sample in formats.load(path)] == ["data:1", "data:2", "data:3"]
