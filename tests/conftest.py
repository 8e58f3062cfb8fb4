"""Shared by all tests: Hypothesis profiles and how a missing part is handled."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that load ONNX Runtime by themselves (docs/adr/0001)

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that: what we
# test is what a child does with Ctrl-C, wherever pytest was started.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("default"), max_examples=20)
settings.load_profile("default")


def missing(part: str) -> None:
    """Skip with the reason on a developer's machine; fail where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{part} is missing on a CI machine")
    pytest.skip(f"{part} is missing")


def need(*modules: str) -> None:
    """Packages of the environment for development, which others may lack."""
    for module in modules:
        if find_spec(module) is None:
            missing(f"the package {module}")
