"""Settings of the whole suite: reproducible, offline, one thread, and no output that was never written."""

from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(_name, _value)

import everyday  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from everyday import pytest_addoption, pytest_collection_modifyitems  # noqa: E402, F401
from hypothesis import HealthCheck, settings  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

settings.register_profile(
    "mos_kernels",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mos_kernels")
torch.set_num_threads(1)

# Before torch.empty is replaced: the meta device and dynamo (imported above) memorise it on first use.
_device_constructors()

_POISONED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: torch.empty keeps its own contents in this test")
    everyday.pytest_configure(config)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype in _POISONED and not torch.compiler.is_compiling():
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(request, monkeypatch):
    """Fill what torch.empty and its kin return with NaN, so that an output that nobody wrote cannot pass."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _backend_of_its_own(monkeypatch):
    """No test sees the backend that another one, or the caller's environment, selected."""
    monkeypatch.delenv("MOS_BACKEND", raising=False)
    monkeypatch.setattr("mos_kernels.backends._selected", None)


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """For the next test: torchao 0.16 reduces it for the whole process when it quantises."""
    yield
    torch.set_float32_matmul_precision("highest")
