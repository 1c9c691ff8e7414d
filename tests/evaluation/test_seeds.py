"""Verdicts over seeds: Student's t against its table, Holm by hand, and what may and may not lead to a verdict."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.evaluation import seeds
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.seeds import Outcomes, adjust, gap, holm, interval, level, p_value, verdict
from isthmus.evaluation.statistics import accuracy, critical, student
from isthmus.types import DataError


def run(right: list[bool], clusters: list[str] | None = None, prefix: str = "") -> Outcomes:
    ids = tuple(f"{prefix}{number}" for number in range(len(right)))
    return Outcomes(ids, tuple(map(float, right)), (1.0,) * len(right), tuple(clusters or ids))


def runs(*rates: float, items: int = 400) -> list[Outcomes]:
    """A run per rate, each right in that share of the same items."""
    return [run([number < round(rate * items) for number in range(items)]) for rate in rates]


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)
def test_t_is_that_of_the_table(freedom: int, t: float) -> None:
    assert critical(freedom) == pytest.approx(t, abs=2e-4)
    assert student(t, freedom) == pytest.approx(0.95, abs=1e-6)


def test_t_of_one_and_two_degrees_is_known_in_closed_form() -> None:
    for t in (0.1, 1.0, 7.0):
        assert student(t, 1) == pytest.approx(2 / np.pi * np.arctan(t))
        assert student(t, 2) == pytest.approx(t / np.sqrt(2 + t * t))


def test_interval_and_p_by_hand() -> None:
    """Mean 0.5, deviation 0.1, error 0.1 / sqrt(3); t = 0.5 / 0.057735 = 8.66."""
    low, high = interval([0.4, 0.5, 0.6])
    assert low is not None and high is not None
    assert (low, high) == pytest.approx((0.5 - 4.30265 * 0.057735, 0.5 + 4.30265 * 0.057735), abs=1e-4)
    assert p_value([0.4, 0.5, 0.6]) == pytest.approx(1 - 8.66025 / np.sqrt(2 + 75), abs=1e-5)
    assert interval([0.5]) == (None, None) and p_value([0.5]) is None
    assert p_value([0.0, 0.0]) == 1 and p_value([0.1, 0.1]) == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.9]) == [1.0, 1.0] and holm([]) == []
    assert adjust([[0.01], [0.02, 0.5]]) == [[0.02], [0.08, 1.0]]
    assert adjust([[0.01], []]) == [[0.01], []]  # nobody shares with a family without members


def test_t_intervals_cover_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    drawn = random.normal(0.6, 0.05, (2000, 3))
    ends = [interval(values.tolist()) for values in drawn]
    covered = sum(low <= 0.6 <= high for low, high in ends if low is not None and high is not None)
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_level_is_the_mean_over_seeds_and_tasks() -> None:
    found = level([runs(0.5, 0.7), runs(0.1, 0.3)])
    assert found.value == pytest.approx(0.4) and found.each == pytest.approx((0.3, 0.5))
    assert found.items_low < 0.4 < found.items_high
    alone = level([runs(0.5)])
    assert alone.low is None and alone.ends == (alone.items_low, alone.items_high)
    assert found.ends[0] == min(found.low or 1, found.items_low)


def test_items_alone_are_the_ordinary_bootstrap() -> None:
    """One seed, singleton clusters: the spread is that of a binomial share."""
    found = level([runs(0.3, items=400)], draws=20_000)
    reach = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (found.items_low, found.items_high) == pytest.approx((0.3 - reach, 0.3 + reach), abs=0.004)


def test_clusters_and_seeds_both_widen() -> None:
    right = [number % 3 == 0 for number in range(300)]
    apart, together = run(right), run(right, [str(number % 3) + str(number // 30) for number in range(300)])
    narrow, wide = level([[apart]]), level([[together]])
    assert wide.items_high - wide.items_low > 2 * (narrow.items_high - narrow.items_low)
    steady, shaky = level([runs(0.5, 0.5, 0.5)]), level([runs(0.3, 0.5, 0.7)])
    assert shaky.items_high - shaky.items_low > 1.5 * (steady.items_high - steady.items_low)


def test_a_gap_is_paired_by_seed_and_item() -> None:
    """Seeds move both alike, and items are equally hard for both: the difference is sharp where levels are not."""
    ours, theirs = runs(0.35, 0.56, 0.76), runs(0.30, 0.50, 0.70)
    found = gap([ours], [theirs])
    assert found.paired and found.each == pytest.approx((0.05, 0.06, 0.06), abs=1e-9)
    assert found.low is not None and found.low > 0 and found.items_low > 0
    assert found.p == max(found.p_seeds or 0, found.p_items) < 0.05
    overall = level([ours])
    assert overall.high is not None and overall.low is not None
    assert (found.high or 1) - found.low < 0.2 * (overall.high - overall.low)


def test_items_that_differ_are_not_called_paired() -> None:
    theirs = [run([True, False] * 20, prefix="other") for _ in range(2)]
    assert not gap([runs(0.5, 0.5, items=40)], [theirs]).paired


def test_equal_differences_over_few_items_are_no_verdict() -> None:
    """With two seeds whose difference happens to be the same, t alone would be certain: its error has a floor."""
    found = gap([runs(0.5, 0.5, items=40)], [runs(0.45, 0.45, items=40)])
    assert p_value(found.each) == 0 and found.p_seeds is not None and found.p_seeds > 0.05
    assert found.low is not None and found.low < 0 < found.value


def test_many_items_do_not_outweigh_few_seeds() -> None:
    """A hundred thousand items of two seeds that disagree: sure about the items, not about the joint."""
    found = gap([runs(0.60, 0.52, items=20_000)], [runs(0.50, 0.50, items=20_000)], draws=500)
    assert found.p_items < 0.05 and found.p > 0.2 and found.low is not None and found.low < 0 < found.value


def test_the_same_thing_twice_differs_by_nothing() -> None:
    found = gap([runs(0.2, 0.4)], [runs(0.2, 0.4)])
    assert (found.value, found.low, found.high, found.items_low, found.items_high) == (0, 0, 0, 0, 0)
    assert found.p == 1 and verdict(found.value, found.p) == "not decided"


def test_one_seed_is_never_a_verdict() -> None:
    found = gap([runs(1.0)], [runs(0.0)])
    assert found.p_seeds is None and found.p == 1 and verdict(found.value, found.p) == "not decided"


def test_words() -> None:
    assert verdict(0.1, 0.049) == "better" and verdict(-0.1, 0.049) == "worse"
    assert verdict(0.1, 0.051) == "not decided"
    assert verdict(0.1, 0.01, higher=False) == "worse"  # nats per token


def test_outcomes_of_predictions() -> None:
    def prediction(right: bool | None, score: float, tokens: int) -> Prediction:
        return Prediction("i", "t", None, "", (), (score,), None, "", right, "c", tokens=tokens)

    some = [prediction(True, -6.0, 2), prediction(None, -3.0, 1)]
    shares, nats = Outcomes.of(some, "accuracy"), Outcomes.of(some, "nats per token")
    assert shares.mean == 0.5 and shares.unscored == 1
    assert nats.mean == pytest.approx(9 / 3) and nats.unscored == 0


def test_numbers_of_seeds_and_tasks_have_to_agree() -> None:
    with pytest.raises(DataError, match="seeds"):
        gap([runs(0.5, 0.5)], [runs(0.5)])
    with pytest.raises(DataError, match="1 tasks are compared with 2"):
        gap([runs(0.5)], [runs(0.5), runs(0.5)])
    with pytest.raises(DataError, match="no seeds"):
        level([])


def test_the_seed_of_the_bootstrap_decides() -> None:
    ours = [runs(0.3, 0.5)]
    assert level(ours, seed=1) == level(ours, seed=1) != level(ours, seed=2)
    assert seeds.DRAWS >= 1000


def test_a_task_beside_itself_is_no_more_certain_than_alone() -> None:
    """Tasks over the same pictures err together; over others they do not."""
    random = np.random.default_rng(0)
    rights = [random.random(100) < 0.5 for _ in range(2)]
    one = [run(right.tolist(), [f"picture {n % 50}" for n in range(100)]) for right in rights]
    other = [run(right.tolist(), [f"drawing {n % 50}" for n in range(100)]) for right in rights]

    def width(*tasks: list[Outcomes]) -> float:
        found = level(tasks)
        return found.items_high - found.items_low

    assert width(one, one, one) == pytest.approx(width(one))
    assert width(one, other) == pytest.approx(width(one) / np.sqrt(2), rel=0.1)


def test_tasks_are_resampled_together_where_a_third_connects_them() -> None:
    some = [[run([True, False], clusters)] for clusters in (["a", "b"], ["x", "y"], ["b", "x"], ["q", "r"])]
    assert seeds._together(some) == [[0, 1, 2], [3]]


def test_a_large_difference_is_decided_among_however_many() -> None:
    """4,000 draws alone tell nothing below 0.0005, which Holm over a hundred differences never lets pass."""
    random = np.random.default_rng(0)
    ours, theirs = ([run((random.random(300) < rate).tolist()) for _ in range(8)] for rate in (0.9, 0.3))
    (found,) = [gap([ours], [theirs])]
    assert found.p_items < 1e-12 and found.p < 1e-4
    assert verdict(found.value, adjust([[found.p] * 100, [0.5]])[0][0]) == "better"


def test_few_clusters_agree_by_chance() -> None:
    """The sign test by hand: k clusters all for one side come up twice in 2^k; of one picture nothing follows."""
    for clusters, p in ((1, 1.0), (3, 0.25), (7, 2 / 2**7)):
        names = [f"picture {number % clusters}" for number in range(2 * clusters)]
        ours, theirs = ([run([right] * len(names), names)] * 3 for right in (True, False))
        assert gap([ours], [theirs]).p == p
    one = [run(right, ["p", "p"]) for right in ([True, True], [True, False])]
    assert gap([[one[0]] * 3], [[one[1]] * 3]).p == 1
    whole = [Outcomes(("all",), (value,), (1.0,), (None,)) for value in (0.1, 0.101, 0.102, 0.3, 0.301, 0.303)]
    assert gap([whole[:3]], [whole[3:]]).p == gap([whole[:3]], [whole[3:]]).p_seeds  # no items to choose


def shares(right: list[bool], prefix: str) -> Outcomes:
    ids = tuple(f"{prefix}{number}" for number in range(len(right)))
    return Outcomes(ids, tuple(map(float, right)), (1.0,) * len(right), ids, shares=True)


def test_draws_without_items_of_a_task_are_left_out() -> None:
    """Two pictures of one task among 200 of another that shares one: many draws miss both, and counted as 0."""
    large = [shares([number % 10 > 0 for number in range(200)], "p")] * 2
    small = [Outcomes(("p0", "x"), (1.0, 1.0), (1.0, 1.0), ("p0", "x"), shares=True)] * 2
    found = level([large, small])
    assert found.value == pytest.approx(0.95)
    # two equal seeds: t of one degree times half the error of the large task's share, the small one being always right
    assert found.low == pytest.approx(0.95 - 12.7062 * np.sqrt(0.09 / 200) / 2, abs=0.015)
    rare = [[Outcomes((f"p{n}",), (1.0,), (1.0,), (f"p{n}",), shares=True)] * 2 for n in range(3)]
    none = [[Outcomes((f"p{n}",), (0.0,), (1.0,), (f"p{n}",), shares=True)] * 2 for n in range(3)]
    # each of three pictures is in 63 % of the draws, all in fewer than half of them
    assert gap([large, *rare], [[run([False] * 200, prefix="p")] * 2, *none]).p_items == 1


def test_shares_without_exception_are_not_certain() -> None:
    right, wrong = [shares([True] * 3, "p")] * 3, [shares([False] * 3, "p")] * 3
    found, gained = level([right]), gap([right], [wrong])
    assert found.items_low == pytest.approx(3 / (3 + 1.959964**2))  # three clusters, however many seeds
    assert found.items_low == pytest.approx(accuracy([True] * 9, list("abc") * 3).low)
    assert gained.items_low < 0.5 and gained.items_high == 1
