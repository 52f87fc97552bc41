"""The layer of reference/: facts of the mathematics, the loop against the per-expert form, gradients at guards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reference.layer import mos_expert, mos_linear
from reference.per_expert import mos_linear_as_printed, mos_linear_per_expert

T, D_IN, D_OUT, R, E = 2, 4, 5, 2, 3
DRAWN = settings(max_examples=25)
NAMES = ("x", "weight", "bias", "A", "B", "kappa", "gates")
seeds = st.integers(0, 2**31 - 1)
decades = st.floats(-2, 3).map(lambda e: 10.0**e)
curvatures = st.lists(st.floats(-2, 2), min_size=E, max_size=E)
geometries = st.sampled_from([("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")])
activations = st.sampled_from(["identity", "tanh", "silu", "gelu"])
both = pytest.mark.parametrize("layer", [mos_linear, mos_linear_per_expert])


def case(seed: int = 0, kappa=(-0.7, 0.0, 0.9), x_norm: float = 1.0, b_norm: float = 1.0, share_a: bool = True):
    """x, weight, bias, A, B, kappa, gates in float64; every token has norm x_norm and every ‖B_e A‖ is about b_norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, A, B = normal(T, D_IN), normal(R, D_IN) if share_a else normal(len(kappa), R, D_IN), normal(D_OUT, len(kappa), R)
    tensors = [
        x * (x_norm / x.norm(dim=-1, keepdim=True)), normal(D_OUT, D_IN), normal(D_OUT),
        A / A.norm() * A.numel() ** 0.5 / 2, b_norm * B / 2,
        torch.tensor(kappa, dtype=torch.float64), normal(T, len(kappa)).softmax(-1),
    ]  # fmt: skip
    return [t.requires_grad_() for t in tensors]


def run(layer, inputs, **options):
    return layer(*inputs[:6], gates=inputs[6], **options)


def gradients(y, inputs):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad(y, inputs, dy)


def assert_close(actual, expected, tolerance=1e-10, names=NAMES):
    for name, a, b in zip(names, actual, expected, strict=True):
        assert torch.isfinite(a).all() and torch.isfinite(b).all(), name
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-30), (name, a, b)


# the facts


@both
@given(
    seed=seeds,
    x_norm=decades,
    mapping=st.sampled_from(["stereographic", "exp_log"]),
    domain=st.sampled_from(["ball", "raw"]),
)
def test_one_flat_expert_is_exactly_lora(layer, seed, x_norm, mapping, domain):
    inputs = case(seed, kappa=(0.0,), x_norm=x_norm)
    x, weight, bias, A, B, *_ = inputs
    y = layer(*inputs[:6], gates=torch.ones(T, 1), scaling=2.0, mapping=mapping, domain=domain)
    lora = F.linear(x, weight, bias) + 2.0 * F.linear(F.linear(x, A), B[:, 0])
    assert_close([y], [lora], 1e-14, ["y"])
    assert_close(gradients(y, inputs[:5]), gradients(lora, inputs[:5]), 1e-13, NAMES[:5])


@pytest.mark.parametrize("fused_norm", [False, True])
def test_per_expert_norms_have_a_gradient_at_zero(fused_norm):
    inputs = case(x_norm=0.0, b_norm=0.0)
    y = run(mos_linear_per_expert, inputs, fused_norm=fused_norm)
    assert_close(gradients(y, inputs), gradients(run(mos_linear, inputs), inputs), 1e-14)


@both
@DRAWN
@given(
    seed=seeds,
    kappa=curvatures,
    x_norm=decades | st.sampled_from([0.0, 1e8, 1e16]),
    geometry=geometries,
    activation=activations,
)
def test_zero_B_is_the_base_with_finite_gradients(layer, seed, kappa, x_norm, geometry, activation):
    inputs = case(seed, kappa, x_norm, b_norm=0.0)
    options = {"mapping": geometry[0], "domain": geometry[1], "activation": activation}
    y = run(layer, inputs, **options)
    x, weight, bias = inputs[:3]
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-15, atol=1e-15 * x_norm)
    for name, gradient in zip(NAMES, gradients(y, inputs), strict=True):
        assert torch.isfinite(gradient).all(), name
    if x_norm:
        assert gradients(y := run(layer, inputs, **options), inputs)[4].abs().max() > 0  # B can start to learn


@DRAWN
@given(
    seed=seeds,
    size=decades,
    sign=st.sampled_from([-1.0, 1.0]),
    x_norm=decades,
    b_norm=decades,
    domain=st.sampled_from(["ball", "raw"]),
)
def test_expert_output_stays_within_one_radius(seed, size, sign, x_norm, b_norm, domain):
    x, _, _, A, B, kappa, _ = case(seed, (sign * size,), x_norm, b_norm)
    points = mos_expert(x[0], A, B[:, 0], kappa[0], domain=domain)
    assert points.output.norm() <= size**-0.5 * (1 + 1e-12)


@pytest.mark.parametrize("formula", ["literal", "signed"])
@DRAWN
@given(
    seed=seeds,
    size=decades,
    sign=st.sampled_from([-1.0, 1.0]),
    x_norm=decades,
    mapping=st.sampled_from(["stereographic", "exp_log"]),
)
def test_points_of_the_layer_lie_on_the_manifold_guarded_or_not(formula, seed, size, sign, x_norm, mapping):
    kappa = sign * size
    x, _, _, A, B, _, _ = case(seed, (kappa,), x_norm)
    points = mos_expert(x[0], A, B[:, 0], torch.tensor(kappa, dtype=torch.float64), mapping=mapping, formula=formula)
    unit = 1.0 if formula == "signed" else size**0.5
    for time, space in [(points.time_in, points.space_in), (points.time_out, points.space_out)]:
        tau = unit * time.item()
        assert tau**2 + kappa * space.square().sum().item() == pytest.approx(1, rel=0, abs=1e-11 * max(1, tau**2))


@both
@DRAWN
@given(seed=seeds, x_norm=st.floats(0.1, 2), geometry=geometries, activation=activations)
def test_output_and_gradients_are_continuous_in_curvature_across_zero(layer, seed, x_norm, geometry, activation):
    options = {"mapping": geometry[0], "domain": geometry[1], "activation": activation}
    results = []
    for kappa in (-1e-9, 0.0, 1e-9):
        inputs = case(seed, (kappa,) * E, x_norm)
        y = run(layer, inputs, **options)
        results.append([y, *gradients(y, inputs)])
    for side in (results[0], results[2]):
        assert_close(side, results[1], 1e-6, ("y", *NAMES))
    # the slope: a secant across zero is the derivative at zero
    dy = torch.randn(T, D_OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = [(run(layer, case(seed, (k,) * E, x_norm), **options) * dy).sum().item() for k in (-1e-5, 1e-5)]
    terms = max(1.0, results[1][6].abs().max().item())
    assert (at[1] - at[0]) / 2e-5 == pytest.approx(results[1][6].sum().item(), rel=1e-5, abs=1e-6 * terms)


@both
@DRAWN
@given(seed=seeds, kappa=curvatures, x_norm=decades, c=st.floats(0.1, 30), geometry=geometries)
def test_scale_covariance(layer, seed, kappa, x_norm, c, geometry):
    options = {"mapping": geometry[0], "domain": geometry[1], "boundary_eps": 0.05}
    x, weight, bias, A, B, k, gates = case(seed, kappa, x_norm)
    zero = torch.zeros_like(weight)
    o = layer(x, zero, None, A, B, k, gates=gates, **options)
    scaled = layer(c * x, zero, None, A, B, k / c**2, gates=gates, **options)
    assert_close([scaled], [c * o], 1e-10, ["o"])


def test_q_is_the_norm_of_one_experts_branch_alone():
    # worked by hand: x = (3, 4)/10, so n = 1/4; κ = -1: λ = 8/3, u = λ·0.5·(3, 0), e = 1/(1 + √(1 + u²))
    one = {"dtype": torch.float64}
    x = torch.tensor([[0.3, 0.4]], **one)
    A, B = torch.eye(2, **one), torch.zeros(2, 2, 2, **one)
    B[:, 0] = torch.tensor([[5 / 3, 0.0], [0.0, 0.0]], **one)
    B[:, 1] = 1e3  # another expert, with a gate of 0
    weight, bias = torch.full((2, 2), 7.0, **one), torch.tensor([1.0, 2.0], **one)
    u = 8 / 3 * 0.5
    expected = torch.tensor([[5.9 + 3 * 0.25 * u / (1 + math.sqrt(1 + u * u)), 6.9]], **one)
    for layer in (mos_linear, mos_linear_per_expert):
        kappa, gates = torch.tensor([-1.0, -1.0], **one), torch.tensor([[0.25, 0.0]], **one)
        torch.testing.assert_close(
            layer(x, weight, bias, A, B, kappa, gates=gates, scaling=3.0), expected, rtol=1e-14, atol=0
        )


# three forms, one function


@DRAWN
@given(
    seed=seeds, kappa=curvatures, x_norm=decades, b_norm=decades, geometry=geometries, activation=activations,
    share_a=st.booleans(), dropout=st.booleans(), fused_norm=st.booleans(),
)  # fmt: skip
def test_per_expert_form_equals_the_loop(
    seed, kappa, x_norm, b_norm, geometry, activation, share_a, dropout, fused_norm
):
    inputs = case(seed, kappa, x_norm, b_norm, share_a)
    options = {"mapping": geometry[0], "domain": geometry[1], "activation": activation, "scaling": 1.5}
    if dropout:
        keep = torch.rand(T, D_IN, generator=torch.Generator().manual_seed(seed)) < 0.5
        options |= {"keep": keep, "dropout_p": 0.4}
    y = run(mos_linear_per_expert, inputs, fused_norm=fused_norm, **options)
    expected = run(mos_linear, inputs, **options)
    assert_close([y], [expected], 1e-11, ["y"])
    # ∂λ/∂κ grows as λ²: digits lost on the way to a pole are lost in both forms
    assert_close(gradients(y, inputs), gradients(expected, inputs), 1e-9)


@DRAWN
@given(
    seed=seeds, kappa=st.lists(st.floats(-0.5, 0.5), min_size=E, max_size=E), share_a=st.booleans(),
    k=st.integers(1, E), norm=st.booleans(),
)  # fmt: skip
def test_equations_as_printed_equal_the_loop_while_no_guard_is_active(seed, kappa, share_a, k, norm):
    inputs = case(seed, kappa, x_norm=0.5, b_norm=0.5, share_a=share_a)
    router = torch.randn(E, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    options = {"router": router, "scaling": 1.5, "num_experts_per_tok": k, "norm_topk_prob": norm}
    given_, names = [*inputs[:6], router], (*NAMES[:6], "router")
    y, expected = (layer(*inputs[:6], **options) for layer in (mos_linear_as_printed, mos_linear))
    assert_close([y], [expected], 1e-12, ["y"])
    if k > 1:  # with one expert, renormalised, the router has no gradient
        assert_close(gradients(y, given_), gradients(expected, given_), 1e-9, names)


@DRAWN
@given(
    seed=seeds, sizes=st.lists(st.floats(0.05, 2), min_size=E, max_size=E),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=E, max_size=E), x_norm=st.floats(0.1, 20), geometry=geometries,
)  # fmt: skip
def test_printed_formula_equals_the_signed_one(seed, sizes, signs, x_norm, geometry):
    inputs = case(seed, [size * sign for size, sign in zip(sizes, signs, strict=True)], x_norm, b_norm=2.0)
    options = {"mapping": geometry[0], "domain": geometry[1], "boundary_eps": 0.05}
    x, A, B, kappa = inputs[0], inputs[3], inputs[4], inputs[5]
    if geometry[0] == "exp_log":  # arcosh and arccos lose the digits of a short u
        for t in range(T):
            for e in range(E):
                u = mos_expert(x[t], A, B[:, e], kappa[e], **options).space_out
                if kappa[e].abs() * u.square().sum() < 0.01:
                    return
    printed, signed = run(mos_linear, inputs, formula="literal", **options), run(mos_linear, inputs, **options)
    assert_close([printed], [signed], 1e-11, ["y"])
    assert_close(gradients(printed, inputs), gradients(signed, inputs))


@DRAWN
@given(seed=seeds, kappa=curvatures, k=st.integers(1, E), norm_topk_prob=st.booleans(), routed_only=st.booleans())
def test_own_router_and_gathered_tokens_change_nothing(seed, kappa, k, norm_topk_prob, routed_only):
    inputs = case(seed, kappa)[:6]
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(E, D_IN, generator=generator, dtype=torch.float64, requires_grad=True)
    options = {"router": router, "num_experts_per_tok": k, "norm_topk_prob": norm_topk_prob}
    expected = mos_linear(*inputs, **options)
    y = mos_linear_per_expert(*inputs, **options, routed_only=routed_only)
    assert_close([y], [expected], 1e-13, ["y"])
    inputs = [*inputs, router]
    actual, expected = gradients(y, inputs), gradients(expected, inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_an_unused_expert_changes_nothing():
    x, weight, bias, A, B, kappa, gates = case()
    with torch.no_grad():
        gates[:, 1] = 0
    for layer in (mos_linear, mos_linear_per_expert):
        other = B.detach().clone()
        other[:, 1] = 1e6
        y, same = (layer(x, weight, bias, A, b, kappa, gates=gates) for b in (B, other))
        assert torch.equal(y, same)


def test_leading_dimensions_and_no_tokens():
    x, weight, bias, A, B, kappa, gates = case()
    for layer in (mos_linear, mos_linear_per_expert):
        flat = layer(x, weight, bias, A, B, kappa, gates=gates)
        deep = layer(x.view(1, T, 1, D_IN), weight, bias, A, B, kappa, gates=gates.view(1, T, 1, E))
        assert torch.equal(deep, flat.view(1, T, 1, D_OUT))
        empty = layer(x[:0].view(3, 0, D_IN), weight, bias, A, B, kappa, gates=gates[:0].view(3, 0, E))
        assert empty.shape == (3, 0, D_OUT)


# gradients: the oracle's own, against finite differences


GUARDED = [  # kappa, ‖x‖, ‖BA‖, options: on both sides of every guard, and κ = 0
    ((-0.7, 0.0, 0.9), 0.5, 1.0, {}),
    ((-0.7, 0.0, 0.9), 0.5, 1.0, {"activation": "tanh"}),
    ((-0.7, 0.0, 0.9), 0.5, 1.0, {"activation": "silu", "mapping": "exp_log"}),
    ((-0.7, 0.0, 0.9), 0.5, 1.0, {"activation": "gelu", "domain": "raw"}),
    ((-1.0, -1.0, -1.0), 0.85, 1.0, {"boundary_eps": 0.1}),  # just inside the ball
    ((-1.0, -1.0, -1.0), 0.95, 1.0, {"boundary_eps": 0.1}),  # just outside
    ((-1.0, -1.0, -1.0), 0.95, 1.0, {"boundary_eps": 0.2, "domain": "raw"}),  # held before the pole
    ((-1.0, -1.0, -1.0), 1.05, 1.0, {"boundary_eps": 0.2, "domain": "raw"}),  # held beyond it
    ((-1.0, -1.0, -1.0), 0.85, 1.0, {"boundary_eps": 0.2, "domain": "raw"}),
    ((-1.0, -1.0, -1.0), 1.20, 1.0, {"boundary_eps": 0.2, "domain": "raw"}),  # past the pole
    ((-1.0, -1.0, -1.0), 10.5, 1e-4, {"mapping": "exp_log"}),
    ((-1.0, -1.0, -1.0), 11.5, 1e-4, {"mapping": "exp_log"}),  # held at arsinh(2¹⁵)
    ((1.0, 1.0, 1.0), 0.5, 0.3, {"boundary_eps": 0.1}),
    ((1.0, 1.0, 1.0), 0.5, 30.0, {"boundary_eps": 0.1}),  # over the equator
    ((1.0, 1.0, 1.0), 1.35, 0.3, {"boundary_eps": 0.1, "mapping": "exp_log"}),
    ((1.0, 1.0, 1.0), 1.50, 30.0, {"boundary_eps": 0.1, "mapping": "exp_log"}),  # both holds
]


@both
@pytest.mark.parametrize("kappa, x_norm, b_norm, options", GUARDED)
def test_gradcheck_on_both_sides_of_every_guard(layer, kappa, x_norm, b_norm, options):
    inputs = case(3, kappa, x_norm, b_norm)
    if layer is mos_linear:
        inputs = [t[:1].detach().requires_grad_() if t is inputs[0] or t is inputs[6] else t for t in inputs]
    # B and the output may be far from 1: compare in units of the output
    size = run(layer, inputs, **options).detach().abs().max().clamp(min=1)
    assert torch.autograd.gradcheck(
        lambda *inputs: run(layer, inputs, **options) / size, inputs, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@both
@pytest.mark.parametrize("mapping, domain", [("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")])
@pytest.mark.parametrize("x_norm, b_norm", [(0.0, 1.0), (0.5, 0.0), (0.0, 0.0)])
def test_gradcheck_at_zero_tokens_and_zero_B(layer, mapping, domain, x_norm, b_norm):
    inputs = case(5, (-0.7, 0.0, 0.9), x_norm, b_norm)
    assert torch.autograd.gradcheck(
        lambda *inputs: run(layer, inputs, mapping=mapping, domain=domain), inputs, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@both
@DRAWN
@given(
    seed=seeds,
    kappa=curvatures,
    x_norm=st.floats(-20, 20),
    b_norm=st.floats(-20, 10),
    geometry=geometries,
    activation=activations,
)
def test_output_and_gradients_are_finite_over_forty_decades(layer, seed, kappa, x_norm, b_norm, geometry, activation):
    inputs = case(seed, kappa, 10.0**x_norm, 10.0**b_norm)
    y = run(layer, inputs, mapping=geometry[0], domain=geometry[1], activation=activation)
    for name, value in zip(("y", *NAMES), (y, *gradients(y, inputs)), strict=True):
        assert torch.isfinite(value).all(), name


@both
@pytest.mark.parametrize("mapping, domain", [("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")])
def test_saturated_norms_scale_linearly(layer, mapping, domain):
    # beyond ‖x‖² = 1e30 the scale stands still: s is 10 times as long for 10 times x, and B / 10 takes it to the same u
    x, weight, bias, A, B, kappa, gates = case(2, (-0.7, 0.0, 0.9), 1e16, 1e-17)
    zero, options = torch.zeros_like(weight), {"gates": gates, "mapping": mapping, "domain": domain}
    o = layer(x, zero, None, A, B, kappa, **options)
    assert_close([layer(10 * x, zero, None, A, B / 10, kappa, **options)], [o], 1e-12, ["o"])


@both
@pytest.mark.parametrize("mapping", ["stereographic", "exp_log"])
def test_the_way_back_saturates_at_the_same_squared_norm(layer, mapping):
    kappa, rho = (-0.7, 0.0, 0.9), 1 - 4e-3
    x, weight, _, A, B, k, _ = case(2, kappa, 1.0, 1e17)
    z = math.sqrt(0.7e30)
    scales = {  # e at q = 1e30: hyperbolic, Euclidean, spherical (held at the equator)
        "stereographic": (1 / (1 + z), 1 / 2, rho / (math.sqrt(0.9e30) * (1 + math.sqrt(1 - rho**2)))),
        "exp_log": (math.asinh(z) / z, 1.0, math.asin(rho) / math.sqrt(0.9e30)),
    }[mapping]
    for e, scale in enumerate(scales):
        gates = torch.eye(3, dtype=torch.float64)[e].expand(T, 3)
        o = layer(x, torch.zeros_like(weight), None, A, B, k, gates=gates, mapping=mapping)
        s = torch.stack([mos_expert(row, A, B[:, e], k[e], mapping=mapping).space_in for row in x])
        u = s @ A.T @ B[:, e].T
        assert u.square().sum(-1).min() > 1e30
        assert_close([o], [scale * u], 1e-13, ["o"])


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_every_float_dtype(layer, dtype, tolerance):
    inputs = case(4, x_norm=0.8)
    expected = run(layer, [t.detach().to(dtype).double() for t in inputs])
    low = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = run(layer, low)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
    for gradient, t in zip(gradients(y, low), low, strict=True):
        assert gradient.dtype == t.dtype and torch.isfinite(gradient).all()


# bad input


@both
@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "relu"}, "activation='relu' must be one of"),
        ({"mapping": "lorentz"}, "mapping='lorentz' must be one of"),
        ({"domain": "disk"}, "domain='disk' must be one of"),
        ({"gates": None}, "either gates .* or router"),
        ({"router": torch.zeros(E, D_IN)}, "either gates .* or router"),
        ({"gates": torch.zeros(T, E + 1)}, r"gates have shape \(2, 4\), x and B ask for \(2, 3\)"),
        ({"gates": None, "router": torch.zeros(E, D_IN), "num_experts_per_tok": 4}, "k=4 experts of 3"),
    ],
)
def test_bad_options_are_named(layer, options, message):
    inputs = case()
    with pytest.raises(ValueError, match=message):
        layer(*inputs[:6], **{"gates": inputs[6], **options})


def test_unknown_formula_is_named():
    with pytest.raises(ValueError, match="formula='printed' must be"):
        run(mos_linear, case(), formula="printed")
