"""Isthmus: the narrow trained joint between a pretrained encoder and a pretrained LLM.

    import isthmus
    model = isthmus.load("runs/demo/sft/model")

Importing the package registers its models with transformers' Auto classes.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.assembly import compose, load
    from isthmus.comparing.compare import compare
    from isthmus.config import Recipe
    from isthmus.model import VLM, VLMConfig
    from isthmus.registry import register
    from isthmus.types import Audio, Box, ConfigError, DataError, Image, IsthmusError, Sample, Tag, Text, Turn, Video

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Audio",
    "Box",
    "ConfigError",
    "DataError",
    "Image",
    "IsthmusError",
    "Recipe",
    "Sample",
    "Tag",
    "Text",
    "Turn",
    "VLMConfig",
    "Video",
    "compare",
    "compose",
    "load",
    "register",
]
_HOMES = {"VLM": "model", "VLMConfig": "model", "Recipe": "config", "compare": "comparing.compare"}
_HOMES |= {"compose": "assembly", "load": "assembly", "register": "registry"}
"""Where the public names live; those that are not here are nouns of `types`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"isthmus.{_HOMES.get(name, 'types')}"), name)
    return found


if Path(sys.argv[0] if sys.argv else "").name != "isthmus":  # `isthmus --help` answers before torch is loaded
    for _name in __all__:
        __getattr__(_name)
