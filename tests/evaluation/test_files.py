"""Tasks on files in their published layouts, scored as their benchmarks score."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow
from rich.console import Console

import composed
from isthmus.config import TaskConfig
from isthmus.evaluation import results
from isthmus.evaluation.catalogue import named
from isthmus.evaluation.measure import build
from isthmus.evaluation.metrics import captions, judgements
from isthmus.evaluation.report import table_of
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Task, run
from isthmus.model import VLM
from isthmus.types import ConfigError, DataError, Sample


@pytest.fixture(scope="module")
def model() -> VLM:
    return composed.stir(composed.model())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))


def pictures(folder: Path, *names: str) -> None:
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Pillow.new("RGB", (32, 32), (40 * place, 90, 200 - 40 * place)).save(folder / name)


def write(folder: Path, tree: Any, name: str = "asked.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def task(name: str, path: Path, limit: int | None = None, **options: Any) -> Task:
    config = TaskConfig(name=name, limit=limit, options={"data": {"name": str(path)}, **options})
    return named(name)(config, 0)


def answered(asked: Task, model: VLM, say: Callable[[Sample], str | None]) -> tuple[list[Any], results.Row]:
    """Predictions when every prompt gets the reply that `say` has for it, and the row of the whole file."""
    told = {item.prompt.id: say(item.prompt) for item in asked.items}  # in the order of the file
    given = run(asked, Scorer(model, reply=lambda prompts: [told[prompt.id] for prompt in prompts], batch_size=3))
    return given, results.rows(asked, {"after": given})[0]


def besides(row: results.Row) -> dict[str, float]:
    """A benchmark's further figures without their intervals."""
    return {name: estimate.value for name, told in row.besides.items() if (estimate := told["after"])}


def in_turn(*replies: str | None) -> Callable[[Sample], str | None]:
    left = iter(replies)
    return lambda prompt: next(left)


def questions(folder: Path, answers: Sequence[Any], **more: Sequence[Any]) -> Path:
    pictures(folder, "0.png", "1.png")
    records = [
        {"id": f"q{place}", "image": f"{place // 2 % 2}.png", "question": f"What {place}?", "answer": answer}
        | {key: values[place] for key, values in more.items()}
        for place, answer in enumerate(answers)
    ]
    return write(folder, records)


def test_exact_match_evens_out_what_does_not_matter(tmp_path, model):
    asked = task("exact", questions(tmp_path, ["a dog", "two", "red"]))
    found, row = answered(asked, model, in_turn("Dog.", "2", "blue"))
    assert [one.right for one in found] == [True, True, False]
    assert row.cells["after"].value == pytest.approx(2 / 3) and row.clusters == 2


def test_documents_and_charts_are_scored_as_their_benchmarks_do(tmp_path, model):
    path = questions(tmp_path, [["total 12", "12 in all"], "40"])
    assert [one.right for one in answered(task("exact", path), model, in_turn("12 in all", "41"))[0]] == [True, False]
    found, row = answered(task("anls", path), model, in_turn("totel 12", "4"))
    assert [one.right for one in found] == [7 / 8, 0.5] and row.cells["after"].value == pytest.approx(11 / 16)
    found, row = answered(task("relaxed", path), model, in_turn("12 in All", "41"))
    assert [one.right for one in found] == [True, True]


@pytest.mark.parametrize("name, rule", [("POPE", "yes-no"), ("text-vqa", "vqa"), ("docvqa", "anls")])
def test_a_benchmarks_name_is_told_what_scores_it(name, rule):
    with pytest.raises(ConfigError, match=f"{name}.* it is a benchmark, which '{rule}' scores"):
        named(name)


def test_a_reply_is_as_long_as_its_task_unless_an_option_says_otherwise(tmp_path):
    path = questions(tmp_path, ["cat"])
    assert task("exact", path).longest == 32 and task("exact", path, longest=64).longest == 64
    with pytest.raises(ConfigError, match="longest.*\noptions are data, one_wording, longest"):
        task("exact", path, longest=0)


def test_a_reply_that_failed_is_not_scored_and_gives_a_range(tmp_path, model):
    found, row = answered(task("exact", questions(tmp_path, ["a", "b"])), model, in_turn(None, "b"))
    assert found[0].right is None
    assert (row.cells["after"].lowest, row.cells["after"].highest) == (0.5, 1.0)


def test_vqa_accuracy_counts_people(tmp_path, model):
    pictures(tmp_path, "COCO_val2014_000000000007.jpg")
    asked = {"questions": [{"question_id": 70, "image_id": 7, "question": "How many?"}], "data_subtype": "val2014"}
    people = [{"answer": word, "answer_id": place} for place, word in enumerate(["2"] * 2 + ["3"] * 8)]
    noted = {
        "question_id": 70,
        "image_id": 7,
        "multiple_choice_answer": "3",
        "answers": people,
        "answer_type": "number",
    }
    write(tmp_path, {"annotations": [noted], "data_subtype": "val2014"}, "annotations.json")
    path = write(tmp_path, asked, "questions.json")
    data = {"name": str(path), "options": {"format": "vqav2", "beside": str(tmp_path / "annotations.json")}}
    built = named("vqa")(TaskConfig(name="vqa", options={"data": data}), 0)
    found, row = answered(built, model, lambda prompt: "two")
    # nine others hear "two": eight times two of them agree, twice one does
    assert found[0].right == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert row.cells["after"].value == pytest.approx(0.6) and row.unit == "accuracy"


def test_a_file_without_the_peoples_answers_is_refused(tmp_path):
    with pytest.raises(DataError, match="answers of 0 people, and VQA accuracy needs 4"):
        task("vqa", questions(tmp_path, ["a"]))


@pytest.mark.parametrize("answers", [[{"text": "cat"}] * 4, "cats", {"cat": 4}, 4])
def test_answers_in_meta_that_are_no_answers_are_refused(tmp_path, answers):
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "cat"}]
    path = write(tmp_path, [{"id": "q0", "messages": said, "meta": {"answers": answers}}])
    with pytest.raises(DataError, match="q0: the answers in its meta are no list of texts") as caught:
        task("vqa", path)
    assert '"answers": ["…", …]' in caught.value.remedy
    for good in (["cat"] * 4, [{"answer": "cat", "answer_id": 1}] * 4):
        write(tmp_path, [{"id": "q0", "messages": said, "meta": {"answers": good}}])
        assert task("vqa", path).items[0].references == ("cat",) * 4


def test_yes_no_reports_pope_and_mme(tmp_path, model):
    kinds = ["existence"] * 4
    asked = task("yes-no", questions(tmp_path, ["yes", "no", "yes", "no"], category=kinds))
    found, row = answered(asked, model, in_turn("Yes", "Yes", "yes, it is", "No"))
    assert [one.right for one in found] == [True, False, True, True]
    figures = besides(row)
    assert figures["POPE recall"] == 1 and figures["POPE precision"] == pytest.approx(2 / 3)
    assert figures["MME score"] == pytest.approx(75 + 50)
    assert row.besides["MME existence"] == row.besides["MME score"]


def test_popes_own_layout(tmp_path, model):
    pictures(tmp_path, "0.png")
    lines = [
        {"question_id": place, "image": "0.png", "text": f"Is there a {word}?", "label": label}
        for place, (word, label) in enumerate([("dog", "yes"), ("car", "no")])
    ]
    path = tmp_path / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, row = answered(task("yes-no", path), model, lambda prompt: "yes")
    assert [one.right for one in found] == [True, False]
    assert (besides(row)["POPE yes"], besides(row)["POPE f1"]) == (1.0, pytest.approx(2 / 3))
    assert not any("MME" in name for name in row.besides)  # two questions a picture, and no sub-tasks


def test_yes_no_refuses_other_answers(tmp_path):
    with pytest.raises(DataError, match="neither yes nor no"):
        task("yes-no", questions(tmp_path, ["maybe"]))


def science(folder: Path) -> Path:
    pictures(folder, "test/1/image.png")
    problem = {
        "question": "Which is a bird?",
        "choices": ["cat", "owl", "dog"],
        "answer": 1,
        "hint": "",
        "split": "test",
    }
    return write(folder, {"1": problem | {"image": "image.png"}, "2": problem | {"image": None}}, "problems.json")


def test_options_by_letter_or_in_words(tmp_path, model):
    found, row = answered(task("options", science(tmp_path)), model, in_turn("B.", "the owl"))
    assert [one.right for one in found] == [True, True]
    assert row.chance == pytest.approx(1 / 3) and not row.besides


def test_circular_evaluation_turns_options_and_letter_together(tmp_path, model):
    asked = task("options", science(tmp_path), circular=True)
    assert [item.answer for item in asked.items] == ["B", "A", "C"] * 2
    for item in asked.items:
        assert f"{item.answer}. owl" in item.words

    def one_place_wrong(prompt: Sample) -> str:
        right = next(item.answer for item in asked.items if item.prompt.id == prompt.id)
        return "A" if prompt.id == "2#round-2" else right

    found, row = answered(asked, model, one_place_wrong)
    assert sum(one.right for one in found) == 5
    assert besides(row)["circular accuracy"] == 0.5 and row.clusters == 2


def test_captions_of_one_picture_are_its_references(tmp_path, model):
    pictures(tmp_path, "a.jpg", "b.jpg")
    said = {1: ["A red cat sits.", "The cat is red."], 2: ["Two dogs run.", "Dogs running in the grass."]}
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 10 * picture + place, "image_id": picture, "caption": text}
            for picture, texts in said.items()
            for place, text in enumerate(texts)
        ],
    }
    asked = task("captions", write(tmp_path, tree))
    assert len(asked.items) == 2
    found, row = answered(asked, model, in_turn("a red cat sits", "a boat"))
    tokens = [[captions.tokens(text) for text in texts] for texts in said.values()]
    scores = captions.cider([["a", "red", "cat", "sits"], ["a", "boat"]], tokens)
    assert [one.right for one in found] == pytest.approx([score / 10 for score in scores])
    assert besides(row)["CIDEr"] == pytest.approx(sum(scores) / 2) and besides(row)["CIDEr"] > 0


def test_a_limit_draws_the_same_items_each_time(tmp_path):
    path = questions(tmp_path, ["a", "b", "c", "d"])
    drawn = [[item.prompt.id for item in task("exact", path, limit=2).items] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2


def test_questions_are_asked_in_one_wording(tmp_path):
    asked = task("exact", questions(tmp_path, ["a", "b", "c", "d"]))
    endings = {item.words.partition("?")[2] for item in asked.items}
    assert len(endings) == 1


def test_two_files_are_two_tasks(tmp_path):
    one, other = (
        questions(tmp_path, ["a"]),
        write(tmp_path, json.loads((tmp_path / "asked.json").read_text()), "b.json"),
    )
    configs = [TaskConfig(name="exact", options={"data": {"name": str(path)}}) for path in (one, other)]
    assert [built.name for built, _ in build(configs, 0)] == ["exact-asked", "exact-b"]


def test_a_bare_question_can_be_asked_as_it_stands(tmp_path):
    pictures(tmp_path, "a.png")
    said = [{"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "cat"}]
    asked = [
        {"image": "a.png", "question": "What is this?", "answer": "cat"},
        {"image": "a.png", "conversations": said},
    ]
    path = write(tmp_path, asked)
    for how, words in ((None, "What is this? Answer in a word or two."), ("none", "What is this?")):
        options = {} if how is None else {"options": {"instructions": how}}
        built = task("exact", path, data={"name": str(path), **options})
        assert [item.prompt.turns[-1].text.strip() for item in built.items] == [words, "And this?"]


def test_all_questions_are_asked_and_none_is_held_out(tmp_path):
    assert len(task("exact", questions(tmp_path, ["a"] * 4 + ["b"] * 300)).items) == 304


def test_an_answer_in_words_is_the_letter_of_its_choice(tmp_path, model):
    shown, meta = ["What?\nA. cat\nB. owl"] * 2, [{"choices": ["cat", "owl"]}] * 2
    path = questions(tmp_path, ["owl", "b"], meta=meta, question=shown)
    found, _ = answered(task("options", path), model, lambda prompt: "B")
    assert [one.right for one in found] == [True, True]
    with pytest.raises(DataError, match="none of the choices"):
        task("options", questions(tmp_path, ["dog"], meta=meta, question=shown))
    with pytest.raises(DataError, match="the question shows none of its choices"):
        task("options", questions(tmp_path, ["owl"], meta=meta))


def test_captions_of_a_single_picture_are_refused(tmp_path):
    pictures(tmp_path, "a.jpg")
    with pytest.raises(DataError, match="rare"):
        task("captions", write(tmp_path, [{"image": "a.jpg", "caption": "A cat."}]))


def mmbench(folder: Path) -> Path:
    """Two questions in every order, as the published TSV holds them: three options, and two."""
    raw = BytesIO()
    Pillow.new("RGB", (64, 64), (9, 9, 9)).save(raw, "png")
    options = {3: ("cat", "owl", "dog"), 8: ("left", "right")}
    groups = {3: "perception", 8: "reasoning"}
    lines = ["index\tquestion\tA\tB\tC\tanswer\tcategory\tl2-category\timage"]
    for index, words in options.items():
        for turn in range(len(words)):
            moved = [*words[turn:], *words[:turn]]
            answer = "ABC"[moved.index(words[1])]
            picture = base64.b64encode(raw.getvalue()).decode() if turn == 0 else str(index)
            cells = [index + turn * 1_000_000, "Which?", *moved, *[""] * (3 - len(moved)), answer, f"kind {index}"]
            lines.append("\t".join(map(str, [*cells, groups[index], picture])))
    path = folder / "MMBench_DEV_EN.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mmbench_wants_every_round_right_and_tells_categories(tmp_path, model):
    asked = task("options", mmbench(tmp_path))
    assert [item.answer for item in asked.items] == ["B", "A", "C", "B", "A"]
    truths = {item.prompt.id: item.answer for item in asked.items}

    def one_round_wrong(prompt: Sample) -> str:
        return "C" if prompt.id == "3#round-1" else truths[prompt.id]

    _, row = answered(asked, model, one_round_wrong)
    assert row.cells["after"].value == pytest.approx(4 / 5)
    assert besides(row) == {
        "circular accuracy": 0.5,
        "circular accuracy: perception": 0.0,
        "circular accuracy: reasoning": 1.0,
        "circular accuracy: kind 3": 0.0,
        "circular accuracy: kind 8": 1.0,
    }
    assert [cut.label.partition(":")[2] for cut in asked.cuts[1:]] == [
        " kind 3, options in every order",
        " kind 8, options in every order",
    ]


def test_the_circular_interval_is_over_pictures_and_not_over_rounds(tmp_path, model):
    """Ten pictures with two questions each, three rounds a question; those about seven are right in every round."""
    pictures(tmp_path, *(f"{place}.png" for place in range(10)))
    asks = {"question": "Which?", "choices": ["cat", "owl", "dog"], "answer": 1}
    rows = [{**asks, "id": f"{place}", "image": f"{place // 2}.png"} for place in range(20)]
    asked = task("options", write(tmp_path, rows), circular=True)
    truths = {item.prompt.id: item.answer for item in asked.items}
    wrong = {f"{place}#round-2" for place in range(14, 20)}
    _, row = answered(asked, model, lambda prompt: "none" if prompt.id in wrong else truths[prompt.id])
    circular = row.besides["circular accuracy"]["after"]
    assert circular is not None and circular.value == pytest.approx(0.7)
    assert row.cells["after"].value == pytest.approx(54 / 60) and (circular.n, circular.clusters) == (20, 10)
    assert circular.low == pytest.approx(0.3968, abs=1e-4)  # Wilson's of 7 right among 10
    assert 0.8922 - 1e-4 < circular.high <= 1


def test_a_limit_counts_questions_and_keeps_their_rounds(tmp_path):
    drawn = task("options", mmbench(tmp_path), limit=1).items
    assert len({item.prompt.id.partition("#")[0] for item in drawn}) == 1 and len(drawn) in (2, 3)


def test_a_file_with_rounds_is_not_turned_again(tmp_path):
    with pytest.raises(ConfigError, match="moved about"):
        task("options", mmbench(tmp_path), circular=True)


def test_no_bare_figure_while_a_reply_is_missing(tmp_path, model):
    """The states of the row, and every further figure of every benchmark, in JSON and in the table."""
    _, row = answered(task("options", mmbench(tmp_path)), model, in_turn("B", None, "C", "B", "A"))
    assert (row.cells["after"].lowest, row.cells["after"].highest) == (0.8, 1.0)
    assert row.besides and all(told == {"after": None} for told in row.besides.values())
    kinds = ["random", "popular"] * 2
    path = questions(tmp_path, ["yes", "no", "yes", "no"], category=kinds)
    _, judged = answered(task("yes-no", path), model, in_turn("yes", None, "no", "no"))
    assert judged.besides and all(told == {"after": None} for told in judged.besides.values())
    (tmp_path / "said").mkdir()
    pictures(tmp_path / "said", "a.jpg", "b.jpg")
    told = write(tmp_path / "said", [{"image": f"{name}.jpg", "caption": f"A cat on {name}."} for name in "ab"])
    found, captioned = answered(task("captions", told), model, in_turn("a cat on a", None))
    assert found[0].right and found[1].right is None and captioned.besides["CIDEr"]["after"] is None
    console = Console(width=160, record=True, file=StringIO())
    console.print(table_of([row, judged, captioned]))
    for line in console.export_text().splitlines():
        if any(name in line for name in ("circular accuracy", "POPE f1", "CIDEr  ", "BLEU-4")):
            assert line.split()[-1] == "scored", line


def test_pope_by_setting(tmp_path, model):
    kinds = ["random", "random", "popular", "popular"]
    path = questions(tmp_path, ["yes", "no", "yes", "no"], category=kinds)
    _, row = answered(task("yes-no", path), model, in_turn("yes", "no", "yes", "yes"))
    figures = besides(row)
    assert figures["POPE f1, random"] == 1 and figures["POPE f1, popular"] == pytest.approx(2 / 3)
    assert figures["POPE f1, mean of settings"] == pytest.approx(5 / 6)


def test_mme_sums_its_groups(tmp_path, model):
    kinds = [kind for kind in sorted(judgements.MME["cognition"]) for _ in range(2)]
    records = [
        {"image": f"{place // 2}.png", "question": f"{place}?", "answer": ("Yes", "No")[place % 2], "category": kind}
        for place, kind in enumerate(kinds)
    ]
    pictures(tmp_path, *(f"{place}.png" for place in range(4)))
    asked = task("yes-no", write(tmp_path, records))
    _, row = answered(asked, model, in_turn("Yes", "Yes", *["Yes", "No"] * 3))
    assert besides(row)["MME cognition"] == besides(row)["MME score"] == pytest.approx(50 + 3 * 200)
    assert "MME perception" not in row.besides


def test_a_limit_keeps_mmes_two_questions_about_a_picture_together(tmp_path, model):
    """The same pictures serve two categories, as in MME; of four pairs, as many are asked as the limit has room for."""
    records = [
        {"image": f"{place // 2 % 2}.png", "question": f"{place}?", "answer": ("Yes", "No")[place % 2]}
        | {"category": ("existence", "count")[place // 4]}
        for place in range(8)
    ]
    pictures(tmp_path, "0.png", "1.png")
    path = write(tmp_path, records)
    for limit, asked in ((1, 2), (4, 4), (5, 4), (100, 8)):
        built = task("yes-no", path, limit=limit)
        _, row = answered(built, model, lambda prompt: "Yes")
        assert len(built.items) == asked and besides(row)["MME score"] in (50, 100)  # half right, no picture wholly
    assert besides(row)["MME existence"] == besides(row)["MME count"] == 50
    assert len(task("yes-no", write(tmp_path, records[:-1]), limit=5).items) == 5  # one picture has one question


def test_seed_bench_of_frames_tells_pictures_from_videos(tmp_path, model):
    pictures(tmp_path, *(f"{place}.png" for place in range(4)))
    asked = {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"))}
    asked |= {"question": "How many?", "answer": "B"}
    frames = ["1.png", "2.png", "3.png"]
    rows = [
        {**asked, "question_id": "1", "data_type": "image", "question_type_id": 5, "image": ["0.png"]},
        {**asked, "question_id": "2", "data_type": "video", "question_type_id": 10, "image": frames},
    ]
    built = task("options", write(tmp_path, rows))
    assert [len(item.prompt.media) for item in built.items] == [1, 3]
    _, row = answered(built, model, in_turn("b.", "C"))
    assert besides(row) == {"accuracy: image": 1.0, "accuracy: video": 0.0}


def test_open_questions_of_mmmu_take_numbers_and_phrases(tmp_path, model):
    meta = [{"open": True, "answers": ["12", "twelve"]}, {"choices": ["cat", "A"]}]
    path = questions(tmp_path, ["12", "A"], meta=meta)
    found, _ = answered(task("options", path), model, in_turn("So x is 12.00", "B"))
    assert [one.right for one in found] == [True, True]  # an answer in words goes before one by letter
