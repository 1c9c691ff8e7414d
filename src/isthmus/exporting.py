"""Exchange with transformers' own LLaVA class, in both directions, with the logits compared before anything is written.

`LlavaForConditionalGeneration` holds a two-layer MLP over one depth of a vision transformer; what it cannot express
is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from isthmus import lora, parts
from isthmus.aligners.llava import LLaVA
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig
from isthmus.connectors.mlp import MLP
from isthmus.encoders import hf
from isthmus.encoders.hf import Transformer
from isthmus.model import VLM, VLMConfig
from isthmus.processor import MARKER, VLMProcessor
from isthmus.types import ConfigError, IsthmusError

TOLERANCE = 1e-4
"""Largest difference of float32 logits that counts as equal."""


@dataclass(frozen=True)
class Parity:
    """How close two models are: the largest absolute difference of their float32 logits."""

    difference: float

    def require(self, what: str) -> None:
        if self.difference > TOLERANCE:
            raise IsthmusError(
                f"{what}: logits differ by {self.difference:.2e}, more than {TOLERANCE:.0e}", "nothing was written"
            )


def import_llava(source: Path, out: Path) -> Parity:
    """Read a LLaVA directory of transformers and write the same model as ours, base weights included.

    Raises:
        ConfigError: the directory uses something that our LLaVA does not have.
        IsthmusError: the logits differ.
    """
    with hf.quiet():
        folder = parts.folder(str(source))
        theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    ours = from_llava(theirs, processor, str(source))
    parity = compare(ours, theirs)
    parity.require(f"import of {source}")
    ours.save_pretrained(out, whole=True)
    return parity


def from_llava(theirs: LlavaForConditionalGeneration, processor: LlavaProcessor, source: str) -> VLM:
    """The same model in our frame, sharing the vision tower's and the LLM's weights."""
    config: Any = theirs.config
    if not isinstance(config.vision_feature_layer, int):
        raise ConfigError(f"vision_feature_layer is {config.vision_feature_layer}", "only one depth can be imported")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ConfigError("the projector is not Linear, GELU, Linear with biases", "only LLaVA-1.5's can be imported")
    class_token = "drop" if config.vision_feature_select_strategy == "default" else "keep"
    chosen = EncoderConfig(source=source, layer=config.vision_feature_layer, class_token=class_token, aspect="crop")
    tower = theirs.model.vision_tower
    encoder = Transformer(chosen, tower, processor.image_processor, {"source": source})
    llm = parts.empty_llm(config.text_config, LLMConfig().attention)
    llm.base_model.load_state_dict(theirs.model.language_model.state_dict())
    llm.get_output_embeddings().load_state_dict(theirs.lm_head.state_dict())
    llm.generation_config = theirs.generation_config
    ours = VLM(
        VLMConfig(
            text_config=config.text_config,
            llm={"config": LLMConfig(source=source).model_dump(), "weights": None},
            encoders={
                "image": {
                    "config": chosen.model_dump(mode="json"),
                    "architecture": config.vision_config.to_dict(),
                    "weights": None,
                }
            },
            aligner=AlignerConfig(name=LLaVA.name).model_dump(),
            whole=True,
        ),
        llm,
        {"image": encoder},
    )
    joint = ours.connectors["image"].layers
    joint[0].load_state_dict(theirs.model.multi_modal_projector.linear_1.state_dict())
    joint[2].load_state_dict(theirs.model.multi_modal_projector.linear_2.state_dict())
    ours.processor = VLMProcessor.of(ours, processor.tokenizer)
    return ours.eval()


def export(source: str | Path, out: Path, to: str = "llava") -> Parity:
    """Write a saved model as a native class of transformers.

    Raises:
        ConfigError: the class cannot express this model; what and why is said.
        IsthmusError: the logits differ.
    """
    if to != "llava":
        raise ConfigError(f"no export named {to!r}", "use --to llava")
    ours = VLM.from_pretrained(source, dtype=torch.float32)
    for adapter in ours.config.lora:
        lora.merge(ours, adapter["name"])
    theirs, processor = to_llava(ours)
    parity = compare(ours, theirs)
    parity.require(f"export of {source}")
    with hf.quiet():
        theirs.save_pretrained(out)
    processor.save_pretrained(out)
    return parity


def to_llava(ours: VLM) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same model as `LlavaForConditionalGeneration`, with its processor."""
    encoder, joint = ours.encoders["image"], ours.connectors["image"]
    reasons = [
        (not isinstance(encoder, Transformer), "its encoder is not a vision transformer"),
        (not isinstance(joint, MLP) or len(joint.layers) != 3, "its connector is not LLaVA-1.5's two-layer MLP"),
        (ours.aligner.name != LLaVA.name, f"its joint is {ours.aligner.name}"),
        (ours.config.is_encoder_decoder, "its LLM is an encoder-decoder"),
    ]
    for unfit, reason in reasons:
        if unfit:
            raise ConfigError(
                f"transformers' LLaVA cannot hold this model: {reason}", "keep it as it is; `load` reads it"
            )
    chosen = ours.config.encoder("image")
    tokenizer, text = copy.deepcopy((ours.processor.tokenizer, ours.llm.config))  # both get the marker below
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    image_token = tokenizer.convert_tokens_to_ids(MARKER)
    strategy: Any = "default" if chosen.class_token == "drop" and encoder.extra else "full"
    config = LlavaConfig(
        vision_config=encoder.tower.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=encoder.tokens,
        vision_feature_layer=int(chosen.layer),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(encoder.tower.state_dict())
    theirs.model.language_model.load_state_dict(ours.llm.base_model.state_dict())
    theirs.lm_head.load_state_dict(ours.llm.get_output_embeddings().state_dict())
    theirs.model.multi_modal_projector.linear_1.load_state_dict(joint.layers[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(joint.layers[2].state_dict())
    if image_token >= text.vocab_size:
        theirs.resize_token_embeddings(image_token + 1, mean_resizing=False)
    theirs.generation_config = ours.generation_config
    processor = LlavaProcessor(
        encoder.processor,
        tokenizer,
        patch_size=encoder.tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=MARKER,
        num_additional_image_tokens=encoder.extra,
        chat_template=tokenizer.chat_template,
    )
    return theirs, processor


@torch.inference_mode()
def compare(ours: VLM, theirs: LlavaForConditionalGeneration, rows: int = 2, text: int = 8) -> Parity:
    """Logits of both on the same random pictures and token ids, every position of the text rows they share."""
    generator = torch.Generator().manual_seed(0)
    encoder, shared = ours.encoders["image"], ours.config.text_config.vocab_size
    pixels = torch.randn(rows, 3, encoder.size, encoder.size, generator=generator)
    words = torch.randint(shared - 1, (rows, text), generator=generator)
    words = words.where(words != theirs.config.image_token_id, 0)

    def logits(model: VLM | LlavaForConditionalGeneration, image_token: int) -> Tensor:
        image = torch.full((rows, encoder.tokens), image_token)
        ids = torch.cat([words[:, :1], image, words[:, 1:]], 1)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        return out.logits[..., :shared]

    difference = logits(ours, ours.placeholder("image")) - logits(theirs, theirs.config.image_token_id)
    return Parity(difference.abs().max().item())
