"""Fuzz the kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.fuzz` draws fresh seeds until stopped.

A seed that fails is printed with its configuration; `--seed N` replays it. tests/backends/triton runs the first seeds.
`python -m tests.fuzz --compiled` runs them as compiled for GPUs instead, in the emulator (docs/compiled-code.md).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent
KINDS = ("layer", "router", "ffn", "activate")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--kind", choices=KINDS, help="draw this kind alone (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument(
        "--compiled", nargs="*", metavar="ARCH", choices=ARCHITECTURES, help="as compiled for these (default: all)"
    )
    arguments = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if arguments.compiled is None and not interpreted:
        parser.error("TRITON_INTERPRET=1 is not set, and without it the kernels need a GPU, or --compiled")
    if arguments.compiled is not None and interpreted:
        parser.error("TRITON_INTERPRET=1 is set: with it nothing is compiled")

    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "backends" / "triton")]
    import conftest  # offline, one thread
    import torch
    from cases import FFNTrial, RouterTrial, Trial
    from ffn_cases import ActivateTrial

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, conftest._poisoned(getattr(owner, name)))
    drawn = {"layer": Trial.drawn, "router": RouterTrial.drawn, "ffn": FFNTrial.drawn}
    drawn["activate"] = ActivateTrial.drawn
    kinds = [arguments.kind] if arguments.kind else KINDS
    fresh = iter(lambda: random.SystemRandom().randrange(2**32), None)
    seeds = fresh if arguments.seed is None else iter([arguments.seed])
    start, count, failing = time.monotonic(), 0, []
    try:
        for seed in seeds:
            for kind in kinds:
                trial = drawn[kind](seed)
                problems = _problems(trial) if interpreted else _compiled_problems(trial, arguments.compiled)
                count += 1
                if problems:
                    failing.append(seed)
                    print(f"FAILED --kind {kind} --seed {seed}\n  {trial}", *problems, sep="\n  ", flush=True)
            elapsed = time.monotonic() - start
            if count % 50 < len(kinds):
                print(f"{count} trials, {len(failing)} failed, {elapsed:.0f} s", flush=True)
            if elapsed > arguments.seconds:
                break
    except KeyboardInterrupt:
        pass
    print(f"{count} trials, {len(failing)} failed")
    return 1 if failing else 0


def _problems(trial) -> list[str]:
    try:
        return trial.failures()
    except Exception as error:
        return traceback.format_exception(error)[-4:]


def _compiled_problems(trial, architectures: list[str]) -> list[str]:
    from emulator.launched import emulated

    found = []
    for architecture in architectures or ARCHITECTURES:
        with emulated(architecture) as log:
            found += [f"{architecture}: {problem}" for problem in _problems(trial) + log.problems]
    return found


if __name__ == "__main__":
    sys.exit(main())
