"""Accuracy in float32, bfloat16 and float16 next to plain PyTorch's, and what stays finite at every extreme."""

from __future__ import annotations

import itertools

import pytest
import torch
from strategies import ACTIVATIONS, GEOMETRIES, Case, make_case, normal

from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.backends import eager
from reference.per_expert import mos_linear_per_expert

geometries = pytest.mark.parametrize(("mapping", "domain"), GEOMETRIES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSIDE = {"norms": (0.2, 0.6), "b_scale": 0.5}
BEYOND_EVERY_GUARD = {"norms": (20.0, 50.0), "b_scale": 50.0}
BEYOND_IN_FLOAT16 = {"norms": (3.0, 6.0), "b_scale": 50.0}  # where exp/log's sinh leaves PyTorch finite in float16


def assert_at_most_twice_the_error_of_torch(draws: list[Case], dtype: torch.dtype) -> None:
    """error(ours, truth) <= 2·error(torch, truth) + 1e-6·max|truth|, for the output and each gradient over all draws.

    The truth is the reference in float64 on the very numbers that both are given, torch the same formula in `dtype`,
    expert by expert, with autograd.
    """
    ours, plain, truths = [], [], []
    for draw in draws:
        low = draw.to(dtype)
        dy = draw.upstream(dtype)
        high = low.to(torch.float64)
        truths.append(high.results(high.reference(mos_linear_per_expert), dy.double()))
        ours.append(low.results(low.ours(), dy))
        plain.append(low.results(low.reference(mos_linear_per_expert), dy))
    for name in truths[0]:
        truth = torch.cat([t[name].flatten() for t in truths])
        error, torch_error = (
            (torch.cat([t[name].double().flatten() for t in found]) - truth).abs().max().item()
            for found in (ours, plain)
        )
        assert error <= 2 * torch_error + 1e-6 * truth.abs().max().item(), (name, error, torch_error)


def draws_of(config: MoSConfig, dtype: torch.dtype, rounded: bool, **options) -> list[Case]:
    """Eight cases; with `rounded`, dtype can hold their A and B exactly."""
    found = []
    for seed in range(8):
        case = make_case(config, (24,), 32, 40, seed=100 * seed, margin=0.02, **options)
        if rounded:
            case = case.replace(**{n: getattr(case, n).detach().to(dtype).double().requires_grad_() for n in "AB"})
        found.append(case)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@geometries
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("where", [INSIDE, BEYOND_EVERY_GUARD], ids=["inside", "beyond"])
def test_accuracy(dtype, mapping, domain, activation, where):
    if where is BEYOND_EVERY_GUARD and dtype == torch.float16 and mapping == "exp_log":
        where = BEYOND_IN_FLOAT16
    config = MoSConfig(r=4, lora_alpha=8, mapping=mapping, domain=domain, activation=activation)
    assert_at_most_twice_the_error_of_torch(draws_of(config, dtype, rounded=True, own_router=True, **where), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share_a", [True, False])
def test_accuracy_of_float32_adapters_on_a_narrow_base(dtype, share_a):
    config = MoSConfig(r=4, lora_alpha=8, share_a=share_a)
    assert_at_most_twice_the_error_of_torch(draws_of(config, dtype, rounded=False, **INSIDE), dtype)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_accuracy_of_the_other_activations(activation):
    for dtype in DTYPES:
        config = MoSConfig(r=4, lora_alpha=8, activation=activation)
        assert_at_most_twice_the_error_of_torch(draws_of(config, dtype, rounded=True, **INSIDE), dtype)


def test_accuracy_at_the_start_of_training():
    for dtype in DTYPES:
        draws = draws_of(MoSConfig(r=4), dtype, rounded=True, own_router=True, norms=(1.0,), b_scale=0.0)
        assert_at_most_twice_the_error_of_torch(draws, dtype)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_what_is_exact_ignores_the_precision_the_user_allows(precision):
    """Logits, norms, G and q are IEEE float32 also where float32 products may be reduced."""
    a, b = normal(0, 64, 64).float(), normal(1, 64, 64).float()
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = precision
        product = eager.exact_matmul(a, b)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    # not by a float32 product, which a CPU that can would reduce
    assert torch.equal(product, (a.double() @ b.double()).float())
    assert not torch.equal(product, a @ b)


# finite wherever the base layer's are

CURVATURES = (1e-6, 1e-3, 0.3, 1.0, 1e3)


def assert_finite(layer, x, gates):
    inputs = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    if gates is not None:
        inputs["gates"] = gates
    y = layer(x, gates)
    assert torch.isfinite(y).all(), "y"
    gradients = torch.autograd.grad(y, list(inputs.values()), normal(9, *y.shape).to(y.dtype))
    for name, gradient in zip(inputs, gradients, strict=True):
        assert torch.isfinite(gradient).all(), name


def extreme_layer(config, dtype, B, norms):
    torch.manual_seed(0)
    layer = MoSLinear(12, 10, config=config, dtype=dtype)
    with torch.no_grad():
        layer.mos_lora_B.normal_().mul_(B)
    x = torch.nn.functional.normalize(normal(1, len(norms), 12), dim=-1) * torch.tensor(norms)[:, None]
    gates = None
    if config.router_scope == "ffn":
        gates = normal(2, len(norms), config.num_experts).softmax(-1).float().requires_grad_()
    return layer, x.to(dtype).requires_grad_(), gates


@geometries
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("length_unit", ["sqrt_dim", 1.0])
def test_float32_is_finite_at_every_extreme(mapping, domain, activation, scope, length_unit):
    norms = (0.0, 1e-30, 1e-8, 1.0, 39.0, 1e4, 1e8)
    for curvature, B in itertools.product(CURVATURES, (0.0, 1.0, 1e3, 1e6, 1e10)):
        config = MoSConfig(
            r=2, mapping=mapping, domain=domain, activation=activation, router_scope=scope, length_unit=length_unit,
            curvature_init=curvature,
        )  # fmt: skip
        assert_finite(*extreme_layer(config, torch.float32, B, norms))


@geometries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_narrow_dtypes_are_finite(mapping, domain, activation, dtype):
    largest = 1e3 if dtype == torch.float16 else 1e8
    for curvature, B in itertools.product(CURVATURES, (0.0, 1.0) if dtype == torch.float16 else (0.0, 1.0, 1e6)):
        config = MoSConfig(
            r=2, mapping=mapping, domain=domain, activation=activation, router_scope="linear", curvature_init=curvature
        )
        assert_finite(*extreme_layer(config, dtype, B, (0.0, 1e-6, 1.0, largest)))


def test_float16_saturates_rather_than_meeting_zero_with_infinity():
    """Next to the pole λp exceeds float16: with B = 0 the output is still the base's."""
    config = MoSConfig(r=2, router_scope="linear", boundary_eps=1e-6, spaces={"hyperbolic": 2}, num_experts_per_tok=1)
    layer, x, _ = extreme_layer(config, torch.float16, 0.0, (1.0, 5e3))
    with torch.no_grad():
        layer.mos_lora_A.mul_(1e3)
    assert_finite(layer, x, None)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("domain", ["ball", "raw"])
def test_the_curvature_gradient_is_finite_at_zero_curvature(domain, bound, activation):
    """There ∂e/∂κ grows as ‖u‖²: its terms are held finite, or inf - inf would be a NaN."""
    config = MoSConfig(
        r=4, spaces={"hyperbolic": 1, "spherical": 1}, num_experts_per_tok=2, router_scope="linear", domain=domain,
        curvature_init=0.0, curvature_max_grad_norm=bound, activation=activation,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = MoSLinear(12, 10, config=config)
    torch.nn.init.normal_(layer.mos_lora_B, std=1e10)
    x = torch.randn(3, 12)
    layer(1e8 * x / x.norm(dim=1, keepdim=True)).sum().backward()
    assert layer.mos_curvature.grad.isfinite().all()


def test_fp16_dropout_does_not_overflow_what_the_base_can_hold():
    config = MoSConfig(router_scope="linear", r=4, init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(0)
    layer = MoSLinear(12, 10, config=config, dtype=torch.float16)
    layer.weight.data.mul_(1e-3)
    layer.mos_lora_B.data.mul_(1e-3)
    x = (torch.randn(6, 12).sign() * 4e4).half().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
