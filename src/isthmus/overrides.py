"""Dotted overrides of nested mappings: `stages.align.lr=1e-3`; lists of named things are walked by name or index."""

from __future__ import annotations

from typing import Any

import yaml

from isthmus.errors import ConfigError, nearest

SCHEMA = "`isthmus recipes --schema` lists every key"


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML (so `1e-3` is a number, `[a, b]` a list, `null` None)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def assign(tree: Any, path: list[str], value: Any, whole: str) -> None:
    """Set a value inside nested mappings and lists of named things (stages are found by name or index)."""
    *way, last = path
    for depth, key in enumerate(way):
        place = _place(tree, key, path[depth - 1], whole)
        if isinstance(tree, dict):
            if key not in tree:
                raise ConfigError(f"{whole}: unknown key {key!r}{nearest(key, list(tree))}", SCHEMA)
            if isinstance(tree[key], tuple):
                tree[key] = list(tree[key])
            if not isinstance(tree[key], dict | list):
                tree[key] = {}
        tree = tree[place]
    tree[_place(tree, last, path[-2] if way else "", whole)] = value


def _place(tree: Any, key: str, owner: str, whole: str) -> Any:
    """Where `key` is in a mapping (itself) or a list (the index of the item of that name)."""
    if isinstance(tree, dict):
        return key
    names = [item.get("name", "") for item in tree]
    index = names.index(key) if key in names else int(key) if key.isdigit() else -1
    if not 0 <= index < len(tree):
        raise ConfigError(f"{whole}: no {owner} named {key!r}{nearest(key, names)}", f"there are {names}")
    return index
