"""Export of what sees, encoder and joint, to ONNX: pixels in, vectors in the LLM's input space out, compared first.

The LLM stays outside: its runtimes take embeddings, and each has its own exporter.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import cards, graft, lora, parts, sites, tokens
from isthmus.aligner import Aligner
from isthmus.encoders.several import Several
from isthmus.exporting import ANOTHER, Parity, dense, opened, refuse, staged
from isthmus.exporting.native import picture_processor
from isthmus.model import VLM
from isthmus.types import ConfigError, Context, IsthmusError, Media

FILE = "encoder_joint.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
PROBE = (1, 3)
"""Numbers of pictures that both are asked about."""


class Sight(nn.Module):
    """Encoder and joint of a model as one module.

    Args:
        model: whose image encoder and connector.
    """

    def __init__(self, model: VLM):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, H, W] -> y [N, Q, D]."""
        at_N = torch.zeros(pixels.shape[0], dtype=torch.long)  # `len` would fix the number of pictures
        features = self.model.encode("image", Media(at_N, at_N, at_N, pixels=pixels))
        return self.model.connectors["image"](features, Context(words=partial(sites.words, self.model.llm)))


def export(source: str | Path, out: Path) -> Parity:
    """Write encoder and joint of a saved model as `out/encoder_joint.onnx`, with its image processor and a card.

    Raises:
        ConfigError: the packages are missing, its joint cannot stand alone, or transformers prepares its pictures
            otherwise; why is said.
        IsthmusError: the exporter fails, or onnxruntime computes something else.
    """
    _require_packages()
    ours = opened(source, out)
    _require_fit(ours)
    encoder = ours.encoders["image"]
    sight, size, processor = Sight(ours).eval(), encoder.size, picture_processor(encoder)
    generator = torch.Generator().manual_seed(0)
    shown = [torch.randn(number, 3, size, size, generator=generator) for number in PROBE]
    with torch.no_grad():
        expected = [sight(pixels) for pixels in shown]
    dense(ours)
    with staged(out) as folder:  # weights that are too large for one file lie beside it
        file = folder / FILE
        _write(sight, shown[-1], file)
        parity = Parity.between(torch.cat(expected), torch.cat([_run(file, pixels) for pixels in shown]))
        parity.require(f"export of {source}", "vectors")
    processor.save_pretrained(out)
    exported = cards.Export("encoder and joint in ONNX", "onnx", _CODE, parity.difference, "vectors")
    cards.write_export(parts.folder(str(source)), out, exported)
    return parity


_CODE = f"""import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
(vectors,) = session.run(None, {{"pixels": pixels}})  # [N, 3, H, W] -> [N, Q, D], for the LLM's input"""


def _require_packages() -> None:
    for package in NEEDED:
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(f"{package} is not installed", "pip install 'isthmus[onnx]'") from None


def _require_fit(ours: VLM) -> None:
    """Whether encoder and joint are a function of the picture alone; what they are not is said."""
    reasons = [
        (ours.connectors["image"].reads_context, "its connector reads the question beside the picture"),
        (_inside(ours), "its joint works inside the LLM's layers, not in its input alone"),
        (isinstance(ours.encoders["image"], Several), "several encoders see its picture, each in its own size"),
    ]
    refuse("encoder and joint alone are not this model's sight", reasons, ANOTHER)


def _inside(ours: VLM) -> bool:
    """Whether a joint adds to the LLM's modules, or to its positions and to who sees whom; LoRA and new words aside."""
    additions = [each for module in ours.llm.modules() for each in graft.at(module).values()]
    grafted = any(not isinstance(each, lora.LowRank | tokens.NewRows) for each in additions)
    answers = any(getattr(type(ours.aligner), name) is not getattr(Aligner, name) for name in ("positions", "rule"))
    return not ours.aligner.splices or grafted or answers


def _write(sight: Sight, pixels: Tensor, file: Path) -> None:
    """One graph for any number of pictures."""
    number = torch.export.Dim("pictures", min=1)
    try:
        with _quiet():
            torch.onnx.export(
                sight,
                (pixels,),
                file,
                dynamo=True,
                input_names=["pixels"],
                output_names=["vectors"],
                dynamic_shapes={"pixels": {0: number}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error).strip().splitlines()[0]
        raise IsthmusError(f"torch cannot write this encoder and joint as ONNX ({cause})", "keep it as it is") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without two things that torch tells its own developers: operators that no model here has, a deprecated check."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.addFilter(_of_use)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        registration.removeFilter(_of_use)


def _of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed")


def _run(file: Path, pixels: Tensor) -> Tensor:
    """pixels [N, 3, H, W] -> y [N, Q, D]."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    if not isinstance(session.get_inputs()[0].shape[0], str):
        raise IsthmusError(
            "this encoder and joint became a graph for one number of pictures alone",
            "use x.shape[0] or x.unflatten(…) rather than len(x) or int(…) in the connector's forward",
        )
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    return torch.from_numpy(found)
