"""The emulator's tests: in a process without TRITON_INTERPRET, on a machine with g++."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from . import build

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "backends" / "triton")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.missing()
    if os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 is set: these tests compile; run pytest tests/emulator without it"
    for item in items if reason else ():
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
