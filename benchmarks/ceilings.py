"""What the machine can do, measured in the same run as everything that is held against it."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from benchmarks.measure import one_round


class Ceilings(NamedTuple):
    copy_bytes_per_s: float  # read and written
    flop_per_s: float  # of a square product in the run's dtype

    def floor_s(self, moved: int | None, flop: int | None) -> float:
        """The least time for so many bytes and FLOP, whichever binds."""
        return max((moved or 0) / self.copy_bytes_per_s, (flop or 0) / self.flop_per_s)

    def binding(self, moved: int | None, flop: int | None) -> str:
        copies = (moved or 0) / self.copy_bytes_per_s >= (flop or 0) / self.flop_per_s
        return "copy" if copies else "matrix"


def measure(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Ceilings:
    """The best copy bandwidth and matrix rate of 20 rounds, after three seconds of them on a GPU: boost clocks fade."""
    cuda = device.type == "cuda"
    numbers, side = (1 << 28, 8192) if cuda else (1 << 25, 1536)
    if tiny:
        numbers, side = 1 << 14, 32
    a = torch.randn(numbers, device=device, dtype=dtype)
    b, m = torch.empty_like(a), torch.randn(side, side, device=device, dtype=dtype)
    calls = {"copy": lambda: b.copy_(a), "product": lambda: m @ m}
    warm_until = time.time() + (3 if cuda else 0)
    while True:
        one_round(calls, device)
        if time.time() >= warm_until:
            break
    rounds = [one_round(calls, device) for _ in range(20)]
    copy, product = (min(seconds[name] for seconds in rounds) for name in calls)
    return Ceilings(2 * a.numel() * a.element_size() / copy, 2 * side**3 / product)
