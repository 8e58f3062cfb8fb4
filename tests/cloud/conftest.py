"""Shared by the cloud's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """The cloud runs on asyncio alone."""
    return "asyncio"
