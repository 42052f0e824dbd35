"""Tests marked `root` build real labs; elsewhere they are skipped, and say why."""

from __future__ import annotations

import pytest

from thinwire.lab import abilities


@pytest.fixture(autouse=True)
def _lab_needs_root(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") and (obstacle := abilities().obstacle):
        pytest.skip(f"no lab on this machine: {obstacle}")
