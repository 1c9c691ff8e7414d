"""A slow copy of the connectors, which objectives may learn from.

The momentum model of ALBEF, Li et al. 2021, arXiv 2107.07651, after MoCo, He et al. 2019, arXiv 1911.05722. Official
code: github.com/salesforce/ALBEF, `models/model_pretrain.py`.

Differs:
    - the encoder is not copied; where it trains, the slow copy reads the same features as the connectors;
    - the copy reads without dropout;
    - it moves after each update of the weights and not before the next forward, which is the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from isthmus.training.parallel import like, whole


class Momentum(nn.Module):
    """Connectors that trail behind those that train; never trained, saved with checkpoints and not with the model.

    Args:
        connectors: by kind of medium; what trains of them requires gradients already.
        decay: the share of itself that the copy keeps at every step.
    """

    updates: Tensor
    """How often it has moved."""

    def __init__(self, connectors: nn.ModuleDict, decay: float):
        super().__init__()
        self.connectors, self.decay = copy.deepcopy(connectors).requires_grad_(False).eval(), decay
        device = next(connectors.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device=device))

    @torch.no_grad()
    def follow(self, connectors: nn.ModuleDict) -> None:
        """Go (1 - decay) of the way to the connectors; where these are sharded, all processes have to call it."""
        for (name, fast), (same, slow) in zip(connectors.named_parameters(), self.connectors.named_parameters()):
            assert name == same  # a copy
            if fast.requires_grad:
                slow.lerp_(like(whole(fast.detach()), slow), 1 - self.decay)
        self.updates += 1
