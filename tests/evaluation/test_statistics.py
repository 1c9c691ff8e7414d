"""Intervals against hand calculations, the ordinary bootstrap, and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.evaluation.statistics import Estimate, accuracy, by_kind, difference, macro, mean, of_sums
from isthmus.types import DataError


def test_accuracy_is_the_share_of_right_items() -> None:
    estimate = accuracy([True, True, False, True], ["a", "a", "b", "c"])
    assert (estimate.value, estimate.lowest, estimate.highest) == (0.75, 0.75, 0.75)
    assert (estimate.n, estimate.clusters, estimate.unscored) == (4, 3, 0)


def test_two_clusters_give_the_three_outcomes_that_can_be_drawn() -> None:
    """Clusters {1, 1, 1} and {0}: a draw is all right (1/4), 3 of 4 (1/2), or all wrong (1/4)."""
    estimate = accuracy([True, True, True, False], ["a", "a", "a", "b"])
    assert (estimate.low, estimate.high) == (0.0, 1.0)
    one = accuracy([True, False] * 10, ["a"] * 20)  # a single cluster tells nothing of others
    assert (one.low, one.high) == (0.0, 1.0)


def test_what_was_seen_without_exception_is_not_certain() -> None:
    """Wilson's interval of n of n begins at n / (n + z²); clusters that agree count once each."""
    z = 1.959964**2
    assert accuracy([True] * 3, range(3)).low == pytest.approx(3 / (3 + z))
    assert accuracy([True] * 60, [n // 20 for n in range(60)]).low == pytest.approx(3 / (3 + z))
    assert accuracy([True] * 3, range(3)).high == 1
    better = difference([True] * 5, [False] * 5, range(5))  # Newcombe: 1 - 0, each with Wilson's interval
    assert better.low == pytest.approx(1 - np.hypot(z / (5 + z), z / (5 + z))) and better.high == 1
    kinds = macro([True] * 6, "aaabbb", range(6))
    assert kinds.low == pytest.approx(1 - np.hypot(z / (3 + z), z / (3 + z)) / 2)


@pytest.mark.parametrize(
    ("clusters", "each", "beta"),
    [(10, 1, (9, 1)), (50, 1, (49, 1)), (2, 20, (2, 2)), (3, 20, (2, 2)), (5, 20, (2, 2)), (20, 5, (18, 2))],
)
def test_intervals_cover_where_the_bootstrap_alone_did_not(clusters: int, each: int, beta: tuple[int, int]) -> None:
    """Of few items near the end, or of few clusters; the bootstrap alone covered 55 to 91 % here."""
    random, covered = np.random.default_rng(6), 0
    for trial in range(200):
        easy = random.beta(*beta, clusters)
        right = (random.random((clusters, each)) < easy[:, None]).ravel().tolist()
        found = accuracy(right, np.repeat(np.arange(clusters), each).tolist(), seed=trial, draws=200)
        covered += found.low <= beta[0] / sum(beta) <= found.high
    assert covered / 200 >= 0.93


def test_intervals_that_were_right_stay_as_they_are() -> None:
    right = [n % 2 == 0 for n in range(500)]
    found = accuracy(right, range(500), draws=20_000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 500), rel=0.05)


def test_singleton_clusters_are_the_ordinary_bootstrap() -> None:
    random = np.random.default_rng(1)
    right = (random.random(200) < 0.7).tolist()
    ours = accuracy(right, range(200), draws=20_000)
    plain = np.asarray(right)[random.integers(0, 200, (20_000, 200))].mean(1)
    low, high = np.percentile(plain, [2.5, 97.5])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.006)


def test_clusters_widen_the_interval_by_the_design_effect() -> None:
    """Clusters of ten equal items are ten times fewer observations: the interval is sqrt(10) wider."""
    random = np.random.default_rng(2)
    right = np.repeat(random.random(100) < 0.6, 10).tolist()
    clustered = accuracy(right, np.repeat(np.arange(100), 10).tolist(), draws=8000)
    alone = accuracy(right, range(1000), draws=8000)
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(10**0.5, rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        easy = random.beta(6, 4, 60)  # true mean 0.6; each cluster has its own difficulty
        right = (random.random((60, 4)) < easy[:, None]).ravel().tolist()
        estimate = accuracy(right, np.repeat(np.arange(60), 4).tolist(), seed=trial, draws=400)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_seed_decides() -> None:
    totals = np.random.default_rng(4).random(50).tolist()
    assert mean(totals, range(50), seed=5) == mean(totals, range(50), seed=5)
    assert mean(totals, range(50), seed=5).low != mean(totals, range(50), seed=6).low


def test_unscored_items_make_a_range_and_are_printed_beside_it() -> None:
    estimate = accuracy([True, True, False, None], "abcd")
    assert estimate.value == pytest.approx(2 / 3)
    assert (estimate.lowest, estimate.highest, estimate.unscored) == (0.5, 0.75, 1)
    worst, best = accuracy([True, True, False, False], "abcd"), accuracy([True, True, False, True], "abcd")
    assert (estimate.low, estimate.high) == (worst.low, best.high)
    assert str(estimate).startswith(".500–.750 [") and str(estimate).endswith("(1 of 4 not scored)")
    nothing = accuracy([None, None], "ab")
    assert np.isnan(nothing.value) and (nothing.lowest, nothing.highest) == (0.0, 1.0)


def test_difference_is_paired() -> None:
    """Same items wrong in both: they differ in 0 of 40 either way, although each accuracy alone has its spread."""
    ours = [n % 2 == 0 for n in range(40)]
    same = difference(ours, ours, range(40))
    rare = 1.959964**2 / (40 + 1.959964**2)
    assert same.value == 0 and (same.low, same.high) == (pytest.approx(-rare), pytest.approx(rare))
    theirs = [False] * 40
    better = difference(ours, theirs, range(40), seed=1)
    assert better.value == 0.5 and better.low > 0.3
    assert better.low == pytest.approx(accuracy(ours, range(40), seed=1).low, abs=0.03)


def test_difference_of_unscored_items_is_a_range() -> None:
    estimate = difference([True, None], [None, False], "ab")
    assert (estimate.lowest, estimate.highest, estimate.unscored) == (0.0, 1.0, 2)


def test_mean_weighs_items_by_their_tokens() -> None:
    estimate = mean([4.0, 3.0, 5.0], "aab", weights=[2, 1, 3])
    assert estimate.value == pytest.approx(12 / 6)
    # residuals of the clusters 7 - 2 * 3 and 5 - 2 * 3; variance 2 / 1 * (1 + 1) / 6²; t of one degree 12.706
    assert (estimate.low, estimate.high) == pytest.approx((2 - 12.7062 / 3, 2 + 12.7062 / 3), abs=1e-4)
    alike = mean([4.0, 2.0, 6.0], "abc", weights=[2, 1, 3])
    assert (alike.low, alike.high) == (2.0, 2.0)


def test_a_figure_of_sums_is_as_sure_as_the_mean_that_it_may_be() -> None:
    """A share written as a ratio of sums has the bootstrap's ends; the jackknife of a mean is Student's t."""
    right = [1.0] * 12 + [0.0] * 8
    clusters = [place // 2 for place in range(20)]
    shared = of_sums([(x, 1) for x in right], lambda sums: sums[0] / sums[1], clusters)
    level = mean(right, clusters)
    assert [shared.value, shared.low, shared.high] == pytest.approx([level.value, level.low, level.high], abs=1e-9)
    squared = of_sums([(x, 1) for x in right], lambda sums: (sums[0] / sums[1]) ** 2, clusters)
    assert squared.value == pytest.approx(0.36) and squared.low < 0.36 < squared.high
    assert level.through(lambda x: 10 * x).high == pytest.approx(10 * level.high)


def test_macro_weighs_kinds_equally() -> None:
    right, kinds = [True, True, True, False, True], ["open", "yesno", "yesno", "yesno", "yesno"]
    estimate = macro(right, kinds, range(5))
    assert estimate.value == pytest.approx((1 + 3 / 4) / 2)
    parts = by_kind(right, kinds, range(5))
    assert list(parts) == ["open", "yesno"] and parts["yesno"].value == 0.75
    assert macro(right, ["one"] * 5, range(5), seed=2).low == accuracy(right, range(5), seed=2).low


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(DataError, match="no item"):
        accuracy([], [])
    with pytest.raises(DataError, match="2 items have 1 labels"):
        accuracy([True, False], ["a"])
    with pytest.raises(DataError, match="paired"):
        difference([True], [True, False], ["a"])


def test_numbers_print_without_a_leading_zero() -> None:
    assert str(Estimate(0.875, 0.8, 0.9, 0.875, 0.875, 8, 8)) == ".875 [.800, .900]"
    assert str(Estimate(-0.02, -0.5, 1.25, -0.02, -0.02, 8, 8)) == "−.020 [−.500, 1.25]"
