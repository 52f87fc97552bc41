"""A speed is reported only for what computes the right thing: checked here, in the same process, before any timing.

Criterion: error(ours, float64 truth) <= 2·error(torch in the same dtype, truth) + 1e-6·max|truth|, for y and for every
gradient. The truth is reference/, expert by expert in float64; "torch" is that formula in the dtype for the eager
backend, and the eager backend, which rounds less, for the Triton backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.providers import Setting
from mos_kernels import MoSLinear
from mos_kernels.adapter import mos_linear
from reference.per_expert import mos_linear_per_expert

TOKENS = 96
NEAR_TIE = 1e-3
"""Tokens whose last chosen and first unchosen expert lie this near may be routed otherwise in another precision."""


def disagreements(truths: Mapping[str, Tensor], ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> list[str]:
    """What of `ours` fails the criterion, with the numbers; empty if nothing does. A NaN fails."""
    found = []
    for name, truth in truths.items():
        truth = truth.double()
        error = (ours[name].double() - truth).abs().max().item()
        allowed = 2 * (plain[name].double() - truth).abs().max().item() + 1e-6 * truth.abs().max().item()
        if not error <= allowed:
            found.append(f"{name} is off by {error:.3g}, {allowed:.3g} allowed")
    return found


DRAWS = 3
"""Draws that are held to the criterion together: of one draw, a few numbers such as dκ can come out right by luck."""


def check_layer(
    setting: Setting, backend: str, mapping: str = "stereographic", own_router: bool = False, draws: int = DRAWS
) -> list[str]:
    """What of a backend's layer at this setting, on TOKENS tokens at most, fails the criterion."""
    drawn = [_draw(setting, backend, mapping, own_router) for _ in range(draws)]
    return disagreements(*(
        {name: torch.cat([results[i][name].flatten().double() for results in drawn]) for name in drawn[0][0]}
        for i in range(3)
    ))  # fmt: skip


def _draw(setting: Setting, backend: str, mapping: str, own_router: bool) -> tuple[dict[str, Tensor], ...]:
    """y and gradients on random data: the truth, ours, and torch's in the same dtype."""
    tokens, config = min(setting.tokens, TOKENS), setting.config(mapping)
    device, dtype = setting.device, setting.dtype
    layer = MoSLinear(setting.d_in, setting.d_out, config=config, device=device, dtype=dtype)
    nn.init.normal_(layer.mos_lora_B, std=0.02)
    x, router = torch.randn(tokens, setting.d_in, device=device, dtype=dtype), None
    if own_router:
        router = torch.randn(config.num_experts, setting.d_in, device=device).mul_(0.02)
        x = x[_decided(x, router, config.num_experts_per_tok)]
        routed = router
    else:
        routed = torch.rand(tokens, config.num_experts, device=device).softmax(-1)
    dy = torch.randn(x.shape[0], setting.d_out, device=device, dtype=dtype)
    given = (x, layer.mos_lora_A, layer.mos_lora_B, layer.curvature, routed)
    names = ("y", "dx", "dA", "dB", "dkappa", "drouter" if own_router else "dgates")
    routing = "router" if own_router else "gates"

    def formula(x, base, A, B, kappa, routed) -> Tensor:
        return mos_linear_per_expert(
            x, *base, A, B, kappa, **{routing: routed}, scaling=config.scaling, mapping=config.mapping,
            num_experts_per_tok=config.num_experts_per_tok, fused_norm=True,
        )  # fmt: skip

    def through(chosen: str) -> Callable[..., Tensor]:
        return lambda x, base, A, B, kappa, routed: mos_linear(
            x, *base, A, B, kappa, **{routing: routed}, config=config, backend=chosen
        )

    def results(run: Callable[..., Tensor], kind: torch.dtype) -> dict[str, Tensor]:
        narrow = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [t.detach().to(kind if i == 0 else narrow).requires_grad_() for i, t in enumerate(given)]
        base = layer.weight.to(kind), layer.bias.to(kind)
        y = run(leaves[0], base, *leaves[1:])
        return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))), strict=True))

    truths = results(formula, torch.float64)
    plain = results(formula if backend == "eager" else through("eager"), dtype)
    return truths, results(through(backend), dtype), plain


def _decided(x: Tensor, router: Tensor, k: int) -> Tensor:
    """Which tokens' routing no rounding can change."""
    if k == router.shape[0]:
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    ordered = (x.double() @ router.double().t()).sort(-1, descending=True).values
    return ordered[:, k - 1] - ordered[:, k] > NEAR_TIE
