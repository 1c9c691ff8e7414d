"""Options that several verbs share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from isthmus.config import Recipe
    from isthmus.data.formats import Form
    from isthmus.model import VLM
    from isthmus.speakers.remote import Remote

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
DType = Annotated[str, typer.Option(help="Arithmetic of the base parts: auto, float32, bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.  \\[default: runs/NAME]")]
RecipeName = Annotated[
    str,
    typer.Argument(help="A recipe's name (see `isthmus recipes`), a .yaml or .json file, or a run's folder, to go on."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides such as stages.sft.lr=1e-3 encoder=./my-encoder seed=1."),
]

Endpoint = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible address such as http://localhost:8000/v1; MODEL is then a name there."),
]
KeyEnv = Annotated[str | None, typer.Option(help="The environment variable that holds the endpoint's key.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--remote", "-r", help="A setting of the remote model, such as budget=1; see docs/speakers.md."),
]

Images = Annotated[Path | None, typer.Option(help="Folder that relative picture paths start from.")]
FileSettings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="How it is read, such as format=vqav2 beside=annotations.json boxes=pixels."),
]


def on(device: str) -> torch.device:
    """The device of that name; `auto` is an accelerator if there is one.

    Raises:
        ConfigError: no such kind of device, or this machine (or this build of torch) has none of it.
    """
    import torch

    from isthmus.errors import ConfigError

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"no kind of device is called {device!r}", "use auto, cpu, cuda, cuda:1 or mps") from None
    if chosen.type == "cpu":
        return chosen
    here = torch.accelerator.device_count() if accelerator and accelerator.type == chosen.type else 0
    if (chosen.index or 0) >= here:
        raise ConfigError(
            f"torch {torch.__version__} sees {here or 'no'} {chosen.type} device{'s' * (here > 1)} here, not {device}",
            "use --device cpu or auto, or install the build of torch for that device",
        )
    return chosen


def load_for_thread(model: str, dtype: str, device: str) -> VLM:
    """`isthmus.load` for a verb whose model is run by another thread than this one.

    A thread that has computed keeps its OpenMP workers. Where those of two threads are more than the cores, libgomp
    lets all of them sleep between operators instead of spinning, and reading a prompt takes 1.4 times as long. So it
    is loaded in a thread that ends, and its workers with it. Ctrl-C does not wait for that.
    """
    from concurrent.futures import Future
    from threading import Thread

    from isthmus.assembly import load

    loaded: Future[VLM] = Future()

    def work() -> None:
        try:
            loaded.set_result(load(model, dtype, on(device)))
        except BaseException as error:
            loaded.set_exception(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    found = loaded.result()
    thread.join()
    return found


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe by name, by file, or as a run's folder keeps it, with overrides applied."""
    from isthmus import recipes
    from isthmus.config import FILES, read

    if name.endswith(FILES):
        recipe = read(Path(name))
    else:
        recipe = recipe_in(Path(name)) if is_folder(name) else recipes.named(name)
    return recipe.override(overrides or [])


def is_folder(name: str) -> bool:
    """Whether a folder is meant, and not the recipe of that name."""
    from isthmus import recipes

    return name not in recipes.BOOK and Path(name).is_dir()


def recipe_in(folder: Path) -> Recipe:
    """The recipe that a run keeps in its folder.

    Raises:
        ConfigError: it is no run's folder, or its note cannot be read.
    """
    import json

    from isthmus.config import parse
    from isthmus.errors import ConfigError

    note = folder / "run.json"
    try:
        return parse(json.loads(note.read_text(encoding="utf-8"))["recipe"], str(note))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no run: there is no run.json", "`isthmus runs` lists runs; a recipe is a name or a file"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{note} cannot be read ({error!r})", "give the recipe again, by its name or file, with --out"
        ) from None


def short_name(model: str) -> str:
    """What tells a model from others: `demo-sft` of runs/demo/sft/model, `org-name` of a hub name.

    Of a path it is what lies below a folder `runs`, else its last three names.
    """
    path = Path(model)
    parts = (path.resolve() if path.name in ("", "..", "model") and path.exists() else path).parts
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-3:]
    return "-".join(part for part in below if part not in ("model", "/", ".", "..")) or "model"


def pairs(settings: list[str] | None) -> dict[str, Any]:
    """Settings written KEY=VALUE, values as in YAML."""
    from isthmus.config import parse_value

    return {key: parse_value(value, key) for key, _, value in (setting.partition("=") for setting in settings or [])}


def remote_of(model: str, endpoint: str, key_env: str | None, settings: list[str] | None, **defaults: object) -> Remote:
    """A remote speaker; settings are KEY=VALUE and go before defaults.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    from isthmus.config import check
    from isthmus.errors import ConfigError
    from isthmus.speakers.remote import Remote
    from isthmus.speakers.settings import RemoteConfig

    tree = {**defaults, "endpoint": endpoint, "model": model, "key_env": key_env, **pairs(settings)}
    try:
        config = check(RemoteConfig, tree, "remote")
    except ConfigError as error:
        raise ConfigError(error.cause, "docs/speakers.md lists the settings, written KEY=VALUE") from None
    return Remote(config, lambda told: typer.echo(told, err=True))


def form_of(path: Path, images: Path | None, settings: list[str] | None) -> Form:
    """How a file is read; settings are KEY=VALUE.

    Raises:
        ConfigError: a setting is unknown or wrong.
        DataError: there is no such file.
    """
    from isthmus.config import check as validated
    from isthmus.data.formats import FileOptions, Form
    from isthmus.data.hub import there

    return Form(there(path), images, validated(FileOptions, pairs(settings), "--set"))
