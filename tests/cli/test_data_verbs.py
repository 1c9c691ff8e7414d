"""`isthmus data` on users' own files: check, stats, convert and preview, as a person calls them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console

import composed
import page_checks
from chat_server import running
from isthmus import parts
from isthmus.cli import app, preview, refine
from isthmus.config import Budget, Source
from isthmus.data import formats
from isthmus.training.run import train
from isthmus.training.toy import toy


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `isthmus data WORDS`."""
    monkeypatch.setattr(sys, "argv", ["isthmus", "data", *words])
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two captions of red pictures, as COCO has them."""
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Pillow.new("RGB", (32, 16), "red").save(tmp_path / "pictures" / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 32, "height": 16} for n in range(2)]
    captions = [{"id": n, "image_id": n, "caption": f"<b>red</b> {n}"} for n in range(2)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}, indent=1))
    return path


def test_check_tells_lines_as_text_and_as_json(monkeypatch, capsys, data: Path) -> None:
    images = ["--images", str(data.parent / "pictures")]
    assert run(monkeypatch, "check", str(data), *images) == 0
    (data.parent / "pictures" / "1.png").write_bytes(b"\x89PNG cut")
    capsys.readouterr()
    assert run(monkeypatch, "check", str(data), *images, "--fast") == 0
    assert run(monkeypatch, "check", str(data), *images) == 3
    text = data.read_text().split("\n")
    line = next(number for number, words in enumerate(text, 1) if '"image_id": 1' in words) - 2
    printed = capsys.readouterr().out
    assert f"{data}:{line}: 1: " in printed and "1.png" in printed
    assert run(monkeypatch, "check", str(data), *images, "--json") == 3
    (fault,) = json.loads(capsys.readouterr().out)
    assert fault["line"] == line and fault["file"] == str(data) and fault["remedy"]


def test_check_tells_alike_faults_once_and_where_pictures_lie(monkeypatch, capsys, data: Path) -> None:
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": f"{number}.png", "conversations": said} for number in (0, 5, 6, 7, 8)]
    rows.append({"id": "own", "conversations": [{"from": "human", "value": "red?"}]})
    file = data.parent / "missing.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pictures = data.parent / "pictures"
    assert run(monkeypatch, "check", str(file)) == 3
    first, where, *lines = capsys.readouterr().out.splitlines()
    assert (
        first.startswith(f"{file}:1: no picture 0.png") and where == f"0.png lies in {pictures}/: --images {pictures}"
    )
    assert [line.split(":")[1] for line in lines[:2]] == ["2", "3"] and f"{file}:6: own: " in lines[2]
    assert len(lines) == 4 and lines[3].startswith("2 more like that of line 1: no picture")
    assert run(monkeypatch, "check", str(file), "--all") == 3
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(str(file))]) == 6
    file.write_text(json.dumps({"image": "a" * 5000, "conversations": said}))
    assert run(monkeypatch, "check", str(file)) == 3 and "no picture aaa" in capsys.readouterr().out
    file.write_text("")
    assert run(monkeypatch, "check", str(file)) == 3
    assert "holds no conversation" in capsys.readouterr().err


def test_check_tells_the_byte_of_a_record_in_a_file_of_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    file = tmp_path / "one.json"
    file.write_text(json.dumps([{"conversations": said, "image": f"{number}.png"} for number in range(2)]))
    second = file.read_text().index("{", file.read_text().index("0.png"))
    assert run(monkeypatch, "check", str(file)) == 3
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{file}:1: one:1@{second}: no picture 1.png")


def test_check_tells_a_fault_as_soon_as_it_is_found(monkeypatch, capsys, data: Path) -> None:
    def each(form: formats.Form) -> Iterator[formats.Fault]:
        yield formats.Fault(7, "a", "cause", "remedy")
        assert capsys.readouterr().out == f"{data}:7: a: cause; remedy\n"

    monkeypatch.setattr(formats, "each", each)
    assert run(monkeypatch, "check", str(data), "--fast") == 3


def test_check_warns_once_of_ids_that_repeat(monkeypatch, capsys, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "yes"}]
    shards = [tmp_path / "rows" / f"{name}.jsonl" for name in "ab"]
    shards[0].parent.mkdir()
    for file, ids in zip(shards, ("xyz", "uyxyv")):
        rows = [{"id": name, "conversations": said, "meta": {"file": "theirs.pdf"}} for name in ids]
        file.write_text("\n".join(map(json.dumps, rows)))
    for words in ((), ("--fast",), ("--json",)):
        assert run(monkeypatch, "check", str(shards[0].parent), *words) == 0
        told = capsys.readouterr()
        (warning,) = told.err.splitlines()
        assert warning.startswith(f"warning: 3 samples have an id that was there before, first {shards[1]}:2,")
        assert f"that of {shards[0]}:2" in warning and "warning" not in told.out
    assert run(monkeypatch, "check", str(shards[0])) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_long_work_on_a_terminal_alone(monkeypatch, capsys, data: Path, terminal: bool) -> None:
    monkeypatch.setattr(refine, "QUICK", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    images = ["--images", str(data.parent / "pictures")]
    writes = ["--images", str(data.parent / "pictures"), "-k", "words=1.."]
    for title, *words in (
        ("checking", "check", str(data), *images),
        ("counting", "stats", str(data), *images),
        ("writing", "convert", str(data), str(data.parent / "a.json"), "--to", "llava", *images),
        ("measuring", "filter", str(data), str(data.parent / "b.json"), *writes),
    ):
        assert run(monkeypatch, *words) == 0
        told = capsys.readouterr().err
        assert (title in told and "2/" in told) if terminal else told == ""


def test_unknown_settings_are_told(monkeypatch, capsys, data: Path) -> None:
    assert run(monkeypatch, "check", str(data), "-s", "fromat=vqav2") == 2
    assert "did you mean 'format'" in capsys.readouterr().err


def test_stats_of_a_file(monkeypatch, capsys, data: Path) -> None:
    assert run(monkeypatch, "stats", str(data), "--images", str(data.parent / "pictures"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 2 and told["kinds"] == {"caption": 2} and told["width"]["greatest"] == 32
    assert run(monkeypatch, "stats", str(data), "--images", str(data.parent / "pictures")) == 0
    assert "words of an answer" in capsys.readouterr().out


def test_convert_and_read_again(monkeypatch, capsys, data: Path) -> None:
    out = data.parent / "new" / "out.json"
    words = ["convert", str(data), str(out), "--images", str(data.parent / "pictures")]
    assert run(monkeypatch, *words, "--to", "llava") == 0
    assert [sample.turns[1].text for sample in formats.load(out)] == ["<b>red</b> 0", "<b>red</b> 1"]
    assert run(monkeypatch, *words, "--to", "llava") == 2
    assert run(monkeypatch, *words, "--to", "xml") == 2
    assert "llava, messages, parquet" in capsys.readouterr().err


def test_preview_shows_tokens_and_pictures(monkeypatch, capsys, data: Path, tmp_path: Path) -> None:
    source = {"name": str(data), "images": str(data.parent / "pictures")}
    stage = {"name": "sft", "data": [source], "budget": {"steps": 1}, "train": {"connectors.*": 1e-3}}
    tree = composed.recipe().model_dump(mode="json") | {"stages": [stage]}
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps(tree))
    monkeypatch.setattr(parts, "load_llm", lambda *given: pytest.fail("weights were read"))
    assert run(monkeypatch, "preview", str(recipe), "-n", "2") == 0
    printed = capsys.readouterr().out
    assert "<b>red</b> 0" in printed and "[image × " in printed
    page = tmp_path / "page.html"
    assert run(monkeypatch, "preview", str(recipe), "-n", "2", "--html", str(page)) == 0
    text = page.read_text()
    assert text.count('<img src="data:image/') == 2 and "&lt;b&gt;" in text and "<b>red" not in text
    assert text.count('<span class="medium">[image × ') == 2 and "<script" not in text
    assert re.search(r'<span class="learnt">[^<]*&lt;b&gt;red', text) and '<span class="read">' in text
    assert page_checks.faults(text) == []


def test_preview_shows_what_a_run_makes_of_a_sample(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    said = [
        {"role": role, "content": words * times}
        for times in (300, 1)
        for role, words in (("user", "red? "), ("assistant", "yes "))
    ]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"id": "a[/x]", "messages": said}))
    stage = {"name": "sft", "data": [{"name": str(file)}], "budget": {"steps": 1}, "train": {"connectors.*": 1e-3}}
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps(composed.recipe().model_dump(mode="json") | {"stages": [stage]}))
    for overlong, told in (
        ("drop", "left out: longer"),
        ("oldest", "without its oldest"),
        ("error", "stops training:"),
    ):
        short = ["stages.sft.max_length=100", f"stages.sft.overlong={overlong}"]
        assert run(monkeypatch, "preview", str(recipe), "-n", "1", *short) == 0
        printed = capsys.readouterr().out
        assert "a[/x]" in printed and told in printed
    page = tmp_path / "page.html"
    assert run(monkeypatch, "preview", str(recipe), "-n", "1", "--html", str(page), *short) == 0
    assert "stops training:" in page.read_text()


def test_filter_counts_what_each_rule_drops(monkeypatch, capsys, data: Path, tmp_path: Path) -> None:
    words = ["filter", str(data), str(tmp_path / "kept.jsonl"), "--images", str(data.parent / "pictures")]
    numbers = tmp_path / "not/yet/numbers.jsonl"
    rules = ["-k", "words=1..", "-k", "same-picture=..0", "--numbers", str(numbers), "--json"]
    assert run(monkeypatch, *words, *rules) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"samples": 2, "kept": 1, "dropped": {"words": 0, "same-picture": 1}, "faulty": 0}
    (left,) = formats.load(tmp_path / "kept.jsonl")
    assert left.turns[1].text == "<b>red</b> 0"
    rows = [json.loads(line) for line in numbers.read_text().splitlines()]
    assert [row["same-picture"] for row in rows] == [0, 1] and rows[0]["words"] == 2
    assert run(monkeypatch, *words, "-k", "score=0.2..") == 2
    assert "--clip FOLDER" in capsys.readouterr().err
    assert run(monkeypatch, "filter", str(data), str(tmp_path / "out.xml"), *words[3:], "-k", "words=1..") == 2
    assert run(monkeypatch, "filter", str(data), str(tmp_path / "none.jsonl"), *words[3:], "-k", "words=..1") == 3
    assert "no sample is left of 2 (words dropped 2)" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


def test_filter_leaves_out_what_a_test_set_shows(monkeypatch, capsys, data: Path, tmp_path: Path) -> None:
    pictures = data.parent / "pictures"
    noise = Pillow.effect_noise((32, 16), 90)
    noise.save(pictures / "0.png")
    noise.resize((64, 32)).save(data.parent / "held.png")
    (data.parent / "held.json").write_text(json.dumps([{"image": "held.png", "caption": "something else"}]))
    words = ["filter", str(data), str(tmp_path / "kept.jsonl"), "--images", str(pictures), "--json"]
    held = ["--against", str(data.parent / "held.json")]
    assert run(monkeypatch, *words, *held, "-k", "words=1..") == 2
    assert "add -k same-picture=..0" in capsys.readouterr().err
    assert run(monkeypatch, *words, *held, "-k", "same-picture=..0") == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"same-picture": 1}
    assert [sample.turns[1].text for sample in formats.load(tmp_path / "kept.jsonl")] == ["<b>red</b> 1"]


def test_make_writes_what_a_speaker_says_and_tells_its_cost(monkeypatch, capsys, data: Path, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    table = json.loads(data.read_text())
    for number, entry in enumerate(table["annotations"]):
        entry["caption"] = f"A plain red picture, number {number}."
    data.write_text(json.dumps(table))
    boxes = [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [8, 4, 8, 4]}]
    regions = tmp_path / "instances.json"
    regions.write_text(
        json.dumps({"images": table["images"], "annotations": boxes, "categories": [{"id": 3, "name": "spot"}]})
    )
    out = tmp_path / "made.jsonl"
    with running() as server:
        server.reply = lambda body: "Question: Which colour?\nAnswer: Red."
        words = [
            "make",
            str(data),
            str(regions),
            str(out),
            "writer",
            "--images",
            str(data.parent / "pictures"),
            "--kinds",
        ]
        assert run(monkeypatch, *words, "conversation", "--endpoint", server.endpoint) == 0
        assert run(monkeypatch, *words, "poem", "--endpoint", server.endpoint) == 2
    told = sorted(body["messages"][1]["content"] for body in server.bodies)
    assert told == [
        "A plain red picture, number 0.",
        "A plain red picture, number 1.\n\nspot: [0.25, 0.25, 0.50, 0.50]",
    ]
    printed = capsys.readouterr()
    assert "2 requests" in printed.err and "2 samples about 2 pictures" in printed.out
    assert [sample.turns[1].text for sample in formats.load(out)] == ["Red.", "Red."]


def test_probe_ranks_pools_of_a_file(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    recipe = toy(tmp_path, rows=30)
    data = recipe.stages[-1].data[0].name
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] += " yes" * (number % 7)
    Path(data).write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "recipe.json"
    recipe.save(file)
    words = ["probe", str(file), data, "--on", data, "--steps", "2", "--seeds", "1", "--json", "--device", "cpu"]
    assert run(monkeypatch, *words, "--operators", "words,side") == 0
    printed = capsys.readouterr()
    (report,) = json.loads(printed.out)
    assert "side: not three different numbers" in printed.err
    assert {one["part"] for one in report["pools"]} == {"words low", "words middle", "words high", "random"}
    # two steps of four draw eight samples, fewer than a third of thirty
    assert report["compared"] == 3 and all(one["size"] == 8 and one["mean"] > 0 for one in report["pools"])
    assert run(monkeypatch, *words, "--operators", "side") == 3
    assert "name other --operators" in capsys.readouterr().err


def test_a_picture_in_the_terminal_has_two_pixels_per_cell() -> None:
    picture = Pillow.new("RGB", (64, 64), "red")
    picture.paste((0, 0, 255), (0, 32, 64, 64))
    text = preview.blocks(picture)
    lines = text.plain.split("\n")
    assert len(lines) == 17 and set(lines[0]) == {"▀"} and len(lines[0]) == preview.COLUMNS
    styles = [str(span.style) for span in text.spans]
    assert styles[0] == "#ff0000 on #ff0000" and styles[-1] == "#0000ff on #0000ff"


def test_training_on_tars_is_training_on_the_file_they_were_made_of(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    recipe = toy(tmp_path, rows=24)
    data = recipe.stages[0].data[0].name
    assert run(monkeypatch, "convert", data, str(tmp_path / "shards"), "--to", "webdataset") == 0
    weights = []
    for place in (data, str(tmp_path / "shards")):
        stage = recipe.stages[0].but(data=(Source(name=place),), budget=Budget(steps=3))
        folder = tmp_path / f"run-{len(weights)}"
        model = train(recipe.but(stages=(stage,)), folder, torch.device("cpu"), Console(quiet=True))
        weights.append({name: value for name, value in model.state_dict().items() if name.startswith("connectors.")})
    assert weights[0].keys() and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
