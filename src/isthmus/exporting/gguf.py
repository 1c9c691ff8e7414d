"""Export to two GGUF files for llama.cpp, the LLM and what sees (`mmproj`), read back and compared first.

llama.cpp knows LLaVA's joint over CLIP's and SigLIP's vision transformers; what it cannot express is refused by name.
Numbers are kept exactly: every matrix is stored in the smallest of bfloat16, float16 and float32 that holds all of its
values, and `llama-quantize` makes the LLM's file smaller from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor, nn

from isthmus import cards, parts
from isthmus.aligners.llava import LLaVA
from isthmus.config import EncoderConfig
from isthmus.connectors.mlp import MLP
from isthmus.encoders import Encoder, state_index
from isthmus.encoders.hf import Transformer
from isthmus.exporting import (
    Parity,
    Trial,
    answering,
    dense,
    gguf_check,
    gguf_file,
    gguf_llm,
    opened,
    projector,
    refuse,
    staged,
)
from isthmus.exporting.gguf_file import Content
from isthmus.model import VLM

LLM, SIGHT = "model.gguf", "mmproj.gguf"
TOWERS = ("clip_vision_model", "siglip_vision_model")
GELU = {"quick_gelu": False, "gelu_pytorch_tanh": True}
"""Activations of a tower that llama.cpp computes: the sigmoid's approximation of GELU, and that of tanh."""
CLASS_LAST = (
    "llama.cpp (seen in b11549, its issue 25814) puts CLIP's class token behind the patches: "
    "its answers differ from this model's until that is mended"
)


@dataclass(frozen=True)
class Written:
    """What was written: how far its logits moved, and what llama.cpp is known to do otherwise.

    Attributes:
        parity: of the logits.
        caveat: what it computes otherwise, if anything.
        pictures: how it prepares them.
    """

    parity: Parity
    caveat: str
    pictures: str

    @property
    def notes(self) -> list[str]:
        """All that a user should know."""
        return [note for note in (self.pictures, self.caveat) if note]


def export(source: str | Path, out: Path) -> Written:
    """Write a saved model as `out/model.gguf` and `out/mmproj.gguf` with a card: parts in few bits dense, LoRA merged.

    Raises:
        ConfigError: llama.cpp cannot express this model; what and why is said.
        IsthmusError: what is read back is not what was written, or its logits differ.
    """
    ours = opened(source, out)
    _require_fit(ours)
    gguf_llm.require_fit(ours)
    trial = Trial.of(ours)
    before = trial.logits(ours, ours.placeholder("image"))
    dense(ours)
    with staged(out) as folder:
        llm, sight = folder / LLM, folder / SIGHT
        gguf_file.write(llm, gguf_llm.content(ours))
        gguf_file.write(sight, content(ours))
        parity = Parity.between(before, gguf_check.logits(llm, sight, trial))
        parity.require(f"export of {source}")
    encoder = ours.encoders["image"]
    written = Written(parity, CLASS_LAST if encoder.extra else "", _prepared(encoder))
    exported = cards.Export("GGUF for llama.cpp", "gguf", _CODE, parity.difference, caveats=written.notes)
    cards.write_export(parts.folder(str(source)), out, exported)
    return written


def _prepared(encoder: Encoder) -> str:
    """What llama.cpp does with pictures, which no field of the file changes."""
    trained = "" if encoder.aspect == "pad" else f", and this model was trained with `aspect: {encoder.aspect}`"
    return (
        f"llama.cpp pads pictures to a square and resizes them by its own code{trained}: "
        f"give it squares of {encoder.size} pixels, prepared as in training"
    )


_CODE = f"""# llama-server -m {LLM} --mmproj {SIGHT}
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8080/v1", api_key="none")
picture = {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}
question = {{"type": "text", "text": "\\nWhat is this?"}}  # the line break is part of how the model was trained
answer = client.chat.completions.create(model="any", messages=[{{"role": "user", "content": [picture, question]}}])"""


def _require_fit(ours: VLM) -> None:
    """Whether llama.cpp's graph of LLaVA is this model's; what it cannot express is said."""
    joint = projector(ours)
    reasons = [
        (answering(ours) != LLaVA.name, f"its joint is {ours.aligner.name}"),
        (
            not isinstance(joint, MLP) or len(joint.layers) > 3,
            "its connector is not one or two Linears (pool, normalise)",
        ),
        (set(ours.encoders) != {"image"}, "it has other encoders beside the image's"),
        *_misfits(ours.encoders["image"], ours.config.encoder("image")),
    ]
    refuse("llama.cpp cannot express this model", reasons)


def _misfits(encoder: Encoder, chosen: EncoderConfig) -> list[tuple[bool, str]]:
    if not isinstance(encoder, Transformer):
        return [(True, "its encoder is not a vision transformer")]
    tower: Any = encoder.tower.config
    if tower.model_type not in TOWERS:
        return [(True, f"its encoder is {tower.model_type}, not CLIP's or SigLIP's vision transformer")]
    return [
        (chosen.class_token == "keep" and encoder.extra > 0, "its encoder keeps the class token"),
        (state_index(chosen.layer, tower.num_hidden_layers) == 0, "its encoder is read before the first block"),
        (tower.hidden_act not in GELU, f"its encoder's activation is {tower.hidden_act}"),
        (tower.hidden_size == tower.intermediate_size, "its encoder's inner layers are as wide as its outer"),
        (chosen.image_size is not None, "its encoder's pictures are not of their own size"),
    ]


def content(ours: VLM) -> Content:
    """The file of a model's encoder and joint."""
    tensors = dict(_encoder(ours)) | _joint(projector(ours))
    return Content(MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ], lambda writer: _describe(writer, ours), tensors)


def _depth(ours: VLM) -> int:
    """How many blocks lie before the state that is read; later ones are left out."""
    return state_index(ours.config.encoder("image").layer, ours.encoders["image"].tower.config.num_hidden_layers)


def _encoder(ours: VLM) -> Iterator[tuple[str, Tensor]]:
    depth = _depth(ours)
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, depth)
    for name, tensor in ours.encoders["image"].tower.state_dict().items():
        if name.startswith(("post_layernorm", "head.")):
            continue
        place = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if place is not None:  # blocks behind the state that is read have no name
            yield place, tensor


def _joint(joint: MLP) -> dict[str, Tensor]:
    """Two Linears with GELU between them. One alone is the same as two: GELU(z) - GELU(-z) = z."""
    linears = [layer for layer in joint.layers if isinstance(layer, nn.Linear)]
    if len(linears) == 1:
        (only,) = linears
        eye = torch.eye(only.in_features)
        ends = [
            (torch.cat([eye, -eye]), torch.zeros(2 * len(eye))),
            (torch.cat([only.weight, -only.weight], 1), only.bias),
        ]
    else:
        ends = [(linear.weight, linear.bias) for linear in linears]
    places = zip(("mm.0", "mm.2"), ends, strict=True)
    return {f"{place}.{kind}": tensor for place, end in places for kind, tensor in zip(("weight", "bias"), end)}


def _describe(writer: GGUFWriter, ours: VLM) -> None:
    encoder = ours.encoders["image"]
    tower, depth = encoder.tower.config, _depth(ours)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(ours.llm.config.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_use_gelu(GELU[tower.hidden_act])
    writer.add_vision_image_mean(encoder.processor.image_mean)
    writer.add_vision_image_std(encoder.processor.image_std)
    writer.add_array("clip.vision.feature_layer", [depth])  # the key has no method in `gguf`
