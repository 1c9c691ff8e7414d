"""Layouts of multiple choice: MMBench's TSV (and what VLMEvalKit keeps in that form), SEED-Bench, MMMU, and rows with
a list of options, as ScienceQA and AI2D have them.

MMBench: Liu et al. 2023, arXiv 2307.06281. SEED-Bench: Li et al. 2023, arXiv 2307.16125. MMMU: Yue et al. 2024, arXiv
2311.16502. ScienceQA: Lu et al. 2022, arXiv 2209.09513. AI2D: Kembhavi et al. 2016, arXiv 1603.07396.

Each becomes the task `choice`: `meta` holds the `choices` in words, the `category` that gets a row of its own and,
where there is one, the `group` of categories.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from isthmus.data.answers import literal, spelled
from isthmus.data.faults import Wrong
from isthmus.data.layout import Found, Layout, Raw, has, pictures, task, text, unanswered

ROUND = "#round-"
"""In an id, before the number of times that the options of a question were moved (circular evaluation)."""
CYCLE = 1_000_000
"""MMBench's index of a question with its options moved once is that of the question and this."""
REFERENCE = 64
"""MMBench's column `image`: what is not longer is the index of the row whose picture it is."""
MARKER = re.compile(r"<image\s?(\d)>")
"""Where MMMU's questions and options show a picture."""
NUMBER = re.compile(r"[0-9]{1,2}")
"""An answer that may be an option's, spelled as a text."""
BREAKFAST, RATE = "12", 15
"""SEED-Bench's kind of question about the videos of Breakfast, in which it counts frames, and how many a second has."""
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""MMMU's, and their subjects."""
SUBJECTS = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}


def asked(
    name: str,
    question: str,
    options: Sequence[Any],
    answer: Any,
    meta: Mapping[str, Any],
    context: str = "",
    **shown: Any,
) -> dict[str, Any]:
    """A question with its options, one a line; the answer is a letter, the number of an option, or its words.

    Raises:
        Wrong: there are not two options or more, or the answer is none of them.
    """
    words = [str(option) for option in options]
    if not 2 <= len(words) <= len(ascii_uppercase):
        raise Wrong(f"{len(words)} options", f"write from 2 to {len(ascii_uppercase)}")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, words))
    fields = {"question": question, "choices": listed, "context": f"{context}\n" if context else ""}
    told = {key: value for key, value in meta.items() if value not in (None, "")}
    return task("choice", name, letter(answer, words), **fields, **shown, meta={"choices": words, **told})


def letter(answer: Any, options: Sequence[str]) -> str:
    """The letter of the right option.

    Raises:
        Wrong: the answer names none, or there is none.
    """
    if answer is None or answer == "":
        raise unanswered()
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return letters[answer]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    if answer in options:
        return letters[options.index(answer)]
    if isinstance(answer, str) and NUMBER.fullmatch(answer.strip()) and int(answer) < len(options):
        return letters[int(answer)]
    remedy = "write an option's letter, its words, or its number from 0"
    raise Wrong(f"the answer {str(answer)[:40]!r} is none of {len(options)} options", remedy)


def science(record: Raw, name: str, **shown: Any) -> dict[str, Any]:
    """ScienceQA's `question`, `choices`, `answer` (a number) and `hint`; others' `options` are read like `choices`."""
    subject, answer = record.get("subject", record.get("category")), record.get("answer")
    meta = {"answer": answer, "split": record.get("split"), "subject": subject, "category": subject}
    hint = str(record.get("hint") or "")
    return asked(name, text(record, "question"), _options(record), answer, meta, hint, **shown)


def _options(record: Raw) -> Sequence[Any]:
    """`choices` or `options`, as a list or as texts by their letters, else the columns `A`, `B`, ….

    Raises:
        Wrong: they are something else.
    """
    given = spelled(record.get("choices") or record.get("options")) or [record[key] for key in _letters(record)]
    if isinstance(given, Mapping):
        named = {str(key).upper(): word for key, word in given.items() if word not in (None, "")}
        letters = _letters(named)
        given = [named[key] for key in letters] if len(letters) == len(named) else []
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str | int | float) for one in given):
        remedy = 'write ["…", "…"] or {"A": "…", "B": "…"}; or ask without them (options: {format: question})'
        raise Wrong("the options are neither a list of texts nor texts by their letters", remedy)
    return given


def seed(record: Raw, kinds: Mapping[Any, str]) -> dict[str, Any]:
    """SEED-Bench's `choice_a` to `choice_d`, the picture by `data_id` or in the record; kinds by their number.

    A question about a video shows the frames that its row brings, or the video `data_id`, or `segment` of it. The kind
    of medium is its publisher's split: `rows: image` takes the questions about pictures alone.

    Raises:
        Wrong: it is about something that SEED-Bench has not, or its segment is no stretch of time.
    """
    medium = record.get("data_type", "image")
    if medium not in ("image", "video"):
        remedy = "leave it out (options: {faults: skip})"
        raise Wrong(f"the question is about a {str(medium)[:40]}: {str(record.get('data_id'))[:60]}", remedy)
    options = [record[key] for key in ("choice_a", "choice_b", "choice_c", "choice_d") if record.get(key) is not None]
    number = record.get("question_type_id")
    number = number if isinstance(number, int | str) else None
    category = kinds.get(number, "" if number is None else f"type {number}")
    meta = {"category": category, "group": record.get("data_type"), "split": record.get("data_type")}
    name, question = str(record.get("question_id", record.get("data_id", ""))), text(record, "question")
    if medium == "video" and record.get("image") is None:
        film = {"path": record.get("data_id"), "span": _seconds(record)}
        return asked(name, question, options, record.get("answer"), meta, video=film)
    pictures = record.get("image", record.get("data_id"))
    marks = "".join("<image>" for _ in (pictures if isinstance(pictures, list) else [pictures]))
    return asked(name, question, options, record.get("answer"), meta, marks, images=pictures)


def _seconds(record: Raw) -> Any:
    """SEED-Bench's segment in seconds: that of Epic-Kitchens is such; that of Breakfast is in frames."""
    segment = record.get("segment")
    if str(record.get("question_type_id")) != BREAKFAST or not isinstance(segment, list):
        return segment
    return [end / RATE if isinstance(end, int | float) else end for end in segment]


# ---------------------------------------------------------------------------------------------- records


def _science(record: Raw, name: str) -> Found:
    yield science(record, str(record.get("id", name)), images=pictures(record))


def _seed(record: Raw, name: str) -> Found:
    yield seed({"question_id": name, **record}, {})


def _mmbench(record: Raw, name: str) -> Found:
    """A row of a TSV: `index`, `question`, `A`, `B`, ..., `answer`, `hint`, `category`, `l2-category`, `image`.

    Without options, as in MME, POPE or TextVQA, it is a question with one answer or a list of them.
    """
    own = _index(record["index"])
    pictures = _pictures(record)
    marks = "<image>" * len(pictures)
    options = [record[key] for key in _letters(record)]
    meta = {key: record.get(name) for key, name in (("category", "category"), ("group", "l2-category"))}
    hint, question = str(record.get("hint") or ""), text(record, "question")
    if options:
        context = marks + hint
        yield asked(own, question, options, text(record, "answer"), meta, context, images=pictures)
        return
    answers = literal(text(record, "answer"))
    told = {key: value for key, value in meta.items() if value} | ({"answers": answers} if len(answers) > 1 else {})
    said = max(answers, key=answers.count)
    yield task("question", own, said, question=marks + question, images=pictures, meta=told)


def _mmmu(record: Raw, name: str) -> Found:
    """A row: `question` and `options` with `<image 1>`, ..., `image_1`, ...; open questions have no options."""
    own = str(record.get("id", name))
    subject = "_".join(own.split("_")[1:-1])
    meta = {"category": subject, "group": SUBJECTS.get(subject), "subfield": record.get("subfield")}
    question, options = text(record, "question"), literal(record["options"], empty=True)
    numbers = [match for given in (question, *options) for match in MARKER.findall(given)]
    unnamed = [key[-1] for key in sorted(record) if re.fullmatch(r"image_\d", key) and record[key] is not None]
    unnamed = [number for number in unnamed if number not in numbers]
    pictures = [record.get(f"image_{number}") for number in (*unnamed, *numbers)]
    question = "<image>" * len(unnamed) + MARKER.sub("<image>", question)
    if record["question_type"] == "open":
        answers = literal(text(record, "answer"))
        told = {key: value for key, value in meta.items() if value} | {"open": True, "answers": answers}
        yield task("question", own, answers[0], question=question, images=pictures, meta=told)
        return
    options = [MARKER.sub("<image>", option) for option in options]
    yield asked(own, question, options, text(record, "answer"), meta, images=pictures)


def _letters(record: Raw) -> list[str]:
    """The options' columns, up to the first empty one."""
    filled = [record.get(key) is not None and str(record[key]).strip() != "" for key in ascii_uppercase]
    return list(ascii_uppercase[: filled.index(False)] if False in filled else ascii_uppercase)


def _index(given: Any) -> str:
    """A question's id; of one whose options were moved, that of the question and how often."""
    try:
        rounds, number = divmod(int(given), CYCLE)
    except (TypeError, ValueError, OverflowError):
        return str(given)
    return f"{number}{ROUND}{rounds}" if rounds else str(number)


def _pictures(record: Raw) -> list[Any]:
    """Pictures in base64 or by path, in the columns `image` and `image_path`; none is a question without."""
    given = record.get("image")
    if given and _is_inline(given):
        return [_decoded(one) for one in literal(given)]
    if given:
        return [given]
    return list(literal(record["image_path"])) if record.get("image_path") else []


def _decoded(given: str) -> bytes:
    try:
        return base64.b64decode(given, validate=True)
    except (ValueError, binascii.Error):
        raise Wrong("a picture is not base64", "write the file's bytes in base64, or its path as image_path") from None


LAYOUTS: dict[str, Layout] = {
    "mmbench": Layout(lambda record: _is_mmbench(record), _mmbench),
    "mmmu": Layout(has("question", "options", "question_type"), _mmmu),
    "seed-rows": Layout(has("question", "choice_a", "choice_b"), _seed, split="data_type"),
    "choices": Layout(lambda record: "question" in record and _has_options(record), _science, prepend=True),
}
"""By name; the first that fits a record reads it."""


def _has_options(record: Raw) -> bool:
    return bool(record.get("choices") or record.get("options")) or len(_letters(record)) > 1


def _is_mmbench(record: Raw) -> bool:
    """By its columns; a question without options about a picture that is named is one like any other."""
    inline = _is_inline(record.get("image", "")) and not _has_options(record)
    return has("index", "question", "answer")(record) and (bool(_letters(record)) or inline)


def _is_inline(picture: Any) -> bool:
    """Whether a cell holds base64, or a list of such; a path has a dot, which base64 has not."""
    return isinstance(picture, list) or (isinstance(picture, str) and "." not in picture)
