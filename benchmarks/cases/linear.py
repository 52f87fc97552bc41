"""One adapted linear, with its base product and without, and how its time grows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.gate import check_layer, tokens_of
from benchmarks.measure import rotated, rotation
from benchmarks.providers import BRANCHES, LAYERS, Arm, Base, Ours, Provider, Setting
from benchmarks.suite import Check, Context, Group, Made, Shared, Variant

FORWARD_BACKWARD, FORWARD = "forward+backward", "forward"

PEFT = (providers.PEFT_8, providers.PEFT_8_AS_BASE)
OURS = (providers.EAGER, providers.TRITON)
EVERY_LAYER = (
    providers.FROZEN, *PEFT, providers.PEFT_64, providers.PEFT_64_AS_BASE, providers.FUSED_8, providers.HYDRA,
    providers.MIXTURE, providers.PRINTED, providers.TIDIED, providers.EXP_LOG, providers.GEOOPT,
    providers.EXP_LOG_EAGER, providers.EXP_LOG_TRITON, *OURS, providers.EAGER_OWN, providers.TRITON_OWN,
)  # fmt: skip
COMPILED_LAYERS = (
    providers.FROZEN, providers.PEFT_8, providers.MAPPED, providers.EXP_LOG, *OURS, providers.MAPPED_COMPILED,
    providers.EXP_LOG_COMPILED, providers.EAGER_COMPILED,
)  # fmt: skip
EVERY_BRANCH = (
    providers.LORA_BRANCH, providers.PRINTED, providers.TIDIED, providers.EXP_LOG, providers.COLLAPSED, *OURS,
    providers.COLLAPSED_COMPILED,
)  # fmt: skip


class Inputs:
    """x and dy of one setting, rotated through more than the cache, and the factors that all providers share."""

    def __init__(self, setting: Setting):
        self.setting, self.base = setting, Base(setting)
        size, options = setting.dtype.itemsize, {"device": setting.device, "dtype": setting.dtype}
        count = rotation(setting.device, setting.tokens * (setting.d_in + setting.d_out) * size)
        self.x, self._x = rotated(lambda: torch.randn(setting.tokens, setting.d_in, **options).requires_grad_(), count)
        self.dy, _ = rotated(lambda: torch.randn(setting.tokens, setting.d_out, **options), count)

    def training(self, arm: Arm) -> Made:
        """Forward and backward; gradients of x and of what the arm trains, none of them accumulated."""
        gates = self.base.gates

        def forward() -> Tensor:
            return arm.forward(self.x(), gates)

        def call() -> tuple:
            x = self.x()
            return torch.autograd.grad(arm.forward(x, gates), [x, *arm.trained], self.dy())

        weights = [t for t in (self.base.linear.weight, self.base.linear.bias, gates) if t is not None]
        return Made(call, forward, [*self._x, *weights, *arm.trained])

    def inference(self, arm: Arm) -> Made:
        def call() -> Tensor:
            with torch.no_grad():
                return arm.forward(self.x(), self.base.gates)

        return Made(call)


def setting_of(context: Context, d_in: int, d_out: int, tokens: int, **options) -> Setting:
    if context.tiny:
        options = {"experts": 6, "rank": 2, "active": 2, **options}
    return Setting(d_in, d_out, tokens, context.dtype, context.device, **options)


def shape_of(s: Setting) -> dict[str, int]:
    return {"d_in": s.d_in, "d_out": s.d_out, "tokens": s.tokens, "experts": s.experts, "rank": s.rank}


def frozen_work(s: Setting, backward: bool) -> tuple[int, int]:
    """Bytes and FLOP of the frozen linear: what every provider has to do at least."""
    wide_in, wide_out = s.tokens * s.d_in, s.tokens * s.d_out
    moved, flop = s.d_in * s.d_out + wide_in + wide_out, 2 * s.tokens * s.d_in * s.d_out
    times = 2 if backward else 1
    return times * moved * s.dtype.itemsize, times * flop


def checks_of(setting: Setting, ours: Ours | None) -> list[Check]:
    """What must hold of ours at a setting: of its backend, and of the eager one, which the others are held against."""
    if ours is None:
        return []
    widths = (setting.d_in, setting.d_out, setting.experts, setting.rank, tokens_of(setting), setting.dtype)
    found = []
    for backend in dict.fromkeys(("eager", ours.backend)):
        computation = ours._replace(backend=backend)
        name = f"{backend}, {ours.mapping}{', own router' if ours.own_router else ''}"
        found.append(Check((*widths, computation), name, functools.partial(check_layer, setting, *computation)))
    return found


def linear_group(
    context: Context, kind: str, step: str, setting: Setting, names: Sequence[str], *,
    table: dict[str, Provider] = LAYERS, weigh: bool = False,
) -> Group:  # fmt: skip
    """A variant for each provider of `names` in `table` that can run here. The first is the base, if frozen or LoRA."""
    inputs, backward = Shared(lambda: Inputs(setting)), step == FORWARD_BACKWARD
    moved, flop = frozen_work(setting, backward)
    variants = {}
    for name in names:
        provider = table[name]
        if not provider.offered(setting.dtype, setting.device):
            continue

        def make(provider=provider) -> Made:
            arm = provider.make(inputs().base)
            return inputs().training(arm) if backward else inputs().inference(arm)

        variants[name] = Variant(make, moved, flop, provider.compiled, checks=checks_of(setting, provider.ours))
    base = names[0] if names[0] in (providers.FROZEN, providers.LORA_BRANCH) else None
    return Group(kind, step, shape_of(setting), variants, base, weigh=weigh, shared=[inputs])


def layer(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    setting = setting_of(context, d_in, d_out, tokens)
    return linear_group(context, "layer", FORWARD_BACKWARD, setting, EVERY_LAYER, weigh=True)


def lora(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    """What spaces_pattern makes of a linear with one Euclidean expert; a single token without a backward."""
    setting = setting_of(context, d_in, d_out, tokens)
    names = (providers.FROZEN, providers.PEFT_8, providers.FUSED_8, providers.ONE_EXPERT)
    kind, step = ("lora, a token", FORWARD) if tokens == 1 else ("lora", FORWARD_BACKWARD)
    return linear_group(context, kind, step, setting, names)


def compiled(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    setting = setting_of(context, d_in, d_out, tokens)
    return linear_group(context, "compiled", FORWARD_BACKWARD, setting, COMPILED_LAYERS, weigh=True)


def graph(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    setting = setting_of(context, d_in, d_out, tokens)
    group = linear_group(
        context, "graph", FORWARD_BACKWARD, setting, (providers.FROZEN, *PEFT, providers.FUSED_8, *OURS)
    )
    group.clock, group.repeats = "graph", 2
    return group


def branch(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    setting = setting_of(context, d_in, d_out, tokens)
    group = linear_group(context, "branch", FORWARD_BACKWARD, setting, EVERY_BRANCH, table=BRANCHES, weigh=True)
    size, rank = setting.dtype.itemsize, setting.experts * setting.rank
    for variant in group.variants.values():  # read x twice, write dx; write y, read dy
        variant.moved = (3 * tokens * d_in + 2 * tokens * d_out) * size
        variant.flop = 6 * tokens * (d_in * setting.rank + d_out * rank)
    return group


def growth(context: Context, kind: str, d_in: int, d_out: int, tokens: int, **options) -> Group:
    setting = setting_of(context, d_in, d_out, tokens, **options)
    ours = providers.TRITON if context.cuda else providers.EAGER
    names = [providers.FROZEN, providers.PEFT_8, providers.FUSED_8, ours]
    if context.cuda:
        names.insert(2, providers.PEFT_8_AS_BASE)
    if context.tiny:
        names.append(providers.TRITON)
    return linear_group(context, kind, FORWARD_BACKWARD, setting, names)
