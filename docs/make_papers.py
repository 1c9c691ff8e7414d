"""Writes docs/papers.md from the source's docstrings: which paper is where, which recipe uses it, which test pins it.

python docs/make_papers.py            # rewrites the page
python docs/make_papers.py --check    # exit code 1 if the page is not current
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus import recipes

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS, PAGE = ROOT / "src" / "isthmus", ROOT / "tests", ROOT / "docs" / "papers.md"
METHODS = ("aligners", "objectives")
"""Rooms in which a file is a method that recipes call by name; elsewhere papers lend a part."""
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})(?: \(([^)]*)\))?")
ASIDE = re.compile(r" \([^()]*arXiv[^()]*\)")

HEAD = """# Papers

Written by `docs/make_papers.py` from the docstrings of the source; do not edit it by hand. A file's docstring names the
paper, the authors' code, and where ours differs.
"""


@dataclass(frozen=True)
class Entry:
    """One file that implements a paper, or part of one."""

    room: str
    name: str
    about: str
    papers: tuple[tuple[str, str], ...]
    """arXiv id, and what the docstring says of it in brackets."""
    file: Path

    @property
    def line(self) -> str:
        """The table row: method, papers, file, recipes (where recipes call it by name), tests."""
        papers = "<br>".join(
            f"[{number}](https://arxiv.org/abs/{number})" + (f" ({note})" if note else "")
            for number, note in self.papers
        )
        cells = [f"**{self.name}**: {self.about}", papers, link(self.file)]
        if self.room in METHODS:
            cells.append(", ".join(f"`{name}`" for name in used_by(self)) or "—")
        cells.append("<br>".join(map(link, tested_by(self))) or "—")
        return f"| {' | '.join(cells)} |"


def entries() -> Iterator[Entry]:
    """Every file of the source whose docstring names an arXiv paper, in order."""
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = " ".join((ast.get_docstring(tree) or "").split())
        if papers := tuple(dict.fromkeys(ARXIV.findall(said))):
            room = file.parent.name if file.parent != SOURCE else file.stem
            about = re.split(r"\.(?: |$)", ASIDE.sub("", said))[0]
            yield Entry(room, registered(tree) or file.stem, about, papers, file)


def registered(tree: ast.Module) -> str:
    """The `name` that a class of the file is called by in recipes, or nothing."""
    lines = [line for item in tree.body if isinstance(item, ast.ClassDef) for line in item.body]
    for line in lines:
        if not isinstance(line, ast.Assign | ast.AnnAssign) or not isinstance(line.value, ast.Constant):
            continue
        target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
        if isinstance(target, ast.Name) and target.id == "name":
            return str(line.value.value)
    return ""


def used_by(entry: Entry) -> list[str]:
    """The recipes that call the method by name."""
    found = []
    for name, build in recipes.BOOK.items():
        recipe = build()
        named = {"aligners": {recipe.aligner.name}}
        named["objectives"] = {term.name for stage in recipe.stages for term in stage.objectives}
        if entry.name in named.get(entry.room, ()):
            found.append(name)
    return found


def tested_by(entry: Entry) -> list[Path]:
    """The tests of a file: its mirror and, for a joint, the contract that lists it; else those that import it."""
    found = sorted(TESTS.rglob(f"test_{entry.file.stem}.py"))
    contract = TESTS / "test_contract.py"
    if entry.room == "aligners" and f'Joint("{entry.name}"' in contract.read_text(encoding="utf-8"):
        found.append(contract)
    dotted = ".".join(entry.file.relative_to(SOURCE.parent).with_suffix("").parts)
    importing = (
        file for file in sorted(TESTS.rglob("test_*.py")) if f"from {dotted} import" in file.read_text("utf-8")
    )
    return found or list(importing)


def link(file: Path) -> str:
    return f"[`{file.relative_to(ROOT).as_posix()}`](../{file.relative_to(ROOT).as_posix()})"


def page() -> str:
    """The whole page."""
    known = [entry for entry in entries() if entry.room != "recipes"]
    methods = [entry.line for entry in known if entry.room in METHODS]
    lent = [entry.line for entry in known if entry.room not in METHODS]
    return "\n".join(
        [
            HEAD,
            "## Methods that recipes call by name\n",
            "| method | arXiv | file | recipes | tests |\n|---|---|---|---|---|",
            *methods,
            "\n## Parts\n",
            "| part | arXiv | file | tests |\n|---|---|---|---|",
            *lent,
            "",
        ]
    )


def main(check: bool) -> int:
    text = page()
    if check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'current' if current else 'stale: run python docs/make_papers.py'}")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
