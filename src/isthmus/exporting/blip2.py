"""Export to transformers' own BLIP-2 and InstructBLIP, with the logits compared before anything is written.

`Blip2ForConditionalGeneration` and `InstructBlipForConditionalGeneration` hold EVA's vision transformer to its last
depth, a Q-Former and an LLM; what they cannot express is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from isthmus import parts
from isthmus.connectors import qformer_weights
from isthmus.connectors.qformer import EPSILON, QFormer, Shape
from isthmus.encoders.hf import Transformer
from isthmus.exporting import Parity, answering, dense, opened, refuse
from isthmus.exporting.native import add_marker, marked, picture_processor, write
from isthmus.model import VLM
from isthmus.processor import MARKER
from isthmus.types import ConfigError

TOWERS = ("blip_2_vision_model", "instructblip_vision_model")
"""Vision transformers that both classes can hold; they are the same one."""


@dataclass(frozen=True)
class Native:
    """A class of transformers that equals one of our joints."""

    aligner: str
    model: type[PreTrainedModel]
    config: type[Blip2Config] | type[InstructBlipConfig]

    @property
    def instructed(self) -> bool:
        return self.aligner == "instructblip"


NATIVE = {
    native.aligner: native
    for native in (
        Native("blip2", Blip2ForConditionalGeneration, Blip2Config),
        Native("instructblip", InstructBlipForConditionalGeneration, InstructBlipConfig),
    )
}


def export(source: str | Path, out: Path, to: str) -> Parity:
    """Write a saved model as the class `to` of `NATIVE`: parts in few bits dense, LoRA merged, logits as before.

    Raises:
        ConfigError: the class or its processor cannot express this model; what and why is said.
        IsthmusError: the logits differ.
    """
    native, ours = NATIVE[to], opened(source, out)
    _require_fit(ours, native)
    trial = Questioned.of(ours)
    before = trial.ours(ours)
    dense(ours)
    theirs, processor = convert(ours, native)
    parity = Parity.between(before, trial.theirs(theirs, native.instructed))
    parity.require(f"export of {source}")
    write(theirs, processor, source, out, parity, _ASKED + _HEARD if native.instructed else _ASKED)
    return parity


_ASKED = """from PIL import Image

question = [{"role": "user", "content": "<image>" * processor.num_query_tokens + "What is this?"}]
inputs = processor.tokenizer.apply_chat_template(
    question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
inputs |= processor.image_processor(Image.open("cat.png").convert("RGB"), return_tensors="pt")"""
_HEARD = """
heard = processor.qformer_tokenizer("What is this?", return_tensors="pt")
inputs |= {f"qformer_{name}": heard[name] for name in ("input_ids", "attention_mask")}"""
"""Their processors put the picture before the whole text, and let the Q-Former hear all of it."""


def _require_fit(ours: VLM, native: Native) -> None:
    """Whether the class can hold a model; what it cannot is said."""
    if answering(ours) != native.aligner:
        raise ConfigError(f"its joint is {ours.aligner.name}, not {native.aligner}", "choose the class of its joint")
    encoder, chosen = ours.encoders["image"], ours.config.encoder("image")
    tower = encoder.tower.config if isinstance(encoder, Transformer) else None
    whole = tower is not None and chosen.layer in ("-1", str(tower.num_hidden_layers)) and not chosen.taps
    reasons = [
        (tower is None or tower.model_type not in TOWERS, "its encoder is not BLIP-2's vision transformer"),
        (not whole, "its encoder is not read at the last depth alone"),
        (chosen.class_token != "keep", "its encoder leaves the class token out"),
        (chosen.image_size is not None, "its encoder's pictures are not of their own size"),
        (ours.config.is_encoder_decoder, "its LLM is an encoder-decoder"),
        (set(ours.encoders) != {"image"}, "it has other encoders beside the image's"),
    ]
    refuse(f"transformers' {native.model.__name__} cannot hold this model", reasons)


def convert(ours: VLM, native: Native) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The same model as the native class, with its processor."""
    former: Any = ours.connectors["image"]
    tokenizer, text = marked(ours), copy.deepcopy(ours.llm.config)  # its vocabulary may grow by the marker below
    image_token = tokenizer.convert_tokens_to_ids(MARKER)
    shape = Shape(**{key: getattr(ours.aligner.options, key) for key in Shape.model_fields})
    vision = ours.encoders["image"].tower.config.to_dict()
    config = native.config(
        vision_config={key: value for key, value in vision.items() if key != "model_type"},
        qformer_config=_former(shape, ours.encoders["image"].width),
        text_config=text.to_dict(),
        num_query_tokens=shape.queries,
        image_token_index=image_token,
    )
    theirs: Any = native.model(config).eval()
    theirs.vision_model.load_state_dict(ours.encoders["image"].tower.state_dict())
    theirs.language_model.load_state_dict(ours.llm.state_dict())
    _fill(theirs, former, native.instructed)
    theirs.generation_config = copy.deepcopy(ours.generation_config)
    if image_token >= text.vocab_size:
        add_marker(theirs, image_token)
    return theirs, _processor(ours, native, tokenizer, shape.queries)


def _former(shape: Shape, width: int) -> dict[str, Any]:
    """Our Q-Former's sizes under their names."""
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "encoder_hidden_size": width,
        "cross_attention_frequency": shape.every,
        "layer_norm_eps": EPSILON,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
        "max_position_embeddings": shape.positions,
        "vocab_size": shape.vocabulary,
        "use_qformer_text_input": False,
    }


@torch.no_grad()
def _fill(theirs: PreTrainedModel, former: QFormer, instructed: bool) -> None:
    """Give their Q-Former our weights; what we have not, no query hears of, and it is zero.

    BLIP-2's has no text half, which the first stage alone trains and no answer needs.
    """
    places = dict(theirs.named_parameters())
    prefix = "" if "query_tokens" in places else "model."
    table = qformer_weights.INSTRUCT if instructed else qformer_weights.BLIP2
    left = {name for name in places if name.startswith(f"{prefix}qformer.")}
    for name, parameter in former.named_parameters():
        if not instructed and (name.startswith(("words.", "heads.")) or ".text_feed." in name):
            continue
        place = f"{prefix}{table.theirs(name)}"
        place = place if place in places else place.removeprefix(prefix)
        places[place].copy_(parameter.reshape(places[place].shape))
        left.discard(place)
    for place in left:
        nn.init.zeros_(places[place])


def _processor(ours: VLM, native: Native, tokenizer: Any, queries: int) -> ProcessorMixin:
    tokenizer.image_token = MARKER
    pictures = picture_processor(ours.encoders["image"])
    if not native.instructed:
        return Blip2Processor(pictures, tokenizer, num_query_tokens=queries)
    named_other = ours.aligner.options.tokenizer
    reader = (
        ours.processor.tokenizer if named_other is None else AutoTokenizer.from_pretrained(parts.folder(named_other))
    )
    return InstructBlipProcessor(pictures, tokenizer, copy.deepcopy(reader), num_query_tokens=queries)


@dataclass(frozen=True)
class Questioned:
    """Random pictures, words and instructions that two models are asked about."""

    pixels: Tensor
    words: Tensor
    instruction: Tensor
    queries: int
    shared: int

    @classmethod
    def of(cls, ours: VLM, rows: int = 2, text: int = 8) -> Questioned:
        generator = torch.Generator().manual_seed(0)
        size, shared = ours.encoders["image"].size, ours.config.text_config.vocab_size
        read = min(ours.aligner.options.vocabulary, shared)
        return cls(
            torch.randn(rows, 3, size, size, generator=generator),
            torch.randint(shared - 1, (rows, text), generator=generator),
            torch.randint(read - 1, (rows, min(text, ours.aligner.options.positions)), generator=generator),
            ours.queries("image"),
            shared,
        )

    def ids(self, image_token: int) -> Tensor:
        """The picture, then words."""
        image = torch.full((len(self.words), self.queries), image_token)
        return torch.cat([image, self.words.where(self.words != image_token, 0)], 1)

    @torch.inference_mode()
    def ours(self, model: VLM) -> Tensor:
        """Logits [rows, T, V] at every position."""
        ids = self.ids(model.placeholder("image"))
        reading = model.aligner.reading()
        heard = {"instruction_ids": self.instruction} if reading and reading.of == "question" else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=self.pixels, **heard).logits

    @torch.inference_mode()
    def theirs(self, model: Any, instructed: bool) -> Tensor:
        """The same of the words that both know."""
        ids, heard = self.ids(model.config.image_token_index), {}
        if instructed:
            mask = torch.ones_like(self.instruction)
            heard = {"qformer_input_ids": self.instruction, "qformer_attention_mask": mask}
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=self.pixels, **heard)
        return out.logits[..., : self.shared]
