"""Options that several verbs share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from isthmus.config import Recipe

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
DType = Annotated[str, typer.Option(help="Arithmetic of the base parts: auto, float32, bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.  [default: runs/NAME]")]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name (see `isthmus recipes`), or a .yaml or .json file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides such as stages.align.lr=1e-3 encoder=./my-encoder seed=1."),
]


def on(device: str) -> torch.device:
    """The device of that name; `auto` is an accelerator if there is one."""
    import torch

    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe by name or file, with overrides applied."""
    from isthmus import recipes
    from isthmus.config import read

    recipe = read(Path(name)) if name.endswith((".yaml", ".yml", ".json")) else recipes.named(name)
    return recipe.override(overrides or [])
