"""Exchange with transformers' own LLaVA class, in both directions, with the logits compared before anything is written;
and of adapters with peft.

`LlavaForConditionalGeneration` holds a two-layer MLP over one depth of a vision transformer; what it cannot express
is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from isthmus import cards, lora, parts, quantised
from isthmus.aligners.llava import LLaVA
from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, nearest
from isthmus.connectors.mlp import MLP
from isthmus.data import media
from isthmus.data.template import Template
from isthmus.encoders import Encoder, hf
from isthmus.encoders.hf import Transformer
from isthmus.model import VLM, VLMConfig
from isthmus.processor import MARKER, VLMProcessor
from isthmus.types import ConfigError, IsthmusError

TOLERANCE = 1e-4
"""Largest difference of float32 logits that counts as equal."""
LEVELS = 2
"""Largest difference of prepared pictures in grey levels: transformers cuts off the fraction of the margin's colour,
which is rounded here, and resampling may round that apart once more."""


@dataclass(frozen=True)
class Parity:
    """How close two models are: the largest absolute difference of their float32 logits."""

    difference: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Parity:
        return cls((ours - theirs).abs().max().item())

    def require(self, what: str, of: str = "logits") -> None:
        """Nothing but a check.

        Raises:
            IsthmusError: the difference is larger than `TOLERANCE`.
        """
        if not self.difference <= TOLERANCE:  # nor is NaN equal
            raise IsthmusError(
                f"{what}: {of} differ by {self.difference:.2e}, more than {TOLERANCE:.0e}", "nothing was written"
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
    chosen = EncoderConfig(
        source=source,
        layer=config.vision_feature_layer,
        class_token=class_token,
        aspect=_aspect(processor.image_processor),
    )
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
    ours = VLM.from_pretrained(source, dtype=torch.float32)
    _require_fit(ours)
    trial = Trial.of(ours)
    before = trial.logits(ours, ours.placeholder("image"))
    dense(ours)
    theirs, processor = to_llava(ours)
    parity = Parity.between(before, trial.logits(theirs, theirs.config.image_token_id))
    parity.require(f"export of {source}")
    with hf.quiet():
        theirs.save_pretrained(out)
    name = type(theirs).__name__
    code = f'from transformers import AutoProcessor, {name}\n\nmodel = {name}.from_pretrained("path/to/this/directory")'
    processor.save_pretrained(out)
    cards.write_export(parts.folder(str(source)), out, cards.Export(name, "transformers", code, parity.difference))
    return parity


def _require_fit(ours: VLM) -> None:
    """Whether transformers' LLaVA can express a model; what it cannot is said."""
    encoder, joint, chosen = ours.encoders["image"], ours.connectors["image"], ours.config.encoder("image")
    dropped = chosen.class_token == "drop"
    reasons = [
        (len(ours.encoders) > 1, f"it reads {' and '.join(sorted(ours.encoders))}"),
        (chosen.image_size is not None, f"its encoder reads pictures of {chosen.image_size} pixels, not its own size"),
        (dropped and getattr(encoder, "extra", 0) > 1, "its encoder drops several tokens before the patches, not one"),
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


def to_llava(ours: VLM) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same model as `LlavaForConditionalGeneration`, with its processor."""
    encoder, joint = ours.encoders["image"], ours.connectors["image"]
    chosen = ours.config.encoder("image")
    tokenizer, text = marked(ours), copy.deepcopy(ours.llm.config)  # its vocabulary may grow by the marker below
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
        chat_template=tokenizer.chat_template,
    )
    return theirs, processor


def marked(ours: VLM) -> Any:
    """A copy of the tokenizer that knows the marker, and the chat template that the model is asked with."""
    tokenizer = copy.deepcopy(ours.processor.tokenizer)
    tokenizer.chat_template = Template(tokenizer).jinja
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    return tokenizer


def picture_processor(encoder: Encoder) -> LlavaImageProcessorPil:
    """transformers' image processor that makes pictures square as they were for an encoder.

    Compared on noise three times as wide as it is tall, and as tall as it is wide, of whole multiples of the encoder's
    side: of other sizes `crop` there rounds the lengths to whole pixels before it crops, and lies up to a pixel beside.

    Raises:
        ConfigError: it prepares them otherwise.
    """
    own, aspect = encoder.processor, encoder.aspect
    side = media.side(own)
    square = {"height": side, "width": side}
    fields: dict[str, Any] = {
        "size": {"shortest_edge": side} if aspect == "crop" else square,
        "crop_size": square,
        "do_center_crop": aspect == "crop",
        "do_pad": aspect == "pad",
    }
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    theirs = LlavaImageProcessorPil(**fields, **{name: getattr(own, name) for name in kept})
    black, white = (media.pixels(Pillow.new("RGB", (side, side), each), own, aspect) for each in ("black", "white"))
    generator = np.random.default_rng(0)
    for shape in ((2 * side, 6 * side, 3), (6 * side, 2 * side, 3)):
        picture = Pillow.fromarray(generator.integers(0, 256, shape, np.uint8))
        expected, found = media.pixels(picture, own, aspect), theirs(picture, return_tensors="pt")["pixel_values"][0]
        levels = (255 * (found - expected) / (white - black)).abs().max().round().item()
        if not levels <= LEVELS:
            raise ConfigError(
                f"transformers cannot {aspect} pictures for this encoder ({levels:.0f} grey levels apart)",
                "keep it as it is; `load` reads it",
            )
    return theirs


@torch.no_grad()
def add_marker(theirs: Any, token: int) -> None:
    """Rows for a marker beyond the vocabulary: always the same ones, and the model never says it."""
    theirs.resize_token_embeddings(token + 1, mean_resizing=False)
    for table in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
        table.weight[token] = 0
    theirs.generation_config.suppress_tokens = [token]


@dataclass(frozen=True)
class Trial:
    """Random pictures and words that two models are asked about; of logits, those of the words that both know."""

    pixels: Tensor
    words: Tensor
    image_tokens: int
    shared: int

    @classmethod
    def of(cls, ours: VLM, rows: int = 2, text: int = 8) -> Trial:
        generator = torch.Generator().manual_seed(0)
        encoder, shared = ours.encoders["image"], ours.config.text_config.vocab_size
        pixels = torch.randn(rows, 3, encoder.size, encoder.size, generator=generator)
        return cls(pixels, torch.randint(shared - 1, (rows, text), generator=generator), encoder.tokens, shared)

    @torch.inference_mode()
    def logits(self, model: VLM | LlavaForConditionalGeneration, image_token: int) -> Tensor:
        """Logits [rows, T, V] at every position, with the picture behind the first word."""
        image = torch.full((len(self.words), self.image_tokens), image_token)
        words = self.words.where(self.words != image_token, 0)
        ids = torch.cat([words[:, :1], image, words[:, 1:]], 1)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=self.pixels)
        return out.logits[..., : self.shared]


def compare(ours: VLM, theirs: LlavaForConditionalGeneration) -> Parity:
    """Logits of both on the same random pictures and words."""
    trial, image_token = Trial.of(ours), theirs.config.image_token_id
    return Parity.between(trial.logits(ours, ours.placeholder("image")), trial.logits(theirs, image_token))


# ---------------------------------------------------------------------------------------------- adapters


def import_adapter(source: Path, onto: str | Path, out: Path, part: str = "llm", name: str = "adapter") -> list[str]:
    """Put an adapter folder of peft onto a part of a saved model, write the result, and name its Linears.

    Args:
        source: the folder that peft wrote.
        onto: the model, ours.
        out: where the model with the adapter goes.
        part: `llm` or `encoders.<kind>`; peft's names start inside of it.
        name: what the adapter is called in the model.

    Raises:
        ConfigError: no such part; or the adapter is not LoRA or DoRA on Linears, or does not fit.
    """
    found = lora.read_peft(source)
    model = VLM.from_pretrained(onto)
    known = roots(model)
    if part not in known:
        raise ConfigError(f"no part named {part!r}{nearest(part, list(known))}", f"adapters go onto {list(known)}")
    placed = {f"{known[part]}.{path}": each for path, each in found.items()}
    for how, paths in lora.grouped(placed).items():
        model.add_lora(paths, how, name)
    lora.fill(model, placed, name)
    model.save_pretrained(out)
    return list(placed)


def export_adapters(source: str | Path, out: Path) -> dict[Path, int]:
    """Write every LoRA of a saved model as adapter folders of peft, `out/PART/NAME`, with how many Linears each has.

    Raises:
        ConfigError: there is none; or one lies outside of LLM and vision transformers, where peft could not find it.
    """
    model = VLM.from_pretrained(source)
    places = roots(model)
    written: dict[Path, int] = {}
    for name in adapters(model):
        left = set(lora.hosts(model, name))
        for part, root in places.items():
            inside = {path for path in left if path.startswith(f"{root}.")}
            left -= inside
            if inside:
                base = (
                    model.config.llm["config"] if part == "llm" else model.config.encoders[part.split(".")[1]]["config"]
                )
                folder = out / part / name
                lora.to_peft(model.get_submodule(root), name, folder, base["source"])
                adapter = cards.Export(f"an adapter of peft for {part}", "peft", _PEFT)
                cards.write_export(parts.folder(str(source)), folder, adapter)
                written[folder] = len(inside)
        if left:
            raise ConfigError(f"LoRA {name!r} lies on {min(left)}", f"peft can be given {list(places)}")
    if not written:
        raise ConfigError(f"{source} has no LoRA", "`--to llava` writes a model without adapters")
    return written


_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/directory")"""


def dense(model: VLM) -> None:
    """Make of a model what other formats can hold: parts in few bits become dense, and every LoRA is merged."""
    quantised.dequantise(model)
    for name in adapters(model):
        model.merge_lora(name)


def adapters(model: VLM) -> list[str]:
    """The names of a model's LoRA, in order of attachment; one may be of several shapes."""
    return list(dict.fromkeys(adapter["name"] for adapter in model.config.lora))


def roots(model: VLM) -> dict[str, str]:
    """The parts that are models of transformers, and where they are in ours."""
    towers = {f"encoders.{kind}": each for kind, each in model.encoders.items() if isinstance(each, Transformer)}
    return {"llm": "llm"} | {part: f"{part}.tower" for part in towers}
