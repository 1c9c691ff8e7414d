"""Several encoders at once: every picture seen by each, their tokens put side by side or one behind the other.

Side by side along the width as in Prismatic VLMs (arXiv 2402.07865) and Eagle (arXiv 2408.15998); interleaved, place by
place, as in Tong et al., "Eyes Wide Shut" (arXiv 2401.06209).

Differs:
- Every encoder has channels of its own in both ways of joining, zero elsewhere when interleaved: the first Linear of
  any connector then is one adapter per encoder, as the paper has it, and no connector needs to know of this file.
- Grids that differ are resampled to the first encoder's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import EncoderConfig
from isthmus.data.views import Views
from isthmus.encoders import Encoder
from isthmus.types import ConfigError, Features


def members(config: EncoderConfig) -> tuple[EncoderConfig, ...]:
    """The encoders of a config, one by one.

    Raises:
        ConfigError: they cannot be joined, with the reason.
    """
    if not config.also:
        return (config,)
    if any(other.also for other in config.also):
        raise ConfigError("encoder.also inside encoder.also", "list all encoders in the first one's `also`")
    if any(other.taps for other in config.also):
        raise ConfigError("taps of an encoder in `also`", "name taps of the first encoder alone")
    if len({config.aspect, *(other.aspect for other in config.also)}) > 1:
        raise ConfigError("encoders that square a picture in different ways", "give all of them the same aspect")
    if any(one.bits for one in (config, *config.also)):
        raise ConfigError("bits for one of several encoders", "leave bits out, or use one encoder")
    return (config.but(also=()), *config.also)


class Several(Encoder):
    """Encoders as one. Its pixels are the encoders' own behind one another, [N, P] (`data.views`).

    Args:
        encoders: the first one's grid and taps are those of all.
        join: `concatenate` along the width, or `interleave` along the tokens: at each place one token per encoder.

    Raises:
        ConfigError: an encoder's tokens do not form a grid.
    """

    def __init__(self, encoders: Sequence[Encoder], join: Literal["concatenate", "interleave"]) -> None:
        super().__init__()
        self.members, self.join = nn.ModuleList(encoders), join
        if any(each.tokens != each.grid[0] * each.grid[1] for each in encoders):
            raise ConfigError("several encoders are joined place by place, and a class token has none", "drop it")
        first = encoders[0]
        self.size, self.aspect, self.tap_widths = first.size, first.aspect, first.tap_widths
        self.widths = [each.width for each in encoders]
        self.width = sum(self.widths)
        self._grid = first.grid
        self.grid = (first.grid[0], first.grid[1] * (len(encoders) if join == "interleave" else 1))
        self._pixels = [each.blank().numel() for each in encoders]
        self.processor = Views([each.processor for each in encoders])

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, str]:
        each = {str(index): json.dumps(member.identity()) for index, member in enumerate(self._encoders())}
        return each | {"join": self.join}

    def blank(self) -> Tensor:
        """Pixels of one empty medium, [1, P]."""
        return torch.zeros(1, sum(self._pixels))

    def forward(self, pixels: Tensor) -> Features:
        """pixels [N, P] -> x [N, S, E], rows first, with the first encoder's taps."""
        encoders = self._encoders()
        views = pixels.split(self._pixels, 1)
        seen = [each(view.view(len(view), 3, each.size, each.size)) for each, view in zip(encoders, views)]
        x = [resample(features.x_NSE, each.grid, self._grid) for features, each in zip(seen, encoders)]
        joined = torch.cat(x, -1) if self.join == "concatenate" else self._interleave(x)
        return Features(joined, seen[0].taps, self.grid)

    def _interleave(self, x: Sequence[Tensor]) -> Tensor:
        """[N, S, E_i] of each -> [N, S * encoders, sum of E_i]: the first place of all, the second place of all, ..."""
        starts = [sum(self.widths[:index]) for index in range(len(x))]
        placed = [
            F.pad(part, (start, self.width - start - width)) for part, start, width in zip(x, starts, self.widths)
        ]
        return torch.stack(placed, 2).flatten(1, 2)

    def _encoders(self) -> list[Encoder]:
        return [member for member in self.members if isinstance(member, Encoder)]


def resample(x_NSE: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Tokens of one grid on another, linearly and without aliasing; untouched where the grids agree."""
    if grid == wanted:
        return x_NSE
    x_NEHW = x_NSE.float().transpose(1, 2).unflatten(2, grid)
    x_NEHW = F.interpolate(x_NEHW, wanted, mode="bilinear", antialias=True)
    return x_NEHW.flatten(2).transpose(1, 2).to(x_NSE.dtype)
