"""PTX written by hand, for the emulator's own tests: a body, its registers and its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import encode, machine

REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .b64 %d<64>;
"""


def module(body: str, pointers: int) -> str:
    """A kernel of `pointers` arguments, which are in %d1, %d2 and so on, with the thread's number in %r0."""
    parameters = ", ".join(f".param .u64 a{i}" for i in range(1, pointers + 1))
    loads = "".join(f"    ld.param.u64 %d{i}, [a{i}];\n" for i in range(1, pointers + 1))
    return (
        ".version 8.3\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry by_hand({parameters})\n{{{REGISTERS}{loads}    mov.u32 %r0, %tid.x;\n{body}\n    ret;\n}}\n"
    )


def run(
    body: str,
    arguments: Sequence[torch.Tensor],
    schedule: machine.Schedule = machine.EARLY,
    *,
    grid=(1,),
    warps: int = 1,
    shared_bytes: int = 0,
    trace: bool = False,
) -> machine.Result:
    program = encode.program(module(body, len(arguments)))
    return machine.run(program, grid, warps, shared_bytes, arguments, schedule, trace=trace)


def own_part(pointers: int, bytes_of_a_thread: int) -> str:
    """Sets %d51 for the first pointer, %d52 and so on: where the thread's own part of each begins."""
    lines = [f"    mul.wide.u32 %d50, %r0, {bytes_of_a_thread};"]
    lines += [f"    add.s64 %d{50 + i}, %d{i}, %d50;" for i in range(1, pointers + 1)]
    return "\n".join(lines) + "\n"
