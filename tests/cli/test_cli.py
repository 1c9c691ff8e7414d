"""The command line as a person meets it: exit codes, two-line errors, and verbs end to end on tiny parts."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image as Pillow

import composed
from isthmus import recipes
from isthmus.cli import app
from isthmus.config import read
from isthmus.training.run import Run


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `isthmus WORDS`."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *words])
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_version_is_the_packages(monkeypatch, capsys):
    from importlib.metadata import version

    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"isthmus {version('isthmus')}\n"


def test_the_demo_lasts_as_long_as_its_recipe_says():
    from isthmus.cli.train import demo

    lasts = inspect.signature(demo).parameters["minutes"].default
    assert lasts == pytest.approx(sum(stage.budget.minutes for stage in recipes.named("demo").stages))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A LLaVA JSON of eight pictures whose colour is the answer."""
    records = []
    for number in range(8):
        colour = ("red", "blue")[number % 2]
        Pillow.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records, indent=1))
    return file


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """A recipe of two short stages on tiny parts and the user's own data."""
    stage = {"data": [str(data)], "batch_size": 4, "budget": {"steps": 3}}
    tree = composed.recipe().model_dump(mode="json") | {
        "name": "mine",
        "stages": [
            {"name": "align", "train": {"connectors.*": 1e-2}, "template": "plain", **stage},
            {
                "name": "sft",
                "train": {"connectors.*": 1e-3, "llm.*self_attn.*": {"lr": 1e-3, "mode": {"r": 2}}},
                **stage,
            },
        ],
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(tree))
    return file


def test_train_resume_chat_and_export(monkeypatch, capsys, tmp_path, recipe):
    out = tmp_path / "my [red] runs; it's $HOME"
    assert run(monkeypatch, "train", str(recipe), "--out", str(out), "--device", "cpu") == 0
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("chat "))
    assert shlex.split(command)[3:] == [str(out / "sft" / "model"), "--image", "PICTURE.png"]  # to be pasted as it is
    assert (out / "report.json").is_file() and (out / "align" / "model" / "config.json").is_file()
    weights = (out / "sft" / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()

    assert run(monkeypatch, "train", str(recipe), "--out", str(out), "--device", "cpu") == 0
    assert "finished" in capsys.readouterr().out
    assert (out / "sft" / "model" / "model.safetensors").read_bytes() == weights

    asked = ["chat", str(out / "sft" / "model"), "--image", str(tmp_path / "0.png"), "--prompt", "Which colour?"]
    assert run(monkeypatch, *asked, "--max-tokens", "4", "--device", "cpu") == 0

    exported = tmp_path / "llava"
    assert run(monkeypatch, "export", str(out / "sft" / "model"), str(exported)) == 0
    assert run(monkeypatch, "import", str(exported), str(tmp_path / "back")) == 0
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("stages", [{}, {"stages": []}])
def test_a_recipe_without_stages_is_refused_before_anything_is_done(monkeypatch, capsys, tmp_path, recipe, stages):
    tree = json.loads(recipe.read_text())
    del tree["stages"]
    recipe.write_text(json.dumps(tree | stages))
    assert run(monkeypatch, "train", str(recipe), "--out", str(tmp_path / "run")) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == "error: the recipe mine has no stages: nothing would be trained" and remedy.startswith("remedy: ")
    assert not (tmp_path / "run").exists()
    assert run(monkeypatch, "data", "preview", str(recipe)) == 2


def test_another_recipe_in_the_same_folder_is_refused(monkeypatch, capsys, tmp_path, recipe):
    out = str(tmp_path / "run")
    assert run(monkeypatch, "train", str(recipe), "--out", out) == 0
    assert run(monkeypatch, "train", str(recipe), "seed=1", "--out", out) == 2
    told = capsys.readouterr().err
    assert "another recipe" in told and f"`isthmus train {out}` goes on with that one" in told and "delete" not in told


@pytest.mark.parametrize("how", [None, KeyboardInterrupt])
def test_a_folder_goes_on_with_the_recipe_that_it_keeps(monkeypatch, capsys, tmp_path, recipe, how):
    out, trained = tmp_path / "its run", []

    def interrupted(self, model, look):
        trained.append((self.recipe, self.folder))
        if how is not None:
            raise how

    monkeypatch.setattr(Run, "train", interrupted)
    words = ("stages.sft.lr=5e-4", "seed=3", "engine.keep=5", "--out", str(out), "--device", "cpu")
    assert run(monkeypatch, "train", str(recipe), *words) == 130
    line = capsys.readouterr().out.strip().splitlines()[-1]
    monkeypatch.chdir(tmp_path.parent)
    name, *line = shlex.split(line)
    assert name == "isthmus" or name == sys.argv[0]
    assert line == ["train", str(out), "--device", "cpu"] and run(monkeypatch, *line) == 130
    first, second = trained
    assert first == second and first[0].seed == 3 and first[0].engine.keep == 5


def test_a_folder_that_is_no_run_is_told_so(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "train", str(tmp_path)) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert run(monkeypatch, "train", str(tmp_path)) == 2
    assert "run.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("stages.sft.train={connector.*: 1e-3}", "stage sft: 'connector.*' matches no parameter"),
        ("stages.sft.data=[nowhere.json]", "nowhere.json"),
    ],
    ids=["glob", "file"],
)
def test_a_fault_of_a_later_stage_is_told_first_and_locks_no_folder(
    monkeypatch, capsys, tmp_path, recipe, wrong, cause
):
    out, trained = tmp_path / "run", []
    monkeypatch.setattr(Run, "train", lambda self, model, look: trained.append(self.recipe))  # None: interrupted
    command = ("train", str(recipe), "--out", str(out), "--device", "cpu")
    assert run(monkeypatch, *command, wrong) in (2, 3)
    assert cause in capsys.readouterr().err and trained == []
    assert {path.name for path in out.iterdir()} <= {"run.json", "lock"}
    assert run(monkeypatch, *command) == 130 and trained == [read(recipe)]
    assert json.loads((out / "run.json").read_text())["fingerprint"] == trained[0].fingerprint()


@pytest.mark.parametrize(
    ("words", "code", "cause", "remedy"),
    [
        (["plan", "lava"], 2, "did you mean 'llava'?", "isthmus recipes"),
        (["plan", "llava", "stages.algn.lr=1"], 2, "no stages named 'algn'; did you mean 'align'?", "align"),
        (["train", "nope.yaml"], 2, "no file nope.yaml", "isthmus recipes"),
        (["plan", "llava", "stages.sft.learning_rate=1"], 2, "it is called 'stages.sft.lr' here", "--schema"),
        (["recipes", "--brief"], 2, "--brief is about one recipe", "--show llava"),
        (["plan", "llava", "aligner=mine"], 2, "no aligner named 'mine'", "in that process alone"),
        (["plan", "llava", "sede=1"], 2, "unknown key 'sede'; did you mean 'seed'?", "--schema"),
        (["plan", "llava", "stages.align.train={connector.*: 1e-3}"], 2, "matches no parameter", "connectors"),
        (
            ["chat", "no/such/model", "--prompt", "x"],
            2,
            "neither a folder nor a model",
            "embedded part",
        ),
    ],
)
def test_errors_are_a_cause_and_a_remedy(monkeypatch, capsys, words, code, cause, remedy):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, *words) == code
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error.startswith("error: ") and cause in error
    assert hint.startswith("remedy: ") and remedy in hint


def test_a_path_that_cannot_be_written_is_a_cause_and_a_remedy(monkeypatch, capsys, tmp_path, data):
    (tmp_path / "file").touch()
    words = ["-k", "words=1..", "--numbers", str(tmp_path / "file/numbers.jsonl")]
    assert run(monkeypatch, "data", "filter", str(data), str(tmp_path / "out.jsonl"), *words) == 1
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error == f"error: {tmp_path}/file: File exists" and hint.startswith("remedy: check the path")


def test_the_last_line_names_the_program_as_it_was_called(monkeypatch, tmp_path):
    from isthmus.cli.train import _called

    monkeypatch.setattr(sys, "argv", [".venv/bin/isthmus", "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _called() == ".venv/bin/isthmus"
    (tmp_path / "isthmus").touch(0o755)
    assert _called() == "isthmus"


def test_data_check_names_line_and_repair(monkeypatch, capsys, data):
    assert run(monkeypatch, "data", "check", str(data)) == 0
    records = json.loads(data.read_text())
    records[2]["conversations"][0]["value"] = "Which colour?"
    data.write_text(json.dumps(records, indent=1))
    assert run(monkeypatch, "data", "check", str(data)) == 3
    printed = capsys.readouterr()
    line = next(n for n, text in enumerate(data.read_text().splitlines(), 1) if '"id": "2"' in text) - 1
    assert f"{data}:{line}: 2:" in printed.out and "<image>" in printed.out


def test_a_damaged_checkpoint_is_named(monkeypatch, capsys, tmp_path):
    composed.model().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 1
    file.write_bytes(blob)
    assert run(monkeypatch, "chat", str(tmp_path / "m"), "--prompt", "x") == 1
    assert f"{file}: damaged" in capsys.readouterr().err


def test_plan_counts_what_the_paper_counts(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, "plan", "llava-1.5-7b", "--no-steps", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    hand = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert planned["parts"]["connectors.image"] == hand == planned["stages"][0]["trained"]
    assert planned["tokens"] == {"image": 576}


def test_recipes_round_trip_through_what_is_shown(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "recipes", "--show", "demo") == 0
    file = tmp_path / "demo.yaml"
    file.write_text(capsys.readouterr().out)
    assert read(file).fingerprint() == recipes.named("demo").fingerprint()


@pytest.mark.parametrize("name", ["demo", "llava", "llava-1.5-7b", "lion"])
def test_a_brief_recipe_is_the_same_and_short(monkeypatch, capsys, tmp_path, name):
    assert run(monkeypatch, "recipes", "--show", name, "--brief") == 0
    file, text = tmp_path / "brief.yaml", capsys.readouterr().out
    file.write_text(text)
    assert read(file).fingerprint() == recipes.named(name).fingerprint()
    assert run(monkeypatch, "recipes", "--show", name) == 0
    assert f"name: {name}" in text and len(text) < 0.8 * len(capsys.readouterr().out)


def test_the_list_has_two_headings_and_tells_recipes_apart(monkeypatch, capsys):
    assert len(set(recipes.titles().values())) == len(recipes.BOOK) and recipes.APART.keys() <= recipes.BOOK.keys()
    assert run(monkeypatch, "recipes") == 0
    told = capsys.readouterr().out
    small, large = told.split("in the authors' size")
    assert "on embedded parts" in small and "minigpt4-first " in small and "minigpt4-first-7b" in large
