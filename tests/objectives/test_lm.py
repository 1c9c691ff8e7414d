"""Next-token loss: equal to cross-entropy over all logits, in value and gradient, without ever holding them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isthmus.objectives import named
from isthmus.objectives.lm import cross_entropy, supervised
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Output

D, V = 16, 50


def batch(labels: list[list[int]], segments: list[list[int]] | None = None) -> Batch:
    labels_BT = torch.tensor(labels)
    segment_BT = torch.ones_like(labels_BT) if segments is None else torch.tensor(segments)
    return Batch(labels_BT.clamp(min=0), segment_BT, torch.zeros_like(labels_BT), labels_BT)


def head(dtype: torch.dtype, trains: bool, softcap: float | None = None) -> tuple[nn.Linear, object]:
    linear = nn.Linear(D, V, dtype=dtype).requires_grad_(trains)

    def call(states: Tensor) -> Tensor:
        logits = 3 * linear(states)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    return linear, call


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_equals_cross_entropy_of_all_logits(rows: int, trains: bool, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    linear, call = head(dtype, trains, softcap=5.0)
    hidden = torch.randn(2, 9, D).to(dtype).requires_grad_()
    labels = torch.randint(V, (2, 9)).masked_fill(torch.rand(2, 9) < 0.4, IGNORE)
    data = batch(labels.tolist())

    expected = F.cross_entropy(call(hidden[:, :-1]).float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (expected * 0.37).backward()
    gradients = [hidden.grad.clone(), linear.weight.grad, linear.bias.grad]
    hidden.grad = linear.weight.grad = linear.bias.grad = None

    objective = named("lm", {"rows": rows})
    loss = objective.loss(None, Output(hidden, {}, call, nn.Identity()), data)
    (loss * 0.37).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert objective.count(data) == int((labels[:, 1:] != IGNORE).sum())
    for new, old in zip([hidden.grad, linear.weight.grad, linear.bias.grad], gradients):
        assert (new is None) == (old is None)
        if old is not None:
            torch.testing.assert_close(new, old, rtol=close, atol=close)


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    ids, target = torch.randint(V, (7,)), torch.randint(V, (7,))
    F.cross_entropy(F.linear(embedding(ids), embedding.weight), target, reduction="sum").backward()
    expected = embedding.weight.grad.clone()
    embedding.weight.grad = None
    cross_entropy(embedding(ids), target, lambda h: F.linear(h, embedding.weight), rows=2).backward()
    torch.testing.assert_close(embedding.weight.grad, expected)


@pytest.mark.parametrize("trains", [False, True])
def test_only_one_block_of_logits_at_a_time_and_nothing_twice_for_a_frozen_head(trains: bool) -> None:
    linear, _ = head(torch.float32, trains)
    seen: list[int] = []

    def call(states: Tensor) -> Tensor:
        seen.append(len(states))
        return linear(states)

    hidden = torch.randn(10, D, requires_grad=True)
    cross_entropy(hidden, torch.randint(V, (10,)), call, rows=4).backward()
    probe, blocks = seen[0], seen[1:]
    assert probe == 1
    assert sorted(blocks) == sorted([4, 4, 2] * (2 if trains else 1))  # a trained head is computed again in backward


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, in elements, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_all_logits_are_never_held(trains: bool) -> None:
    rows_at_once, vocabulary, length = 8, 1000, 200
    linear = nn.Linear(D, vocabulary, bias=False).requires_grad_(trains)
    hidden = torch.randn(2, length, D, requires_grad=True)
    data = batch(torch.randint(V, (2, length)).tolist())
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    objective = named("lm", {"rows": rows_at_once})
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective.loss(None, Output(hidden, {}, linear, nn.Identity()), data).backward()
    weight = D * vocabulary  # its gradient, where it trains
    assert seen.elements <= max(rows_at_once * vocabulary, weight) < 2 * length * vocabulary / 20
    assert max(saved) <= weight
    with Largest() as plain:
        F.cross_entropy(linear(hidden).flatten(0, 1), data.labels_BT.flatten()).backward()
    assert plain.elements == 2 * length * vocabulary  # what the measure shows of the usual way


def test_nothing_to_predict_is_zero_with_a_whole_graph() -> None:
    hidden = torch.full((2, 4, D), 1e38, requires_grad=True)
    data = batch([[IGNORE] * 4, [IGNORE] * 4])
    objective = named("lm", {})
    loss = objective.loss(None, Output(hidden, {}, nn.Linear(D, V), nn.Identity()), data)
    loss.backward()
    assert objective.count(data) == 0 and loss.item() == 0 and not hidden.grad.any()


def test_without_gradient_the_value_is_the_same() -> None:
    _, call = head(torch.float32, False)
    hidden, target = torch.randn(5, D, requires_grad=True), torch.randint(V, (5,))
    with torch.no_grad():
        value = cross_entropy(hidden, target, call, rows=2)
    assert not value.requires_grad
    assert value.item() == pytest.approx(cross_entropy(hidden, target, call, rows=2).item(), rel=1e-6)


def test_a_segment_never_predicts_the_next() -> None:
    data = batch([[IGNORE, 5, 6, 7, 8, IGNORE]], [[1, 1, 1, 2, 2, 0]])
    assert supervised(data).tolist() == [[True, True, False, True, False]]


def test_the_decoder_of_an_encoder_decoder_has_a_length_of_its_own() -> None:
    data = Batch(torch.ones(1, 9), torch.ones(1, 9), torch.zeros(1, 9), torch.tensor([[IGNORE, 4, 2]]))
    data.decoder_ids_BU = torch.tensor([[0, 4, 2]])
    assert supervised(data).tolist() == [[True, True]]


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="no objective named 'ln'; did you mean 'lm'"):
        named("ln", {})
    with pytest.raises(ConfigError, match="objective lm: unknown key 'row'; did you mean 'rows'"):
        named("lm", {"row": 3})
    with pytest.raises(DataError, match="no labels"):
        supervised(Batch(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3)))


def test_what_options_there_are_is_said_where_one_is_unknown() -> None:
    """The schema of recipes does not have them."""
    with pytest.raises(ConfigError) as told:
        named("lm", {"rwos": 1})
    assert told.value.remedy.startswith("options are ") and "rows" in told.value.remedy
