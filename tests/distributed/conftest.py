"""Fixtures of the checks, which run in each of two processes."""

import datetime
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "huggingface"))  # for tiny_models


@pytest.fixture(scope="session")
def process_group():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def shared_folder(tmp_path):
    """One folder for both processes."""
    folder = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    return Path(folder[0])
