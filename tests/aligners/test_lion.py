"""LION's parts against FlanT5 itself, a chain of LayerNorms and hand calculations; routes, hints and stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import composed
import isthmus
import tiny
from composed import picture, sample, stir
from isthmus import planning, sites
from isthmus.aligners.lion import HINT, Mixture
from isthmus.assembly import rejoin
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.connectors.aggregator import Aggregation, Aggregator
from isthmus.graft import at
from isthmus.model import VLM
from isthmus.recipes.lion import lion
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import Box, ConfigError, Context, DataError, Features, Grounding, Route, Sample, Side, Tag, Turn

SMALL = {
    "queries": 3,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "inner": 24,
    "dropout": 0.0,
    "vocabulary": 320,
    "aggregator": {"heads": 2, "inner": 24, "dropout": 0.0},
    "bottleneck": 4,
}
D = tiny.WIDTH
IMAGE, REGION = sample(picture(1), "what?", route=0), sample(picture(2), "where?", route=1)


def newborn(family: str = "llama", **options) -> VLM:
    return composed.model(family, "lion", {**SMALL, **options}, taps=(2, 1), layer=3)


def logits(model: VLM, samples, **settings) -> torch.Tensor:
    output = model.run(model.processor.collator(**settings)(samples))
    return output.head(output.hidden_BTD)


def mixtures(model: VLM) -> list[Mixture]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


# ---------------------------------------------------------------------------------------------- aggregator


def features(*shapes: tuple[int, int]) -> Features:
    random = torch.Generator().manual_seed(0)
    x, *taps = (torch.randn(2, *shape, generator=random) for shape in shapes)
    return Features(x, dict(zip("ab", taps)))


def test_a_newborn_aggregator_is_a_chain_of_layer_norms():
    made = Aggregator(16, D, [("a", 16), ("b", 16)], Aggregation(heads=2, inner=8, dropout=0))
    seen = features((5, 16), (5, 16), (5, 16))
    expected = seen.x_NSE
    for _ in range(2 * 3):  # self-attention, cross-attention and feed-forward of each layer
        expected = F.layer_norm(expected, (16,), eps=1e-12)
    torch.testing.assert_close(made.gather(seen), expected)
    hidden = F.gelu(F.linear(F.layer_norm(expected, (16,), eps=1e-12), made.mlp[0].weight, made.mlp[0].bias))
    torch.testing.assert_close(made(seen, Context()), F.linear(hidden, made.mlp[2].weight, made.mlp[2].bias))


def test_every_tap_is_read_whatever_its_width_and_grid():
    made = Aggregator(20, D, [("a", 8), ("b", 12)], Aggregation(width=16, heads=2, inner=8, dropout=0, places=True))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    seen = features((4, 20), (16, 8), (9, 12))
    before = made(seen, Context())
    assert before.shape == (2, 4, D)
    for name in "ab":
        changed = replace(seen, taps={**seen.taps, name: seen.taps[name].flip(1)})
        assert (made(changed, Context()) - before).abs().max() > 1e-4  # order counts, as tokens know their place
    with pytest.raises(DataError, match="no places in a square"):
        made(features((5, 20), (16, 8), (9, 12)), Context())


def test_layers_ask_their_taps_in_the_order_of_the_recipe():
    model = newborn()
    assert model.connectors["image"].aggregator.names == ["2", "1"]
    assert len(model.connectors["image"].aggregator.layers) == 2


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="3 heads"):
        Aggregator(16, D, [], Aggregation(heads=3))


def test_visual_tokens_are_those_of_both_branches():
    patches = (tiny.IMAGE // tiny.PATCH) ** 2
    counts = {branch: newborn(visual_input=branch).queries("image") for branch in ("qformer", "aggregator", "both")}
    assert counts == {"qformer": 3, "aggregator": patches, "both": 3 + patches}


# ---------------------------------------------------------------------------------------------- adapters


def mixture(how: str = "routed") -> Mixture:
    torch.manual_seed(0)
    made = Mixture(D, 4, how)
    with torch.no_grad():
        for adapter in made.adapters:
            adapter.up.weight.normal_()
            adapter.bias.normal_()
    return made


def side(routes: list[list[int]]) -> Side:
    route_BT = torch.tensor(routes)
    return Side(torch.zeros_like(route_BT), torch.ones_like(route_BT), route_BT)


@pytest.mark.parametrize("how", ["hard", "routed"])
def test_a_one_hot_router_selects_exactly_one_adapter(how):
    made, x = mixture(how), torch.randn(2, 3, D)
    routes = side([[0, 0, 1], [1, 1, 1]])
    found = made.mix(x, routes)
    by_hand = [adapter(x) for adapter in made.adapters]
    torch.testing.assert_close(found, torch.where(routes.route_BT[..., None] == Route.REGION, by_hand[1], by_hand[0]))
    with torch.no_grad():
        made.adapters[1].up.weight.add_(1)
    again = made.mix(x, routes)
    moved = (again != found).any(-1)
    assert torch.equal(moved, routes.route_BT == Route.REGION)


def test_without_a_mixture_one_adapter_serves_all_kinds_and_no_route_means_image_level():
    x = torch.randn(1, 2, D)
    made = mixture("none")
    assert len(made.adapters) == 1
    assert torch.equal(made.mix(x, side([[0, 0]])), made.mix(x, side([[1, 1]])))
    routed = mixture()
    assert torch.equal(routed.mix(x, None), routed.mix(x, side([[0, 0]])))
    assert not torch.equal(routed.mix(x, None), routed.mix(x, side([[1, 1]])))


def test_only_the_active_kind_of_the_router_has_a_gradient():
    made = mixture()
    made.mix(torch.randn(1, 3, D), side([[1, 1, 1]])).sum().backward()
    rows = made.router.grad.abs().sum(-1)  # adapter by kind
    assert (rows[:, Route.REGION] > 0).all() and not rows[:, Route.IMAGE].any()


@torch.no_grad()
def test_an_adapter_stands_beside_flan_t5s_feed_forward_on_what_its_norm_is_given():
    model = stir(newborn("flan-t5"))
    ff = model.llm.encoder.block[0].layer[-1]
    x = torch.randn(1, 3, D)
    plain = x + ff.DenseReluDense(ff.layer_norm(x))
    torch.testing.assert_close(ff(x), plain + at(ff)["lion"].mix(x, None))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "phi", "falcon_h1"])
def test_in_a_decoder_too_it_reads_what_stands_before_the_norm(family):
    """Layer by layer, the states with adapters are those without plus the mixture of what the norm was given."""
    model = stir(newborn(family))
    layer = sites.layers(model.llm).modules[1]
    norm, adapters = layer.get_submodule(sites.feed(layer).path), at(layer)["lion"]
    given, left = [], []
    norm.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    states = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    layer.register_forward_hook(lambda module, arguments, output: left.append(states(output)))
    batch = model.processor.collator()([IMAGE])
    model.run(batch)
    adapters.mix = lambda x, side: torch.zeros_like(x)
    without = []
    layer.register_forward_hook(lambda module, arguments, output: without.append(states(output)))
    model.run(batch)
    assert torch.equal(given[0], given[1])  # the layers before are the same, and so is attention
    expected = without[0] + Mixture.mix(adapters, given[0].view_as(without[0]), Side(*[batch.modality_BT] * 3))
    del adapters.mix
    torch.testing.assert_close(left[0], without[0] + adapters.mix(given[0].view_as(without[0]), side([[0]])))
    assert not torch.equal(left[0], without[0])
    assert expected.shape == left[0].shape


@torch.no_grad()
def test_with_zero_adapters_flan_t5_is_itself_given_the_same_embeddings():
    model = newborn("flan-t5")
    batch = model.processor.collator()([IMAGE])
    embeds = model.embed(batch, model.connect(batch))
    bare = tiny.llm("flan-t5")
    expected = bare(inputs_embeds=embeds, decoder_input_ids=batch.decoder_ids_BU).logits
    torch.testing.assert_close(logits(model, [IMAGE])[..., : tiny.VOCAB], expected)


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_mixed_batches_equal_each_kind_alone(family):
    model = stir(newborn(family))
    together = logits(model, [IMAGE, REGION])
    for row, one in enumerate([IMAGE, REGION]):
        alone = logits(model, [one])[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-5, rtol=1e-5)
    other = logits(model, [replace(REGION, meta={"route": 0})])[0]
    assert (other - alone).abs().max() > 1e-2


@torch.no_grad()
def test_packed_kinds_equal_each_kind_alone():
    model = stir(newborn())
    collator = model.processor.collator()
    packed = collator.rows([[IMAGE, REGION]])
    assert packed.route_BT.unique_consecutive().tolist() == [0, 1]
    output = model.run(packed)
    found = output.head(output.hidden_BTD)[0]
    for segment, one in enumerate([IMAGE, REGION], start=1):
        torch.testing.assert_close(
            found[packed.segment_BT[0] == segment], logits(model, [one])[0], atol=2e-5, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_compiled_layers_equal_plain_ones(family):
    model = stir(newborn(family))
    expected = logits(model, [IMAGE, REGION])
    for name in {"encoder", "decoder"} if family == "t5" else {"decoder"}:
        for layer in sites.layers(model.llm, name).modules:
            layer.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model, [IMAGE, REGION]), expected)


@pytest.mark.parametrize(("family", "part"), [("falcon_h1", "feed_forward"), ("jamba", "feed_forward")])
@torch.no_grad()
def test_of_several_norms_the_one_is_chosen_that_the_feed_forward_reads(family, part):
    llm = tiny.llm(family)
    layer = sites.layers(llm).modules[1]
    told, read = [], []
    layer.get_submodule(sites.feed(layer).path).register_forward_hook(lambda module, given, out: told.append(out))
    layer.get_submodule(part).register_forward_hook(lambda module, given, out: read.append(given[0]))
    llm(torch.arange(20, 28)[None])
    assert torch.equal(told[0].flatten(), read[0].flatten())


def test_where_an_unknown_norm_stands_behind_the_first_one_the_layer_is_refused():
    layer = tiny.llm("falcon_h1").model.layers[0]
    layer.another_norm = layer.pre_ff_layernorm
    del layer.pre_ff_layernorm
    with pytest.raises(ConfigError, match="no known norm"):
        sites.feed(layer)


def test_an_llm_that_normalises_behind_the_sum_is_refused():
    layer = tiny.llm("opt", do_layer_norm_before=False).model.decoder.layers[0]
    with pytest.raises(ConfigError, match="no known norm"):
        sites.feed(layer)


# ---------------------------------------------------------------------------------------------- routes


def test_a_conversation_with_regions_is_region_level_unless_it_says_otherwise():
    collator = newborn().processor.collator()
    box = Box((0, 0, 0.5, 0.5), "it")

    def route(*question, answer="a cat", **meta) -> int | None:
        one = Sample((Turn.say("user", *question), Turn.say("assistant", answer)), meta=meta)
        found = collator([one]).route_BT
        return None if found is None else int(found.unique())

    assert route("what?") is None
    assert route("what is at ", box) == route("where?", Grounding()) == route("where?", answer=box) == Route.REGION
    assert route("what is at ", box, route=0) == Route.IMAGE


@torch.no_grad()
def test_the_route_comes_with_a_request():
    model = stir(newborn())
    model.generation_config.eos_token_id = None
    inputs = model.processor.apply_chat_template([{"role": "user", "content": "where is it?"}])
    wanted = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = {route: model.generate(**inputs, route=route, **wanted).logits[0] for route in (None, 0, 1)}
    assert torch.equal(found[None], found[0])
    assert (found[1] - found[0]).abs().max() > 1e-2
    asked = model.processor.prompts([Sample((Turn.say("user", "where is it?"),), meta={"route": 1})])
    assert torch.equal(model.generate(asked, **wanted).logits[0], found[1])


@pytest.mark.parametrize("family", ["llama", "flan-t5"])
@torch.no_grad()
def test_in_transformers_form_a_conversation_with_a_region_keeps_its_route(family, tmp_path):
    """With a router that is hard, the logits are those of a model whose only adapter is the region-level one."""
    model = stir(newborn(family, mixture="hard"))
    model.generation_config.eos_token_id = None
    picture(1).source.save(tmp_path / "a.png")
    shown = {"type": "image", "image": str(tmp_path / "a.png")}
    box = {"type": "box", "box": [0, 0, 0.5, 0.5], "label": "it", "unit": "shares"}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": "what is at "}, box]}]
    inputs = model.processor.apply_chat_template(asked)
    assert inputs["route"].tolist() == [Route.REGION]
    wanted = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, **wanted).logits
    forward = model(**inputs).logits
    mixed = model.processor.apply_chat_template([asked, [{"role": "user", "content": "what is it?"}]])
    assert mixed["route"].tolist() == [Route.REGION, Route.IMAGE]
    del inputs["route"]
    for mixture in mixtures(model):  # from here on whatever is asked passes the region-level adapter
        mixture.router.copy_(mixture.router[:, [1, 1]])
    for one, other in zip(found, model.generate(**inputs, **wanted).logits, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(forward, model(**inputs).logits)
    plain = model.processor.apply_chat_template([{"role": "user", "content": "what is it?"}])
    assert "route" not in plain
    single = newborn(family, mixture="none").processor.apply_chat_template(asked)
    assert "route" not in single  # one adapter for all kinds


def test_questions_that_share_a_picture_are_of_one_kind_or_refused():
    """What they share is read once, through one adapter."""
    model = newborn(visual_input="aggregator")
    shown = picture(1)
    plain = (Turn.say("user", shown, "what colour?"), Turn.say("assistant", "red"))
    place = (Turn.say("user", shown, "what is at ", Box((0, 0, 0.5, 0.5)), "?"), Turn.say("assistant", "cat"))
    collator = model.processor.collator()
    for first, other in ((plain, place), (place, plain)):
        with pytest.raises(DataError, match="sample mixed: .* treats apart") as raised:
            collator([Sample(first, "mixed", branches=(other,))])
        assert "together: false" in raised.value.remedy and "route" in raised.value.remedy
        for route in Route:
            made = collator([Sample(first, "told", {"route": int(route)}, branches=(other,))])
            assert made.route_BT[made.segment_BT > 0].unique().tolist() == [route]
    assert collator([Sample(place, "one kind", branches=(place,))]).route_BT.unique().tolist() == [Route.REGION]
    one_adapter = newborn(visual_input="aggregator", mixture="none")
    for other in (one_adapter, composed.model("llama")):  # what treats no kinds apart shares as before
        assert other.processor.collator()([Sample(plain, branches=(place,))]).branch_BT.max() == 2


# ---------------------------------------------------------------------------------------------- hints


def spoken(model: VLM, *parts) -> str:
    ids = model.processor.renderer().render((Turn.say("user", *parts), Turn.say("assistant", "yes"))).ids
    return model.processor.tokenizer.decode([i for i in ids if i < model.vocabulary])


def test_tags_stand_in_the_sentence_of_the_option():
    parts = (picture(1), Tag("cat", 0.9), Tag("red hat"), "What is it?")
    listed = "you are allowed to use or partially use the following tags: [cat, red hat]. What is it?"
    assert f"According to {HINT}, {listed}" in spoken(newborn(tags="soft"), *parts)
    hard = spoken(newborn(tags="hard"), *parts)
    assert f"Y{listed[1:]}" in hard and HINT not in hard and "According" not in hard
    assert "cat" not in spoken(newborn(tags="none"), *parts)


def test_without_tags_there_is_no_sentence():
    model = newborn()
    assert "tags" not in spoken(model, picture(1), "What is it?")
    both = spoken(model, picture(1), Tag("cat"), picture(2), "What?")
    assert both.count("tags") == 1  # the second picture has none


def test_the_learned_word_is_one_new_token_that_nobody_can_type():
    model = newborn()
    new = model.vocabulary - 1
    renderer = model.processor.renderer()

    def ids(*parts) -> list[int]:
        return renderer.render((Turn.say("user", *parts), Turn.say("assistant", "yes"))).ids

    assert ids(Tag("cat"), "?").count(new) == 1
    assert new not in ids(f"According to {HINT}")
    assert ids(Tag(HINT)).count(new) == 1  # the sentence's own, and not the tag's


def test_what_the_q_former_reads_has_no_tags():
    collator = newborn().processor.collator()
    with_tags, without = (
        collator([sample(picture(1), *tags, "What is it?")]).extra_text["image"] for tags in ([Tag("cat")], [])
    )
    assert torch.equal(with_tags, without)


def test_truncation_takes_the_tags_with_their_exchange_or_refuses():
    model = newborn()
    talk = Sample(
        (
            Turn.say("user", picture(1), Tag("cat"), "What?"),
            Turn.say("assistant", "a cat"),
            Turn.say("user", "Sure?"),
            Turn.say("assistant", "yes"),
        ),
        id="talk",
    )
    short = model.processor.collator(max_length=60, overlong="oldest")
    batch = short([talk])
    assert short.shortened == {"talk"} and not batch.media
    assert model.vocabulary - 1 not in batch.input_ids_BT
    with pytest.raises(DataError, match="max_length"):
        model.processor.collator(max_length=60)([talk])


def test_the_learned_word_learns():
    model = newborn("flan-t5")
    rows = at(sites.embedding(model.llm))["tokens"].weight.requires_grad_()
    step = Step(model, [ObjectiveConfig(name="lm")])
    batch = model.processor.collator()([sample(picture(1), Tag("cat"), "what?")])
    step(batch, step.scales([batch]))[0].backward()
    assert rows.grad.any()


# ---------------------------------------------------------------------------------------------- stages


def test_a_stage_shows_one_branch_and_the_weights_stay(tmp_path):
    model = stir(newborn())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = logits(model, [IMAGE])
    for shown, count in (("qformer", 3), ("aggregator", 16)):
        rejoin(model, {"shown": shown})
        assert model.queries("image") == count == model.processor.layouts["image"]["count"]
        assert (model.processor.collator()([IMAGE]).modality_BT > 0).sum() == count
        model.save_pretrained(tmp_path / shown)
        assert torch.equal(logits(isthmus.load(tmp_path / shown), [IMAGE]), logits(model, [IMAGE]))
    rejoin(model, {"shown": "both"})
    assert torch.equal(logits(model, [IMAGE]), whole)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", [{"mixture": "none"}, {"tags": "none"}, {"queries": 4}, {"visual_input": "qformer"}])
def test_a_stage_cannot_change_what_the_joint_consists_of(change):
    with pytest.raises(ConfigError, match="change what lion consists of"):
        rejoin(newborn(), change)


def test_a_branch_that_is_not_there_cannot_be_shown():
    with pytest.raises(ConfigError, match="shown is aggregator"):
        newborn(visual_input="qformer", shown="aggregator")


@pytest.mark.parametrize("mixture", ["none", "hard", "routed"])
@pytest.mark.parametrize("stages", ["single", "stagewise"])
def test_every_stage_trains_its_branch_and_its_adapter(mixture, stages):
    model = newborn(mixture=mixture)
    prefixes = {
        "image": ("connectors.image.qformer.", "adapters.0."),
        "region": ("connectors.image.aggregator.", "adapters.0." if mixture == "none" else "adapters.1."),
        "all": ("connectors.image.", "adapters.", "router"),
    }
    for stage in lion(mixture=mixture, stages=stages).stages:
        small = Stage(name=stage.name, data=("none",), train=dict(stage.train), budget=Budget(steps=1))
        names = [each.name for each in choose(Step(model, [ObjectiveConfig(name="lm")]), small)]
        assert all(any(part in name for part in (*prefixes[stage.name], "grafts.tokens.")) for name in names)
        for part in prefixes[stage.name]:
            assert part == "router" and mixture != "routed" or any(part in name for name in names), part
        assert not any(name.startswith(("vlm.encoders", "vlm.llm")) and ".grafts." not in name for name in names)


def test_published_sizes():
    """Spec B8, within 1 %: adapters 12.7 M per set, router .39 M, aggregator 49.1 M, its MLP 19.5 M; 289 tokens."""
    model = planning.outline(lion("published"))
    assert model.queries("image") == 289

    def count(*words: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if all(word in name for word in words))

    mlp = count("connectors.image.aggregator.mlp")
    expected = {
        count("lion.adapters.0"): 12.7e6,
        count("lion.adapters.1"): 12.7e6,
        count("lion.router"): 0.39e6,
        mlp: 19.5e6,
        count("connectors.image.aggregator") - mlp: 49.1e6,
    }
    for found, published in expected.items():
        assert found == pytest.approx(published, rel=0.01)
    names = [
        name for name, module in model.llm.named_modules() if isinstance(module, nn.Module) and "lion" in at(module)
    ]
    assert len(names) == 48
