"""What sets families of LLMs apart, against transformers' own eager attention, and what is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

import composed
import isthmus
import tiny
from isthmus import fuse, kernels, parts
from isthmus.config import LLMConfig, LoRA
from isthmus.types import ConfigError

WINDOW = 24
SEGMENTS = {
    "padded": [[0] * 5 + [1] * 45, [1] * 50],
    "packed": [[1] * 30 + [2] * 18 + [0] * 2, [1] * 12 + [2] * 38],
}


def eager(llm, embeds, mask, positions):
    """States by transformers' eager attention under a mask that was written out by hand, 0 or the lowest number."""
    llm.set_attn_implementation("eager")
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]
    windowed = mask & ((positions[:, :, None] - positions[:, None]) < WINDOW)
    near = torch.where(windowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    given = {"full_attention": added, "sliding_attention": near}
    if not hasattr(llm.config, "layer_types"):
        given = near if getattr(llm.config, "sliding_window", None) else added
    return llm.base_model(inputs_embeds=embeds, attention_mask=given, position_ids=positions).last_hidden_state


@pytest.mark.parametrize("family", tiny.MORE_DECODERS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_windows_and_caps_equal_eager_attention_forward_and_backward(family, segments):
    segment = torch.tensor(SEGMENTS[segments])
    llm = tiny.llm(family)
    llm.set_attn_implementation(kernels.NAME)
    x = torch.randn(2, 50, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    positions = fuse.positions(segment)
    mask = fuse.masks(llm.config, x, segment, None, None)
    found = llm.base_model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    expected = eager(llm, x, (segment[:, :, None] == segment[:, None]) & causal, positions)
    real = segment > 0
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(states[real].square().sum(), x)[0][real] for states in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", [40, 60])
def test_capped_scores_by_hand_shorter_and_longer_than_products_are_used_for(rows):
    query, key, value = (torch.randn(1, heads, rows, 8, dtype=torch.float64) * 3 for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = kernels.attention(module, query, key, value, None, scaling=0.4, softcap=1.5)
    scores = 1.5 * torch.tanh(0.4 * query @ key.repeat_interleave(2, 1).mT / 1.5)
    scores = scores.masked_fill(~torch.ones(rows, rows).tril().bool(), -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_a_window_counts_positions_within_a_branch(family):
    """Two branches behind a shared beginning, each as if it alone followed it; columns are further away."""
    llm = tiny.llm(family)
    llm.set_attn_implementation(kernels.NAME)
    x = torch.randn(1, 60, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    branch = torch.tensor([[0] * 20 + [1] * 20 + [2] * 20])
    segment = torch.ones_like(branch)
    positions = fuse.positions(segment, branch)
    mask = fuse.masks(llm.config, x, segment, None, None, branch_BS=branch)
    found = llm.base_model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
    for start in (20, 40):
        alone = torch.cat([x[:, :20], x[:, start : start + 20]], 1)
        expected = llm.base_model(inputs_embeds=alone).last_hidden_state
        torch.testing.assert_close(found[:, start : start + 20], expected[:, 20:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family, ends", [("gemma2", ["<eos>", "<end_of_turn>"]), ("phi3", ["<|endoftext|>", "<|end|>"])]
)
def test_an_answer_stops_where_the_familys_template_ends_a_turn(family, ends, tmp_path):
    model = composed.model(family)
    model.save_pretrained(tmp_path)
    for each in (model, isthmus.load(tmp_path)):
        stops = each.generation_config.eos_token_id
        assert each.processor.tokenizer.convert_ids_to_tokens(stops) == ends
    model = composed.model("llama")
    assert model.generation_config.eos_token_id == tiny.EOS, "its template ends turns with the end token"


def test_a_system_turn_that_the_template_refuses_is_refused_when_composing():
    asked = composed.recipe("gemma2").model_copy(update={"system": "Be brief."})
    with pytest.raises(ConfigError, match="System role not supported"):
        isthmus.compose(asked)


@torch.no_grad()
@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_flan_t5_in_half_precision_runs_with_what_transformers_keeps_in_float32(dtype, kept):
    """In float16 real checkpoints overflow in the feed-forward's output, which stays float32; LoRA goes there too."""
    model = isthmus.compose(composed.recipe("flan-t5"), dtype)
    assert model.llm.decoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == kept
    assert len(model.add_lora(["llm.*.wo", "llm.*.wi_0"], LoRA(r=2), "sft")) == 10
    with torch.autocast("cpu", dtype):
        found = model.run(model.processor.collator()(composed.MIX)).hidden_BTD.float()
    expected = composed.model("flan-t5").run(model.processor.collator()(composed.MIX)).hidden_BTD
    assert (found - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    "source, attention, cause, remedy",
    [
        ("gemma2", "sdpa", "gemma2 caps its attention scores, which sdpa cannot", "set llm.attention to isthmus"),
        ("gemma3", "isthmus", "gemma3 is a multimodal model", "choose the text-only checkpoint"),
        ("clip_vision_model", "isthmus", "clip_vision_model is not a language model", "choose a decoder-only"),
    ],
)
def test_what_cannot_be_an_llm_is_refused_with_the_reason(tmp_path, source, attention, cause, remedy):
    AutoConfig.for_model(source).save_pretrained(tmp_path)  # refused before a weight is read
    with pytest.raises(ConfigError, match=cause) as refused:
        parts.load_llm(LLMConfig(source=str(tmp_path), attention=attention), torch.float32)
    assert refused.value.remedy.startswith(remedy)
