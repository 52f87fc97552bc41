"""Fixtures of the checks, which run in each of two processes."""

import datetime
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def process_group():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def shared_folder(tmp_path, process_group):
    """One folder for both processes."""
    folder = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    return Path(folder[0])
