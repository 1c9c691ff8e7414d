"""Our Linear equals PyTorch's own, forward and backward, and leaves alone what is not its business."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import composed
import tiny
from isthmus import exporting, kernels_linear, lora
from isthmus.config import LoRA


def gradients(linear: nn.Linear, x: torch.Tensor, above: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = linear(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *linear.parameters()], above)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 7), (2, 1, 4, 7)])
def test_product_and_gradients_equal_float64(bias, shape):
    torch.manual_seed(0)
    ours, exact = nn.Linear(7, 11, bias=bias), nn.Linear(7, 11, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    assert kernels_linear.use_onednn(nn.ModuleList([ours])) == 1
    x, above = torch.randn(*shape), torch.randn(*shape[:-1], 11)
    for found, wanted in zip(gradients(ours, x, above), gradients(exact, x.double(), above.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_strided_and_empty_inputs():
    ours = nn.Linear(6, 4)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(ours.state_dict())
    kernels_linear.use_onednn(nn.ModuleList([ours]))
    for x in (torch.randn(6, 5).t(), torch.randn(3, 9, 6)[:, ::2], torch.randn(1, 6).expand(4, 6), torch.randn(0, 6)):
        above = torch.randn(*x.shape[:-1], 4)
        for found, wanted in zip(gradients(ours, x, above), gradients(plain, x, above), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_keep_no_input():
    linear = nn.Linear(5, 5).requires_grad_(False)
    kernels_linear.use_onednn(nn.ModuleList([linear]))
    x = torch.randn(3, 5, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda it: it):
        out = linear(x)
    out.sum().backward()
    assert linear.weight.grad is None and x.shape not in kept
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 5))


def test_other_arithmetic_is_untouched():
    torch.manual_seed(0)
    ours, plain = nn.Linear(8, 8), nn.Linear(8, 8)
    plain.load_state_dict(ours.state_dict())
    kernels_linear.use_onednn(nn.ModuleList([ours]))
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), plain(x))
    assert torch.equal(ours.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))


def test_a_model_keeps_its_names_and_its_loss(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny.llm_folder(tmp_path)
    ours, plain = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    assert kernels_linear.use_onednn(ours) == sum(isinstance(each, nn.Linear) for each in plain.modules())
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for model in (ours, plain):
        model.requires_grad_(False)
        torch.manual_seed(0)
        lora.attach(model, "model.layers.*", LoRA(r=2))
        for name, parameter in model.named_parameters():
            if ".grafts." in name:
                parameter.requires_grad_(True)
                parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.1)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if ".grafts." in name:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256,), (1, 1, 256), (2, 1, 256), (3, 2, 256), (1, 7, 256)])
def test_few_rows_equal_float64(bias, shape, monkeypatch):
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    ours, exact = nn.Linear(256, 300, bias=bias), nn.Linear(256, 300, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    assert kernels_linear.use_in_inference(nn.ModuleList([ours])) == 1
    x = torch.randn(shape)
    with torch.no_grad():
        found = ours(x)
    torch.testing.assert_close(found.double(), exact(x.double()), rtol=1e-5, atol=1e-5)
    assert found.shape == (*shape[:-1], 300) and found.is_contiguous()


def test_few_rows_are_for_decoding_alone(monkeypatch):
    """Many rows, small weights and whatever may need a gradient have other products."""
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: True)
    taken = []
    product = kernels_linear.few_rows
    monkeypatch.setattr(kernels_linear, "few_rows", lambda x, *rest: taken.append(len(x)) or product(x, *rest))
    large, small = nn.Linear(256, 300), nn.Linear(8, 8)
    kernels_linear.use_in_inference(nn.ModuleList([large, small]))
    with torch.no_grad():
        for x in (torch.randn(4, 256), torch.randn(5, 256), torch.randn(0, 256)):
            large(x)
        small(torch.randn(2, 8))
    x = torch.randn(2, 256, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(large(x).sum(), x)[0], large.weight.sum(0).expand(2, 256))
    assert taken == [4]


def test_few_rows_under_lora_and_what_is_not_plain_float32(monkeypatch):
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(256, 300)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    kernels_linear.use_in_inference(models[0])
    for model in models:
        torch.manual_seed(1)
        lora.attach(model, "0", LoRA(r=2))
        next(p for name, p in model.named_parameters() if name.endswith("B")).data.normal_()
    x = torch.randn(2, 256)
    with torch.no_grad():
        torch.testing.assert_close(*(model(x) for model in models), rtol=1e-5, atol=1e-5)
        assert torch.jit.trace(models[0], x[:1], check_trace=False)(torch.randn(3, 256)).shape == (3, 300)
        assert lora.merge(models[0]) == ["0"] and type(models[0][0]) is kernels_linear.Linear
        assert type(Wrapped(models[0][0].weight).linear(x)) is Wrapped
        empty = nn.Linear(0, 300)
        kernels_linear.use_in_inference(nn.ModuleList([empty]))
        assert torch.equal(empty(torch.zeros(2, 0)), empty.bias.expand(2, 300))


class Wrapped(torch.Tensor):
    """A weight of another library: `F.linear` is all that it knows."""

    @staticmethod
    def __new__(cls, data):
        return data.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function, types, given=(), named=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm):
            raise NotImplementedError
        return super().__torch_function__(function, types, given, named or {})

    def linear(self, x):
        """What a Linear of ours makes of it."""
        module = kernels_linear.Linear(self.shape[1], self.shape[0], bias=False)
        module._parameters["weight"] = self
        return module(x)


def test_where_mkl_is_not_slow_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: False)
    linear = nn.Linear(4, 4)
    assert kernels_linear.use_in_inference(nn.ModuleList([linear])) == 0 and type(linear) is nn.Linear


@pytest.mark.parametrize("dora", [False, True])
def test_linears_that_carry_grafts_are_chosen_too(monkeypatch, dora):
    """Those of a model with LoRA: their class is another one, by which the graft is called."""
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    plain = composed.model("llama").llm.requires_grad_(False)
    linears = [path for path, each in plain.named_modules() if isinstance(each, nn.Linear)]
    kernels_linear.use_pytorch(plain)
    hosts = lora.attach(plain, "*layers*", LoRA(r=2, dora=dora))
    for name, parameter in plain.named_parameters():
        if ".grafts." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ours = copy.deepcopy(plain)
    assert kernels_linear.use_onednn(ours) == len(linears) > len(hosts) > 4
    assert all(type(ours.get_submodule(path)) is not type(plain.get_submodule(path)) for path in linears)
    used = []
    product = kernels_linear._linear
    monkeypatch.setattr(kernels_linear, "_linear", lambda *given: used.append(given) or product(*given))
    ids = torch.arange(6)[None]
    found = ours(input_ids=ids).logits
    assert len(used) == len(linears)
    torch.testing.assert_close(found, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert ours.state_dict().keys() == plain.state_dict().keys() and [*lora.hosts(ours)] == hosts

    kernels_linear.use_pytorch(ours)
    used.clear()
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits) and not used
    assert all(type(ours.get_submodule(path)) is type(plain.get_submodule(path)) for path in linears)
    assert sorted(lora.merge(ours)) == sorted(hosts)
    assert {type(ours.get_submodule(path)) for path in linears} == {nn.Linear}


def test_an_export_is_compared_in_pytorchs_own_arithmetic(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels_linear, "mkl_is_slow", lambda: True)
    source = tmp_path / "ours"
    composed.model("llama").save_pretrained(source)
    model = exporting.opened(source, tmp_path / "out")
    assert any(isinstance(each, nn.Linear) for each in model.modules())
    assert not any(isinstance(each, kernels_linear.Linear) for each in model.modules())
