"""Shared by all tests: Hypothesis profiles and how a missing part is handled."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that load ONNX Runtime by themselves (docs/adr/0001)

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def missing(part: str) -> None:
    """Skip with the reason on a developer's machine; fail where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{part} is missing on a CI machine")
    pytest.skip(f"{part} is missing")
