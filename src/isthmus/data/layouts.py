"""Layouts of single records: each is rewritten as `conversations`, `messages` or a task (see `instructions`).

Which layout a record has is told from its keys. A record may hold several samples, such as the questions about one
picture; what is wrong with one of them is yielded in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from isthmus.data import answers, choices, slips
from isthmus.data.attached import Unit, corners
from isthmus.data.faults import Wrong
from isthmus.data.layout import PICTURE, Found, Layout, Raw, has, listed, task, text

Name: TypeAlias = Literal[
    "llava",
    "sharegpt",
    "messages",
    "ms-swift",
    "trl",
    "task",
    "texts",
    "mmc4",
    "obelics",
    "vsr",
    "visual-genome",
    "webvid",
    "mmbench",
    "mmmu",
    "seed-rows",
    "choices",
    "caption",
    "chartqa",
    "question",
    "pope",
    "coco-captions",
    "coco-instances",
    "flickr",
    "vqav2",
    "gqa",
    "textvqa",
    "docvqa",
    "textcaps",
    "refcoco",
    "scienceqa",
    "seed-bench",
    "ocr-vqa",
    "msr-vtt",
]
"""What `options: {format: …}` may name; the later ones are `tables`."""


def of(record: Any, name: Name | None) -> Layout:
    """The layout of a record.

    Raises:
        Wrong: it looks like none, or not like the one that is named, or one of its keys is misspelt.
    """
    if not isinstance(record, Mapping):
        raise Wrong("the record is not an object", 'write {"conversations": …} or {"messages": …}')
    slips.refuse(record, slips.RECORD)
    slips.refuse_two(record)
    if name in LAYOUTS:
        layout = LAYOUTS[name]
        if not layout.fits(record):
            raise Wrong(f"the record does not look like {name}", "correct it, or leave `format` away to have it told")
        return layout
    for layout in LAYOUTS.values():
        if layout.fits(record):
            return layout
    keys = ", ".join(map(str, list(record)[:8]))
    raise Wrong(
        f"the record has neither conversations nor messages, nor another known layout's keys (it has {keys})",
        "see the two forms in the documentation, and the layouts beside them",
    )


def known(record: Raw) -> bool:
    """Whether a layout's keys are there."""
    return any(layout.fits(record) for layout in LAYOUTS.values())


def is_record(value: Raw) -> bool:
    """Whether an object that fills a file is a sample rather than tables of samples."""
    return known(value) or not any(isinstance(member, dict) or _is_table(member) for member in value.values())


def _is_table(member: Any) -> bool:
    return isinstance(member, list) and bool(member) and isinstance(member[0], dict)


# ---------------------------------------------------------------------------------------------- conversations


def _as_it_is(record: Raw, name: str) -> Found:
    yield dict(record)


def _texts(record: Raw, name: str) -> Found:
    """`{images, texts: [{user, assistant}]}`: the pictures stand before the first question."""
    pictures = [{"type": "image", "image": picture} for picture in listed(record.get("images") or [], "images")]
    messages: list[dict[str, Any]] = []
    for said in listed(record["texts"], "texts"):
        if not isinstance(said, Mapping):
            raise Wrong("an item of texts is not an object", 'write {"user": "…", "assistant": "…"}')
        asked = {"type": "text", "text": text(said, "user")}
        messages.append({"role": "user", "content": [*(pictures if not messages else []), asked]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text(said, "assistant")}]})
    yield {"id": record.get("id", name), "messages": messages}


def _trl(record: Raw, name: str) -> Found:
    """TRL's `prompt` with `completion`, or with `chosen` and `rejected`, which may hold the prompt; or `messages`."""
    if "messages" in record:
        yield dict(record)
        return
    if record.get("label") is False:
        raise Wrong("the completion is labelled as one to avoid", "leave it out")
    asked = _messages(record.get("prompt", []), "user")
    prompt = [{**said, "weight": 0} if isinstance(said, Mapping) else said for said in asked]  # TRL learns none of it
    told = _messages(record["completion" if "completion" in record else "chosen"], "assistant")
    other = _messages(record["rejected"], "assistant") if "rejected" in record else []
    shared = next((place for place, (one, two) in enumerate(zip(told, other)) if one != two), 0)
    made = {"id": name, **record, "messages": [*prompt, *told]}
    yield made | ({"rejected": other[shared:]} if other else {})


def _messages(given: Any, role: str) -> Sequence[Any]:
    """Messages, also where one is written as its text alone."""
    return [{"role": role, "content": given}] if isinstance(given, str) else listed(given, f"what the {role} says")


def _is_trl(record: Raw) -> bool:
    return any(has(*keys)(record) for keys in (("prompt", "completion"), ("chosen", "rejected"), ("messages",)))


# ---------------------------------------------------------------------------------------------- documents


def _mmc4(record: Raw, name: str) -> Found:
    """MMC4: `text_list`, and `image_info` with the text that each picture goes with (Zhu et al., arXiv 2304.06939)."""
    texts = [str(one) for one in listed(record["text_list"], "text_list")]
    before: dict[int, list[Any]] = {}
    for info in listed(record["image_info"], "image_info"):
        place = info.get("matched_text_index") if isinstance(info, Mapping) else None
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise Wrong("a matched_text_index of image_info is not the number of a text", "match the picture again")
        before.setdefault(place, []).append(info.get("image_name"))
    items: list[str | dict[str, Any]] = []
    for place, one in enumerate(texts):
        items += [*map(_picture, before.get(place, ())), one]
    yield _document(items, str(record.get("id", name)))


def _obelics(record: Raw, name: str) -> Found:
    """OBELICS: `images` and `texts` side by side, one of the two None (Laurençon et al., arXiv 2306.16527)."""
    pictures, texts = listed(record["images"], "images"), listed(record["texts"], "texts")
    if len(pictures) != len(texts) or any((one is None) == (other is None) for one, other in zip(pictures, texts)):
        raise Wrong(
            "images and texts are not side by side", "at each place, one of the two is null and the other is not"
        )
    items = [words if words is not None else _picture(picture) for picture, words in zip(pictures, texts)]
    yield _document(items, str(record.get("id", name)))


def _picture(given: Any) -> dict[str, Any]:
    return {"type": "image", "image": given}


def _document(items: Sequence[str | dict[str, Any]], name: str) -> dict[str, Any]:
    """A page as a conversation: the user shows pictures, the assistant says what follows (see `documents`)."""
    runs: list[tuple[str, list[Any]]] = []
    for item in items:
        role = "assistant" if isinstance(item, str) else "user"
        if runs and runs[-1][0] == role:
            runs[-1][1].append(item)
        else:
            runs.append((role, [item]))
    if runs and runs[0][0] == "assistant":
        runs.insert(0, ("user", []))
    if runs and runs[-1][0] == "user":
        runs.pop()  # pictures that nothing is said of
    messages = [
        {"role": role, "content": said if role == "user" else [{"type": "text", "text": " ".join(said)}]}
        for role, said in runs
    ]
    return {"id": name, "messages": messages, "meta": {"kind": "document"}}


# ---------------------------------------------------------------------------------------------- tasks


def _vsr(record: Raw, name: str) -> Found:
    """VSR: is the relation that a caption states true? (Liu et al., arXiv 2205.00363)"""
    if record["label"] not in (0, 1):
        raise Wrong(f"label is {str(record['label'])[:20]}, not 0 or 1", "write 1 where the caption is true, else 0")
    answer = "Yes" if record["label"] else "No"
    meta = {"relation": record.get("relation"), "label": record["label"]}
    yield task("statement", name, answer, statement=text(record, "caption"), image=record["image"], meta=meta)


def _visual_genome(record: Raw, name: str) -> Found:
    """Visual Genome: the regions, questions or objects of one picture (Krishna et al., arXiv 1602.07332)."""
    first = next((item for key in VG for item in record.get(key) or [] if isinstance(item, Mapping)), {})
    number = text({**first, **record}, "image_id", "id")
    for key, read in VG.items():
        for item in listed(record.get(key) or [], key):
            try:
                yield read(item, f"{number}.jpg", number)
            except (Wrong, KeyError, TypeError, AttributeError) as error:
                yield error if isinstance(error, Wrong) else Wrong(f"an item of {key} is malformed", "compare it")


def _vg_region(item: Raw, image: str, number: str) -> dict[str, Any]:
    name = f"{number}/region/{item['region_id']}"
    return task("region", name, text(item, "phrase"), region=_region(_xywh(item)), image=image)


def _vg_question(item: Raw, image: str, number: str) -> dict[str, Any]:
    name = f"{number}/question/{item['qa_id']}"
    return task("question", name, text(item, "answer"), question=text(item, "question"), image=image)


def _vg_object(item: Raw, image: str, number: str) -> dict[str, Any]:
    phrase = str(item["names"][0])
    answer = [_region(_xywh(item), phrase)]
    return task("refer", f"{number}/object/{item['object_id']}", answer, phrase=phrase, image=image)


VG: dict[str, Callable[[Raw, str, str], dict[str, Any]]] = {
    "regions": _vg_region,
    "qas": _vg_question,
    "objects": _vg_object,
}


def _xywh(item: Raw) -> tuple[float, ...]:
    width, height = (item[key] for key in (("width", "height") if "width" in item else ("w", "h")))
    x, y, width, height = corners((item["x"], item["y"], width, height))
    return x, y, x + width, y + height


def _region(xyxy: Sequence[float], label: str = "", unit: Unit = "pixels") -> dict[str, Any]:
    return {"type": "box", "box": list(xyxy), "label": label, "unit": unit}


def _webvid(record: Raw, name: str) -> Found:
    """WebVid's table: `videoid`, `page_dir` and the caption `name` (Bain et al., arXiv 2104.00650)."""
    folder = record.get("page_dir") or ""
    path = f"{folder}/{record['videoid']}.mp4".lstrip("/")
    yield task("video", str(record["videoid"]), text(record, "name"), video=path)


def _caption(record: Raw, name: str) -> Found:
    """A picture or video and one caption or several, each of them a sample."""
    key, given = next((key, record[key]) for key in ("video", *PICTURE) if record.get(key))
    pictures = given if isinstance(given, list) else [given]
    if len(pictures) > 1:
        raise Wrong(f"{len(pictures)} pictures of one caption", "write messages, with <image> where each belongs")
    shown = {"video" if key == "video" else "image": pictures[0]}
    given = next(record[key] for key in CAPTIONS if key in record)
    captions = given if isinstance(given, list | tuple) else [given]
    for number, caption in enumerate(captions):
        own = f"{name}/{number}" if len(captions) > 1 else name
        if not isinstance(caption, str):
            yield Wrong("a caption is not a text", "write a text, or a list of them")
        else:
            yield task("video" if "video" in shown else "caption", own, caption.strip(), **shown)


CAPTIONS = ("caption", "captions", "text", "txt", "TEXT")


def _is_caption(record: Raw) -> bool:
    return any(key in record for key in CAPTIONS) and any(record.get(key) for key in ("video", *PICTURE))


def _texts_are(kind: type) -> Callable[[Raw], bool]:
    def fits(record: Raw) -> bool:
        texts = record.get("texts")
        return isinstance(texts, list) and "images" in record and any(isinstance(one, kind) for one in texts)

    return fits


_CONVERSATIONS = Layout(has("conversations"), _as_it_is)
_MESSAGES = Layout(has("messages"), _as_it_is, "pixels")
LAYOUTS: dict[str, Layout] = {
    "llava": _CONVERSATIONS,
    "sharegpt": _CONVERSATIONS,
    "messages": _MESSAGES,
    "ms-swift": _MESSAGES,
    "trl": Layout(_is_trl, _trl, "pixels", prepend=True),
    **choices.LAYOUTS,
    "task": Layout(has("task", "answer"), _as_it_is),
    "texts": Layout(_texts_are(dict), _texts),
    "mmc4": Layout(has("text_list", "image_info"), _mmc4),
    "obelics": Layout(_texts_are(str), _obelics),
    "vsr": Layout(has("image", "caption", "label", "relation"), _vsr),
    "visual-genome": Layout(
        lambda record: any(isinstance(record.get(key), list) for key in VG), _visual_genome, "pixels"
    ),
    "webvid": Layout(has("videoid", "name"), _webvid),
    **answers.LAYOUTS,
    "caption": Layout(_is_caption, _caption),
}
"""By name; the first that fits a record reads it."""
