"""All stages of a recipe in one folder, each handed the model of the one before, each resumable.

`runs/NAME/` holds `run.json` (recipe, dtype, features), `features/`, and a folder per stage whose `model/` is a
complete Hugging Face directory. A stage with a model is finished and is never run again.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from isthmus import assets
from isthmus.assembly import compose, load
from isthmus.config import Recipe, Source, Stage
from isthmus.data import sets
from isthmus.data.collate import Collator, Look
from isthmus.data.mix import Batches, Mix, Ref
from isthmus.model import VLM
from isthmus.prepare.features import FeatureCache
from isthmus.training import log, loop
from isthmus.training.machine import arithmetic
from isthmus.training.step import Step, held_out
from isthmus.types import Batch, ConfigError, Medium, Sample

HELD_OUT = 24
"""Validation samples per source of a stage."""


REMEMBERED = 1 << 14
"""Samples and lengths that a stage keeps at hand: making and rendering them costs more than a small joint's step."""


class Data:
    """The sets of a stage and the order in which they are drawn."""

    def __init__(self, opened: list[sets.Set], mix: Mix):
        self.sets, self.mix = opened, mix
        self.sample = functools.lru_cache(REMEMBERED)(self._sample)

    def _sample(self, ref: Ref) -> Sample:
        return self.sets[ref[0]][ref[1]]

    def media(self) -> list[Medium]:
        """Every medium of every sample."""
        return [medium for some in self.sets for sample in some for medium in sample.media]


def mix_of(stage: Stage, seed: int) -> Data:
    """The training data of a stage."""
    opened = [sets.open_set(source, seed) for source in stage.data]
    return Data(opened, Mix(opened, [source.weight for source in stage.data], seed))


class Feed:
    """Micro-batches of a stage by number of step: what `loop.run_stage` asks for."""

    def __init__(self, stage: Stage, data: Data, collator: Collator, seed: int):
        self.micros, self._data, self._collator = stage.accumulate, data, collator
        self._batches = Batches(
            data.mix,
            stage.batch_size,
            stage.batching,
            length=functools.lru_cache(REMEMBERED)(lambda ref: collator.lengths(data.sample(ref))),
            seed=seed,
            max_length=stage.max_length,
            media=lambda ref: len(data.sample(ref).media),
        )

    def __call__(self, step: int, micro: int) -> Batch:
        rows = self._batches.rows(step)[micro :: self.micros]
        return self._collator.rows([[self._data.sample(ref) for ref in row] for row in rows])


class Run:
    """A recipe in a folder.

    Args:
        recipe: what to train.
        folder: new, or that of an earlier run of the same recipe, which is then gone on with.
        device: where to train.
        console: where progress goes.

    Raises:
        ConfigError: the folder belongs to another recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, console: Console):
        self.recipe, self.folder, self.device, self.console = recipe, folder, device, console
        note = folder / "run.json"
        if note.is_file():
            known = json.loads(note.read_text())
            if known["fingerprint"] != recipe.fingerprint():
                raise ConfigError(
                    f"{folder} holds a run of another recipe ({known['fingerprint']}, not {recipe.fingerprint()})",
                    "name another folder with --out, or delete that one",
                )
            self.dtype = arithmetic(known["dtype"], device)
        else:
            self.dtype = arithmetic(recipe.dtype, device)
            folder.mkdir(parents=True, exist_ok=True)
            entry = {"fingerprint": recipe.fingerprint(), "dtype": str(self.dtype).removeprefix("torch.")}
            note.write_text(json.dumps(entry | {"recipe": recipe.model_dump(mode="json")}, indent=1))

    def model_of(self, stage: Stage) -> Path:
        """Where a finished stage leaves its model."""
        return self.folder / stage.name / "model"

    def newborn(self) -> VLM:
        """The model as it is composed, before any training."""
        model = compose(self.recipe, self.dtype)
        return model.to(self.device)  # type: ignore[arg-type]

    def look(self, model: VLM) -> Look:
        """How media reach the model: cached features, or pixels where an encoder trains in some stage."""
        if self._encoder_trains(model):
            return model.processor.look
        return FeatureCache(model.encoders["image"], assets.home() / "features")

    def fill(self, look: Look, media: Sequence[Medium]) -> None:
        """Cache what is missing of these media's features, with a progress bar."""
        if isinstance(look, FeatureCache):
            with log.counting(self.console, "encoding pictures once") as progress:
                look.fill(media, progress)

    def train(self, model: VLM, look: Look) -> VLM | None:
        """Run the stages that are not finished; None if interrupted."""
        for stage in self.recipe.stages:
            if self.model_of(stage).is_dir():
                self.console.print(f"stage {stage.name} is finished: {self.model_of(stage)}")
                model = load(self.model_of(stage), self.dtype, self.device)
                continue
            if self._stage(model, stage, look) == "interrupted":
                return None
            model = load(self.model_of(stage), self.dtype, self.device)
        return model

    def _stage(self, model: VLM, stage: Stage, look: Look) -> str:
        data = mix_of(stage, self.recipe.seed)
        self.fill(look, data.media())
        collator = model.processor.collator(look, stage.template, max_length=stage.max_length, overlong=stage.overlong)
        feed = Feed(stage, data, collator, self.recipe.seed)
        renderer = model.processor.renderer(stage.template)
        result = loop.run_stage(
            model,
            stage,
            feed,
            self.folder / stage.name,
            steps=loop.steps_for(stage.budget, stage.batch_size, data.mix.epoch_length),
            seed=self.recipe.seed,
            validate=self._validation(stage, collator),
            device=self.device,
            dtype=self.dtype,
            console=self.console,
            sample=renderer.preview(renderer.render(data.sample(data.mix[0]).turns)),
        )
        return result.state

    def _validation(self, stage: Stage, collator: Collator) -> Callable[[Step], float]:
        """The stage's loss on samples held out of its own sources."""
        samples = [sample for source in stage.data for sample in self._held_out(source)]
        size = stage.batch_size
        return held_out([collator(samples[start : start + size]) for start in range(0, len(samples), size)])

    def _held_out(self, source: Source) -> list[Sample]:
        opened = sets.open_set(source.but(split="val", limit=None), self.recipe.seed)
        spread = max(1, len(opened) // HELD_OUT)
        return list(opened[::spread])[:HELD_OUT]

    def _encoder_trains(self, model: VLM) -> bool:
        names = [name for name, _ in model.named_parameters() if name.startswith("encoders.")]
        globs = [glob for stage in self.recipe.stages for glob, how in stage.train.items() if how.mode != "frozen"]
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def train(recipe: Recipe, folder: Path, device: torch.device, console: Console | None = None) -> VLM | None:
    """Train a recipe from its parts to the model of its last stage; the same call goes on after an interruption.

    Returns:
        the model, or None if it was interrupted.
    """
    run = Run(recipe, folder, device, console or Console())
    model = run.newborn()
    return run.train(model, run.look(model))
