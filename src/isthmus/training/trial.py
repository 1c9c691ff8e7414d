"""A short training on some samples, measured on others: what `prepare.probe` repeats over pools and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from isthmus.config import Budget, Recipe, Source
from isthmus.data import writers
from isthmus.prepare.loss import mean_loss
from isthmus.training.run import train
from isthmus.types import IsthmusError, Sample


@dataclass(frozen=True)
class Trial:
    """Trains the last stage of a recipe on a pool, from newborn parts, and gives the loss on fixed samples.

    Args:
        recipe: model and stage; its data are replaced.
        sample: the pool's samples by number.
        fixed: what every trial is measured on.
        steps: of each training.
        device: where.
    """

    recipe: Recipe
    sample: Callable[[int], Sample]
    fixed: Sequence[Sample]
    steps: int
    device: torch.device

    def __call__(self, numbers: np.ndarray, seed: int) -> float:
        with TemporaryDirectory(prefix="isthmus-probe-") as folder:
            data = Path(folder) / "pool.jsonl"
            writers.write(map(self.sample, numbers.tolist()), data, "messages")
            model = train(self._recipe(data, seed), Path(folder) / "run", self.device, Console(quiet=True))
            if model is None:
                raise IsthmusError("the probe was interrupted", "start it again")
            template = self.recipe.stages[-1].template
            return mean_loss(model.eval(), model.processor.collator(template=template), self.fixed)

    def _recipe(self, data: Path, seed: int) -> Recipe:
        stage = self.recipe.stages[-1].but(
            data=(Source(name=str(data), split="test"),),
            budget=Budget(steps=self.steps),
            evaluate_every=None,
            save_every=None,
        )
        return self.recipe.but(stages=(stage,), eval=(), seed=seed)
