"""Launching: settings by architecture and bucketed shape, the device guard, and the sum of partial planes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import triton
from torch import Tensor

SETTINGS_FILE = Path(__file__).parent / "settings.json"
DECODE_TOKENS = 64


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs a device runs side by side at least: its multiprocessors, and 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def block(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, within a range."""
    return min(max(triton.next_power_of_2(size), least), most)


def bucket(T: int) -> str:
    """Which of a kernel's settings T tokens use; nothing else about T chooses or specialises a kernel."""
    return "decode" if T <= DECODE_TOKENS else "train"


def architecture(device: torch.device) -> str:
    """The name under which a device's settings are stored, such as sm_90 or gfx942; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def table() -> dict:
    """The checked-in settings: architecture -> kernel -> bucket -> constants. "default" serves every unknown GPU."""
    return json.loads(SETTINGS_FILE.read_text())


_architecture = functools.cache(architecture)


def stored_settings(kernel: str, device: torch.device, T: int) -> dict:
    """A fresh copy of the constants of `kernel` for T tokens on `device`, from the table."""
    return architecture_settings(kernel, _architecture(device), T)


def architecture_settings(kernel: str, name: str, T: int) -> dict:
    """As `stored_settings`, by the architecture's name."""
    stored = table()
    chosen = stored["default"][kernel] | stored.get(name, {}).get(kernel, {})
    return dict(chosen.get(bucket(T)) or chosen["train"])


settings = stored_settings
"""What the launchers call; the tuner puts its candidates in its place."""


def wide_settings(kernel: str, device: torch.device, T: int, dtype: torch.dtype, **most: int) -> dict:
    """Settings of a kernel of wide products, with tiles of at most so much: what is tuned at one rank must fit at all.

    IEEE float32 products keep their operands in registers, which twice the warps share.
    """
    chosen = settings(kernel, device, T)
    chosen.update({name: min(chosen[name], limit) for name, limit in most.items()})
    if dtype == torch.float32:
        chosen["num_warps"] = 8
    return chosen


def launch(kernel, grid: tuple[int, ...], tensor: Tensor, arguments: tuple, **constants) -> None:
    """Run `kernel` on tensor's device, unless the grid is empty. Every launch goes through here, to be counted."""
    if 0 in grid:
        return
    if tensor.is_cuda:
        with torch.cuda.device_of(tensor):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def sum_planes(planes: Tensor) -> Tensor:
    """The planes (S, …) added up, in a fixed order."""
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)
