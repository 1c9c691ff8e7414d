"""`isthmus recipes`, `papers` and `doctor`: what there is, where it comes from, and whether this machine is well."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated

import typer

from isthmus.cli.options import AsJson


def recipes(
    show: Annotated[str | None, typer.Option(help="Print one recipe as YAML, ready to be edited.")] = None,
    brief: Annotated[bool, typer.Option("--brief", help="With --show: only what differs from the defaults.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes, print one, or print the schema of all."""
    from isthmus import recipes as book
    from isthmus.config import Recipe
    from isthmus.errors import ConfigError
    from isthmus.overrides import written

    if schema:
        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))
    elif brief and show is None:
        raise ConfigError("--brief is about one recipe", "isthmus recipes --show llava --brief")
    elif show is not None:
        tree = book.named(show).model_dump(mode="json", exclude_defaults=brief)
        typer.echo(json.dumps(tree, indent=2) if as_json else written(tree))
    elif as_json:
        typer.echo(json.dumps(book.titles(), indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        titles, large = book.titles(), book.large()
        table = Table("recipe", "what it is", box=None)
        small = [name for name in titles if name not in large]
        for heading, names in (("on embedded parts", small), ("in the authors' size", large)):
            table.add_row(f"\n[dim]{heading}[/dim]")
            for name in names:
                table.add_row(f"[bold]{name}[/bold]", titles[name])
        Console().print(table)


def papers(
    write: Annotated[bool, typer.Option("--write", help="Rewrite docs/papers.md; in a checkout.")] = False,
    as_json: AsJson = False,
) -> None:
    """Every paper with its file, recipes, tests, family in the survey's taxonomy, and where ours differs."""
    from isthmus import papers as book

    if write:
        typer.echo(f"wrote {book.rewrite('papers.md', book.page)}")
    else:
        typer.echo(json.dumps(book.plain(), indent=2) if as_json else book.text())


def doctor(as_json: AsJson = False) -> None:
    """Ask the machine: versions, accelerators, fast arithmetic, embedded parts, known conflicts."""
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        for name, (state, remark) in findings.items():
            colour = {"ok": "green", "note": "yellow", "bad": "red"}[state]
            typer.echo(f"{typer.style(f'{state:4}', fg=colour)} {name}: {remark}")
    if any(state == "bad" for state, _ in findings.values()):
        raise typer.Exit(1)


def examine() -> dict[str, tuple[str, str]]:
    """Each finding's state (ok, note, bad) and remark, with the remedy where there is one."""
    import torch

    from isthmus import assets
    from isthmus.training.machine import arithmetic

    found = {"python": ("ok", platform.python_version())}
    for package in ("torch", "transformers", "safetensors", "tokenizers"):
        found[package] = ("ok", version(package))
    found["torchvision"] = _torchvision()
    found["accelerator"] = ("ok", str(torch.accelerator.current_accelerator() or "none: the CPU it is"))
    found["arithmetic"] = (
        "ok",
        f"dtype=auto means {str(arithmetic('auto', torch.device('cpu'))).removeprefix('torch.')} here",
    )
    home = assets.home().absolute()
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())  # a fresh machine has no cache yet
    free = shutil.disk_usage(there).free / 1e9
    found["disk"] = ("ok" if free > 5 else "note", f"{free:.0f} GB free at {home}; the demo takes about 3")
    missing = assets.missing("demo")
    remark = "all there" if not missing else f"missing {', '.join(missing)}; run `isthmus data fetch demo`"
    found["embedded parts"] = ("ok" if not missing else "note", remark)
    return found


def _torchvision() -> tuple[str, str]:
    """torchvision has no build for CPU torch on some indexes, and a broken one breaks AutoProcessor."""
    if find_spec("torchvision") is None:
        return "ok", "absent, as it should be next to a CPU torch; pictures go through Pillow"
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, PackageNotFoundError) as error:
        return "bad", f"installed but broken ({str(error).splitlines()[0]}); run `pip uninstall torchvision`"
    return "ok", version("torchvision")
