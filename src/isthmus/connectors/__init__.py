"""The joints' moving part: from encoder tokens to vectors in the LLM's input space."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from isthmus.types import Context, Features


class Connector(nn.Module):
    """Maps `Features` to `y_NQD`.

    Where pictures differ in size, `Features.lengths_N` holds S per picture and `tokens` gives Q per picture;
    rows of y beyond it are padding.
    """

    reads_context: ClassVar[bool] = False
    """True if `forward` depends on the question, so that its output is not reused across questions."""
    multiplies_first: ClassVar[bool] = False
    """True if a matrix product is all that `forward` does with x: under autocast it takes x in any dtype."""

    def tokens(self, s: int) -> int:
        """Q for S encoder tokens, known before any forward."""
        raise NotImplementedError

    def forward(self, features: Features, context: Context) -> Tensor:
        """features x [N, S, E] -> y [N, Q, D]."""
        raise NotImplementedError
