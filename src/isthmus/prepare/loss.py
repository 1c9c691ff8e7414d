"""What a trained model thinks of samples: the mean loss of their answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus.data.collate import Collator
from isthmus.model import VLM
from isthmus.objectives.lm import cross_entropy, supervised
from isthmus.types import Sample

ROWS = 256
"""Rows of logits that live at once."""


@torch.no_grad()
def mean_loss(model: VLM, collator: Collator, samples: Sequence[Sample], batch_size: int = 16) -> float:
    """Cross-entropy per supervised token over all samples; the model is in evaluation mode."""
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = collator(samples[start : start + batch_size]).to(model.device)
        out, chosen = model.run(batch), supervised(batch)
        assert out.hidden_BTD is not None  # run without `need` goes to the end
        labels = batch.labels_BT
        assert labels is not None  # the collator gives them
        told = labels[:, 1:][chosen]
        hidden_ND = out.hidden_BTD[:, : labels.shape[1] - 1][chosen]
        total += float(cross_entropy(hidden_ND, told, out.head, ROWS))
        count += len(told)
    return total / max(1, count)
