"""Grafts on real transformers models: two real additions, and every finding about them that must stay true."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from isthmus import graft as grafting
from isthmus import sites
from isthmus.graft import Graft, graft, ungraft
from isthmus.types import ConfigError, Side
from tiny import DECODERS, EOS, PAD, VISION, WIDTH, llm, vision

# ---------------------------------------------------------------------------------------------- two real additions


class GatedCrossAttention(Graft):
    """Flamingo's block in front of a layer (arXiv 2204.14198): media are read through tanh gates that start shut."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        # one-element vectors: FSDP2 refuses to shard a scalar
        self.attention_gate, self.feed_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, host, base, x, *args, side, **kw):
        if side is not None and side.vision_BKQD is not None:
            x = x + self.attention_gate.tanh() * self.look(x, side.vision_BKQD, side.media_mask_BTK)
            x = x + self.feed_gate.tanh() * self.feed(x)
        return base(x, *args, **kw)

    def look(self, x_BTD, vision_BKQD, mask_BTK):
        queries = vision_BKQD.shape[2]
        k_BSD, v_BSD = self.kv(vision_BKQD.flatten(1, 2)).chunk(2, -1)
        mask_BTS = mask_BTK.repeat_interleave(queries, -1)
        seen = F.scaled_dot_product_attention(self.q(self.norm(x_BTD)), k_BSD, v_BSD, mask_BTS)
        return self.out(seen.masked_fill(~mask_BTS.any(-1, keepdim=True), 0))


class Expert(Graft):
    """CogVLM's visual expert (arXiv 2311.03079): image positions go through a Linear of their own."""

    def __init__(self, host: nn.Linear):
        super().__init__()
        self.linear = nn.Linear(host.in_features, host.out_features, bias=host.bias is not None)
        self.linear.load_state_dict(host.state_dict())

    def forward(self, host, base, x, *args, side, **kw):
        if side is None:
            return base(x, *args, **kw)
        image = (side.modality_BT > 0).reshape(*x.shape[:-1], 1)  # OPT flattens B and T in front of its MLP
        return torch.where(image, self.linear(x), base(x, *args, **kw))


class Probe(Graft):
    """Writes down who was called with which side, and changes nothing."""

    def __init__(self, log: list, tag: str = ""):
        super().__init__()
        self.log, self.tag = log, tag

    def forward(self, host, base, x, *args, side, **kw):
        self.log.append((self.tag, side))
        return base(x, *args, **kw)


class Inner(Probe):
    innermost = True


class Sideless(Probe):
    reads_side = False


def a_side(seed: int = 0, rows: int = 2, length: int = 8, media: int = 2) -> Side:
    """Media k sits at column 2k + 1; tokens from there on may look at it."""
    generator = torch.Generator().manual_seed(seed)
    modality_BT = torch.zeros(rows, length, dtype=torch.long)
    modality_BT[:, 1 : 2 * media : 2] = 1
    at_K = torch.arange(media) * 2 + 1
    return Side(
        modality_BT=modality_BT,
        segment_BT=torch.ones(rows, length, dtype=torch.long),
        vision_BKQD=torch.randn(rows, media, 3, WIDTH, generator=generator),
        media_mask_BTK=(torch.arange(length)[None, :, None] >= at_K).expand(rows, -1, -1),
    )


IDS = torch.arange(20, 36).reshape(2, 8)


def grown(family: str, awake: bool = False, **changes):
    """An LLM with cross-attention before layer 1, and experts on a query projection and an MLP's Linear of layer 2."""
    model = llm(family, **changes)
    stack = sites.layers(model)
    graft(model, f"{stack.path}.1", "cross", GatedCrossAttention())
    linears = sites.linears(stack.modules[2])
    for name in (next(n for n in linears if "q_proj" in n), next(n for n in linears if "fc1" in n or "mlp" in n)):
        graft(model, linears[name], "expert", Expert(linears[name]))
    if awake:
        wake(model)
    return model


def wake(model: nn.Module) -> None:
    """Open gates and move experts away from their hosts, the same way every time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".grafts." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)


def added(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".grafts." in name}


# ---------------------------------------------------------------------------------------------- behaviour in LLMs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_birth_is_identity_and_waking_is_not(family, attention):
    plain = llm(family, attn_implementation=attention)(IDS).logits
    model = grown(family, attn_implementation=attention)
    assert torch.equal(model(IDS, side=a_side()).logits, plain)
    assert torch.equal(model(IDS).logits, plain)
    assert not any(module.training for module in model.modules())  # additions take the mode of their host
    wake(model)
    assert not torch.allclose(model(IDS, side=a_side()).logits, plain, atol=1e-2)
    assert torch.equal(model(IDS).logits, plain)  # text only: both additions step aside


@pytest.mark.parametrize("family", DECODERS)
def test_media_change_only_what_may_look_at_them(family):
    model = grown(family, awake=True)
    one, other = a_side(1), a_side(1)
    assert other.vision_BKQD is not None
    other.vision_BKQD[:, 1] += 1.0  # the second picture, at column 3
    first, second = model(IDS, side=one).logits, model(IDS, side=other).logits
    assert torch.equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] - second[:, 3:]).abs().amax(-1).min() > 1e-4


def test_expert_leaves_text_positions_alone():
    model = grown("llama", awake=True)
    q_proj = model.model.layers[2].self_attn.q_proj
    outputs = []
    handle = q_proj.register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
    side = a_side()
    model(IDS, side=side)
    handle.remove()
    x, y = outputs[0]
    expected = F.linear(x, q_proj.weight)
    text = side.modality_BT == 0
    assert torch.equal(y[text], expected[text])
    assert not torch.isclose(y[~text], expected[~text]).any(-1).all()


def test_a_shut_gate_has_a_gradient_and_what_lies_behind_it_has_none():
    model = grown("llama")
    cross = model.model.layers[1].grafts["cross"]
    loss = lambda: model(IDS, side=a_side(), labels=IDS).loss  # noqa: E731
    loss().backward()
    assert cross.attention_gate.grad.abs() > 1e-6
    behind = {name: p for name, p in cross.named_parameters() if "gate" not in name}
    assert all(p.grad.abs().max() == 0 for p in behind.values())
    with torch.no_grad():
        for gate in (cross.attention_gate, cross.feed_gate):
            gate -= 0.5 * gate.grad.sign()
    model.zero_grad()
    loss().backward()
    asleep = [name for name, p in behind.items() if p.grad.abs().max() == 0]
    assert asleep == []


@pytest.mark.parametrize("family", DECODERS)
def test_recomputed_gradients_with_two_forwards_before_one_backward(family):
    def gradients(recompute: bool, seeds: tuple[int, int]) -> dict[str, torch.Tensor]:
        model = grown(family, awake=True).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        runs = []
        sites.attention(sites.layers(model).modules[1]).register_forward_hook(lambda *_: runs.append(1))
        losses = [model(IDS, side=a_side(seed), labels=IDS, use_cache=False).loss for seed in seeds]
        sum(losses).backward()
        assert len(runs) == (4 if recompute else 2)  # the layer was truly run again
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False, (1, 2)), gradients(True, (1, 2))
    assert plain.keys() == again.keys() and any(".grafts." in name for name in plain)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)
    # had the later side been read for the earlier forward, the result would have been this one
    wrong, cross = gradients(False, (2, 2)), next(name for name in plain if name.endswith("cross.kv.weight"))
    assert not torch.allclose(wrong[cross], plain[cross], rtol=1e-2)


class Speaking(LlamaForCausalLM):
    """How a model around the LLM carries a side through `generate`: full length in, this step's part on."""

    def forward(self, input_ids=None, side=None, past_key_values=None, inputs_embeds=None, **kwargs):
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        done = past_key_values.get_seq_length() if past_key_values is not None else 0
        last = side.media_mask_BTK[:, -1:].expand(-1, max(0, done + length - side.modality_BT.shape[1]), -1)
        now = Side(
            modality_BT=F.pad(side.modality_BT, (0, last.shape[1]))[:, done : done + length],
            segment_BT=F.pad(side.segment_BT, (0, last.shape[1]), value=1)[:, done : done + length],
            vision_BKQD=side.vision_BKQD,
            media_mask_BTK=torch.cat([side.media_mask_BTK, last], 1)[:, done : done + length],
        )
        return super().forward(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, side=now, **kwargs
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_side_equals_a_loop_without_cache(cache):
    model = grown("llama", awake=True)
    model.__class__ = Speaking
    side, embeds = a_side(), model.get_input_embeddings()(IDS)
    found = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(IDS),
        side=side,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
    )
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, model(ids, side=side, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids[:, IDS.shape[1] :])
    blind = llm("llama").generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, eos_token_id=None)
    assert not torch.equal(found, blind[:, IDS.shape[1] :])


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_model_that_drops_side_is_refused_with_the_reason(family):
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, **sizes)
    )
    for root, path in ((model, "transformer.h.1"), (model.transformer, "h.1")):
        with pytest.raises(ConfigError, match=f"{type(root).__name__}.forward does not hand its keyword arguments on"):
            graft(root, path, "cross", GatedCrossAttention())
    assert not any(isinstance(m, grafting.Grafted | grafting.Carrier) for m in model.modules())
    log: list = []  # the refusal is right: an addition that does not ask for a side is let in, and none arrives
    graft(model, "transformer.h.1", "probe", Sideless(log))
    model.transformer(IDS, side=a_side())
    assert log == [("", None)]


def test_a_model_of_ours_may_stand_above():
    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llm("llama")

        def forward(self, ids):
            return self.inner(ids, side=side)

    model, side = Ours(), a_side()
    log: list = []
    graft(model, "inner.model.layers.2.mlp", "probe", Probe(log))
    model(IDS)
    assert log == [("", side)]


def test_side_reaches_both_stacks_of_an_encoder_decoder():
    model = llm("t5")
    log: list = []
    graft(model, "encoder.block.1", "probe", Probe(log, "encoder"))
    graft(model, sites.mlp(sites.layers(model).modules[2]), "probe", Probe(log, "decoder"))
    side = a_side()
    plain = llm("t5")(IDS, decoder_input_ids=IDS).logits
    assert torch.equal(model(IDS, decoder_input_ids=IDS, side=side).logits, plain)
    assert log == [("encoder", side), ("decoder", side)]


@pytest.mark.parametrize("family", VISION)
def test_encoder_layers_carry_a_side(family):
    model = vision(family)
    log: list = []
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = model(pixel_values=pixels).last_hidden_state
    stack, side = sites.layers(model), a_side()
    graft(model, f"{stack.path}.1", "cross", GatedCrossAttention())
    graft(model, sites.attention(stack.modules[1]), "probe", Probe(log))
    seen = Side(side.modality_BT, side.segment_BT, None, side.vision_BKQD, torch.ones(2, plain.shape[1], 2).bool())
    assert torch.equal(model(pixel_values=pixels, side=seen).last_hidden_state, plain)
    assert log == [("", seen)]
    wake(model)
    assert not torch.allclose(model(pixel_values=pixels, side=seen).last_hidden_state, plain, atol=1e-2)


# ---------------------------------------------------------------------------------------------- how a side is lent


def test_side_is_lent_only_while_the_layer_runs():
    model, side = llm("llama"), a_side()
    log: list = []
    layer = model.model.layers[0]
    graft(model, "model.layers.0.mlp", "probe", Probe(log))
    model(IDS, side=side)
    layer.mlp(torch.randn(2, 8, WIDTH))  # called bare, outside of its layer
    model(IDS)
    assert [seen for _, seen in log] == [side, None, None]


def test_a_layer_that_fails_takes_its_side_back():
    class Failing(Graft):
        def forward(self, host, base, x, *args, side, **kw):
            raise RuntimeError("no")

    model = llm("llama")
    log: list = []
    graft(model, "model.layers.0.mlp", "probe", Probe(log))
    graft(model, "model.layers.0.self_attn", "failing", Failing())
    with pytest.raises(RuntimeError, match="no"):
        model(IDS, side=a_side())
    model.model.layers[0].mlp(torch.randn(2, 8, WIDTH))
    assert log == [("", None)]


def test_a_layer_that_runs_within_itself_gives_each_run_its_own_side():
    class Twice(Graft):
        """Runs the layer once more, with no side, before its own run."""

        def forward(self, host, base, x, *args, side, **kw):
            if side is not None:
                host(x, *args, **kw)
            return base(x, *args, **kw)

    model, side = llm("llama"), a_side()
    log: list = []
    graft(model, "model.layers.0", "twice", Twice())
    graft(model, "model.layers.0.mlp", "probe", Probe(log))
    model(IDS, side=side)
    assert [seen for _, seen in log] == [None, side]


def test_threads_do_not_see_each_others_side():
    class Meeting(Graft):
        """Goes on when both threads are inside the layer."""

        def forward(self, host, base, x, *args, side, **kw):
            both.wait(10)
            return base(x, *args, **kw)

    class Naming(Graft):
        def forward(self, host, base, x, *args, side, **kw):
            seen[threading.current_thread().name] = side
            return base(x, *args, **kw)

    model, both = llm("llama"), threading.Barrier(2)
    seen: dict = {}
    graft(model, "model.layers.0.self_attn", "meeting", Meeting())
    graft(model, "model.layers.0.mlp", "naming", Naming())
    sides = {"one": a_side(1), "other": a_side(2)}
    threads = [threading.Thread(target=model, args=(IDS,), kwargs={"side": s}, name=n) for n, s in sides.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["one"] is sides["one"] and seen["other"] is sides["other"]


def test_modules_outside_of_layers_are_told_nothing_unless_called_with_it():
    model, side = llm("llama"), a_side()
    log: list = []
    for path in ("model.embed_tokens", "lm_head", "model.norm"):
        graft(model, path, "probe", Probe(log, path))
    assert torch.equal(model(IDS, side=side).logits, llm("llama")(IDS).logits)
    assert log == [("model.embed_tokens", None), ("model.norm", None), ("lm_head", None)]
    model.model.norm(torch.randn(1, WIDTH), side=side)
    assert log[-1] == ("model.norm", side)


def test_a_host_that_is_called_with_keywords_only():
    class Doubling(Graft):
        def forward(self, host, base, x, *args, side, **kw):
            return base(2 * x, *args, **kw)

    model = llm("llama")  # Llama's layer calls self_attn(hidden_states=..., ...)
    expected = llm("llama")
    for projection in ("q_proj", "k_proj", "v_proj"):
        getattr(expected.model.layers[1].self_attn, projection).weight.data.mul_(2)
    graft(model, "model.layers.1.self_attn", "doubling", Doubling())
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)


def test_additions_nest_like_middleware_and_the_innermost_stays_inside():
    model = llm("llama")
    log: list = []
    path = "model.layers.0.mlp.up_proj"
    for kind, tag in ((Probe, "one"), (Probe, "two"), (Inner, "low"), (Probe, "three")):
        graft(model, path, tag, kind(log, tag))
    model(IDS)
    assert [tag for tag, _ in log] == ["three", "two", "one", "low"]
    assert list(grafting.at(model.get_submodule(path))) == ["low", "one", "two", "three"]


# ---------------------------------------------------------------------------------------------- what stays the same


def test_names_classes_and_hidden_states_are_those_of_the_base():
    plain, model = llm("llama"), grown("llama")
    layer, original = model.model.layers[1], type(plain.model.layers[1])
    assert isinstance(layer, original) and type(layer) is not original
    assert (type(layer).__name__, type(layer).__qualname__) == (original.__name__, original.__qualname__)
    assert type(model.model.layers[1]) is type(grown("llama").model.layers[1])  # one class per base, cached
    base = {name: value for name, value in model.state_dict().items() if ".grafts." not in name}
    assert base.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in base.items())
    states = [m(IDS, output_hidden_states=True).hidden_states for m in (plain, model)]
    assert len(states[0]) == len(states[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_ungraft_restores_classes_and_attributes_exactly():
    plain, model = llm("llama"), llm("llama")
    before = [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()]
    log: list = []
    places = {"cross": "model.layers.1", "inner": "model.layers.1.mlp", "far": "lm_head"}
    for name, path in places.items():
        graft(model, path, name, Probe(log if name == "inner" else []))
    ungraft(model, "model.layers.1", "cross")
    assert isinstance(model.model.layers[1], grafting.Carrier)  # one is left inside
    side = a_side()
    model(IDS, side=side)
    assert log == [("", side)]
    ungraft(model, "model.layers.1.mlp", "inner")
    ungraft(model, "lm_head", "far")
    assert [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()] == before
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    with pytest.raises(ConfigError, match="no graft named 'cross'"):
        ungraft(model, "model.layers.1", "cross")


def test_state_dict_round_trip_and_deepcopy():
    model, side = grown("llama", awake=True), a_side()
    fresh = grown("llama", seed=3)
    fresh.load_state_dict(model.state_dict(), strict=True)
    expected = model(IDS, side=side).logits
    assert torch.equal(fresh(IDS, side=side).logits, expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in added(model).values():
            parameter.zero_()
    assert torch.equal(twin(IDS, side=side).logits, expected)
    assert not torch.equal(model(IDS, side=side).logits, expected)


def test_a_grafted_model_refuses_to_be_pickled():
    with pytest.raises((pickle.PicklingError, TypeError)):
        pickle.dumps(grown("llama"))


def test_compiled_in_one_graph():
    model, side = grown("llama", awake=True), a_side()
    compiled = torch.compile(model.model.layers[1], backend="eager", fullgraph=True)
    x = torch.randn(2, 8, WIDTH)
    positions = model.model.rotary_emb(x, torch.arange(8)[None])
    expected = model.model.layers[1](x, position_embeddings=positions, side=side)
    assert torch.equal(compiled(x, position_embeddings=positions, side=side), expected)
    assert not torch.equal(compiled(x, position_embeddings=positions), expected)


def test_sharded_by_fsdp2_on_one_process():
    plain, side = grown("llama", awake=True).train(), a_side()
    plain(IDS, side=side, labels=IDS, use_cache=False).loss.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = grown("llama", awake=True).train()
        mesh = dist.init_device_mesh("cpu", (1,))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = model(IDS, side=side, labels=IDS, use_cache=False).loss
        losses.backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        for path in ("model.layers.0", "model.layers.0.mlp.up_proj", "lm_head"):
            with pytest.raises(ConfigError, match="sharded already"):
                graft(model, path, "late", Probe([]))
    finally:
        dist.destroy_process_group()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


# ---------------------------------------------------------------------------------------------- refusals


def test_refusals_name_the_cause():
    model = llm("llama")
    graft(model, "lm_head", "probe", Probe([]))
    refused: list[tuple] = [
        ("model.layers.0.mpl", "probe", "did you mean 'model.layers.0.mlp'"),
        ("lm_head", "probe", "already has a graft named 'probe'"),
        ("lm_head", "a.b", "cannot name a graft"),
        ("model.layers", "probe", "never called"),
        (nn.Linear(1, 1), "probe", "is not inside LlamaForCausalLM"),
    ]
    for path, name, cause in refused:
        with pytest.raises(ConfigError, match=cause):
            graft(model, path, name, Probe([]))
    with pytest.raises(ConfigError, match="reads its weight"):
        graft(vision("siglip"), "head.attention.out_proj", "probe", Probe([]))
    for name in ("linear1", "self_attn", "norm2"):
        with pytest.raises(ConfigError, match=f"{name} is called in training alone"):
            graft(nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True), name, "probe", Sideless([]))
    model.model.norm.forward = model.model.norm.forward  # what libraries that hook forward do
    with pytest.raises(ConfigError, match="put there by another library"):
        graft(model, "model.norm", "probe", Probe([]))
