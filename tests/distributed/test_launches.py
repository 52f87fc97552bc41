"""Two processes on the CPU: the checks of this folder, run by pytest in each process that a launcher starts.

The checks are ordinary tests in files that pytest does not collect by itself, several files in a launch, since starting
one takes longer than they do. By hand, one of them is

    torchrun --standalone --nproc-per-node 2 -m pytest tests/distributed/checks_fsdp.py -k meta
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0", "--config_file")


@pytest.fixture
def passes_in_each_process(request):
    """The checks that `-m` chooses here too, in a launch."""
    return partial(_passes_in_each_process, request.config.getoption("markexpr"))


def _passes_in_each_process(chosen: str, launcher: tuple[str, ...], *checks: str, **environment: str) -> None:
    tests = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-m", chosen)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *tests, *(str(HERE / name) for name in checks)], cwd=HERE.parents[1],
        env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:]
    assert done.stdout.count(" passed") == 2 and " skipped" not in done.stdout, done.stdout[-20000:]


@pytest.mark.budget(100)
def test_torchrun(passes_in_each_process):
    passes_in_each_process(TORCHRUN, "checks_fsdp.py", "checks_tensor_parallel.py", "checks_ddp.py")


@pytest.mark.full
def test_trainer(passes_in_each_process):
    """In a launch of its own, since accelerate's state is one for a process."""
    passes_in_each_process(TORCHRUN, "checks_trainer_fsdp.py")


@pytest.mark.parametrize("settings", ["accelerate_ddp.yaml", "accelerate_fsdp2.yaml"])
@pytest.mark.full
def test_accelerate(passes_in_each_process, settings):
    passes_in_each_process((*ACCELERATE, str(HERE / settings)), "checks_accelerate.py")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.full
def test_deepspeed(passes_in_each_process):
    passes_in_each_process(TORCHRUN, "checks_deepspeed.py", DS_ACCELERATOR="cpu")
