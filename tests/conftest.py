"""What every test shares: its place in the order, one thread, one seed, and the number of examples that hypothesis draws.

HYPOTHESIS_PROFILE picks a profile: `ci` (the default) draws the same few examples every time, `thorough` draws many
new ones. Warnings are errors; pyproject.toml says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=60, derandomize=True, deadline=None, suppress_health_check=_quiet)
settings.register_profile("thorough", max_examples=500, deadline=None, suppress_health_check=_quiet, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes seconds comes first, so that workers end together."""
    items.sort(key=lambda item: not {"slow", "tools"}.intersection(mark.name for mark in item.iter_markers()))


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """Each test starts from the same generator state, and leaves the default dtype as it found it and nothing compiled."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
