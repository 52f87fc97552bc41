"""The kernels in Triton's interpreter, in a process of their own: `TRITON_INTERPRET=1 pytest tests/backends/triton`.

Triton decides when it is imported whether kernels are interpreted, so these tests do not run beside others. The suite's
conftest.py fills what torch.empty returns with NaN.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="TRITON_INTERPRET=1 is not set: run TRITON_INTERPRET=1 pytest tests/backends/triton")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shipped_settings: sums are split into as many parts as on a GPU")


@pytest.fixture(autouse=True)
def _few_parts(request, monkeypatch):
    """Two parts of every split sum, where a GPU has up to 64: their number is what the interpreter's time goes into.

    And walks over all of the tokens, as of a GPU where there are many.
    """
    if request.node.get_closest_marker("shipped_settings"):
        return
    from mos_kernels.backends.triton import launch

    def settings(kernel, device, T):
        stored = launch.stored_settings(kernel, device, T)
        fewer = {"SPLITS": 2, "PER_SM": 1}
        return {name: min(value, fewer.get(name, value)) for name, value in stored.items()}

    monkeypatch.setattr(launch, "settings", settings)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels launched in this test, in order."""
    from mos_kernels.backends.triton import launch

    names, run = [], launch.launch

    def counted(kernel, grid, *args, **constants):
        if 0 not in grid:
            names.append(kernel.fn.__name__.removesuffix("_kernel"))
        run(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "launch", counted)
    return names


@pytest.fixture
def described(monkeypatch) -> set[tuple]:
    """The kernels that are launched, with the types of their arguments. They do not run."""
    from mos_kernels.backends.triton import launch

    seen = set()

    def describe(kernel, grid, tensor, arguments, **constants):
        kinds = [str(getattr(argument, "dtype", type(argument).__name__)) for argument in arguments]
        seen.add((kernel.fn.__name__, *kinds, *sorted(constants.items())))

    monkeypatch.setattr(launch, "launch", describe)
    return seen
