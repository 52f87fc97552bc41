"""Accuracy in float32, bfloat16 and float16 next to plain PyTorch's, and what stays finite at every extreme."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import ACTIVATIONS, GEOMETRIES, Case, leaf, make_case, normal
from torch import Tensor

from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.backends import eager, load_backend
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


def adapter_by_torch(case: Case) -> torch.Tensor:
    """The adapter alone in the case's dtype, expert by expert, with MATH.md's own form of λ and e beyond the guards."""
    c, (x, A, B) = case.config, (case.x, case.A, case.B)
    eps, rho = c.boundary_eps, 1 - c.boundary_eps
    n, y = x.square().sum(-1, keepdim=True), 0
    for e, kappa in enumerate(case.kappa):
        outside = -kappa * n > rho**2
        inside = 2 / (1 + torch.where(outside, 0, kappa * n))
        lam = torch.where(outside, 2 * rho / (eps * (2 - eps)) / torch.where(outside, -kappa * n, 1).sqrt(), inside)
        u = (lam * x) @ A.T @ B[:, e].T
        q = u.square().sum(-1, keepdim=True)
        over = kappa * q > rho**2
        back = 1 / (1 + (1 - torch.where(over, 0, kappa * q)).sqrt())
        held = rho / (1 + math.sqrt(eps * (2 - eps))) / torch.where(over, kappa * q, 1).sqrt()
        y = y + c.scaling * case.gates[..., e, None] * torch.where(over, held, back) * u
    return y


def relative_errors(
    eps: float, seed: int, reach: float, kappa: float, b_scale: float
) -> dict[str, tuple[float, float]]:
    """Ours and torch's, against float64, of the adapter's output and gradients over the largest value of each."""
    config = MoSConfig(r=4, lora_alpha=4, boundary_eps=eps)
    kappas = tuple(kappa * sign for sign in config.curvature_signs)
    case = make_case(
        config, (24,), 32, 40, seed=seed, norms=(reach / kappa**0.5,), b_scale=b_scale, kappa=kappas, bias=False
    )
    low = case.replace(weight=torch.zeros_like(case.weight)).to(torch.float32)
    dy, high = low.upstream(torch.float32), low.to(torch.float64)
    ours, torchs, truths = (c.results(y, d) for c, y, d in (
        (low, low.ours(), dy), (low, adapter_by_torch(low), dy), (high, adapter_by_torch(high), dy.double())
    ))  # fmt: skip
    del truths["weight"]  # not the adapter's
    size = {name: truth.abs().max().clamp(min=1e-300) for name, truth in truths.items()}
    return {
        name: tuple(((found[name].double() - truth).abs().max() / size[name]).item() for found in (ours, torchs))
        for name, truth in truths.items()
    }


@pytest.mark.parametrize("eps", [1e-1, 4e-3, 1e-3, 1e-6])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20), reach=st.sampled_from([0.1, 0.9, 1.5, 30.0, 1e4]),
    kappa=st.floats(-3, 2).map(lambda e: 10.0**e), b_scale=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
@example(seed=0, reach=30.0, kappa=10.0**0.125, b_scale=30.0)  # torch's error of κ is a quarter of what it is around
def test_accuracy_of_the_adapter_alone(eps, seed, reach, kappa, b_scale):
    """Without a base, whose size would hide the adapter's error: tokens inside, near and outside the ball."""
    like_it = None
    for name, (error, torch_error) in relative_errors(eps, seed, reach, kappa, b_scale).items():
        if error > 2 * torch_error + 1e-6:  # of κ there are eight numbers: torch's error may be small by chance
            like_it = like_it or [relative_errors(eps, seed + i, reach, kappa, b_scale) for i in range(32)]
            error, torch_error = (math.hypot(*(e[name][i] for e in like_it)) / 32**0.5 for i in (0, 1))
        assert error <= 2 * torch_error + 1e-6, (name, error, torch_error)


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


@given(
    seed=st.integers(0, 2**20), size=st.floats(15, 30).map(lambda e: 10.0**e), b_size=st.floats(-12, 3),
    kappa=st.sampled_from([-0.7, 0.0, 0.7]), geometry=st.sampled_from(GEOMETRIES),
)  # fmt: skip
def test_a_huge_p_gives_what_float64_gives(seed, size, b_size, kappa, geometry):
    """q of a huge p has terms of both signs that float32 cannot hold."""
    config = MoSConfig(
        r=8, spaces={"euclidean": 2}, num_experts_per_tok=2, mapping=geometry[0], domain=geometry[1], share_a=False
    )
    case = make_case(config, (6,), 12, 10, seed=seed, kappa=(kappa, kappa), b_scale=10.0**b_size, bias=False)
    A = case.A.detach() * size / case.A.detach().norm()
    case = case.replace(A=A.requires_grad_(), weight=leaf(torch.zeros_like(case.weight))).to(torch.float32)
    y, truth = case.ours(), case.to(torch.float64).ours()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-5 * truth.abs().max().item())
    assert all(gradient.isfinite().all() for name, gradient in case.gradients(1e-30 * y).items() if name != "kappa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 700])
def test_a_squared_norm_is_a_sum_of_squares(dtype, width, monkeypatch):
    """Within the rounding of a sum of squares, in chunks or not; a copy of x is never made whole."""
    monkeypatch.setattr(eager, "CACHED", 2000)
    x = normal(0, 500, width).mul(torch.logspace(-3, 3, 500, dtype=torch.float64)[:, None]).to(dtype)
    for part in (x, x[:1], x[:0]):
        found, truth = eager.squared_norm(part), part.double().square().sum(-1)
        assert found.shape == part.shape[:1] and found.dtype == torch.float32
        error, torch_error = ((n.double() - truth).abs() / truth for n in (found, part.float().square().sum(-1)))
        assert (error <= 2 * torch_error + 2.0**-24).all()
    assert eager.squared_norm(torch.full((1, 4), 6e4, dtype=torch.float16)).item() == pytest.approx(4 * 3.6e9, rel=1e-2)
    assert eager.squared_norm(torch.full((1, 4), 1e30)).item() == pytest.approx(1e30)


def test_fp16_dropout_does_not_overflow_what_the_base_can_hold():
    config = MoSConfig(router_scope="linear", r=4, init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(0)
    layer = MoSLinear(12, 10, config=config, dtype=torch.float16)
    layer.weight.data.mul_(1e-3)
    layer.mos_lora_B.data.mul_(1e-3)
    x = (torch.randn(6, 12).sign() * 4e4).half().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_a_gradient_scaler_skips_the_step_of_an_overflow(activation):
    assert_a_gradient_scaler_skips_the_step("eager", activation)


def assert_a_gradient_scaler_skips_the_step(backend: str, activation: str) -> None:
    """dp exceeds float16, though what the base makes of dy does not; saturated, dA would be finite and wrong."""
    torch.manual_seed(0)
    config = MoSConfig(r=4, router_scope="linear", activation=activation)
    layer = MoSLinear(12, 10, config=config, dtype=torch.float16)
    with torch.no_grad():
        layer.mos_lora_A.mul_(0.1)
        layer.mos_lora_B.fill_(1.0)
        layer.weight.mul_(1e-3)
    x, factor = torch.randn(6, 12).mul(0.1).half(), layer.mos_lora_A
    optimizer = torch.optim.SGD([factor], lr=1.0)

    def step(scale: float) -> tuple[Tensor, float]:
        before, scaler = factor.detach().clone(), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        y = layer(x, backend=backend)
        assert y.isfinite().all() and (torch.full_like(y, scale) @ layer.weight).isfinite().all()
        scaler.scale(y.float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return factor.detach() - before, scaler.get_scale()

    moved, scale = step(2.0**15)
    assert not factor.grad.isfinite().all() and not moved.any() and scale == 2.0**14
    moved, scale = step(1.0)
    assert factor.grad.isfinite().all() and moved.all() and scale == 1.0


def test_gradients_that_float16_cannot_hold_are_infinite():
    assert_overflows_show("eager")


def assert_overflows_show(backend: str) -> None:
    """Of dp, dlogits and dx₀, each where it is used and nowhere else."""
    steps, T, d, r, E = load_backend(backend), 3, 5, 2, 4
    x, A, router = torch.ones(T, d).half(), torch.ones(r, d), torch.ones(E, d)
    finite = {"dp": torch.zeros(T, r), "dn": torch.zeros(T), "dlogits": torch.zeros(T, E)}
    for name, seen in {"dp": (0, 1), "dn": (0,), "dlogits": (0, 2)}.items():
        for size in (1e4, -1e5):
            dp, dn, dlogits = {**finite, name: torch.full_like(finite[name], size)}.values()
            found = steps.shrink_backward(x, A, router, dp, dn, dlogits, None, (True, True, True))
            overflown = [i for i, gradient in enumerate(found) if (gradient == -torch.inf).all()]
            assert overflown == (list(seen) if size < 0 else []), (name, size)
            assert all(gradient.isfinite().all() for i, gradient in enumerate(found) if i not in overflown)
    dx, drouter = steps.routing_logits_backward(x, router, torch.full((T, E), -1e5), (True, True))
    assert (dx == -torch.inf).all() and (drouter == -torch.inf).all()
