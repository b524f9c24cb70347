"""Layouts that only slow tests look at, and that are not run without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def marked(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """Parameters of a test, of which some are marked as slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def wanted(names: Iterable[str], slow: Collection[str], request: pytest.FixtureRequest) -> list[str]:
    """All of them if a slow test of the file is among those that run."""
    is_slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    return [name for name in names if is_slow or name not in slow]
