"""What every joint promises, on every family of LLMs. A new joint is one more line in `JOINTS`.

Two throw-away joints at the top exercise what LLaVA does not: media that stay aside and are read by gated grafts, a
rule of who sees whom, shared positions.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, StaticCache

import composed
import isthmus
from composed import MIX, picture, sample, stir
from isthmus import aligner as aligners
from isthmus import fuse, lora, parts, sites, storage
from isthmus.aligner import Addition, Aligner
from isthmus.config import Budget, Frozen, LLMConfig, LoRA, ObjectiveConfig, Stage
from isthmus.connectors.codebook import Codebook
from isthmus.connectors.mlp import MLP
from isthmus.graft import Graft, graft
from isthmus.model import VLM, VLMConfig
from isthmus.training.optimizer import adamw, choose
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, DataError, Layout, Modality, Past, Sample, Turn
from tiny import DECODERS, ENCODER_DECODERS

# ---------------------------------------------------------------------------------------------- throw-away joints


class Look(Graft):
    """Reads media that stay aside, and the route, through a gate that is shut at birth."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.kv, self.route = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Embedding(2, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, host, base, x, *args, side, **kw):
        if side is not None and side.vision_BKQD is not None:
            x = x + self.gate.tanh() * self.look(x, side.vision_BKQD, side.media_mask_BTK)
        if side is not None and side.route_BT is not None:
            x = x + self.gate.tanh() * self.route(side.route_BT)
        return base(x, *args, **kw)

    def look(self, x_BTD, vision_BKQD, mask_BTK):
        k_BSD, v_BSD = self.kv(vision_BKQD.flatten(1, 2)).chunk(2, -1)
        mask_BTS = mask_BTK.repeat_interleave(vision_BKQD.shape[2], -1)
        seen = F.scaled_dot_product_attention(self.q(x_BTD), k_BSD, v_BSD, mask_BTS)
        return seen.masked_fill(~mask_BTS.any(-1, keepdim=True), 0)


@isthmus.register
class Aside(Aligner):
    """Gated cross-attention before every layer; nothing is spliced."""

    name = "aside"
    splices = False
    asleep = ("connectors.*", "llm.*.grafts.look.q.*", "llm.*.grafts.look.kv.*", "llm.*.grafts.look.route.*")

    def connector(self, kind, encoder, width):
        return MLP(encoder.width, width, 1)

    def grafts(self, llm, encoders, width) -> Iterator[Addition]:
        stack = sites.layers(llm, "encoder" if llm.config.is_encoder_decoder else "decoder")
        for index in range(len(stack.modules)):
            yield Addition(f"llm.{stack.path}.{index}", "look", Look(width))


@isthmus.register
class Shared(Aligner):
    """All tokens of an image share one position; with `alone`, each of them sees only itself."""

    name = "shared"
    encoder_decoder = False

    class Options(Frozen):
        alone: bool = True

    def connector(self, kind, encoder, width):
        return MLP(encoder.width, width, 1)

    def layout(self, kind, tokens):
        return Layout(tokens, "look: ", "\n")

    def positions(self, counted_BT, segment_BT, modality_BT):
        image_BT = modality_BT == Modality.IMAGE
        saved_BT = torch.zeros_like(segment_BT)
        saved_BT[:, 1:] = (image_BT[:, 1:] & image_BT[:, :-1]).long()
        total_BT = saved_BT.cumsum(1)
        column_BT = torch.arange(segment_BT.shape[1]).expand_as(segment_BT)
        return counted_BT - (total_BT - total_BT.gather(1, column_BT - fuse.positions(segment_BT)))

    def rule(self, segment_BT, modality_BT):
        if not self.options.alone:
            return None
        image_BT = modality_BT == Modality.IMAGE
        return lambda b, h, q, kv: ~image_BT[b, q] | image_BT[b, kv] & (q == kv)


# ---------------------------------------------------------------------------------------------- the cases


class Joint(NamedTuple):
    aligner: str
    options: dict[str, Any]
    families: tuple[str, ...]
    encoder: dict[str, Any] = {}
    terms: tuple[str, ...] = ("lm",)
    """What it is trained on."""


ALL = (*DECODERS, "t5")
SOME = ("llama", "opt")

SMALL_QUERIES = {"queries": 3, "layers": 3, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0}
"""A Q-Former of three layers, the first and third of which look at the picture."""
RELEASED = {"lower": 1, "prompts": 3, "tune": "bias", "blocks": 1, "inner": 16, "heads": 2}
"""LLaMA-Adapter V2 as its code was released, with a small block."""

LION = {
    **SMALL_QUERIES,
    "vocabulary": 320,
    "aggregator": {"heads": 2, "inner": 24, "dropout": 0.0},
    "bottleneck": 4,
    "tags": "hard",
}
TAPS = {"taps": (1, 2)}

CODES = {"levels": 2, "size": 5, "width": 16, "depth": 1}
NARROW = {"queries": 2, "depth": 1, "heads": 2, "inner": 8, "width": 8, "normalise": True}

JOINTS = {
    "linear": Joint("llava", {"projector": "linear"}, ("llama", "t5")),
    "mlp": Joint("llava", {"projector": "mlp2x_gelu"}, ALL),
    "pooled": Joint("llava", {"pool": 2, "normalise": True}, SOME),
    "blip2": Joint("blip2", SMALL_QUERIES, ALL),
    "instructblip": Joint("instructblip", {**SMALL_QUERIES, "vocabulary": 320}, (*SOME, "glm", "t5")),
    "minigpt4": Joint("minigpt4", SMALL_QUERIES, SOME),
    "p_former": Joint("p_former", {**SMALL_QUERIES, "text": False}, SOME),
    "aside": Joint("aside", {}, ALL),
    "composite": Joint("shared", {}, DECODERS),
    "shared": Joint("shared", {"alone": False}, SOME),
    "flamingo": Joint("flamingo", {"latents": 5, "depth": 2, "heads": 2, "head_width": 8}, ALL),
    "flamingo-sparse": Joint("flamingo", {"every": 2, "heads": 1, "depth": 1, "inner": 16}, SOME),
    "qwen_vl": Joint("qwen_vl", {"side": 2, "heads": 4}, ("llama", "qwen2", "t5")),
    "mplug_owl": Joint("mplug_owl", {"queries": 3, "depth": 1, "heads": 4, "inner": 8}, ("llama", "opt", "t5")),
    "mplug_owl-small": Joint("mplug_owl", NARROW, ("llama",)),
    "cogvlm": Joint("cogvlm", {}, DECODERS),
    "cogvlm-plain": Joint("cogvlm", {"every": 2, "where": "attention", "split": False}, SOME),
    "llama-adapter": Joint("llama_adapter", {}, DECODERS),
    "llama-adapter-v2": Joint(
        "llama_adapter", {"fusion": "early", "lower": 1, "tune": "scale"}, (*SOME, "qwen3", "glm")
    ),
    "llama-adapter-v2-released": Joint("llama_adapter", RELEASED, SOME),
    "ee-mllm": Joint("ee_mllm", {}, DECODERS),
    "ee-mllm-rule": Joint("ee_mllm", {"compute": "rule"}, ("llama", "glm", "opt")),
    "ee-mllm-free": Joint("ee_mllm", {"free": True, "layers": [1, 2], "pool": 2, "normalise": True}, SOME),
    "naavit": Joint("ee_mllm", {"visual": "ffn"}, SOME),
    "keys": Joint("ee_mllm", {"visual": "keys"}, ("llama", "glm")),
    "victor": Joint("victor", {"size": None}, ("llama", "opt", "t5")),
    "victor-told": Joint("victor", {"size": 24}, ("llama", "opt"), terms=("lm", "victor")),
    "asvr": Joint("asvr", {"tokenizer": None}, ("llama",)),
    "asvr-told": Joint("asvr", CODES, ("llama", "qwen2"), terms=("lm", "asvr")),
    "saisa": Joint("saisa", {"inner": 16}, ("llama", "qwen2", "qwen3", "glm")),
    "saisa-pooled": Joint("saisa", {"pool": 2, "normalise": True}, ("llama",)),
    "shikra": Joint("shikra", {}, ("llama", "opt", "t5")),
    "kosmos2": Joint("kosmos2", {"queries": 3, "heads": 4, "grid": 2}, ("llama", "qwen2", "opt", "t5")),
    "lion": Joint("lion", LION, (*SOME, "t5"), TAPS),
    "lion-soft": Joint("lion", {**LION, "tags": "soft", "normalise": True, "mixture": "hard"}, ("llama", "t5"), TAPS),
    "lion-image": Joint("lion", {**LION, "visual_input": "qformer", "mixture": "none"}, ("llama",)),
    "lion-region": Joint("lion", {**LION, "visual_input": "aggregator"}, ("llama", "t5"), TAPS),
}
FAMILIES = {
    "gemma": ("mlp", "lion"),  # scaled embeddings, (1 + w) norms
    "gemma2": ("mlp", "composite", "lion"),  # capped scores and logits, every second layer a window
    "gemma3_text": ("mlp", "aside", "composite", "cogvlm"),  # windows and rotations that differ by layer
    "mistral": ("mlp", "ee-mllm", "llama-adapter"),  # a window in every layer
    "phi": ("mlp", "cogvlm", "lion"),  # attention and feed-forward side by side, partial rotation, biases
    "phi3": ("mlp", "aside", "cogvlm"),  # fused projections, a window
    "flan-t5": ("mlp", "aside", "lion"),  # gated feed-forward, untied head, no chat template
}
"""Families for which a few joints stand for all, one for each mechanism that could disagree with what the family does
otherwise; that every other joint composes, or refuses with the reason, is tried below."""
REFUSALS = {(joint, "opt"): "feed-forward Linears on the layer itself" for joint in ("keys", "saisa", "saisa-pooled")}
REFUSALS |= {
    (joint, family): reason
    for family, unlike, beside in (
        ("phi", "PhiAttention is not made of q_proj", "PhiAttention has no o_proj"),
        ("phi3", "Phi3Attention is not made of q_proj", "Phi3Attention has no q_proj, k_proj, v_proj"),
    )
    for joints, reason in (
        (("ee-mllm", "ee-mllm-free", "naavit", "keys", "saisa", "saisa-pooled"), unlike),
        (("llama-adapter", "llama-adapter-v2", "llama-adapter-v2-released"), beside),
    )
    for joint in joints
}
"""Joints on families that cannot carry them, besides encoder-decoders, with the reason."""
PAIRS = [(name, family) for name, joint in JOINTS.items() for family in joint.families]
PAIRS += [(name, family) for family, names in FAMILIES.items() for name in names]
CASES = [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS]
DECODING = [case for case in CASES if case.values[1] not in ENCODER_DECODERS]

BROAD = {*((name, joint.families[0]) for name, joint in JOINTS.items()), *(pair for pair in PAIRS if pair[0] == "mlp")}
"""Every joint once, and every family once, for what hardly depends on how a joint and a family go together."""


def _widest(cases: list[Any]) -> list[Any]:
    """All of the cases, those beyond `BROAD` in `make slow` alone."""
    slow = pytest.mark.slow
    return [case if case.values in BROAD else pytest.param(*case.values, id=case.id, marks=slow) for case in cases]


every = pytest.mark.parametrize(("joint", "family"), CASES)
each = pytest.mark.parametrize(("joint", "family"), [case for case in CASES if case.values in BROAD])
every_decoder = pytest.mark.parametrize(("joint", "family"), DECODING)
each_then_every = pytest.mark.parametrize(("joint", "family"), _widest(CASES))
each_then_every_decoder = pytest.mark.parametrize(("joint", "family"), _widest(DECODING))


def newborn(joint: str, family: str) -> VLM:
    model = composed.model(family, JOINTS[joint].aligner, JOINTS[joint].options, **JOINTS[joint].encoder)
    for module in model.connectors.modules():
        if isinstance(module, Codebook):
            module.books_LKE.normal_(generator=torch.Generator().manual_seed(1))
    return model


def grown(joint: str, family: str) -> VLM:
    return stir(newborn(joint, family))


@functools.cache
def bare_llm(family: str) -> PreTrainedModel:
    return parts.load_llm(LLMConfig(source=str(composed.llm_folder(family))), torch.float32)


def logits(model: VLM, batch: Batch, **how: Any) -> torch.Tensor:
    output = model.run(batch, **how)
    return output.head(output.hidden_BTD)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def spoken(model: VLM, batch: Batch, samples: tuple[Sample, ...]) -> list[torch.Tensor]:
    """Logits of each sample's own tokens: its row without padding."""
    rows = logits(model, batch)
    if batch.decoder_ids_BU is None:
        return [row[segment > 0] for row, segment in zip(rows, batch.segment_BT)]
    renderer = model.processor.renderer()
    return [row[: len(renderer.render(one.turns).decoder_ids or ())] for row, one in zip(rows, samples)]


def first(batch: Batch, columns: int) -> Batch:
    """The batch up to a column, media included."""
    route_BT = None if batch.route_BT is None else batch.route_BT[:, :columns]
    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT[:, :columns],
        segment_BT=batch.segment_BT[:, :columns],
        modality_BT=batch.modality_BT[:, :columns],
        route_BT=route_BT,
    )


def after(batch: Batch, start: int, stop: int) -> Batch:
    """The new ids from column `start` to `stop` of a row whose start is in the past; without media."""
    seen = first(batch, stop)
    return replace(seen, input_ids_BT=seen.input_ids_BT[:, start:], media={})


def stage(**train: Any) -> Stage:
    return Stage(name="one", data=("none",), train=train, budget=Budget(steps=1), lr=1e-2)


def step_of(model: VLM, joint: str) -> Step:
    return Step(model, [ObjectiveConfig(name=term) for term in JOINTS[joint].terms])


# ---------------------------------------------------------------------------------------------- birth


@every
@torch.no_grad()
def test_newborn_equals_the_bare_llm_on_text(joint, family):
    model, bare = newborn(joint, family), bare_llm(family)
    batch = model.processor.collator()([MIX[1]])
    extra = {} if batch.decoder_ids_BU is None else {"decoder_input_ids": batch.decoder_ids_BU}
    expected = bare(input_ids=batch.input_ids_BT, use_cache=False, **extra).logits
    found = logits(model, batch)[..., : expected.shape[-1]]  # a joint's new words come behind
    if JOINTS[joint].aligner == "shared":  # an explicit mask takes another kernel
        close(found, expected)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_a_joint_behind_shut_gates_equals_the_bare_llm_on_pictures_too(family):
    model, bare = newborn("aside", family), bare_llm(family)
    batch = model.processor.collator()([MIX[2]])
    extra = {} if batch.decoder_ids_BU is None else {"decoder_input_ids": batch.decoder_ids_BU}
    assert torch.equal(logits(model, batch), bare(input_ids=batch.input_ids_BT, use_cache=False, **extra).logits)
    assert not torch.equal(logits(model, batch), logits(stir(model), batch))


# ---------------------------------------------------------------------------------------------- batches


@every
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_mixed_batch_equals_single_samples(joint, family, side):
    model = grown(joint, family)
    together = spoken(model, model.processor.collator(side=side)(MIX), MIX)
    for one, found in zip(MIX, together):
        (alone,) = spoken(model, model.processor.collator()([one]), (one,))
        close(found, alone)


@every_decoder
@torch.no_grad()
def test_packed_equals_unpacked_per_segment(joint, family):
    model = grown(joint, family)
    collator = model.processor.collator()
    packed = collator.rows([MIX[:2], [MIX[2], MIX[0]]])
    rows = logits(model, packed)
    for (row, segment), one in {(0, 1): MIX[0], (0, 2): MIX[1], (1, 1): MIX[2], (1, 2): MIX[0]}.items():
        (alone,) = spoken(model, collator([one]), (one,))
        close(rows[row][packed.segment_BT[row] == segment], alone)


def test_an_encoder_decoder_refuses_packed_rows():
    model = newborn("mlp", "t5")
    with pytest.raises(ConfigError, match="packed"):
        model.processor.collator().rows([MIX[:2]])
    batch = model.processor.collator()([MIX[1]])
    with pytest.raises(DataError, match="packed"):
        model.run(replace(batch, segment_BT=batch.segment_BT + torch.arange(batch.segment_BT.shape[1])))


@torch.no_grad()
def test_routes_reach_the_layers():
    model = grown("aside", "llama")
    one, other = (sample("hi there", route=route) for route in (0, 1))
    found = [logits(model, model.processor.collator()([each])) for each in (one, other)]
    assert (found[0] - found[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_decoder_of_an_encoder_decoder_knows_the_route():
    seen: list[list[list[int]]] = []

    class Note(Graft):
        def forward(self, host, base, x, *args, side, **kw):
            seen.append(side.route_BT.tolist())
            return base(x, *args, **kw)

    model = newborn("aside", "t5")
    graft(model, "llm.decoder.block.0", "note", Note())
    talks = [sample("hi there", route=route) for route in (0, 1)]
    batch = model.processor.collator()(talks)
    model.run(batch)
    assert seen == [[[route] * batch.decoder_ids_BU.shape[1] for route in (0, 1)]]
    seen.clear()
    model.generate(model.processor.prompts(talks), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [[[0], [1]]] * 2


@each_then_every_decoder
@torch.no_grad()
def test_changing_an_image_changes_nothing_before_it(joint, family):
    model = grown(joint, family)
    collator = model.processor.collator()
    batch = collator([MIX[2]])
    before = logits(model, batch)
    for k, changed in enumerate([(picture(9), picture(3)), (picture(2), picture(9))]):
        other = collator([sample(changed[0], "and", changed[1], "do they differ?", answer="on the left", route=1)])
        start = int(batch.media["image"].at_N[k])
        now = logits(model, other)
        assert torch.equal(now[:, :start], before[:, :start])
        assert (now[:, start:] - before[:, start:]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- caches


@every_decoder
@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_cached_decoding_equals_the_full_forward(joint, family, static):
    model = grown(joint, family)
    batch = model.processor.collator(side="left")(MIX)
    real, length = batch.segment_BT > 0, batch.input_ids_BT.shape[1]
    cut = length - 4
    expected = logits(model, batch)
    past = Past(StaticCache(config=model.config.text_config, max_cache_len=length + 3)) if static else None
    output = model.run(first(batch, cut), past=past, keep=True)
    found = [output.head(output.hidden_BTD)]
    for column in range(cut, length):
        output = model.run(after(batch, column, column + 1), past=output.past, keep=True)
        found.append(output.head(output.hidden_BTD))
    close(torch.cat(found, 1)[real], expected[real])


@each_then_every_decoder
@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_reused_prefix_takes_a_second_question_with_a_picture_of_its_own(joint, family, static):
    model = grown(joint, family)
    talks = [
        Sample(
            (
                Turn.say("user", picture(seed), opening),
                Turn.say("assistant", "a cat"),
                Turn.say("user", picture(seed + 1), "and this?"),
                Turn.say("assistant", "the dog"),
            )
        )
        for seed, opening in ((1, "what is it?"), (5, "say what it is, please:"))
    ]
    batch = model.processor.collator(side="left")(talks)
    images, length = batch.media["image"], batch.input_ids_BT.shape[1]
    cut = int(images.at_N[1])
    assert cut == int(images.at_N[3])
    opening = replace(
        images, **{name: getattr(images, name)[0::2] for name in ("row_N", "segment_N", "at_N", "pixels")}
    )
    second = replace(images, **{name: getattr(images, name)[1::2] for name in ("row_N", "segment_N", "at_N", "pixels")})
    second = replace(second, at_N=second.at_N - cut)
    past = Past(StaticCache(config=model.config.text_config, max_cache_len=length + 3)) if static else None
    asked = [{kind: ids[start::2] for kind, ids in batch.extra_text.items()} for start in (0, 1)]
    before = replace(first(batch, cut), media={"image": opening}, extra_text=asked[0])
    output = model.run(before, past=past, keep=True)
    behind = replace(after(batch, cut, length), media={"image": second}, extra_text=asked[1])
    found = logits(model, behind, past=output.past)
    close(found, logits(model, batch)[:, cut:])


# ---------------------------------------------------------------------------------------------- generation


def extended(batch: Batch, token_B: torch.Tensor) -> Batch:
    token_B1 = token_B[:, None]
    if batch.decoder_ids_BU is not None:
        return replace(batch, decoder_ids_BU=torch.cat([batch.decoder_ids_BU, token_B1], 1))
    text_B1 = torch.zeros_like(token_B1)
    return replace(
        batch,
        input_ids_BT=torch.cat([batch.input_ids_BT, token_B1], 1),
        segment_BT=torch.cat([batch.segment_BT, text_B1 + 1], 1),
        modality_BT=torch.cat([batch.modality_BT, text_B1], 1),
        route_BT=None if batch.route_BT is None else torch.cat([batch.route_BT, batch.route_BT[:, -1:]], 1),
    )


def endless(model: VLM) -> VLM:
    model.generation_config.eos_token_id = None
    return model


@every
@torch.no_grad()
def test_greedy_generation_equals_a_loop_by_hand(joint, family):
    model = endless(grown(joint, family))
    batch = prompt = model.processor.prompts(MIX)
    for _ in range(4):
        batch = extended(batch, logits(model, batch)[:, -1].argmax(-1))
    expected = batch.input_ids_BT if batch.decoder_ids_BU is None else batch.decoder_ids_BU
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt, **greedy), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **greedy), expected)
    if family not in ENCODER_DECODERS:  # a static cache is sized by the config, where T5 counts its encoder's layers
        assert torch.equal(model.generate(prompt, cache_implementation="static", **greedy), expected)


@each_then_every
@torch.no_grad()
def test_beams_of_a_batch_equal_beams_of_single_samples(joint, family):
    model = endless(grown(joint, family))
    beams = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(model.processor.prompts(MIX), **beams)[:, -4:]
    for row, one in enumerate(MIX):
        alone = model.generate(model.processor.prompts([one]), **beams)[:, -4:]
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


@each
@torch.no_grad()
def test_generation_from_the_processors_tensors_equals_that_from_a_batch(joint, family):
    model = endless(grown(joint, family))
    talk = [{"role": "user", "content": [{"type": "image", "image": picture(1).source}, {"type": "text", "text": "?"}]}]
    inputs = model.processor.apply_chat_template(talk)
    batch = model.processor.prompts([Sample((Turn.say("user", picture(1), "?"),))])
    greedy = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, expected = model.generate(**inputs, **greedy), model.generate(batch, **greedy)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.logits[0], expected.logits[0])
    blind = model.generate(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}, **greedy)
    assert (blind.logits[0] - found.logits[0]).abs().max() > 1e-3


@each_then_every
@torch.no_grad()
def test_forward_gives_the_logits_of_run(joint, family):
    model = grown(joint, family)
    batch = model.processor.collator(side="left")([replace(one, meta={}) for one in MIX])
    images = batch.media["image"]
    given = {"decoder_input_ids": batch.decoder_ids_BU} if family in ENCODER_DECODERS else {}
    if batch.extra_text:
        given["instruction_ids"] = batch.extra_text["image"]
    found = model(
        input_ids=batch.input_ids_BT,
        attention_mask=(batch.segment_BT > 0).long(),
        pixel_values=images.pixels,
        image_at=torch.stack([images.row_N, images.at_N], 1),
        labels=batch.labels_BT,
        **given,
    )
    expected = logits(model, batch)
    assert torch.equal(found.logits, expected)
    close(found.loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten()))


# ---------------------------------------------------------------------------------------------- training


def backward(step: Step, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Gradients of several batches' losses together: all forwards come before the one backward."""
    step.zero_grad()
    torch.manual_seed(0)  # a pool draws which vectors it replaces
    scales = step.scales(batches)
    sum(step(batch, scales)[0] for batch in batches).backward()
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def attention_glob(model: VLM) -> str:
    """The first Linear of every self-attention, whatever the family calls it."""
    name = next(iter(sites.linears(sites.attention(sites.layers(model.llm).modules[0]))))
    return f"llm.*.{name}"


@each_then_every
def test_recomputed_gradients_equal_plain_ones(joint, family):
    model = grown(joint, family)
    step = step_of(model, joint)
    choose(step, stage(**{"connectors.*": 1e-3, attention_glob(model): {"mode": LoRA(r=2)}}))
    stir(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or not storage.is_base(name))
    collator = model.processor.collator()
    batches = [collator(MIX[:2]), collator(MIX[1:])]
    calls: list[int] = []
    inside = sites.attention(sites.layers(model.llm).modules[0])  # hooks of the layer itself run outside the checkpoint
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    step.ready()
    plain = backward(step, batches)
    assert len(calls) == 2
    step.recompute()
    step.ready()
    again = backward(step, batches)
    assert len(calls) == 6, "the layer runs twice per forward"
    assert plain.keys() == again.keys() and any("connectors" in name for name in plain)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


@each_then_every
def test_everything_that_should_learn_has_a_gradient_and_sleepers_are_named(joint, family):
    model = newborn(joint, family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not storage.is_base(name))
    batch = model.processor.collator()(MIX)

    def silent() -> set[str]:
        step = step_of(model, joint)
        step.ready()
        found = backward(step, [batch])
        learners = [name for name, p in model.named_parameters() if p.requires_grad]
        return {name for name in learners if f"vlm.{name}" not in found or not found[f"vlm.{name}"].any()}

    named = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and any(fnmatch.fnmatch(name, glob) for glob in model.aligner.asleep)
    }
    assert silent() == named
    stir(model)
    assert silent() == set()


@each
@pytest.mark.parametrize("part", ["connectors", "grafts", "layer", "encoder", "lora"])
def test_a_glob_trains_exactly_its_parameters(joint, family, part):
    model = grown(joint, family)
    stack = sites.layers(model.llm).path
    glob, how = {
        "connectors": ("connectors.*", 1e-2),
        "grafts": ("llm.*.grafts.*", 1e-2),
        "layer": (f"llm.{stack}.1.*", 1e-2),
        "encoder": ("encoders.image.*layers.0.*", 1e-2),
        "lora": (attention_glob(model), {"mode": LoRA(r=2)}),
    }[part]
    step = step_of(model, joint)
    if part == "grafts" and not any(".grafts." in name for name, _ in model.named_parameters()):
        with pytest.raises(ConfigError, match="matches no"):
            choose(step, stage(**{glob: how}))
        return
    trained = choose(step, stage(**{glob: how}))
    names = {each.name.removeprefix("vlm.") for each in trained}
    pattern = "*.grafts.one.*" if part == "lora" else glob
    assert names == {name for name, _ in model.named_parameters() if fnmatch.fnmatch(name, pattern)} != set()
    stir(model)  # LoRA too
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(trained, (0.9, 0.999))
    step.ready()
    gradients = backward(step, [model.processor.collator()(MIX)])
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in names if gradients[f"vlm.{name}"].any()} != set()


# ---------------------------------------------------------------------------------------------- storage


@each_then_every
@torch.no_grad()
def test_saved_and_loaded_is_bit_equal_as_delta_and_as_whole(joint, family, tmp_path):
    model = newborn(joint, family)
    model.add_lora([attention_glob(model)], LoRA(r=2), "sft")
    stir(model)
    batch = model.processor.collator()(MIX)
    expected = logits(model, batch)
    for whole in (False, True):
        model.save_pretrained(tmp_path / str(whole), whole=whole)
        again = isthmus.load(tmp_path / str(whole))
        assert torch.equal(logits(again, batch), expected)
        state, other = model.state_dict(), again.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("False", "True")]
    assert sizes[0] < sizes[1] / 2


@each_then_every
@torch.no_grad()
def test_merged_lora_equals_unmerged(joint, family):
    torch.manual_seed(3)
    model = newborn(joint, family)
    batch = model.processor.collator()(MIX)
    before = logits(model, batch)
    model.add_lora([attention_glob(model)], LoRA(r=2), "sft")
    assert torch.equal(logits(model, batch), before)
    for host in lora.hosts(model, "sft").values():
        torch.nn.init.normal_(host.grafts["sft"].B, std=0.1)
    unmerged = logits(model, batch)
    assert (unmerged - before).abs().max() > 1e-3
    lora.merge(model, "sft")
    close(logits(model, batch) / unmerged.abs().max(), unmerged / unmerged.abs().max())


@each
def test_the_config_makes_a_round_trip(joint, family, tmp_path):
    model = newborn(joint, family)
    model.add_lora([attention_glob(model)], LoRA(r=2, dora=True), "sft")
    model.config.save_pretrained(tmp_path)
    again = VLMConfig.from_pretrained(tmp_path)
    assert json.loads(again.to_json_string()) == json.loads(model.config.to_json_string())
    assert again.aligner["options"] == JOINTS[joint].options and again.lora == model.config.lora


# ---------------------------------------------------------------------------------------------- compose


OTHERS = [pair for pair in itertools.product(JOINTS, (*ALL, *FAMILIES)) if pair not in PAIRS]
"""What no case above is of."""


@pytest.mark.slow
@pytest.mark.parametrize(("joint", "family"), OTHERS, ids=map("-".join, OTHERS))
def test_every_other_family_composes_or_refuses_with_the_reason(joint, family):
    name = JOINTS[joint].aligner
    reason = REFUSALS.get((joint, family))
    if family in ENCODER_DECODERS and not aligners.named(name).encoder_decoder:
        reason = f"{name} does not work with an encoder-decoder"
    if reason:
        with pytest.raises(ConfigError, match=reason):
            newborn(joint, family)
    else:
        assert newborn(joint, family).queries("image") > 0
