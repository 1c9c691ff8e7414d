"""Layouts of questions with free answers, and answers as files write them: one, several, or a list spelled in a cell.

ChartQA: Masry et al. 2022, arXiv 2203.10244. POPE: Li et al. 2023, arXiv 2305.10355.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.data.faults import Wrong
from isthmus.data.layout import Found, Layout, Raw, has, pictures, task, text, unanswered

LIST = re.compile(r"""\[(?:["'\d-].*)?\]""", re.DOTALL)
"""How a text begins and ends that may spell a list."""
ASKERS = {"0": "human", "1": "machine"}
"""Who wrote a question of ChartQA, as the Hub's `human_or_machine` numbers them."""


def spelled(given: Any) -> Any:
    """The list that a text spells, `['a', 'b']`; anything else as it is, also a text in brackets: `[illegible]`."""
    if isinstance(given, str) and LIST.fullmatch(given):
        with contextlib.suppress(TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
            found = ast.literal_eval(given)
            return found if isinstance(found, list) else given
    return given


def literal(given: Any, empty: bool = False) -> list[str]:
    """A list of texts, also where a text spells it (see `spelled`); another text is the only one.

    Raises:
        Wrong: it is something else, or empty where it must not be.
    """
    given = spelled(given)
    found = given if isinstance(given, list | tuple) else [given]
    if (not found and not empty) or not all(isinstance(one, str | int | float) for one in found):
        raise Wrong("a cell holds no texts", "write a text, or a list of them")
    return [str(one) for one in found]


def commonest(given: Any) -> str:
    """The answer that most people gave, the first of several.

    Raises:
        Wrong: there is none, or one is neither a text nor a number.
    """
    texts = worded(given)
    if not texts:
        raise unanswered()
    return max(texts, key=texts.count)


def worded(given: Any) -> list[str]:
    """Answers as texts: of one, of a list, or of one that a text spells; none where nothing but blanks is there.

    Raises:
        Wrong: one is neither a text nor a number.
    """
    found = spelled(given)
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        given = found  # not so `[12, 30]`, which may well be the answer
    several = given if isinstance(given, list | tuple) else [given]
    texts = [one["answer"] if isinstance(one, Mapping) and "answer" in one else one for one in several]
    if all(one is None or one == "" or (isinstance(one, str) and one.isspace()) for one in texts):
        return []
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in texts):
        raise Wrong("an answer is neither a text nor a number", "write a text, or a list of them")
    return [str(one) for one in texts]


def _question(record: Raw, name: str) -> Found:
    """Pictures, a question, and an answer or the answers of several people."""
    answer, several = _answers(record)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise Wrong("meta is not an object", 'write {"meta": {…}}')
    meta = meta | ({"answers": several} if several else {})
    meta |= {key: record[key] for key in ("category",) if key in record}
    yield task("question", name, answer, question=text(record, "question"), images=pictures(record), meta=meta)


def _answers(record: Raw) -> tuple[str, Sequence[str]]:
    """The answer, and what several people said: `answers`, or `answer` where that is a list; the one joins the others.

    Raises:
        Wrong: there is none, or both are lists, and not of the same answers.
    """
    own, several = worded(record.get("answer")), worded(record.get("answers"))
    if not own:
        chosen = worded(record.get("multiple_choice_answer"))
        return commonest(chosen or several), several
    if isinstance(record["answer"], str | int | float) and len(own) == 1:
        return own[0], several if not several or own[0] in several else [*own, *several]
    if several and sorted(own) != sorted(several):
        raise Wrong("answer and answers are two lists, which differ", "put all into answers, and leave answer out")
    return commonest(own), own


def _chartqa(record: Raw, name: str) -> Found:
    """The authors' `imgname`, `query` and `label`, or what the Hub has of them: who asked becomes the category."""
    given = dict(record)
    if "query" in record:
        given |= {"question": record["query"], "answer": record["label"], "answers": None}
    if record.get("imgname"):
        given["image"] = {"paths": [record["imgname"], f"png/{record['imgname']}"]}
    asker = record.get("human_or_machine", record.get("type"))
    if asker is not None:
        given["category"] = ASKERS.get(str(asker), str(asker))
    yield from _question(given, name)


def _pope(record: Raw, name: str) -> Found:
    """POPE: is a thing in the picture?"""
    asked = text(record, "text")
    yield task(
        "question", str(record.get("question_id", name)), text(record, "label"), question=asked, image=record["image"]
    )


def _is_question(record: Raw) -> bool:
    return "question" in record and pictures(record) is not None


def _is_chartqa(record: Raw) -> bool:
    """By the authors' names, or who asked: `human_or_machine`, or a `type` such as `augmented_test`."""
    if has("query", "label")(record):
        return bool(record.get("imgname")) or ("human_or_machine" in record and pictures(record) is not None)
    kind = str(record.get("type")).partition("_")[0]
    return _is_question(record) and "answer" in record and kind in ("human", "augmented")


LAYOUTS: dict[str, Layout] = {
    "chartqa": Layout(_is_chartqa, _chartqa, prepend=True),
    "question": Layout(_is_question, _question, prepend=True),
    "pope": Layout(has("image", "text", "label"), _pope),
}
"""By name; the first that fits a record reads it."""
