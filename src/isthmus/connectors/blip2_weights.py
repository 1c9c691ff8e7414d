"""A Q-Former's weights as transformers' BLIP-2 and InstructBLIP name them (Li et al. 2023, arXiv 2301.12597)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.connectors.qformer import QFormer
from isthmus.types import ConfigError

NAMES = (
    (r"^queries$", r"query_tokens"),
    (r"^picture_norm\.", r"vision_model.post_layernorm."),
    (r"^enter\.0\.", r"qformer.layernorm."),
    (r"^layers\.(\d+)\.attention\.(query|key|value)\.", r"qformer.encoder.layer.\1.attention.attention.\2."),
    (r"^layers\.(\d+)\.cross\.(query|key|value)\.", r"qformer.encoder.layer.\1.crossattention.attention.\2."),
    (r"^layers\.(\d+)\.attention\.out\.", r"qformer.encoder.layer.\1.attention.output.dense."),
    (r"^layers\.(\d+)\.cross\.out\.", r"qformer.encoder.layer.\1.crossattention.output.dense."),
    (r"^layers\.(\d+)\.attention\.norm\.", r"qformer.encoder.layer.\1.attention.output.LayerNorm."),
    (r"^layers\.(\d+)\.cross\.norm\.", r"qformer.encoder.layer.\1.crossattention.output.LayerNorm."),
    (r"^layers\.(\d+)\.feed\.expand\.", r"qformer.encoder.layer.\1.intermediate_query.dense."),
    (r"^layers\.(\d+)\.feed\.contract\.", r"qformer.encoder.layer.\1.output_query.dense."),
    (r"^layers\.(\d+)\.feed\.norm\.", r"qformer.encoder.layer.\1.output_query.LayerNorm."),
    (r"^layers\.(\d+)\.text_feed\.expand\.", r"qformer.encoder.layer.\1.intermediate.dense."),
    (r"^layers\.(\d+)\.text_feed\.contract\.", r"qformer.encoder.layer.\1.output.dense."),
    (r"^layers\.(\d+)\.text_feed\.norm\.", r"qformer.encoder.layer.\1.output.LayerNorm."),
    (r"^words\.word\.", r"qformer.embeddings.word_embeddings."),
    (r"^words\.position\.", r"qformer.embeddings.position_embeddings."),
    (r"^project\.", r"language_projection."),
)
"""Our names and theirs; InstructBLIP keeps the entering norm with its embeddings."""

TEXT = re.compile(r"words\.|layers\.\d+\.text_feed\.")
"""Our names of what text alone goes through."""


def theirs(name: str, instruct: bool = False) -> str:
    """The name of one of our parameters in transformers' BLIP-2, or in its InstructBLIP."""
    for ours, other in NAMES:
        if re.match(ours, name):
            name = re.sub(ours, other, name)
            return name.replace("qformer.layernorm.", "qformer.embeddings.layernorm.") if instruct else name
    return name


@torch.no_grad()
def take_over(former: QFormer, state: Mapping[str, Tensor], project: bool = False) -> None:
    """Give a Q-Former the weights of transformers' BLIP-2 or InstructBLIP; with `project`, its projection too.

    BLIP-2's second stage has no text half: one of ours stays as it is.

    Raises:
        ConfigError: a weight is missing there, or has another shape.
    """
    instruct = "qformer.embeddings.layernorm.weight" in state
    reads = any(".intermediate.dense." in name for name in state)
    for name, parameter in former.named_parameters():
        if (name.startswith("project.") and not project) or (TEXT.match(name) and not reads):
            continue
        other = theirs(name, instruct)
        found = state.get(other, state.get(f"model.{other}"))
        if found is None or found.squeeze(0).shape != parameter.shape:
            have = "none" if found is None else list(found.shape)
            raise ConfigError(
                f"the Q-Former's {name} is {list(parameter.shape)}, the checkpoint's {other} {have}",
                "give the joint the shape of the checkpoint's Q-Former",
            )
        parameter.copy_(found.squeeze(0))
