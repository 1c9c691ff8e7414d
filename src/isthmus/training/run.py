"""All stages of a recipe in one folder, each handed the model of the one before, each resumable.

`runs/NAME/` holds `run.json` (recipe, dtype, fingerprint of the model to start with) and a folder per stage whose
`model/` is a complete Hugging Face directory. A stage with a model is finished and is never run again. Features are
cached in Isthmus's home, for all runs.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isthmus import assets, cards, storage
from isthmus.assembly import compose, load, rebuild, rejoin
from isthmus.config import Recipe, Stage
from isthmus.data import lottery, recent, sets
from isthmus.data.collate import Collator, Look
from isthmus.data.mix import Batches, Mix, Ref
from isthmus.data.recent import Recent
from isthmus.files import read_json, sweep, write_text, writing
from isthmus.model import VLM
from isthmus.prepare import codes, tags
from isthmus.prepare.features import FeatureCache
from isthmus.training import agreement, checkpoint, combination, locks, log, loop, optimizer, parallel, validation
from isthmus.training.budget import steps_for
from isthmus.training.machine import arithmetic
from isthmus.training.parallel import World
from isthmus.training.prefetch import Prefetched
from isthmus.training.step import Step, mixed, unlabelled
from isthmus.types import Batch, ConfigError, DataError, Medium, Sample

NOTE = "run.json"
REMEMBERED = 1 << 14
"""Samples and lengths that a stage keeps at hand: making and rendering them costs more than a small joint's step."""
ROOM = 256 << 20
"""Bytes of pictures that these samples may bring along, in each process that prepares batches."""


class Data:
    """The sets of a stage and the order in which they are drawn."""

    def __init__(self, opened: list[sets.Set], mix: Mix):
        self.sets, self.mix = opened, mix
        self.sample = Recent(self._sample, REMEMBERED, recent.held, ROOM)

    def _sample(self, ref: Ref) -> Sample:
        return self.sets[ref[0]][ref[1]]

    def media(self) -> Media:
        """Every medium of every sample."""
        return Media(self.sets)

    def some_media(self, count: int) -> list[Medium]:
        """At most so many media, of the samples that are drawn first."""
        draws = range(self.mix.epoch_length)
        return list(islice((medium for draw in draws for medium in self.sample(self.mix[draw]).media), count))


@dataclass(frozen=True)
class Media(Iterable[Medium]):
    """What sets show, one medium after another; it can be walked again and again."""

    sets: Sequence[sets.Set]

    def __iter__(self) -> Iterator[Medium]:
        return (medium for some in self.sets for sample in some for medium in sample.media)


def mix_of(stage: Stage, seed: int) -> Data:
    """The training data of a stage."""
    opened = [tags.open_set(source, seed) for source in stage.data]
    return Data(opened, Mix(opened, validation.weights(stage, opened), seed))


def limits(stage: Stage) -> dict[str, Any]:
    """What a stage asks of the collator of its samples."""
    return {
        "max_length": stage.max_length,
        "overlong": stage.overlong,
        "bare": unlabelled(stage.objectives),
        "after_media": bool(stage.after_media),
    }


def encodes_anew(recipe: Recipe, model: VLM) -> bool:
    """Whether pictures are encoded in every step: no cache is wished for, or an encoder trains in some stage."""
    return recipe.engine.cache is False or _encoder_trains(recipe, model)


def _encoder_trains(recipe: Recipe, model: VLM) -> bool:
    # of parameters, and of modules: LoRA's globs name Linears
    named = [*model.named_parameters(), *model.named_modules()]
    names = [name for name, _ in named if name.startswith("encoders.")]
    globs = [glob for stage in recipe.stages for glob, how in stage.train.items() if how.mode != "frozen"]
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


class Feed:
    """Micro-batches of a stage by number of step: what `loop.run_stage` asks for."""

    def __init__(self, stage: Stage, data: Data, collator: Collator, seed: int, world: World = World()):  # noqa: B008
        self.micros, self._data, self._collator = stage.accumulate, data, collator
        self._mixed, self._seed, self._most = mixed(stage.objectives), seed, stage.max_media
        self._batches = Batches(
            data.mix,
            stage.batch_size,
            stage.batching,
            length=functools.lru_cache(REMEMBERED)(lambda ref: collator.lengths(data.sample(ref))),
            seed=seed,
            max_length=stage.max_length,
            media=self._media,
            max_media=stage.max_media,
            world_size=world.size,
            rank=world.rank,
            least=stage.accumulate,
            bare=self._bare if unlabelled(stage.objectives) else lambda ref: False,
        )

    def __call__(self, step: int, micro: int) -> Batch:
        rows = self._batches.rows(step)[micro :: self.micros]
        drawn = self._drawn(step)
        return self._collator.rows([[self._sample(ref, drawn) for ref in row] for row in rows])

    def around(self, step: int) -> range:
        """The steps whose samples are chosen at once with this one's; that is done when any of them is asked for."""
        return self._batches.around(step)[0]

    def _drawn(self, step: int) -> dict[Ref, float]:
        """Where terms are about a share of the samples, what each sample of a step draws."""
        if self._mixed is None:
            return {}
        refs = (ref for row in self._batches.whole(step) for ref in row)
        return lottery.draw(refs, step, self._seed, self._mixed)

    def _sample(self, ref: Ref, drawn: dict[Ref, float]) -> Sample:
        sample = self._data.sample(ref)
        return sample.but(meta={**sample.meta, "draw": drawn[ref]}) if drawn else sample

    def _bare(self, ref: Ref) -> bool:
        """Whether nothing is said of a sample."""
        return all(turn.role != "assistant" for turn in self._data.sample(ref).turns)

    def _media(self, ref: Ref) -> int:
        """How many media a sample has, of which a packed row must hold all."""
        sample = self._data.sample(ref)
        if self._most is not None and len(sample.media) > self._most:
            raise DataError(
                f"sample {sample.id}: {len(sample.media)} media, max_media is {self._most}",
                "raise max_media, or leave the sample out",
            )
        return len(sample.media)

    def first(self, step: int = 0) -> str:
        """What becomes of the batches planned first: how much of them is padding, and how many samples are too long.

        Args:
            step: where the stage begins, or goes on.
        """
        steps, looked_at = self._batches.around(step)
        padding = self._batches.padding_share(steps)
        said = [f"batches: {padding:.1%} of their tokens is padding"]
        samples = f"{looked_at:,} samples from step {steps.start} on" if steps.start else f"first {looked_at:,} samples"
        for ids, fate in (
            (self._collator.dropped, "left out"),
            (self._collator.shortened, "without their oldest turns"),
        ):
            if ids:
                said.append(f"{len(ids)} of the {samples} {fate}, too long")
        return "; ".join(said)


class Run:
    """A recipe in a folder.

    Args:
        recipe: what to train.
        folder: new, or that of an earlier run of the same recipe, which is then gone on with.
        device: where to train.
        console: where progress goes.
        world: the processes that run it together, on one folder that all of them see.

    Raises:
        ConfigError: the folder belongs to another recipe, or the model to start with is no longer the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        console: Console,
        world: World = World(),  # noqa: B008 - frozen
    ):
        self.recipe, self.folder, self.device, self.console, self.world = recipe, folder, device, console, world
        world.lead(self._begin)
        self.dtype = arithmetic(json.loads((folder / NOTE).read_text())["dtype"], device)

    def _begin(self) -> None:
        """Leave a note of the recipe, or find the one that the first call left; clear away what kills left of files."""
        note, recipe = self.folder / NOTE, self.recipe
        sweep(self.folder)
        for stage in recipe.stages:
            sweep(self.folder / stage.name)
            checkpoint.clear(self.folder / stage.name)
        told = {"fingerprint": recipe.fingerprint()}
        if recipe.start is not None:
            told["start"] = storage.fingerprint(recipe.start)
        plain = recipe.model_dump(mode="json")
        if note.is_file() and self._begun():
            known = read_json(note, "delete it: the run goes on by the notes of its stages")
            if known.get("start") != told.get("start") and recipe.start == known["recipe"].get("start"):
                raise ConfigError(
                    f"{recipe.start} is another model than the one that the run in {self.folder} began with",
                    "put the old one back, or name another folder with --out",
                )
            if known["fingerprint"] == told["fingerprint"] and known["recipe"] == plain:
                return
            was = known["recipe"]
            begun = [one for one in was["stages"] if checkpoint.begun(self.folder / one["name"])]
            if wrong := agreement.of_recipe(was | {"stages": begun}, plain):
                raise ConfigError(
                    f"{self.folder} holds a run of another recipe: {agreement.told(wrong)}",
                    f"`isthmus train {self.folder}` goes on with that one; --out names a folder for this one",
                )
            told["dtype"] = known["dtype"]
        else:
            told["dtype"] = str(arithmetic(recipe.dtype, self.device)).removeprefix("torch.")
        with writing(note):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps(told | {"recipe": plain}, indent=1))

    def _begun(self) -> bool:
        """Whether anything was done in the folder; one with a note alone is as good as new."""
        return any(path.name not in (NOTE, "lock") for path in self.folder.iterdir())

    def model_of(self, stage: Stage) -> Path:
        """Where a finished stage leaves its model."""
        return self.folder / stage.name / "model"

    def newborn(self) -> VLM:
        """The model as it is composed, or as the recipe starts with it, before any training.

        A fault of a later stage is told now: before the first one begins, data of all are opened and dealt out to the
        processes, and globs of all are looked up.

        Raises:
            ConfigError: a part of it cannot do what a stage asks, or the model to start with has other parts.
            DataError: a stage's data are not there, or wrong.
        """
        recipe = self.recipe
        opened = [] if self._begun() else [(stage, mix_of(stage, recipe.seed)) for stage in recipe.stages]
        model = compose(recipe, self.dtype) if recipe.start is None else combination.started(recipe, self.dtype)
        combination.check(self.recipe, model, self.device)
        outline = combination.outline(model)
        for stage in recipe.stages:
            if stage.joint:
                rebuild(outline, stage.joint)
            optimizer.choose(Step(outline, stage.objectives), stage)
        for stage, data in opened:
            with combination.of(stage):
                collator = model.processor.collator(None, stage.template, **limits(stage))
                Feed(stage, data, collator, recipe.seed, self.world)
        return model.to(self.device)  # type: ignore[arg-type]

    def look(self, model: VLM) -> Look:
        """How media reach the model: cached features, or pixels where they are encoded in every step."""
        return model.processor.look if encodes_anew(self.recipe, model) else _cache(model)

    def fill(self, look: Look, media: Iterable[Medium]) -> None:
        """Cache what is missing of these media's features, each process its share, with a progress bar.

        They are walked twice where processes are several.
        """
        if not isinstance(look, FeatureCache):
            return
        with self.world.together(), log.counting(self.console, "encoding pictures once") as progress:
            look.fill(media, progress, self.world.rank, self.world.size)
        if self.world.size > 1:
            with self.world.together():
                look.fill(media)  # finds all there, unless machines keep their caches on disks of their own

    def train(self, model: VLM, look: Look) -> VLM | None:
        """Run the stages that are not finished; None if interrupted.

        A model that a stage is done with keeps its encoders alone, whoever still holds it: two LLMs would not fit.
        """
        for stage in self.recipe.stages:
            if self.model_of(stage).is_dir():
                self.console.print(f"stage {stage.name} is finished: {self.model_of(stage)}")
            elif self._stage(model, stage, look) == "interrupted":
                return None
            parallel.empty(model.llm)
            model = load(self.model_of(stage), self.dtype, self.device)
        return model

    def _stage(self, model: VLM, stage: Stage, look: Look) -> str:
        if stage.joint:
            rejoin(model, stage.joint)
        data = mix_of(stage, self.recipe.seed)
        opened = [each.card for each in data.sets]
        self.world.lead(lambda: cards.note_data(self.folder / stage.name, stage, opened, self.recipe.seed))
        self._fill_once(look, stage, data)
        self._fit_codes(look, model, data)
        collator = model.processor.collator(look, stage.template, **limits(stage))
        own = Feed(stage, data, collator, self.recipe.seed, self.world)
        first = own.first(_reached(self.folder / stage.name))
        self.console.print(f"{stage.batching} {first}", soft_wrap=True, markup=False)
        with Prefetched(own, self.recipe.engine.workers) as feed:
            result = loop.run_stage(
                model,
                stage,
                feed,
                self.folder / stage.name,
                steps=steps_for(stage.budget, stage.batch_size, data.mix.epoch_length),
                seed=self.recipe.seed,
                validate=validation.of(stage, data.sets, collator, self.recipe.seed),
                device=self.device,
                dtype=self.dtype,
                console=self.console,
                sample=collator.preview(data.sample(data.mix[0])),
                engine=self.recipe.engine,
                world=self.world,
            )
        return result.state

    def _tag(self, stage: Stage) -> None:
        """Let the classifier see what a stage shows, each process its share, where tags of it stand beside pictures."""
        with self.world.together(), log.counting(self.console, "tagging pictures once") as progress:
            tags.look_ahead(stage.data, self.recipe.seed, progress, self.world.rank, self.world.size)

    def _fill_once(self, look: Look, stage: Stage, data: Data) -> None:
        """Cache a stage's pictures, unless a note beside the cache says that those of its sources are in there.

        A picture that changes on the disk afterwards is encoded when it is read.
        """
        if not isinstance(look, FeatureCache):
            return
        look.open()  # a stage's memory is that of the rows that it reads itself
        note = look.folder / f"filled-{sets.stamp(stage.data, self.recipe.seed)}"
        if not self.world.any(not note.is_file() or int(note.read_text()) > len(look)):
            return
        self._tag(stage)
        self.fill(look, data.media())
        with self.world.together():
            if self.world.main:
                with writing(note):
                    write_text(note, str(len(look)))

    def _fit_codes(self, look: Look, model: VLM, data: Data) -> None:
        """Fill the codebooks that a joint may have, from the first stage's pictures; one process fits them for all."""
        if codes.empty(model):
            if _encoder_trains(self.recipe, model):
                raise ConfigError(
                    "codes are of features that never change, and here an encoder trains in some stage",
                    "leave `encoders.*` out of `train`, or take the recipe without codes",
                )
            media = data.some_media(codes.PICTURES)
            self.console.print("fitting codebooks to the encoder's features, once")
            cache = look if isinstance(look, FeatureCache) else _cache(model)
            self.world.lead(lambda: codes.settle(model, cache, media, self.recipe.seed))
            codes.settle(model, cache, media, self.recipe.seed)


def _reached(folder: Path) -> int:
    """The step from which a stage goes on, as far as the names of its checkpoints tell."""
    ends = (checkpoint.NUMBERED.search(each.name) for each in (folder / "checkpoints").glob("step-*"))
    return max((int(end.group()[1:]) for end in ends if end), default=0)


def _cache(model: VLM) -> FeatureCache:
    return FeatureCache(model.encoders["image"], assets.home() / "features")


def train(recipe: Recipe, folder: Path, device: torch.device, console: Console | None = None) -> VLM | None:
    """Train a recipe from its parts to the model of its last stage; the same call goes on after an interruption.

    Returns:
        the model, or None if it was interrupted.
    """
    world = World.here()
    with world.started(device), locks.alone(folder, world):
        run = Run(recipe, folder, world.device(device), console or Console(quiet=not world.main), world)
        model = run.newborn()
        return run.train(model, run.look(model))
