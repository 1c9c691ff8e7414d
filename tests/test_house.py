"""Who may import whom, walked over the source's own import statements; and the manners that a grep can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import isthmus
from isthmus import aligner, objectives
from isthmus.types import ConfigError

ROOT = Path(isthmus.__file__).parent

FLOORS: list[set[str]] = [
    {"types", "errors", "config", "overrides", "registry", "files", "assets", "torchfile", "pretrained"},
    {
        "graft",
        "lora",
        "quantised",
        "sites",
        "fuse",
        "rows",
        "tokens",
        "kernels",
        "kernels_linear",
        "objectives",
        "data",
        "cards",
    },
    {"encoders", "connectors", "generators"},
    {"aligner", "parts", "processor"},
    {"aligners", "model", "generation", "storage", "changes", "assembly"},
    {"prepare", "exporting"},
    {"training"},
    {"planning", "costs", "forecast"},
    {"evaluation", "speakers", "compress", "federate", "serving", "apps", "parity"},
    {"experiment"},
    {"recipes", "comparing"},
    {"papers"},
    {"cost_table", "cli", "__main__"},
]
"""From the ground up; a room may import its own floor and those below."""

BANNED = ("pickle", "dill", "cloudpickle", "marshal", "shelve")


def imports(path: Path) -> set[str]:
    """Dotted names inside the package that a file imports when it is imported (type-checking blocks aside)."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return {name.removeprefix("isthmus.") for name in found if name.startswith("isthmus.")}


def room(dotted: str) -> str:
    return dotted.split(".")[0]


def floor(name: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if name in rooms:
            return level
    raise AssertionError(f"{name} is on no floor of the house: add it to FLOORS and to the design")


def files() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_imports_go_down():
    upward = [
        f"{dotted(path)} -> {target}"
        for path in files()
        for target in imports(path)
        if floor(room(target)) > floor(room(dotted(path)))
    ]
    assert upward == []


def test_no_cycles_between_files():
    names = {dotted(path) for path in files()}
    graph = {}
    for path in files():
        targets = {target if target in names else target.rpartition(".")[0] for target in imports(path)} & names
        graph[dotted(path)] = targets - {dotted(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_objectives_and_data_see_types_alone():
    allowed = {"objectives", "data", "types", "errors", "config", "registry", "files", "assets"}
    for path in files():
        if room(dotted(path)) in {"objectives", "data"}:
            assert {room(target) for target in imports(path)} <= allowed, path


def test_aligners_are_siblings_that_never_meet():
    for path in files():
        if path.parent.name == "aligners":
            assert not any(target.startswith("aligners.") for target in imports(path)), path


def test_the_model_names_no_paper():
    papers = [path.stem for path in (ROOT / "aligners").glob("*.py") if path.stem != "__init__"]
    for name in ("model", "generation", "fuse", "graft", "storage", "processor"):
        text = (ROOT / f"{name}.py").read_text().lower()
        assert not [paper for paper in papers if f"aligners.{paper}" in text]


def test_nothing_executes_what_a_file_says():
    for path in files():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not [name for name in names if name.split(".")[0] in BANNED], path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load", "torch.load", "torch.save"}, f"{path}: {called}"
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("shell") != "True" and arguments.get("trust_remote_code") != "True", path


def test_every_file_says_what_it_is_and_stays_short():
    for path in files():
        text = path.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert len(text.splitlines()) <= 400, f"{path} passes 400 lines: it is two files"


def test_the_public_names_are_there_inside_the_command_too():
    """There the package loads nothing before it is asked for, and another package imports from it all the same."""
    code = "import sys; sys.argv = ['/bin/isthmus']; import isthmus; from isthmus import Recipe; "
    code += "assert 'torch' not in sys.modules; print(Recipe.__module__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "isthmus.config\n"
    assert all(isthmus.__getattr__(name) is vars(isthmus)[name] for name in isthmus.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Turns'"):
        isthmus.Turns  # noqa: B018


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A package that offers a joint, one that cannot be imported, a term of the loss, and a joint that we have."""
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    points = ["[isthmus.aligners]", "mine = my_joints:Mine", "gone = my_gone:Gone", "llava = my_joints:Mine"]
    points += ["[isthmus.objectives]", "nought = my_joints:Nought"]
    (about / "entry_points.txt").write_text("\n".join(points))
    (tmp_path / "my_joints.py").write_text(
        "from isthmus.aligner import Aligner\nfrom isthmus.objectives import Objective\n"
        "class Mine(Aligner):\n    name = 'mine'\nclass Nought(Objective):\n    name = 'nought'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_joints", raising=False)
    monkeypatch.delitem(aligner.JOINTS.registered, "mine", raising=False)  # of a page whose code was run
    return tmp_path


def test_classes_come_from_installed_packages(installed):
    assert aligner.named("mine").__module__ == type(objectives.named("nought", {})).__module__ == "my_joints"
    with pytest.raises(ConfigError, match="aligner 'gone' cannot be imported from my_gone: No module named 'my_gone'"):
        aligner.named("gone")
    with pytest.raises(ConfigError, match="aligner 'llava' is isthmus's own, and my_joints offers another"):
        aligner.named("llava")


def test_classes_of_a_process_are_registered(installed):
    before = dict(aligner.JOINTS.registered)
    first, second = (type("Own", (aligner.Aligner,), {"name": "own"}) for _ in range(2))
    term = type("Term", (objectives.Objective,), {"name": "term"})
    try:
        assert isthmus.register(first) is first and aligner.named("own") is first
        isthmus.register(second)  # the cell was run again
        assert aligner.named("own") is second
        assert type(objectives.named("term", {}) if isthmus.register(term) else None) is term
        for wrong, why in (({"name": "llava"}, "'llava' is taken"), ({"name": "mine"}, "is taken"), ({}, "no name")):
            with pytest.raises(ConfigError, match=f"Own cannot be registered: .*{why}"):
                isthmus.register(type("Own", (aligner.Aligner,), wrong))
        with pytest.raises(ConfigError, match="int is none of aligner, objective"):
            isthmus.register(int)
    finally:
        aligner.JOINTS.registered.clear()
        aligner.JOINTS.registered.update(before)
        objectives.TERMS.registered.clear()
