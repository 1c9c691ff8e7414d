"""lmms-eval as it is, started where torchvision lacks its compiled operators: two are declared first, never run."""

from __future__ import annotations

import contextlib

import torch

library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a torchvision with operators of its own
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lmms_eval.__main__ import cli_evaluate  # noqa: E402

cli_evaluate()
