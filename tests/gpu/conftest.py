"""The kernels on a GPU: `python -m pytest tests/gpu`, or `make gpu`.

MOS_GPU_TESTS_DEVICE=cpu TRITON_INTERPRET=1 runs what a GPU is not essential to on the CPU, at small sizes, so that a
machine with a GPU meets no slip of the tests themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "backends" / "triton"), str(Path(__file__).parents[1])]

DEVICE = os.environ.get("MOS_GPU_TESTS_DEVICE", "cuda")
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: cannot be rehearsed on a CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if DEVICE == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
        elif DEVICE == "cpu" and item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.skip(reason="rehearsal on a CPU (MOS_GPU_TESTS_DEVICE=cpu)"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def scale() -> int:
    """By what the sizes of a GPU are divided."""
    return 1 if DEVICE == "cuda" else 128
