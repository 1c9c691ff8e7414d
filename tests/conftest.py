"""Fixtures that several test files share."""

from __future__ import annotations

import os

import pytest
import torch

from isthmus import assets

# Equal bits need equal numbers of threads, in here and in the processes that tests start; tiny models gain by one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded() -> None:
    """The embedded models and data; `make test` fetches them first, and without them the tests that need them fail."""
    if lacking := assets.missing("demo"):
        pytest.fail(f"{', '.join(lacking)} missing; run `isthmus data fetch demo`", pytrace=False)
    assets.fetch("demo")
