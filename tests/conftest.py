"""Markers for what needs more than the README installs, and hypothesis's settings."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

PRESENT = {
    "torch": importlib.util.find_spec("torch") is not None,
    "browser": shutil.which("chromium") is not None,
}


def pytest_configure(config: pytest.Config) -> None:
    """Say what the markers mean."""
    config.addinivalue_line("markers", "torch: needs PyTorch (squeeze[train])")
    config.addinivalue_line("markers", "browser: needs chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, unless SQUEEZE_REQUIRE insists."""
    required = os.environ.get("SQUEEZE_REQUIRE", "").replace("chromium", "browser")
    for item in items:
        for name, present in PRESENT.items():
            if item.get_closest_marker(name) and not present and name not in required:
                item.add_marker(pytest.mark.skip(reason=f"no {name} here"))
