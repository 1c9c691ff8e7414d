"""LION (arXiv 2311.11860): image-level tasks, then region-level tasks, then both with a router over two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from isthmus.config import AlignerConfig, Budget, EncoderConfig, Recipe, Source, Stage, TaskConfig, Train
from isthmus.recipes import grounding, parts
from isthmus.recipes.blip2 import BERT, EVA_G, LLMS, SMALL, WORDS

Mixed: TypeAlias = Literal["none", "hard", "routed"]
Tags: TypeAlias = Literal["none", "hard", "soft"]

ENCODER = EncoderConfig(layer="head", taps=("block11", "block8"), aspect="squash")
"""EfficientNet-Lite0's last 49 tokens, and two earlier depths of 196 for the aggregator to ask."""
SPATIAL: dict[str, Any] = {"width": 192, "heads": 4, "inner": 384, "dropout": 0.0, "places": True}
"""An aggregator for a laptop; a convolution's tokens do not know their place, so they are told."""
SEMANTIC = "connectors.*.qformer.*"
SPACE = "connectors.*.aggregator.*"
ADAPTED = "llm.*.grafts.lion.*"
HINT = "llm.*.grafts.tokens.*"
TASKS = (*grounding.TASKS, *(TaskConfig(name=name, limit=200) for name in ("presence", "counting")))


def lion(
    size: Literal["embedded", "published"] = "embedded",
    mixture: Mixed = "routed",
    stages: Literal["stagewise", "single"] = "stagewise",
    aggregator: bool = True,
    tags: Tags = "soft",
    wrong: float = 0.25,
    minutes: float = 6.0,
) -> Recipe:
    """LION; everything but `size` and `minutes` is an ablation.

    Args:
        mixture: one adapter for both kinds of task, one each, or both mixed by a router.
        stages: image-level, region-level and both, or both from the start.
        aggregator: off shows the LLM the encoder's last layer through the MLP alone.
        tags: left out, in a sentence, or in a sentence led by a learned word.
        wrong: share of the embedded scenes' tags that name what is not there.
        minutes: of training, embedded.
    """
    options: dict[str, Any] = {"mixture": mixture, "tags": tags}
    name = _name(mixture, stages, aggregator, tags)
    train = _trained(mixture, tags)
    if size == "published":
        return _published(name, options, train, stages, aggregator)
    options |= {**SMALL, "vocabulary": WORDS, "aggregator": SPATIAL, "normalise": True}
    beside = {} if tags == "none" else {"by": "scene", "wrong": wrong}
    image, region = _image_level(beside), _region_level(beside)
    whole = (*image, *region)
    legs = (
        _leg("image", image, train["image"], 0.3 * minutes, "qformer"),
        _leg("region", region, train["region"], 0.3 * minutes, "aggregator"),
        _leg("all", whole, train["all"], 0.4 * minutes, "both"),
    )
    one = (_leg("all", whole, train["all"], minutes, "both"),)
    return parts.embedded(
        name,
        "LION on embedded parts: Q-Former and aggregator, adapters by kind of task, tags that may be wrong",
        AlignerConfig(name="lion", options=options),
        legs if stages == "stagewise" else one,
        encoder=ENCODER if aggregator else ENCODER.but(taps=()),
    ).but(eval=tuple(_asked(task, beside) for task in TASKS))


def _name(mixture: Mixed, stages: str, aggregator: bool, tags: Tags) -> str:
    changed = {
        f"mixture-{mixture}": mixture != "routed",
        stages: stages != "stagewise",
        "last-layer": not aggregator,
        f"tags-{tags}": tags != "soft",
    }
    return "-".join(["lion", *(word for word, is_changed in changed.items() if is_changed)])


def _trained(mixture: Mixed, tags: Tags) -> dict[str, Mapping[str, Train]]:
    """What learns in each stage; of several adapters, the image-level one is the first."""
    region = 0 if mixture == "none" else 1
    hint = {HINT: Train()} if tags == "soft" else {}
    return {
        "image": {SEMANTIC: Train(), "llm.*.grafts.lion.adapters.0.*": Train(), **hint},
        "region": {SPACE: Train(), f"llm.*.grafts.lion.adapters.{region}.*": Train(), **hint},
        "all": {SEMANTIC: Train(), SPACE: Train(), ADAPTED: Train(), **hint},
    }


# ---------------------------------------------------------------------------------------------- embedded


def _leg(name: str, data: tuple[Source, ...], train: Mapping[str, Train], minutes: float, shown: str) -> Stage:
    return Stage(
        name=name,
        data=data,
        train=dict(train),
        joint={"shown": shown},
        lr=1e-3,
        batch_size=6,
        evaluate_every=None,
        budget=Budget(minutes=round(minutes, 3)),
    )


def _image_level(tags: dict[str, Any]) -> tuple[Source, ...]:
    """Questions about whole pictures, each in a sample of its own: the Q-Former's tokens depend on it."""
    kinds = ["presence", "counting", "colour", "relation", "caption"]
    return (
        Source(name="scenes", weight=2.0, options={"kinds": kinds, "count": 2000}, route=0, tags=tags),
        Source(name="naming", options={"count": 2000}, route=0, tags=tags),
    )


def _region_level(tags: dict[str, Any]) -> tuple[Source, ...]:
    """Places to find, and places to name."""
    return (
        Source(name="scenes", weight=3.0, options={"kinds": ["refer", "region"], "count": 2000}, route=1, tags=tags),
    )


def _asked(task: TaskConfig, tags: dict[str, Any]) -> TaskConfig:
    """The task, its pictures with tags as wrong as in training."""
    return task.but(options={**task.options, "tags": tags}) if tags else task


# ---------------------------------------------------------------------------------------------- published


def _published(
    name: str, options: dict[str, Any], train: dict[str, Mapping[str, Train]], stages: str, aggregator: bool
) -> Recipe:
    """LION-4B. Which data belong to which stage is the paper's, rates and steps are InstructBLIP's: the authors'
    first release holds neither. The Q-Former begins as InstructBLIP's, with BERT's text half under BLIP-2's weights;
    what the authors' began as is not said there."""
    image, region = parts.file("lion_image_level.json", "images"), parts.file("visual_genome_regions.json", "images")
    data: dict[str, tuple[Source, ...]] = {"image": (image.but(route=0),), "region": (region.but(route=1),)}
    data["all"] = (*data["image"], *data["region"])
    shown = {"image": "qformer", "region": "aggregator", "all": "both"}
    chosen = tuple(data) if stages == "stagewise" else ("all",)
    blip2 = "Salesforce/blip2-flan-t5-xl"
    return parts.published(
        name=name.replace("lion", "lion-4b", 1),
        about="LION-4B as published: EVA ViT-g, FlanT5-XL, 289 visual tokens, two adapters and a router",
        encoder=EncoderConfig(
            source=blip2,
            layer=-1,
            class_token="keep",
            taps=(29, 19) if aggregator else (),
            aspect="squash",
            architecture=EVA_G,
        ),
        llm=LLMS["flan-t5-xl"],
        aligner=AlignerConfig(name="lion", options={**options, "tokenizer": BERT, "qformer": [BERT, blip2]}),
        stages=tuple(
            Stage(
                name=leg,
                data=tuple(
                    source.but(tags={"by": "record"} if options["tags"] != "none" else {}) for source in data[leg]
                ),
                train={glob: how.but(weight_decay=0.05) for glob, how in train[leg].items()},
                joint={"shown": shown[leg]},
                lr=1e-5,
                batch_size=192,
                warmup=1000 / 60_000,
                budget=Budget(steps=60_000),
            )
            for leg in chosen
        ),
    )
