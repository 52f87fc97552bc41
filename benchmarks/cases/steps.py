"""Each step of the layer alone, beside the base products, and the order of the two products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import providers
from benchmarks.cases.linear import FORWARD, Inputs, checks_of, frozen_work, setting_of, shape_of
from benchmarks.providers import Ours, Setting
from benchmarks.suite import Check, Context, Group, Made, Shared, Variant
from mos_kernels.backends import load_backend
from mos_kernels.backends.interface import BridgeInputs, ShrinkWeights


class Steps:
    """What flows between the steps of one setting, for a backend."""

    def __init__(self, setting: Setting, backend: str):
        self.inputs, self.run = Inputs(setting), load_backend(backend)
        base, config = self.inputs.base, self.inputs.base.config
        self.config, self.kappa, self.gates = config, base.kappa.detach(), base.gates.detach()
        self.A, self.B, self.router = base.A.detach(), base.B.detach(), base.router.detach()
        self.weight, self.bias = base.linear.weight, base.linear.bias
        run = self.run
        with torch.no_grad():
            self.weights = ShrinkWeights(self.A, self.router, setting.dtype)
            self.prepared = run.prepare(self.B, setting.dtype, config, weights=self.weights)
            self.p, self.n, _ = run.shrink(self.inputs.x(), self.A, None, None, True, self.prepared.stack)
            self.logits = run.routing_logits(self.inputs.x(), self.router)
            self.curved = BridgeInputs(self.p, self.n, self.gates, False, self.kappa, self.prepared)
            self.z, self.bridged = run.bridge(self.curved, config)
            self.dz, self.dB = run.expand_backward(self.inputs.dy(), self.z, self.prepared, True)
            self.d = run.bridge_backward(self.dz, self.bridged, self.curved, None, None, config)

    def calls(self) -> dict[str, Callable[[], object]]:
        run, config, x, dy = self.run, self.config, self.inputs.x, self.inputs.dy
        dtype, weight, bias = self.inputs.setting.dtype, self.weight, self.bias
        planes = None if self.dB is None else self.dB.clone()
        return {
            "base forward": lambda: F.linear(x(), weight, bias),
            "base backward": lambda: dy() @ weight,
            "shrink": lambda: run.shrink(x(), self.A, None, None, True, self.prepared.stack),
            "shrink with router": lambda: run.shrink(x(), self.A, self.router, None, True, self.prepared.stack),
            "route": lambda: run.route(run.routing_logits(x(), self.router), config),
            "prepare": lambda: run.prepare(self.B, dtype, config, weights=self.weights),
            "bridge": lambda: run.bridge(self.curved, config),
            "expand": lambda: run.expand(self.z, self.prepared, bias, dtype),
            "expand by addmm": lambda: torch.addmm(bias, self.z.to(dtype), self.prepared.B.flatten(1).t()),
            "expand backward": lambda: run.expand_backward(dy(), self.z, self.prepared, True),
            "bridge backward": lambda: run.bridge_backward(self.dz, self.bridged, self.curved, None, None, config),
            "norm gradient": lambda: run.add_norm_gradient(planes, self.B, self.d.M),
            "shrink backward": lambda: run.shrink_backward(
                x(), self.A, None, self.d.p, self.d.n, None, None, (True, True, False)
            ),
        }


def _step_work(s: Setting, stacks: bool) -> dict[str, tuple[int, int]]:
    """The least bytes and the FLOP of each step (PyTorch's copies and casts are not among them).

    stacks: whether `prepare` casts A and the router, and `shrink` reads them so.
    """
    size, T, R, E, r = s.dtype.itemsize, s.tokens, s.experts * s.rank, s.experts, s.rank
    x, y, W, A, B = T * s.d_in * size, T * s.d_out * size, s.d_in * s.d_out * size, 4 * r * s.d_in, s.d_out * R
    row = (size if stacks else 4) * s.d_in  # of A or the router, as `shrink` reads it
    narrow = 4 * T * (r + 1 + E)
    product = 2 * T * s.d_in * s.d_out
    return {
        "base forward": (x + W + y, product), "base backward": (x + W + y, product),
        "shrink": (x + r * row + 4 * T * (r + 1), 2 * T * s.d_in * (r + 1)),
        "shrink with router": (x + (r + E) * row + narrow, 2 * T * s.d_in * (r + 1 + E)),
        "route": (x + 4 * E * s.d_in + 4 * T * E, 2 * T * s.d_in * E),
        "prepare": ((4 + size) * (B + (r + E) * s.d_in * stacks), 2 * s.d_out * R * r),
        "bridge": (narrow + size * T * R, 4 * T * R * r),
        "expand": (size * (T * R + B) + y, 2 * T * R * s.d_out),
        "expand by addmm": (size * (T * R + B) + y, 2 * T * R * s.d_out),
        "expand backward": (y + size * (T * R + B) + 4 * (T * R + B), 4 * T * R * s.d_out),
        "bridge backward": (4 * T * R + 2 * narrow, 8 * T * R * r),
        "norm gradient": (12 * B, 2 * s.d_out * R * r),
        "shrink backward": (2 * x + 2 * A + 4 * T * (r + 1), 4 * T * s.d_in * r),
    }  # fmt: skip


SEEDED = {
    "prepare": ("gram",), "bridge": ("bridge",), "bridge backward": ("bridge_backward", "bridge_reduce"),
    "expand": ("expand",), "expand backward": ("expand_backward",), "shrink backward": ("shrink_backward",),
}  # fmt: skip
"""The steps whose kernels have other settings to be timed beside the table's: the tuner's seeds."""


def _seeded(name: str, call: Callable[[], object]) -> object:
    from mos_kernels.backends.triton import tune

    with tune.overridden({kernel: tune.SEEDS[kernel]["train"] for kernel in SEEDED[name]}):
        return call()


def _differences(state: Shared, name: str) -> list[str]:
    """What a step gives with the seeds that it does not give with the table's settings, planes added up."""
    from mos_kernels.backends.triton import tune

    def numbers(made: object) -> tuple[Tensor, ...]:
        return tuple(t.sum(0) if name == "expand backward" else t for t in _tensors(made))

    with torch.no_grad():
        call = state().calls()[name]
        same = tune.agree(numbers(_seeded(name, call)), numbers(call()))
    return [] if same else [f"{name} gives other numbers"]


def _tensors(made: object) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    return [t for one in made for t in _tensors(one)] if isinstance(made, tuple) else []


def steps(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    """One variant a step, and one more with the tuner's seeds where there are any: ratios are to the base's forward."""
    setting = setting_of(context, d_in, d_out, tokens)
    triton = providers.why_no_triton(context.device) is None
    backend = "triton" if triton else "eager"
    state = Shared(lambda: Steps(setting, backend))
    variants = {}
    for name, (moved, flop) in _step_work(setting, stacks=triton).items():
        library = name.startswith("base") or "addmm" in name

        def make(name=name, seeded=False) -> Made:
            call = state().calls()[name]
            if seeded:
                call = functools.partial(_seeded, name, call)

            def alone() -> object:
                with torch.no_grad():
                    return call()

            return Made(alone)

        step = f"{name}, {'library' if library else backend}"
        ours = None if library else Ours(backend, own_router=name in ("shrink with router", "route"))
        checks = checks_of(setting, ours)
        variants[name] = Variant(make, moved, flop, step=step, checks=checks)
        if triton and name in SEEDED and tokens > 64:  # few tokens have settings of their own, and no seeds
            key = ("seeds", name, d_in, d_out, tokens, setting.dtype)
            same = Check(key, f"{name}, the tuner's seeds", functools.partial(_differences, state, name))
            variants[f"{name}, seeds"] = Variant(
                functools.partial(make, seeded=True), moved, flop, step=f"{step}, the tuner's seeds",
                checks=[*checks, same],
            )  # fmt: skip
    return Group(
        "steps", "alone", shape_of(setting), variants, base="base forward", clock="graph", repeats=8, shared=[state],
    )  # fmt: skip


def order(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    """Forward with the base product after or before the adapter's, each expand by the kernel or by the library."""
    setting = setting_of(context, d_in, d_out, tokens)
    backend = "triton" if providers.why_no_triton(context.device) is None else "eager"
    state = Shared(lambda: Steps(setting, backend))

    def adapter(s: Steps, x: Tensor) -> Tensor:
        p, n, _ = s.run.shrink(x, s.A, None, None, True, s.prepared.stack)
        return s.run.bridge(BridgeInputs(p, n, s.gates, False, s.kappa, s.prepared), s.config)[0]

    def frozen(s: Steps) -> Tensor:
        return F.linear(s.inputs.x(), s.weight, s.bias)

    def adapter_first(s: Steps) -> Tensor:
        x = s.inputs.x()
        return s.run.expand(adapter(s, x), s.prepared, s.bias, x.dtype).addmm_(x, s.weight.t())

    def adapter_first_addmm(s: Steps) -> Tensor:
        x = s.inputs.x()
        return torch.addmm(s.bias, adapter(s, x).to(x.dtype), s.prepared.B.flatten(1).t()).addmm_(x, s.weight.t())

    def base_first(s: Steps) -> Tensor:
        x = s.inputs.x()
        return torch.addmm(s.bias, x, s.weight.t()).addmm_(adapter(s, x).to(x.dtype), s.prepared.B.flatten(1).t())

    runs = {
        providers.FROZEN: frozen, "adapter first": adapter_first,
        "adapter first, expand by addmm": adapter_first_addmm, "base first": base_first,
    }  # fmt: skip
    moved, flop = frozen_work(setting, backward=False)

    def make(run) -> Made:
        def call() -> Tensor:
            with torch.no_grad():
                return run(state())

        return Made(call)

    variants = {
        name: Variant(
            functools.partial(make, run), moved, flop,
            checks=checks_of(setting, None if name == providers.FROZEN else Ours(backend)),
        )
        for name, run in runs.items()
    }  # fmt: skip
    return Group(
        "order", FORWARD, shape_of(setting), variants, providers.FROZEN, clock="graph", repeats=4, shared=[state]
    )
