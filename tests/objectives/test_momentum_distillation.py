"""Soft targets and the queue by hand on tiny tensors; contrast as CLIP has it, against transformers' CLIP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from transformers import CLIPConfig, CLIPModel

from isthmus.connectors.qformer import Heads, Shape
from isthmus.objectives import named
from isthmus.objectives._momentum import Distilled, Queue, keys
from isthmus.training.momentum import Momentum
from isthmus.types import IGNORE, Batch, Features, Media, Output

N, Q, W = 3, 2, 4
IDS = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2]])


class Former(nn.Module):
    """Stands for a Q-Former: its states are given; the heads are real, but leave states as they are."""

    def __init__(self, q_NQW: Tensor, t_NW: Tensor, temperature: float = 0.07):
        super().__init__()
        width = q_NQW.shape[-1]
        self.q_NQW, self.t_NW = nn.Parameter(q_NQW.clone()), nn.Parameter(t_NW.clone())
        self.queries = torch.zeros(q_NQW.shape[1], width)
        self.heads = Heads(Shape(width=width, heads=1, vocabulary=9, contrast=width))
        for head in (self.heads.picture, self.heads.text):
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.heads.temperature, temperature)

    def see(self, features: Features) -> list[Tensor]:
        return [self.q_NQW]

    def read(self, ids_NT: Tensor) -> Tensor:
        return self.t_NW[:, None]


def world(former: Former, slow: Former | None = None, updates: int = 0) -> Any:
    """What an objective asks of a step."""
    reading = SimpleNamespace(of="answer")
    vlm = SimpleNamespace(
        connectors={"image": former},
        encode=lambda kind, media: Features(torch.zeros(N, 1, 1)),
        aligner=SimpleNamespace(reading=lambda: reading),
    )
    copy = SimpleNamespace(connectors={"image": slow}, updates=torch.tensor(updates))
    return SimpleNamespace(vlm=vlm, companions={"momentum": copy})


def batch(ids: Tensor = IDS) -> Batch:
    rows = torch.arange(len(ids))
    media = {"image": Media(rows, torch.ones_like(rows), torch.zeros_like(rows))}
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), media=media, extra_text={"image": ids})


def nothing() -> Output:
    """The output of a forward of which terms ask everything themselves."""
    return Output(None, {}, None, None)  # type: ignore[arg-type]


def states(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, Q, W, generator=generator), torch.randn(N, W, generator=generator)


def likeness(q_NQW: Tensor, t_MW: Tensor) -> list[list[float]]:
    """Best cosine of a picture's queries with each text, over 0.07, one pair at a time."""
    return [[max(float(torch.cosine_similarity(q, t, dim=0)) for q in one) / 0.07 for t in t_MW] for one in q_NQW]


def by_hand(pairs: list[tuple[list[float], list[float], int]], alpha: float) -> float:
    """Mean of both directions over rows of (logits, the copy's logits, the right place)."""
    total = 0.0
    for logits, slow, right in pairs:
        target = torch.tensor(slow).softmax(0) * alpha
        target[right] += 1 - alpha
        total += float(-(target * torch.tensor(logits).log_softmax(0)).sum()) / 2
    return total


def test_soft_targets_and_queue_are_albefs_formula() -> None:
    (q, t), (slow_q, slow_t), (old_q, old_t) = states(0), states(1), states(2)
    itc = named("itc", {"alpha": 0.4, "ramp": 10, "queue": 2, "smoothing": 0.0})
    step = world(Former(q, t), Former(slow_q, slow_t), updates=5)
    itc.begin(step)
    itc.queues["image"].push(F.normalize(old_q, dim=-1)[:2], F.normalize(old_t, dim=-1)[:2], torch.tensor([91, 92]))
    loss = itc.loss(step, nothing(), batch())
    all_q, all_t = torch.cat([slow_q, old_q[:2]]), torch.cat([slow_t, old_t[:2]])
    to_text, soft_text = likeness(q, all_t), likeness(slow_q, all_t)
    to_picture, soft_picture = list(zip(*likeness(all_q, t))), list(zip(*likeness(all_q, slow_t)))
    rows = [(to_text[n], soft_text[n], n) for n in range(N)]
    rows += [(list(to_picture[n]), list(soft_picture[n]), n) for n in range(N)]
    assert loss.item() == pytest.approx(by_hand(rows, alpha=0.2), rel=1e-4)  # half way up the ramp


def test_at_no_weight_and_a_copy_that_is_equal_it_is_plain_contrast() -> None:
    q, t = states(0)
    plain = named("itc", {}).loss(world(Former(q, t)), nothing(), batch())
    itc = named("itc", {"alpha": 0.4, "ramp": 10})
    found = itc.loss(world(Former(q, t), Former(q, t)), nothing(), batch())
    torch.testing.assert_close(found, plain)
    assert named("itc", {"alpha": 0.0}).momentum is None and named("mlm", {}).momentum is None


def test_in_validation_contrast_is_plain_whatever_copy_and_queue_hold() -> None:
    former, slow = Former(*states(0)), Former(*states(1))
    itc = named("itc", {"alpha": 0.4, "queue": 4})
    step = world(former, slow)
    itc.begin(step)
    itc.queues["image"].push(*[torch.randn(2, Q, W), torch.randn(2, W), torch.tensor([91, 92])])
    plain = named("itc", {}).loss(world(former), nothing(), batch())
    assert (itc.loss(step, nothing(), batch()) - plain).abs() > 0.01
    torch.testing.assert_close(itc.eval().loss(step, nothing(), batch()), plain)


def test_no_gradient_reaches_what_the_copy_says() -> None:
    former, slow = Former(*states(0)), Former(*states(1))
    itc = named("itc", {"alpha": 0.4, "queue": 4})
    itc.begin(world(former, slow))
    itc.loss(world(former, slow), nothing(), batch()).backward()
    assert former.q_NQW.grad.any() and former.t_NW.grad.any() and former.heads.temperature.grad.any()
    assert all(p.grad is None for p in slow.parameters())


def test_equal_texts_in_the_queue_are_positives() -> None:
    (q, t), former = states(0), Former(*states(0))
    itc = named("itc", {"alpha": 0.0, "queue": 2, "smoothing": 0.0})
    step = world(former, Former(q, t))
    itc.begin(step)
    z, w = F.normalize(q, dim=-1), F.normalize(t, dim=-1)
    itc.queues["image"].push(z[:1], w[:1], keys(IDS[:1]))
    all_t, all_q = torch.cat([t, t[:1]]), torch.cat([q, q[:1]])
    target = torch.tensor([[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0]])
    sides = torch.tensor(likeness(q, all_t)), torch.tensor(likeness(all_q, t)).T
    expected = -sum((target * side.log_softmax(1)).sum() for side in sides) / 2
    torch.testing.assert_close(itc.loss(step, nothing(), batch()), expected, atol=1e-4, rtol=1e-4)


def test_the_queue_keeps_the_last_ones_and_wraps_around() -> None:
    queue = Queue(5, queries=1, width=1, device=torch.device("cpu"))

    def push(*numbers: int) -> list[int]:
        new = torch.tensor(numbers)
        queue.push(new.view(-1, 1, 1).float(), -new.view(-1, 1).float(), new)
        picture, text, key = queue.held()
        assert picture.flatten().tolist() == (-text).flatten().tolist() == key.tolist()
        return key.tolist()

    assert queue.held()[2].tolist() == []
    assert push(1, 2, 3) == [1, 2, 3]
    assert push(4, 5, 6) == [6, 2, 3, 4, 5]
    assert push(7, 8, 9) == [6, 7, 8, 9, 5]
    assert sorted(push(*range(10, 18))) == [13, 14, 15, 16, 17]
    assert sorted(push(18)) == [14, 15, 16, 17, 18]
    assert queue.pushed == 18


def test_what_the_copy_saw_enters_the_queue_after_the_step() -> None:
    slow = Former(*states(1))
    itc = named("itc", {"queue": 8})
    step = world(Former(*states(0)), slow)
    itc.begin(step)
    for _ in range(2):
        itc.loss(step, nothing(), batch())
    assert itc.queues["image"].pushed == 0
    itc.after_step(step)
    picture, text, key = itc.queues["image"].held()
    torch.testing.assert_close(picture, F.normalize(slow.q_NQW, dim=-1))
    torch.testing.assert_close(text, F.normalize(slow.t_NW, dim=-1))
    assert torch.equal(key, keys(IDS))
    itc.after_step(step)
    assert itc.queues["image"].pushed == N


def test_keys_tell_texts_apart_by_words_and_order_and_not_by_padding() -> None:
    padded = torch.tensor([[1, 5, 2, -1, -1], [1, 5, 2, 0, -1], [5, 1, 2, -1, -1], [1, 5, 3, -1, -1]])
    found = keys(padded).tolist()
    assert found[0] == keys(IDS[:1]).item() and len(set(found)) == 4
    assert len(keys(torch.cartesian_prod(*[torch.arange(20)] * 3)).unique()) == 8000


def test_the_weight_rises_and_stays() -> None:
    options = Distilled(alpha=0.4, ramp=4)
    assert [round(float(options.weight(torch.tensor(n))), 6) for n in (0, 1, 4, 9)] == [0.0, 0.1, 0.4, 0.4]
    assert float(Distilled(alpha=0.4).weight(torch.tensor(0))) == pytest.approx(0.4)


def test_the_copy_is_the_mean_that_pytorch_computes() -> None:
    torch.manual_seed(0)
    fast = nn.ModuleDict({"image": nn.Linear(3, 3)})
    slow = Momentum(fast, 0.995)
    mean = AveragedModel(fast, avg_fn=get_ema_avg_fn(0.995))
    mean.n_averaged += 1  # it copies the first one, which both are already
    for _ in range(5):
        with torch.no_grad():
            for parameter in fast.parameters():
                parameter.add_(torch.randn_like(parameter))
        slow.follow(fast)
        mean.update_parameters(fast)
    for found, expected in zip(slow.connectors.parameters(), mean.module.parameters()):
        torch.testing.assert_close(found, expected)
    assert slow.updates == 5 and not any(p.requires_grad for p in slow.parameters())


# ---------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, dict[str, Tensor]]:
    """A tiny CLIP, and four pictures with four texts."""
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**common, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39},
        vision_config={**common, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    ids = torch.randint(3, 38, (4, 6))
    ids[:, -1] = 39
    return model, {"input_ids": ids, "pixel_values": torch.randn(4, 3, 16, 16)}


def test_contrast_of_one_vector_each_is_the_loss_of_transformers_clip(clip: Any) -> None:
    model, inputs = clip
    theirs = model(**inputs, return_loss=True)
    theirs.loss.backward()
    temperature = 1 / model.logit_scale.exp().item()
    former = Former(theirs.image_embeds.detach()[:, None], theirs.text_embeds.detach(), temperature)
    loss = named("itc", {"smoothing": 0.0}).loss(world(former), nothing(), batch(inputs["input_ids"]))
    torch.testing.assert_close(loss / 4, theirs.loss.detach(), atol=1e-6, rtol=1e-5)
    loss.backward()  # t = exp(-s)
    slope = -former.heads.temperature.grad / 4 * temperature
    torch.testing.assert_close(slope, model.logit_scale.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_warm_objective_is_the_loss_of_transformers_clip_where_texts_have_no_centre(clip: Any) -> None:
    model, inputs = clip
    pooled = model.text_model(input_ids=inputs["input_ids"]).pooler_output
    mean = F.normalize(pooled.mean(0), dim=0)
    before = model.text_projection.weight.clone()
    model.text_projection.weight -= (before @ mean)[:, None] * mean  # what all texts share is projected to nothing
    theirs = model(**inputs, return_loss=True)
    words = nn.Embedding.from_pretrained(model.text_projection(pooled))
    pictures = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
    model.text_projection.weight.copy_(before)
    labels = torch.tensor([[IGNORE, n] for n in range(4)])
    rows = torch.arange(4)
    data = Batch(
        labels.clamp(min=0),
        torch.ones_like(labels),
        torch.zeros_like(labels),
        labels,
        media={"image": Media(rows, torch.ones_like(rows), torch.zeros_like(rows))},
    )
    objective = named("contrastive", {})
    objective.sharpness.copy_(model.logit_scale)
    loss = objective.loss(None, Output(None, {"image": pictures[:, None]}, nn.Identity(), words), data)
    torch.testing.assert_close(loss / 4, theirs.loss, atol=1e-5, rtol=1e-4)


def test_a_temperature_that_leaves_its_range_is_put_back_and_has_a_gradient() -> None:
    former = Former(*states(0), temperature=0.004)
    itc = named("itc", {"temperature": (0.01, 0.5)})
    itc.after_step(world(former))
    assert former.heads.temperature.item() == pytest.approx(0.01)
    itc.loss(world(former), nothing(), batch()).backward()
    assert former.heads.temperature.grad.abs() > 0
    nn.init.constant_(former.heads.temperature, 2.0)
    itc.after_step(world(former))
    assert former.heads.temperature.item() == 0.5
