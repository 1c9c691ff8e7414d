"""What has to agree when a run goes on: all that its steps follow from, and nothing that only surrounds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, TypeAlias

Tree: TypeAlias = Mapping[str, Any]

AROUND_RUN = frozenset({"about", "eval", "engine"})
AROUND_STAGE = frozenset({"recompute", "save_every", "evaluate_every"})
"""Fields that change no step of the training."""


def of_recipe(was: Tree, now: Tree) -> list[str]:
    """What keeps a recipe, as plain values, from going on with the run of another; none if it may.

    Args:
        was: the recipe of the run with those stages alone that have begun; others may come behind them.
    """
    wrong = differing(was, now, AROUND_RUN | {"stages"})
    names = [stage["name"] for stage in was["stages"]]
    if [stage["name"] for stage in now["stages"][: len(names)]] != names:
        return [*wrong, f"stages were {', '.join(names) or 'none'}"]
    for before, after in zip(was["stages"], now["stages"]):
        wrong += [f"stages.{before['name']}.{fault}" for fault in of_stage(before, after)[0]]
    return wrong


def of_stage(was: Tree, now: Tree) -> tuple[list[str], list[str]]:
    """What keeps a stage from going on where another stopped, and what may differ but is worth saying.

    As long as overlong samples are refused, none has come, so that what becomes of them is free, and so is a larger
    `max_length`.
    """
    refused = was.get("overlong") == "error"
    said = {}
    if now["accumulate"] != was["accumulate"]:
        said["accumulate"] = "; sums are the same but for rounding, and dropout draws otherwise"
    if refused and now["overlong"] != was["overlong"]:
        said["overlong"] = "; no sample was too long before"
    if refused and now["max_length"] > was["max_length"]:
        said["max_length"] = "; no sample was longer than that"
    texts = [f"{key} is {now[key]} from here on, and was {was[key]}{why}" for key, why in said.items()]
    return differing(was, now, AROUND_STAGE | said.keys()), texts


def differing(was: Tree, now: Tree, but: Set[str] = frozenset()) -> list[str]:
    """What differs between two trees, by dotted names, as the first one has it; but for some fields."""
    before, after = ({key: value for key, value in tree.items() if key not in but} for tree in (was, now))
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [f"{name} was {_short(old.get(name))}" for name in {**old, **new} if old.get(name) != new.get(name)]


def _leaves(tree: Tree, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted name; lists are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, None if value == {} else value


def _short(value: Any) -> str:
    """A value in one line that can be read at a glance."""
    text = value if isinstance(value, str) else "not given" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def told(wrong: Sequence[str]) -> str:
    """The first differences, in one line."""
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
