"""Which paper is where, with recipes, tests, families and deviations: read from the source's docstrings.

The families are those of the survey "How to Bridge the Gap between Modalities" (Song et al. 2023, arXiv 2311.07594):
converters carry features into the LLM's space, perceivers ask them with queries of their own, tools are models that
the LLM calls, and data-driven methods owe their effect to what they are trained on.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus import aligner, recipes
from isthmus.config import Recipe
from isthmus.types import ConfigError

SOURCE = Path(__file__).resolve().parent
FAMILIES = {"converter": "Converters", "perceiver": "Perceivers", "tool": "Tools", "data": "Data-driven"}
"""The survey's families, by what `Aligner.family` and `also` say, and the headings of the page."""
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})(?: \(([^)]*)\))?")
ASIDE = re.compile(r" \([^()]*arXiv[^()]*\)")
DIFFERS = re.compile(r"^Differs:\s*(.*?)\s*(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One file that implements a paper, or part of one."""

    room: str
    name: str
    about: str
    families: tuple[str, ...]
    """Of the survey; empty for what goes with every family."""
    papers: tuple[tuple[str, str], ...]
    """arXiv id, and what the docstring says of it in brackets."""
    file: str
    """Path in the repository."""
    recipes: tuple[str, ...]
    """Those that call the method by name."""
    tests: tuple[str, ...]
    """Paths in the repository; empty where the package is installed without it."""
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Absent:
    """A model that the papers above build on or compare with, and that nobody can load."""

    name: str
    papers: tuple[str, ...]
    instead: str
    file: str = ""
    """What takes its place, as a path in the repository."""


ABSENT = (
    Absent(
        "PaLM",
        ("2204.02311",),
        "no public weights. Any decoder-only LLM stands in its place (`llm` of a recipe); no figure of it is repeated",
    ),
    Absent(
        "Chinchilla",
        ("2203.15556", "2204.14198"),
        "no public weights, nor those of Flamingo, which is built on it: the published Flamingo recipes are "
        "OpenFlamingo's, on LLaMA and RedPajama",
    ),
    Absent(
        "GPT-4V",
        ("2303.08774",),
        "closed: its weights cannot be joined to anything. It answers as a remote Speaker",
        "src/isthmus/speakers/remote.py",
    ),
    Absent("Gemini", ("2312.11805",), "closed: as GPT-4V, a remote Speaker", "src/isthmus/speakers/remote.py"),
)
"""Models without public weights, and what takes their place here."""


# ---------------------------------------------------------------------------------------------- from the source


def entries() -> tuple[Entry, ...]:
    """Every file of the package whose docstring names an arXiv paper, in order; recipes aside."""
    files = sorted(SOURCE.rglob("*.py"))
    return tuple(entry for file in files if file != Path(__file__).resolve() for entry in _read(file))


def checkout() -> Path | None:
    """The repository that the package lies in; None for an installed wheel."""
    root = SOURCE.parent.parent
    return root if (root / "tests").is_dir() and (root / "docs").is_dir() else None


def _read(file: Path) -> Iterator[Entry]:
    """The entry of a file, if it names a paper."""
    source = file.read_text(encoding="utf-8")
    if not ARXIV.search(source):
        return
    tree = ast.parse(source)
    said = ast.get_docstring(tree) or ""
    flat = " ".join(said.split())
    room = file.parent.name if file.parent != SOURCE else file.stem
    papers = tuple(dict.fromkeys(ARXIV.findall(flat)))
    if not papers or room == "recipes":
        return
    name = _registered(tree) or file.stem
    yield Entry(
        room=room,
        name=name,
        about=re.split(r"\.(?: |$)", ASIDE.sub("", flat))[0],
        families=_families(room, name, file),
        papers=papers,
        file=(Path("src/isthmus") / file.relative_to(SOURCE)).as_posix(),
        recipes=tuple(title for title, recipe in _book().items() if name in _calls(recipe, room)),
        tests=tuple(_tests(room, name, file)),
        differs=_differs(said),
    )


def _registered(tree: ast.Module) -> str:
    """The `name` that a class of the file is called by in recipes, or nothing."""
    lines = [line for item in tree.body if isinstance(item, ast.ClassDef) for line in item.body]
    for line in lines:
        if not isinstance(line, ast.Assign | ast.AnnAssign) or not isinstance(line.value, ast.Constant):
            continue
        target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
        if isinstance(target, ast.Name) and target.id == "name":
            return str(line.value.value)
    return ""


def _differs(said: str) -> tuple[str, ...]:
    """The items of a docstring's "Differs:" list, or its one sentence."""
    found = DIFFERS.search(said)
    if found is None:
        return ()
    items = re.split(r"(?:^|\n)\s*- ", found[1])
    return tuple(" ".join(item.split()).rstrip(";.") for item in items if item.strip())


def _families(room: str, name: str, file: Path) -> tuple[str, ...]:
    """A joint's own family and its second; of a connector, those of the joints that use it; else none."""
    if room == "aligners":
        joint = _joint(name)
        return (joint.family, joint.also) if joint.also else (joint.family,)
    found = _users(file.stem) if room == "connectors" else set()
    return tuple(family for family in FAMILIES if family in found)


@functools.cache
def _joint(name: str) -> type[aligner.Aligner]:
    return aligner.named(name)


def _users(connector: str) -> set[str]:
    """The families of the joints that import a connector, or another connector that imports it."""
    imports = re.compile(rf"isthmus\.connectors(\.{connector} import| import .*\b{connector}\b)")
    found: set[str] = set()
    for room in ("aligners", "connectors"):
        for file in (SOURCE / room).glob("*.py"):
            if imports.search(file.read_text("utf-8")):
                found |= {_joint(file.stem).family} if room == "aligners" else _users(file.stem)
    return found


@functools.cache
def _book() -> dict[str, Recipe]:
    return {name: build() for name, build in recipes.BOOK.items()}


def _calls(recipe: Recipe, room: str) -> set[str]:
    """The methods of a room that a recipe calls by name."""
    if room == "aligners":
        return {recipe.aligner.name}
    return {term.name for stage in recipe.stages for term in stage.objectives} if room == "objectives" else set()


def _tests(room: str, name: str, file: Path) -> list[str]:
    """The tests of a file: its mirror, else those that import it, by name if one has it, or name it as a recipe does;
    and for a joint, the contract that lists it."""
    root = checkout()
    if root is None:
        return []
    tests = root / "tests"
    places = [tests / place for place in file.relative_to(SOURCE).parents]
    found = [test for place in places if (test := place / f"test_{file.stem}.py").exists()]
    module = re.escape(".".join(file.relative_to(SOURCE).with_suffix("").parts))
    parent, _, stem = module.rpartition(r"\.")
    imports = re.compile(rf"from isthmus\.{module} import|from isthmus\.{parent} import .*\b{stem}\b")
    if not found:
        found = [test for test in sorted(tests.rglob("test_*.py")) if imports.search(test.read_text("utf-8"))]
        found = [test for test in found if test.stem == f"test_{file.stem}"] or found
    if not found:
        rooms = [test for kind in ("aligners", "objectives") for test in sorted((tests / kind).glob("test_*.py"))]
        found = [test for test in rooms if f'"{name}"' in test.read_text("utf-8")]
    contract = tests / "test_contract.py"
    if room == "aligners" and f'Joint("{name}"' in contract.read_text(encoding="utf-8"):
        found.append(contract)
    return [test.relative_to(root).as_posix() for test in found]


# ---------------------------------------------------------------------------------------------- shown


def plain() -> dict[str, Any]:
    """Everything as plain values: `papers`, and what is `absent`."""
    return {"papers": [asdict(entry) for entry in entries()], "absent": [asdict(model) for model in ABSENT]}


def text() -> str:
    """Everything for a terminal."""
    known = entries()
    blocks = []
    for title, group in _groups(known):
        blocks.append(f"{title}\n" + "\n".join(_lines(entry) for entry in group))
    absent = "\n".join(f"  {model.name}: {model.instead} (arXiv {', '.join(model.papers)})" for model in ABSENT)
    blocks.append(f"Without public weights\n{absent}")
    if checkout() is None:
        blocks.append("Tests are in the repository and not in the installed package.")
    return "\n\n".join(blocks)


def page() -> str:
    """The whole of docs/papers.md."""
    known = entries()
    parts = [HEAD]
    for title, group in _groups(known):
        parts += [f"## {title}\n", "| what | arXiv | file | recipes | tests |\n|---|---|---|---|---|"]
        parts += [_row(entry) for entry in group] + [""]
    parts += ["## Without public weights\n", "| model | arXiv | what takes its place |\n|---|---|---|"]
    parts += [
        f"| {model.name} | {_arxiv((paper, '') for paper in model.papers)} | {model.instead}{_beside(model.file)} |"
        for model in ABSENT
    ]
    parts += ["\n## Where ours differs\n"]
    for entry in known:
        if entry.differs:
            parts += [f"**{entry.name}** ({_link(entry.file)})\n", *(f"- {item}" for item in entry.differs), ""]
    return "\n".join(parts)


HEAD = """# Papers

Written by `isthmus papers --write` from the docstrings of the source; do not edit it by hand. A file's docstring names
the paper, the authors' code, and where ours differs. Joints are grouped by the families of the survey "How to Bridge
the Gap between Modalities" ([2311.07594](https://arxiv.org/abs/2311.07594)); one that belongs to two is listed in
both.
"""


def rewrite(name: str, page: Callable[[], str]) -> Path:
    """Write a page of docs/ anew.

    Raises:
        ConfigError: the package is not in a checkout of the repository.
    """
    root = checkout()
    if root is None:
        raise ConfigError(f"an installed package has no docs/{name} to write", "run it in a checkout of the repository")
    file = root / "docs" / name
    file.write_text(page(), encoding="utf-8")
    return file


def _groups(known: tuple[Entry, ...]) -> Iterator[tuple[str, list[Entry]]]:
    """Joints by family, then objectives, then parts; empty groups are left out."""
    groups = {
        title: [entry for entry in known if entry.room == "aligners" and family in entry.families]
        for family, title in FAMILIES.items()
    }
    groups["Objectives"] = [entry for entry in known if entry.room == "objectives" and not entry.name.startswith("_")]
    shown = {entry.file for group in groups.values() for entry in group}
    groups["Parts"] = [entry for entry in known if entry.file not in shown]
    return ((title, group) for title, group in groups.items() if group)


def _lines(entry: Entry) -> str:
    """An entry in a terminal."""
    papers = ", ".join(number + (f" ({note})" if note else "") for number, note in entry.papers)
    cells = {
        "arXiv": papers,
        "family": ", ".join(entry.families),
        "file": entry.file,
        "recipes": ", ".join(entry.recipes),
        "tests": ", ".join(entry.tests),
        "differs": "; ".join(entry.differs),
    }
    lines = [f"    {label:<8} {value}" for label, value in cells.items() if value]
    return "\n".join([f"  {entry.name}: {entry.about}", *lines])


def _row(entry: Entry) -> str:
    """An entry in the page's tables."""
    family = f" ({', '.join(entry.families)})" if entry.families else ""
    titles = ", ".join(f"`{name}`" for name in entry.recipes)
    if len(entry.recipes) > 1 and set(entry.recipes) == set(_book()):
        titles = "all"
    tests = "<br>".join(map(_link, entry.tests))
    cells = (f"**{entry.name}**{family}: {entry.about}", _arxiv(entry.papers), _link(entry.file), titles, tests)
    return f"| {' | '.join(cell or '—' for cell in cells)} |"


def _beside(file: str) -> str:
    return f" ({_link(file)})" if file else ""


def _arxiv(papers: Any) -> str:
    return "<br>".join(
        f"[{number}](https://arxiv.org/abs/{number})" + (f" ({note})" if note else "") for number, note in papers
    )


def _link(file: str) -> str:
    return f"[`{file}`](../{file})"
