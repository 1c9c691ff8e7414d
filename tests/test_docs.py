"""The documents are true: their code runs, their commands parse, their links lead somewhere, their errors exist."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image as Pillow
from typer.testing import CliRunner

import composed
import isthmus
import test_contract
import tiny
from chat_server import KEY, running
from isthmus import aligner as aligners
from isthmus.cli.app import app, main
from isthmus.config import read
from isthmus.recipes import BOOK
from test_contract import Joint

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS: Any = typer.main.get_command(app)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(what stands behind the language, content) of a page's fenced blocks."""
    for found, info, content in FENCE.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield info, content


every_page = pytest.mark.parametrize("page", PAGES, ids=name)
RUNNABLE = [page for page in PAGES if any("run" in info.split() for info, _ in blocks(page, "python"))]

# ---------------------------------------------------------------------------------------------- code


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder in which every name that the documents use is there: tiny models, a trained one, pictures, a file."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "pages-1.0.dist-info").mkdir()
    (folder / "pages-1.0.dist-info/METADATA").write_text("Name: pages\nVersion: 1.0\n")
    points = "\n".join(["[isthmus.aligners]", *(f"{name} = {name}" for name in ADDED)])
    (folder / "pages-1.0.dist-info/entry_points.txt").write_text(points)
    tiny.vision_folder(folder / "google/siglip2-base-patch16-224", "siglip")
    tiny.llm_folder(folder / "Qwen/Qwen3-0.6B", "qwen3")
    composed.model("llama").save_pretrained(folder / "runs/demo/sft/model")
    Pillow.new("RGB", (40, 30), "orange").save(folder / "cat.png")
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"id": str(number), "image": "cat.png", "conversations": talk} for number in range(4)]
    (folder / "my.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def there(stand_ins, monkeypatch) -> Path:
    """The documents' working directory, in which joints that a page writes are those of an installed package."""
    monkeypatch.chdir(stand_ins)
    monkeypatch.setenv("ISTHMUS_HOME", str(stand_ins / "home"))
    monkeypatch.syspath_prepend(stand_ins)
    return stand_ins


def write_files(page: Path, folder: Path) -> None:
    """The blocks of a page that are marked `file=NAME`."""
    for language in ("python", "yaml"):
        for info, content in blocks(page, language):
            for word in info.split():
                if word.startswith("file="):
                    (folder / word.removeprefix("file=")).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_code_runs(page, there):
    write_files(page, there)
    scope = {"__name__": "documents"}
    for info, content in blocks(page, "python"):
        if "run" in info.split():
            exec(compile(content, str(page), "exec"), scope)  # noqa: S102 - our own pages


NOT_RUN = [
    pytest.param(content, id=f"{name(page)}-{place}")
    for page in PAGES
    for place, (info, content) in enumerate(blocks(page, "python"))
    if not {"run"} & set(info.split()) and "file=" not in info
]


@pytest.mark.parametrize("content", NOT_RUN)
def test_code_that_is_not_run_imports_what_is_there_and_calls_it_by_its_arguments(content):
    text = textwrap.dedent(content)
    tree = ast.parse(f"{{{text}}}" if text.startswith('"') else text)  # an entry of a mapping
    imports: list[Any] = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        for module in [node.module] if isinstance(node, ast.ImportFrom) else [word.name for word in node.names]:
            pytest.importorskip(str(module).partition(".")[0])  # an extra that is not installed
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), "documents", "exec"), scope)  # noqa: S102 - our own pages
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, *rest = ast.unparse(call.func).split(".")
        if first in scope and all(word.isidentifier() for word in rest):
            called = functools.reduce(getattr, rest, scope[first])
            inspect.signature(called).bind(*call.args, **{word.arg: word.value for word in call.keywords if word.arg})


@pytest.mark.parametrize(
    ("page", "address", "key"),
    [
        ("docs/speakers.md", "https://api.openai.com/v1", KEY),
        ("docs/serving.md", "http://127.0.0.1:8000/v1", "choose-one"),
    ],
)
def test_code_that_asks_a_server_asks_it_as_the_protocol_says(page, address, key, there, monkeypatch):
    """A small server on this machine stands in for the page's."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = next(content for _, content in blocks(ROOT / page, "python"))
    assert content.count(address) == 1
    with running() as server:
        server.key = key
        exec(compile(content.replace(address, server.endpoint), page, "exec"), {})  # noqa: S102 - our own pages
    assert len(server.bodies) == 1
    assert set(server.faults) <= {"no max_tokens"}  # our own speaker always sends it; the protocol leaves it open


def test_readme_shows_how_to_use_and_how_to_add():
    shown = "".join(content for _, content in blocks(ROOT / "README.md", "python"))
    for word in ("isthmus.load(", "isthmus.compose(", "Turn.say(", "AutoModel", "processor", ".generate(", "Aligner)"):
        assert word in shown, word


ADDED = {"folded": Joint("folded", {}, ("llama",)), "brightened": Joint("brightened", {}, ("llama",))}
PROMISES = [
    test_contract.test_newborn_equals_the_bare_llm_on_text,
    test_contract.test_packed_equals_unpacked_per_segment,
    test_contract.test_changing_an_image_changes_nothing_before_it,
    test_contract.test_greedy_generation_equals_a_loop_by_hand,
    test_contract.test_recomputed_gradients_equal_plain_ones,
    test_contract.test_everything_that_should_learn_has_a_gradient_and_sleepers_are_named,
]


@pytest.mark.parametrize("joint", ADDED)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_page_about_joints_adds_joints_that_keep_the_contract(promise, joint, there, monkeypatch):
    write_files(ROOT / "docs/adding_a_joint.md", there)
    monkeypatch.setitem(test_contract.JOINTS, joint, ADDED[joint])
    promise(joint, "llama")


def test_the_same_joint_stands_in_the_readme(there):
    shown = next(content for _, content in blocks(ROOT / "README.md", "python") if "class Folded" in content)
    scope: dict = {"__name__": "readme"}
    exec(compile(shown, "README.md", "exec"), scope)  # noqa: S102 - our own page
    page = next(content for info, content in blocks(ROOT / "docs/adding_a_joint.md", "python") if "folded.py" in info)
    assert scope["Folded"].Options.model_fields.keys() == {"span"}
    forwards = [re.search(r"self\.project\(x_NSE.*\)", text) for text in (shown, page)]
    assert forwards[0] and forwards[1] and forwards[0][0] == forwards[1][0]


# ---------------------------------------------------------------------------------------------- recipes in YAML


def test_the_recipe_in_the_page_about_training_trains(there):
    write_files(ROOT / "docs/training.md", there)
    (there / "pictures").mkdir(exist_ok=True)
    shutil.copy("cat.png", "pictures/cat.png")
    assert [stage.name for stage in read(Path("mine.yaml")).stages] == ["align", "sft"]
    small = [f"stages.{name}.budget={{steps: 2}}" for name in ("align", "sft")]
    ran = CliRunner().invoke(app, ["train", "mine.yaml", *small, "--out", "runs/mine", "--device", "cpu"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    model = isthmus.load("runs/mine/sft/model")
    assert [adapter["name"] for adapter in model.config.lora] == ["sft"]
    listed = FENCE.search((ROOT / "docs/training.md").read_text().split("## What a run leaves")[1])
    assert listed
    for file in ("run.json", "seconds.json", "report.html", "report.json"):
        assert file in listed[3] and Path("runs/mine", file).is_file(), file
    for file in ("manifest.json", "metrics.jsonl", "curves.png", "checkpoints", "model"):
        assert file in listed[3] and Path("runs/mine/align", file).exists(), file


# ---------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> list[str]:
    """Every `isthmus VERB ...` of a page, in shell blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    lines = [line.split(" #")[0].strip() for _, content in blocks(page, "bash") for line in content.splitlines()]
    lines += [" ".join(found.split()) for found in re.findall(r"`(isthmus [^`]*)`", FENCE.sub("", text))]
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?isthmus ", line)]


@every_page
def test_commands_parse(page):
    for line in commands(page):
        verb, *words = shlex.split(line)[1:]
        if verb == "--help":
            continue
        command = COMMANDS.commands[verb]
        if verb == "data" and words:
            command, words = command.commands[words[0]], words[1:]
        if words:  # a verb that is only mentioned has no arguments
            given = command.make_context(line, words).params
            if given.get("recipe") in BOOK:
                told = (given["more"] if verb == "plan" else given["overrides"]) or []
                further = [word for word in told if verb == "plan" and "=" not in word]
                for name in (given["recipe"], *further):
                    BOOK[name]().override([word for word in told if word not in further])


def test_the_parser_of_this_test_refuses_what_is_wrong():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS.commands["chat"].make_context("chat", ["MODEL", "--picture", "x"])


def test_readme_lists_the_verbs():
    text = (ROOT / "README.md").read_text().split("## Verbs")[1].split("\n## ")[0]
    assert re.findall(r"^\| `isthmus (\w+)`", text, re.MULTILINE) == list(COMMANDS.commands)
    row = next(line for line in text.splitlines() if line.startswith("| `isthmus data`"))
    assert set(COMMANDS.commands["data"].commands) <= set(re.findall(r"`(\w+)`", row))


# ---------------------------------------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@every_page
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(found), target


@every_page
def test_files_that_are_named_exist(page):
    planned = {"src/isthmus/aligners/folded.py", "src/isthmus/recipes/folded.py"}
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]+)`", text):
        assert target in planned or (ROOT / target).exists(), target


# ---------------------------------------------------------------------------------------------- facts


def causes() -> set[str]:
    """The causes of all errors in the source, with … for what varies."""
    found = set()
    for file in Path(isthmus.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CAUSED and node.args:
                found.add(template(node.args[0]) + (": …" if ast.unparse(node.func) == "refuse" else ""))
    return found


CAUSED = {"ConfigError", "DataError", "IsthmusError", "NotFinite", "NothingToLearn", "Untraceable", "Wrong", "refuse"}
"""What is called with a cause; `refuse` of exports puts a reason behind it."""


def template(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return re.sub("…+", "…", text)


def test_troubleshooting_is_keyed_by_errors_that_exist():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    keys = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(keys) > 40 and len(set(keys)) == len(keys)
    known = causes()
    assert [key for key in keys if re.sub("…+", "…", key) not in known] == []


def test_the_house_in_the_readme_is_the_one_that_stands():
    from test_house import FLOORS

    text = (ROOT / "README.md").read_text().split("## The house")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \d+ \| ([^|]*) \|", text, re.MULTILINE)
    named = [{room.split("/")[0] for room in re.findall(r"`([\w/*]+)`", row)} for row in rows]
    built = {path.stem for path in Path(isthmus.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == [floor & built for floor in FLOORS if floor & built]


def test_the_answers_in_the_page_about_joints_are_those_of_the_class():
    text = (ROOT / "docs/adding_a_joint.md").read_text().split("## A joint from")[0]
    asked = set(re.findall(r"^\| [^|]* \| `(\w+)", text, re.MULTILINE))
    answers = {name for name in vars(aligners.Aligner) if not name.startswith("_")} - {"Options"}
    assert asked == answers
    for call in re.findall(r"`(\w+\([\w, ]+\))`", text):
        method, _, arguments = call.removesuffix(")").partition("(")
        parameters = list(inspect.signature(getattr(aligners.Aligner, method)).parameters)[1:]
        assert arguments.split(", ") == parameters, call


def test_embedded_page_names_the_pinned_packages():
    from isthmus.assets.packages import GROUPS

    text = (ROOT / "docs/embedded.md").read_text()
    for package in (package for group in GROUPS.values() for package in group):
        row = next(line for line in text.splitlines() if f"`{package.name}` {package.version} " in line)
        (size,) = map(float, re.findall(r"([\d.]+) MB", row))
        assert abs(size - package.size / 1e6) <= (0.5 if size >= 10 else 0.05), row
        assert re.sub(r"[^A-Z0-9.]", "", package.licence.upper()) in re.sub(r"[^A-Z0-9.]", "", row.upper())


def test_the_picture_is_plain_svg():
    import xml.etree.ElementTree as Tree

    tree = Tree.parse(ROOT / "docs/isthmus.svg").getroot()
    assert tree.tag.endswith("svg") and not [item for item in tree.iter() if item.tag.endswith(("script", "image"))]


def test_the_first_screen_of_the_readme_says_what_it_is_for():
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:42])
    for words in (
        "joint",
        "evidence",
        "isthmus.svg",
        "make demo",
        "make test",
        "report.html",
        "isthmus data fetch demo",
    ):
        assert words in screen, words


def test_help_of_every_verb_answers():
    runner = CliRunner()
    verbs = [[verb] for verb in COMMANDS.commands] + [["data", verb] for verb in COMMANDS.commands["data"].commands]
    for verb in verbs:
        assert runner.invoke(app, [*verb, "--help"]).exit_code == 0, verb


def test_exit_codes_are_those_of_the_readme(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["isthmus", "plan", "nope"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 2
    script = Path(sys.executable).with_name("isthmus")
    ran = subprocess.run([script, "data", "check", "nope.json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 3 and ran.stderr.count("\n") == 2, ran.stderr
