"""Text alone: sums against transformers' own logits, layouts as published, and an LLM beside itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import composed
from isthmus.config import LoRA, TaskConfig
from isthmus.evaluation import measure, prose, results, tasks, text
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.report import cost_table
from isthmus.evaluation.score import Scorer
from isthmus.model import VLM
from isthmus.types import DataError, IsthmusError

TEXT = "\n\n".join(
    f"The {a} is here. A {b} was there before it came. It looked at the {c} for a long time. Nobody told the {a} why."
    for a in ("cat", "dog", "fox", "owl", "hat", "key")
    for b in ("boat", "car", "tree", "house", "cup", "bell")
    for c in ("sea", "sky", "hill", "sun", "wall", "road")
)


@pytest.fixture(scope="module", params=("llama", "opt"))
def model(request: pytest.FixtureRequest) -> VLM:
    return composed.stir(composed.model(request.param))


def built(name: str, path: Path | str, limit: int | None = None) -> Any:
    return named(name)(TaskConfig(name=name, limit=limit, options={"text": str(path)}), 0)


@torch.no_grad()
def by_transformers(family: str, ids: list[int], told: int) -> float:
    """The log-probability of the last `told` ids, by the LLM as transformers loads and runs it."""
    llm = AutoModelForCausalLM.from_pretrained(composed.llm_folder(family), attn_implementation="eager").eval()
    logits = llm(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[-told:].sum().item()


def test_every_token_of_a_text_is_told_once_whatever_the_window(model: VLM) -> None:
    family = model.config.text_config.model_type
    reader = prose.of(Scorer(model, batch_size=3))
    tokenizer = model.processor.tokenizer
    texts = [TEXT[:200], "a cat", TEXT[200:330]]
    reader.window = 16
    found = reader.texts(texts)
    for said, told in zip(texts, found):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert told.tokens == len(ids)
        full, expected = [reader.begin, *ids], 0.0
        for start in range(0, len(ids), 16):  # by hand: the whole window before the last of its new tokens
            end = min(start + 16, len(ids))
            expected += by_transformers(family, full[max(0, end - 16) : end + 1], end - start)
        assert told.value == pytest.approx(expected, abs=1e-3)


def test_a_continuation_is_what_the_whole_has_beyond_its_context(model: VLM) -> None:
    family, tokenizer = model.config.text_config.model_type, model.processor.tokenizer
    pairs = [("The cat", " is here"), ("The cat ", "is here"), ("Question: what?\nAnswer:", " a dog on the left")]
    found = prose.of(Scorer(model, batch_size=2)).continuations(pairs)
    for (context, continuation), told in zip(pairs, found):
        given, whole = (tokenizer(one)["input_ids"] for one in (context.rstrip(), context + continuation))
        assert told.tokens == len(whole) - len(given)
        assert told.value == pytest.approx(by_transformers(family, whole, told.tokens), abs=1e-4)
    assert found[0].value == pytest.approx(found[1].value, abs=1e-4)  # a blank belongs to the word behind it


def test_without_a_context_the_token_that_begins_a_text_is_given(model: VLM) -> None:
    reader = prose.of(Scorer(model))
    (told,), (read,) = reader.continuations([("", "a dog")]), reader.texts(["a dog"])
    assert told.tokens == read.tokens and told.value == pytest.approx(read.value, abs=1e-4)


def test_a_frozen_llm_has_lost_nothing_and_a_changed_one_something(tmp_path: Path) -> None:
    """The joint alone costs exactly nothing; LoRA in the LLM shows, with an interval around the paired difference."""
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    model = composed.stir(composed.model())
    tasks = [(built(name, path), TaskConfig(name=name, controls=())) for name in ("perplexity", "next-sentence")]

    def rows(folder: Path) -> list[results.Row]:
        after = measure.measure(model, tasks, 0, folder)
        both = measure.merge(measure.measure_alone(model, tasks, 0, folder), after)
        return [row for task, runs in both.values() for row in results.rows(task, runs)]

    nll, chosen = rows(tmp_path / "frozen")
    assert nll.gains["before"].low == nll.gains["before"].high == 0 and nll.n == len(tasks[0][0].items) > 3
    assert chosen.gains["before"].value == 0 and chosen.chance == 0.25
    told, level = nll.besides["perplexity"]["after"], nll.cells["after"]
    assert [told.value, told.low, told.high] == pytest.approx(
        [math.exp(x) for x in (level.value, level.low, level.high)]
    )
    model.add_lora(["llm.*"], LoRA(r=4), "told")
    composed.stir(model)
    nll, chosen = rows(tmp_path / "changed")
    gain = nll.gains["before"]
    assert gain.value == pytest.approx(nll.cells["after"].value - nll.cells["before"].value)
    assert gain.low < gain.value < gain.high and gain.low * gain.high > 0  # the interval leaves 0 out
    console_rows = cost_table([nll, chosen]).columns
    assert [column.header for column in console_rows] == ["text", "LLM alone", "aligned", "difference"]


@pytest.mark.parametrize("name", ["perplexity", "next-sentence"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_interrupted_text_goes_on_after_its_last_batch(
    name: str, alone: bool, model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third batch: what the first two told is not asked again, and all is as without a break."""
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    monkeypatch.setattr(text, "PIECE", 300)
    monkeypatch.setattr(prose, "WINDOW", 64)  # several rows of one piece
    asked: list[int] = []
    genuine, stop = prose.Prose._values, [0]

    def counted(self: prose.Prose, batch: list[prose.Row]) -> list[list[float]]:
        asked.append(len(batch))
        if len(asked) == stop[0]:
            raise KeyboardInterrupt
        return genuine(self, batch)

    monkeypatch.setattr(prose.Prose, "_values", counted)
    task = built(name, path, limit=4)
    scorer = prose.alone(model, torch.float32, 2) if alone else Scorer(model, batch_size=2)
    wanted, whole = tasks.run(task, scorer), sum(asked)
    asked.clear()
    stop[0] = 3
    with pytest.raises(KeyboardInterrupt):
        tasks.run(task, scorer, folder=tmp_path / "kept")
    asked.clear()
    stop[0] = 0
    assert tasks.run(task, scorer, folder=tmp_path / "kept") == wanted
    assert sum(asked) == whole - 4 and not list((tmp_path / "kept").glob("*.part"))


def test_another_base_is_not_taken_for_the_llm_alone() -> None:
    model = composed.model()
    model.config.llm = {**model.config.llm, "weights": "0" * 16}
    with pytest.raises(IsthmusError, match="not those this model was trained with"):
        prose.alone(model, torch.float32, 2)


def test_bits_per_byte_by_hand(tmp_path: Path, model: VLM) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Ein Käse.")
    task = built("perplexity", path)
    (told,) = task.predict(Scorer(model), [item.prompt for item in task.items], None)
    assert task.totals([told])["bits per byte"].value == pytest.approx(-told.scores[0] / math.log(2) / 10)


PUBLISHED: dict[str, tuple[dict[str, Any], str, tuple[str, ...], str]] = {
    "arc": (
        {"id": "M_1", "question": {"stem": "What falls?", "choices": [{"text": "rain", "label": "A"},
         {"text": "rock", "label": "B"}]}, "answerKey": "B"},
        "Question: What falls?\nAnswer:", ("rain", "rock"), "rock",
    ),
    "arc-hub": (
        {"id": "M_2", "question": "What falls?", "choices": {"text": ["rain", "rock"], "label": ["1", "2"]},
         "answerKey": "1"},
        "Question: What falls?\nAnswer:", ("rain", "rock"), "rain",
    ),
    "openbookqa": (
        {"id": "8", "question_stem": "The sun is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
         "answerKey": "A"},
        "The sun is", ("hot", "cold"), "hot",
    ),
    "hellaswag": (
        {"ind": 4, "activity_label": "Removing ice", "ctx_a": "A man [substeps] scrapes.", "ctx_b": "then he",
         "ctx": "-", "endings": ["sits  down [title] ok.", "stops."], "label": "0", "split": "val"},
        "Removing ice: A man scrapes. Then he", ("sits down. ok.", "stops."), "sits down. ok.",
    ),
    "piqa": (
        {"goal": "Boil water.", "sol1": "Use a pot.", "sol2": "Use a hat.", "label": 0},
        "Question: Boil water.\nAnswer:", ("Use a pot.", "Use a hat."), "Use a pot.",
    ),
    "own": (
        {"context": "One, two,", "choices": ["three", "ten"], "answer": "three"},
        "One, two,", ("three", "ten"), "three",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", PUBLISHED)
def test_multiple_choice_as_it_is_published(tmp_path: Path, layout: str) -> None:
    record, context, choices, answer = PUBLISHED[layout]
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert text.named_for(str(path)) == ("continuation",)
    (item,) = built("continuation", path).items
    assert (item.prompt.turns[0].text, item.choices, item.answer) == (context, choices, answer)


def test_the_two_accuracies_by_hand(tmp_path: Path) -> None:
    """A long right answer is likelier per character, a short wrong one as a whole."""
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"context": "c", "choices": ["long enough", "no"], "answer": 0}))
    task = built("continuation", path)

    class Fixed(prose.Prose):
        def __init__(self) -> None: ...

        def continuations(self, pairs, advance=None):
            assert list(pairs) == [("c", " long enough"), ("c", " no")]
            return [prose.Told(-11.0, 2), prose.Told(-6.0, 1)]

    scorer = prose.Alone.__new__(prose.Alone)
    scorer.prose = Fixed()
    (told,) = task.predict(scorer, [item.prompt for item in task.items], None)
    assert told.scores == (-1.0, -3.0) and told.right is True
    assert {name: told.value for name, told in task.totals([told]).items()} == {"accuracy by the whole probability": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "What?"}, "no known layout"),
        ({"context": "c", "choices": ["a", "b"], "answer": 2}, "none of the choices"),
        ({"context": "c", "choices": ["a", "a"], "answer": 0}, "twice"),
        ({"goal": "g", "sol1": "a", "sol2": "b"}, "none of the choices"),
        ({"context": "c", "choices": ["a", "b"], "answer": -1}, "none of the choices"),
        ({"activity_label": "x", "ctx": "c", "endings": ["a", "b"], "label": ""}, "none of the choices"),
        ({"context": "c", "choices": ["a", ""], "answer": 0}, "empty"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "asked.jsonl"
    good = {"context": "c", "choices": ["a", "b"], "answer": "A"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message) as told:
        built("continuation", path)
    assert ":2:" in told.value.cause


def test_texts_of_records_and_pythons_own(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("A cat.", "A dog.")))
    assert [item.prompt.turns[0].text for item in built("perplexity", path).items] == ["A cat.", "A dog."]
    assert text.named_for(text.DOCS) == ("perplexity", "next-sentence")
    task = built("next-sentence", text.DOCS, 40)
    assert results.draw_examples({"next": (task, {})}) == []  # a report's examples are shown by their pictures
    items = task.items
    assert len(items) == 40 and all(len(set(item.choices)) == 4 and item.answer in item.choices for item in items)
    places = [item.choices.index(item.answer) for item in items]
    assert set(places) == {0, 1, 2, 3} and items == built("next-sentence", text.DOCS, 40).items


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("blank.txt", " \n\n ", "holds no text"),
        ("none.jsonl", "", "holds no text"),
        ("broken.jsonl", '{"text": "A cat."}\n{"text": \n', ":2:"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            built("perplexity", tmp_path / name)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(IsthmusError, match="encoder-decoder"):
        prose.of(Scorer(composed.model("flan-t5")))
