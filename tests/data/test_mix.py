"""The order of samples: pure in (seed, step), fair to the weights, and every item once per epoch."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.config import parse
from isthmus.data.mix import CYCLE, Batches, Mix, by_size, permuted
from isthmus.files import remove
from isthmus.training import run
from isthmus.training.run import mix_of
from isthmus.training.toy import toy
from isthmus.types import ConfigError, DataError, Sample, Text, Turn


@given(st.integers(1, 300), st.integers(0, 5))
def test_permuted_is_a_bijection(size, seed):
    assert sorted(permuted(i, size, (seed,)) for i in range(size)) == list(range(size))


def test_permuted_reaches_all_orders_about_equally_and_far_positions_at_once():
    orders = Counter(tuple(permuted(i, 3, (seed,)) for i in range(3)) for seed in range(6000))
    assert set(orders) == set(permutations(range(3)))
    assert all(850 < count < 1150 for count in orders.values())  # 1000 each, σ ≈ 29
    firsts = Counter(permuted(0, 50, (seed,)) * 5 // 50 for seed in range(5000))
    assert all(850 < firsts[fifth] < 1150 for fifth in range(5))
    assert 0 <= permuted(10**12 - 1, 10**12, (0,)) < 10**12


def test_each_set_is_walked_once_per_epoch_in_a_new_order():
    mix = Mix([range(30), range(7)], [1, 1], seed=3)
    walks = {0: [], 1: []}
    for index in range(120):
        number, item = mix[index]
        walks[number].append(item)
    for number, size in ((0, 30), (1, 7)):
        epochs = [walks[number][start : start + size] for start in range(0, 60 // size * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1] != list(range(size))
    assert mix.epoch_length == 37


def test_draws_are_pure_and_depend_on_the_seed():
    sets, weights = [range(1000), range(50)], [0.7, 0.3]
    one, again, other = Mix(sets, weights, 1), Mix(sets, weights, 1), Mix(sets, weights, 2)
    far = [one[index] for index in range(100_000, 100_050)]
    assert far == [again[index] for index in reversed(range(100_000, 100_050))][::-1]
    assert far != [other[index] for index in range(100_000, 100_050)]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 3 * CYCLE), st.integers(1, 2 * CYCLE))
@settings(max_examples=50, deadline=None)
def test_any_stretch_follows_the_weights(weights, start, length):
    mix = Mix([range(10)] * len(weights), weights, seed=0)
    counts = Counter(mix._cycle[index % len(mix._cycle)][0] for index in range(start, start + length))
    for number, weight in enumerate(weights):
        expected = length * weight / sum(weights)
        rounding = length * (len(weights) / CYCLE)  # weights are multiples of 1 / CYCLE
        assert abs(counts[number] - expected) <= 1 + len(weights) + rounding


def test_a_tiny_weight_is_still_drawn():
    mix = Mix([range(10), range(10)], [1e6, 1], seed=0)
    assert Counter(number for number, _ in mix._cycle) == {0: CYCLE - 1, 1: 1}


def test_refusals():
    with pytest.raises(DataError, match="set 1 of the mix is empty"):
        Mix([range(3), []], [1, 1], 0)
    for weights in ([], [1], [1, 0]):
        with pytest.raises(ConfigError, match="positive weight"):
            Mix([range(3), range(3)], weights, 0)
    mix = Mix([range(3)], [1], 0)
    with pytest.raises(ConfigError, match="needs the samples' lengths"):
        Batches(mix, 2)
    with pytest.raises(ConfigError, match="without work"):
        Batches(mix, 2, "shuffled", world_size=3)
    with pytest.raises(ConfigError, match="without lengths"):
        Batches(mix, 2, "shuffled").padding_share(range(3))


def length(ref):
    """Between 10 and 209, unrelated to the order of the set."""
    return 10 + ref[1] * 7919 % 200


MIX = Mix([range(1000), range(300)], [2, 1], seed=5)
BATCHINGS = st.sampled_from(["bucketed", "shuffled", "packed"])


def batches(batching, **options):
    return Batches(MIX, 8, batching, length, window=6, max_length=400, **options)


@given(BATCHINGS, st.integers(0, 40), st.integers(0, 3))
@settings(deadline=None)
def test_a_step_is_pure(batching, step, seed):
    fresh, used = batches(batching, seed=seed), batches(batching, seed=seed)
    for other in (step + 9, step, 0):
        used.rows(other)
    assert fresh.rows(step) == used.rows(step)
    assert fresh[step] == [ref for row in fresh.rows(step) for ref in row]


@given(BATCHINGS, st.integers(1, 4))
@settings(deadline=None)
def test_a_window_holds_each_of_its_draws_once_whatever_the_ranks(batching, world_size):
    ranks = [batches(batching, world_size=world_size, rank=rank) for rank in range(world_size)]
    seen = [ref for step in range(6, 12) for rank in ranks for ref in rank[step]]
    assert sorted(seen) == sorted(MIX[index] for index in range(6 * 8, 12 * 8))
    assert all(sum(len(rank[step]) for rank in ranks) == 8 for step in range(12))


@pytest.mark.parametrize(
    "size, batch_size, epochs", [(125, 8, 1), (100, 32, 3), (700, 16, 2), (5000, 32, 1), (9, 32, 1)]
)
@pytest.mark.parametrize("batching", ["bucketed", "shuffled"])
def test_an_epoch_shows_every_sample_and_none_much_oftener_than_another(batching, size, batch_size, epochs):
    made = Batches(Mix([range(size)], [1], 0), batch_size, batching, lambda ref: 10 + ref[1] * 7919 % size)
    steps = [made[step] for step in range(math.ceil(epochs * size / batch_size))]
    seen = Counter(item for batch in steps for _, item in batch)
    assert len(seen) == size and all(len(batch) == batch_size for batch in steps)
    assert max(seen.values()) - min(seen.values()) <= 1
    assert size < batch_size or all(len(set(batch)) > batch_size / 2 for batch in steps)


def test_a_small_set_beside_a_large_one_fills_no_batch_with_one_sample():
    made = Batches(Mix([range(5000), range(50)], [1, 1], 0), 16, "bucketed", lambda ref: 10 + ref[1] * 7919 % 5000)
    assert all(len(set(made[step])) > 12 for step in range(100))


@given(BATCHINGS, st.integers(0, 20), st.sampled_from([(2, 1), (4, 1), (1, 4), (2, 2), (1, 8)]))
@settings(deadline=None)
def test_a_step_has_the_same_samples_for_any_ranks_and_micro_batches(batching, step, split):
    world_size, least = split
    ranks = [batches(batching, world_size=world_size, rank=rank, least=least) for rank in range(world_size)]
    assert all(rank.rows(step)[micro::least] for rank in ranks for micro in range(least))
    dealt = [ref for rank in ranks for ref in rank[step]]
    assert sorted(dealt) == sorted(batches(batching)[step])
    if batching == "packed":  # those of plain shuffling, in rows
        assert sorted(dealt) == sorted(batches("shuffled")[step])


def test_bucketing_pads_less_and_still_shuffles():
    made = {name: Batches(MIX, 8, name, length, max_length=400) for name in ("shuffled", "bucketed", "packed")}
    share = {name: some.padding_share(range(64)) for name, some in made.items()}
    assert share["shuffled"] > 0.3 and share["bucketed"] < 0.05 and share["packed"] < 0.1
    longest = [max(map(length, batches("bucketed")[step])) for step in range(6)]
    assert longest != sorted(longest)
    assert batches("bucketed", seed=1)[0] != batches("bucketed", seed=2)[0]


def test_every_bucketed_batch_has_its_share_of_what_nothing_is_said_of():
    bare = lambda ref: ref[0] == 1  # noqa: E731  two draws of three are of the first set
    lengths = lambda ref: 5 if bare(ref) else length(ref)  # noqa: E731
    mixed = Batches(MIX, 8, "bucketed", lengths, bare=bare)
    counts = [sum(map(bare, mixed[step])) for step in range(96)]
    assert set(counts) == {2, 3} and sum(counts) == pytest.approx(8 / 3 * 96, abs=2)
    assert all(len(mixed[step]) == 8 for step in range(96))
    spread = [
        max(found) - min(found) for step in range(96) if (found := [lengths(r) for r in mixed[step] if r[0] == 0])
    ]
    assert max(spread) < 60 < 199 - 60  # of 10 to 209: the others are still sorted
    split = Batches(MIX, 8, "bucketed", lengths)
    assert max(sum(map(bare, split[step])) for step in range(96)) == 8  # what it is for


def test_padding_share_by_hand():
    lengths = {0: 10, 1: 30}
    pair = Batches(Mix([range(2)], [1], 0), 2, "bucketed", lambda ref: lengths[ref[1]], window=1)
    assert pair.padding_share(range(1)) == pytest.approx(20 / 60)
    split = Batches(Mix([range(2)], [1], 0), 2, "bucketed", lambda ref: lengths[ref[1]], window=1, least=2)
    assert split.padding_share(range(1)) == 0  # each in a micro-batch of its own


def test_packed_rows_hold_whole_samples_within_the_limits():
    packed = batches("packed", media=lambda ref: 1, max_media=3)
    for step in range(30):
        for row in packed.rows(step):
            assert sum(map(length, row)) <= 400 and len(row) <= 3


def test_short_samples_leave_no_rank_of_a_packed_step_without_work():
    ranks = [Batches(MIX, 8, "packed", lambda ref: 5, 6, world_size=4, rank=rank) for rank in range(4)]
    assert all(rank[step] for rank in ranks for step in range(12))


@pytest.mark.parametrize("batching", ["bucketed", "packed", "shuffled"])
def test_samples_of_length_zero_are_left_out(batching):
    short = Batches(MIX, 8, batching, lambda ref: 0 if ref[1] % 2 else 10, window=6)
    assert all(item % 2 == 0 for step in range(12) for _, item in short[step])
    with pytest.raises(DataError, match="all 232 samples of steps 0 to 28"):
        Batches(MIX, 8, batching, lambda ref: 0)[0]


@pytest.mark.parametrize("batching", ["bucketed", "packed", "shuffled"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_micro_batch_has_a_row_though_samples_are_left_out(batching, ranks):
    """A step of as many samples as micro-batches has none to spare."""
    length = lambda ref: 0 if ref[1] % 10 == 0 else 10  # noqa: E731
    own = [Batches(MIX, 8, batching, length, 6, world_size=ranks, rank=rank, least=8 // ranks) for rank in range(ranks)]
    for step in range(12):
        rows = [each.rows(step) for each in own]
        assert [len(some) for some in rows] == [8 // ranks] * ranks
        assert all(item % 10 for some in rows for row in some for _, item in row)


@pytest.mark.parametrize("batching", ["bucketed", "packed", "shuffled"])
@pytest.mark.parametrize("gone", [1, 10, 60])
def test_a_step_has_the_same_samples_for_any_split_though_samples_are_left_out(batching, gone):
    long = lambda ref: 0 if ref[1] * 7919 % 100 < gone else length(ref)  # noqa: E731

    def dealt(world_size: int, least: int) -> list[list[tuple[int, int]]]:
        options: dict[str, Any] = {"max_length": 400, "world_size": world_size, "least": least}
        ranks = [Batches(MIX, 8, batching, long, 6, rank=rank, **options) for rank in range(world_size)]
        assert all(rank.rows(step)[micro::least] for step in range(24) for rank in ranks for micro in range(least))
        return [sorted(ref for rank in ranks for ref in rank[step]) for step in range(24)]

    whole = dealt(1, 1)
    assert {len(step) for step in whole} == {8}
    assert all(dealt(*split) == whole for split in [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
    if batching != "bucketed":  # what fits of a window, in the order of the draws
        drawn = [MIX[index] for index in range(48, 96) if long(MIX[index])]
        assert whole[6] == sorted(drawn[:8])


def test_later_draws_take_the_place_of_what_is_left_out():
    """A stand-in from the same window has the length of its original, and would come to stand beside it."""
    long = lambda ref: 0 if ref[1] % 10 == 3 else length(ref)  # noqa: E731
    made = Batches(MIX, 8, "bucketed", long, 6)
    kept = [MIX[index] for index in range(2 * 48) if long(MIX[index])]
    own = sum(long(MIX[index]) > 0 for index in range(48))
    found = [ref for step in range(6) for ref in made[step]]
    assert own < 48 and sorted(found) == sorted(kept[:48]) and len(set(found)) == 48


def test_a_sample_is_rendered_once_for_its_window_however_large_the_batch(monkeypatch):
    """Where a stage goes on, and with more samples in a window than lengths are remembered."""
    monkeypatch.setattr(run, "REMEMBERED", 16)
    said = (Turn("user", (Text("What?"),)), Turn("assistant", (Text("That."),)))
    samples: Any = [Sample(said, id=str(number)) for number in range(400)]
    rendered = Counter[str]()

    def lengths(sample: Sample) -> int:
        rendered[sample.id] += 1
        return 0 if int(sample.id) % 50 == 7 else 10 + int(sample.id) % 13

    collator: Any = SimpleNamespace(lengths=lengths, dropped={"7", "57"}, shortened=set())
    tree = {"name": "a", "data": ["naming"], "train": {"connectors.*": {}}, "budget": {"steps": 50}, "batch_size": 8}
    (stage,) = parse({"stages": [tree]}).stages
    mix = Mix([samples], [1], 0)
    feed = run.Feed(stage, run.Data([samples], mix), collator, 0)
    told = feed.first(40)
    for step in range(25, 50):
        feed._batches.rows(step)
    window = {str(mix[index][1]) for index in range(200, 400)}
    assert set(rendered.values()) == {1} and window <= rendered.keys()
    out = sum(int(name) % 50 == 7 for name in window)
    assert len(rendered) <= 200 + 2 * out and f"; 2 of the {len(rendered)} samples from step 25 on left out" in told


def test_a_stage_that_goes_on_tells_of_the_batches_that_come(tmp_path: Path, monkeypatch) -> None:
    asked = []
    first = run.Feed.first
    monkeypatch.setattr(run.Feed, "first", lambda feed, step: asked.append(step) or first(feed, step))
    made = toy(tmp_path / "toy")
    recipe = made.but(stages=[made.stages[0].but(budget={"steps": 4}, save_every=0.5, evaluate_every=None)])
    for _ in range(2):
        assert run.train(recipe, tmp_path / "run", torch.device("cpu")) is not None
        remove(tmp_path / "run/align/model")
        remove(tmp_path / "run/align/checkpoints/step-0000004")
    assert asked == [0, 2]


def test_shares_follow_sizes_to_a_power() -> None:
    sets = [range(100), range(10_000)]
    assert by_size([1, 1], sets, 0) == [1, 1]
    assert by_size([1, 1], sets, 0.5) == [10, 100]
    assert by_size([2, 1], sets, 1 / 4) == pytest.approx([2 * 100**0.25, 10])
    mix = Mix(sets, by_size([1, 1], sets, 0.5), seed=0)
    drawn = [mix[draw][0] for draw in range(4096)]
    assert drawn.count(0) == pytest.approx(4096 / 11, abs=1)


def test_a_stage_says_how_it_mixes_and_old_recipes_keep_their_fingerprints(tmp_path: Path) -> None:
    stage = {"name": "a", "data": ["naming"], "train": {"connectors.*": 1e-3}, "budget": {"steps": 1}}
    plain, mixed = (parse({"stages": [{**stage, **more}]}) for more in ({}, {"mixing": 0.5}))
    assert plain.fingerprint() != mixed.fingerprint() and "mixing" not in plain.model_dump()["stages"][0]
    with pytest.raises(ConfigError):
        parse({"stages": [{**stage, "mixing": -1}]})
    for name, count in (("few", 16), ("many", 400)):
        said = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(said)}\n" * count)
    sources = [{"name": str(tmp_path / f"{name}.jsonl"), "split": "test"} for name in ("few", "many")]
    leg = parse({"stages": [{**stage, "data": sources, "mixing": 0.5}]}).stages[0]
    drawn = [mix_of(leg, 0).mix[draw][0] for draw in range(240)]
    assert drawn.count(0) == pytest.approx(240 * 4 / 24, abs=2)
