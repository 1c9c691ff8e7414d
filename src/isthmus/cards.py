"""The model card of a saved or exported directory: `README.md` with its lineage, and the front matter that hubs read.

What it says is read from the config and from what a run leaves beside its models (`run.json`, the stages' notes, the
report). Nothing of a card is read back by `load`; a README that somebody else wrote is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, constants
from huggingface_hub.file_download import repo_folder_name

from isthmus.assets import packages
from isthmus.config import Source, Stage
from isthmus.data import folders, sets
from isthmus.data.containers import Container
from isthmus.data.formats import Form
from isthmus.errors import ConfigError, abbreviated
from isthmus.files import write_text

NAME = "README.md"
MARK = "<!-- Written by Isthmus at every save. Delete this line, and the text is yours and stays. -->"
DATA = "data.json"
"""In a stage's folder: what its sources were when it began."""
CONTENT = "contents"
"""There, what each file or folder held. Called anew when it is told otherwise: a note without it is completed."""
NAMED = 8
"""Globs of a LoRA that a card names; of more the first, and how many there are."""
RECIPE, REPORT, STEPS = "run.json", "report.json", "manifest.json"
TASK = "image-text-to-text"
EMBEDDED: dict[str, packages.Package] = {"smollm2-135m-instruct": packages.LLM, "efficientnet-lite0": packages.LITE}
ORIGINS = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What an embedded part is called on the hub."""


@dataclass(frozen=True)
class Trained:
    """A finished stage: its settings, its steps where known, and what its sources were."""

    settings: Mapping[str, Any]
    steps: int | None
    data: Sequence[Mapping[str, Any]]
    changed: Sequence[str] = ()
    """What was set otherwise on the way."""


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from, as far as the folders around it tell."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    stages: tuple[Trained, ...] = ()
    report: Mapping[str, Any] | None = None
    start: str = ""
    """The fingerprint of the model that the run began with, if it began with one."""


@dataclass(frozen=True)
class Export:
    """Into what a model was exported.

    Attributes:
        what: its name.
        library: what reads it.
        code: how.
        difference: how far its numbers moved on the way; None where they were not compared.
        of: which numbers these are.
        caveats: what its readers do otherwise than the model did where its figures come from; with any, these are
            left out.
        merged: whether LoRA has become part of what it changes.
    """

    what: str
    library: str
    code: str
    difference: float | None = None
    of: str = "logits"
    caveats: Sequence[str] = ()
    merged: bool = True


# ---------------------------------------------------------------------------------------------- gathering


def note_data(folder: Path, stage: Stage, opened: Sequence[sets.Card], seed: int) -> None:
    """Write down what a stage's sources are at its beginning; from its first step on, what is noted stays.

    Raises:
        ConfigError: the stage has begun, and a source holds something else now.
    """
    file = folder / DATA
    noted = [_noted(source, card, seed) for source, card in zip(stage.data, opened, strict=True)]
    if file.is_file() and (folder / STEPS).is_file():
        before = json.loads(file.read_text())
        for was, now in zip(before, noted, strict=True):
            if was["size"] != now["size"] or was.get(CONTENT, now[CONTENT]) != now[CONTENT]:
                raise ConfigError(
                    f"{now['name']} has changed since stage {stage.name} began: "
                    f"{was['size']:,} samples then, {now['size']:,} now",
                    "put the old file back, or name another folder with --out",
                )
        noted = [{**now, **was} for was, now in zip(before, noted, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(noted, indent=1))


def _noted(source: Source, card: sets.Card, seed: int) -> dict[str, Any]:
    known = {"hash": sets.stamp([source], seed), CONTENT: list(sets.each_state(source, seed, _content))}
    return {**asdict(card), "split": source.split, "weight": source.weight, **known}


SPOTS, SPOT = 64, 1 << 18
"""Stretches of a file that are read to know it again, and their bytes: all of it up to 16 MiB, then evenly spaced."""


def _content(form: Form, container: Container) -> str:
    """Hex digits that change with the files' names, sizes and what is read of them, in milliseconds for any size."""
    digest = hashlib.sha256()
    for path in container.files():
        size = path.stat().st_size
        digest.update(os.fsencode(f"{folders.called(path, form.path)} {size} "))
        with path.open("rb") as file:
            for start in range(0, size, max(SPOT, -(-size // SPOTS))):
                file.seek(start)
                digest.update(file.read(SPOT))
    return digest.hexdigest()[:16]


def lineage(folder: Path) -> Lineage:
    """The lineage of `RUN/STAGE/model`; an empty one for a directory that lies in no run."""
    stage, run = folder.resolve().parent.name, folder.resolve().parent.parent
    begun = _read(run / RECIPE)
    recipe = begun.get("recipe", {})
    names = [each["name"] for each in recipe.get("stages", [])]
    if stage not in names:
        return Lineage()
    done = recipe["stages"][: names.index(stage) + 1]
    report = _read(run / REPORT) if stage == names[-1] else {}
    trained = tuple(_trained(run, each) for each in done)
    return Lineage(recipe, begun["fingerprint"], trained, report or None, begun.get("start", ""))


def _trained(run: Path, settings: Mapping[str, Any]) -> Trained:
    folder = run / settings["name"]
    noted = json.loads((folder / DATA).read_text()) if (folder / DATA).is_file() else settings["data"]
    begun = _read(folder / STEPS)
    return Trained(settings, begun.get("steps"), noted, begun.get("changed", ()))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none: a card is never a reason for a save to fail."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


# ---------------------------------------------------------------------------------------------- writing


def ours(folder: Path) -> bool:
    """Whether a card may be written here: there is none, or it is one of ours."""
    file = folder / NAME
    return not file.is_file() or MARK in file.read_text(encoding="utf-8", errors="replace")


def refresh(folder: Path) -> None:
    """Write a saved model's card anew, with what its run has found out since."""
    if ours(folder):
        write_text(folder / NAME, card(_read(folder / "config.json"), lineage(folder)))


def write_export(source: Path, out: Path, exported: Export) -> None:
    """The card of an exported directory: that of the model it was made of, and how."""
    if ours(out):
        write_text(out / NAME, card(_read(source / "config.json"), lineage(source), exported))


def card(config: Mapping[str, Any], told: Lineage, exported: Export | None = None) -> str:
    """The text of a card.

    Args:
        config: the fields of a `VLMConfig`.
        told: where the model comes from.
        exported: what it was turned into, if it was.
    """
    if told.report and exported and exported.caveats:
        told = replace(told, report={**told.report, "rows": []})
    sections = [
        _opening(config, told, exported),
        _parts(config, exported is not None and exported.merged),
        *([_training(told), _data(told), _figures(told)] if told.stages else []),
        _licences(config, told),
        f"## Use\n\n```python\n{exported.code if exported else _OWN}\n```",
    ]
    front = f"---\n{_front(config, told, exported).to_yaml()}\n---\n"
    return front + MARK + "\n\n" + "\n\n".join(filter(None, sections)) + "\n"


_OWN = 'import isthmus\n\nmodel = isthmus.load("path/to/this/directory")'


def _front(config: Mapping[str, Any], told: Lineage, exported: Export | None) -> ModelCardData:
    sources = [source for _, source, _, _ in _sources(config)]
    known = {EMBEDDED[source].licence.lower() if source in EMBEDDED else None for source in sources}
    (licence,) = known if len(known) == 1 else (None,)
    results = [
        EvalResult(TASK, row["task"], row["label"], row["unit"], row["cells"]["after"]["value"])
        for row in (told.report or {}).get("rows", [])
        if row["cells"].get("after", {}).get("value") is not None
    ]
    return ModelCardData(
        license=licence or "other",
        license_name=None if licence else "those-of-the-parts",
        library_name=exported.library if exported else "isthmus",
        base_model=[ORIGINS.get(source, source) for source in sources if source in ORIGINS or _on_hub(source)] or None,
        pipeline_tag=TASK,
        tags=["isthmus", config["aligner"]["name"]],
        model_name=_title(config, told),
        eval_results=results or None,
    )


def _title(config: Mapping[str, Any], told: Lineage) -> str:
    return told.recipe.get("name") or config["aligner"]["name"]


def _opening(config: Mapping[str, Any], told: Lineage, exported: Export | None) -> str:
    lines = [f"# {_title(config, told)}", ""]
    if told.recipe.get("about"):
        lines += [f"{told.recipe['about']}.", ""]
    if exported:
        checked = (
            "" if exported.difference is None else f", largest difference of {exported.of} {exported.difference:.1e}"
        )
        lines.append(f"Exported from Isthmus as {exported.what}{checked}.")
        lines += [f"\n{caveat}." for caveat in exported.caveats]
        lines += ["\nFigures of the model do not hold there, and are left out."] if exported.caveats else []
    elif config["whole"]:
        lines.append("This directory holds all weights.")
    else:
        lines.append("This directory holds what was trained or added; the base parts are read from their own sources.")
    made = f" Recipe {told.fingerprint}, seed {told.recipe['seed']}." if told.recipe else ""
    return "\n".join([*lines, "", f"Made with isthmus {version('isthmus')}.{made}"])


def _sources(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Role, source, revision and fingerprint of every base part."""
    for kind, entry in config["encoders"].items():
        chosen = entry["config"]
        for one in (chosen, *chosen.get("also", ())):
            yield f"{kind} encoder", one["source"], one.get("revision"), entry["weights"]
    yield "LLM", config["llm"]["config"]["source"], config["llm"]["config"].get("revision"), config["llm"]["weights"]


def _on_hub(source: str) -> bool:
    """Whether a source is a hub's name. A path from another folder looks like one, so that the hub's cache decides."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).exists():
        return False
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model")).is_dir()


def called(source: str) -> str:
    """A source without the path to it, which is nobody else's business."""
    if source in EMBEDDED or _on_hub(source):
        return source
    return f"{Path(source).name} ({'a local folder' if Path(source).exists() else 'not found from here'})"


def _parts(config: Mapping[str, Any], merged: bool) -> str:
    rows = []
    for role, source, revision, weights in _sources(config):
        package = EMBEDDED.get(source)
        pinned = f"{package.name} {package.version}, sha256 {package.sha256}" if package else revision or "not pinned"
        rows.append((role, called(source), pinned, weights or "in this directory"))
    added = ", ".join(f"{key} {value}" for key, value in config["aligner"].get("options", {}).items())
    rows.append(("joint", config["aligner"]["name"], added or "the joint's own defaults", "in this directory"))
    for lora in config.get("lora") or ():
        where = f"merged into {_changed(lora['globs'])}" if merged else "in this directory"
        globs = " ".join(lora["globs"]) if len(lora["globs"]) <= NAMED else abbreviated(lora["globs"])
        rows.append(("LoRA", lora["name"], f"r {lora['r']}, on {globs}", where))
    text = "## Parts\n\n" + _table(("part", "source", "revision or options", "weights"), rows)
    full = " ".join(f"`{glob}`" for glob in config.get("trained") or () if not glob.startswith("connectors"))
    return f"{text}\n\nBase parameters trained in full or changed: {full}." if full else text


def _changed(globs: Sequence[str]) -> str:
    """The parts that LoRA changes, by the first word of its globs."""
    first = {glob.partition(".")[0] for glob in globs}
    return " and ".join(words for word, words in _ROOTS.items() if word in first) if first <= _ROOTS.keys() else "them"


_ROOTS = {"llm": "the LLM", "encoders": "the encoder", "connectors": "the joint"}


def _training(told: Lineage) -> str:
    rows = []
    for stage in told.stages:
        trains = ", ".join(f"`{glob}` {_how(how)}" for glob, how in stage.settings["train"].items())
        losses = " + ".join(each["name"] for each in stage.settings["objectives"])
        rows.append((stage.settings["name"], trains, losses, "?" if stage.steps is None else stage.steps,
                     stage.settings["batch_size"], _rates(stage.settings)))  # fmt: skip
    said = [f"Stage {each.settings['name']}, on the way: {text}." for each in told.stages for text in each.changed]
    if told.start:
        said.append(f"Begun with the model {called(told.recipe['start'])}, fingerprint {told.start}.")
    table = _table(("stage", "what trains", "loss", "steps", "samples per step", "rate"), rows)
    return "\n\n".join(["## Training", table, *said])


def _rates(settings: Mapping[str, Any]) -> str:
    """The learning rates that a stage has trained with, each once."""
    rates = (settings["lr"] if how["lr"] is None else how["lr"] for how in settings["train"].values())
    return ", ".join(dict.fromkeys(f"{rate:g}" for rate in rates))


def _how(how: Mapping[str, Any]) -> str:
    mode = how["mode"]
    named = mode if isinstance(mode, str) else f"{'DoRA' if mode['dora'] else 'LoRA'} r {mode['r']}"
    return named if how["lr"] is None else f"{named} at {how['lr']:g}"


def _data(told: Lineage) -> str:
    rows = [
        (stage.settings["name"], _file(source["name"]), source["split"], source.get("size", ""),
         f"{source['weight']:g}", source.get("hash", "not noted"))
        for stage in told.stages
        for source in stage.data
    ]  # fmt: skip
    return "## Data\n\n" + _table(("stage", "set", "split", "samples", "share", "hash"), rows)


def _file(name: str) -> str:
    return name if name in sets.EMBEDDED else Path(name).name


def _figures(told: Lineage) -> str:
    if not (told.report and told.report["rows"]):
        return ""
    columns = [
        column
        for column in ("before", "after", "blind", "shuffled")
        if any(column in row["cells"] for row in told.report["rows"])
    ]
    rows = [
        (row["label"], row["unit"], row["n"], *(_figure(row["cells"].get(column)) for column in columns))
        for row in told.report["rows"]
    ]
    about = "Each with its 95 % interval. `blind` has no picture, `shuffled` another item's. "
    about += f"Hash of all that was asked: {told.report['data_hash']}."
    return f"## Figures\n\n{about}\n\n" + _table(("task", "unit", "items", *columns), rows)


def _figure(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return "·"
    return f"{cell['value']:.3f} ({cell['low']:.3f} – {cell['high']:.3f})"


def _licences(config: Mapping[str, Any], told: Lineage) -> str:
    rows: dict[tuple[Any, ...], None] = {}
    for _, source, _, _ in _sources(config):
        package = EMBEDDED.get(source)
        rows[(called(source), package.licence, package.attribution) if package else (called(source), *_UNSAID)] = None
    credited = {each["name"]: (each["licence"], each["author"]) for each in (told.report or {}).get("credits", [])}
    for stage in told.stages:
        for each in stage.data:
            stated = (
                (each["licence"], each["attribution"]) if "licence" in each else credited.get(each["name"], _UNSAID)
            )
            rows[(_file(each["name"]), *stated)] = None
    return "## Licences and attributions\n\n" + _table(("what", "licence", "attribution"), list(rows))


_UNSAID = ("see its source", "")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
