"""`python -m mos_kernels tune`: find launch settings for the GPU at hand and write them to the checked-in table.

One constant of one kernel is varied at a time, from the settings in force or from its seed, whichever is faster, for as
long as a pass over them finds something faster. A candidate whose numbers differ from the default's beyond rounding is
not taken. What is found is written kernel by kernel, so that a run that is stopped keeps it. Nothing here runs unless
asked for: no call of a layer ever tunes.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mos_kernels import steps as composition
from mos_kernels.backends.triton import launch
from mos_kernels.backends.triton.activate import activate_backward_launch, activate_launch
from mos_kernels.call import FFNPlan, LinearTensors, Plan, RouteTensors
from mos_kernels.config import MoSConfig

CANDIDATES = {
    "BLOCK_T": (16, 32, 64, 128, 256),
    "BLOCK_D": (32, 64, 128, 256),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_C": (16, 32, 64, 128),
    "SPLITS": (1, 2, 4, 8, 16, 32, 64),
    "TILE": (256, 512, 1024, 2048, 4096),
    "TOKEN_TILE": (64, 128, 256, 512),
    "WEIGHT_T": (16, 32, 64, 128),
    "WEIGHT_N": (32, 64, 128, 256),
    "CHUNK_ROWS": (512, 1024, 2048, 4096, 1 << 40),
    "CHUNK_BYTES": (8 << 20, 16 << 20, 24 << 20, 32 << 20, 48 << 20, 1 << 40),
    "AHEAD": (0, 1),
    "PER_SM": (1, 2, 3, 4, 6, 8, 16),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
SEEDS = {
    "shrink": {"train": {"BLOCK_T": 64, "BLOCK_D": 128, "SPLITS": 1, "AHEAD": 1, "num_warps": 8, "num_stages": 4}},
    "shrink_backward": {"train": {"BLOCK_T": 32, "BLOCK_D": 64, "SPLITS": 8, "num_warps": 4, "num_stages": 4}},
    "gram": {"train": {"BLOCK_N": 64, "SPLITS": 64, "num_warps": 4, "num_stages": 2}},
    "bridge": {"train": {"TILE": 256, "TOKEN_TILE": 512, "num_warps": 2, "num_stages": 1}},
    "bridge_backward": {"train": {"TILE": 256, "TOKEN_TILE": 512, "num_warps": 1, "num_stages": 1}},
    "bridge_reduce": {"train": {"BLOCK_T": 32, "SPLITS": 64, "num_warps": 4, "num_stages": 2}},
    "expand": {
        "train": {"BLOCK_T": 64, "BLOCK_N": 256, "BLOCK_C": 64, "PER_SM": 2, "num_warps": 8, "num_stages": 3},
    },
    "expand_backward": {
        "train": {
            "BLOCK_T": 256, "BLOCK_N": 32, "SPLITS": 4, "WEIGHT_T": 32, "WEIGHT_N": 256, "CHUNK_BYTES": 25165824,
            "CHUNK_ROWS": 1024, "num_warps": 8, "num_stages": 4,
        },
    },
    "activate": {"train": {"BLOCK_T": 64, "BLOCK_D": 64, "SPLITS": 4, "num_warps": 8, "num_stages": 2}},
    "activate_backward": {"train": {"BLOCK_T": 16, "BLOCK_D": 128, "SPLITS": 16, "num_warps": 8, "num_stages": 1}},
}  # fmt: skip
"""Settings that a count of bytes in flight, traffic from the L2 and programs a launch prefers, by kernel and bucket.

No GPU has measured them: the search starts from them where they turn out faster, and the benchmark times them beside
the table's.
"""
QWEN2_1_5B = ((1536, 8960), (8960, 1536))
TOKENS = {"train": 8192, "decode": 16}

_FIXED = {
    # The differentiable path has S = 1: splits are for decoding alone.
    ("shrink", "train"): {"SPLITS", "AHEAD"},
    ("shrink", "decode"): {"AHEAD"},
    ("activated_weight", "train"): {"num_stages"},
    ("activated_weight", "decode"): {"num_stages"},
}
"""Settings that the search leaves as the table has them. AHEAD and these stages keep Triton 3.6 on sm_90 from refilling
shared memory that a product still reads (docs/compiled-code.md). No comparison of results is sure to notice that."""

Step = Callable[[], tuple[Tensor, ...]]


_IN_PLANES = ("shrink", "expand_backward", "routing_logits")
"""The steps whose outputs are planes, which settings change in number: their sums are compared."""


def steps(
    config: MoSConfig, T: int, in_features: int, out_features: int, dtype: torch.dtype, device
) -> dict[str, Step]:
    """Each kernel's name with a call of the step that launches it, as forward and backward of a linear or an FFN do.

    A linear with a router of its own runs once on random data, with its backend recorded: of the steps that launch a
    kernel, the one with the fewest launches is taken.
    """
    E, r = config.num_experts, config.r
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape, dtype=torch.float32, scale=1.0):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    x, weight, bias = (
        randn(T, in_features, dtype=dtype),
        randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5),
        randn(out_features, dtype=dtype),
    )
    A, router = randn(r, in_features, scale=in_features**-0.5), randn(E, in_features, scale=0.02)
    B, aux = randn(out_features, E, r, scale=out_features**-0.5), randn(1)
    kappa = torch.tensor(config.curvature_signs, device=device) * 0.3 / in_features
    linear = LinearTensors(x, weight, bias, A, B, kappa, router=router, aux_weight=aux)
    routed = RouteTensors(x, router, aux)
    curved = MoSConfig.from_dict({**config.to_dict(), "activation": "silu"})
    with _recorded() as calls:
        for options in (config, curved):
            plan = Plan(options, "triton")
            if launch.bucket(T) == "decode":
                composition.linear_forward(linear, plan._replace(differentiable=False))
            y, saved = composition.linear_forward(linear, plan)
            needs = LinearTensors(*(t is not None for t in linear))._replace(weight=False, added=False)
            composition.linear_backward(y, linear, saved, plan, needs)
        composition.route_forward(routed, plan)
    found: dict[str, tuple[int, Step]] = {}
    for name, call in calls:
        launched = _launched(call)
        for kernel in launched:
            if kernel not in found or len(launched) < found[kernel][0]:
                found[kernel] = len(launched), functools.partial(_outputs, name, call)
    steps = {kernel: call for kernel, (_, call) in found.items() if kernel in launch.table()["default"]}
    d = max(in_features, out_features)
    outputs, dh = [randn(T, d, dtype=dtype) for _ in range(2)], randn(T, d, dtype=dtype)
    A, dp, dn = randn(r, d, scale=d**-0.5), randn(T, r), randn(T)
    plan = FFNPlan(config, config, "triton", "silu", True, False, True, (None,) * 3)

    def forward() -> tuple[Tensor, ...]:
        h, p, n = activate_launch(outputs, A, plan)
        return h, p.sum(0), n.sum(0)

    def backward() -> tuple[Tensor, ...]:
        gradients, dA = activate_backward_launch(dh, outputs, A, dp, dn, plan, True)
        return *gradients, dA

    return {**steps, "activate": forward, "activate_backward": backward}


def _outputs(name: str, call: Callable) -> tuple[Tensor, ...]:
    made = call()
    tensors = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
    return tuple(t.sum(0) if name in _IN_PLANES else t for t in tensors)


@contextmanager
def _recorded() -> Iterator[list[tuple[str, Callable]]]:
    """The calls of the kernels' steps that a composition makes, by name, to be made again."""
    calls: list[tuple[str, Callable]] = []
    backend, before = composition.load_backend("triton"), composition.load_backend

    class Recorder:
        def __getattr__(self, name: str):
            step = getattr(backend, name)
            if not callable(step):
                return step

            def run(*args, **options):
                calls.append((name, functools.partial(step, *args, **options)))
                return step(*args, **options)

            return run

    composition.load_backend = lambda name: Recorder()
    try:
        yield calls
    finally:
        composition.load_backend = before


def _launched(call: Callable) -> list[str]:
    """The kernels that a call launches."""
    names, run = [], launch.launch

    def note(kernel, *arguments, **constants) -> None:
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        run(kernel, *arguments, **constants)

    launch.launch = note
    try:
        call()
    finally:
        launch.launch = run
    return names


def neighbours(settings: dict, fixed: frozenset[str] = frozenset()) -> Iterator[dict]:
    """The settings that differ from these in one constant."""
    for name, value in settings.items():
        if name in fixed:
            continue
        for candidate in CANDIDATES[name]:
            if candidate != value:
                yield {**settings, name: candidate}


def search(
    start: dict,
    measure: Callable[[dict], float | None],
    fixed: frozenset[str] = frozenset(),
    seed: dict | None = None,
) -> tuple[dict, float, float]:
    """The fastest settings found, their time and the start's. `measure` returns None for settings that do not work.

    seed: settings that are tried before all others, however far they are from the start.
    """
    best, first = start, measure(start)
    if first is None:
        raise RuntimeError(f"the settings in force do not work: {start}; mend them in {launch.SETTINGS_FILE} first")
    best_time, tried = first, [start]
    seeds = [] if seed is None else [seed]
    while candidate := next((c for c in (*seeds, *neighbours(best, fixed)) if c not in tried), None):
        tried.append(candidate)
        time = measure(candidate)
        if time is not None and time < 0.98 * best_time:
            best, best_time = candidate, time
    return best, best_time, first


class overridden:
    """Within this context, launches of the given kernels use the given constants."""

    def __init__(self, constants: dict[str, dict]):
        self.constants = constants

    def __enter__(self) -> None:
        self.before = before = launch.settings

        def settings(kernel: str, device: torch.device, T: int) -> dict:
            return dict(self.constants[kernel]) if kernel in self.constants else before(kernel, device, T)

        launch.settings = settings

    def __exit__(self, *_) -> None:
        launch.settings = self.before


def tune_kernel(
    kernel: str, bucket: str, calls: list[Step], device: torch.device, timer, until: float = math.inf
) -> tuple[dict, float, float]:
    """Search the settings of one kernel over the given calls (one a shape). timer: step -> milliseconds.

    until: no candidate is tried after this time.time().
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    truths = [call() for call in calls]

    start = launch.settings(kernel, device, TOKENS[bucket])

    def measure(constants: dict) -> float | None:
        if constants != start and time.time() > until:
            return None
        with overridden({kernel: constants}):
            try:
                results = [call() for call in calls]
                if not all(agree(a, b) for a, b in zip(results, truths, strict=True)):
                    return None
                return sum(timer(call) for call in calls)
            except (CompilationError, OutOfResources, PTXASError):
                return None

    fixed = frozenset(_FIXED.get((kernel, bucket), ()))
    return search(start, measure, fixed, SEEDS.get(kernel, {}).get(bucket))


def agree(results: tuple, truths: tuple) -> bool:
    """Whether two calls of a step gave the same numbers, but for the order of their sums."""
    for a, b in zip(results, truths, strict=True):
        if a is None:
            continue
        eps = torch.finfo(b.dtype).eps
        bound = (4 * eps + 1e-5) * b.float().abs().max()
        if not ((a.float() - b.float()).abs().max() <= bound):
            return False
    return True


def write(architecture: str, found: dict[str, dict[str, dict]]) -> None:
    """Put the settings of an architecture into the table; the file is written beside and renamed."""
    table = json.loads(launch.SETTINGS_FILE.read_text())
    stored = table.setdefault(architecture, {})
    for kernel, buckets in found.items():
        stored.setdefault(kernel, {}).update(buckets)
    beside = launch.SETTINGS_FILE.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(render(table))
    os.replace(beside, launch.SETTINGS_FILE)
    launch.table.cache_clear()


def render(table: dict) -> str:
    """The table as JSON with one line for each kernel's bucket."""
    architectures = []
    for architecture, kernels in table.items():
        rows = []
        for kernel, buckets in kernels.items():
            lines = ",\n".join(f"      {json.dumps(b)}: {json.dumps(constants)}" for b, constants in buckets.items())
            rows.append(f"    {json.dumps(kernel)}: {{\n{lines}\n    }}")
        body = ",\n".join(rows)
        architectures.append(f"  {json.dumps(architecture)}: {{\n{body}\n  }}")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def graph_time(call: Step) -> float:
    """Milliseconds of a step's kernels in a CUDA graph: Python takes longer over a launch than most of them run."""
    import triton

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return triton.testing.do_bench(graph.replay, warmup=5, rep=20, return_mode="median")


def run(kernels: list[str], buckets: list[str], dtype: torch.dtype, dry_run: bool) -> int:
    """Tune on the current CUDA or ROCm device, print each result, and write the table unless dry_run."""
    if not torch.cuda.is_available():
        print("error: tune times kernels on a CUDA or ROCm device, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launch.architecture(device)
    known = launch.table()["default"]
    unknown = sorted(set(kernels) - set(known))
    if unknown:
        print(f"unknown kernels {unknown}: choose from {sorted(known)}")
        return 2
    print(f"tuning for {architecture} ({torch.cuda.get_device_name(device)}), {dtype}")
    found: dict[str, dict[str, dict]] = {}
    for bucket in buckets or TOKENS:
        by_shape = [steps(MoSConfig(), TOKENS[bucket], d_in, d_out, dtype, device) for d_in, d_out in QWEN2_1_5B]
        for kernel in kernels or known:
            if bucket not in known[kernel]:
                why = "has the settings of train" if "train" in known[kernel] else "does not launch it"
                print(f"{kernel:18} {bucket:7} {why}")
                continue
            calls = [calls_of_shape[kernel] for calls_of_shape in by_shape]
            settings, time, before = tune_kernel(kernel, bucket, calls, device, graph_time)
            print(f"{kernel:18} {bucket:7} {before:8.4f} -> {time:8.4f} ms  {settings}", flush=True)
            found.setdefault(kernel, {})[bucket] = settings
            if not dry_run:
                write(architecture, found)
    return 0
