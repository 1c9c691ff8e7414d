"""The loop: what moves and what does not, budgets, marks, rows, and stops with a reason."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console

from isthmus.config import Budget, Recipe
from isthmus.training import checkpoint
from isthmus.training.budget import marks, steps_for
from isthmus.training.log import read_rows
from isthmus.training.loop import derive, run_stage
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, DataError, IsthmusError, NotFinite


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


def run(recipe: Recipe, folder: Path, steps: int = 6, dtype: torch.dtype = torch.float32, **stage: Any) -> Any:
    vlm = small.build(recipe, dtype)
    made = small.stage(**stage)
    feed = small.Colours(vlm, size=made.batch_size, micros=made.accumulate)
    return vlm, run_stage(vlm, made, feed, folder, steps=steps, dtype=dtype, console=small.quiet())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_frozen_stays_bit_equal_and_what_trains_moves(recipe: Recipe, tmp_path: Path, dtype: Any) -> None:
    before = small.weights(small.build(recipe, dtype))
    vlm, result = run(recipe, tmp_path, dtype=dtype)
    for name, tensor in small.weights(vlm).items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)) != name.startswith("connectors."), name
    assert result.state == "done"
    again = type(vlm).from_pretrained(result.model)
    assert all(torch.equal(tensor, small.weights(vlm)[name]) for name, tensor in small.weights(again).items())


def test_it_learns(recipe: Recipe, tmp_path: Path) -> None:
    train = {"connectors.*": 1e-2, "llm.*": {"mode": {"r": 4}, "lr": 1e-2}}
    _, result = run(recipe, tmp_path, steps=40, train=train)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


def test_one_update_is_that_of_adamw_on_the_mean_gradient(recipe: Recipe, tmp_path: Path) -> None:
    """Two micro-batches, clipping and a second group, against a plain loop over one batch."""
    train = {"connectors.*": 1e-2, "llm.model.layers.0.*": {"lr": 1e-3, "weight_decay": 0.1}}
    vlm, _ = run(recipe, tmp_path, steps=3, train=train, accumulate=2, clip=0.5, schedule="linear", warmup=0.0)

    plain = small.build(recipe)
    feed = small.Colours(plain)
    plain.requires_grad_(False)
    mine = dict(plain.named_parameters())
    decayed = [n for n in mine if n.startswith("llm.model.layers.0.") and mine[n].ndim > 1]
    other = [n for n in mine if n.startswith("llm.model.layers.0.") and mine[n].ndim == 1]
    joint = [n for n in mine if n.startswith("connectors.")]
    groups = [(joint, 1e-2, 0.0), (decayed, 1e-3, 0.1), (other, 1e-3, 0.0)]
    chosen = [mine[name].requires_grad_() for names, _, _ in groups for name in names]
    optimizer = torch.optim.AdamW(
        [{"params": [mine[n] for n in names], "lr": lr, "weight_decay": decay} for names, lr, decay in groups]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
    for number in range(3):
        batch = feed(number, 0)
        output = plain.run(batch)
        logits = output.head(output.hidden_BTD)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.labels_BT[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, parameter in vlm.named_parameters():
        torch.testing.assert_close(parameter, mine[name], rtol=1e-4, atol=1e-5, msg=name)


def test_rows_hold_what_people_look_for(recipe: Recipe, tmp_path: Path) -> None:
    _, result = run(recipe, tmp_path, schedule="constant", warmup=0.0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["learning_rate"] == 1e-2 and row["grad_norm"] > 0 and 0 <= row["data_wait"] <= 1
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["tokens_per_second"] > row["supervised_tokens_per_second"] > 0
    assert result.at.samples == 24
    assert result.at.tokens == pytest.approx(sum(row["tokens_per_second"] * row["seconds"] for row in rows))
    assert (tmp_path / "curves.png").is_file()


class Poisoned(small.Colours):
    """Pictures of one step that are not numbers."""

    def __call__(self, step: int, micro: int) -> Batch:
        batch = super().__call__(step, micro)
        if step == 2:
            batch.media["image"].pixels.fill_(float("nan"))
        return batch


def test_a_loss_that_is_not_finite_stops_before_the_update(recipe: Recipe, tmp_path: Path) -> None:
    good, _ = run(recipe, tmp_path / "good", steps=6)
    vlm = small.build(recipe)
    feed = Poisoned(vlm)
    with pytest.raises(IsthmusError, match=r"step 3: a value in the pixels of image 1 \(sample s\d+\) is not finite"):
        run_stage(vlm, small.stage(), feed, tmp_path / "bad", steps=6, console=small.quiet())
    note = json.loads((tmp_path / "bad" / "bad_batch.json").read_text())
    assert note["step"] == 3 and note["samples"] == [list(small.Colours(vlm)(2, 0).ids)]
    assert all(tensor.isfinite().all() for tensor in small.weights(vlm).values())
    assert (tmp_path / "bad" / "checkpoints" / "step-0000002").is_dir()

    resumed = small.build(recipe)  # with the data mended, the run goes on as if nothing had been
    run_stage(resumed, small.stage(), small.Colours(resumed), tmp_path / "bad", steps=6, console=small.quiet())
    assert all(torch.equal(tensor, small.weights(resumed)[name]) for name, tensor in small.weights(good).items())


def test_a_validation_loss_that_is_no_number_stops_the_stage(recipe: Recipe, tmp_path: Path) -> None:
    """Kept as the best one, it would never be beaten."""
    vlm, made, said = small.build(recipe), small.stage(evaluate_every=0.5), iter([0.7, math.nan])
    with pytest.raises(NotFinite, match="step 6: the validation loss"):
        run_stage(
            vlm, made, small.Colours(vlm), tmp_path, steps=6, validate=lambda step: next(said), console=small.quiet()
        )


class Killed(small.Colours):
    """The process is ended by force while it makes the batch of a step."""

    at: int | None = None

    def __call__(self, step: int, micro: int) -> Batch:
        if step == self.at:
            raise KeyboardInterrupt
        return super().__call__(step, micro)


@pytest.mark.parametrize("mark", [3, 6])
@pytest.mark.parametrize("fault", [RuntimeError("no memory"), DataError("mute", "speak")], ids=["any", "ours"])
def test_a_validation_that_fails_loses_no_step_and_is_made_up_for(
    recipe: Recipe, tmp_path: Path, mark: int, fault: Exception
) -> None:
    """The run goes on with it, and once more if it is killed before its next checkpoint."""
    made, said = small.stage(train=DROPPING, evaluate_every=0.5, save_every=0.5), {3: 0.5, 6: 0.9}
    done: list[int] = []

    def go(name: str, fails: bool = False, killed: int | None = None) -> tuple[Any, Any, dict[str, torch.Tensor]]:
        vlm, folder = small.build(recipe), tmp_path / name
        feed = Killed(vlm)
        feed.at = killed

        def validate(step: Step) -> float:
            now = max(row["step"] for row in read_rows(folder / "metrics.jsonl"))
            done.append(now)
            if fails and now == mark:
                raise fault
            return said[now]

        result = run_stage(vlm, made, feed, folder, steps=6, validate=validate, console=small.quiet())
        return result, feed, small.weights(vlm)

    whole, _, expected = go("whole")
    assert whole.at.best_step == 3 and done == [3, 6]
    for _ in range(2):  # at once again if it is not mended
        with pytest.raises(type(fault), match=str(fault.args[0])):
            go("parts", fails=True)
        assert checkpoint.damage(tmp_path / f"parts/checkpoints/step-{mark:07d}") is None
    assert done[2:] == ([3, 3] if mark == 3 else [3, 6, 6])
    if mark == 3:
        with pytest.raises(KeyboardInterrupt):
            go("parts", killed=4)
    last, feed, found = go("parts")
    assert min(feed.asked, default=6) == mark  # nothing is trained again
    assert (last.at.best_step, last.at.best_loss) == (3, 0.5) and losses(tmp_path / "parts") == losses(
        tmp_path / "whole"
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    told = {
        row["step"]: row["validation_loss"]
        for row in read_rows(tmp_path / "parts/metrics.jsonl")
        if "validation_loss" in row
    }
    assert told == said
    known = len(done)
    go("parts")
    assert len(done) == known  # what was validated is not validated again


def test_a_gradient_that_is_not_finite_is_named(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)
    name, victim = next((n, p) for n, p in vlm.named_parameters() if n.startswith("connectors."))
    victim.requires_grad_().register_hook(lambda gradient: gradient.fill_(float("inf")))
    with pytest.raises(IsthmusError, match=f"the gradient of vlm.{name} is not finite"):
        run_stage(vlm, small.stage(), small.Colours(vlm), tmp_path, steps=6, console=small.quiet())


def test_steps_of_text_alone_pass_through_a_stage_that_trains_the_connector(recipe: Recipe, tmp_path: Path) -> None:
    vlm = small.build(recipe)

    class Mixed(small.Colours):
        def __call__(self, step: int, micro: int) -> Batch:
            return small.text_batch(vlm) if step < 2 else super().__call__(step, micro)

    before = small.weights(vlm)
    stage = small.stage(warmup=0.0)
    result = run_stage(vlm, stage, Mixed(vlm), tmp_path, steps=3, console=small.quiet())
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert result.state == "done" and [row["grad_norm"] > 0 for row in rows] == [False, False, True]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in small.weights(vlm).items())


class Texts(small.Colours):
    """Pictures up to a step, and texts alone from there on."""

    first: int = 0

    def __call__(self, step: int, micro: int) -> Batch:
        return super().__call__(step, micro) if step < self.first else small.text_batch(self.vlm)


def heard(recipe: Recipe, folder: Path, feed: type[small.Colours], steps: int = 3, **stage: Any) -> str:
    """What a stage prints."""
    vlm, console = small.build(recipe), Console(file=io.StringIO(), width=400)
    assert run_stage(vlm, small.stage(**stage), feed(vlm), folder, steps=steps, console=console).state == "done"
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_stage_whose_data_never_reach_what_trains_says_so_at_its_end(recipe: Recipe, tmp_path: Path) -> None:
    names = [f"vlm.{name}" for name, _ in small.build(recipe).named_parameters() if name.startswith("connectors.")]
    said = heard(recipe, tmp_path / "all", Texts)
    assert f"nothing was trained, for no gradient has reached {', '.join(names)};" in said and len(names) <= 4
    said = heard(recipe, tmp_path / "some", Texts, train={"connectors.*": 1e-2, "llm.*": 1e-3})
    assert f"{len(names)} trainable tensors are as they were, for no gradient has reached {names[0]}" in said
    assert "no gradient has reached" not in heard(recipe, tmp_path / "none", small.Colours)


def test_a_stage_whose_last_batches_are_texts_says_nothing_even_if_it_was_interrupted(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Texts, "first", 2)
    made, vlm = small.stage(save_every=0.25), small.build(recipe)

    class Ended(Texts):
        def __call__(self, step: int, micro: int) -> Batch:
            if step == 3:
                raise KeyboardInterrupt
            return super().__call__(step, micro)

    with pytest.raises(KeyboardInterrupt):
        run_stage(vlm, made, Ended(vlm), tmp_path, steps=4, console=small.quiet())
    said = heard(recipe, tmp_path, Texts, steps=4, save_every=0.25)
    assert "goes on from step 3 of 4" in said and "no gradient has reached" not in said


def test_what_no_objective_reaches_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="trainable tensors got no gradient: vlm.llm"):
        run(recipe, tmp_path, objectives=["contrastive"], train={"connectors.*": 1e-2, "llm.model.layers.1.*": 1e-3})


def test_a_warm_stage_trains_connector_and_temperature(recipe: Recipe, tmp_path: Path) -> None:
    _, result = run(recipe, tmp_path, steps=20, objectives=["contrastive"])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert result.state == "done" and rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_what_a_validation_draws_is_the_same_each_time_and_moves_no_step(recipe: Recipe, tmp_path: Path) -> None:
    drawn: list[float] = []

    def validate(step: Step) -> float:
        drawn.append(float(torch.rand(())))
        return drawn[-1]

    vlm, made = small.build(recipe), small.stage(train=DROPPING, evaluate_every=0.5)
    feed = small.Colours(vlm)
    run_stage(vlm, made, feed, tmp_path / "seen", steps=4, validate=validate, console=small.quiet())
    run(recipe, tmp_path / "unseen", steps=4, train=DROPPING)
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    seen, unseen = (losses(tmp_path / name) for name in ("seen", "unseen"))
    assert seen == unseen and len(seen) == 4


DROPPING = {"connectors.*": 1e-2, "llm.*": {"mode": {"r": 2, "dropout": 0.2}, "lr": 1e-2}}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_negatives_of_a_batch_cannot_be_split(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contrastive compares the samples of a batch"):
        run(recipe, tmp_path, objectives=["contrastive"], accumulate=2)


def test_nothing_to_learn_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    class Mute(small.Colours):
        def __call__(self, step: int, micro: int) -> Batch:
            batch = super().__call__(step, micro)
            batch.labels_BT.fill_(-100)
            return batch

    vlm = small.build(recipe)
    with pytest.raises(DataError, match="no token is supervised"):
        run_stage(vlm, small.stage(), Mute(vlm), tmp_path, steps=6, console=small.quiet())


def test_budgets() -> None:
    assert steps_for(Budget(steps=7), 16, 100) == 7
    assert steps_for(Budget(samples=100), 16, 1000) == 7
    assert steps_for(Budget(epochs=1.5), 10, 101) == 16
    assert steps_for(Budget(minutes=5), 16, 100) is None


def test_marks() -> None:
    assert marks(0.25, 100) == {25, 50, 75, 100}
    assert marks(0.3, 10) == {3, 6, 9, 10}
    assert marks(0.25, 2) == {1, 2} and marks(0.01, 3) == {1, 2, 3} and marks(None, 9) == {9}
    assert max(marks(0.34, 6)) == 6


def test_seeds_differ_by_each_argument_and_are_fixed() -> None:
    seeds = {derive(*args) for args in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", "")]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "align", 3) == derive(0, "align", 3)
