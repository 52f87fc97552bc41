"""The paper's Figure 3: the time of conversion into the experts' spaces and back, over dimension and depth."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import maps, providers
from benchmarks.cases.linear import checks_of, linear_group, setting_of
from benchmarks.measure import rotated, rotation
from benchmarks.providers import Ours, Setting
from benchmarks.suite import Context, Group, Made, Shared, Variant
from mos_kernels.backends import load_backend
from mos_kernels.backends.interface import BridgeInputs, ShrinkWeights

CONVERSIONS = {  # provider -> (mapping, compiled)
    "stereographic, eager": ("stereographic", False),
    "exp/log, eager": ("exp/log", False),
    "exp/log, geoopt (fp64 inside)": ("exp/log, geoopt (fp64 inside)", False),
    "stereographic, compiled": ("stereographic", True),
    "exp/log, compiled": ("exp/log", True),
}
FUSED = {
    "stereographic, our eager": Ours("eager"),
    "exp/log, our eager": Ours("eager", "exp_log"),
    "stereographic, our Triton": Ours("triton"),
    "exp/log, our Triton": Ours("triton", "exp_log"),
}
BASE_CONVERSION = "stereographic, eager"
WIDTH = 64
"""Outputs of the experts in a conversion alone, which reads of B only the r × r Gram matrices."""


class Conversion:
    """x (T, d), and what a mixture's experts need to take it into their spaces and back."""

    def __init__(self, setting: Setting):
        self.setting = setting
        options = {"device": setting.device, "dtype": setting.dtype}
        count = rotation(setting.device, setting.tokens * setting.d_in * setting.dtype.itemsize)
        self.x, _ = rotated(lambda: torch.randn(setting.tokens, setting.d_in, **options), count)
        self.config = setting.config()
        signs = torch.tensor(self.config.curvature_signs, device=setting.device)
        self.kappa = signs * 0.3 / setting.d_in
        self.A = torch.randn(setting.rank, setting.d_in, device=setting.device).mul_(setting.d_in**-0.5)
        self.B = torch.randn(setting.d_out, setting.experts, setting.rank, device=setting.device).mul_(0.1)
        self.gates = torch.rand(setting.tokens, setting.experts, device=setting.device).softmax(-1)

    def full_width(self, mapping: str, compile_it: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
        kappa, signs = self.kappa, self.config.curvature_signs

        def convert(x: Tensor) -> tuple[Tensor, ...]:
            return maps.convert(x, kappa, signs, mapping)

        return providers.compiled(convert) if compile_it else convert

    def in_rank_space(self, ours: Ours) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What the same conversion costs us: ‖x‖² and A x in one pass, then λ, q and e for every expert."""
        run, config = load_backend(ours.backend), self.setting.config(ours.mapping)
        weights = ShrinkWeights(self.A, None, self.setting.dtype)
        prepared = run.prepare(self.B, self.setting.dtype, config, weights=weights)

        def convert(x: Tensor) -> tuple[Tensor, ...]:
            p, n, _ = run.shrink(x, self.A, None, None, True, prepared.stack)
            return (run.bridge(BridgeInputs(p, n, self.gates, False, self.kappa, prepared), config)[0],)

        return convert

    def of(self, name: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return self.full_width(*CONVERSIONS[name]) if name in CONVERSIONS else self.in_rank_space(FUSED[name])


def _conversion_work(s: Setting, layers: int = 1) -> tuple[int, int]:
    """Read x, and write the output of every curved expert: the least of a full-width conversion."""
    curved = sum(sign != 0 for sign in s.config().curvature_signs)
    numbers = s.tokens * s.d_in
    return layers * (1 + curved) * numbers * s.dtype.itemsize, layers * curved * 8 * numbers


def _conversion_group(context: Context, kind: str, setting: Setting, repeated: int = 1, **shape) -> Group:
    state = Shared(lambda: Conversion(setting))
    moved, flop = _conversion_work(setting, repeated)

    def make(name: str) -> Made:
        convert = state().of(name)

        def call() -> None:
            with torch.no_grad():
                x = state().x()
                for _ in range(repeated):
                    outputs = convert(x)
                    x = outputs[0] if outputs[0].shape == x.shape else state().x()

        return Made(call)

    variants = {}
    for name in (*CONVERSIONS, *FUSED):
        ours = FUSED.get(name)
        if ours is not None and not ours.can_run(context.device):
            continue
        read = repeated * setting.tokens * setting.d_in * setting.dtype.itemsize
        work = (moved, flop) if ours is None else (read, None)
        compiled = name in CONVERSIONS and CONVERSIONS[name][1]
        checks = checks_of(setting, ours)
        variants[name] = Variant(functools.partial(make, name), *work, compiled=compiled, checks=checks)
    return Group(
        kind, "conversion", {"d_in": setting.d_in, "tokens": setting.tokens, "experts": setting.experts, **shape},
        variants, BASE_CONVERSION, shared=[state],
    )  # fmt: skip


LINEAR_CONVERSIONS = (
    providers.FROZEN, providers.MAPPED, providers.EXP_LOG, providers.GEOOPT, providers.EAGER, providers.EXP_LOG_EAGER,
    providers.TRITON, providers.EXP_LOG_TRITON, providers.MAPPED_COMPILED, providers.EXP_LOG_COMPILED,
)  # fmt: skip


def dimension(context: Context, d: int, tokens: int, linear: bool = False) -> Group:
    """Forward over the embedding dimension: the conversion alone, or the whole adapted linear d -> d around it."""
    if not linear:
        return _conversion_group(context, "dimension", setting_of(context, d, WIDTH, tokens))
    setting = setting_of(context, d, d, tokens)
    return linear_group(context, "dimension", "with the linear", setting, LINEAR_CONVERSIONS)


def depth(context: Context, layers: int, d: int, tokens: int) -> Group:
    """Forward through the conversions of so many layers, one after the other."""
    return _conversion_group(context, "depth", setting_of(context, d, WIDTH, tokens), layers, layers=layers)
