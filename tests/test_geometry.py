"""The scales of both mappings: against reference/, their derivatives, both sides of every guard, float32 at seams."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import GEOMETRIES, around, limit_back, limits_into

from mos_kernels import MoSConfig
from mos_kernels.geometry import SATURATION, inverse_projection_scale, projection_scale
from reference.per_expert import scale_back, scale_into

geometries = pytest.mark.parametrize(("mapping", "domain"), GEOMETRIES)
directions = pytest.mark.parametrize("direction", ["into", "back"])


def config_of(mapping, domain, eps=4e-3):
    return MoSConfig(mapping=mapping, domain=domain, boundary_eps=eps)


def ours(direction, norms, kappa, config):
    """The scale and its two derivatives at pairs of norms (T,) and kappa (T,), each (T,)."""
    if direction == "into":
        return [value.diagonal() for value in inverse_projection_scale(norms, kappa, config)]
    return [value.squeeze(-1) for value in projection_scale(norms.unsqueeze(-1), kappa[:, None], config)]


def by_autograd(direction, norms, kappa, config):
    """The same from reference/, differentiated by autograd."""
    scale = scale_into if direction == "into" else scale_back
    options = {"mapping": config.mapping, "domain": config.domain, "boundary_eps": config.boundary_eps}
    norms, kappa = norms.clone().requires_grad_(), kappa.clone().requires_grad_()
    value = scale(norms.clamp(max=SATURATION)[:, None], kappa[:, None], **options).squeeze(-1)
    return [value.detach(), *torch.autograd.grad(value.sum(), (norms, kappa))]


def thresholds(direction, config):
    return limits_into(config) if direction == "into" else (limit_back(config),)


def grid(direction, config, step):
    """Values of κ·norm over all of the domain and beyond it, on both sides of zero and of every threshold."""
    values = [sign * 10.0**e for e in range(-12, 6) for sign in (1, -1)] + [0.0]
    values += [sign * v for v in (0.1, 0.24999, 0.25001, 0.5, 0.99999, 1.00001, 1.5, 2.0) for sign in (1, -1)]
    for threshold in thresholds(direction, config):
        values += around(threshold, step)
    return torch.tensor(values, dtype=torch.float64)


@geometries
@directions
@pytest.mark.parametrize("eps", [4e-3, 0.1, 0.7])
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
def test_scale_and_derivatives_equal_autograd_through_the_reference(direction, mapping, domain, eps, norm):
    config = config_of(mapping, domain, eps)
    a = grid(direction, config, 1e-9)
    norms = torch.full_like(a, norm)
    for name, value, truth in zip(
        ("scale", "by norm", "by curvature"),
        ours(direction, norms, a / norm, config),
        by_autograd(direction, norms, a / norm, config),
        strict=True,
    ):
        wrong = (value - truth).abs() > 1e-11 * truth.abs().clamp(min=1e-6)
        assert not wrong.any(), (name, a[wrong], value[wrong], truth[wrong])


@geometries
@directions
def test_derivatives_equal_finite_differences(direction, mapping, domain):
    config = config_of(mapping, domain, 0.05)
    a = grid(direction, config, 1e-3)
    a = a[(a.abs() > 1e-3) & (a != -1)]  # at -1 the raw domain jumps from one sign to the other
    norms, step = torch.full_like(a, 2.0), 1e-6
    kappa = a / norms
    _, by_norm, by_kappa = ours(direction, norms, kappa, config)
    for derivative, up, down in (
        (by_norm, (norms * (1 + step), kappa), (norms * (1 - step), kappa)),
        (by_kappa, (norms, kappa * (1 + step)), (norms, kappa * (1 - step))),
    ):
        moved = up[0] - down[0] + up[1] - down[1]
        secant = (ours(direction, *up, config)[0] - ours(direction, *down, config)[0]) / moved
        scale = ours(direction, norms, kappa, config)[0].abs()
        allowed = 1e-6 * derivative.abs() + 1e-9 * scale / moved.abs() * step
        assert ((derivative - secant).abs() <= allowed.clamp(min=1e-9)).all()


@settings(max_examples=200)
@given(a=st.floats(-1e4, 1e4), geometry=st.sampled_from(GEOMETRIES), n=st.floats(1e-3, 1e3))
def test_scales_depend_on_the_product_of_curvature_and_norm_alone(a, geometry, n):
    config = config_of(*geometry)
    norms, kappa = torch.tensor([1.0, n], dtype=torch.float64), torch.tensor([a, a / n], dtype=torch.float64)
    if any(abs(a / limit - 1) < 1e-9 for limit in (*limits_into(config), limit_back(config))):
        return
    for direction in ("into", "back"):
        scale, by_norm, by_kappa = ours(direction, norms, kappa, config)
        assert scale[0].item() == pytest.approx(scale[1].item(), rel=1e-9)
        assert by_norm[0].item() == pytest.approx(n * by_norm[1].item(), rel=1e-9, abs=1e-300)
        assert by_kappa[0].item() == pytest.approx(by_kappa[1].item() / n, rel=1e-9, abs=1e-300)


@geometries
@directions
def test_continuous_at_every_threshold(direction, mapping, domain):
    config = config_of(mapping, domain)
    for threshold in thresholds(direction, config):
        a = torch.tensor([threshold * (1 - 1e-9), threshold * (1 + 1e-9)], dtype=torch.float64)
        scale, *_ = ours(direction, torch.ones_like(a), a, config)
        assert scale[0].item() == pytest.approx(scale[1].item(), rel=1e-6)


@geometries
def test_beyond_a_radial_guard_the_vector_keeps_its_length(mapping, domain):
    config = config_of(mapping, domain)
    into = () if domain == "raw" else thresholds("into", config)
    for direction, limits in (("into", into), ("back", thresholds("back", config))):
        for limit in limits:
            n = torch.tensor([1 + 1e-12, 4.0, 1e4, 1e12], dtype=torch.float64)
            scale, *_ = ours(direction, n, torch.full_like(n, limit), config)
            length = scale * n.sqrt()
            torch.testing.assert_close(length, length[:1].expand_as(length), rtol=1e-9, atol=0)


@geometries
def test_flat_space_is_exactly_lora(mapping, domain):
    config = config_of(mapping, domain)
    for dtype in (torch.float32, torch.float64):
        n = torch.tensor([0.0, 1e-30, 1.0, 1e20, 1e30, 1e38], dtype=dtype).clamp(max=SATURATION)
        zero = torch.zeros(1, dtype=dtype)
        into, *_ = inverse_projection_scale(n, zero, config)
        back, *_ = projection_scale(n[:, None], zero, config)
        assert (into * back == 1).all()


@geometries
@directions
def test_extremes_are_finite_in_float32(direction, mapping, domain):
    config = config_of(mapping, domain)
    norms = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e10, 1e20, SATURATION]
    kappas = [sign * size for size in (0.0, 1e-45, 1e-30, 1e-9, 1e-3, 1.0, 1e3, 1e8) for sign in (1, -1)]
    n, kappa = (t.flatten() for t in torch.meshgrid(torch.tensor(norms), torch.tensor(kappas), indexing="ij"))
    for value in ours(direction, n, kappa, config):
        assert torch.isfinite(value).all(), (n[~torch.isfinite(value)], kappa[~torch.isfinite(value)])


@geometries
@directions
def test_a_nan_stays_a_nan(direction, mapping, domain):
    nan = torch.tensor([torch.nan])
    for n, kappa in ((nan, torch.ones(1)), (torch.ones(1), nan)):
        assert torch.isnan(ours(direction, n, kappa, config_of(mapping, domain))[0]).all()


# float32 at the seams between series and closed form, and next to the guards


@geometries
@directions
def test_float32_is_as_accurate_as_torch_at_every_seam(direction, mapping, domain):
    config = config_of(mapping, domain)
    seams = [0.0, 0.25, -0.25, 1.0, -1.0, 1e-3, -1e-3, *thresholds(direction, config)]
    for seam in seams:
        width = 0.05 * max(abs(seam), 0.01)
        a = torch.linspace(seam - width, seam + width, 401, dtype=torch.float64)
        # away from the threshold itself, where float32 may take the other side
        a = a[[min(abs(v - t) for t in thresholds(direction, config)) > 1e-5 * max(abs(v), 1) for v in a.tolist()]]
        norms, kappa = torch.full_like(a, 0.7).float(), (a / 0.7).float()
        truths = ours(direction, norms.double(), kappa.double(), config)
        plain = by_autograd(direction, norms, kappa, config)
        for name, value, torch_value, truth in zip(
            ("scale", "by norm", "by curvature"), ours(direction, norms, kappa, config), plain, truths, strict=True
        ):
            error, torch_error = ((v.double() - truth).abs().max().item() for v in (value, torch_value))
            assert error <= 2 * torch_error + 1e-6 * truth.abs().max().item(), (name, seam, error, torch_error)


EDGES = (1e-1, 4e-3, 1e-3, 1e-6)


def held_by_torch(direction, norms, kappa, config):
    """The scale and its derivatives with MATH.md's own form beyond each radial guard: edge / √|a|, -scale / (2a)."""
    a, found = kappa * norms, by_autograd(direction, norms, kappa, config)
    if direction == "into" and config.domain == "raw":
        return found
    for limit in thresholds(direction, config):
        outside = a < limit if limit < 0 else a > limit
        ones = torch.ones(1, dtype=torch.float64)
        edge = by_autograd(direction, ones, ones * limit * (1 - 1e-15), config)[0].item() * abs(limit) ** 0.5
        scale = edge / a.abs().sqrt()
        beyond = (scale, -scale / (2 * norms), -scale / (2 * kappa))
        found = [torch.where(outside, b, f) for b, f in zip(beyond, found, strict=True)]
    return found


def points_about_the_guards(direction, config, draw) -> torch.Tensor:
    """Values of κ·norm well inside, close to, and far beyond each threshold, drawn, none within 2e-6 of it."""
    values = []
    for threshold in thresholds(direction, config):
        close = [
            1 + sign * 10.0**e for e in draw(st.lists(st.floats(-5, -1), min_size=4, max_size=4)) for sign in (1, -1)
        ]
        far = [10.0**e for e in draw(st.lists(st.floats(0.3, 8), min_size=4, max_size=4))]
        inside = draw(st.lists(st.floats(0.01, 0.9), min_size=4, max_size=4))
        values += [threshold * factor for factor in (*close, *far, *inside)]
    return torch.tensor(values, dtype=torch.float64)


@geometries
@directions
@pytest.mark.parametrize("eps", EDGES)
@given(data=st.data(), exponent=st.floats(-6, 3))
def test_float32_at_the_guards_is_as_accurate_as_torch(direction, mapping, domain, eps, data, exponent):
    """Each point by itself, relative to its own size: nothing else is near to hide an error.

    Within exp/log's domain, where the closed forms of both lose digits at random, the largest of torch's errors over
    all points and 33 about each.
    """
    config = config_of(mapping, domain, eps)
    a = points_about_the_guards(direction, config, data.draw)
    kappa = (a.sign() * 10.0**exponent).float()
    norms = (a / kappa.double()).float()
    limits = torch.tensor(thresholds(direction, config), dtype=torch.float64)
    against = (norms.double() * kappa.double())[:, None] / limits
    clear = (against - 1).abs().amin(-1) > 2e-6
    norms, kappa, beyond = norms[clear], kappa[clear], (against > 1).any(-1)[clear]
    about = (norms[~beyond].double()[:, None] * torch.linspace(0.999, 1.001, 33, dtype=torch.float64)).flatten().float()
    kappa_about = kappa[~beyond].repeat_interleave(33)
    against = (about.double() * kappa_about.double())[:, None] / limits
    within = (against < 1 - 2e-6).all(-1)
    about, kappa_about = about[within], kappa_about[within]
    errors_about = [
        ((v.double() - truth) / truth.abs().clamp(min=1e-30)).abs()
        for v, truth in zip(
            held_by_torch(direction, about, kappa_about, config),
            ours(direction, about.double(), kappa_about.double(), config), strict=True,
        )
    ]  # fmt: skip
    for name, value, by_torch, truth, near in zip(
        ("scale", "by norm", "by curvature"), ours(direction, norms, kappa, config),
        held_by_torch(direction, norms, kappa, config), ours(direction, norms.double(), kappa.double(), config),
        errors_about, strict=True,
    ):  # fmt: skip
        error, torch_error = (((v.double() - truth) / truth.abs().clamp(min=1e-30)).abs() for v in (value, by_torch))
        if mapping == "exp_log":
            torch_error = torch.where(beyond, torch_error, torch.cat([torch_error, near]).amax())
        wrong = error > 2 * torch_error.clamp(min=2.0**-22)
        assert not wrong.any(), (name, norms[wrong], kappa[wrong], error[wrong], torch_error[wrong])


@pytest.mark.parametrize("seam", [0.25, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_series_and_closed_form_meet(seam, sign):
    config = config_of("exp_log", "ball", 1e-3)
    for direction in ("into", "back"):
        if direction == "back" and sign * seam > limit_back(config):
            continue
        a = torch.tensor([sign * seam * (1 - 1e-15), sign * seam * (1 + 1e-15)], dtype=torch.float64)
        for value in ours(direction, torch.ones_like(a), a, config):
            assert value[0].item() == pytest.approx(value[1].item(), rel=2e-14)


def test_the_values_of_the_formulas():
    """Worked by hand: κ‖·‖² = ±0.64, so c‖·‖ = 0.8."""
    norms, kappa = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor([0.32, -0.32], dtype=torch.float64)
    for mapping, direction, expected in (
        ("stereographic", "into", (2 / 1.64, 2 / 0.36)),
        ("stereographic", "back", (1 / (1 + 0.6), 1 / (1 + math.sqrt(1.64)))),
        ("exp_log", "into", (math.sin(0.8) / 0.8, math.sinh(0.8) / 0.8)),
        ("exp_log", "back", (math.asin(0.8) / 0.8, math.asinh(0.8) / 0.8)),
    ):
        scale, *_ = ours(direction, norms, kappa, config_of(mapping, "ball"))
        assert scale.tolist() == pytest.approx(expected, rel=1e-14)
