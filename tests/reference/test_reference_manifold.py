"""The maps and guards of reference/: manifold membership, inverses, printed against signed form, high precision."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import guards, manifold
from reference.per_expert import scale_back, scale_into

D = 5
seeds = st.integers(0, 2**31 - 1)
magnitudes = st.floats(-2, 1).map(lambda e: 10.0**e)  # of |κ| and of norms
signs = st.sampled_from([-1.0, 1.0])
EXTREMES = st.floats(-12, 12).map(lambda e: 10.0**e)


def tensor(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def vector(seed: int, norm: float, width: int = D) -> torch.Tensor:
    v = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v * (norm / v.norm())).requires_grad_()


def inside(kappa: float, norm: float, limit: float = 0.9) -> float:
    """The norm, shrunk where √|κ|·norm would pass the limit."""
    return min(norm, limit / math.sqrt(abs(kappa)))


def assert_close(actual, expected, tolerance=1e-10, scale=None):
    """Equal to the tolerance, relative to the largest expected entry (or to a given scale)."""
    for a, b in zip(actual, expected, strict=True):
        size = scale if scale is not None else max(b.abs().max().item(), 1e-300)
        assert torch.isfinite(a).all() and (a - b).abs().max().item() <= tolerance * size, (a, b)


def value_and_gradients(function, *inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
    return [o.detach() for o in outputs], torch.autograd.grad(total, inputs)


# manifold membership


@given(seeds, magnitudes, magnitudes)
def test_inverse_projection_and_exp_map_reach_the_hyperboloid(seed, kappa, norm):
    x = vector(seed, inside(kappa, norm)).detach()
    points = [manifold.inverse_projection(x, -kappa), manifold.exp_map(x, -kappa)]
    points.append((manifold.lift(points[0][1], -kappa), points[0][1]))
    for xi, s in points:
        point = torch.cat([xi, s], -1)
        assert xi > 0
        size = 1e-13 * max(1 / kappa, xi.item() ** 2)
        assert manifold.minkowski_inner(point, point).item() == pytest.approx(-1 / kappa, rel=0, abs=size)


@given(seeds, magnitudes, magnitudes)
def test_inverse_projection_and_exp_map_reach_the_sphere(seed, kappa, norm):
    x = vector(seed, norm).detach()
    short = vector(seed, inside(kappa, norm)).detach()
    lifted = (manifold.lift(short, kappa), short)
    for xi, s in [manifold.inverse_projection(x, kappa), manifold.exp_map(x, kappa), lifted]:
        point = torch.cat([xi, s], -1)
        assert manifold.euclidean_inner(point, point).item() == pytest.approx(1 / kappa, rel=1e-13)


@given(seeds, magnitudes, signs | st.just(0.0), magnitudes)
def test_signed_points_satisfy_one_equation(seed, kappa, sign, norm):
    kappa *= sign
    x = vector(seed, inside(kappa or 1, norm)).detach()
    lifted = (manifold.signed_lift(x, kappa), x)
    for tau, s in [manifold.signed_inverse_projection(x, kappa), manifold.signed_exp_map(x, kappa), lifted]:
        size = max(1.0, tau.item() ** 2)
        assert (tau**2 + kappa * manifold.squared_norm(s)).item() == pytest.approx(1, rel=0, abs=1e-13 * size)


# there and back


@given(seeds, magnitudes, signs | st.just(0.0), magnitudes)
def test_projection_undoes_inverse_projection(seed, kappa, sign, norm):
    kappa *= sign
    x = vector(seed, inside(kappa, norm) if kappa < 0 else norm).detach()
    tau, s = manifold.signed_inverse_projection(x, kappa)
    # past the equator 1 + τ is the smaller the farther out: the rounding of τ is divided by it
    assert_close([manifold.signed_projection(tau, s, kappa)], [x], 1e-14 * (1 + abs(kappa) * norm**2))
    if kappa:
        xi, s = manifold.inverse_projection(x, kappa)
        assert_close([manifold.projection(xi, s, kappa)], [x], 1e-14 * (1 + abs(kappa) * norm**2))


@given(seeds, magnitudes, signs, magnitudes)
def test_lift_recovers_the_time_coordinate_on_the_near_side(seed, kappa, sign, norm):
    kappa *= sign
    x = vector(seed, inside(kappa, norm)).detach()
    xi, s = manifold.inverse_projection(x, kappa)
    assert_close([manifold.lift(s, kappa)], [xi], 1e-11)
    assert_close([manifold.signed_lift(s, kappa)], [abs(kappa) ** 0.5 * xi], 1e-11)


@given(seeds, magnitudes, signs | st.just(0.0), magnitudes)
def test_log_map_undoes_exp_map(seed, kappa, sign, norm):
    kappa *= sign
    x = vector(seed, inside(kappa or 1, norm, 1.4)).detach()
    assert_close([manifold.signed_log_map(*manifold.signed_exp_map(x, kappa), kappa)], [x], 1e-13)
    if kappa and abs(kappa) * norm**2 > 0.01:  # arcosh and arccos lose the digits of a small distance
        assert_close([manifold.log_map(*manifold.exp_map(x, kappa), kappa)], [x], 1e-11)


@given(seeds, seeds, magnitudes, EXTREMES, EXTREMES)
def test_hyperbolic_lift_is_1_lipschitz(seed, other_seed, kappa, norm, other_norm):
    u, v = vector(seed, norm).detach(), vector(other_seed, other_norm).detach()
    difference = (manifold.lift(u, -kappa) - manifold.lift(v, -kappa)).abs().item()
    assert difference <= (u - v).norm().item() * (1 + 1e-12) + 1e-15 * (norm + other_norm + kappa**-0.5)


# printed form against signed form


@given(seeds, magnitudes, signs, st.floats(0.03, 0.9))  # at a shorter x, ∂/∂κ of the printed form loses its digits
def test_printed_stereographic_maps_equal_the_signed_ones(seed, kappa, sign, length):
    x, k = vector(seed, length / math.sqrt(kappa)), tensor(kappa * sign)
    root = lambda k: k.abs().sqrt()  # noqa: E731
    printed_into = lambda x, k: (lambda xi, s: (root(k) * xi, s))(*manifold.inverse_projection(x, k))  # noqa: E731
    printed_out = lambda u, k: manifold.projection(manifold.lift(u, k), u, k)  # noqa: E731
    signed_out = lambda u, k: manifold.signed_projection(manifold.signed_lift(u, k), u, k)  # noqa: E731
    for printed, signed in [(printed_into, manifold.signed_inverse_projection), (printed_out, signed_out)]:
        for actual, expected in zip(value_and_gradients(printed, x, k), value_and_gradients(signed, x, k), strict=True):
            assert_close(actual, expected)


@given(seeds, st.floats(0.1, 10), signs, st.floats(0.2, 1.4))
def test_printed_exp_and_log_maps_equal_the_signed_ones(seed, kappa, sign, length):
    # log: arcosh of the time coordinate against arsinh of the space part
    x, k = vector(seed, length / math.sqrt(kappa)), tensor(kappa * sign)
    u = vector(seed, math.sin(length) / math.sqrt(kappa))
    printed_into = lambda x, k: (lambda xi, s: (k.abs().sqrt() * xi, s))(*manifold.exp_map(x, k))  # noqa: E731
    printed_out = lambda u, k: manifold.log_map(manifold.lift(u, k), u, k)  # noqa: E731
    signed_out = lambda u, k: manifold.signed_log_map(manifold.signed_lift(u, k), u, k)  # noqa: E731
    for printed, signed, v in [(printed_into, manifold.signed_exp_map, x), (printed_out, signed_out, u)]:
        for actual, expected in zip(value_and_gradients(printed, v, k), value_and_gradients(signed, v, k), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("printed", [manifold.inverse_projection, manifold.exp_map, manifold.lift])
def test_printed_maps_refuse_zero_curvature(printed):
    with pytest.raises(ValueError, match="kappa=0 .* signed form"):
        printed(torch.ones(3), 0.0)
    for out in (manifold.projection, manifold.log_map):
        with pytest.raises(ValueError, match="kappa=0 .* signed form"):
            out(torch.ones(1), torch.ones(3), torch.tensor(0.0))


# the scales: high precision, derivatives, κ through zero, guards


EXACT = {  # of a < 0 and of a > 0, as functions of t = √|a|
    manifold.signed_cos: (mpmath.cosh, mpmath.cos),
    manifold.signed_sinc: (lambda t: mpmath.sinh(t) / t, lambda t: mpmath.sin(t) / t),
    manifold.signed_arcsinc: (lambda t: mpmath.asinh(t) / t, lambda t: mpmath.asin(t) / t),
}


@pytest.mark.parametrize("function", EXACT, ids=lambda f: f.__name__)
@given(st.floats(-12, 1).map(lambda e: 10.0**e), signs)
def test_power_series_match_40_digits_with_their_derivatives(function, size, sign):
    a = tensor(sign * (min(size, 0.98) if function is manifold.signed_arcsinc else size))
    (value,), (derivative,) = value_and_gradients(function, a)
    derivative = derivative / value_and_gradients(lambda a: a, a)[1][0]
    with mpmath.workdps(40):
        exact_function = lambda a: EXACT[function][a > 0](mpmath.sqrt(abs(a)))  # noqa: E731
        exact = exact_function(mpmath.mpf(a.item()))
        # from values of f alone, by a rule of sixth order, on whichever side of 0 a lies
        h = abs(mpmath.mpf(a.item())) * mpmath.mpf("1e-4")
        f = [exact_function(a.item() + i * h) for i in (-3, -2, -1, 1, 2, 3)]
        exact_derivative = (-f[0] + 9 * f[1] - 45 * f[2] + 45 * f[3] - 9 * f[4] + f[5]) / (60 * h)
    # in units of the largest the function gets on this scale: cos and sinc pass through zero
    assert value.item() == pytest.approx(float(exact), rel=1e-14, abs=3e-15)
    assert derivative.item() == pytest.approx(float(exact_derivative), rel=2e-14, abs=3e-15)


GEOMETRIES = [("stereographic", "ball"), ("stereographic", "raw"), ("exp_log", "ball")]


@pytest.mark.parametrize("mapping, domain", GEOMETRIES)
@given(st.floats(0, 4))
def test_scales_are_smooth_in_curvature_across_zero(mapping, domain, squared):
    options = {"mapping": mapping, "domain": domain, "boundary_eps": 4e-3}
    for scale, at_zero, slope in [
        (scale_into, 2.0, -2.0) if mapping == "stereographic" else (scale_into, 1.0, -1 / 6),
        (scale_back, 0.5, 1 / 8) if mapping == "stereographic" else (scale_back, 1.0, 1 / 6),
    ]:
        for kappa in (-1e-9, 0.0, 1e-9):
            n, k = tensor(squared), tensor(kappa)
            value = scale(n, k, **options)
            dn, dk = torch.autograd.grad(value, (n, k))
            assert value.item() == pytest.approx(at_zero + slope * squared * kappa, rel=1e-14)
            assert dk.item() == pytest.approx(slope * squared, rel=1e-7, abs=1e-14)
            assert dn.item() == pytest.approx(slope * kappa, rel=1e-7, abs=1e-300)


@given(magnitudes, magnitudes, signs)
def test_derivatives_on_both_sides_of_every_guard(kappa, squared, sign):
    rho, limit = 0.9, {}
    limit["ball"], limit["equator"] = -(rho**2), rho**2
    limit["exp-"], limit["exp+"] = -(math.asinh(2.0**15) ** 2), (rho * math.pi / 2) ** 2
    for name, scale, mapping in [
        ("ball", scale_into, "stereographic"), ("exp-", scale_into, "exp_log"), ("exp+", scale_into, "exp_log"),
        ("equator", scale_back, "stereographic"), ("equator", scale_back, "exp_log"),
    ]:  # fmt: skip
        options = {"mapping": mapping, "domain": "ball", "boundary_eps": 1 - rho}
        k = tensor(math.copysign(kappa, limit[name]))
        for factor in (0.999, 1.001, 1 + squared):
            n = tensor(factor * limit[name] / k.item())
            value = scale(n, k, **options)
            dn, dk = torch.autograd.grad(value, (n, k))
            h = 1e-5  # κ and n enter by their product: one secant serves both
            secant = (scale(n * (1 + h), k, **options) - scale(n, k * (1 - h), **options)).item() / (2 * h)
            assert dn.item() == pytest.approx(secant / n.item(), rel=1e-5)
            assert dk.item() == pytest.approx(secant / k.item(), rel=1e-5)
            if factor > 1:  # beyond it: the scale of a vector of fixed length
                assert dn.item() == pytest.approx(-value.item() / (2 * n.item()), rel=1e-11)
                assert dk.item() == pytest.approx(-value.item() / (2 * k.item()), rel=1e-11)
            # continuous at the threshold
            edge = [scale(tensor(limit[name] / k.item() * (1 + d)), k, **options).item() for d in (-1e-12, 1e-12)]
            assert edge[0] == pytest.approx(edge[1], rel=1e-9)


@given(magnitudes, st.floats(-0.0039, 0.0039), st.floats(0.0041, 100), signs)
def test_raw_domain_holds_the_pole_with_zero_derivative(kappa, held, free, sign):
    options = {"mapping": "stereographic", "domain": "raw", "boundary_eps": 4e-3}
    k = tensor(-kappa)
    n = tensor((1 - held) / kappa)
    divisor = 1 + (k * n).item()
    value = scale_into(n, k, **options)
    assert value.item() == (-500.0 if divisor < 0 else 500.0)
    assert torch.autograd.grad(value, (n, k)) == (0, 0)
    free *= sign if free < 0.9 else -1.0  # past the pole s changes sign
    n = tensor((1 - free) / kappa)
    value = scale_into(n, k, **options)
    dn, dk = torch.autograd.grad(value, (n, k))
    assert value.item() == pytest.approx(2 / free, rel=1e-10)
    assert dn.item() == pytest.approx(kappa * value.item() ** 2 / 2, rel=1e-10)
    assert dk.item() == pytest.approx(-n.item() * value.item() ** 2 / 2, rel=1e-10)


@given(seeds, magnitudes, magnitudes, signs)
def test_radial_projection_is_the_nearest_point(seed, kappa, norm, sign):
    v, radius = vector(seed, norm).detach(), 0.7
    projected = guards.radial_projection(v, torch.tensor(sign * kappa, dtype=torch.float64), radius)
    if sign < 0 or kappa * norm**2 <= radius**2:
        assert torch.equal(projected, v)
    else:
        assert_close([projected], [v * (radius / math.sqrt(kappa) / norm)], 1e-14)


@given(seeds, st.floats(-20, 25).map(lambda e: 10.0**e))
def test_saturation_keeps_the_direction_and_returns_the_rest(seed, norm):
    v = vector(seed, norm)
    held, stretch = guards.saturated(v)
    assert manifold.squared_norm(held).item() <= guards.SATURATION * (1 + 1e-14)
    assert_close([held * stretch], [v], 1e-15)
    assert stretch.item() == pytest.approx(max(norm / 1e15, 1), rel=1e-14)
    if norm < 1e15:
        assert torch.equal(held, v)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e38)])
def test_saturation_does_not_overflow(dtype, size):
    held, stretch = guards.saturated(torch.full((D,), size, dtype=dtype))
    assert torch.isfinite(held).all() and torch.isfinite(stretch).all()
    assert manifold.squared_norm(held).item() <= guards.SATURATION * 1.01
