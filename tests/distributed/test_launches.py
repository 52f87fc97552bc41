"""Two processes on the CPU: the checks of this folder, run by pytest in each process that a launcher starts.

The checks are ordinary tests in files that pytest does not collect by itself; by hand, one of them is

    torchrun --standalone --nproc-per-node 2 -m pytest tests/distributed/checks_fsdp.py -k meta
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")


def launched(*arguments: str) -> None:
    """Run it; where a process failed, fail with the output of both."""
    done = subprocess.run(
        (sys.executable, *arguments), cwd=HERE.parents[1], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:]


@pytest.mark.parametrize("checks", ["checks_ddp.py", "checks_fsdp.py", "checks_tensor_parallel.py"])
def test_torchrun(checks):
    launched(*TORCHRUN, *PYTEST, str(HERE / checks))


@pytest.mark.parametrize("settings", ["accelerate_ddp.yaml", "accelerate_fsdp2.yaml"])
def test_accelerate(settings):
    launched(*ACCELERATE, "--config_file", str(HERE / settings), *PYTEST[:2], *PYTEST[2:], str(HERE / "checks_accelerate.py"))
