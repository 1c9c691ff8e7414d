"""One picture prepared for several encoders, each in its own size and statistics, as one row of numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from isthmus.data import media


class Views(BaseImageProcessor):
    """The image processors of several encoders; saved and loaded as any one.

    Args:
        members: transformers image processors, or what their `to_dict` says.
    """

    def __init__(self, members: Sequence[Any] = (), **unused: Any):
        super().__init__()
        self.members = [_revive(member) if isinstance(member, dict) else member for member in members]

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        members = [json.loads(member.to_json_string()) for member in self.members]
        return {"image_processor_type": type(self).__name__, "members": members}


class ViewsConfig(PreTrainedConfig):
    """The name under which transformers' auto class finds `Views`."""

    model_type = "isthmus-views"


AutoImageProcessor.register(ViewsConfig, image_processor_classes={"pil": Views}, exist_ok=True)


def pixels(image: Pillow.Image, processor: Any, aspect: media.Aspect) -> Tensor:
    """An RGB picture as an encoder wants it: [C, H, W], or for several encoders [P], one view after the other."""
    if not isinstance(processor, Views):
        return media.pixels(image, processor, aspect)
    return torch.cat([media.pixels(image, member, aspect).flatten() for member in processor.members])


def _revive(fields: dict[str, Any]) -> Any:
    """The image processor that these fields describe; transformers makes one from a folder alone."""
    with TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
