"""Isthmus: the narrow trained joint between a pretrained encoder and a pretrained LLM.

    import isthmus
    model = isthmus.load("runs/demo/sft/model")

Importing the package registers its models with transformers' Auto classes.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

if Path(sys.argv[0] if sys.argv else "").name != "isthmus":  # `isthmus --help` answers before torch is loaded
    from isthmus.assembly import compose, load
    from isthmus.comparing.compare import compare
    from isthmus.config import Recipe
    from isthmus.model import VLM, VLMConfig
    from isthmus.types import Audio, Box, ConfigError, DataError, Image, IsthmusError, Sample, Tag, Text, Turn, Video

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
    ]
