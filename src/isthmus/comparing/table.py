"""The result of a comparison in the terminal, and as the Markdown page that `--publish` writes from `compare.json`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from isthmus.comparing.outcome import Cost, Line, Outcome, sees
from isthmus.costs import TEXT
from isthmus.evaluation.drawing import count
from isthmus.evaluation.seeds import Gap, wider
from isthmus.evaluation.statistics import short

STYLES = {"better": "bold green", "worse": "bold red"}
BLIND = "°"
"""Behind what a joint reaches about as well with a blank picture."""


def tables(outcome: Outcome) -> Iterator[Table]:
    """Quality with intervals and verdicts, then what each joint costs; a row per joint."""
    quality = _empty(f"{len(outcome.names)} joints, {len(outcome.seeds)} × {outcome.budget} each")
    for line in outcome.table:
        quality.add_column(line.label, justify="right", min_width=8, style="bold" if line is outcome.mean else "")
    for name in outcome.names:
        label = Text(name).append("\nbaseline" if name == outcome.baseline else "", style="dim")
        quality.add_row(label, *(_score(line, name) for line in outcome.table))
    yield quality
    costs = _empty("")
    for head in ("trained", "training\nTFLOP", "prefill\nGFLOP", "prefill\nms", "token\nms", "kept\nMiB", "peak\nGB"):
        costs.add_column(head, justify="right", no_wrap=True)
    for name in outcome.names:
        costs.add_row(name, *_costs(outcome.costs[name]))
    yield costs


def _empty(title: str) -> Table:
    found = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    found.add_column("joint")
    return found


def _score(line: Line, name: str) -> Text:
    cell = line.cells[name]
    low, high = cell.level.ends
    text = Text(short(cell.level.value)).append(f"\n{short(low, 2)}–{short(high, 2)}", style="dim not bold")
    if cell.unscored:
        text.append(f"\n{cell.unscored} not scored", style="yellow")
    if cell.verdict in STYLES:
        text.append(f"\n{cell.verdict}", style=STYLES[cell.verdict])
    return text


def _costs(cost: Cost) -> list[str]:
    speed = cost.speed
    return [
        f"{count(cost.trained)}\n{cost.share:.1%}",
        f"{cost.training / 1e12:,.3g}",
        f"{cost.prefill / 1e9:,.1f}",
        "·" if speed is None else f"{speed.prefill:,.0f}",
        "·" if speed is None else f"{speed.decode:,.1f}",
        f"{cost.kept / 2**20:,.2f}",
        f"{cost.memory / 1e9:.2f}",
    ]


# ---------------------------------------------------------------------------------------------- Markdown

Tree = Mapping[str, Any]
COSTS = f"""**training**: TFLOP of a run, its steps times what `isthmus plan` counts of one. **peak**: GB of the
training process or the accelerator. **prefill**: GFLOP, and measured milliseconds, of one picture and {TEXT} text
tokens up to the first answered token. **token**: milliseconds of each further one. **kept**: MiB of a picture while
an answer is written, in bfloat16."""


def markdown(tree: Tree) -> str:
    """The page of a finished comparison, from what `compare.json` holds."""
    mean = tree["mean"]
    lines = [mean, *(line for line in tree["lines"] if (line["task"], line["label"]) != (mean["task"], mean["label"]))]
    return "\n".join(
        [
            f"# {len(tree['names'])} joints compared",
            "",
            "Written by `isthmus compare --publish` from `compare.json`; do not edit it by hand.",
            "",
            *(f"- {sentence}" for sentence in tree["advice"]),
            "",
            f"## Quality after {tree['budget']} of training",
            "",
            *_quality(tree, lines),
            "",
            _said(tree),
            "",
            "## Cost",
            "",
            *_priced(tree),
            "",
            COSTS,
            "",
            "## Settings",
            "",
            *_matched(tree),
            "",
            "## Where the numbers come from",
            "",
            *(f"- {name}: {text}" for name, text in tree["method"].items()),
            "",
            *_runs(tree),
            "",
        ]
    )


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_inside, heads))} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(map(_inside, row))} |"


def _inside(cell: str) -> str:
    """What would end a cell, or its row, does not; a bar is escaped within a code span, too."""
    return " ".join(cell.split()).replace("|", "\\|")


def _quality(tree: Tree, lines: Sequence[Tree]) -> Iterator[str]:
    rows = [[f"`{name}`", *(_marked(line, name) for line in lines)] for name in tree["names"]]
    blank = ["blank picture, mean", *(_blank(line) for line in lines)]
    chance = ["chance", *("·" if line["chance"] is None else short(line["chance"]) for line in lines)]
    return _rows(["joint", *(line["label"] for line in lines)], [*rows, blank, chance])


def _marked(line: Tree, name: str) -> str:
    cell = line["cells"][name]
    level, seen = cell["level"], cell["seen"]
    low, high = wider(level["low"], level["high"], level["items_low"], level["items_high"])
    text = f"{short(level['value'])} ({short(low, 2)} to {short(high, 2)})"
    if line["unit"] == "accuracy" and seen is not None and not sees(Gap(**seen)):
        text += BLIND
    return f"{text} **{cell['verdict']}**" if cell["verdict"] in STYLES else text


def _blank(line: Tree) -> str:
    """What joints reach without seeing, over the items that they were asked so."""
    values = [cell["others"]["blind"]["value"] for cell in line["cells"].values() if "blind" in cell["others"]]
    return short(statistics.mean(values)) if values else "·"


def _said(tree: Tree) -> str:
    if len(tree["seeds"]) < 2:
        return "One seed: intervals are over items alone, and there are no verdicts."
    return (
        f"Means over {len(tree['seeds'])} seeds with 95 % intervals, over seeds or over items, of each end what "
        "reaches further. **better**, **worse**: than "
        f"`{tree['baseline']}`, where other seeds and other items would say the same; the chance that one or more of "
        "these words are wrong is at most 5 %, if the number of seeds was settled beforehand. No word: not decided. "
        f"**{BLIND}**: not clearly better than the same model with a blank picture, on the items that both were asked."
    )


def _priced(tree: Tree) -> Iterator[str]:
    rows = []
    for name in tree["names"]:
        cost = tree["costs"][name]
        speed = cost["speed"]
        prefill = (cost["encoder"] + cost["joint"] + cost["llm"]) / 1e9
        rows.append(
            [
                f"`{name}`",
                f"{count(cost['trained'])} ({cost['trained'] / cost['parameters']:.2%})",
                f"{cost['training'] / 1e12:,.3g}",
                f"{cost['memory'] / 1e9:.2f}",
                f"{prefill:,.1f}",
                "·" if speed is None else f"{speed['prefill']:,.0f}",
                "·" if speed is None else f"{speed['decode']:,.1f}",
                f"{(cost['cache'] + cost['aside']) / 2**20:,.2f}",
            ]
        )
    heads = ["joint", "trained", "training", "peak GB", "prefill, GFLOP", "prefill, ms", "token, ms", "kept, MiB"]
    return _rows(heads, rows)


def _matched(tree: Tree) -> Iterator[str]:
    for setting in tree["settings"]:
        values: dict[str, list[str]] = {}
        for name, value in setting["values"].items():
            values.setdefault(value, []).append(f"`{name}`")
        if len(values) == 1:
            yield f"- {setting['name']}: {setting['within'] or 'the same'}"
        else:
            told = "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())
            yield f"- {setting['name']}: {setting['within'] or '**differs**'}. {told}"


def _runs(tree: Tree) -> Iterator[str]:
    rows = [
        [f"`{run['name']}`", str(run["seed"]), f"`{run['fingerprint']}`", f"`{run['data_hash']}`", run["revision"]]
        for run in tree["runs"]
    ]
    return _rows(["joint", "seed", "recipe", "data", "revision"], rows)
