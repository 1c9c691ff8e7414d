"""Any vision transformer of transformers: CLIP, SigLIP, DINOv2, ViT and their kin, used unmodified.

Hidden states are counted as transformers counts them: index 0 is the embeddings, index L the last block's output,
-2 the penultimate block's (LLaVA's choice). The state is taken before any final norm.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionConfig, Blip2VisionModel

from isthmus.config import EncoderConfig
from isthmus.encoders import Encoder, check_patches, state_index
from isthmus.pretrained import complete
from isthmus.types import ConfigError, Features

DESCRIBED = ("image_size", "patch_size", "num_hidden_layers", "hidden_size")
"""What the config of a vision transformer tells, and that of a convolutional or hierarchical tower does not."""

NEEDLESS = re.compile(r"(^|\.)(pooler|head|visual_projection|text_projection)\.|mask_token|position_ids|logit_scale")
"""Tensors that no state of a tower depends on."""

# EVA's ViT-g as BLIP-2 uses it: transformers holds it, and its AutoModel does not know it alone.
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)


class Transformer(Encoder):
    """A transformers vision model that turns square pictures into patch tokens.

    Args:
        config: which states to return, and whether a class token is kept.
        tower: the vision model, with or without its weights.
        processor: its image processor.
        source: what identifies the weights (name and fingerprint).

    Raises:
        ConfigError: the tower has no hidden states per patch, cannot take the size asked for, or has no such layer.
    """

    def __init__(self, config: EncoderConfig, tower: PreTrainedModel, processor: Any, source: dict[str, str]):
        super().__init__()
        self.tower, self.processor = tower, processor
        self._config, self._source = config, source
        architecture = tower.config
        self.aspect = config.aspect
        own, self._patch = _side(architecture, "image_size"), _side(architecture, "patch_size")
        self.size = config.image_size or own
        self.grid = (self.size // self._patch,) * 2
        self.width = architecture.hidden_size
        self.tap_widths = {str(tap): self.width for tap in config.taps}
        self._interpolates = self.size != own
        self._behind = int(getattr(architecture, "num_detection_tokens", 0))  # YOLOS appends them to the patches
        self.extra = self._extra_tokens()
        depth = architecture.num_hidden_layers
        self._layer = state_index(config.layer, depth)
        self._taps = {str(tap): state_index(tap, depth) for tap in config.taps}

    @property
    def tokens(self) -> int:
        kept = self.extra if self._config.class_token == "keep" else 0
        return self.grid[0] * self.grid[1] + kept

    def identity(self) -> dict[str, str]:
        chosen = {"layer": str(self._layer), "taps": str(self._taps), "class_token": self._config.class_token}
        return self._source | chosen | self.preprocessing()

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, 3, H, W] -> x [N, S, E]."""
        states = self._see(pixels, output_hidden_states=True).hidden_states
        if states[self._layer].shape[0] != pixels.shape[0]:  # `len` would fix the number of pictures in a graph
            raise ConfigError(
                f"{type(self.tower).__name__} lays pictures end to end in one row", "choose a plain vision transformer"
            )
        taps = {name: self._patches(states[index]) for name, index in self._taps.items()}
        return Features(self._patches(states[self._layer]), taps, self.grid)

    def _see(self, pixels: Tensor, **options: Any) -> Any:
        interpolate = {"interpolate_pos_encoding": True} if self._interpolates else {}
        return self.tower(pixel_values=pixels, **interpolate, **options)

    def _extra_tokens(self) -> int:
        """How many leading tokens are not patches (class token, registers), counted on one empty picture."""
        name = type(self.tower).__name__
        if self._interpolates:
            check_patches(self.size, self._patch)
        weight = next(self.tower.parameters())
        try:
            with torch.no_grad():
                seen = self._see(weight.new_zeros(1, 3, self.size, self.size))
        except (TypeError, ValueError, RuntimeError) as error:
            remedy = "choose a plain vision transformer, for square pictures of one size (no NaFlex)"
            raise ConfigError(
                f"{name} does not take pictures of {self.size} pixels ({str(error).splitlines()[0]})",
                "leave image_size out" if self._interpolates else remedy,
            ) from None
        extra = seen.last_hidden_state.shape[1] - self._behind - self.grid[0] * self.grid[1]
        if seen.last_hidden_state.ndim != 3 or extra < 0:
            raise ConfigError(f"{name} does not keep one state per patch", "choose a plain vision transformer")
        return extra

    def _patches(self, x_NSE: Tensor) -> Tensor:
        first = 0 if self._config.class_token == "keep" else self.extra
        return x_NSE[:, first : x_NSE.shape[1] - self._behind]


def load(
    config: EncoderConfig, folder: Path, source: dict[str, str], dtype: torch.dtype | Literal["auto"]
) -> Transformer:
    """The real tower with its weights from a folder; `auto` is the dtype that they are stored in."""
    whole = AutoConfig.from_pretrained(folder)
    part = _part(whole)

    def needed(name: str) -> bool:
        return name.startswith(part) and NEEDLESS.search(name) is None

    model = complete(AutoModel, folder, needed, dtype=dtype)
    vision = model.get_submodule(part)
    return Transformer(config, vision, _sized(processor(folder), config), source)


def empty(
    config: EncoderConfig, architecture: dict[str, Any], processor: Any, source: dict[str, str], dtype: torch.dtype
) -> Transformer:
    """The tower's structure from its architecture's config; weights come from a checkpoint, or never (a plan)."""
    described = _vision(AutoConfig.for_model(**architecture))
    _register(described)
    tower = AutoModel.from_config(described, dtype=dtype)
    return Transformer(config, tower, processor, source)


def processor(folder: Path) -> Any:
    """A folder's image processor, the one that needs no torchvision.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except OSError:
        raise ConfigError(f"{folder}: no image processor", "add the encoder's own preprocessor_config.json") from None


def architecture(folder: Path) -> dict[str, Any]:
    """The vision part of a model's config as plain values, saved inside our own config."""
    whole = AutoConfig.from_pretrained(folder)
    _part(whole)
    return _vision(whole).to_dict()


def _part(whole: PreTrainedConfig) -> str:
    """Where a vision transformer is in the model of a config; empty where it is the model. AutoModel knows it then.

    Raises:
        ConfigError: the config describes something else, or a model whose tower cannot be told from the rest.
    """
    vision = _vision(whole)
    _register(vision)
    if vision is whole:
        return ""
    known = type(whole) in AutoModel._model_mapping
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if not known or not hasattr(AutoModel.from_config(whole), "vision_model"):
            raise ConfigError(
                f"{whole.model_type} is a multimodal model, and its vision tower cannot be taken out of it here",
                "name the checkpoint of its vision tower alone, such as CLIP's or SigLIP's",
            )
    return "vision_model"


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a model's config that describes a vision transformer.

    Raises:
        ConfigError: it describes something else.
    """
    vision = config.vision_config if hasattr(config, "vision_config") else config
    if lacking := [name for name in DESCRIBED if not hasattr(vision, name)]:
        raise ConfigError(
            f"{vision.model_type} is not a vision transformer (no {', '.join(lacking)})", "choose another encoder"
        )
    return vision


def _register(config: PreTrainedConfig) -> None:
    """Make a tower known to AutoModel, which knows some only as a part of two (MetaCLIP 2, BLIP, OWL-ViT).

    Raises:
        ConfigError: transformers has no model of that config.
    """
    if type(config) in AutoModel._model_mapping:
        return
    module = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    made = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    towers = [each for each in made if each.config_class is type(config) and each.main_input_name == "pixel_values"]
    plain = [each for each in towers if each.__name__.endswith(("VisionModel", "VisionTransformer"))]
    if not plain:
        raise ConfigError(
            f"{config.model_type} is not a vision tower that transformers knows", "choose another encoder"
        )
    AutoModel.register(type(config), plain[-1], exist_ok=True)


def _side(config: PreTrainedConfig, name: str) -> int:
    """A side in pixels that is told as one number or as two equal ones.

    Raises:
        ConfigError: they differ.
    """
    told = getattr(config, name)
    sides = set(told) if isinstance(told, list | tuple) else {told}
    if len(sides) != 1:
        raise ConfigError(f"{config.model_type} has a {name} of {told}", "choose an encoder of square pictures")
    return sides.pop()


def _sized(processor: Any, config: EncoderConfig) -> Any:
    """The processor at the configured side; pictures are square by then, so resizing is all that remains."""
    if config.image_size is not None:
        side = config.image_size
        processor.size = {"height": side, "width": side}
        processor.crop_size = {"height": side, "width": side}
    return processor
