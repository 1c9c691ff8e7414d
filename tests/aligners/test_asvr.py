"""ASVR: codes by hand, codebooks as Lloyd leaves them, a head that reads levels in order, the term as written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import composed
import isthmus
from composed import picture, sample
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.connectors.codebook import Codebook, Teller
from isthmus.prepare import codes
from isthmus.prepare.features import FeatureCache
from isthmus.recipes.asvr import asvr
from isthmus.training.optimizer import choose
from isthmus.training.run import train
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, DataError, Features, Output

OPTIONS = {"levels": 3, "size": 5, "width": 16, "depth": 2}
SAMPLES = (sample(picture(1), "what?"), sample("see", picture(2), picture(3), answer="two dogs"), sample("hello"))
ALL = {"connectors.*": 1e-3, "llm.*": 1e-3}


def filled(levels: int = 3, size: int = 5, width: int = 4) -> Codebook:
    torch.manual_seed(0)
    book = Codebook(levels, size, width)
    scale = 0.5 ** torch.arange(levels)[:, None, None]
    book.load_state_dict(
        {
            "books_LKE": torch.randn(levels, size, width) * scale,
            "centre_E": torch.randn(width),
            "spread_E": torch.rand(width) + 0.5,
        }
    )
    return book


def test_codes_are_those_of_the_nearest_vector_to_what_is_left_over() -> None:
    book, x = filled(), torch.randn(20, 4)
    found = book(x)
    for row, given in enumerate(x):
        rest = (given - book.centre_E) / book.spread_E
        for level in range(3):
            code = int(torch.stack([(rest - one).norm() for one in book.books_LKE[level]]).argmin())
            assert int(found[row, level]) == code
            rest = rest - book.books_LKE[level][code]
            torch.testing.assert_close(book.sums(found)[row, level], (given - book.centre_E) / book.spread_E - rest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book(x), found)


def test_centres_are_the_means_of_what_is_nearest_to_them_and_none_is_unused() -> None:
    clouds = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 20
    x = (clouds[:, None] + torch.randn(6, 30, 3, generator=torch.Generator().manual_seed(2))).flatten(0, 1)
    centres = codes.k_means(x, 6, torch.Generator().manual_seed(3))
    near = torch.cdist(x, centres).argmin(-1)
    assert near.bincount(minlength=6).gt(0).all()
    for place in range(6):
        torch.testing.assert_close(centres[place], x[near == place].mean(0))


def test_each_level_leaves_less_over_and_as_many_codes_as_vectors_leave_nothing() -> None:
    x = torch.randn(400, 6) * torch.tensor([100.0, 1, 1, 1, 1, 0.01])
    book = Codebook(4, 16, 6)
    book.load_state_dict(codes.fit(x, book, seed=0))
    even = book.even(x)
    torch.testing.assert_close(even.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    left = (even[:, None] - book.sums(book(x))).square().sum(-1).mean(0)
    assert (left.diff() < 0).all() and left[0] < even.square().sum(-1).mean()
    exact = Codebook(1, 8, 6)
    exact.load_state_dict(codes.fit(x[:8], exact, seed=0))
    torch.testing.assert_close(exact.sums(exact(x[:8]))[:, 0], exact.even(x[:8]))
    with pytest.raises(DataError, match="7 vectors of pictures for 8 codes"):
        codes.fit(x[:7], exact, seed=0)


def test_a_level_is_told_from_the_levels_before_it_and_from_no_other() -> None:
    torch.manual_seed(0)
    head = Teller(width=6, codes=4, inner=16, levels=3, size=5, depth=2)
    states, sums = torch.randn(7, 6), torch.randn(7, 3, 4)
    logits = head(states, sums)
    assert logits.shape == (7, 3, 5)
    for changed in range(3):
        other = sums.clone()
        other[:, changed] += 1
        moved = (head(states, other) != logits).any(-1).any(0)
        assert moved.tolist() == [level > changed for level in range(3)]
    assert (head(states + 1, sums) != logits).any(-1).all()
    with pytest.raises(ConfigError, match="width 385 does not divide"):
        Teller(6, 4, 385, 3, 5, 1)


def step_of(options: dict[str, Any] | None = None, term: dict[str, Any] | None = None, **train: Any) -> Step:
    leg = Stage.model_validate(
        {
            "name": "one",
            "data": ("none",),
            "train": train.get("train", ALL),
            "budget": Budget(steps=1),
            "objectives": (ObjectiveConfig(name="lm"), ObjectiveConfig(name="asvr", options=term or {})),
        }
    )
    vlm = composed.model("llama", train.get("joint", "asvr"), OPTIONS if options is None else options)
    step = Step(vlm, leg.objectives)
    choose(step, leg)
    if train.get("fitted", True):
        book = vlm.connectors["image"].codebook
        book.load_state_dict(filled(width=vlm.encoders["image"].width).state_dict())
    step.accompany()
    step.ready()
    return step


@pytest.mark.parametrize("shift", [0, 1])
def test_the_term_is_the_mean_cross_entropy_over_levels_and_places(shift: int) -> None:
    step = step_of(term={"shift": shift})
    batch = step.vlm.processor.collator()(SAMPLES)
    _, shares = step(batch, step.scales([batch]))
    connector = step.vlm.connectors["image"]
    hidden = step.vlm.run(batch).hidden_BTD
    at = batch.input_ids_BT == step.vlm.placeholder("image")
    found = connector.codebook(step.vlm.encode("image", batch.media["image"]).x_NSE.flatten(0, 1))
    per = step.vlm.queries("image")
    here = [[True] * (per - shift) + [False] * shift] * 3
    there = [[False] * shift + [True] * (per - shift)] * 3
    states, told = hidden[at][torch.tensor(here).flatten()], found[torch.tensor(there).flatten()]
    logits = connector.teller(states, connector.codebook.sums(told))
    losses = [F.cross_entropy(logits[:, level], told[:, level]).item() for level in range(3)]
    assert shares["asvr"].item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert step.terms["asvr"].count(batch) == 3 * (per - shift)
    right = (logits[:, 0].argmax(-1) == told[:, 0]).float().mean().item()
    assert step.figures()["asvr_right"] == pytest.approx(right)
    step(step.vlm.processor.collator()(SAMPLES[2:]), {"lm": 1.0, "asvr": 0.0})
    assert step.figures() == {}  # the last forward had no picture


def test_head_projector_and_llm_learn_from_it_and_codebooks_do_not() -> None:
    step = step_of()
    batch = step.vlm.processor.collator()(SAMPLES)
    before = {name: buffer.clone() for name, buffer in step.named_buffers()}
    step(batch, {"lm": 0.0, "asvr": 1.0})[0].backward()
    moved = {name for name, p in step.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(part in name for name in moved) for part in ("teller", "inner", "llm"))
    assert not any("codebook" in name for name, _ in step.named_parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in step.named_buffers())


def test_pictures_that_are_not_cached_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of()
    vlm, runs = step.vlm, []
    vlm.encoders["image"].register_forward_hook(lambda *_: runs.append(1))
    batch = vlm.processor.collator()(SAMPLES)
    run, found = vlm.run, []

    def run_and_encode_again(batch: Batch, **more: Any) -> Output:
        output = run(batch, **more)
        output.encoded = {kind: vlm.encode(kind, media) for kind, media in batch.media.items()}
        return output

    for way in (run, run_and_encode_again):
        monkeypatch.setattr(vlm, "run", way)
        loss, shares = step(batch, step.scales([batch]))
        loss.backward()
        grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **shares, **grads})
        step.zero_grad()
        assert len(runs) == (1 if way is run else 3)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_tap_is_brought_to_the_places_of_the_tokens() -> None:
    step = step_of({**OPTIONS, "pool": 2})
    connector = step.vlm.connectors["image"]
    x = torch.arange(16.0).reshape(1, 16, 1).expand(1, 16, 3)
    connector.of = "shallow"
    fine = torch.arange(64.0).reshape(1, 64, 1)
    features = Features(x, {"shallow": fine}, (4, 4))
    blocks = fine.reshape(2, 4, 2, 4).mean((1, 3)).flatten()
    torch.testing.assert_close(connector.seen(features)[0, :, 0], blocks)


def test_a_tap_is_brought_to_the_places_of_interleaved_encoders() -> None:
    encoder = {"taps": ("1",), "also": [{"source": str(composed.vision_folder("siglip"))}], "join": "interleave"}
    model = composed.model("llama", "asvr", {**OPTIONS, "tokenizer": "1"}, **encoder)
    features = model.encoders["image"](model.encoders["image"].blank())
    rows, columns = features.grid
    numbers = torch.arange(float(rows * columns // 2))
    features.taps["1"] = numbers[None, :, None].expand(1, -1, 3)
    found = model.connectors["image"].seen(features)[0, :, 0]
    assert (rows, columns) == (4, 8) and model.queries("image") == 32
    assert torch.equal(found, numbers.repeat_interleave(2))  # place by place, a token of each encoder


def test_vectors_that_have_no_places_are_refused() -> None:
    connector = step_of({**OPTIONS, "pool": 2}).vlm.connectors["image"]
    connector.of = "shallow"
    with pytest.raises(ConfigError, match="17 vectors of a picture are neither a square"):
        connector.seen(Features(torch.zeros(1, 16, 3), {"shallow": torch.zeros(1, 17, 3)}, (4, 4)))
    connector = step_of().vlm.connectors["image"]
    connector.of = "shallow"
    with pytest.raises(ConfigError, match="98 vectors of a picture are neither a square"):
        connector.seen(Features(torch.zeros(1, 98, 3), {"shallow": torch.zeros(1, 49, 3)}))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="the joint llava has no codes"):
        step_of({}, joint="llava", fitted=False)
    with pytest.raises(ConfigError, match="has no codes"):
        step_of({"tokenizer": None}, fitted=False)
    with pytest.raises(ConfigError, match="codebooks of the joint's images are empty"):
        step_of(fitted=False)
    with pytest.raises(ConfigError, match="the encoder trains"):
        step_of(train={**ALL, "encoders.*": 1e-4})
    with pytest.raises(ConfigError, match="each image is a single vector"):
        step_of({**OPTIONS, "pool": 1}, term={"shift": 1})
    step_of({**OPTIONS, "pool": 1}, term={"shift": 0})
    with pytest.raises(ConfigError, match="nothing named 'block3'"):
        composed.model("llama", "asvr", {**OPTIONS, "tokenizer": "block3"})


@pytest.mark.slow
def test_the_published_size_has_no_codes_of_looks() -> None:
    with pytest.raises(ConfigError, match="codes of meaning alone"):
        asvr("published", of="looks")


@pytest.mark.parametrize("cache", [None, False], ids=["cached features", "encoded in every step"])
def test_codebooks_stay_the_same_in_all_stages(tmp_path: Path, cache: bool | None) -> None:
    changes = {"data": (str(composed.questions(tmp_path, 8)),), "budget": {"steps": 2}, "batch_size": 4}
    legs = [stage.but(**changes) for stage in asvr().stages[1:]]
    made = composed.recipe("llama", "asvr", OPTIONS).but(stages=legs, dtype="float32", engine={"cache": cache})
    assert train(made, tmp_path / "run", torch.device("cpu")) is not None
    first, second = (isthmus.load(tmp_path / "run" / leg.name / "model").connectors["image"] for leg in legs)
    assert first.codebook.fitted and not torch.equal(first.inner.layers[0].weight, second.inner.layers[0].weight)
    for name, buffer in first.codebook.state_dict().items():
        assert torch.equal(buffer, second.codebook.state_dict()[name])


def test_codebooks_are_fitted_once_for_the_same_pictures(tmp_path: Path) -> None:
    newborn = composed.model("llama", "asvr", OPTIONS)
    look = FeatureCache(newborn.encoders["image"], tmp_path / "features")
    media = [picture(number) for number in range(8)]
    codes.settle(newborn, look, media, seed=0)
    kept = next(look.folder.glob("codes-*.safetensors")).stat().st_mtime_ns
    again = composed.model("llama", "asvr", OPTIONS)
    codes.settle(again, look, media, seed=0)
    assert next(look.folder.glob("codes-*.safetensors")).stat().st_mtime_ns == kept
    ours, theirs = (model.connectors["image"].codebook.books_LKE for model in (newborn, again))
    assert torch.equal(ours, theirs) and not codes.empty(again)
