"""Operators against hand calculations and known copies; a score that was learnt finds captions that were exchanged."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageFilter
from transformers import CLIPConfig, CLIPModel

import composed
import tiny
from isthmus.data import formats, writers
from isthmus.prepare import copies, filters
from isthmus.prepare.filters import Rule
from isthmus.prepare.loss import mean_loss
from isthmus.types import Box, ConfigError, Image, Sample, Turn


def sample(said: str, *pictures: Pillow.Image) -> Sample:
    return Sample((Turn.say("user", *map(Image, pictures), "What?"), Turn.say("assistant", said)))


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Pillow.Image:
    """A picture with structure at every scale."""
    dice = np.random.default_rng(seed)
    coarse = Pillow.fromarray(dice.integers(0, 255, (6, 8, 3), np.uint8)).resize(size, Pillow.Resampling.BICUBIC)
    return Pillow.blend(coarse, Pillow.fromarray(dice.integers(0, 255, (size[1], size[0], 3), np.uint8)), 0.1)


def test_words_by_hand() -> None:
    assert filters.words(sample("A red fox.")) == 3
    assert filters.repetition(sample("a b c a b c")) == pytest.approx(1 - 3 / 4)
    assert filters.repetition(sample("yes")) == 0
    assert filters.alphanumeric(sample("ab !!")) == 0.5 and np.isnan(filters.alphanumeric(sample(" ")))


def test_pictures_by_hand() -> None:
    shown = sample("x", Pillow.new("RGB", (40, 10)), Pillow.new("RGB", (30, 30)))
    assert filters.side(shown) == 10 and filters.aspect(shown) == 4
    assert np.isnan(filters.side(sample("x"))) and filters.sharpness(sample("x", Pillow.new("RGB", (9, 9), "red"))) == 0
    dot = np.zeros((5, 5), np.uint8)
    dot[2, 2] = 10
    laplacian = np.zeros((5, 5))
    laplacian[2, 2], laplacian[1, 2], laplacian[3, 2], laplacian[2, 1], laplacian[2, 3] = -40, 10, 10, 10, 10
    assert filters.sharpness(sample("x", Pillow.fromarray(dot))) == pytest.approx(laplacian.var())
    sharp, blurred = noise(0), noise(0).filter(ImageFilter.GaussianBlur(3))
    assert filters.sharpness(sample("x", blurred)) < 0.1 * filters.sharpness(sample("x", sharp))


def test_pictures_are_known_again_when_scaled_and_compressed_and_others_are_not() -> None:
    seen = copies.SamePicture()
    assert seen([sample("x", noise(seed)) for seed in range(60)]) == [0.0] * 60
    changed = []
    for seed in range(60):
        stream = io.BytesIO()
        ImageEnhance.Brightness(noise(seed).resize((96, 72))).enhance(0.95).save(stream, "JPEG", quality=80)
        changed.append(sample("y", Pillow.open(stream)))
    assert sum(seen(changed)) >= 57
    assert seen([sample("x", noise(0), noise(999)), sample("x")]) == [0.0, 0.0]


def test_texts_are_known_again_when_little_changed_and_signatures_estimate_jaccard() -> None:
    dice = random.Random(0)
    texts = [" ".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(40)]
    seen = copies.SameText()
    assert sum(seen([sample(text) for text in texts])) == 0
    assert sum(seen([sample(text[:-1] + "!") for text in texts])) == 40
    half = [text[:60] + " ".join(dice.choices("ABCDEF0123456789", k=30)) for text in texts]
    assert sum(seen([sample(text) for text in half])) <= 2
    one, other = texts[0], texts[0][:90]
    sets = [set(copies._shingles(text)) for text in (one, other)]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert (seen.signature(one) == seen.signature(other)).mean() == pytest.approx(jaccard, abs=0.13)


def test_a_wording_that_was_drawn_hides_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    Pillow.new("RGB", (8, 8)).save(tmp_path / "a.png")
    dice = random.Random(0)
    said = [" ".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=10)) for _ in range(100)]
    bare = {
        "captions": [{"caption": one} for one in said],
        "questions": [{"question": f"{one}?", "answer": "red"} for one in said],
        "choices": [{"question": f"{one}?", "choices": ["x y z", "red"], "answer": 1} for one in said],
    }
    for name, records in bare.items():
        file, written = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        rows = [{"id": str(place), "image": "a.png", **one} for place, one in enumerate(records * 2)]
        file.write_text(json.dumps(rows))
        samples = formats.load(file)
        assert len({one.turns[0].text.replace(text, "") for one, text in zip(samples, said * 2)}) > 4
        assert copies.SameText()(samples) == [0.0] * 100 + [1.0] * 100
        writers.write(samples, written, "messages")  # what was drawn is part of the file now
        assert copies.SameText()(formats.load(written)) == [0.0] * 100 + [1.0] * 100


def test_regions_are_part_of_what_is_said() -> None:
    detected = [
        Sample((Turn.say("user", "Where?"), Turn.say("assistant", Box((0, 0, 0.5, corner), "fox"))))
        for corner in (1, 0.7)
    ]
    assert copies.SameText()([*detected, detected[0]]) == [0, 0, 1]


def test_copies_are_looked_for_in_a_test_set_alone() -> None:
    pictures = [noise(seed) for seed in range(3)]
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    for finder, held, trained in (
        (
            copies.SamePicture(),
            [pictures[0]],
            [[pictures[1]], [pictures[1]], [pictures[0]], [pictures[2], pictures[0]]],
        ),
        (copies.SameText(), text, ["1 2 3 4 5 6", "1 2 3 4 5 6", text, text[:-1] + "!"]),
    ):
        as_samples = [sample(one) if isinstance(one, str) else sample("x", *one) for one in (held, *trained)]
        finder.against(as_samples[:1])
        assert finder(as_samples[1:]) == [0, 0, 1, 1]


def test_rules_keep_ranges_shares_and_the_middle() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 100.0])
    assert Rule.parse("words=2..3").keeps(values).tolist() == [False, True, True, False, True, False]
    assert Rule.parse("aspect=..3").keeps(values).tolist() == [True, True, True, False, True, False]
    assert Rule.parse("score=top40%").keeps(values).tolist() == [False, False, False, True, True, True]
    assert Rule.parse("side=1.5sigma").keeps(values).tolist() == [True, True, True, True, True, False]
    assert Rule.parse("score=-0.5..0.25") == Rule("score", -0.5, 0.25)
    for wrong in ("words", "size=1..2", "words=a..b", "words=5", "words=1.2.3..4", "words=3..1.2.3", "words=1..2."):
        with pytest.raises(ConfigError, match="no rule is written"):
            Rule.parse(wrong)
    assert Rule.parse("score=top100%").keeps(values).all() and Rule.parse("score=.5..1") == Rule("score", 0.5, 1.0)
    with pytest.raises(ConfigError, match="score=top150% asks for more than all") as refused:
        Rule.parse("score=top150%")
    assert refused.value.remedy == "write a share of at most 100, such as =top70%"


def test_each_rule_counts_what_it_alone_dropped_whatever_the_batches() -> None:
    samples = [sample("a " * number) for number in range(1, 101)]
    rules = [Rule.parse("words=11.."), Rule.parse("words=..50"), Rule.parse("repetition=..0.97")]
    measures = {name: filters.PLAIN[name]() for name in ("words", "repetition")}
    stats = filters.measured(samples, measures)
    found = filters.kept(stats, rules)
    repeated = [number for number in range(11, 51) if 1 - 1 / (number - 2) > 0.97]
    assert found.dropped == {"words": 60, "repetition": len(repeated)}
    assert found.numbers.tolist() == [number - 1 for number in range(11, 51) if number not in repeated]
    halves = [filters.measured(samples[part], measures) for part in (slice(0, 37), slice(37, None))]
    assert all(np.array_equal(np.concatenate([half[name] for half in halves]), stats[name]) for name in stats)


# ---------------------------------------------------------------------------------------------- scores

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP that has learnt four colours, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.tokenizer()
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        **tower,
        "vocab_size": tiny.VOCAB,
        "max_position_embeddings": 16,
        "eos_token_id": tiny.EOS,
        "pad_token_id": tiny.PAD,
    }
    vision = {**tower, "image_size": tiny.IMAGE, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = tiny.processor("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    score = filters.ClipScore.load(str(folder), torch.device("cpu"))
    said = score.tokenizer(list(COLOURS), padding="max_length", max_length=16, return_tensors="pt")
    pixels = score.images([Pillow.new("RGB", (32, 32), colour) for colour in COLOURS], return_tensors="pt")
    optimizer = torch.optim.AdamW(score.model.parameters(), 1e-2)
    for _ in range(80):
        loss = score.model(**said, **pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    score.model.save_pretrained(folder)
    return folder


def auc(good: list[float], bad: list[float]) -> float:
    return float(np.mean([(one > other) + 0.5 * (one == other) for one in good for other in bad]))


def test_a_clip_finds_captions_that_were_exchanged(clip: Path) -> None:
    score = filters.ClipScore.load(str(clip), torch.device("cpu"))
    right = [sample(colour, Pillow.new("RGB", (20, 30), colour)) for colour in COLOURS]
    wrong = [sample(COLOURS[number - 1], Pillow.new("RGB", (30, 20), colour)) for number, colour in enumerate(COLOURS)]
    values = score([*right, sample("no picture"), *wrong])
    assert np.isnan(values[4]) and auc(values[:4], values[5:]) > 0.9
    said = score.tokenizer(["red"], padding="max_length", max_length=16, return_tensors="pt")
    pixels = score.images([Pillow.new("RGB", (20, 30), "red")], return_tensors="pt")
    with torch.no_grad():
        out = score.model(**said, **pixels)
    assert values[0] == pytest.approx((out.logits_per_image / score.model.logit_scale.exp()).item(), abs=1e-5)


def test_dependence_is_the_loss_that_a_picture_saves() -> None:
    vlm = composed.stir(composed.model())
    shown = sample("red", Pillow.new("RGB", (32, 32), "red"))
    grey = sample("red", Pillow.new("RGB", (32, 32), (127, 127, 127)))
    measure = filters.Dependence(vlm)
    values = measure([shown, grey, sample("red")])
    assert values[0] != 0 and values[1] == 0 and np.isnan(values[2])
    batch = vlm.processor.collator()([shown])
    with torch.no_grad():
        out = vlm.run(batch)
    log_p = out.head(out.hidden_BTD[:, :-1]).log_softmax(-1)
    labels = batch.labels_BT[:, 1:]
    chosen = labels != -100
    told = log_p[chosen].gather(1, labels[chosen][:, None]).mean()
    assert values[0] == pytest.approx(float(told) + mean_loss(vlm, measure.collator, [grey]), abs=1e-5)
