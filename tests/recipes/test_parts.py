"""The embedded stages: pictures that are encoded for one of them serve the others. LLaVA's texts as published."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerBase

import composed
from isthmus import recipes
from isthmus.config import Source, Writing
from isthmus.data.sets import Set, open_set
from isthmus.model import VLM
from isthmus.processor import VLMProcessor
from isthmus.recipes import parts
from isthmus.recipes.blip2 import instructblip
from isthmus.recipes.cogvlm import cogvlm
from isthmus.recipes.ee_mllm import ee_mllm
from isthmus.recipes.flamingo import flamingo
from isthmus.recipes.llama_adapter import llama_adapter

pytestmark = pytest.mark.usefixtures("embedded")


def keys(source: Source, families: int = 1) -> set[str]:
    """Pictures of a set that asks about so many families of them: its first, a middle and its last cycle."""
    opened: Set = open_set(source, seed=0)
    cycles = len(opened) // families
    places = {cycle * families + family for cycle in (0, cycles // 2, cycles - 1) for family in range(families)}
    return {medium.source.key for place in places for medium in opened[place].media}  # type: ignore[union-attr]


def test_the_mix_draws_on_the_pictures_of_the_warm_stage() -> None:
    warm = {source.name: source for source in parts.warm(1.0).data}
    shown = [source for source in parts.MIX if source.options.get("shown", "picture") == "picture"]
    scenes, others = (source for source in shown if source.name == "scenes")
    assert len(keys(scenes, 2)) == 6  # layouts and crowds
    assert keys(scenes, 2) == keys(others, 2) < keys(warm["scenes"], 3)


def test_words_stand_for_as_many_pictures_as_there_are() -> None:
    for source in parts.MIX:
        if source.options.get("shown") == "words":
            twin = source.but(options={**source.options, "shown": "picture"})
            assert [twin.name, twin.options] in [[each.name, each.options] for each in parts.MIX]
            assert not open_set(source, seed=0)[3].media


def test_no_two_settings_of_a_system_share_a_name() -> None:
    """Runs, tables and comparisons go by the name."""
    made = [
        *(cogvlm(**chosen) for chosen in ({}, {"every": 4}, {"where": "ffn"}, {"start": "random"})),
        *(flamingo(**chosen) for chosen in ({}, {"every": 2}, {"gate": 1.0})),
        *(flamingo("published", **chosen) for chosen in ({}, {"every": 2}, {"tower": "nfnet-f6"})),
        *(llama_adapter(**chosen) for chosen in ({}, {"lower": 10}, {"gate": 1.0}, {"version": "v2", "rounds": 2})),
        *(ee_mllm(visual=visual, free=free) for visual in ("self", "ffn", "keys") for free in (False, True)),
        *(instructblip(aware=aware) for aware in (True, False)),
    ]
    names = [recipe.name for recipe in made]
    assert len(set(names)) == len(names), names
    assert {"cogvlm", "flamingo", "openflamingo-9b", "ee-mllm", "naavit", "llama-adapter"} < set(names)


def test_blip2s_published_batches_and_writing_are_the_papers() -> None:
    first, second = recipes.named("blip2-flan-t5-xl").stages
    assert (first.batch_size, second.batch_size, first.template, second.template) == (1680, 1520, "plain", "prefix")
    assert recipes.named("blip2-opt-2.7b").stage("second").template == "plain"
    assert recipes.named("instructblip-vicuna-7b").stage("sft").batch_size == 128


def test_published_recipes_encode_in_every_step_and_embedded_ones_once() -> None:
    for name, build in recipes.BOOK.items():
        recipe = build()
        assert recipe.engine.cache is (None if recipe.llm.architecture is None else False), name


ASKED = composed.sample(composed.picture(1), "Describe.", answer="a cat")


@pytest.fixture(scope="module")
def untemplated() -> tuple[VLM, PreTrainedTokenizerBase]:
    """LLaVA's joint, and a tokenizer that brings no chat template, as Vicuna's brings none."""
    model = composed.model("llama", "llava")
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    tokenizer.chat_template = None
    return model, tokenizer


def written(processor: VLMProcessor, template: Writing) -> tuple[str, str]:
    """A question and its answer as a model reads them, and what of it is learnt."""
    rendered = processor.renderer(template).render(ASKED.turns)
    (start, end), decode = rendered.spans[0], processor.tokenizer.decode
    learnt = decode([token for token, learn in zip(rendered.ids, rendered.trained) if learn])
    return f"{decode(rendered.ids[:start])}<image>{decode(rendered.ids[end:])}", learnt


@pytest.mark.parametrize("name", ["llava-v1-7b", "llava-1.5-7b", "vdep-7b"])
def test_llavas_published_texts_are_the_authors_but_for_what_is_said_to_differ(name, untemplated) -> None:
    recipe, (model, tokenizer) = recipes.named(name), untemplated
    processor, end = VLMProcessor.of(model, tokenizer, recipe.system), tokenizer.eos_token
    assert [stage.template for stage in recipe.stages] == ["plain", "chat"]
    assert written(processor, "plain") == (f"<image>\na cat{end}", f"a cat{end}")  # theirs: <image>a cat\n
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    told = f"{system} USER: <image>\nDescribe. ASSISTANT: a cat{end}"
    assert written(processor, "chat") == (told, f" a cat{end}")
