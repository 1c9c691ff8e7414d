"""Packed Linears against hand-made rounding, dense ones of the same values, and through the life of a model."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import composed
import isthmus
from composed import stir
from isthmus import exporting, lora, parts, planning, quantised, sites
from isthmus.config import Budget, EncoderConfig, LoRA, Recipe, Source, Stage, Train
from isthmus.costs import costs
from isthmus.exporting import llava, peft_file
from isthmus.graft import at, graft
from isthmus.quantised import Packed
from isthmus.types import ConfigError
from test_graft import Expert, GatedCrossAttention, a_side, added, wake
from tiny import DECODERS, LLMS, VISION, llm, vision

NO_KERNELS = find_spec("bitsandbytes") is None
FOUR = pytest.param(4, marks=pytest.mark.skipif(NO_KERNELS, reason="4 bits need the extra `quantised` (bitsandbytes)"))
every_bits = pytest.mark.parametrize("bits", [8, FOUR])
IDS = torch.arange(20, 36).reshape(2, 8)
LEVELS = "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 .1609302 .2461123 .33791524"
LEVELS += " .44070983 .562617 .72295684 1"
"""The sixteen values of NF4, appendix E of the QLoRA paper."""


def run(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def recipe(bits: int, **changes: Any) -> Recipe:
    """A tiny LLaVA with both base parts packed."""
    plain = composed.recipe("llama", aspect="crop")
    return plain.but(llm=plain.llm.but(bits=bits), encoder=plain.encoder.but(bits=bits), **changes)


# ---------------------------------------------------------------------------------------------- one Linear


def test_8_bits_round_to_the_nearest_of_255_steps_per_row():
    dense = nn.Linear(48, 20)
    w = dense.weight.detach()
    packed = Packed(dense, 8, torch.float32)
    step = w.abs().amax(1) / 127
    assert ((packed.weight - w).abs() <= step[:, None] * 0.5001).all()
    assert packed.packed.dtype == torch.int8 and packed.packed.abs().amax(1).eq(127).all()
    torch.testing.assert_close(packed.weight.abs().amax(1), w.abs().amax(1))


@pytest.mark.skipif(NO_KERNELS, reason="4 bits need the extra `quantised` (bitsandbytes)")
def test_4_bits_round_to_the_nearest_nf4_value_of_each_block():
    dense = nn.Linear(48, 20)  # a block of 64 crosses rows
    packed = Packed(dense, 4, torch.float32)
    blocks = dense.weight.detach().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor([float(level) for level in LEVELS.split()])
    nearest = levels[(blocks / largest)[..., None].sub(levels).abs().argmin(-1)]
    torch.testing.assert_close(packed.weight, (nearest * largest).reshape(20, 48), rtol=1e-5, atol=1e-6)
    assert packed.packed.numel() == 20 * 48 // 2


@every_bits
@pytest.mark.parametrize("autocast", [False, True])
def test_product_and_gradients_are_those_of_the_unpacked_weight(bits, autocast):
    packed = Packed(nn.Linear(64, 24), bits, torch.float32)
    packed.bias.requires_grad_(True)
    twin = nn.Linear(64, 24)
    twin.load_state_dict({"weight": packed.weight, "bias": packed.bias})
    results = []
    for module in (packed, twin):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        (y.float() * torch.linspace(-1, 1, 24)).sum().backward()
        results.append((y, x.grad, module.bias.grad))
    close: dict[str, float] = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip(*results):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)


@every_bits
def test_no_dense_copy_waits_for_the_backward(bits):
    host, kept = Packed(nn.Linear(256, 256), bits, torch.float32), []
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        host(x)
    assert sum(kept) <= 256 * 256 * 4 * (0.15 if bits == 4 else 0.26)
    held = sum(t.nbytes for t in host.state_dict().values() if t is not host.bias)
    assert held <= 256 * 256 * (4.6 if bits == 4 else 8.3) / 8 + 4 * 256


@every_bits
def test_products_are_counted_without_numbers_as_those_of_a_dense_linear(bits):
    """Forward and the gradient of the input; codes have none."""
    with torch.device("meta"):
        packed = Packed(nn.Linear(64, 24), bits, torch.float32)
        x = torch.empty(2, 5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = packed(x)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 64 * 24 * 2)
    assert y.shape == (2, 5, 24) and x.grad is not None and x.grad.is_meta


# ---------------------------------------------------------------------------------------------- models


@every_bits
@pytest.mark.parametrize("family", LLMS)
def test_an_llm_computes_with_the_unpacked_weights(family, bits):
    model, plain = llm(family), run(llm(family))
    quantised.quantise(model, bits, torch.float32)
    logits = run(model)
    away = (logits - plain).norm() / plain.norm()
    assert 1e-4 < away < (0.05 if bits == 8 else 1.0)
    assert set(quantised.hosts(model)) == set(sites.linears(llm(family))) - {"lm_head"}
    assert sum(quantised.weights(model).values()) == sum(
        each.weight.numel() for path, each in sites.linears(llm(family)).items() if path != "lm_head"
    )
    assert len(quantised.dequantise(model)) > 0 and not quantised.hosts(model)
    torch.testing.assert_close(run(model), logits, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in llm(family).modules()]


@every_bits
@pytest.mark.parametrize("family", VISION)
def test_an_encoder_computes_with_the_unpacked_weights(family, bits):
    model, pixels = vision(family), torch.randn(2, 3, 32, 32)
    quantised.quantise(model, bits, torch.float32)
    packed = model(pixel_values=pixels)
    quantised.dequantise(model)
    for mine, theirs in zip(packed.values(), model(pixel_values=pixels).values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@every_bits
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_adapters_over_packed_hosts_have_the_gradients_of_dense_ones(family, dora, bits):
    model = llm(family)
    quantised.quantise(model, bits, torch.float32)
    dense = copy.deepcopy(model)
    quantised.dequantise(dense)
    born = run(model)
    for each in (model, dense):
        torch.manual_seed(0)
        assert lora.attach(each, "*proj*" if family != "opt" else "*.fc1", LoRA(r=2, dora=dora))
    assert torch.equal(run(model), born)
    for each in (model, dense):
        wake(each)
        run(each).square().mean().backward()
    torch.testing.assert_close(run(model), run(dense), rtol=1e-4, atol=1e-4)
    for (name, mine), theirs in zip(added(model).items(), added(dense).values()):
        assert mine.grad is not None and mine.grad.any(), name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ConfigError, match=f"is held in {bits} bits"):
        lora.merge(model)
    unmerged = run(model)
    quantised.dequantise(model)
    torch.testing.assert_close(run(model), unmerged, rtol=1e-5, atol=1e-4)
    lora.merge(model)
    torch.testing.assert_close(run(model), unmerged, rtol=1e-4, atol=1e-3)


@every_bits
def test_peft_runs_an_adapter_over_the_unpacked_part_the_same(bits, tmp_path):
    model, unpacked = llm("llama"), llm("llama")
    for each in (model, unpacked):
        quantised.quantise(each, bits, torch.float32)
    lora.attach(model, "*.q_proj", LoRA(r=2, dora=True))
    wake(model)
    peft_file.write(model, "lora", tmp_path)
    quantised.dequantise(unpacked)
    theirs = peft.PeftModel.from_pretrained(unpacked, tmp_path).eval()
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-5, atol=1e-5)


@every_bits
def test_other_grafts_sit_on_packed_hosts_too(bits):
    model, dense = llm("llama"), llm("llama")
    quantised.quantise(model, bits, torch.float32)
    quantised.dequantise(quantised_twin := copy.deepcopy(model))
    path = "model.layers.2.self_attn.q_proj"
    for each in (model, quantised_twin):
        graft(each, "model.layers.1", "cross", GatedCrossAttention())
        graft(each, path, "expert", Expert(dense.get_submodule(path)))
        lora.attach(each, "*.q_proj", LoRA(r=2))
        wake(each)
    seen, expected = (each(IDS, side=a_side()).logits for each in (model, quantised_twin))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    assert quantised.dequantise(model) and list(at(model.get_submodule(path))) == ["lora", "expert"]
    torch.testing.assert_close(model(IDS, side=a_side()).logits, seen, rtol=1e-4, atol=1e-4)


@every_bits
def test_recomputed_and_sharded_gradients_equal_plain_ones(bits, tmp_path):
    def gradients(change) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = llm("llama")
        quantised.quantise(model, bits, torch.float32)
        lora.attach(model.requires_grad_(False), "*_proj", LoRA(r=2))
        wake(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".grafts." in name)
        change(model)
        model.train()(IDS, labels=IDS).loss.backward()
        found = {name: p.grad for name, p in added(model).items() if p.grad is not None}
        return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}

    def shard(model) -> None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    plain = gradients(lambda model: None)
    assert len(plain) == 3 * 7 * 2
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for change in (lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}), shard):
            for name, gradient in gradients(change).items():
                torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)
    finally:
        dist.destroy_process_group()


@every_bits
def test_the_unpacked_model_computes_in_the_dtype_of_the_packed_one(bits):
    model = llm("llama")
    quantised.quantise(model, bits, torch.bfloat16)
    logits = run(model)
    quantised.dequantise(model)
    assert logits.dtype == torch.bfloat16 and {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert torch.equal(run(model), logits)


# ---------------------------------------------------------------------------------------------- a model's life


@every_bits
def test_a_save_refers_to_packed_parts_and_loads_the_same(bits, tmp_path):
    model = isthmus.compose(recipe(bits))
    model.add_lora(["llm.*.q_proj", "encoders.*layers.*.fc1"], LoRA(r=2, dora=True), "sft")
    stir(model).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert keys and not any(key.startswith(("llm.", "encoders.")) and ".grafts." not in key for key in keys)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["llm"]["config"]["bits"] == config["encoders"]["image"]["config"]["bits"] == bits
    again = isthmus.load(tmp_path, torch.float32)
    trial = exporting.Trial.of(model)
    expected = trial.logits(model, model.placeholder("image"))
    assert torch.equal(trial.logits(again, again.placeholder("image")), expected)
    with pytest.raises(ConfigError, match="referred to, not saved whole"):
        model.save_pretrained(tmp_path / "whole", whole=True)
    assert not (tmp_path / "whole").exists()
    in_half = quantised.hosts(isthmus.load(tmp_path, torch.bfloat16))
    for path, host in quantised.hosts(model).items():  # the codes do not depend on the arithmetic
        assert torch.equal(host.packed, in_half[path].packed) and in_half[path].weight.dtype == torch.bfloat16


@every_bits
@pytest.mark.parametrize("dora", [False, True])
def test_export_unpacks_merges_and_keeps_the_logits(dora, bits, tmp_path):
    model = isthmus.compose(recipe(bits))
    model.add_lora(["llm.*.q_proj", "encoders.*layers.*.fc1"], LoRA(r=2, dora=dora), "sft")
    model.add_lora(["llm.*.q_proj"], LoRA(r=3, dora=not dora), "more")
    stir(model).save_pretrained(tmp_path / "ours")
    assert llava.export(tmp_path / "ours", tmp_path / "theirs").difference <= 1e-4
    assert not any("grafts" in key or "packed" in key for key in load_file(tmp_path / "theirs" / "model.safetensors"))


@every_bits
def test_plan_counts_weights_and_refuses_to_train_codes(bits):
    stage = Stage(
        name="sft", data=(Source(name="easy-vqa"),), train={"llm.*": Train(mode=LoRA(r=2))}, budget=Budget(steps=1)
    )
    planned = planning.plan(recipe(bits, stages=(stage,)))
    plain = planning.plan(composed.recipe("llama").but(stages=(stage,)))
    assert planned.parts == plain.parts and planned.stages == plain.stages
    assert costs(recipe(bits)) == costs(composed.recipe("llama", aspect="crop"))
    with pytest.raises(ConfigError, match="are held in 4 or 8 bits"):
        planning.plan(recipe(bits, stages=(stage.but(train={"llm.*": Train()}),)))


def test_cached_features_of_packed_encoders_have_a_name_of_their_own():
    plain = composed.recipe("llama").encoder
    one, other = parts.load_encoder(plain, torch.float32), parts.load_encoder(plain.but(bits=8), torch.float32)
    assert one.identity() != other.identity()


def test_refusals_name_the_cause(monkeypatch):
    with pytest.raises(ConfigError, match="convolutions"):
        parts.load_encoder(EncoderConfig(bits=8), torch.float32)
    with pytest.raises(ConfigError, match="no Linear to hold"):
        quantised.quantise(nn.Sequential(nn.Conv2d(3, 4, 1)), 8, torch.float32)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    quantised._kernels.cache_clear()
    with pytest.raises(ConfigError, match="need bitsandbytes"):
        quantised.quantise(llm("llama"), 4, torch.float32)


def test_linears_that_are_read_and_never_called_stay_dense():
    model = vision("siglip")
    quantised.quantise(model, 8, torch.float32)
    assert not any("attention.out_proj" in path for path in quantised.hosts(model))
    x = torch.randn(2, 8)
    assert F.linear(x, Packed(nn.Linear(8, 4), 8, torch.float32).weight).shape == (2, 4)  # readable all the same
