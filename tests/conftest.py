"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from isthmus import assets


@pytest.fixture(scope="session")
def embedded() -> None:
    """The embedded models and data; `make test` fetches them first, and without them the tests that need them fail."""
    if lacking := assets.missing("demo"):
        pytest.fail(f"{', '.join(lacking)} missing; run `isthmus data fetch demo`", pytrace=False)
    assets.fetch("demo")
