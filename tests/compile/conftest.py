"""The kernels as compiled for GPUs that need not be there: a process of its own, without TRITON_INTERPRET.

Triton decides when it is imported whether kernels are interpreted, so these tests do not run beside others.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    skip = pytest.mark.skip(
        reason="TRITON_INTERPRET=1 is set: these tests compile; run pytest tests/compile without it"
    )
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)
