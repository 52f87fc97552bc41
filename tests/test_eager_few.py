"""Few tokens in NumPy: routing and bridge as the eager backend's, guards and broken input included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_kernels import MoSConfig
from mos_kernels.backends import eager, eager_few
from mos_kernels.backends.interface import BridgeInputs
from mos_kernels.routing import route


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 5), normalise=st.booleans(), tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_gates(seed, k, normalise, tied, dtype):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3
    logits = logits.round() if tied else logits
    config = MoSConfig(spaces={"hyperbolic": 5}, num_experts_per_tok=k, norm_topk_prob=normalise)
    expected = route(logits, k, normalise)
    found = torch.from_numpy(eager_few.route(logits.numpy(), config))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.to(dtype), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_router_shows(bad):
    logits = torch.randn(3, 5)
    logits[1, 2] = bad
    config = MoSConfig(spaces={"hyperbolic": 5}, num_experts_per_tok=2)
    found = torch.from_numpy(eager_few.route(logits.numpy(), config))
    assert found[1].isnan().any()
    torch.testing.assert_close(found[::2], route(logits, 2, True)[::2])


@given(
    seed=st.integers(0, 10**6), domain=st.sampled_from(["ball", "raw"]), shared=st.booleans(),
    eps=st.sampled_from([4e-3, 0.05]), size=st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e15, 1e22]),
    kappa=st.lists(st.sampled_from([0.0, 1e-9, -1e-9, 0.3, -0.3, 2.0, -2.0, -1e4]), min_size=3, max_size=3),
    B=st.sampled_from([0.0, 1e-3, 1.0, 1e4]), m=st.integers(1, 2),
)  # fmt: skip
def test_z_is_as_right_as_the_eager_bridge(seed, domain, shared, eps, size, kappa, B, m):
    config = MoSConfig(
        r=2, spaces={"hyperbolic": 3}, num_experts_per_tok=2, domain=domain, share_a=shared, boundary_eps=eps
    )
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(4, m, 1 if shared else 3, 2, generator=generator) * size
    n = torch.rand(4, generator=generator) * size * size
    n = n.clamp(max=1e30)
    gates = torch.rand(4, 3, generator=generator)
    factors = [torch.randn(5, 3, 2, generator=generator) * B for _ in range(m)]
    kappas = [torch.tensor(kappa) * (1 - 0.5 * i) for i in range(m)]

    def by_torch(dtype):
        for i in range(m):
            made = eager.prepare(factors[i].to(dtype), dtype, config)
            part = p[:, i].squeeze(1) if shared else p[:, i]
            routed = part.to(dtype), n.to(dtype), gates.to(dtype), False, kappas[i].to(dtype)
            z, _ = eager.bridge(BridgeInputs(*routed, made), config)
            yield z

    found = few(p, n, gates, factors, kappas, config)
    for i, (narrow, truth) in enumerate(zip(by_torch(torch.float32), by_torch(torch.float64), strict=True)):
        error, allowed = ((z.double() - truth).abs().max() for z in (found[i], narrow))
        assert error <= 2 * allowed + 1e-6 * truth.abs().max()


def few(p, n, gates, factors, kappas, config):
    """`eager_few.bridge` of tensors, as one with the guards' warnings off."""
    prepared = [eager.prepare(factor, torch.float32, config) for factor in factors]
    A = [torch.empty(*((2,) if config.share_a else (3, 2)), 5) for _ in factors]
    made = eager_few.constants(A, kappas, factors, prepared, None, torch.float32, config)
    with np.errstate(all="ignore"):
        z = eager_few.bridge(p.numpy(), n.double().numpy()[:, None, None], gates.numpy(), made)
    return torch.from_numpy(z).transpose(0, 1)


def test_huge_values_of_both_signs_stay_finite():
    """hᵀGh adds terms that float32 cannot hold, of both signs."""
    config = MoSConfig(r=2, spaces={"euclidean": 2}, num_experts_per_tok=1)
    factor = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).unsqueeze(1).expand(-1, 2, -1).contiguous()
    p, n, gates, kappa = torch.tensor([[1e25, -0.9e25]]), torch.tensor([1e30]), torch.ones(1, 2), torch.zeros(2)
    made = eager.prepare(factor, torch.float32, config)
    z, _ = eager.bridge(BridgeInputs(p, n, gates, False, kappa, made), config)
    found = few(p.view(1, 1, 1, 2), n, gates, [factor], [kappa], config)
    assert z.isfinite().all()
    torch.testing.assert_close(found[0].float(), z)


def test_a_broken_token_leaves_the_others_as_they_are():
    config = MoSConfig(r=2, spaces={"hyperbolic": 2, "spherical": 1}, num_experts_per_tok=2)
    p, n, gates = torch.randn(3, 1, 1, 2), torch.tensor([1.0, 1e6, 2.0]), torch.rand(3, 3)
    factors, kappas = [torch.randn(5, 3, 2)], [torch.tensor([-0.5, -0.2, 0.3])]
    whole = few(p, n, gates, factors, kappas, config)
    for broken in (p.clone(), n.clone()):
        of_p = broken.dim() > 1
        broken[(0, 0) if of_p else 0] = torch.nan
        found = few(broken if of_p else p, n if of_p else broken, gates, factors, kappas, config)
        assert found[0, 0].isnan().any() and torch.equal(found[:, 1:], whole[:, 1:])
