"""Operands of tensor cores for the emulator's own tests: their numbers, and where they lie in shared memory.

As the PTX manual draws it, a core matrix (8 lines of 16 bytes) at a time; not as machine/products.h computes it.
"""

from __future__ import annotations

import numpy as np
import torch


def halves(rng, *shape, brain: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of few digits, so that no sum here is rounded; and their bits."""
    values = torch.tensor(rng.integers(-16, 17, shape) / 8.0).to(torch.bfloat16 if brain else torch.float16)
    return values.double().numpy(), values.view(torch.int16).numpy().astype(np.int64) & 0xFFFF


def laid_out(matrix: np.ndarray, contiguous_rows: bool, swizzle: int, size: int) -> tuple[np.ndarray, int, int]:
    """Bytes of shared memory for a matrix [i, 16 of k] of 16-bit numbers, and the leading and stride offsets.

    contiguous_rows: k runs fastest ("K-major"). swizzle: bytes, 0 for none. An atom is 8 lines of `swizzle` bytes (16
    without one); the 16-byte pieces of its line l are permuted by l, or by l // 2 or l // 4 for shorter lines.
    """
    lines = matrix if contiguous_rows else matrix.T  # [lines, numbers that follow each other]
    span = max(swizzle, 16)
    numbers = span // 2
    shared = np.zeros(size, np.uint8)
    across = max(lines.shape[1] // numbers, 1)  # atoms along a line
    to_next_across, to_next_down = 8 * span, 8 * span * across  # the atoms along a line follow each other
    for line in range(lines.shape[0]):
        for first in range(0, lines.shape[1], 8):
            piece = lines[line, first : first + 8].astype(np.uint16).view(np.uint8)
            at = first // numbers * to_next_across + line // 8 * to_next_down
            inside = line % 8 * span + first % numbers * 2
            row_of_128, chunk = inside // 128, inside % 128 // 16
            if swizzle:
                chunk ^= row_of_128 % (swizzle // 16) if swizzle < 128 else row_of_128
            shared[at + row_of_128 * 128 + chunk * 16 :][:16] = piece
    if contiguous_rows:
        return shared, to_next_across, to_next_down  # leading: to the next k; stride: to the next 8 rows
    if swizzle:
        return shared, to_next_across, to_next_down  # leading: to the next numbers of i; stride: to the next 8 of k
    return shared, to_next_down, to_next_across  # without a swizzle the two change places
