"""Several processes train what one trains: same losses, same weights, same order, and none waits in vain."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks
import small
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from isthmus.config import AlignerConfig, Engine, Recipe, Stage
from isthmus.connectors.codebook import Codebook
from isthmus.training.log import read_rows
from isthmus.training.parallel import World
from isthmus.training.run import Feed, mix_of
from isthmus.training.toy import toy, write_data
from isthmus.types import Batch, ConfigError, DataError, Sample, Turn

TRAIN = {
    "connectors.*": 1e-3,
    "llm.model.layers.0.*": {"lr": 1e-3, "weight_decay": 0.1},
    "llm.model.layers.1.*": {"mode": {"r": 2}, "lr": 1e-4},
}
"""A joint with a scalar in it that reads the LLM's embedding table, a layer in full, and LoRA in another."""
ENGINES = {
    "ddp": Engine(),
    "fsdp": Engine(parallel="fsdp"),
    "fsdp, frozen parts whole": Engine(parallel="fsdp", shard_frozen=False),
}

SHARED = [
    ("connectors.*", "ddp"),
    ("*", "fsdp"),
    pytest.param("connectors.*", "fsdp", marks=pytest.mark.slow),
    pytest.param("*", "ddp", marks=pytest.mark.slow),
]
"""What trains, and under which engine."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    parts = small.parts(tmp_path_factory.mktemp("parts"))
    return parts.override(["aligner.options.normalise=true", "aligner.options.words=0.1"])


def stage(**changes: Any) -> Stage:
    return small.stage(**{"train": TRAIN, "clip": 0.5, "save_every": 0.34, "evaluate_every": 0.5, **changes})


def alone(recipe: Recipe, made: Stage, folder: Path, **more: Any) -> Path:
    ranks.learn(World(), recipe, made, folder, **more)
    return folder


def same(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    """Equal curves of training and validation, and equal weights."""
    first, second = (read_rows(folder / "metrics.jsonl") for folder in (one, other))
    for key in ("loss", "validation_loss", "grad_norm"):
        a, b = ([(row["step"], row[key]) for row in rows if key in row] for rows in (first, second))
        assert [step for step, _ in a] == [step for step, _ in b] and a
        near = 5 * tolerance if key == "grad_norm" else tolerance  # a root of sums of many squares
        assert [value for _, value in a] == pytest.approx([value for _, value in b], rel=near, abs=near), key
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(
    "engine, accumulate",
    [("ddp", 2), ("fsdp", 2), pytest.param("fsdp, frozen parts whole", 1, marks=pytest.mark.slow)],
)
def test_two_processes_equal_one(recipe: Recipe, tmp_path: Path, engine: str, accumulate: int) -> None:
    one = alone(recipe, stage(), tmp_path / "one", steps=4)
    made = stage(accumulate=accumulate)
    assert ranks.start(2, ranks.learn, recipe, made, tmp_path / "two", ENGINES[engine], ranks.Share, 4) == [0, 0]
    same(one, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_four_processes_equal_one(recipe: Recipe, tmp_path: Path, engine: str) -> None:
    made = stage(batch_size=8, recompute=True)
    one = alone(recipe, made, tmp_path / "one")
    assert ranks.start(4, ranks.learn, recipe, made, tmp_path / "four", ENGINES[engine]) == [0] * 4
    same(one, tmp_path / "four")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_bases_are_sharded_too(recipe: Recipe, tmp_path: Path, bits: int) -> None:
    packed = recipe.override([f"llm.bits={bits}"])
    made = stage(train={"connectors.*": 1e-3, "llm.*layers.*": {"mode": {"r": 2}, "lr": 1e-3}})
    one = alone(packed, made, tmp_path / "one", steps=4)
    made = made.but(accumulate=2)
    assert ranks.start(2, ranks.learn, packed, made, tmp_path / "two", ENGINES["fsdp"], ranks.Share, 4) == [0, 0]
    same(one, tmp_path / "two")


@pytest.mark.parametrize(("train", "engine"), SHARED)
def test_a_process_without_pictures_neither_hangs_nor_changes_anything(
    recipe: Recipe, tmp_path: Path, engine: str, train: str
) -> None:
    """Every second row is text, which is all that the second process gets; encoders that train have pixels."""
    made = stage(
        train={"connectors.*": 1e-3} if train == "connectors.*" else {**TRAIN, "encoders.*layers.0.mlp.*": 1e-4}
    )
    vlm = small.build(recipe)
    lonely = ranks.Share(vlm, size=4, world=World(1, 2, 1), texts=(1, 3))
    assert not lonely(0, 0).media and ranks.Share(vlm, size=4, world=World(0, 2, 0), texts=(1, 3))(0, 0).media
    one = alone(recipe, made, tmp_path / "one", steps=4, texts=(1, 3))
    assert ranks.start(2, _mixed, recipe, made, tmp_path / "two", ENGINES[engine]) == [0, 0]
    same(one, tmp_path / "two")


def _mixed(*arguments: Any) -> None:
    ranks.learn(*arguments, steps=4, texts=(1, 3))


@pytest.mark.parametrize(("train", "engine"), SHARED)
def test_a_step_in_which_no_process_has_pictures_moves_no_connector(
    recipe: Recipe, tmp_path: Path, engine: str, train: str
) -> None:
    """One process has no gradient there; zeros would let momentum and decay of AdamW move it."""
    made = stage(train={"connectors.*": 1e-2} if train == "connectors.*" else TRAIN)
    one = alone(recipe, made, tmp_path / "one", silent=(2, 3))
    assert ranks.start(2, _silent, recipe, made, tmp_path / "two", ENGINES[engine]) == [0, 0]
    same(one, tmp_path / "two")


def _silent(*arguments: Any) -> None:
    ranks.learn(*arguments, silent=(2, 3))


CODES = {"levels": 2, "size": 5, "width": 16, "depth": 1}
CAPTIONS = {"queries": 3, "layers": 2, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0}
CAPTIONS |= {"text": True, "vocabulary": 321, "length": 8}
OVER_PICTURES = {
    "asvr": ("asvr", CODES, ["lm", "asvr"], {"connectors.*": 1e-2}),
    "victor": ("victor", {"size": 16}, ["lm", "victor"], {"connectors.*": 1e-3, "heads.*": 1e-2, "llm.*.0.*": 1e-3}),
    "itg": ("blip2", CAPTIONS, ["itg"], {"connectors.*.words.*": 1e-2, "connectors.*.text_feed.*": 1e-2}),
}
"""Terms that run heads over pictures: joint, its options, objectives, and what trains."""


@pytest.mark.parametrize(
    ("term", "engine"),
    [
        ("asvr", "ddp"),
        ("victor", "fsdp"),
        ("itg", "ddp"),
        pytest.param("asvr", "fsdp", marks=pytest.mark.slow),
        pytest.param("victor", "ddp", marks=pytest.mark.slow),
        pytest.param("itg", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_head_over_pictures_keeps_step_where_a_process_or_all_have_none(
    recipe: Recipe, tmp_path: Path, term: str, engine: str
) -> None:
    joint, options, terms, train = OVER_PICTURES[term]
    made = stage(train=train, objectives=terms)
    joined = recipe.but(aligner=AlignerConfig(name=joint, options=options))
    more = {"steps": 5, "texts": (1, 3), "silent": (2, 3) if "lm" in terms else (), "feed": Coded}
    one = alone(joined, made, tmp_path / "one", **more)
    assert ranks.start(2, _learn, joined, made, tmp_path / "two", ENGINES[engine], more) == [0, 0]
    same(one, tmp_path / "two")


@dataclass
class Coded(ranks.Share):
    """Where the joint has codebooks, they are filled."""

    def __post_init__(self) -> None:
        for connector in self.vlm.connectors.modules():
            if isinstance(connector, Codebook):
                connector.books_LKE.normal_(generator=torch.Generator().manual_seed(0))


def _learn(world: World, recipe: Recipe, made: Stage, folder: Path, engine: Engine, more: dict[str, Any]) -> None:
    ranks.learn(world, recipe, made, folder, engine, **more)


def test_a_process_without_labels_neither_hangs_nor_changes_anything(tmp_path: Path) -> None:
    """Pictures of which nothing is said, and a head of the LLM that trains and is not the embedding."""
    recipe = small.parts(tmp_path / "parts", "qwen2")
    made = stage(train={"connectors.*": 1e-3, "llm.*": 1e-3}, objectives=["lm", {"name": "vdep", "weight": 0.1}])
    more = {"steps": 3, "texts": (1, 3), "feed": Bare}
    one = alone(recipe, made, tmp_path / "one", **more)
    assert ranks.start(2, _learn, recipe, made, tmp_path / "two", ENGINES["ddp"], more) == [0, 0]
    same(one, tmp_path / "two")


class Bare(ranks.Share):
    """The rows that are called texts are pictures without words."""

    def __call__(self, step: int, micro: int) -> Batch:
        mine = range(step * self.size, (step + 1) * self.size)[self.world.rank :: self.world.size]
        return self.vlm.processor.collator(bare=True)([self._sample(number) for number in mine])

    def _sample(self, number: int) -> Sample:
        one = small.sample(number)
        return one.but(turns=(Turn.say("user", *one.media),)) if number % self.size in self.texts else one


@pytest.mark.slow
def test_a_hundred_steps_without_pictures_do_not_hang(recipe: Recipe, tmp_path: Path) -> None:
    made = stage(train={"connectors.*": 1e-3}, save_every=None, evaluate_every=None)
    began = time.monotonic()
    assert ranks.start(2, _hundred, recipe, made, tmp_path / "two", ENGINES["ddp"]) == [0, 0]
    assert time.monotonic() - began < 60 and checkpoint_state(tmp_path / "two")["step"] == 100


def _hundred(*arguments: Any) -> None:
    ranks.learn(*arguments, steps=100, silent=tuple(range(100)))


def test_a_loss_that_compares_the_samples_of_a_batch_is_that_of_one_process(recipe: Recipe, tmp_path: Path) -> None:
    made = stage(train={"connectors.*": 1e-3}, objectives=["contrastive"])
    one = alone(recipe, made, tmp_path / "one", steps=4, texts=(1, 3))
    assert ranks.start(2, _mixed, recipe, made, tmp_path / "two", ENGINES["fsdp"]) == [0, 0]
    same(one, tmp_path / "two")
    assert [checkpoint_state(tmp_path / run)["samples"] for run in ("one", "two")] == [16, 16]


def checkpoint_state(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "state.json").read_text())


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_what_two_processes_saved_one_goes_on_with(recipe: Recipe, tmp_path: Path, engine: str) -> None:
    """A signal to one of them stops both after the same step."""
    whole = alone(recipe, stage(), tmp_path / "whole")
    assert ranks.start(2, ranks.learn, recipe, stage(), tmp_path / "parts", ENGINES[engine], ranks.Stopped) == [0, 0]
    assert checkpoint_state(tmp_path / "parts")["step"] == 3
    assert not (tmp_path / "parts" / "model").exists()
    alone(recipe, stage(), tmp_path / "parts")
    same(whole, tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")])
def test_what_two_processes_saved_four_go_on_with(recipe: Recipe, tmp_path: Path, before: str, after: str) -> None:
    whole = alone(recipe, stage(), tmp_path / "whole")
    assert ranks.start(2, ranks.learn, recipe, stage(), tmp_path / "parts", ENGINES[before], ranks.Stopped) == [0, 0]
    assert ranks.start(4, ranks.learn, recipe, stage(), tmp_path / "parts", ENGINES[after]) == [0] * 4
    same(whole, tmp_path / "parts")


def test_a_fault_in_one_process_ends_all_with_it_and_what_was_done_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    assert ranks.start(2, ranks.fail, recipe, stage(), tmp_path, ENGINES["fsdp"]) == [3, 3]
    assert [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)] == ["cat.png: cannot be read\nmend it"] * 2
    assert checkpoint_state(tmp_path)["step"] == 2


def test_a_disk_that_is_full_for_the_first_process_is_told_by_all(recipe: Recipe, tmp_path: Path) -> None:
    """The only save is the one that a picture brings about that the second cannot read."""
    assert ranks.start(2, ranks.full, recipe, stage(save_every=None, evaluate_every=None), tmp_path) == [1, 1]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert all("step-0000002: cannot be written (No space left on device)" in each for each in said)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_validation_that_fails_in_all_processes_loses_no_step(recipe: Recipe, tmp_path: Path, engine: str) -> None:
    whole = alone(recipe, stage(), tmp_path / "whole")
    parts = (recipe, stage(), tmp_path / "parts", ENGINES[engine])
    assert ranks.start(2, ranks.unvalidated, *parts, True) == [3, 3]
    assert checkpoint_state(tmp_path / "parts")["step"] == 3
    assert ranks.start(2, ranks.learn, *parts) == [0, 0]
    same(whole, tmp_path / "parts")


def test_a_validation_that_fails_in_one_process_leaves_nobody_waiting(recipe: Recipe, tmp_path: Path) -> None:
    assert ranks.start(2, ranks.unvalidated, recipe, stage(), tmp_path, ENGINES["ddp"], False)[1] == 3
    assert checkpoint_state(tmp_path)["step"] == 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_weights_that_an_update_breaks_in_one_process_are_saved_by_none(
    recipe: Recipe, tmp_path: Path, engine: str
) -> None:
    assert ranks.start(2, ranks.broken, recipe, stage(), tmp_path, ENGINES[engine]) == [4, 4]
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert first == second and re.match(r"step 3: vlm\.\S+ is not finite after the update\n", first)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_validation_that_is_no_number_is_named_by_all_and_kept_by_the_one_that_had_it(
    recipe: Recipe, tmp_path: Path, engine: str
) -> None:
    assert ranks.start(2, ranks.invalid, recipe, stage(), tmp_path, ENGINES[engine]) == [4, 4]
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    sample = ranks.Share(small.build(recipe))(51, 0).ids[0]
    tensor = f"a value in the pixels of image 1 (sample {sample})"
    assert first == second and first.startswith(
        f"step 3: the validation loss is not finite; the first such tensor is {tensor}\n"
    )
    assert json.loads((tmp_path / "bad_batch_1.json").read_text())["tensor"] == tensor
    assert not (tmp_path / "bad_batch.json").exists() and checkpoint_state(tmp_path)["step"] == 3


def test_no_gradient_is_missed_by_processes_one_of_which_had_some(recipe: Recipe, tmp_path: Path) -> None:
    made = stage(train={"connectors.*": 1e-3}, evaluate_every=None)
    feeds = {"one": {"texts": (1, 3)}, "none": {"silent": (0, 1)}}
    for name, feed in feeds.items():
        assert ranks.start(2, ranks.heard, recipe, made, tmp_path / name, {"steps": 2, **feed}) == [0, 0]
    one, none = ((tmp_path / name / "heard.txt").read_text() for name in feeds)
    assert "no gradient has reached" not in one and "nothing was trained, for no gradient has reached vlm.conn" in none


def test_a_process_that_is_killed_is_said_to_be_gone(tmp_path: Path) -> None:
    assert ranks.start(2, ranks.gone, tmp_path) == [0, -9]
    assert (tmp_path / "said").read_text() == "another process of this training is gone"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's threads")
def test_ddp_is_never_the_last_to_hold_the_group(tmp_path: Path) -> None:
    """It would end gloo's threads under the interpreter's lock: now and then a process that failed hung for good."""
    assert ranks.start(2, ranks.leave, tmp_path) == [0, 0]
    for rank in range(2):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert before == after > 1


def test_processes_agree(tmp_path: Path) -> None:
    assert ranks.start(3, ranks.agree, tmp_path) == [0, 0, 0]
    for rank in range(3):
        *sums, one, none, first = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sums == [[3, 3], [1.5], [0.5 if rank == 0 else 0]] and (one, none, first) == (True, False, 7)


def test_the_launcher_describes_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.here() == World(0, 1, 0) and World.here().main
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        World.here()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    world = World.here()
    assert world == World(3, 4, 1) and not world.main
    assert world.device(torch.device("cuda")) == torch.device("cuda:1")
    assert world.device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("batching", ["bucketed", "shuffled", "packed"])
def test_a_step_has_the_same_samples_for_any_number_of_processes(tmp_path: Path, batching: str) -> None:
    recipe = toy(tmp_path)
    made = recipe.stages[0].but(batching=batching, batch_size=8, accumulate=2, max_length=128)
    data, collator = mix_of(made, 0), small.build(recipe).processor.collator(max_length=128)
    orders = []
    for size in (1, 2, 4):
        feeds = [Feed(made, data, collator, 0, World(rank, size)) for rank in range(size)]
        steps = [[feed(step, micro).ids for feed in feeds for micro in range(2)] for step in range(5)]
        assert all(ids for step in steps for ids in step)
        orders.append([sorted(sample for ids in step for sample in ids) for step in steps])
    assert orders[0] == orders[1] == orders[2]


def test_neither_processes_nor_accumulation_nor_batching_change_the_gradient(tmp_path: Path) -> None:
    """16 samples a step: at once, in 2 micro-batches of 8 or in 8 of 2, dealt to one process and to two."""
    recipe = toy(tmp_path)
    plain = recipe.stages[0].but(batch_size=16, accumulate=1, max_length=128, clip=None, evaluate_every=None)
    made = {
        f"{batching}-{micros}": plain.but(batching=batching, accumulate=micros)
        for batching in ("bucketed", "shuffled", "packed")
        for micros in (1, 2, 8)
    }
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    ranks.gradients(World(), recipe, made, one)
    assert ranks.start(2, ranks.gradients, recipe, made, two) == [0, 0]
    for name in made:
        expected = load_file(one / f"{name.partition('-')[0]}-1.safetensors")
        for folder in (one, two):
            found = load_file(folder / f"{name}.safetensors")
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6, msg=f"{folder.name} {name} {key}")


def test_packed_rows_hold_so_many_pictures_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    made = recipe.stages[0].but(batching="packed", batch_size=8, max_length=256, max_media=2)
    vlm, data = small.build(recipe), mix_of(made, 0)
    collator = vlm.processor.collator(max_length=256)
    shown = [
        int(batch.media["image"].row_N.bincount().max())
        for batch in map(Feed(made, data, collator, 0), range(4), [0] * 4)
    ]
    assert set(shown) == {2}
    with pytest.raises(DataError, match="media, max_media is 0"):
        Feed(made.model_copy(update={"max_media": 0}), data, collator, 0)(0, 0)

    lengths = sorted(collator.lengths(data.sample(data.mix[index])) for index in range(256))
    tight = vlm.processor.collator(max_length=lengths[128], overlong="drop")
    feed = Feed(made.but(batching="bucketed", max_media=None), data, tight, 0)
    too_long = {
        data.sample(data.mix[index]).id for index in range(256) if not tight.lengths(data.sample(data.mix[index]))
    }
    assert f"; {len(too_long)} of the first 40 samples left out, too long" in feed.first()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe of two stages with pictures of their own, and where one process has run it, its features beside it."""
    folder = tmp_path_factory.mktemp("stages")
    recipe, data = toy(folder / "parts"), write_data(folder / "other", 40)
    for file in data.parent.glob("*.png"):
        ImageOps.invert(Image.open(file)).save(file)
    align, tune = recipe.stages
    full = {glob: how.but(mode="full") for glob, how in tune.train.items()}  # dropout differs by rank
    recipe = recipe.but(stages=(align, tune.but(data=[str(data)], train=full)))
    ranks.start(1, ranks.whole, recipe, folder / "one", folder / "home")
    return recipe, folder


@pytest.mark.parametrize("engine", ENGINES)
def test_all_stages_of_a_recipe_and_its_feature_cache(stages: tuple[Recipe, Path], tmp_path: Path, engine: str) -> None:
    """Each process encodes its share of the pictures, once; packed rows and a split batch, as one process has them."""
    recipe, one = stages
    made = recipe.but(engine=ENGINES[engine])
    assert ranks.start(2, ranks.whole, made, tmp_path / "two", tmp_path / "home") == [0, 0]
    for name in ("align", "tune"):
        # the cache was filled in other batches, and eight steps at a high rate make more of the last digit
        same(one / "one" / name, tmp_path / "two" / name, tolerance=1e-4)
    ours, theirs = (rows_of(home / "features") for home in (one / "home", tmp_path / "home"))
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for key, row in ours.items():
        torch.testing.assert_close(row, theirs[key], rtol=1e-5, atol=1e-5)


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """Rows of a feature cache by key."""
    (index,) = folder.rglob("index.txt")
    keys = index.read_text().split()
    rows = torch.from_file(str(index.with_name("rows.bin")), size=index.with_name("rows.bin").stat().st_size // 4)
    return dict(zip(keys, rows.view(len(keys), -1)))
