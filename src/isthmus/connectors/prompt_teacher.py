"""The P-Former: BERT reads a sentence and tells which prompt would make a frozen LLM write it.

Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText, `blip2_models/pformer_opt.py`.

Differs:
    - the number of prompt vectors is the configured number of queries; the released code takes it from the padded
      length of the text, so that both had to be 32;
    - it is newborn unless the joint's `qformer` names BERT (see `connectors.qformer_weights`), has no token types, and
      its vocabulary's last entry stands for a masked word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors.qformer import EPSILON, Attention, FeedForward, Shape, Words, as_bert


class TextLayer(nn.Module):
    """A layer of BERT."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.attention = Attention(shape)
        self.feed = FeedForward(shape)

    def forward(self, t_NTW: Tensor, real_N1T: Tensor) -> Tensor:
        """t [N, T, W] -> [N, T, W], where every word looks at the real ones."""
        return self.feed(self.attention(t_NTW, t_NTW, real_N1T))


class PromptTeacher(nn.Module):
    """Sentences -> prompts in the LLM's input space.

    Args:
        shape: sizes, those of the Q-Former that it teaches; of `queries` come the prompt's vectors.
        out: D, the LLM's width.
    """

    def __init__(self, shape: Shape, out: int):
        super().__init__()
        self.queries, self.blank = shape.queries, shape.vocabulary - 1
        self.words = Words(shape)
        self.enter = nn.Sequential(nn.LayerNorm(shape.width, eps=EPSILON), nn.Dropout(shape.dropout))
        self.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.layers))
        self.spread = nn.Linear(shape.width, shape.queries * shape.width)
        self.bend = nn.Linear(shape.width, shape.width)
        self.project = nn.Linear(shape.width, out)
        self.contrast = nn.Linear(shape.width, shape.contrast)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.apply(as_bert)

    def forward(self, ids_NT: Tensor) -> Tensor:
        """ids [N, T], negative at padding -> the prompt [N, Q, D]."""
        states_NQW = self.spread(self.read(ids_NT)).unflatten(-1, (self.queries, -1))
        return self.project(self.bend(states_NQW).tanh())

    def read(self, ids_NT: Tensor) -> Tensor:
        """What the first word has gathered of its sentence, [N, W]."""
        real_N1T = (ids_NT >= 0).unsqueeze(1)
        t_NTW = self.enter(self.words(ids_NT))
        for layer in self.layers:
            t_NTW = layer(t_NTW, real_N1T)
        return t_NTW[:, 0]

    def direction(self, ids_NT: Tensor) -> Tensor:
        """What sentences stand for where they are compared with each other, of length 1, [N, C]."""
        return F.normalize(self.contrast(self.read(ids_NT)), dim=-1)

    def mask(self, ids_NT: Tensor, share: float) -> Tensor:
        """The ids with about a `share` of the words hidden; never the first one, which gathers, nor padding."""
        hidden_NT = (torch.rand(ids_NT.shape, device=ids_NT.device) < share) & (ids_NT >= 0)
        hidden_NT[:, 0] = False
        return ids_NT.masked_fill(hidden_NT, self.blank)
