"""ASVR (arXiv 2506.09040): LLaVA-1.5's stages, in both of which a head tells the codes of the pictures' places."""

from __future__ import annotations

from typing import Any, Literal

from isthmus.config import AlignerConfig, EncoderConfig, LLMConfig, ObjectiveConfig, Recipe, Stage, Train
from isthmus.recipes import parts
from isthmus.types import ConfigError

SIGLIP_SO400M_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
LOOKS = "block3"
"""A tap of the embedded encoder that knows colours and edges, and no objects."""


def asvr(
    size: Literal["embedded", "published"] = "embedded",
    weight: float = 1.0,
    shift: Literal[0, 1] = 0,
    of: Literal["meaning", "looks"] = "meaning",
) -> Recipe:
    """ASVR; at `weight` 0 it is LLaVA. `of` are the encoder's features or, embedded, a shallow tap: the paper has it
    that codes of meaning help and codes of looks do not.

    Raises:
        ConfigError: codes of looks in the published size, for which there is no tokenizer of looks here.
    """
    if size == "embedded":
        return _embedded(weight, shift, of)
    if of == "looks":
        raise ConfigError("ASVR's published size has codes of meaning alone", "leave of='looks' to size='embedded'")
    return _published(weight, shift)


def _published(weight: float, shift: Literal[0, 1]) -> Recipe:
    """Parts, data and rates of the released scripts; the rest is LLaVA-1.5's (spec B10.4)."""
    align, sft = parts.llava_stages(_joint(weight))
    return parts.published(
        name="asvr-7b" if weight else "asvr-7b-without",
        about="ASVR 7B: LLaVA-1.5 on SigLIP, whose states at a picture's places tell its codes",
        encoder=EncoderConfig(source="google/siglip-so400m-patch14-384", layer=-2, architecture=SIGLIP_SO400M_384),
        llm=LLMConfig(source="lmsys/vicuna-7b-v1.5", architecture=parts.VICUNA_7B),
        aligner=AlignerConfig(name="asvr", options={} if weight else {"tokenizer": None}),
        system=parts.VICUNA_V1,
        stages=(_told(align, weight, shift), _told(sft, weight, shift)),
    )


def _embedded(weight: float, shift: Literal[0, 1], of: str, minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0, 49 places per picture, four levels of 256 codes."""
    looks = of == "looks"
    name = "asvr" if weight else "asvr-without"
    options = {
        "tokenizer": (LOOKS if looks else "features") if weight else None,
        "levels": 4,
        "size": 256,
        "width": 256,
        "depth": 2,
        "pool": 7,
        "normalise": True,
    }
    recipe = parts.embedded(
        name + ("-looks" if looks else "") + ("-shift-1" if shift else ""),
        f"ASVR on embedded parts: states at a picture's places tell codes of its {'looks' if looks else 'meaning'}",
        AlignerConfig(name="asvr", options=options),
        (
            parts.warm(0.15 * minutes).but(train=_joint(0)),
            _told(parts.align(0.05 * minutes), weight, shift),
            _told(parts.sft(0.8 * minutes), weight, shift),
        ),
    )
    return recipe.but(encoder=recipe.encoder.but(taps=(LOOKS,))) if looks else recipe


def _joint(weight: float) -> dict[str, Train]:
    """The projector, and where codes are told the head."""
    return {"connectors.*": Train()} if weight else {"connectors.*.inner.*": Train()}


def _told(stage: Stage, weight: float, shift: int) -> Stage:
    """The stage with ASVR's term."""
    if not weight:
        return stage
    term = ObjectiveConfig(name="asvr", weight=weight, options={"shift": shift})
    return stage.but(objectives=(*stage.objectives, term))
