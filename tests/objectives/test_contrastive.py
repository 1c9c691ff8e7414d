"""The warm-up loss: CLIP's when all texts differ, a hand computation when some are the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from isthmus.objectives import named
from isthmus.objectives.contrastive import late
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Media, Output

D = 6


def batch(texts: list[list[int]]) -> Batch:
    """One row per text, with one image each; a prompt token before the text, padding behind."""
    width = max(map(len, texts)) + 2
    labels = torch.full((len(texts), width), IGNORE)
    segments = torch.zeros_like(labels)
    for row, text in enumerate(texts):
        labels[row, 1 : len(text) + 1] = torch.tensor(text)
        segments[row, : len(text) + 1] = 1
    rows = torch.arange(len(texts))
    media = {"image": Media(rows, torch.ones_like(rows), torch.zeros_like(rows))}
    return Batch(labels.clamp(min=0), segments, torch.zeros_like(labels), labels, media=media, ids=("a", "b"))


def output(n: int) -> Output:
    torch.manual_seed(1)
    connected = {"image": torch.randn(n, 3, D, requires_grad=True)}
    return Output(None, connected, nn.Identity(), nn.Embedding(20, D))


def cosines(out: Output, texts: list[list[int]]) -> torch.Tensor:
    """[media, texts], written out one pair at a time."""
    media = [tokens.mean(0) for tokens in out.connected["image"]]
    means = [out.embed(torch.tensor(text)).mean(0) for text in texts]
    centre = sum(means) / len(means)
    return torch.stack(
        [torch.stack([torch.cosine_similarity(m - centre, t - centre, dim=0) for t in means]) for m in media]
    )


def test_is_the_loss_of_clip_when_all_texts_differ() -> None:
    texts = [[3, 4], [5], [6, 7, 8], [4, 3, 9]]
    objective, data, out = named("contrastive", {}), batch(texts), output(4)
    expected = image_text_contrastive_loss(cosines(out, texts).T / 0.07)
    loss = objective.loss(None, out, data)
    assert objective.count(data) == 4
    assert (loss / 4).item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, out.connected["image"])
    (loss / 4).backward()
    torch.testing.assert_close(out.connected["image"].grad, gradient)


def test_late_looks_for_the_best_place_of_every_word() -> None:
    texts = [[3, 4], [5, 4], [6, 7, 8]]
    out = output(3)
    words = sorted({word for text in texts for word in text})
    centre = torch.stack([out.embed(torch.tensor(word)) for word in words]).mean(0)
    weight = {word: math.log(3 / sum(word in text for text in texts)) for word in words}
    assert weight[4] < weight[3]
    for places, row in zip(
        out.connected["image"], late(out.connected["image"], list(map(torch.tensor, texts)), out.embed)
    ):
        for text, found in zip(texts, row):
            best = [
                max(torch.cosine_similarity(p - centre, out.embed(torch.tensor(w)) - centre, dim=0) for p in places)
                for w in text
            ]
            shares = [weight[word] / sum(weight[other] for other in text) for word in text]
            expected = sum(share * each.item() for share, each in zip(shares, best))
            assert found.item() == pytest.approx(expected, abs=1e-5)


def test_late_finds_its_words_at_their_places_and_a_kept_temperature_stays() -> None:
    objective = named("contrastive", {"match": "late", "learned": False})
    assert not objective.sharpness.requires_grad
    texts, out = [[3, 4], [5, 6], [7, 8]], output(3)
    with torch.no_grad():
        for picture, text in enumerate(texts):  # each word stands at one of three places
            out.connected["image"][picture, :2] = out.embed(torch.tensor(text))
    right = objective.loss(None, out, batch(texts)).item()
    assert right < objective.loss(None, out, batch(texts[1:] + texts[:1])).item() / 2


def test_the_same_text_twice_is_no_negative() -> None:
    texts = [[3, 4], [5, 6], [3, 4]]
    out = output(3)
    logits = (cosines(out, texts) / 0.07).tolist()
    share = [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    total = 0.0
    for i in range(3):
        across = math.log(sum(math.exp(logits[i][j]) for j in range(3)))
        down = math.log(sum(math.exp(logits[j][i]) for j in range(3)))
        total += sum(share[i][j] * ((across - logits[i][j]) + (down - logits[j][i])) / 2 for j in range(3))
    assert named("contrastive", {}).loss(None, out, batch(texts)).item() == pytest.approx(total, rel=1e-5)


def test_texts_are_given_and_the_temperature_is_learned_up_to_a_bound() -> None:
    objective, out = named("contrastive", {}), output(3)
    objective.loss(None, out, batch([[3], [4], [5]])).backward()
    assert out.embed.weight.grad is None and out.connected["image"].grad.any()
    assert objective.sharpness.exp().item() == pytest.approx(1 / 0.07) and objective.sharpness.grad.abs() > 0
    losses = []
    for sharpness in (math.log(100.0), 9.0):
        nn.init.constant_(objective.sharpness, sharpness)
        losses.append(objective.loss(None, out, batch([[3], [4], [5]])).item())
    assert losses[0] == pytest.approx(losses[1])


def test_the_temperature_divides_the_cosines() -> None:
    texts, out = [[3, 4], [5], [6, 7, 8]], output(3)
    expected = image_text_contrastive_loss(cosines(out, texts).T / 0.2)
    loss = named("contrastive", {"temperature": 0.2}).loss(None, out, batch(texts))
    assert (loss / 3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_segments_of_one_row_have_their_own_texts() -> None:
    apart = batch([[3, 4], [5, 6]])
    packed = Batch(
        torch.tensor([[0, 3, 4, 0, 5, 6]]),
        torch.tensor([[1, 1, 1, 2, 2, 2]]),
        torch.zeros(1, 6),
        torch.tensor([[IGNORE, 3, 4, IGNORE, 5, 6]]),
        media={"image": Media(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, 3]))},
    )
    objective, out = named("contrastive", {}), output(2)
    assert objective.loss(None, out, packed).item() == pytest.approx(objective.loss(None, out, apart).item(), rel=1e-6)


def test_without_media_there_is_nothing_to_compare() -> None:
    objective, data = named("contrastive", {}), batch([[3]])
    data.media = {}
    loss = objective.loss(None, Output(None, {}, nn.Identity(), nn.Embedding(20, D)), data)
    assert objective.count(data) == 0 and loss.item() == 0 and loss.requires_grad


def test_refusals() -> None:
    mute = batch([[3], [4]])
    mute.labels_BT[0] = IGNORE
    with pytest.raises(DataError, match="no text to compare"):
        named("contrastive", {}).loss(None, output(2), mute)
    pair = batch([[3]])
    pair.decoder_ids_BU = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="decoder-only"):
        named("contrastive", {}).count(pair)
