"""Sizes as people write them."""

from __future__ import annotations

import re


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | str | None, name: str = "max_memory") -> int | None:
    """Reads a size such as `2**30`, `"2GiB"` or `"500MB"`; None means no limit.

    Raises:
        ValueError: if the value is negative or cannot be read.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{name}={value!r} is not a size; write bytes as a number or e.g. '2GiB'")
        return int(float(match[1]) * _UNITS[match[2].lower()])
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError(f"{name}={value!r} must be a whole number of bytes, at least 0; or a string such as '2GiB'")
    return int(value)
