"""Many wordings per task, so that a model learns to follow requests rather than one sentence.

MultiInstruct, Xu et al. 2022, arXiv 2212.10773 (several expert-written instructions per task); InstructBLIP, Dai et al.
2023, arXiv 2305.06500 (short-answer wordings, ten or more per task); M3IT, Li et al. 2023, arXiv 2306.04387.

A task's record is `{task, image | images | video, fields, answer}`; several pictures go where the fields say `<image>`.
Which wording asks for its answer is a hash of the seed and the record's id, so it is the same in every process and run.
The last wordings of a task are held out of training: they tell how well a model understands requests that it was not
trained on.

Differs: the wordings are our own, in English alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from isthmus.data.faults import Wrong

Wording: TypeAlias = Literal["many", "one", "held_out", "none"]
"""Any of the wordings for training, the first one always, one of those that training never shows, or no words of ours:
the record's own (`BARE`)."""
HELD_OUT = 2
"""So many wordings of each task are kept for evaluation."""

BRIEF = " Answer in a word or two."
WORDINGS: dict[str, tuple[str, ...]] = {
    "caption": (
        "Describe the picture in one sentence.",
        "What does this picture show?",
        "Write a short caption for this picture.",
        "Say briefly what can be seen here.",
        "Sum this picture up in a sentence.",
        "What is going on in this picture?",
        "Give this photo a caption.",
        "Tell me in a few words what this is a picture of.",
        "Caption:",
        "A short description, please.",
        "What would you say about this image to someone who cannot see it? One sentence will do.",
        "Put what you see into one line.",
    ),
    "detail": (
        "Describe the picture in detail.",
        "Tell me everything that can be seen here.",
        "Give a full description of this picture.",
        "What does this picture show? Leave nothing out.",
        "Describe this image as thoroughly as you can.",
        "Write a paragraph on what is in the picture.",
        "Walk me through this image.",
        "Explain in detail what you see.",
    ),
    "video": (
        "Describe the video in one sentence.",
        "What happens in this video?",
        "Write a short caption for this clip.",
        "Say briefly what can be seen in this clip.",
        "Sum this video up in a line.",
        "Tell me in a few words what goes on here.",
        "What is this recording about?",
    ),
    "question": (
        "{question}" + BRIEF,
        "{question}",
        "Question: {question} Short answer:",
        "Look at the picture and answer briefly: {question}",
        "{question} Keep the answer short.",
        "Q: {question}\nA:",
        "From what the picture shows, {question}",
        "Using the picture, answer this in as few words as you can. {question}",
        "Please answer about the image: {question}",
        "Answer with a word or a short phrase.\n{question}",
        "I have a question on this picture: {question} A brief reply is enough.",
        "What is the short answer to this, given the image? {question}",
    ),
    "reading": (
        "{question} Read the text in the picture and answer briefly.",
        "{question}" + BRIEF,
        "Read what is written in the picture. {question}",
        "The answer is in the picture's text: {question}",
        "Question: {question} Short answer, from the text that can be seen:",
        "With the help of the words in this image, answer: {question}",
        "Look for writing in this picture, then tell me: {question}",
    ),
    "choice": (
        "{context}{question}\n{choices}\nAnswer with the letter of the right choice.",
        "{context}Question: {question}\nChoices:\n{choices}\nWhich letter is right?",
        "{context}{question}\nPick one:\n{choices}\nGive only its letter.",
        "{context}Choose the best answer by its letter.\n{question}\n{choices}",
        "{context}{question} These are the options.\n{choices}\nThe letter of the answer:",
        "Read this and choose a letter.\n{context}{question}\n{choices}",
        "{context}Of the following, which answers the question? {question}\n{choices}\nReply with a letter.",
    ),
    "statement": (
        '"{statement}" Is this true of the picture? Answer yes or no.',
        "Does the picture show this? {statement} Answer yes or no.",
        "{statement} Yes or no?",
        "Judge from the picture whether this is right: {statement} Say yes or no.",
        "Is it correct to say of this image: {statement} Reply with yes or no.",
        "Check this sentence against the picture and answer yes or no. {statement}",
        'Someone says: "{statement}" Are they right, going by the picture? Yes or no.',
    ),
    "refer": (
        "Where is {phrase}?",
        "Find {phrase} in the picture and give its region.",
        "Point out {phrase}.",
        "Give the box around {phrase}.",
        "Locate {phrase}.",
        "Which part of the picture shows {phrase}?",
        "I am looking for {phrase}. Where in the picture is it?",
        "Mark {phrase} in this image.",
    ),
    "region": (
        "What is in the region {region}?",
        "Describe what lies within {region}.",
        "Say in a few words what {region} shows.",
        "Look at {region} alone. What is there?",
        "Write a short caption for {region}.",
        "What can be seen at {region}?",
        "Tell me about this part of the picture: {region}",
    ),
    "detect": (
        "Name the objects in the picture with their regions.",
        "Find all objects and give the box of each.",
        "Which objects are there, and where?",
        "List every object that you can find, each with its place.",
        "Detect the objects in this image.",
        "Go through the picture and point out what there is.",
        "Give me the objects of this photo, with boxes.",
    ),
}
"""By task; `{…}` are the record's fields."""
BARE = {
    "question": "{question}",
    "reading": "{question}",
    "choice": "{context}{question}\n{choices}",
    "statement": "{statement}",
    "refer": "{phrase}",
    "region": "{region}",
}
"""What a record asks by itself; of another task, the picture alone."""
FIELD = re.compile(r"(\{[a-z]+\})")


def put(record: Mapping[str, Any], wording: Wording, seed: int) -> dict[str, Any]:
    """A task's record as messages.

    Raises:
        Wrong: the task is unknown, or a field that its wording needs is missing.
    """
    task = record["task"]
    if not isinstance(task, str) or task not in WORDINGS:
        raise Wrong(f"unknown task {str(task)[:40]!r}", f"tasks are {', '.join(WORDINGS)}")
    fields = record.get("fields", {})
    if not isinstance(fields, Mapping):
        raise Wrong("fields is not an object", 'write {"question": "…"}')
    shown = [{"type": kind, kind: record[kind]} for kind in ("image", "video") if record.get(kind) is not None]
    asked = _content(choose(task, wording, f"{seed} {record.get('id', '')}"), fields)
    return {
        "messages": [
            {"role": "user", "content": [*shown, *asked]},
            {"role": "assistant", "content": record.get("answer")},
        ],
        "images": record.get("images"),
        "meta": {"kind": task, **record.get("meta", {})},
    }


def choose(task: str, wording: Wording, key: str) -> str:
    """The wording that a key gets."""
    if wording == "none":
        return BARE.get(task, "")
    possible = wordings(task, held_out=wording == "held_out")
    digest = int.from_bytes(blake2b(f"{task} {key}".encode(), digest_size=8).digest())
    return possible[0 if wording == "one" else digest % len(possible)]


def wordings(task: str, held_out: bool) -> Sequence[str]:
    """Those for training, or those that are held out of it."""
    return WORDINGS[task][-HELD_OUT:] if held_out else WORDINGS[task][:-HELD_OUT]


def _content(template: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A wording with its fields as parts of content: texts side by side become one, regions stay parts."""
    parts: list[dict[str, Any]] = []
    for piece in _pieces(template, fields):
        if isinstance(piece, Mapping):
            parts.append(dict(piece))
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _pieces(template: str, fields: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    for piece in FIELD.split(template):
        if not FIELD.fullmatch(piece):
            yield piece
            continue
        value = fields.get(piece[1:-1])
        if not isinstance(value, str | Mapping):
            raise Wrong(f"the field {piece[1:-1]} is missing", "write it under fields, as a text or a box")
        yield value
