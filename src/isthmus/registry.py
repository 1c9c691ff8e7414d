"""Classes by the names that recipes use: the package's own, other packages', and those that a process registers."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from isthmus.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """All classes of one kind.

    Args:
        what: the kind, for errors.
        base: what they derive from; each has a `name` of its own.
        group: the package whose files are named like our own, and the entry-point group of other packages'.
        registered: classes by name that `register` was given in this Python process.
    """

    what: str
    base: type[T]
    group: str
    registered: dict[str, type[T]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        KINDS[self.what] = self

    def inside(self) -> dict[str, str]:
        """Our own names, and their modules."""
        folder = Path(__file__).with_name(self.group.rpartition(".")[2])
        names = (module.name for module in pkgutil.iter_modules([str(folder)]))
        return {name: f"{self.group}.{name}" for name in names if not name.startswith("_")}

    def known(self) -> dict[str, str]:
        """Every name, of ours and of installed packages, and its module."""
        return _offered(self.group, tuple(sys.path)) | self.inside()

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ConfigError: no such name (the nearest is suggested), two classes claim it, or it cannot be imported.
        """
        if name in self.registered:
            return self.registered[name]
        modules = self.known()
        if name not in modules:
            names = sorted({*modules, *self.registered})
            raise ConfigError(
                f"no {self.what} named {name!r}{nearest(name, names)}",
                f"there are {names}; one that `isthmus.register` was given is known in that process alone, "
                "one of an installed package by an entry point",
            )
        if name in self.inside() and (place := _offered(self.group, tuple(sys.path)).get(name)):
            raise ConfigError(
                f"{self.what} {name!r} is isthmus's own, and {place} offers another", "remove one of them"
            )
        try:
            module = importlib.import_module(modules[name])
        except ImportError as error:
            raise ConfigError(
                f"{self.what} {name!r} cannot be imported from {modules[name]}: {error}", "mend that package"
            ) from error
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, self.base) and item.__dict__.get("name") == name:
                return item
        raise ConfigError(f"{modules[name]} has no {self.what} with name = {name!r}", "set `name` in its class")


KINDS: dict[str, Registry[Any]] = {}
"""Every kind of class that recipes name."""


def register(kind: type[T]) -> type[T]:
    """Let recipes name a class of the user's own, such as one in a notebook, in this process; also as a decorator.

    Registered again, a name means the newer class. A checkpoint that names it is loaded where it is registered.

    Raises:
        ConfigError: it is of no kind that recipes name, has no name of its own, or the name is taken.
    """
    for registry in KINDS.values():
        if issubclass(kind, registry.base):
            name = kind.__dict__.get("name")
            if not isinstance(name, str) or name in registry.known():
                taken = f"the name {name!r} is taken" if name else "it has no name of its own"
                raise ConfigError(f"{kind.__name__} cannot be registered: {taken}", "set another `name` in the class")
            registry.registered[name] = kind
            return kind
    raise ConfigError(f"{kind.__name__} is none of {', '.join(sorted(KINDS))}", "derive it from one of their classes")


@functools.cache
def _offered(group: str, path: tuple[str, ...]) -> dict[str, str]:
    """What packages that are installed on a path offer: names and modules."""
    return {point.name: point.module for point in entry_points(group=group)}
