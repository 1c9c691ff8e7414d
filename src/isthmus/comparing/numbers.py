"""Numbers as people write them on the command line: `6M`, `10m`, `2e15flops`, `50k-samples`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
WRITTEN = re.compile(r"(\d+\.?\d*(?:e\d+)?)([kMGTP]?)(?:-?([a-z]+))?")


def read(text: str, units: Mapping[str, float]) -> tuple[float, str] | None:
    """A number above 0 that is written with one of these units, multiplied by that, and the unit.

    None where nothing such is written, or more than a float holds. The unit "" is that of a bare number.
    """
    found = WRITTEN.fullmatch(text.strip())
    unit = found[3] or "" if found else ""
    if found is None or unit not in units:
        return None
    value = float(found[1]) * PREFIXES[found[2]] * units[unit]
    return (value, unit) if 0 < value < math.inf else None
