"""LLaMA-Adapter: shut gates change nothing, two softmaxes as the formula says, and V2's parts that never meet."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import composed
from composed import MIX, picture, sample, stir
from isthmus import parts, planning, sites
from isthmus.aligners.llama_adapter import Prompted
from isthmus.config import Budget, LLMConfig, LoRA, ObjectiveConfig, Stage
from isthmus.model import VLM
from isthmus.recipes.llama_adapter import LANGUAGE, VISUAL, llama_adapter
from isthmus.training.optimizer import adamw, choose
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, Side

TALK = sample(picture(1), "what is it?")
VERSIONS = {
    "v1": {},
    "v2": {"fusion": "early", "lower": 1, "tune": "scale"},
    "v2-released": {"lower": 1, "tune": "bias", "prompts": 3, "blocks": 1, "inner": 16, "heads": 2},
}
every_version = pytest.mark.parametrize("version", VERSIONS)


def model(version: str = "v1", family: str = "llama", **options) -> VLM:
    return composed.model(family, "llama_adapter", {**VERSIONS[version], **options})


def logits(vlm: VLM, batch: Batch) -> torch.Tensor:
    output = vlm.run(batch)
    return output.head(output.hidden_BTD)


def prompted(vlm: VLM) -> dict[str, Prompted]:
    return {name: module for name, module in vlm.named_modules() if isinstance(module, Prompted)}


# ---------------------------------------------------------------------------------------------- gates


@every_version
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "opt"])
@torch.no_grad()
def test_a_shut_gate_is_the_frozen_llm_with_a_picture_too(version, family):
    vlm = model(version, family)
    batch = vlm.processor.collator()([TALK])
    plain = parts.load_llm(LLMConfig(source=str(composed.llm_folder(family))), torch.float32)(
        input_ids=batch.input_ids_BT, use_cache=False
    ).logits
    assert torch.equal(logits(vlm, batch), plain)
    for each in prompted(vlm).values():
        each.gate.fill_(0.5)
    assert (logits(vlm, batch) - plain).abs().max() > 1e-2


@every_version
def test_the_gate_learns_first_and_then_what_is_behind_it(version):
    vlm = model(version)
    batch = vlm.processor.collator()([TALK])
    behind = [p for name, p in vlm.named_parameters() if name.startswith("connectors.") or ".prompts" in name]
    gates = [each.gate for each in prompted(vlm).values()]

    def backward() -> None:
        for parameter in (*behind, *gates):
            parameter.requires_grad_(True).grad = None
        F.cross_entropy(logits(vlm, batch)[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten()).backward()

    backward()
    assert all(gate.grad.abs().min() > 0 for gate in gates)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in behind)
    with torch.no_grad():
        for gate in gates:
            gate -= 0.1 * gate.grad.sign()
    backward()
    assert all(parameter.grad.any() for parameter in behind)


@every_version
@torch.no_grad()
def test_gates_that_begin_open_are_the_same_newborn_with_its_gates_opened(version):
    batch = model(version).processor.collator()([TALK])
    shut, ajar = model(version), model(version, gate=0.5)
    assert not torch.allclose(logits(shut, batch), logits(ajar, batch))
    for each in prompted(shut).values():
        each.gate.fill_(0.5)
    assert torch.equal(logits(shut, batch), logits(ajar, batch))


# ---------------------------------------------------------------------------------------------- the formula


def by_hand(host, addition: Prompted, x, rotation, prompts_PD, joint: bool) -> torch.Tensor:
    """The paper's attention for one row, head by head, in plain products; `joint` takes one softmax over both."""
    heads, groups, width = host.q_proj.out_features // host.head_dim, host.num_key_value_groups, host.head_dim
    length = x.shape[1]
    split = lambda y: y.view(1, -1, y.shape[-1] // width, width).transpose(1, 2)  # noqa: E731
    q, k, v = (split(F.linear(x, linear.weight)) for linear in (host.q_proj, host.k_proj, host.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    kp, vp = (split(F.linear(prompts_PD[None], linear.weight)) for linear in (host.k_proj, host.v_proj))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outs = []
    for h in range(heads):
        text = (q[0, h] @ k[0, h // groups].T / math.sqrt(width)).masked_fill(future, -math.inf)
        prompt = q[0, h] @ kp[0, h // groups].T / math.sqrt(width)
        gate = addition.gate[h].tanh()
        if joint:
            both = torch.cat([prompt, text], 1).softmax(1)
            prompt, text = both[:, : len(prompts_PD)], both[:, len(prompts_PD) :]
        else:
            prompt, text = prompt.softmax(1), text.softmax(1)
        outs.append(gate * prompt @ vp[0, h // groups] + text @ v[0, h // groups])
    return F.linear(torch.cat(outs, 1), host.o_proj.weight)[None]


@torch.no_grad()
@pytest.mark.parametrize("pictures", [False, True], ids=["text", "picture"])
def test_attention_equals_two_softmaxes_by_hand_and_not_one(pictures):
    vlm = stir(model())
    host = sites.attention(sites.layers(vlm.llm).modules[2])
    addition = host.grafts["adapter"]
    batch = vlm.processor.collator()([TALK if pictures else MIX[1]])
    seen: list = []
    handle = host.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    output = vlm.run(batch)
    handle.remove()
    (given, found) = seen[0]
    start = int(batch.media["image"].at_N[0]) if pictures else 0
    prompts = addition.prompts
    if pictures:
        prompts = prompts + output.side.vision_BKQD[0, 0]
    x, rotation = given["hidden_states"], given["position_embeddings"]
    two, one = (by_hand(host, addition, x, rotation, prompts, joint) for joint in (False, True))
    torch.testing.assert_close(found[:, start:], two[:, start:], atol=2e-5, rtol=1e-4)
    assert (found[:, start:] - one[:, start:]).abs().max() > 1e-2
    if start:  # before the picture, the prompts know nothing of it
        plain = by_hand(host, addition, x, rotation, addition.prompts, False)
        torch.testing.assert_close(found[:, :start], plain[:, :start], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "opt", "mistral", "smollm3", "cohere2", "exaone4"])
def test_prompts_are_asked_by_the_queries_that_the_layer_itself_hands_to_its_kernel(family, monkeypatch):
    vlm, asked, own = model(family=family, lower=0), {}, {}

    def kernel(module, query, *args, **kwargs):
        own[module.layer_idx] = query * kwargs["scaling"]
        return sdpa_attention_forward(module, query, *args, **kwargs)

    def look(self, host, query, *args):
        asked[host.layer_idx] = query * host.scaling
        return looked(self, host, query, *args)

    looked = Prompted.look
    monkeypatch.setattr(Prompted, "look", look)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "isthmus", kernel)
    vlm.run(vlm.processor.collator()(MIX))
    assert asked.keys() == own.keys() == {0, 1, 2}
    for index, query in own.items():
        torch.testing.assert_close(asked[index], query, atol=1e-5, rtol=1e-5)


def test_on_text_with_equal_gates_it_is_pefts_adaption_prompt():
    """peft has one gate per layer and no tanh, and knows no pictures; the rest of V1 is the same, gradients too."""
    vlm, gate = stir(model(lower=1)), 0.4
    llm = parts.load_llm(LLMConfig(source=str(composed.llm_folder("llama"))), torch.float32)
    how = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=10, adapter_layers=2)
    theirs = peft.get_peft_model(llm, how)
    adapted = [layer.self_attn for layer in sites.layers(llm).modules[1:]]
    with torch.no_grad():
        for ours, other in zip(prompted(vlm).values(), adapted, strict=True):
            ours.gate.fill_(gate)
            other.adaption_prompt.copy_(ours.prompts)
            other.adaption_gate.fill_(math.tanh(gate))
    batch = vlm.processor.collator()([MIX[1]])
    found, expected = logits(vlm, batch), theirs(input_ids=batch.input_ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    for result in (found, expected):
        F.cross_entropy(result[0, :-1], batch.input_ids_BT[0, 1:]).backward()
    for ours, other in zip(prompted(vlm).values(), adapted, strict=True):
        torch.testing.assert_close(ours.prompts.grad, other.adaption_prompt.grad[0], atol=1e-6, rtol=1e-3)
        opened = ours.gate.grad.sum() / (1 - math.tanh(gate) ** 2)
        torch.testing.assert_close(opened, other.adaption_gate.grad[0], atol=1e-6, rtol=1e-3)


def test_a_token_reads_the_last_picture_before_it():
    aligner = model().aligner
    at = torch.tensor([[2, 5, -1]])
    position = torch.arange(7)[None]
    mask = aligner.media_mask(position, torch.ones_like(position), at)[0]
    assert mask.int().tolist() == [[0, 0, 0]] * 2 + [[1, 0, 0]] * 3 + [[0, 1, 0]] * 2


@torch.no_grad()
def test_early_fusion_is_silent_where_no_picture_has_appeared():
    vlm = stir(model("v2"))
    addition = next(each for name, each in prompted(vlm).items() if name.endswith(".early"))
    host = sites.attention(sites.layers(vlm.llm).modules[0])
    query, vision = torch.randn(1, 4, 3, host.head_dim), torch.randn(1, 1, 16, 32)
    allowed = torch.tensor([[[False], [True], [True]]])
    read = addition.look(host, query, vision, allowed)
    assert not read[0, 0].any() and read[0, 1:].abs().min() > 0
    side = Side(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))
    assert addition.offered(torch.randn(1, 3, 32), side) == (None, None)


# ---------------------------------------------------------------------------------------------- V2


@torch.no_grad()
@pytest.mark.parametrize("tune", ["scale", "inputs"])
def test_an_affine_linear_scales_what_comes_out_or_what_goes_in(tune):
    vlm = stir(model("v2", tune=tune))
    host = sites.layers(vlm.llm).modules[0].mlp.up_proj
    x, affine = torch.randn(2, 5, 32), host.grafts["affine"]
    linear = lambda x: x @ host.weight.T + affine.bias  # noqa: E731
    torch.testing.assert_close(host(x), affine.scale * linear(x) if tune == "scale" else linear(affine.scale * x))


@torch.no_grad()
def test_lora_inside_of_blocks_acts_outside_of_training_too():
    """As it does once it is folded into the weights, of which torch makes the same in one piece."""
    vlm = stir(model("v2-released", blocks=2))
    connector, batch = vlm.connectors["image"].eval(), vlm.processor.collator()([TALK])
    features = vlm.encode("image", batch.media["image"])
    born = connector(features, None)
    vlm.add_lora(["connectors.*.linear*"], LoRA(r=2), "sft")
    for name, parameter in vlm.named_parameters():
        if ".grafts.sft." in name:
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = connector(features, None)
    with torch.enable_grad():
        torch.testing.assert_close(found, connector(features, None))
    assert (found - born).abs().max() > 0.1
    assert len(vlm.merge_lora("sft")) == 4
    torch.testing.assert_close(found, connector(features, None), atol=1e-4, rtol=1e-4)
    fused = []
    for block in connector.blocks:
        fused.append(nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True).eval())
        fused[-1].load_state_dict(block.state_dict())
    connector.blocks = nn.ModuleList(fused)
    torch.testing.assert_close(found, connector(features, None), atol=1e-4, rtol=1e-4)


def test_no_layer_has_both_kinds_of_prompts():
    kinds = {name.split(".")[3]: name.rpartition(".")[2] for name in prompted(model("v2", lower=2))}
    assert kinds == {"0": "early", "1": "early", "2": "adapter"}


@pytest.mark.parametrize(("fusion", "lower"), [("added", 3), ("early", 3), ("early", 0)])
def test_layers_for_prompts_and_for_pictures_must_be_left(fusion, lower):
    with pytest.raises(ConfigError, match=f"lower={lower} of 3 layers"):
        model(fusion=fusion, lower=lower)


@pytest.mark.parametrize("turn", ["visual", "language"])
def test_pictures_and_instructions_move_different_parameters(turn):
    vlm = stir(model("v2"))
    step = Step(vlm, [ObjectiveConfig(name="lm")])
    train = dict.fromkeys({"visual": VISUAL, "language": LANGUAGE}[turn]["v2"], 0.01)
    trained = choose(step, Stage(name="one", data=("none",), train=train, budget=Budget(steps=1), lr=1e-2))
    before = {name: parameter.clone() for name, parameter in vlm.named_parameters()}
    batch = vlm.processor.collator()([TALK if turn == "visual" else MIX[1]])
    step.ready()
    total, _ = step(batch, step.scales([batch]))
    total.backward()
    adamw(trained, (0.9, 0.999)).step()
    moved = {name for name, parameter in vlm.named_parameters() if not torch.equal(parameter, before[name])}
    visual = {name for name in before if name.startswith("connectors.") or ".early." in name}
    norms = {name for name in before if "norm" in name and name.startswith("llm.")}
    language = norms | {name for name in before if ".adapter." in name or ".affine." in name}
    assert moved == (visual if turn == "visual" else language)
    silent = {name for name, parameter in vlm.named_parameters() if parameter.grad is None}
    assert silent >= (language if turn == "visual" else visual)


# ---------------------------------------------------------------------------------------------- published sizes


def test_published_v1_trains_1_23_million():
    plan = planning.plan(llama_adapter("published"))
    assert plan.stages[0].trained == plan.parts["llm grafts"] == 30 * 10 * 4096 + 30 * 32
    assert abs(plan.stages[0].trained / 1.23e6 - 1) < 0.01


def test_published_v2_counts_by_hand():
    paper = planning.plan(llama_adapter("published", "v2", rounds=2))
    assert [stage.name for stage in paper.stages] == ["visual-1", "language-1", "visual-2", "language-2"]
    affine = 32 * 2 * (4 * 4096 + 2 * 11008 + 4096)
    assert paper.stages[1].trained == affine + 65 * 4096 + 31 * (10 * 4096 + 32)
    assert paper.stages[0].trained == 32 + 1025 * 4096 + 2 * 4096
    released = planning.plan(llama_adapter("published", "v2-released"))
    block = 12 * 768**2 + 13 * 768
    connector = 10 * 768 + 1025 * 768 + 2 * 768 + 8 * block + 769 * 4096 + 2 * 4096
    assert released.parts["connectors.image"] == connector
    assert released.stages[1].trained == affine // 2 + 65 * 4096


def test_published_v2_chat_trains_the_papers_14_million():
    """Bias behind and scale before every Linear of LLaMA 65B, and norms: the released code's, and the last norm."""
    recipe = llama_adapter("published", "v2-chat")
    shape, wide, inner = recipe.llm.architecture, 8192, 22016
    two = recipe.but(llm=recipe.llm.but(architecture={**shape, "num_hidden_layers": 2}))
    layer = (5 * wide + 2 * inner) + (6 * wide + inner) + 2 * wide
    assert planning.plan(two).stages[0].trained == 2 * layer + wide
    assert shape["num_hidden_layers"] == 80 and round(80 * layer / 1e6) == 14


@pytest.mark.parametrize(
    ("version", "rates"),
    [("v1", [1.125e-3, 1.125e-3]), ("v2", [1.25e-5, 1.25e-4]), ("v2-released", [1.25e-5, 1.25e-4])],
)
def test_published_rates_are_the_scripts_base_rates_times_32_of_256(version, rates):
    assert [stage.lr for stage in llama_adapter("published", version).stages] == pytest.approx(rates)


def test_the_log_of_a_step_tells_how_far_gates_are_open_on_average():
    model = composed.model("llama", "llama_adapter", {"fusion": "early", "lower": 1})
    step = Step(model, [ObjectiveConfig(name="lm")])
    last = len(sites.layers(model.llm).modules) - 1
    assert step.figures() == {"gate_early_0": 0.0} | {f"gate_adapter_{index + 1}": 0.0 for index in range(last)}
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.gate"):
            with torch.no_grad():
                parameter.copy_(torch.tensor([0.5, -0.5]).repeat(len(parameter) // 2))
    assert step.figures()["gate_early_0"] == 0 and step.figures()["gate_adapter_1"] == pytest.approx(math.tanh(0.5))
