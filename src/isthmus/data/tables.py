"""Layouts whose samples are joined from the tables of one or two JSON files; each becomes a list of tasks with lines.

The field lists follow the files that their authors publish. RefCOCO's references come as a pickle; that is code, not
data, and is not read: write it as JSON once, where you trust it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from isthmus.data import choices
from isthmus.data.answers import commonest, worded
from isthmus.data.attached import shares
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Cell
from isthmus.data.layout import task, text
from isthmus.data.layouts import Name

Tables: TypeAlias = dict[str, Cell]
"""A file's members by key; the items of an array by their number."""
Row: TypeAlias = tuple[int, dict[str, Any] | Wrong]
"""A line and the task that starts there."""

NAMES = ("id", "question_id", "questionId", "caption_id", "sen_id", "ref_id", "imgid")
"""Under what entries have their ids."""
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)
"""What reading an entry raises that is not what it seemed."""
SPLIT = ("split", "data_split", "data_type")
"""Under what entries say their publisher's split."""
SPLITS = {1: "train", 2: "val", 3: "test"}
"""OCR-VQA's."""
SCAN = ("image", "image_local_name", "file_path")
"""Where DocVQA, InfographicVQA and ST-VQA name a question's picture."""


@dataclass(frozen=True)
class Table:
    """How a kind of tables is recognised and joined.

    Args:
        fits: whether the members look like it; it is given some item of each member that is an array.
        rows: the tasks; the second argument are the tables of the file beside.
        beside: what the second file is, where there must be one.
    """

    fits: Callable[[Mapping[str, Any]], bool]
    rows: Callable[[Tables, Tables], Iterator[Row]]
    beside: str = ""


def of(root: Tables, name: Name | None) -> Table | None:
    """The layout of a file's tables; None where it looks like none."""
    first = {key: _sample(cell.value) for key, cell in root.items()}
    if name in TABLES:
        return TABLES[name]
    return next((table for table in TABLES.values() if table.fits(first)), None)


def guarded(rows: Iterator[Row], line: int) -> Iterator[Row]:
    """The same rows, and as the last one what is wrong with tables that are not what they seemed."""
    try:
        yield from rows
    except MALFORMED as error:
        cause = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else "something has another type"
        yield line, Wrong(f"the tables are malformed ({cause})", "compare the file with the publisher's")


def _each(cells: Sequence[Cell], make: Callable[[Any, Cell], dict[str, Any]]) -> Iterator[Row]:
    """A task per cell, or what is wrong with that one."""
    for number, cell in enumerate(cells):
        try:
            yield cell.line, make(_sound(cell), cell)
        except (Wrong, *MALFORMED) as error:
            yield cell.line, _malformed(error, cell, number)


def _spread(cells: Iterable[Cell], parts: Callable[[Any], Iterable[dict[str, Any]]]) -> list[Cell]:
    """A cell for each part of every entry, with the entry's own keys; of one that is malformed, what is wrong."""
    spread: list[Cell] = []
    for number, cell in enumerate(cells):
        try:
            entry = _sound(cell)
            spread += [Cell(cell.line, {**entry, **part}, cell.key) for part in parts(entry)]
        except (Wrong, *MALFORMED) as error:
            wrong = _malformed(error, cell, number)
            spread.append(Cell(cell.line, wrong, wrong.id))
    return spread


def _sound(cell: Cell) -> Any:
    if isinstance(cell.value, Wrong):
        raise cell.value
    return cell.value


def _malformed(error: Exception, cell: Cell, number: int) -> Wrong:
    """What is wrong with an entry, under its name and of its split."""
    entry = cell.value if isinstance(cell.value, Mapping) else {}
    name = next((str(entry[key]) for key in NAMES if key in entry), cell.key or f"entry {number}")
    said = next((entry[key] for key in SPLIT if isinstance(entry.get(key), str | int)), None)
    split = SPLITS.get(said) if isinstance(said, int) else said
    if isinstance(error, Wrong):
        return Wrong(error.message, error.remedy, name, split=error.split or split)
    cause = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else "something has another type"
    return Wrong(f"the entry is malformed ({cause})", "compare it with its neighbours", name, split=split)


def _sample(value: Any) -> Any:
    if isinstance(value, list):
        value = next((cell.value for cell in value if isinstance(cell.value, Mapping)), None)
    return value if isinstance(value, Mapping) else {}


def _items(tables: Tables, key: str) -> list[Cell]:
    value = tables[key].value
    if not isinstance(value, list):
        raise KeyError(key)
    return value


def _by(cells: Sequence[Cell], key: str) -> dict[Any, Any]:
    return {cell.value[key]: cell.value for cell in cells if isinstance(cell.value, Mapping)}


def _known(found: Mapping[Any, Any], key: Any, what: str) -> Any:
    if key not in found:
        raise Wrong(f"no {what} has the id {key}", f"add it to the {what}s, or remove the entry")
    return found[key]


# ---------------------------------------------------------------------------------------------- COCO, Flickr, RefCOCO


def _coco_captions(tables: Tables, beside: Tables) -> Iterator[Row]:
    images = _by(_items(tables, "images"), "id")

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image = _known(images, entry["image_id"], "image")
        meta = {"image_id": entry["image_id"]}
        return task("caption", str(entry["id"]), text(entry, "caption").strip(), image=image["file_name"], meta=meta)

    return _each(_items(tables, "annotations"), make)


def _coco_instances(tables: Tables, beside: Tables) -> Iterator[Row]:
    """All objects of a picture in one answer, in the order of the file, but for crowds and those without an area."""
    images, names = _by(_items(tables, "images"), "id"), _by(_items(tables, "categories"), "id")
    found: dict[Any, list[Cell]] = {}
    for cell in _items(tables, "annotations"):
        number = cell.value.get("image_id") if isinstance(cell.value, Mapping) else None
        found.setdefault(number if number in images else None, []).append(cell)

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image = _known(images, entry.get("image_id"), "image")
        boxes = [
            _region(one.value, image, text(_known(names, one.value["category_id"], "category"), "name"))
            for one in found[image["id"]]
            if _is_object(one.value)
        ]
        between = {"type": "text", "text": ", "}
        answer = [part for box in boxes for part in (between, box)][1:]
        return task("detect", str(image["id"]), answer, image=image["file_name"])

    lost = _each(found.pop(None, []), make)
    full = [cells[0] for cells in found.values() if any(_is_object(cell.value) for cell in cells)]
    return (row for rows in (_each(full, make), lost) for row in rows)


def _is_object(entry: Any) -> bool:
    box = entry.get("bbox")
    return not entry.get("iscrowd") and not (isinstance(box, list) and 0 in box[2:])


def _refcoco(tables: Tables, beside: Tables) -> Iterator[Row]:
    """References, and the instances that they refer to in the file beside; one sample per sentence."""
    images, regions = _by(_items(beside, "images"), "id"), _by(_items(beside, "annotations"), "id")

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image = _known(images, entry["image_id"], "image")
        region, phrase = _known(regions, entry["ann_id"], "annotation"), text(entry["sentence"], "sent", "raw")
        meta = {"split": entry.get("split"), "ref_id": entry["ref_id"]}
        name = f"{entry['ref_id']}/{entry['sentence']['sent_id']}"
        answer = [_region(region, image, phrase)]
        return task("refer", name, answer, phrase=phrase, image=image["file_name"], meta=meta)

    return _each(_spread(tables.values(), _sentences), make)


def _flickr(tables: Tables, beside: Tables) -> Iterator[Row]:
    """Karpathy's file of splits: pictures with their sentences."""

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        name = f"{entry['imgid']}/{entry['sentence']['sentid']}"
        meta = {"split": entry.get("split")}
        names = [f"{entry['filepath']}/{entry['filename']}"] if entry.get("filepath") else []
        image = {"paths": [*names, entry["filename"]]}
        return task("caption", name, text(entry["sentence"], "raw").strip(), image=image, meta=meta)

    return _each(_spread(_items(tables, "images"), _sentences), make)


def _sentences(entry: Any) -> Iterator[dict[str, Any]]:
    return ({"sentence": sentence} for sentence in entry["sentences"])


def _region(entry: Any, image: Any, label: str) -> dict[str, Any]:
    x, y, width, height = entry["bbox"]
    xyxy = shares((x, y, x + width, y + height), image["width"], image["height"])
    return {"type": "box", "box": list(xyxy), "label": label, "unit": "shares"}


# ---------------------------------------------------------------------------------------------- questions


def _vqav2(tables: Tables, beside: Tables) -> Iterator[Row]:
    """Questions, and the annotations in the file beside; pictures are named as COCO's archives name them."""
    answers = _by(_items(beside, "annotations"), "question_id")
    subtype = tables["data_subtype"].value if "data_subtype" in tables else "val2014"

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        found = _known(answers, entry["question_id"], "annotation")
        meta = {
            "answers": [one["answer"] for one in found["answers"]],
            "question_type": found.get("question_type"),
            "answer_type": found.get("answer_type"),
        }
        image = f"COCO_{subtype}_{entry['image_id']:012d}.jpg"
        answer, question = text(found, "multiple_choice_answer"), text(entry, "question")
        return task("question", str(entry["question_id"]), answer, question=question, image=image, meta=meta)

    return _each(_items(tables, "questions"), make)


def _gqa(tables: Tables, beside: Tables) -> Iterator[Row]:
    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        meta = {"full_answer": entry.get("fullAnswer"), "types": entry.get("types")}
        image, answer = f"{entry['imageId']}.jpg", text(entry, "answer")
        return task("question", cell.key, answer, question=text(entry, "question"), image=image, meta=meta)

    return _each(list(tables.values()), make)


def _textvqa(tables: Tables, beside: Tables) -> Iterator[Row]:
    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image, answer = f"{entry['image_id']}.jpg", commonest(entry.get("answers"))
        meta = {"answers": entry["answers"]}
        name = str(entry["question_id"])
        return task("reading", name, answer, question=text(entry, "question"), image=image, meta=meta)

    return _each(_items(tables, "data"), make)


def _docvqa(tables: Tables, beside: Tables) -> Iterator[Row]:
    """The files of the Robust Reading Competition: DocVQA (Mathew et al., arXiv 2007.00398), InfographicVQA (Mathew et
    al., arXiv 2104.12756), ST-VQA (Biten et al., arXiv 1905.13648); their test splits have no answers.

    A question is put as where the same one stands in a row with its picture (`question`).
    """
    whole = tables["dataset_split"].value if "dataset_split" in tables else None

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        people, path = worded(entry.get("answers")), text(entry, *SCAN)
        split = entry.get("data_split", whole if isinstance(whole, str) else None)
        image, meta = {"paths": [path, PurePosixPath(path).name]}, {"answers": people, "split": split}
        name, question = text(entry, "questionId", "question_id"), text(entry, "question")
        return task("question", name, commonest(people), question=question, image=image, meta=meta)

    return _each(_items(tables, "data"), make)


def _textcaps(tables: Tables, beside: Tables) -> Iterator[Row]:
    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image = f"{entry['image_id']}.jpg"
        meta = {"references": entry.get("reference_strs", [])}
        return task("caption", str(entry["caption_id"]), text(entry, "caption_str"), image=image, meta=meta)

    return _each(_items(tables, "data"), make)


def _scienceqa(tables: Tables, beside: Tables) -> Iterator[Row]:
    """Questions with choices; pictures lie at `<split>/<id>/image.png`. Some questions have none."""

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        shown = {"image": f"{entry['split']}/{cell.key}/{entry['image']}"} if entry.get("image") else {}
        return choices.science(entry, cell.key, **shown)

    return _each(list(tables.values()), make)


def _seed_bench(tables: Tables, beside: Tables) -> Iterator[Row]:
    """Questions about pictures and videos, their kinds named in a table of their own."""
    kinds = tables["question_type"].value if "question_type" in tables else {}
    names = {number: name for name, number in kinds.items()}
    return _each(_items(tables, "questions"), lambda entry, cell: choices.seed(entry, names))


def _ocr_vqa(tables: Tables, beside: Tables) -> Iterator[Row]:
    """Covers of books, each with several questions; pictures are the book's id with the address's ending or `.jpg`."""

    def asked(entry: Any) -> Iterator[dict[str, Any]]:
        for number, (question, answer) in enumerate(zip(entry["questions"], entry["answers"], strict=True)):
            yield {"question": question, "answer": answer, "number": number}

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        image = {"paths": [cell.key + PurePosixPath(entry["imageURL"]).suffix, f"{cell.key}.jpg"]}
        meta = {"split": SPLITS.get(entry.get("split")), "title": entry.get("title")}
        answer, question = text(entry, "answer"), text(entry, "question")
        return task("reading", f"{cell.key}/{entry['number']}", answer, question=question, image=image, meta=meta)

    return _each(_spread(tables.values(), asked), make)


def _msr_vtt(tables: Tables, beside: Tables) -> Iterator[Row]:
    splits = {video["video_id"]: video.get("split") for video in _by(_items(tables, "videos"), "video_id").values()}

    def make(entry: Any, cell: Cell) -> dict[str, Any]:
        meta = {"split": _known(splits, entry["video_id"], "video")}
        video = f"{entry['video_id']}.mp4"
        return task("video", str(entry["sen_id"]), text(entry, "caption"), video=video, meta=meta)

    return _each(_items(tables, "sentences"), make)


def _members(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    """Recognises a file by its members."""
    return lambda first: all(key in first for key in keys)


def _entries(*keys: str, of: str | None = None) -> Callable[[Mapping[str, Any]], bool]:
    """Recognises a file by the keys of its first entry, or of that of its member `of`."""

    def fits(first: Mapping[str, Any]) -> bool:
        entry = next(iter(first.values()), {}) if of is None else first.get(of, {})
        return isinstance(entry, Mapping) and all(key in entry for key in keys)

    return fits


TABLES: dict[str, Table] = {
    "coco-captions": Table(_entries("caption", "image_id", of="annotations"), _coco_captions),
    "coco-instances": Table(_entries("bbox", "image_id", of="annotations"), _coco_instances),
    "refcoco": Table(_entries("ref_id", "sentences"), _refcoco, "the instances.json of the same folder"),
    "flickr": Table(_entries("sentences", "filename", of="images"), _flickr),
    "seed-bench": Table(_entries("choice_a", of="questions"), _seed_bench),
    "vqav2": Table(_members("questions"), _vqav2, "the annotations with the answers"),
    "textcaps": Table(_entries("caption_str", of="data"), _textcaps),
    "textvqa": Table(_entries("question", "image_id", of="data"), _textvqa),
    "docvqa": Table(lambda first: any(_entries("question", key, of="data")(first) for key in SCAN), _docvqa),
    "msr-vtt": Table(_members("videos", "sentences"), _msr_vtt),
    "gqa": Table(_entries("imageId", "question"), _gqa),
    "scienceqa": Table(_entries("question", "choices"), _scienceqa),
    "ocr-vqa": Table(_entries("questions", "answers", "imageURL"), _ocr_vqa),
}
"""By name; the first that fits a file reads it."""
