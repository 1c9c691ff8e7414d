"""VDEP's two modes: how samples are drawn into them, pictures of which nothing is said, and the recipes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vdep_parts import SAMPLES, gradients, prepared, stage, term, with_term

import composed
from composed import picture
from isthmus import objectives
from isthmus.config import ObjectiveConfig, Recipe, Source
from isthmus.data import lottery
from isthmus.data.mix import Mix
from isthmus.data.sets import open_set
from isthmus.objectives import named
from isthmus.training import combination
from isthmus.training.log import read_rows
from isthmus.training.parallel import World
from isthmus.training.run import Data, Feed, train
from isthmus.training.step import mixed
from isthmus.types import IGNORE, Batch, ConfigError, DataError, NothingToLearn, Sample, Turn


def drawn(share: float, sizes: Sequence[int], by: str, seed: int = 0) -> list[list[bool]]:
    """Per step, who is below the share."""
    steps = []
    for step, size in enumerate(sizes):
        numbers = lottery.draw([(0, i) for i in range(size)], step, seed, by)  # type: ignore[arg-type]
        steps.append([numbers[0, i] < share for i in range(size)])
    return steps


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 5, 6])
def test_every_batch_has_the_share_to_within_a_sample_and_many_have_it_exactly(share: float, size: int) -> None:
    counts = [sum(step) for step in drawn(share, [size] * 1000, "sample")]
    assert all(abs(count - share * size) < 1 for count in counts)
    assert sum(counts) == pytest.approx(share * size * 1000, abs=5)


def test_batches_alternate() -> None:
    steps = drawn(0.5, [4] * 1000, "batch")
    assert [step[0] for step in steps] == [True, False] * 500
    assert all(len(set(step)) == 1 for step in steps)
    assert sum(step[0] for step in drawn(0.25, [4] * 1000, "batch")) == 250


def test_who_is_drawn_changes_from_step_to_step_and_with_the_seed() -> None:
    steps = drawn(0.5, [8] * 60, "sample")
    share = [sum(step[place] for step in steps) / 60 for place in range(8)]
    assert all(0.25 < each < 0.75 for each in share)
    assert steps != drawn(0.5, [8] * 60, "sample", seed=1)
    refs = [(0, i) for i in range(8)]
    assert lottery.draw(refs, 3, 0, "sample") == lottery.draw(refs[::-1], 3, 0, "sample")


class Fixed(list):
    """A data set of given samples."""


@pytest.mark.parametrize("batching", ["bucketed", "shuffled", "packed"])
def test_any_number_of_processes_and_micro_batches_draws_the_same(batching: str) -> None:
    vlm = composed.model()
    samples = Fixed(one.but(id=str(number)) for number, one in enumerate(SAMPLES * 6))
    found = []
    for size, accumulate in ((1, 1), (2, 1), (1, 2)):
        leg = stage(*with_term(), batching=batching, batch_size=8, accumulate=accumulate, max_length=150)
        data = Data([samples], Mix([samples], [1.0], 3))  # type: ignore[list-item]
        feeds = [Feed(leg, data, vlm.processor.collator(), 3, World(rank, size)) for rank in range(size)]
        told: dict[str, float] = {}
        for feed, micro in itertools.product(feeds, range(accumulate)):
            batch = feed(2, micro)
            for value, name in zip(each_sample(batch), batch.ids):
                told[name] = value
        found.append(told)
    assert found[0] == found[1] == found[2]
    assert abs(sum(value < 0.5 for value in found[0].values()) - len(found[0]) / 2) < 1  # one may come twice in a step


@pytest.mark.parametrize("batching", ["bucketed", "shuffled", "packed"])
def test_pictures_without_words_are_in_every_batch_as_often_as_they_are_drawn(batching: str) -> None:
    vlm = composed.model()
    said = Fixed(SAMPLES[1].but(id=f"said {number}") for number in range(60))
    bare = Fixed(Sample((Turn("user", (picture(4),)),), f"bare {number}") for number in range(40))
    leg = stage(*with_term(), batching=batching, batch_size=4, max_length=150)
    data = Data([said, bare], Mix([said, bare], [1.0, 1.0], 3))  # type: ignore[list-item]
    feed = Feed(leg, data, vlm.processor.collator(bare=True), 3)
    assert [sum(name.startswith("bare") for name in feed(step, 0).ids) for step in range(40)] == [2] * 40


def each_sample(batch: Batch) -> list[float]:
    """What each sample of a batch drew, in order."""
    assert batch.draw_BT is not None
    found = []
    for row, segment in zip(batch.draw_BT, batch.segment_BT):
        for number in range(1, int(segment.max()) + 1):
            (value,) = set(row[segment == number].tolist())
            found.append(value)
    return found


def test_samples_in_the_mode_alone_carry_the_term() -> None:
    vlm = composed.model()
    samples = [one.but(meta={"draw": draw}) for one, draw in zip(SAMPLES, (0.6, 0.1, 0.2, 0.49))]
    batch = vlm.processor.collator().rows([samples[:2], samples[2:]])
    assert term(ratio=0.5).count(batch) == 3 * 15  # the first is not, the second has two pictures, the third none
    assert term(ratio=0.15).count(batch) == 2 * 15
    assert term(ratio=1.0).count(batch) == 4 * 15


def test_without_text_the_other_terms_skip_the_samples_of_the_mode() -> None:
    """The third shows nothing, so that whatever it draws, words are all it has to teach."""
    samples = [one.but(meta={"draw": draw}) for one, draw in zip(SAMPLES, (0.6, 0.1, 0.1, 0.49))]
    alone = prepared(stage(*with_term(text=False, weight=0.0)))
    collate = alone.vlm.processor.collator()
    left = gradients(alone, [collate(samples)])
    expected = gradients(prepared(stage()), [collate([samples[0], samples[2]])])
    for name in expected:
        torch.testing.assert_close(left[name], expected[name], rtol=1e-4, atol=1e-6)
    with_text = gradients(prepared(stage(*with_term(weight=0.0))), [collate(samples)])
    assert any(not torch.allclose(with_text[name], expected[name], rtol=1e-2, atol=1e-4) for name in expected)


def test_a_batch_of_text_is_never_kept_from_the_other_terms() -> None:
    step = prepared(stage(*with_term(text=False, mix_by="batch")))
    batch = step.vlm.processor.collator()([SAMPLES[2].but(meta={"draw": 0.0})])
    assert step.scales([batch])["lm"] > 0 == step.terms["vdep"].count(batch)


def test_terms_that_mix_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "named", lambda name, options: term(ratio=0.5, mix_by=name))
    with pytest.raises(ConfigError, match="one objective mixes by sample, another by batch"):
        mixed([ObjectiveConfig(name="sample"), ObjectiveConfig(name="batch")])


def test_samples_are_drawn_where_a_term_is_about_a_share_of_them() -> None:
    assert mixed(with_term()) == "sample" and mixed(with_term(mix_by="batch")) == "batch"
    assert mixed(with_term(ratio=1.0)) is None and mixed(with_term(ratio=1.0, text=False)) == "sample"
    assert mixed(stage().objectives) is None


@pytest.mark.parametrize(("by", "size"), [("batch", 4), ("sample", 1)])
def test_a_share_of_the_samples_is_refused_where_nothing_learns_from_the_others(by: str, size: int) -> None:
    vlm = composed.model()

    def check(*terms: ObjectiveConfig, **changes: Any) -> None:
        leg = stage(*terms, batch_size=size, **changes)
        combination.check(composed.recipe().but(stages=(leg,)), vlm, torch.device("cpu"))

    lm, alone = with_term(mix_by=by)
    with pytest.raises(ConfigError, match="stage sft: vdep alone learns from a share of the samples") as refused:
        check(alone)
    assert "ratio: 1" in refused.value.remedy and "lm" in refused.value.remedy
    check(lm, alone)
    check(*with_term(mix_by=by, ratio=1.0)[1:])
    check(alone, data=("pictures",))

    samples = Fixed([SAMPLES[0].but(id=str(number)) for number in range(8)])  # why: what the steps would have to do
    leg = stage(alone, batching="shuffled", batch_size=size)
    feed = Feed(leg, Data([samples], Mix([samples], [1.0], 0)), vlm.processor.collator(), 0)  # type: ignore[list-item]
    step = prepared(leg, vlm)
    assert step.scales([feed(0, 0)])["vdep"] > 0
    with pytest.raises(NothingToLearn):
        step.scales([feed(1, 0)])


# ---------------------------------------------------------------------------------------------- bare pictures


def bare(number: int) -> Sample:
    return Sample((Turn.say("user", picture(number)),), id=f"bare{number}")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_pictures_of_which_nothing_is_said_train(template: Any) -> None:
    vlm = composed.model()
    collator = vlm.processor.collator(template=template, bare=True)
    batch = collator([bare(1), bare(2), SAMPLES[0].but(meta={"draw": 0.9})])
    assert (batch.labels_BT[:2] == IGNORE).all() and (batch.labels_BT[2] != IGNORE).any()
    assert each_sample(batch) == pytest.approx([-1, -1, 0.9])
    assert term(ratio=0.5).count(batch) == 2 * 15  # they always are in the mode
    undrawn = replace(batch, draw_BT=None)
    assert term(ratio=0.0).count(batch) == term(ratio=0.0).count(undrawn) == 2 * 15  # in validation too
    assert term(ratio=0.5).count(undrawn) == 3 * 15
    step = prepared(stage(*with_term()), vlm)
    only = collator([bare(1), bare(2)])
    found = gradients(step, [only])
    assert found["vlm.connectors.image.layers.0.weight"].any()
    assert step.scales([only])["lm"] == 0
    with pytest.raises(DataError, match=r"bare1: (a sample with nothing|the conversation has no assistant)"):
        vlm.processor.collator(template=template)([bare(1)])
    with pytest.raises(DataError, match="nothing to learn"):
        collator([Sample((Turn.say("user", "no picture"),), id="none")])


@pytest.mark.usefixtures("embedded")
def test_a_source_of_bare_pictures_shows_what_others_show() -> None:
    inner = [{"name": "naming", "limit": 3}, {"name": "scenes", "limit": 4, "options": {"kinds": ["caption"]}}]
    opened = open_set(Source.model_validate({"name": "pictures", "options": {"of": inner}}), 0)
    shown = [one for each in inner for one in open_set(Source.model_validate(each), 0)]
    assert len(opened) == 7
    assert [one.media for one in opened] == [one.media for one in shown]
    assert all(not turn.text for one in opened for turn in one.turns)
    assert len({one.id for one in opened}) == 7
    for wrong in ([{"name": "documents"}], [{"name": "naming", "weight": 2.0}]):
        with pytest.raises(ConfigError, match="pictures are those of other sets"):
            open_set(Source.model_validate({"name": "pictures", "options": {"of": wrong}}), 0)


def test_a_folder_of_pictures_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(120):
        picture(number).source.save(tmp_path / "deep" / f"{number}.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    source = Source(name="pictures", images=tmp_path)
    parts = {split: open_set(source.but(split=split), 0) for split in ("train", "val", "test")}
    shown = {split: {one.media[0].source for one in part} for split, part in parts.items()}
    assert shown["train"] | shown["val"] == shown["test"] == set((tmp_path / "deep").iterdir())
    assert not shown["train"] & shown["val"] and 0 < len(shown["val"]) < 10
    (tmp_path / "empty").mkdir()
    for name, cause in (("empty", "holds no picture"), ("nowhere", "No such file")):
        with pytest.raises(DataError, match=cause):
            open_set(Source(name="pictures", images=tmp_path / name), 0)
    with pytest.raises(ConfigError, match="not both"):
        open_set(source.but(options={"of": ["naming"]}), 0)


@pytest.mark.usefixtures("embedded")
def test_a_stage_on_bare_pictures_alone_learns_and_logs_its_figures(tmp_path: Path) -> None:
    source = {"name": "pictures", "options": {"of": [{"name": "naming", "limit": 8}]}}
    leg = stage(*with_term(ratio=1.0)[1:], data=(source,), budget={"steps": 12}, lr=1e-2, schedule="constant", warmup=0)
    made = composed.recipe().but(stages=(leg,), dtype="float32")
    assert train(made, tmp_path / "run", torch.device("cpu")) is not None
    rows = [row for row in read_rows(tmp_path / "run/sft/metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert {"vdep_distance", "vdep_copy", "vdep_norm", "vdep_spread", "vdep_rank"} <= rows[-1].keys()
    assert rows[0]["vdep_distance"] == pytest.approx(rows[0]["loss"], rel=1e-4)
    assert {row["supervised_tokens_per_second"] for row in rows} == {0.0}


# ---------------------------------------------------------------------------------------------- recipes


def test_the_recipes_are_llava_but_for_the_term() -> None:
    from isthmus.recipes.vdep import vdep

    for size in ("embedded", "published"):
        with_it, without = vdep(size), vdep(size, alpha=0)  # type: ignore[arg-type]
        assert without.stages[-1].objectives == (ObjectiveConfig(name="lm"),)
        assert with_it.stages[:-1] == without.stages[:-1]
        assert with_it.stages[-1].but(objectives=without.stages[-1].objectives) == without.stages[-1]
        assert with_it.stages[-1].objectives[1].weight == 0.1
    made: Recipe = vdep(alpha=1, ratio=0.25, shift=0, detach=False, distance="cosine", layer=3, mix_by="batch")
    (_, told) = made.stages[-1].objectives
    objective = named("vdep", told.options)
    assert (objective.share, objective.by, objective.reads, objective.alone) == (0.25, "batch", 3, False)
