"""CogVLM: copied experts change nothing, text never meets them, and a picture takes one tick of the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import composed
from composed import MIX, picture, sample, stir
from isthmus import planning, sites
from isthmus.aligners.cogvlm import GLU, Expert, runs
from isthmus.graft import Graft, graft
from isthmus.model import VLM
from isthmus.recipes.cogvlm import cogvlm
from isthmus.types import Batch, Context, Features, Past

TALK = sample(picture(1), "what is it?")


def model(family: str = "llama", **options) -> VLM:
    return composed.model(family, "cogvlm", options)


def logits(vlm: VLM, batch: Batch) -> torch.Tensor:
    output = vlm.run(batch)
    return output.head(output.hidden_BTD)


def experts(vlm: VLM) -> dict[str, Expert]:
    return {name: module for name, module in vlm.named_modules() if isinstance(module, Expert)}


def additive(allowed: torch.Tensor) -> torch.Tensor:
    """A mask as sdpa adds it to scores."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


# ---------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("family", ["llama", "opt", "glm"])
@torch.no_grad()
def test_a_newborn_equals_the_plain_llm_on_the_same_embeddings_and_positions(family):
    vlm = model(family, idle=True)
    batch = vlm.processor.collator()([TALK])
    embeds_BTD = vlm.embed(batch, vlm.connect(batch))
    counted = torch.arange(batch.input_ids_BT.shape[1])[None]
    positions = vlm.aligner.positions(counted, batch.segment_BT, batch.modality_BT)
    length = counted.shape[1]
    causal = additive(torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    plain = vlm.llm(inputs_embeds=embeds_BTD, position_ids=positions, attention_mask=causal, use_cache=False).logits
    torch.testing.assert_close(logits(vlm, batch), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beside_routed_experts_a_newborn_equals_transformers_own_forward():
    vlm = model("llama4_text", idle=True)
    assert experts(vlm) and not any("router" in name for name in experts(vlm)), "a router returns a pair"
    batch = vlm.processor.collator()([TALK])
    place = torch.arange(batch.input_ids_BT.shape[1])
    positions = vlm.aligner.positions(place[None], batch.segment_BT, batch.modality_BT)
    causal = place[:, None] >= place
    chunked = causal & (place[:, None] // 24 == place // 24)
    masks = {"full_attention": additive(causal[None, None]), "chunked_attention": additive(chunked[None, None])}
    theirs = AutoModelForCausalLM.from_pretrained(composed.llm_folder("llama4_text"), dtype=torch.float32).eval()
    theirs.set_attn_implementation("eager")
    embeds = vlm.embed(batch, vlm.connect(batch))
    expected = theirs(inputs_embeds=embeds, position_ids=positions, attention_mask=masks, use_cache=False).logits
    torch.testing.assert_close(logits(vlm, batch), expected, atol=1e-4, rtol=1e-4)


def test_routed_experts_are_shared_with_text_and_most_of_a_mixture_has_no_second_weights():
    config = AutoConfig.for_model("mixtral")  # with the sizes of 8x7B
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    layer = sites.layers(llm).modules[0]
    grafts = model().aligner.grafts(llm, torch.nn.ModuleDict(), config.hidden_size)
    first = {path: addition for path, _, addition in grafts if path.startswith("llm.model.layers.0.")}
    assert {path.split(".")[4] for path in first} == {"self_attn"}
    second, own = (sum(p.numel() for p in each.parameters()) for each in (torch.nn.ModuleList(first.values()), layer))
    assert second / own == pytest.approx(0.03, abs=0.002)


@torch.no_grad()
def test_random_experts_do_not_begin_as_the_llm():
    vlm = model(start="random")
    batch = vlm.processor.collator()([TALK])
    assert (logits(vlm, batch) - logits(model(), batch)).abs().max() > 0.1
    assert all(expert.weight.isfinite().all() for expert in experts(vlm).values())


@torch.no_grad()
def test_text_never_meets_an_expert_and_pictures_never_meet_the_llms_own_weights():
    vlm = stir(model())
    text = vlm.processor.collator()([MIX[1]])
    before = logits(vlm, text)
    stir(vlm)
    assert torch.equal(logits(vlm, text), before)

    batch = vlm.processor.collator()([TALK])
    _, visual_BT = runs(batch.modality_BT, batch.segment_BT)

    def first_layer() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        layer = sites.layers(vlm.llm).modules[0]
        handle = layer.register_forward_hook(lambda module, given, output: seen.append(output))
        vlm.run(batch)
        handle.remove()
        return seen[0]

    before = first_layer()
    for linear in sites.linears(sites.mlp(sites.layers(vlm.llm).modules[0])).values():
        linear.weight += 0.5
    now = first_layer()
    assert torch.equal(now[visual_BT], before[visual_BT])
    assert (now[~visual_BT] - before[~visual_BT]).abs().min(0).values.max() > 1e-3


@torch.no_grad()
def test_the_end_marker_goes_through_the_llms_own_weights():
    vlm = model()
    batch = vlm.processor.collator()([TALK])
    start, tokens = int(batch.media["image"].at_N[0]), vlm.queries("image")
    _, visual_BT = runs(batch.modality_BT, batch.segment_BT)
    assert tokens == 16 + 2
    assert visual_BT[0].nonzero().flatten().tolist() == list(range(start, start + tokens - 1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "glm", "llama4_text"])
def test_gathered_positions_equal_choosing_between_both(family):
    fast, plain = stir(model(family)), stir(model(family, split=False))
    batch = fast.processor.collator()(MIX)
    counts: list[int] = []
    host = next(iter(sites.linears(sites.attention(sites.layers(fast.llm).modules[0])).values()))
    host.grafts["expert"].register_forward_hook(lambda *_: counts.append(1))
    torch.testing.assert_close(logits(fast, batch), logits(plain, batch), atol=2e-5, rtol=1e-5)
    assert counts == [1]


def test_both_paths_give_the_same_gradients():
    found = []
    for split in (True, False):
        vlm = stir(model(split=split))
        for parameter in (chosen := [expert.weight for expert in experts(vlm).values()]):
            parameter.requires_grad_(True)
        logits(vlm, vlm.processor.collator()(MIX)).square().mean().backward()
        found.append([parameter.grad for parameter in chosen])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class Count(Graft):
    """Notes how many positions reach what is below it."""

    innermost = True
    reads_side = False

    def __init__(self):
        super().__init__()
        self.positions = 0

    def forward(self, host, base, x, *args, side, **kw):
        self.positions += x.shape[:-1].numel()
        return base(x, *args, **kw)


@torch.no_grad()
@pytest.mark.parametrize("split", [True, False])
def test_gathering_computes_each_position_once(split):
    vlm = model(split=split)
    batch = vlm.processor.collator()([TALK])
    _, visual_BT = runs(batch.modality_BT, batch.segment_BT)
    host, count = sites.layers(vlm.llm).modules[0].mlp.up_proj, Count()
    graft(vlm, host, "count", count)
    own: list[int] = []
    expert = host.grafts["expert"]
    expert.look = lambda x: own.append(x.shape[:-1].numel()) or type(expert).look(expert, x)
    vlm.run(batch)
    image, every = int(visual_BT.sum()), visual_BT.numel()
    assert (count.positions, own) == ((every - image, [image]) if split else (every, [every]))


@torch.no_grad()
def test_decoding_steps_use_the_llms_own_weights_alone():
    vlm = stir(model())
    batch = vlm.processor.prompts([TALK])
    past = vlm.run(batch, keep=True).past
    for expert in experts(vlm).values():
        expert.weight.fill_(float("nan"))
    longer = Batch(
        torch.full((1, 1), 40),
        torch.nn.functional.pad(batch.segment_BT, (0, 1), value=1),
        torch.nn.functional.pad(batch.modality_BT, (0, 1)),
    )
    assert vlm.run(longer, past=Past(past.cache)).hidden_BTD.isfinite().all()


@torch.no_grad()
def test_idle_experts_change_no_prediction():
    lean, whole = model(), model(idle=True)
    assert len(experts(lean)) == len(experts(whole)) - 5  # q, o and three of the feed-forward in one layer
    batch = lean.processor.collator()([TALK])
    end = int(batch.media["image"].at_N[0]) + lean.queries("image")
    stirred = experts(stir(lean))
    for name, expert in experts(stir(whole)).items():
        if name in stirred:
            expert.load_state_dict(stirred[name].state_dict())
    whole.connectors.load_state_dict(lean.connectors.state_dict())
    found, expected = logits(whole, batch), logits(lean, batch)
    torch.testing.assert_close(found[:, end:], expected[:, end:], atol=1e-5, rtol=1e-5)
    assert (found[:, end - 4 : end - 1] - expected[:, end - 4 : end - 1]).abs().max() > 1e-2


def test_ablations_choose_where_experts_are():
    layers = {option: {name.split(".")[3] for name in experts(model(**option_of))} for option, option_of in ABLATIONS}
    assert layers == {"every": {"0", "2"}, "ffn": {"0", "1"}, "attention": {"0", "1", "2"}}
    assert all(".mlp." in name for name in experts(model(where="ffn")))
    assert all(".self_attn." in name for name in experts(model(where="attention")))


ABLATIONS = (("every", {"every": 2}), ("ffn", {"where": "ffn"}), ("attention", {"where": "attention"}))


# ---------------------------------------------------------------------------------------------- positions


def test_a_picture_takes_three_ticks_however_many_tokens_it_has():
    aligner = model().aligner
    modality = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]])
    segment = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])
    counted = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]])
    found = aligner.positions(counted, segment, modality)
    #                   text begin img img img end text | text begin img img end text
    assert found[0, :13].tolist() == [0, 1, 2, 2, 2, 3, 4, 0, 1, 2, 2, 3, 4]
    assert aligner.positions(counted, segment, torch.zeros_like(modality)) is None


@torch.no_grad()
@pytest.mark.parametrize("full", [True, False], ids=["full", "causal"])
def test_under_a_full_image_mask_the_order_of_image_tokens_is_invisible(full):
    vlm = stir(model())
    batch = vlm.processor.collator()([TALK])
    start, inner = int(batch.media["image"].at_N[0]) + 1, vlm.queries("image") - 2
    picture_ = slice(start, start + inner)
    length = batch.input_ids_BT.shape[1]
    counted = torch.arange(length)[None]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    if full:
        mask[..., picture_, picture_] = True
    side = vlm.run(batch).side

    def text(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        how = {"attention_mask": additive(mask), "position_ids": positions, "use_cache": False}
        return vlm.llm(inputs_embeds=embeds, side=side, **how).logits[:, picture_.stop :]

    embeds = vlm.embed(batch, vlm.connect(batch))
    turned = embeds.clone()
    turned[:, picture_] = embeds[:, picture_].flip(1)
    difference: Callable[[torch.Tensor], float] = lambda p: (text(turned, p) - text(embeds, p)).abs().max().item()  # noqa: E731
    shared = vlm.aligner.positions(counted, batch.segment_BT, batch.modality_BT)
    assert (difference(shared) < 1e-4) == full
    assert difference(counted) > 1e-3


# ---------------------------------------------------------------------------------------------- connector, recipe


def test_markers_stand_around_pictures_of_any_size():
    glu = GLU(6, 8, 2.0)
    with torch.no_grad():
        glu.begin.fill_(1.0)
        glu.end.fill_(2.0)
    x = torch.randn(2, 5, 6)
    y = glu(Features(x, lengths_N=torch.tensor([5, 3])), Context())
    assert y.shape == (2, glu.tokens(5), 8)
    assert (y[:, 0] == 1).all() and (y[0, 6] == 2).all() and (y[1, 4] == 2).all()
    alone = glu(Features(x[1:, :3]), Context())
    torch.testing.assert_close(y[1, : glu.tokens(3)], alone[0])


def test_published_sizes():
    recipe = cogvlm("published")
    whole = planning.plan(recipe)
    assert abs(whole.parts["llm grafts"] / 6.476e9 - 1) < 0.01  # the spec's 6.48 B, the paper's 6.5 B
    assert abs(whole.parts["connectors.image"] / 142.6e6 - 1) < 0.01
    trained = whole.stages[0].trained
    assert trained == whole.parts["llm grafts"] + whole.parts["connectors.image"]
    assert whole.tokens["image"] == 1225 + 2
