"""The measures of the gap on cases whose answer is known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from isthmus.evaluation.gap.measures import (
    attention_mass,
    linear_cka,
    logit_lens,
    modality_gap,
    mutual_knn,
    nearest_words,
    ranks,
)
from isthmus.types import DataError


def noise(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(noise(width, width, seed)).Q


def test_identical_sets_have_no_gap():
    x = noise(20, 6, 0)
    found = modality_gap(x, x)
    assert found.gap == pytest.approx(0, abs=1e-12) and found.cosine == pytest.approx(1)
    assert found.spread_x == found.spread_y > 0
    assert linear_cka(x, x) == pytest.approx(1) and linear_cka(x, x, unbiased=False) == pytest.approx(1)
    assert mutual_knn(x, x, 5) == 1


def test_the_distance_between_known_centroids():
    e = torch.eye(3)
    apart = modality_gap(7 * e[[0, 0]], 2 * e[[1, 1, 1]])  # lengths and numbers do not matter
    assert apart.gap == pytest.approx(math.sqrt(2)) and apart.cosine == pytest.approx(0)
    assert apart.spread_x == apart.spread_y == pytest.approx(0)
    assert modality_gap(e[[0]], -e[[0]]).gap == pytest.approx(2)
    spread = modality_gap(e[[0, 1]], e[[2]])  # centroid (1/2, 1/2, 0): length sqrt(1/2), spread sqrt(1 - 1/2)
    assert spread.spread_x == pytest.approx(math.sqrt(0.5)) and spread.gap == pytest.approx(math.sqrt(1.5))


def test_likeness_does_not_change_with_rotation_scale_or_width():
    x = noise(24, 8, 0)
    turned = 3.7 * x @ rotation(8)
    wider = torch.cat([turned, torch.zeros(24, 5)], 1)
    for y in (turned, wider):
        assert linear_cka(x, y) == pytest.approx(1) and linear_cka(x, y, unbiased=False) == pytest.approx(1)
        assert mutual_knn(x, y, 4) == 1
    assert linear_cka(x, x + 100) == pytest.approx(1)  # centred
    assert linear_cka(x, x.roll(1, 0)) < 0.5 and mutual_knn(x, x.roll(1, 0), 4) < 0.5  # pairs matter


def test_cka_is_the_ratio_of_covariances():
    x, y = noise(30, 4, 0), noise(30, 7, 1)
    y[:, :4] += x
    a, b = x - x.mean(0), y - y.mean(0)
    by_hand = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y, unbiased=False) == pytest.approx(by_hand.item())


def test_independent_noise():
    n, d, e = 60, 200, 90
    draws = [(noise(n, d, 2 * seed), noise(n, e, 2 * seed + 1)) for seed in range(6)]
    # E tr(KL) = DE(N - 1) and E tr(KK) = D(N - 1)(N - 1 + D + 1) for centred Gaussian kernels (Wishart)
    expected = math.sqrt(d * e / ((n + d) * (n + e)))
    biased = [linear_cka(x, y, unbiased=False) for x, y in draws]
    assert sum(biased) / 6 == pytest.approx(expected, rel=0.03) and expected > 0.6
    unbiased = [linear_cka(x, y) for x, y in draws]
    assert abs(sum(unbiased) / 6) < 0.03 and max(map(abs, unbiased)) < 0.1
    shared = [mutual_knn(x, y, 5) for x, y in draws]
    assert sum(shared) / 6 == pytest.approx(5 / 59, abs=0.03)


def test_neighbours_by_hand():
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1])  # two pairs of neighbours on a circle
    x = torch.stack([angles.cos(), angles.sin()], 1)
    assert mutual_knn(x, x[[1, 0, 3, 2]], 1) == 1
    assert mutual_knn(x, x[[0, 2, 1, 3]], 1) == 0  # in y, 0 is beside 2 and 1 beside 3


def test_a_planted_word_is_what_the_lens_says():
    words_VD = noise(50, 16, 0)
    states = torch.stack([4 * words_VD[7], 4 * words_VD[31]])
    scores = logit_lens(states, lambda h: h / h.norm(dim=-1, keepdim=True), lambda h: h @ words_VD.T)
    assert scores.argmax(-1).tolist() == [7, 31]
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2))
    by_hand = torch.log_softmax(words_VD @ words_VD[7] / words_VD[7].norm(), 0)
    torch.testing.assert_close(scores[0], by_hand.float())


def test_the_nearest_word_is_the_one_planted():
    words_VD = noise(50, 16, 0) + 5  # far from 0: without the centre all would be alike
    found = nearest_words(
        torch.stack([words_VD[7], words_VD.mean(0) + 9 * (words_VD[31] - words_VD.mean(0))]), words_VD
    )
    assert found.argmax(-1).tolist() == [7, 31] and found.amax(-1).tolist() == pytest.approx([1, 1])


def test_ranks_count_what_is_before():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.1, 0.1, 0.3]])
    assert ranks(scores, torch.tensor([2])).tolist() == [3, 3]
    assert ranks(scores, torch.tensor([0, 3])).tolist() == [2, 1]  # the best of several


def test_attention_mass_by_hand():
    weights = torch.tensor([[[1.0, 0, 0], [0.25, 0.75, 0], [0.2, 0.3, 0.5]]]).expand(2, 1, 3, 3)
    to = torch.tensor([[True, True, False], [False, True, False]])
    found = attention_mass(weights, torch.tensor([2, 1]), to)
    torch.testing.assert_close(found, torch.tensor([[0.5], [0.75]]))


def test_sets_that_cannot_be_paired_are_refused():
    with pytest.raises(DataError, match="one to one"):
        linear_cka(noise(5, 3, 0), noise(6, 3, 1))
    with pytest.raises(DataError, match="one to one"):
        mutual_knn(one_hot(torch.arange(3)), one_hot(torch.arange(3)), 3)
