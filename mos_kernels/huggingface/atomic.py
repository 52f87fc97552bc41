"""Writing an adapter's folder whole: an interrupted save leaves the old files, or no adapter_config.json."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import save
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, card: str) -> None:
    """Write an adapter's three files, the configuration last. A model card that is there is kept."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    with contextlib.ExitStack() as stack:
        weights = _staged(stack, folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
        description = _staged(stack, folder / CONFIG_NAME, json.dumps(config, indent=2).encode() + b"\n")
        readme = _staged(stack, folder / CARD_NAME, card.encode())
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        _sync_folder(folder)
        os.replace(weights, folder / WEIGHTS_NAME)
        if not (folder / CARD_NAME).exists():
            os.replace(readme, folder / CARD_NAME)
        _sync_folder(folder)
        os.replace(description, folder / CONFIG_NAME)
        _sync_folder(folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into. At the end it becomes `folder`; after an error it is removed.

    An empty `folder` that is there is written into directly, since it may be a mount, or the current folder. Raises
    FileExistsError if another process is in this context for the same folder. Where directories cannot be locked, as
    on Windows, that is not noticed.
    """
    around = check_folder(folder)
    name = ".".join(folder.absolute().relative_to(around.absolute()).parts)
    place = folder if around == folder else around / f".{name}.new{'' if fcntl else os.getpid()}"
    place.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        is_mine = fcntl is None or _lock_folder(stack, place)
        if not is_mine or folder.is_dir() and any(folder.iterdir()):  # written since the caller looked
            raise FileExistsError(
                f"another process is writing {folder}: in a job of several processes do this in one of them, such as "
                "that with torch.distributed.get_rank() == 0"
            )
        if place == folder:
            yield place
            return
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        for left in place.iterdir():  # by an export that was killed
            left.unlink()
        yield place
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, folder)


def _lock_folder(stack: contextlib.ExitStack, folder: Path) -> bool:
    """Lock a folder until the end of `stack`. False if another process has locked it, or has just renamed it."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return folder.exists() and os.path.samestat(os.fstat(descriptor), os.stat(folder))


def check_folder(folder: Path) -> Path:
    """The folder, or the nearest one around it that exists.

    FileExistsError or NotADirectoryError where something else than a folder is in its place, or in a parent's.
    """
    found = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if found.is_dir():
        return found
    what = "is a file" if found.exists() else "is a link to nothing"
    if found == folder:
        raise FileExistsError(f"{folder} {what}: name a folder for the adapter")
    raise NotADirectoryError(f"{folder}: {found} {what}, in which no folder can be")


def _staged(stack: contextlib.ExitStack, path: Path, content: bytes) -> Path:
    """A temporary file beside `path` with this content. At the end of `stack` it is removed, unless it was renamed.

    It is locked until then.
    """
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    stack.callback(staged.unlink, missing_ok=True)
    file = open(staged, "xb")  # noqa: SIM115
    with contextlib.nullcontext() if _lock(file) else file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    stack.callback(file.close)
    return staged


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of saves that were killed. Files of a running save are locked, and are kept.

    Empty files are kept too: another process may be about to lock one.
    """
    for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME):
        for staged in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError), open(staged, "rb") as file:
                if os.fstat(file.fileno()).st_size and _lock(file):
                    staged.unlink()


def _lock(file: BinaryIO) -> bool:
    """Try to lock the file, and return whether it worked. On systems without such locks, as Windows, it never does."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
