"""The layers, routers and FFNs whose kernels are run as compiled, in lists by what is special about them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import FFNTrial, RouterTrial, Trial
from ffn_cases import ACTIVATIONS, FORMS, ActivateTrial

from mos_kernels import MoSConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONE_EACH = {"spaces": {"hyperbolic": 1, "spherical": 1}, "num_experts_per_tok": 1}


def linear(**options) -> MoSConfig:
    return MoSConfig(router_scope="linear", **options)


def few() -> Iterator:
    """Every kernel once."""
    yield Trial(linear(), (67,), 72, 96, BF16, seed=1)
    yield Trial(linear(activation="gelu"), (66,), 40, 48, FP16, seed=8)
    yield Trial(MoSConfig(share_a=False, r=4), (9,), 40, 48, FP32, seed=2, own_router=False)
    yield RouterTrial(MoSConfig(), (70,), 72, BF16, seed=3, masked=0.3)
    yield FFNTrial(MoSConfig(), (67,), 72, 80, 96, BF16, seed=4)
    yield FFNTrial(MoSConfig(), (5,), 72, 80, 96, BF16, seed=4, inference=True)


def defaults() -> Iterator:
    for dtype in (BF16, FP32):
        for tokens, d_in, d_out in ((130, 96, 160), (67, 37, 53), (17, 64, 80), (5, 33, 71)):
            yield Trial(linear(), (tokens,), d_in, d_out, dtype, seed=1)
            yield Trial(MoSConfig(), (tokens,), d_in, d_out, dtype, seed=2, own_router=False)
        yield RouterTrial(MoSConfig(), (130,), 96, dtype, seed=3, masked=0.3)
        yield RouterTrial(MoSConfig(), (9,), 40, dtype, seed=3, masked=0.3)
        yield FFNTrial(MoSConfig(), (130,), 96, 160, 96, dtype, seed=4, masked=0.3)
        yield FFNTrial(MoSConfig(), (17,), 37, 53, 41, dtype, seed=5)
        yield FFNTrial(MoSConfig(), (5,), 72, 80, 96, dtype, seed=4, inference=True)
        yield FFNTrial(MoSConfig(share_a=False), (33,), 37, 53, 41, dtype, seed=5, inference=True, kept=True)
        for T, d in ((130, 160), (67, 53), (9, 520)):
            yield ActivateTrial(T, d, dtype=dtype)


def options() -> Iterator:
    for dtype in (BF16, FP32, FP16):
        for tokens in ((67,), (9,)):
            yield Trial(linear(activation="silu"), tokens, 64, 80, dtype, seed=6)
            exp_log = linear(activation="tanh", mapping="exp_log", share_a=False)
            yield Trial(exp_log, tokens, 40, 53, dtype, seed=7)
            yield Trial(linear(activation="gelu"), tokens, 33, 72, dtype, seed=8, base_dtype=dtype)
            yield Trial(linear(share_a=False), tokens, 48, 64, dtype, seed=9)
            yield Trial(linear(mapping="exp_log"), tokens, 48, 64, dtype, seed=10)
            yield Trial(linear(domain="raw", norm_topk_prob=False), tokens, 48, 64, dtype, seed=11)
            for form, activation in zip(FORMS, ACTIVATIONS[::-1], strict=True):
                yield ActivateTrial(*tokens, 72, dtype=dtype, form=form, activation=activation)
        yield FFNTrial(MoSConfig(share_a=False, mapping="exp_log"), (67,), 40, 53, 48, dtype, seed=7, activation="gelu")
        down = (("r", 4), ("share_a", False))
        yield FFNTrial(MoSConfig(norm_topk_prob=False), (9,), 48, 64, 40, dtype, seed=8, form="fused", down=down)
        yield FFNTrial(
            MoSConfig(), (66,), 33, 72, 41, dtype, seed=9, form="plain", activation="gelu_tanh", gates_given=True
        )


def dropout() -> Iterator:
    for dtype in (BF16, FP32, FP16):
        yield Trial(linear(), (67,), 72, 64, dtype, seed=12, dropout_p=0.3)
        yield Trial(linear(), (9,), 72, 64, dtype, seed=12, dropout_p=0.3)
        yield Trial(linear(share_a=False), (67,), 40, 64, dtype, seed=13, dropout_p=0.3)
        yield Trial(linear(), (300,), 600, 120, dtype, seed=25, dropout_p=0.1)
        for r in (64, 128):
            yield Trial(linear(r=r, **ONE_EACH), (70,), 72, 80, dtype, seed=17, dropout_p=0.2)


def large() -> Iterator:
    """Large ranks, and many experts."""
    for dtype in (BF16, FP32):
        for r in (128, 64, 33):
            yield Trial(linear(r=r, **ONE_EACH), (70,), 72, 80, dtype, seed=14)
            yield Trial(linear(r=r, activation="silu", **ONE_EACH), (70,), 72, 80, dtype, seed=15)
            yield Trial(linear(r=r, **ONE_EACH), (6,), 72, 80, dtype, seed=16)
            yield FFNTrial(MoSConfig(r=r, **ONE_EACH), (70,), 72, 80, 48, dtype, seed=17)
        for e in (64, 17):
            many = {"spaces": {"hyperbolic": (e + 1) // 2, "spherical": e // 2}, "num_experts_per_tok": 4}
            yield Trial(linear(**many), (70,), 64, 80, dtype, seed=18)
            yield FFNTrial(MoSConfig(r=3, share_a=False, **many), (70,), 64, 80, 40, dtype, seed=19)
            yield Trial(linear(r=2, **many), (9,), 64, 80, dtype, seed=19)
            yield Trial(linear(activation="gelu", **many), (66,), 40, 48, dtype, seed=20)
            yield Trial(linear(share_a=False, r=3, mapping="exp_log", **many), (66,), 40, 48, dtype, seed=21)
        for rows in ((33,), (8, 8), (64, 3)):
            yield ActivateTrial(130, 72, rows, dtype)
            yield ActivateTrial(9, 136, rows, dtype)


def long() -> Iterator:
    """Enough steps in every loop that its pipeline turns several times."""
    for dtype in (BF16, FP32):
        yield Trial(linear(), (600,), 700, 520, dtype, seed=22)
        yield Trial(linear(share_a=False), (300,), 600, 300, dtype, seed=23)
        yield Trial(linear(activation="silu"), (1100,), 64, 260, dtype, seed=24)
        yield FFNTrial(MoSConfig(), (600,), 300, 520, 300, dtype, seed=26)
        yield FFNTrial(MoSConfig(), (16,), 2100, 600, 900, dtype, seed=26, inference=True)
        yield Trial(linear(r=16), (400,), 64, 300, dtype, seed=28)
        yield Trial(linear(r=64), (300,), 300, 300, dtype, seed=27)
        for rows in ((8,), (64,)):
            yield ActivateTrial(600, 700, rows, dtype)


def drawn() -> Iterator:
    """The first seeds of `python -m tests.fuzz`."""
    for seed in range(16):
        yield from (Trial.drawn(seed), RouterTrial.drawn(seed), FFNTrial.drawn(seed), ActivateTrial.drawn(seed))


def mutated() -> Iterator:
    """Every kernel, with loops that turn twice or more in a program: what `mutations` takes barriers out of."""
    yield Trial(linear(), (2100,), 256, 2200, BF16, seed=1)
    yield FFNTrial(MoSConfig(), (1100,), 256, 520, 256, BF16, seed=4)
    yield FFNTrial(MoSConfig(), (16,), 2100, 1100, 900, BF16, seed=26, inference=True)
    yield Trial(linear(activation="silu"), (1000,), 300, 330, BF16, seed=24)
    yield Trial(linear(share_a=False), (1200,), 256, 300, BF16, seed=23)
    yield Trial(linear(r=32), (300,), 200, 300, BF16, seed=27)
    yield RouterTrial(MoSConfig(), (2100,), 400, BF16, seed=3, masked=0.3)


LISTS = {
    "few": few, "defaults": defaults, "options": options, "dropout": dropout, "large": large, "long": long,
    "drawn": drawn,
}  # fmt: skip
