"""The interpreter in machine/, compiled once and kept by its contents."""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
# -march=native: a build is used on the machine that made it, and kept in its temporary folder.
COMMAND = [
    "g++", "-std=c++17", "-O2", "-march=native", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-ftree-vectorize",
    "-shared", "-fPIC",
]  # fmt: skip


def missing() -> str | None:
    """Why the interpreter cannot be built here, or None."""
    if shutil.which(COMMAND[0]) is None:
        return "g++ is not installed: it compiles the emulator (tests/emulator/machine)"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The interpreter. Several processes may ask at once: each builds beside and renames, and the last one stays."""
    contents = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    described = contents + " ".join([*COMMAND, platform.node(), platform.machine()]).encode()
    folder = Path(tempfile.gettempdir()) / f"mos-kernels-emulator-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"machine-{hashlib.sha256(described).hexdigest()[:16]}.so"
    if not built.exists():
        beside = built.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run([*COMMAND, "-o", str(beside), str(SOURCES / "machine.cpp")], check=True)
            beside.replace(built)
        finally:
            beside.unlink(missing_ok=True)
    found = ctypes.CDLL(str(built))
    found.elementwise_name.restype = ctypes.c_char_p
    found.traced.restype = ctypes.c_void_p
    return found


@functools.cache
def elementwise() -> dict[str, tuple[int, tuple[int, ...]]]:
    """The instructions of machine/elementwise.def: name -> its number, and the sizes of its operands in bytes."""
    found, table = library(), {}
    for i in range(found.elementwise_count()):
        sizes = (found.elementwise_size(i, operand) for operand in range(5))
        table.setdefault(found.elementwise_name(i).decode(), (i, tuple(size for size in sizes if size)))
    return table
