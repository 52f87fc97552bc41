"""Launch settings for the machine at hand, found by the package's tuner: what is measured after it has them."""

from __future__ import annotations

import functools
import time

from benchmarks.cases.linear import setting_of
from benchmarks.suite import Context, Group, Made, Shared, Variant
from benchmarks.targets import QWEN2
from mos_kernels.backends import load_backend

KERNELS = ("activate_backward", "shrink_backward", "expand_backward", "activate", "expand", "shrink", "gram")
"""By what a count says they cost, the dearest first."""
SECONDS = {"tiny": 1.5, "quick": 12.0, "full": 240.0}


def tuning(context: Context, widths=QWEN2, tokens: int = 8192) -> Group:
    """A variant for each kernel: its step with the settings found within SECONDS, which the rows name.

    On a GPU they go into the package's table at once, kernel by kernel, so that later groups of the run have them.
    """
    from mos_kernels.backends.triton import tune

    load_backend("triton")
    config = setting_of(context, *widths[0], tokens).config()
    timer = tune.graph_time if context.cuda else _wall
    steps = Shared(lambda: [tune.steps(config, tokens, *pair, context.dtype, context.device) for pair in widths])

    def make(kernel: str) -> Made:
        from mos_kernels.backends.triton import launch

        calls = [by_kernel[kernel] for by_kernel in steps()]
        until = time.time() + SECONDS[context.mode]
        settings, after, before = tune.tune_kernel(kernel, "train", calls, context.device, timer, until)
        if context.cuda:
            tune.write(launch.architecture(context.device), {kernel: {"train": settings}})
        note = f"{settings}, {before / after:.2f} times as fast as before"

        def call() -> None:
            with tune.overridden({kernel: settings}):
                for step in calls:
                    step()

        return Made(call, note=note)

    variants = {kernel: Variant(functools.partial(make, kernel)) for kernel in KERNELS}
    return Group("tune", "settings found", {"tokens": tokens}, variants, clock="graph", shared=[steps])


def _wall(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
