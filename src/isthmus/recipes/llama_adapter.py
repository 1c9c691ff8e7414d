"""LLaMA-Adapter (arXiv 2303.16199) and V2 (arXiv 2304.15010): gated prompts; V2 takes turns over two sets of data."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from isthmus.config import AlignerConfig, Budget, EncoderConfig, LLMConfig, Recipe, Stage, Train
from isthmus.recipes import parts

Version: TypeAlias = Literal["v1", "v2", "v2-released", "v2-chat"]

CLIP_L_224 = {**parts.CLIP_L_336, "image_size": 224}
LLAMA_7B = {**parts.VICUNA_7B, "max_position_embeddings": 2048}
LLAMA_65B = {
    **LLAMA_7B,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "v1": {"lower": 2},
    "v2": {"fusion": "early", "lower": 1, "tune": "scale"},
    "v2-released": {"lower": 1, "tune": "bias", "blocks": 8},
    "v2-chat": {"fusion": "early", "lower": 1, "tune": "inputs"},
}
VISUAL: dict[str, tuple[str, ...]] = {
    "v1": ("connectors.*", "llm.*.grafts.adapter.*"),
    "v2": ("connectors.*", "llm.*.grafts.early.*"),
    "v2-released": ("connectors.*", "llm.*.grafts.adapter.*"),
    "v2-chat": ("connectors.*", "llm.*.grafts.early.*"),
}
"""What learns from pictures."""
LANGUAGE: dict[str, tuple[str, ...]] = {
    "v1": ("llm.*.grafts.adapter.*",),
    "v2": ("llm.*.grafts.adapter.*", "llm.*.grafts.affine.*", "llm.*norm*"),
    "v2-released": ("llm.*.grafts.affine.*", "llm.*norm*"),
    "v2-chat": ("llm.*.grafts.affine.*", "llm.*norm*"),
}
"""What learns from instructions; in V2 nothing is in both."""

TOLD = tuple(source for source in parts.MIX if source.options.get("shown") == "words")
SHOWN = tuple(source for source in parts.MIX if source not in TOLD)
"""V2's two kinds of data: questions about pictures, and about words that stand in their place."""


def llama_adapter(
    size: Literal["embedded", "published"] = "embedded",
    version: Version = "v1",
    lower: int | None = None,
    rounds: int = 1,
    gate: float = 0.0,
) -> Recipe:
    """LLaMA-Adapter in one of its versions.

    Args:
        size: `embedded` or `published`.
        version: V1; V2 as in its paper; V2 as its multimodal code was released; V2 as its chat code was, whose
            published size is LLaMA 65B and learns from words alone.
        lower: layers from below without learnt prompts, the paper's ablation; None is the version's own number.
        rounds: how often V2's paper takes turns between pictures and instructions.
        gate: what gates begin with, before their tanh; other than 0 is the ablation of zero-initialised attention.
    """
    options = OPTIONS[version] if lower is None else {**OPTIONS[version], "lower": lower}
    recipe = embedded(version, options, rounds) if size == "embedded" else published(version, options, rounds)
    chosen = {"lower": options["lower"], "rounds": rounds, "gate": gate}
    return parts.ablated(parts.gated(recipe, gate), chosen, {**OPTIONS[version], "rounds": 1, "gate": 0.0})


def published(version: Version, options: dict[str, Any], rounds: int) -> Recipe:
    """As the official scripts train LLaMA 7B (spec B6); learning rates are their base rates times batch / 256."""
    taps = (8, 16) if version == "v1" else ()
    size, shape = ("65b", LLAMA_65B) if version == "v2-chat" else ("7b", LLAMA_7B)
    return parts.published(
        name=f"llama-adapter-{version}-{size}",
        about=f"LLaMA-Adapter {version} {size.upper()} as published: zero-init gated prompts in a frozen LLaMA",
        encoder=EncoderConfig(
            source="openai/clip-vit-large-patch14", layer=-1, taps=taps, class_token="keep", architecture=CLIP_L_224
        ),
        llm=LLMConfig(source=f"huggyllama/llama-{size}", architecture=shape),
        aligner=AlignerConfig(name="llama_adapter", options=options),
        stages=_published_v1() if version == "v1" else _published_v2(version, rounds),
    )


def _published_v1() -> tuple[Stage, ...]:
    alpaca = (parts.file("alpaca_data_52k.json", "images"),)
    scienceqa = (parts.file("scienceqa_train.json", "scienceqa"),)
    return (
        _stage("instruct", alpaca, LANGUAGE["v1"], 9e-3, 0.02, Budget(epochs=5), warmup=0.4),
        _stage("multimodal", scienceqa, VISUAL["v1"], 9e-3, 0.02, Budget(epochs=5), warmup=0.4),
    )


def _published_v2(version: Version, rounds: int) -> tuple[Stage, ...]:
    """In turns; the released code has one turn, of many epochs on pictures and four on instructions.

    Its 150 epochs go over a list of data that each user writes, so how many steps the authors took is not known. Of
    the chat model only weights and shapes were released; rate and epochs are those of the released instructions.
    """
    if version == "v2-chat":
        talks = (parts.file("sharegpt.json", "images"),)
        return (_stage("language", talks, LANGUAGE[version], 1e-3, 0.02, Budget(epochs=4)),)
    captions = (parts.file("coco_captions_567k.json", "coco"),)
    instructions = (parts.file("alpaca_gpt4_52k.json", "images"),)
    epochs = (150.0, 4.0) if version == "v2-released" else (1.0 / rounds, 1.0 / rounds)
    turns = 1 if version == "v2-released" else rounds
    stages = []
    for turn in range(1, turns + 1):
        end = f"-{turn}" if turns > 1 else ""
        stages += [
            _stage(f"visual{end}", captions, VISUAL[version], 1e-4, 0.05, Budget(epochs=epochs[0])),
            _stage(f"language{end}", instructions, LANGUAGE[version], 1e-3, 0.02, Budget(epochs=epochs[1])),
        ]
    return tuple(stages)


def _stage(
    name: str, data: tuple[Any, ...], globs: tuple[str, ...], base: float, decay: float, budget: Budget, **more: Any
) -> Stage:
    """A stage at the scripts' base rate, which they scale by the samples per step over 256."""
    train, batch = {glob: Train(weight_decay=decay) for glob in globs}, 32
    lr = base * batch / 256
    return Stage(name=name, data=data, train=train, lr=lr, batch_size=batch, max_length=512, budget=budget, **more)


def embedded(version: Version, options: dict[str, Any], rounds: int = 1, minutes: float = 5.0) -> Recipe:
    """SmolLM2-135M and EfficientNet-Lite0; V1 trains at once, V2 takes turns as its paper does."""
    if "blocks" in options:
        options = {**options, "blocks": 2, "inner": 192, "heads": 4}
    name = "llama-adapter" if version == "v1" else f"llama-adapter-{version}"
    about = f"LLaMA-Adapter {version} on embedded parts: gated prompts in SmolLM2-135M, EfficientNet-Lite0"
    aligner = AlignerConfig(name="llama_adapter", options=options)
    return parts.embedded(name, about, aligner, _turns(version, rounds, minutes))


def _turns(version: Version, rounds: int, minutes: float) -> tuple[Stage, ...]:
    visual = {glob: Train() for glob in VISUAL[version]}
    if version == "v1":
        return (parts.sft(minutes, visual),)
    language = {glob: Train(lr=1e-3) for glob in LANGUAGE[version]}
    turns = []
    for turn in range(1, rounds + 1):
        end = f"-{turn}" if rounds > 1 else ""
        turns.append(parts.align(0.7 * minutes / rounds, visual).but(name=f"visual{end}", data=SHOWN))
        turns.append(parts.sft(0.3 * minutes / rounds, language).but(name=f"language{end}", data=TOLD))
    return tuple(turns)
