"""Exchange with transformers' own LLaVA class, in both directions, with the logits compared before anything is written.

`LlavaForConditionalGeneration` holds a two-layer MLP over one depth of a vision transformer, and a single Linear as one
without an activation, whose second layer changes nothing; what it cannot express is refused by name.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from isthmus import kernels_linear, parts
from isthmus.aligners.llava import LLaVA
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig
from isthmus.connectors.mlp import MLP
from isthmus.data import media
from isthmus.encoders.hf import Transformer
from isthmus.exporting import Parity, Trial, answering, dense, opened, projector, refuse
from isthmus.exporting.native import add_marker, begins_alone, by_parts, marked, picture_processor, reads_texts, write
from isthmus.model import VLM, VLMConfig
from isthmus.pretrained import complete
from isthmus.processor import MARKER, VLMProcessor
from isthmus.types import ConfigError, Layout


def import_llava(source: Path, out: Path) -> Parity:
    """Read a LLaVA directory of transformers and write the same model as ours, base weights included.

    Raises:
        ConfigError: the directory holds another model, or not all of one, or uses something that our LLaVA has not.
        IsthmusError: the logits differ.
    """
    folder = parts.folder(str(source))
    _require_llava(parts.read_object(folder / "config.json"), source)
    theirs = complete(LlavaForConditionalGeneration, folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    ours = from_llava(theirs, processor, str(source))
    kernels_linear.use_pytorch(ours)
    parity = compare(ours, theirs)
    parity.require(f"import of {source}")
    ours.save_pretrained(out, whole=True)
    return parity


def _require_llava(described: dict[str, Any], source: Path) -> None:
    """Whether a config.json is of transformers' LLaVA: of any other, transformers would make one of 7B by default."""
    kind = described.get("model_type", "model without a type")
    if kind == VLMConfig.model_type:
        raise ConfigError(f"{source} is a model of Isthmus already", "use it as it is: nothing has to be imported")
    converted = "authors' checkpoints have a converted form on the hub, whose name ends in -hf"
    if kind != LlavaConfig.model_type:
        raise ConfigError(f"{source} is a {kind}, not a LLaVA of transformers", f"name such a one; {converted}")
    if not {"text_config", "vision_config"} <= described.keys():
        raise ConfigError(f"{source} is a LLaVA in its authors' layout, not a LLaVA of transformers", converted)


def from_llava(theirs: LlavaForConditionalGeneration, processor: LlavaProcessor, source: str) -> VLM:
    """The same model in our frame, sharing the vision tower's and the LLM's weights."""
    config: Any = theirs.config
    if not isinstance(config.vision_feature_layer, int):
        raise ConfigError(f"vision_feature_layer is {config.vision_feature_layer}", "only one depth can be imported")
    linear = config.projector_hidden_act == "linear"
    if not (linear or config.projector_hidden_act == "gelu") or not config.multimodal_projector_bias:
        raise ConfigError("the projector is not Linear, GELU, Linear with biases", "only LLaVA-1.5's can be imported")
    class_token = "drop" if config.vision_feature_select_strategy == "default" else "keep"
    chosen = EncoderConfig(
        source=source,
        layer=config.vision_feature_layer,
        class_token=class_token,
        aspect=_aspect(processor.image_processor),
    )
    tower = theirs.model.vision_tower
    encoder = Transformer(chosen, tower, processor.image_processor, {"source": source})
    text = copy.deepcopy(config.text_config)  # a VLMConfig takes the kernel's name out of what it is given
    llm = parts.empty_llm(config.text_config, LLMConfig().attention)
    llm.base_model.load_state_dict(theirs.model.language_model.state_dict())
    llm.get_output_embeddings().load_state_dict(theirs.lm_head.state_dict())
    llm.generation_config = theirs.generation_config
    ours = VLM(
        VLMConfig(
            text_config=text,
            llm={"config": LLMConfig(source=source).model_dump(), "weights": None},
            encoders={
                "image": {
                    "config": chosen.model_dump(mode="json"),
                    "architecture": config.vision_config.to_dict(),
                    "weights": None,
                }
            },
            aligner=AlignerConfig(name=LLaVA.name, options={"projector": "linear"} if linear else {}).model_dump(),
            whole=True,
        ),
        llm,
        {"image": encoder},
    )
    first, second = theirs.model.multi_modal_projector.linear_1, theirs.model.multi_modal_projector.linear_2
    joint = ours.connectors["image"].layers
    if linear:  # two in a row are one
        weight, bias = second.weight @ first.weight, second(first.bias)
        joint[0].load_state_dict({"weight": weight, "bias": bias})
    else:
        joint[0].load_state_dict(first.state_dict())
        joint[2].load_state_dict(second.state_dict())
    if template := processor.tokenizer.chat_template:  # an export's is the LLM's own again
        processor.tokenizer.chat_template = template.removeprefix(by_parts("", Layout(0, after="\n")))
    ours.processor = VLMProcessor.of(ours, processor.tokenizer)
    return ours.eval()


def _aspect(processor: Any) -> media.Aspect:
    """How an image processor of transformers makes pictures square."""
    if isinstance(processor, LlavaImageProcessorPil) and processor.do_pad:
        return "pad"
    return "crop" if processor.do_center_crop else "squash"


def export(source: str | Path, out: Path) -> Parity:
    """Write a saved model as `LlavaForConditionalGeneration`: parts in few bits dense, LoRA merged, logits as before.

    Raises:
        ConfigError: the class or its processor cannot express this model; what and why is said.
        IsthmusError: the logits differ.
    """
    ours = opened(source, out)
    _require_fit(ours)
    trial = Trial.of(ours)
    before = trial.logits(ours, ours.placeholder("image"))
    dense(ours)
    theirs, processor = to_llava(ours)
    parity = Parity.between(before, trial.logits(theirs, theirs.config.image_token_id))
    parity.require(f"export of {source}")
    write(theirs, processor, source, out, parity, _ASKED)
    return parity


_ASKED = """question = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)"""


def _require_fit(ours: VLM) -> None:
    """Whether transformers' LLaVA can express a model; what it cannot is said."""
    encoder, joint, chosen = ours.encoders["image"], projector(ours), ours.config.encoder("image")
    dropped = chosen.class_token == "drop"
    reasons = [
        (len(ours.encoders) > 1, f"it reads {' and '.join(sorted(ours.encoders))}"),
        (chosen.image_size is not None, f"its encoder reads pictures of {chosen.image_size} pixels, not its own size"),
        (dropped and getattr(encoder, "extra", 0) > 1, "its encoder drops several tokens before the patches, not one"),
        (not isinstance(encoder, Transformer), "its encoder is not a vision transformer"),
        (answering(ours) != LLaVA.name, f"its joint is {ours.aligner.name}"),
        (not isinstance(joint, MLP) or len(joint.layers) > 3, "its connector is not LLaVA's Linear or two-layer MLP"),
        (ours.config.is_encoder_decoder, "its LLM is an encoder-decoder"),
    ]
    refuse("transformers' LLaVA cannot hold this model", reasons)


def to_llava(ours: VLM) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same model as `LlavaForConditionalGeneration`, with its processor."""
    encoder, joint = ours.encoders["image"], projector(ours)
    chosen = ours.config.encoder("image")
    tokenizer, text = marked(ours), copy.deepcopy(ours.llm.config)  # its vocabulary may grow by the marker below
    begins_alone(tokenizer)
    layout, told = Layout(**ours.processor.layouts["image"]), ours.processor.system
    template = by_parts(tokenizer.chat_template, layout, told, reads_texts(tokenizer))
    image_token = tokenizer.convert_tokens_to_ids(MARKER)
    strategy: Any = "default" if chosen.class_token == "drop" and encoder.extra else "full"
    config = LlavaConfig(
        vision_config=encoder.tower.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=encoder.tokens,
        vision_feature_layer=int(chosen.layer),
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu" if len(joint.layers) == 3 else "linear",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(encoder.tower.state_dict())
    theirs.model.language_model.load_state_dict(ours.llm.base_model.state_dict())
    theirs.lm_head.load_state_dict(ours.llm.get_output_embeddings().state_dict())
    theirs.model.multi_modal_projector.linear_1.load_state_dict(joint.layers[0].state_dict())
    second = theirs.model.multi_modal_projector.linear_2
    if len(joint.layers) == 3:
        second.load_state_dict(joint.layers[2].state_dict())
    else:
        nn.init.eye_(second.weight)
        nn.init.zeros_(second.bias)
    theirs.generation_config = copy.deepcopy(ours.generation_config)
    if image_token >= text.vocab_size:
        add_marker(theirs, image_token)
    processor = LlavaProcessor(
        picture_processor(encoder),
        tokenizer,
        patch_size=encoder.tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=MARKER,
        num_additional_image_tokens=encoder.extra,
        chat_template=template,
    )
    return theirs, processor


def compare(ours: VLM, theirs: LlavaForConditionalGeneration) -> Parity:
    """Logits of both on the same random pictures and words."""
    trial, image_token = Trial.of(ours), theirs.config.image_token_id
    return Parity.between(trial.logits(ours, ours.placeholder("image")), trial.logits(theirs, image_token))
