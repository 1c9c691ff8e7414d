"""LoRA and DoRA against peft, which computes the same thing from the same weights in its own way."""

from __future__ import annotations

import itertools
from typing import Any, cast

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus import lora, sites
from isthmus.config import LoRA
from isthmus.exporting import peft_file
from isthmus.graft import Graft, at, graft, ungraft
from isthmus.types import ConfigError
from test_graft import GatedCrossAttention, a_side, added, grown, wake
from tiny import IMAGE, LLMS, WIDTH, llm, vision

IDS = torch.arange(20, 36).reshape(2, 8)
PROJECTIONS = {"llama": "*.q_proj", "qwen2": "*.q_proj", "qwen3": "*.mlp.*", "glm": "*.gate_up_proj", "opt": "*.fc1"}
PROJECTIONS |= {"t5": "decoder.*.q", "flan-t5": "decoder.*.wi_*", "gemma": "*.o_proj", "gemma2": "*.k_proj"}
PROJECTIONS |= {"gemma3_text": "*.v_proj", "mistral": "*.self_attn.*", "phi": "*.dense", "phi3": "*.qkv_proj"}


class Expert(Graft):
    """Half of the outputs come from elsewhere."""

    def forward(self, host, base, x, *args, side, **kw):
        y = base(x, *args, **kw)
        return torch.cat([y[..., ::2], torch.zeros_like(y[..., ::2])], -1)


def low_rank(**fields) -> LoRA:
    return LoRA.model_validate(fields)


def run(model) -> torch.Tensor:
    kwargs = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **kwargs).logits


def trained(model, globs, how: LoRA, name: str = "lora", seed: int = 5) -> list[str]:
    """Attach, and move every parameter of LoRA as training would."""
    paths = lora.attach(model, globs, how, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in paths:
            for parameter in at(model.get_submodule(path))[name].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return paths


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", LLMS)
def test_identity_at_birth_and_merged_equals_unmerged(family, dora):
    model, plain = llm(family), run(llm(family))
    how = low_rank(r=4, alpha=8, dora=dora)
    lora.attach(model, PROJECTIONS[family], how, "born")
    assert torch.equal(run(model), plain)
    lora.merge(model, "born")
    torch.testing.assert_close(run(model), plain, rtol=1e-6, atol=1e-5)
    paths = trained(model, PROJECTIONS[family], how)
    unmerged = run(model)
    assert not torch.allclose(unmerged, plain, atol=1e-2)
    assert lora.merge(model) == paths
    torch.testing.assert_close(run(model), unmerged, rtol=1e-4, atol=1e-4)
    assert [type(m) for m in model.modules()] == [type(m) for m in llm(family).modules()]
    assert model.state_dict().keys() == llm(family).state_dict().keys()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_peft_reads_ours_runs_and_merges_the_same(family, dora, tmp_path):
    model = llm(family)
    trained(
        model, ["*.q_proj", "*.v_proj", "*.fc1" if family == "opt" else "*.up_proj"], low_rank(r=4, alpha=8, dora=dora)
    )
    peft_file.write(model, "lora", tmp_path)
    theirs = peft.PeftModel.from_pretrained(llm(family), tmp_path).eval()
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-6, atol=1e-5)
    lora.merge(model)
    merged = theirs.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-6, msg=name)


def test_update_is_the_papers_formula():
    host, x = nn.Linear(6, 4), torch.randn(3, 6)
    root: Any = nn.ModuleDict({"host": host})
    trained(root, "host", low_rank(r=2, alpha=3))
    adapter: Any = at(host)["lora"]
    expected = x @ (host.weight + 3 / 2 * adapter.B @ adapter.A).T + host.bias
    torch.testing.assert_close(host(x), expected)


def test_masters_stay_float32_under_a_bfloat16_base_and_on_its_device():
    host = nn.Linear(6, 4, dtype=torch.bfloat16, device="meta")
    adapter = lora.LowRank(host, low_rank(r=2, dora=True))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32} and adapter.A.device.type == "meta"
    root: Any = nn.ModuleDict({"host": nn.Linear(6, 4, dtype=torch.bfloat16)})
    trained(root, "host", low_rank(r=2, dora=True))
    y = root["host"](torch.randn(3, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {cast(torch.Tensor, p.grad).dtype for p in at(root["host"])["lora"].parameters()} == {torch.float32}


def test_dropout_acts_on_the_low_rank_path_alone_and_only_in_training():
    root: Any = nn.ModuleDict({"host": nn.Linear(64, 8)})
    trained(root, "host", low_rank(r=2, dropout=0.5))
    x = torch.randn(4, 64)
    root.eval()
    assert torch.equal(root["host"](x), root["host"](x))
    root.train()
    assert not torch.equal(root["host"](x), root["host"](x))
    with torch.no_grad():
        cast(lora.LowRank, at(root["host"])["lora"]).B.zero_()
    assert torch.equal(root["host"](x), nn.functional.linear(x, root["host"].weight, root["host"].bias))


def test_innermost_even_when_attached_last():
    model = llm("llama")
    path = "model.layers.0.self_attn.q_proj"
    graft(model, path, "expert", Expert())
    trained(model, path, low_rank(r=4))
    host = model.get_submodule(path)
    assert list(at(host)) == ["lora", "expert"]
    x = torch.randn(2, WIDTH)
    changed = nn.functional.linear(x, host.weight + cast(lora.LowRank, at(host)["lora"]).update())
    torch.testing.assert_close(host(x)[..., : WIDTH // 2], changed[..., ::2])
    assert host(x)[..., WIDTH // 2 :].abs().max() == 0


def test_merge_refuses_what_would_be_wrong_and_changes_nothing():
    def refused(model, cause: str, name: str = "lora") -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ConfigError, match=cause):
            lora.merge(model, name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    routed = llm("llama")
    trained(routed, "*.q_proj", low_rank(r=2))
    graft(routed, "model.layers.2.self_attn.q_proj", "expert", Expert())
    refused(routed, r"layers.2.self_attn.q_proj carries \['expert'\] too")
    tied = llm("llama")
    trained(tied, ["*.q_proj", "lm_head"], low_rank(r=2))
    refused(tied, "weight of lm_head is shared by .*embed_tokens")
    silent = llm("llama")
    path = trained(silent, "*.q_proj", low_rank(r=2, dora=True), "first")[0]
    trained(silent, "*.q_proj", low_rank(r=2), "second")
    cast(Any, at(silent.get_submodule(path))["first"]).magnitude.data[3] = 0
    refused(silent, r"carries \['first'\] inside, with magnitudes of zero\nmerge 'first' first", "second")
    unmerged = run(silent)
    for name in ("first", "second"):
        lora.merge(silent, name)
    torch.testing.assert_close(run(silent), unmerged, rtol=1e-5, atol=1e-5)
    refused(llm("llama"), "has no LoRA named 'lora'")


STACKS = list(itertools.product(["lora", "dora"], repeat=3))


@pytest.mark.parametrize("kinds", STACKS, ids="-".join)
def test_several_on_one_host_merge_in_any_order(kinds):
    """The inputs' outputs, bias and all, and the weight that they come to: the identity gives its columns."""
    for order in itertools.permutations("abc"):
        root: Any = nn.ModuleDict({"host": nn.Linear(12, 7)}).eval()
        for number, (name, kind) in enumerate(zip("abc", kinds)):
            how = low_rank(r=number + 1, alpha=3, dora=kind == "dora", dropout=0.3)
            trained(root, "host", how, name, seed=number)
        root.eval()
        x = torch.cat([torch.eye(12), torch.zeros(1, 12)])
        unmerged = root["host"](x)
        for name in order:
            lora.merge(root, name)
            torch.testing.assert_close(root["host"](x), unmerged, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(root["host"].weight.T + root["host"].bias, unmerged[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", itertools.product(["lora", "dora"], repeat=2), ids="-".join)
def test_peft_runs_and_merges_several_on_one_host_the_same(kinds, tmp_path):
    model = llm("qwen2")
    for number, (name, kind) in enumerate(zip(("first", "second"), kinds)):
        trained(model, "*.q_proj", low_rank(r=2 + number, alpha=5, dora=kind == "dora"), name, seed=number)
        peft_file.write(model, name, tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(llm("qwen2"), tmp_path / "first", adapter_name="first").eval()
    theirs.load_adapter(tmp_path / "second", "second")
    theirs.base_model.set_adapter(["first", "second"])
    unmerged = run(model)
    assert not torch.allclose(unmerged, run(llm("qwen2")), atol=1e-2)
    torch.testing.assert_close(run(theirs), unmerged, rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload(adapter_names=["first", "second"]).state_dict()
    for name in ("first", "second"):
        lora.merge(model, name)
        torch.testing.assert_close(run(model), unmerged, rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6, msg=name)


PIXELS = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_encoders_carry_lora_beside_other_grafts_and_peft_agrees(family, dora, tmp_path):
    def see(model, **side) -> torch.Tensor:
        return model(pixel_values=PIXELS, **side).last_hidden_state

    model, globs, how = vision(family), ["*layers.*.q_proj", "*layers.*.fc1"], low_rank(r=2, alpha=3, dora=dora)
    plain = see(model)
    lora.attach(model, globs, how, "born")
    stack = sites.layers(model)
    graft(model, f"{stack.path}.1", "cross", GatedCrossAttention())
    side = a_side(length=plain.shape[1])
    assert torch.equal(see(model, side=side), plain)
    for path in lora.hosts(model, "born"):
        ungraft(model, path, "born")
    wake(model)
    trained(model, globs, how)
    seen = see(model, side=side)
    assert not torch.allclose(seen, see(model), atol=1e-2) and not torch.allclose(see(model), plain, atol=1e-2)
    see(model, side=side).square().mean().backward()
    silent = [name for name, p in added(model).items() if p.grad is None or not p.grad.any()]
    assert silent == []
    peft_file.write(model, "lora", tmp_path)
    theirs = peft.PeftModel.from_pretrained(vision(family), tmp_path).eval()
    torch.testing.assert_close(see(model), see(theirs), rtol=1e-5, atol=1e-5)
    lora.merge(model)
    torch.testing.assert_close(see(model, side=side), seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_together_with_cross_attention_and_experts(family, dora):
    """LoRA on every projection of an LLM that has both kinds of additions, some of them on the same Linears."""
    model, plain = grown(family), llm(family)(IDS).logits
    expert_hosts = [path for path, each in sites.linears(model).items() if at(each)]
    globs, how = ["*.q_proj", "*.fc1" if family == "opt" else "*.mlp.*"], low_rank(r=2, alpha=3, dora=dora)
    paths = lora.attach(model, globs, how)
    assert len(expert_hosts) == 2 and set(expert_hosts) <= set(paths)
    assert torch.equal(model(IDS, side=a_side()).logits, plain)
    for path in paths:
        ungraft(model, path, "lora")
    wake(model)
    trained(model, globs, how)
    assert all(list(at(model.get_submodule(path))) == ["lora", "expert"] for path in expert_hosts)
    seen = model(IDS, side=a_side()).logits
    model(IDS, side=a_side(), labels=IDS).loss.backward()
    assert [name for name, p in added(model).items() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(ConfigError, match=r"carries \['expert'\] too"):
        lora.merge(model)
    for path in expert_hosts:
        ungraft(model, path, "lora")
    without = model(IDS, side=a_side()).logits
    assert not torch.allclose(without, seen, atol=1e-2)
    assert len(lora.merge(model)) == len(paths) - 2  # right beside cross-attention, which is on the layer
    torch.testing.assert_close(model(IDS, side=a_side()).logits, without, rtol=1e-4, atol=1e-4)


def test_globs_choose_linears_only():
    model = llm("qwen2")
    assert len(lora.attach(model, "*", low_rank(r=2), "every")) == 3 * 7  # all but the head, as in peft's all-linear
    assert lora.attach(model, "lm_head", low_rank(r=2), "head") == ["lm_head"]
    with pytest.raises(ConfigError, match=r"'\*.norm' matches no Linear"):
        lora.attach(model, ["*.q_proj", "*.norm"], low_rank(r=2))
    with pytest.raises(ConfigError, match="did you mean 'model.layers.1.mlp.up_proj'"):
        lora.attach(model, "model.layers.1.mlp.upproj", low_rank(r=2))
    assert not any("lora" in at(module) for module in model.modules())  # refused before anything was attached


def test_models_that_hand_no_side_on_can_still_have_lora():
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", eos_token_id=2, **sizes)).eval()
    before = run(model)
    paths = trained(model, "*.dense_h_to_4h", low_rank(r=2))
    assert len(paths) == 2 and not torch.allclose(run(model), before, atol=1e-3)
