"""Cached features are the encoder's own, bit for bit, whatever happens to the run that writes them."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import composed
from composed import picture
from isthmus import parts
from isthmus.config import EncoderConfig, LoRA, ObjectiveConfig, Stage
from isthmus.encoders import Encoder
from isthmus.model import VLM
from isthmus.prepare import features as prepare
from isthmus.prepare.features import FeatureCache
from isthmus.training.run import train
from isthmus.training.step import Step
from isthmus.types import DataError, Image, IsthmusError

PICTURES = [picture(seed, 40) for seed in range(7)]


def encoder(vision: str = "clip", dtype: torch.dtype = torch.float32, **fields) -> Encoder:
    return parts.load_encoder(EncoderConfig(source=str(composed.vision_folder(vision)), **fields), dtype)


def cache(folder: Path, batch_size: int = 3, **fields) -> FeatureCache:
    return FeatureCache(encoder(**fields), folder, batch_size)


@torch.no_grad()
def own(seen: Encoder, media: list[Image]) -> torch.Tensor:
    """Features of each picture by itself."""
    look = composed.model("llama").processor.look("image", media)[0]
    return torch.cat([seen(one[None].to(next(seen.parameters()).dtype)).x_NSE for one in look])


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of matrix products, which follows batch shape and threads; rows differ by far more."""
    return torch.allclose(a.float(), b.float(), atol=1e-5 if a.dtype == torch.float32 else 0.05)


def right(found: FeatureCache, media: list[Image]) -> bool:
    return near(found("image", media)[1].x_NSE, own(found.encoder, media))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_cached_equals_on_the_fly(tmp_path, vision, dtype):
    found = cache(tmp_path, vision=vision, dtype=dtype, taps=(0, -1), batch_size=len(PICTURES))
    look = composed.model("llama", vision=vision).processor.look
    expected = found.encoder(look("image", PICTURES)[0].to(dtype))
    for again in (found, cache(tmp_path, vision=vision, dtype=dtype, taps=(0, -1))):
        pixels, features = again("image", PICTURES[::-1])
        assert pixels is None and features.grid == expected.grid
        assert features.x_NSE.dtype == dtype and near(features.x_NSE, expected.x_NSE.flip(0))
        assert features.taps.keys() == expected.taps.keys()
        assert all(near(features.taps[name], tap.flip(0)) for name, tap in expected.taps.items())


def test_each_picture_is_encoded_once(tmp_path, monkeypatch):
    found, seen = cache(tmp_path), []
    encode = found._encode
    monkeypatch.setattr(found, "_encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    told: list[tuple[int, int]] = []
    assert found.fill([*PICTURES, *PICTURES], lambda *done: told.append(done)) == 7
    assert sorted(seen) == [1, 3, 3] and told == [(3, 7), (6, 7), (7, 7)] and len(found) == 7
    copy = Image(PICTURES[0].source.copy())
    assert found.fill([copy]) == 0 and len(seen) == 3
    assert cache(tmp_path).fill(PICTURES) == 0


def test_the_folder_depends_on_all_that_features_depend_on(tmp_path):
    variants = [
        {},
        {"vision": "vit"},
        {"layer": -1},
        {"image_size": 48},
        {"aspect": "crop"},
        {"class_token": "keep"},
        {"taps": (1,)},
        {"dtype": torch.bfloat16},
    ]
    assert len({cache(tmp_path, **variant).folder for variant in variants}) == len(variants)
    assert cache(tmp_path).folder == cache(tmp_path).folder
    converted = FeatureCache(encoder().to(torch.bfloat16), tmp_path)
    assert converted.folder != cache(tmp_path).folder, "an encoder that was converted later writes other rows"


@torch.no_grad()
def _changed(how: str, seed: int, folder: Path) -> VLM:
    """A model whose encoder is another than its source's, saved and loaded."""
    torch.manual_seed(seed)
    model = composed.model("llama")
    if how == "adapted":
        model.add_lora(["encoders.image.*fc1"], LoRA(r=2), "sight")
        for name, weight in model.encoders.named_parameters():
            if ".grafts." in name:
                weight.normal_()
    else:
        for weight in model.encoders.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.config.trained = ["encoders.*"] if how == "trained" else []
    model.save_pretrained(folder, whole=how == "whole")
    return VLM.from_pretrained(folder)


@pytest.mark.parametrize("how", ["trained", "adapted", "whole"])
def test_an_encoder_that_was_changed_has_features_of_its_own(tmp_path, how):
    """Also where two models lie in the same folder, one after the other."""
    base = cache(tmp_path)
    base("image", PICTURES)
    one, two = (_changed(how, seed, tmp_path / "model").encoders["image"] for seed in (1, 2))
    kept = [FeatureCache(each, tmp_path, 3) for each in (one, two)]
    assert all(right(each, PICTURES) for each in kept)
    assert len({base.folder, *(each.folder for each in kept)}) == 3
    assert VLM.from_pretrained(tmp_path / "model").encoders["image"].own == two.own
    plain = composed.model("llama")
    plain.save_pretrained(tmp_path / "plain")
    assert FeatureCache(VLM.from_pretrained(tmp_path / "plain").encoders["image"], tmp_path).folder == base.folder


@pytest.mark.parametrize("file", ["rows.bin", "index.txt"])
@pytest.mark.parametrize("cut", [1, 65, 200])
@torch.no_grad()
def test_an_interrupted_write_loses_the_torn_rows_alone(tmp_path, file, cut):
    cache(tmp_path).fill(PICTURES)
    path = next(tmp_path.rglob(file))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - cut)
    again = cache(tmp_path)
    lost = 7 - len(again)
    assert 1 <= lost <= 4
    assert right(again, PICTURES[: 7 - lost])
    assert again.fill(PICTURES) == lost
    assert right(again, PICTURES) and right(cache(tmp_path), PICTURES)
    assert again.fill([picture(99, 40)]) == 1 and right(cache(tmp_path), [*PICTURES, picture(99, 40)])


def test_rows_without_an_index_are_written_over(tmp_path):
    cache(tmp_path).fill(PICTURES)
    next(tmp_path.rglob("index.txt")).unlink()
    again = cache(tmp_path)
    assert len(again) == 0 and again.fill(PICTURES[3:]) == 4 and right(cache(tmp_path), PICTURES[3:])


def test_two_caches_in_one_folder_see_each_others_rows(tmp_path):
    one, two = cache(tmp_path), cache(tmp_path)
    one.fill(PICTURES[:4])
    assert two.fill(PICTURES) == 3, "what the other has computed meanwhile is not computed again"
    assert right(one, PICTURES[::-1]) and right(two, PICTURES)
    assert next(tmp_path.rglob("index.txt")).read_text().count("\n") == 7


def test_two_caches_at_the_same_time_do_not_mix_rows(tmp_path):
    caches = [cache(tmp_path, batch_size=1) for _ in range(2)]
    threads = [threading.Thread(target=each.fill, args=(PICTURES[:: 1 - 2 * n],)) for n, each in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right(each, PICTURES) for each in (*caches, cache(tmp_path)))


@pytest.mark.parametrize("file", ["rows.bin", "index.txt"])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch, file):
    found = cache(tmp_path)
    found.fill(PICTURES[:2])
    genuine = Path.open

    def full(path, mode="r", *args, **kwargs):
        if path.name != file or "a" not in mode:
            return genuine(path, mode, *args, **kwargs)
        stream = genuine(path, mode, *args, **kwargs)
        stream.write(b"torn")
        stream.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", full)
        with pytest.raises(IsthmusError, match="No space left on device"):
            found.fill(PICTURES)
    assert right(found, PICTURES[:2])
    assert right(cache(tmp_path), PICTURES) and right(found, PICTURES)


def test_a_bad_picture_leaves_what_was_read_before_it(tmp_path):
    found = cache(tmp_path, batch_size=2)
    with pytest.raises(DataError, match="damaged|not a picture"):
        found.fill([*PICTURES[:2], Image(b"no picture")])
    assert len(found) == 2 and right(found, PICTURES[:2]) and found.fill(PICTURES[:2]) == 0


@pytest.mark.parametrize(("kind", "together"), [("cpu", True), ("cuda", False)])
def test_batches_are_encoded_one_at_a_time_on_an_accelerator(tmp_path, monkeypatch, kind, together):
    """There activations of several would be held at once; pictures are read meanwhile."""
    found, now, most = cache(tmp_path, batch_size=1), [], []

    def encode(pixels: torch.Tensor) -> np.ndarray:
        now.append(pixels)
        time.sleep(0.02)
        most.append(len(now))
        now.pop()
        return np.zeros((1, found._row_bytes), np.uint8)

    monkeypatch.setattr(prepare.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(prepare.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(FeatureCache, "_device", SimpleNamespace(type=kind))
    monkeypatch.setattr(found, "_encode", encode)
    assert found.fill(PICTURES) == 7 and (max(most) > 1) is together


def test_a_failure_outside_the_threads_leaves_none_behind(tmp_path):
    found, threads, before = cache(tmp_path, batch_size=1), torch.get_num_threads(), threading.active_count()

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:  # whose traceback holds the frames for as long as it lives
        found.fill(PICTURES, interrupted)
    assert caught and threading.active_count() == before and torch.get_num_threads() == threads
    assert len(found) == 1


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_the_training_loss_through_the_cache_is_the_same(tmp_path, family):
    model = composed.stir(composed.model(family))
    step = Step(model, [ObjectiveConfig(name="lm")])
    found = FeatureCache(model.encoders["image"], tmp_path)
    losses = []
    for look in (None, found):
        batch = model.processor.collator(look)(composed.MIX)
        assert (batch.media["image"].pixels is None) == (look is found)
        losses.append(step(batch, step.scales([batch]))[0])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


def test_a_run_that_encodes_in_every_step_learns_the_same_and_keeps_nothing(tmp_path, monkeypatch):
    fields = {"name": "align", "data": [str(composed.questions(tmp_path, 8))], "train": {"connectors.*": 1e-2}}
    stage = Stage.model_validate({**fields, "budget": {"steps": 2}, "batch_size": 4})
    learnt = {}
    for choice in (None, False):
        home = tmp_path / f"home-{choice}"
        monkeypatch.setenv("ISTHMUS_HOME", str(home))
        recipe = composed.recipe("llama").but(stages=(stage,), dtype="float32", engine={"cache": choice})
        trained = train(recipe, tmp_path / f"run-{choice}", torch.device("cpu"))
        assert trained is not None and bool(list(home.rglob("rows.bin"))) == (choice is None)
        learnt[choice] = trained.connectors.state_dict()
    newborn = composed.model("llama").connectors.state_dict()
    assert not any(torch.equal(tensor, newborn[name]) for name, tensor in learnt[None].items())
    torch.testing.assert_close(learnt[False], learnt[None], atol=1e-5, rtol=1e-5)


def test_a_batch_hashes_each_picture_once(tmp_path, monkeypatch):
    found = cache(tmp_path)
    found.fill(PICTURES)
    hashed, real = [], prepare.pictures.content_key
    monkeypatch.setattr(prepare.pictures, "content_key", lambda source: hashed.append(source) or real(source))
    assert right(found, PICTURES[:3]) and len(hashed) == 3


def test_rows_that_were_read_are_let_go_when_it_is_mapped_afresh(tmp_path):
    """A stage's memory is not that of the stages before it, whose pictures may be gigabytes."""
    found = cache(tmp_path)
    before = found("image", PICTURES)[1].x_NSE
    if not (maps := Path("/proc/self/smaps")).is_file():
        pytest.skip("the system does not tell what is mapped")

    def held() -> int:  # kB of the rows that are in this process's memory
        _, _, told = maps.read_text().partition(str(found.folder / "rows.bin"))
        return int(told.split("Rss:")[1].split()[0])

    assert held() > 0
    found.open()
    assert held() == 0
    assert torch.equal(found("image", PICTURES)[1].x_NSE, before)


def test_a_cache_is_filled_from_more_than_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WINDOW", 2)
    told: list[tuple[int, int]] = []
    found = cache(tmp_path)
    assert found.fill(iter([*PICTURES, *PICTURES]), lambda *done: told.append(done)) == 7
    assert told[-1] == (7, 7) and right(found, PICTURES) and len(found) == 7
