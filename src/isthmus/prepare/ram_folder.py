"""A user's folder of RAM's weights and lists, made of the public checkpoint; nothing in it is run, and all is checked.

The release is a pickle, which is never opened here: who has it copies its tensors to safetensors with its own tools
(docs/systems/lion.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import CLIPImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from isthmus.errors import abbreviated
from isthmus.prepare.ram import HEADS, RAM, VISUAL, Sizes
from isthmus.types import ConfigError, DataError

WEIGHTS, NAMES, THRESHOLDS = "model.safetensors", "ram_tag_list.txt", "ram_tag_list_threshold.txt"
UNREAD = ("tag_encoder.", "text_decoder.")
"""What the names of the half that writes captions begin with."""
MADE = ("relative_position_index", "attn_mask")
"""What the names of tensors end with that follow from the sizes."""
OTHERS = {"reweight_scale": "RAM++", "label_embed.weight": "Tag2Text"}
"""A tensor by which a checkpoint of a related tagger is known."""
REMEDY = "make the folder of RAM's public checkpoint as docs/systems/lion.md says"


@dataclass(frozen=True)
class Folder:
    """A folder whose lists and whose weights' header were read and agree."""

    path: Path
    sizes: Sizes
    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    stored: Mapping[str, str]
    """What the file calls the network's tensors, by the names of the release."""

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Check a folder; no weight is read.

        Raises:
            ConfigError: it lacks a file.
            DataError: a list is damaged, the weights are not RAM's, or they do not belong together.
        """
        for name in (WEIGHTS, NAMES, THRESHOLDS):
            if not (path / name).is_file():
                raise ConfigError(f"{path}: no {name}, without which RAM cannot tag", REMEDY)
        stored, shapes = _header(path / WEIGHTS)
        sizes = _sizes(path / WEIGHTS, shapes)
        names = tuple(_lines(path / NAMES))
        thresholds = tuple(_threshold(path / THRESHOLDS, *each) for each in enumerate(_lines(path / THRESHOLDS), 1))
        for name, found in ((NAMES, len(names)), (THRESHOLDS, len(thresholds))):
            if found != sizes.tags:
                raise DataError(f"{path / name}: {found} lines, where {WEIGHTS} has {sizes.tags} tags", REMEDY)
        return cls(path, sizes, names, thresholds, stored)

    @property
    def processor(self) -> CLIPImageProcessorPil:
        """Normalises pictures; those that are not square are to be squashed."""
        return CLIPImageProcessorPil(
            size={"height": self.sizes.side, "width": self.sizes.side},
            do_center_crop=False,
            resample=PILImageResampling.BILINEAR,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )

    def network(self) -> RAM:
        """The network with its weights, on the CPU."""
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            return RAM(self.sizes, {name: file.get_tensor(stored) for name, stored in self.stored.items()})


def _header(file: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """What the file calls the network's tensors, and their shapes, both by the names of the release."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read ({str(error).splitlines()[0]})", REMEDY) from None
    for mark, tagger in OTHERS.items():
        if mark in found:
            raise DataError(f"{file}: these are {tagger}'s weights, not RAM's (they hold {mark!r})", REMEDY)
    stored = {
        name.replace("vision_multi.", "tagging_head.", 1): name  # as the release once called the decoder
        for name in found
        if not name.startswith(UNREAD) and not name.endswith(MADE)
    }
    return stored, {name: found[theirs] for name, theirs in stored.items()}


def _sizes(file: Path, found: Mapping[str, tuple[int, ...]]) -> Sizes:
    """The sizes that some of the tensors tell, which all of them must have.

    Raises:
        DataError: a tensor is missing, one too many, or of another shape than the others ask for.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in found:
            raise DataError(f"{file}: no tensor {name!r}, so these are not RAM's weights", REMEDY)
        if len(found[name]) != axes or 0 in found[name]:
            raise DataError(f"{file}: {name} is of shape {list(found[name])}, which cannot be RAM's", REMEDY)
        return found[name]

    def count(pattern: str) -> int:
        return len({match[1] for name in found if (match := re.match(pattern, name))})

    stages = max(count(rf"{VISUAL}layers\.(\d+)\."), 1)
    tables = [shape(f"{VISUAL}layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(stages)]
    width, _, patch, _ = shape(f"{VISUAL}patch_embed.proj.weight", 4)
    tags, label = shape("label_embed", 2)
    sizes = Sizes(
        patch=patch,
        width=width,
        depths=tuple(count(rf"{VISUAL}layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)),
        heads=tuple(heads for _, heads in tables),
        window=(math.isqrt(tables[0][0]) + 1) // 2,
        tags=tags,
        label=label,
        decoder=shape("wordvec_proj.weight", 2)[0],
        inner=shape("tagging_head.encoder.layer.0.intermediate.dense.weight", 2)[0],
        layers=count(r"tagging_head\.encoder\.layer\.(\d+)\."),
    )
    expected = sizes.shapes()
    for what, names in (("are missing", expected.keys() - found), ("are unknown", found.keys() - expected)):
        if names:
            raise DataError(f"{file}: tensors {what}: {abbreviated(sorted(names))}", REMEDY)
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise DataError(f"{file}: {name} is of shape {list(found[name])}, not {list(wanted)}", REMEDY)
    if sizes.decoder % HEADS or any((width << stage) % heads for stage, heads in enumerate(sizes.heads)):
        raise DataError(f"{file}: the heads of its attention do not divide its widths", REMEDY)
    return sizes


def _lines(file: Path) -> list[str]:
    """The lines of a list; none is empty but at its end."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})", REMEDY) from None
    if "" in lines:
        raise DataError(f"{file}: line {lines.index('') + 1} is empty", REMEDY)
    return lines


def _threshold(file: Path, number: int, line: str) -> float:
    try:
        value = float(line)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise DataError(f"{file}: line {number} is {line!r}, not a number from 0 to 1", REMEDY)
    return value
