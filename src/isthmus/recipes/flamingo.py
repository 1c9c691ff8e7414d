"""OpenFlamingo 9B and 4B (arXiv 2308.01390; Flamingo is arXiv 2204.14198): one stage, the LLM frozen throughout."""

from __future__ import annotations

from typing import Any, Literal

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Source, Stage, TaskConfig, Train
from isthmus.recipes import parts

INCITE_3B: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50432,
    "max_position_embeddings": 2048,
    "use_parallel_residual": False,
    "rotary_pct": 1.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
NFNET_F6 = EncoderConfig(
    source="timm/dm_nfnet_f6.dm_in1k",
    layer=-1,
    image_size=320,
    architecture={
        "architecture": "dm_nfnet_f6",
        "pretrained_cfg": {
            "input_size": [3, 448, 448],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    },
    aspect="squash",
)
"""Flamingo's own kind of tower, a hundred tokens per picture; its weights were never released, ImageNet's were."""
DOCUMENTS: tuple[Source, ...] = tuple(
    Source(
        name="documents",
        weight=1.1,
        options={
            "count": 1500,
            "asked": asked,
            "of": [
                {"name": "naming", "options": {"count": 2500}},
                {"name": "scenes", "options": {"kinds": ["colour"], "count": 1500}},
                {"name": "scenes", "options": {"kinds": ["caption"], "count": 1500}},
            ],
        },
    )
    for asked in (False, True)
)
"""Two to five of the pictures of `parts.MIX`, so that nothing more is encoded, with and without their questions."""


def flamingo(
    size: Literal["embedded", "published", "published-4b"] = "embedded",
    every: int | None = None,
    tower: Literal["clip-l", "nfnet-f6"] = "clip-l",
    gate: float = 0.0,
) -> Recipe:
    """OpenFlamingo.

    Args:
        size: `embedded`, or one of the published ones.
        every: the ablation of how densely gated blocks stand; None is the size's own.
        tower: the ablation of the published encoder.
        gate: the ablation of gates that do not begin shut: their value before the tanh.
    """
    usual = {"embedded": 5, "published": 4, "published-4b": 2}[size]
    recipe = {"embedded": embedded, "published": published_9b, "published-4b": published_4b}[size](every or usual)
    if tower != "clip-l" and size != "embedded":
        recipe = recipe.but(encoder=NFNET_F6, name=f"{recipe.name}-{tower}")
    chosen = {"every": every or usual, "gate": gate}
    return parts.ablated(parts.gated(recipe, gate), chosen, {"every": usual, "gate": 0.0})


def published_9b(every: int = 4) -> Recipe:
    """The first release, on LLaMA 7B. The later ones stand on MPT, whose layers in transformers take no additions."""
    llm = LLMConfig(source="huggyllama/llama-7b", architecture=parts.VICUNA_7B)
    return _published("openflamingo-9b", "OpenFlamingo 9B on LLaMA 7B as published", llm, every)


def published_4b(every: int = 2) -> Recipe:
    """On RedPajama-INCITE 3B."""
    llm = LLMConfig(source="togethercomputer/RedPajama-INCITE-Base-3B-v1", architecture=INCITE_3B)
    return _published("openflamingo-4b", "OpenFlamingo 4B on RedPajama-INCITE 3B as published", llm, every)


def _published(name: str, about: str, llm: LLMConfig, every: int) -> Recipe:
    """Rates, decay and warm-up are those of the official scripts (spec B4.1); batch size and length are recalled.

    Where the authors add two losses per step, ours draws pairs and documents in the same proportion.
    """
    return parts.published(
        name=name,
        about=about,
        encoder=EncoderConfig(
            source="openai/clip-vit-large-patch14",
            layer=-1,
            architecture={**parts.CLIP_L_336, "image_size": 224},
            aspect="crop",
        ),
        llm=llm,
        aligner=AlignerConfig(name="flamingo", options={"every": every}),
        stages=(
            Stage(
                name="align",
                data=(
                    parts.file("laion_2b.jsonl", "laion").but(weight=0.2),
                    parts.file("mmc4.jsonl", "mmc4").but(weight=1.0),
                ),
                template="documents",
                after_media=True,
                train={"connectors.*": Train(), "llm.*.grafts.gated.*": Train(weight_decay=0.1, decay_all=True)},
                lr=1e-4,
                batch_size=1536,
                accumulate=8,
                schedule="constant",
                warmup=0.04,
                budget=Budget(samples=180_000_000),
                recompute=True,
            ),
        ),
    )


def embedded(every: int = 5, minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M stays frozen to the bit; six gated blocks and a small resampler train.

    A third of the samples are documents, and none is without a picture: the blocks are there to look. Naming is
    measured with demonstrations too: pictures without a question, so that what is wanted can be told from the
    demonstrations alone.
    """
    train = {"connectors.*": Train(lr=5e-4), "llm.*.grafts.gated.*": Train(lr=5e-4)}
    pictured = tuple(source for source in parts.MIX if source.options.get("shown") != "words")
    return parts.embedded(
        "flamingo",
        f"Flamingo on embedded parts: a gated block every {every} layers, SmolLM2-135M, EfficientNet-Lite0",
        AlignerConfig(name="flamingo", options={"every": every, "latents": 16, "depth": 2, "inner": 256}),
        (parts.sft(minutes, train, warmup=0.1).but(data=(*pictured, *DOCUMENTS)),),
    ).but(eval=(*parts.TASKS, *map(_shots, (0, 4, 8, 16))))


def _shots(count: int) -> TaskConfig:
    """Naming unseen concepts behind demonstrations; zero shots are two texts without pictures, as in the paper."""
    options = {"shots": count, "zero": "texts", "asked": False}
    controls = ("blind", "shuffled") if count == 16 else ()
    return TaskConfig(name="naming", limit=60, controls=controls, options=options)
