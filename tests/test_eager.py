"""The eager backend against reference/ in float64: outputs to 1e-10, every gradient to 1e-9, at every guard."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ACTIVATIONS,
    GEOMETRIES,
    around,
    assert_results_close,
    cases,
    guard_case,
    leaf,
    limit_back,
    limits_into,
    make_case,
    normal,
    seeds,
)

import reference.routing
from mos_kernels import MoSConfig, MoSLinear, MoSRouter
from mos_kernels.backends import eager
from mos_kernels.functional import mos_linear, mos_route

OUTPUT, GRADIENT = 1e-10, 1e-9

geometries = pytest.mark.parametrize(("mapping", "domain"), GEOMETRIES)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def assert_as_reference(case, dy=None, **options):
    y = case.ours(**options.get("ours", {}))
    truth = case.reference(**options.get("reference", {}))
    assert_results_close({"y": y}, {"y": truth}, OUTPUT)
    assert_results_close(case.gradients(y, dy), case.gradients(truth, dy), GRADIENT)


# any configuration, any shape


@settings(max_examples=150)
@given(case=cases(), wrapped=st.booleans())
def test_output_and_every_gradient_equal_the_reference(case, wrapped):
    assert_as_reference(case.wrapped() if wrapped else case)


@settings(max_examples=40)
@given(case=cases(tokens=st.sampled_from([(1,), (5,), (2, 3)])), seed=seeds, p=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_equals_the_reference_under_the_same_mask(case, seed, p):
    d_in = case.x.shape[-1]
    torch.manual_seed(seed)
    keep_bits = eager.draw_dropout(case.x.detach().reshape(-1, d_in), p).state
    column = torch.arange(d_in)
    keep = (keep_bits[:, column // 8] >> (column % 8).to(torch.uint8) & 1).bool().reshape(case.x.shape)
    torch.manual_seed(seed)
    assert_as_reference(case, ours={"dropout_p": p}, reference={"keep": keep, "dropout_p": p})


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("d_in", [1, 8, 13, 250])
def test_dropout_keeps_the_share_it_should_and_scales_it(p, d_in):
    torch.manual_seed(0)
    x = torch.ones(40_000 // d_in, d_in)
    dropped = eager.drop(x, eager.draw_dropout(x, p))
    assert ((dropped == 0) | (dropped == x / (1 - p))).all()
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation)
    assert (dropped == 0).float().mean(0).sub(p).abs().max() < 6 * deviation * math.sqrt(d_in)  # every column alike


def test_activations_in_chunks_equal_one_chunk(monkeypatch):
    case = make_case(MoSConfig(r=3, activation="silu"), tokens=(7,), own_router=True)
    whole = case.results(case.ours())
    monkeypatch.setattr(eager, "CHUNK", 2 * case.weight.shape[0])
    assert_results_close(case.results(case.ours()), whole, 1e-14)


# guards


@geometries
@activations
@pytest.mark.parametrize("share_a", [True, False])
def test_both_sides_of_every_guard(mapping, domain, activation, share_a):
    config = MoSConfig(
        r=3, spaces={"euclidean": 10}, num_experts_per_tok=10, mapping=mapping, domain=domain, activation=activation,
        share_a=share_a,
    )  # fmt: skip
    into = [sign * a for limit in limits_into(config) for a in around(limit) for sign in (1, -1)]
    back = [*around(limit_back(config)), 1e-3]
    pairs = [(a, math.copysign(b, a)) for a in into for b in back]
    for start in range(0, len(pairs), 10):
        targets = pairs[start : start + 10]
        case = guard_case(config, targets)
        n = case.x.detach().square().sum()
        for e, (a, _) in enumerate(targets):
            assert case.kappa[e].item() * n.item() == pytest.approx(a, rel=1e-9)
        assert_as_reference(case)


@geometries
def test_guard_cases_attain_what_they_say(mapping, domain):
    config = MoSConfig(r=3, spaces={"euclidean": 4}, mapping=mapping, domain=domain, num_experts_per_tok=4)
    targets = [(0.3, 0.99), (0.3, 30.0), (-0.3, -2.0), (30.0, 0.5)]
    case = guard_case(config, targets)
    p = case.A @ case.x[0]
    for e, (_, back) in enumerate(targets):
        scale, _, _ = eager.geometry.inverse_projection_scale(case.x.square().sum(-1), case.kappa, config)
        u = case.B[:, e] @ p * scale[0, e]
        assert case.kappa[e].item() * u.square().sum().item() == pytest.approx(back, rel=1e-9)


@geometries
@activations
def test_curvature_at_and_around_zero(mapping, domain, activation):
    kappas = (-1e-3, -1e-9, -1e-300, 0.0, 1e-300, 1e-9, 1e-3)
    config = MoSConfig(
        r=2, spaces={"euclidean": 7}, num_experts_per_tok=3, mapping=mapping, domain=domain, activation=activation
    )
    for norms in ((1.0,), (1e-3, 10.0), (0.0,)):
        assert_as_reference(make_case(config, (3,), kappa=kappas, norms=norms))


@geometries
@activations
@pytest.mark.parametrize("own_router", [True, False])
def test_zero_B_and_zero_tokens(mapping, domain, activation, own_router):
    config = MoSConfig(r=2, mapping=mapping, domain=domain, activation=activation)
    case = make_case(config, (3,), norms=(0.0, 1.0, 100.0), b_scale=0.0, own_router=own_router)
    assert_as_reference(case)
    found = case.gradients(case.ours())
    assert found["B"].abs().max() > 0
    assert found["A"].abs().max() == 0


@geometries
@activations
@pytest.mark.parametrize(("norm", "b_scale"), [(1e18, 1e-15), (1.0, 1e18), (1e18, 1e3)])
def test_saturated_norms(mapping, domain, activation, norm, b_scale):
    """Beyond 1e30 a squared norm stands still, in value and derivative."""
    config = MoSConfig(r=2, mapping=mapping, domain=domain, activation=activation)
    case = make_case(
        config, (3,), norms=(norm,), b_scale=b_scale, kappa=(-0.7, -1e-20, -1e-31, 0.9, 1e-20, 1e-31, 0, 0)
    )
    assert_as_reference(case)


# strides


def _transposed(x):
    return x.detach().t().contiguous().t()


def _expanded(x):
    return x.detach()[:1].expand(x.shape)


def _sliced(x):
    storage = torch.full((2 * x.shape[0], 3 * x.shape[1] + 1), torch.nan, dtype=x.dtype)
    view = storage[::2, 1::3]
    return view.copy_(x.detach())


def _of_two_batches(x):
    return x.detach().reshape(2, -1, x.shape[-1]).transpose(0, 1)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("layout", [_transposed, _expanded, _sliced, _of_two_batches])
@pytest.mark.parametrize("own_router", [True, False])
def test_strided_input(layout, own_router, activation):
    case = make_case(MoSConfig(r=3, activation=activation), (6,), own_router=own_router)
    x = layout(case.x)
    assert not x.is_contiguous()
    gates = None if own_router else leaf(case.gates.reshape(*x.shape[:-1], -1))
    case = case.replace(x=x.requires_grad_(), gates=gates)
    assert_as_reference(case)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize(
    "dy",
    [
        torch.ones((), dtype=torch.float64).expand(6, 6),
        normal(0, 6).expand(6, 6),
        normal(0, 6, 1).expand(6, 6),
        normal(0, 6, 6).t(),
        normal(0, 12, 18)[::2, ::3],
    ],
    ids=["scalar", "row", "column", "transposed", "sliced"],
)
def test_strided_upstream_gradient(dy, activation):
    for own_router in (True, False):
        case = make_case(MoSConfig(r=3, activation=activation), (6,), d_out=6, own_router=own_router)
        assert_as_reference(case, dy)


def test_strided_parameters():
    case = make_case(MoSConfig(r=3), (4,), own_router=True)
    strided = {name: _transposed(getattr(case, name)).requires_grad_() for name in ("weight", "A", "router")}
    strided["B"] = case.B.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    assert_as_reference(case.replace(**strided))


def test_the_same_sum_of_an_expanded_leaf_reaches_the_leaf():
    case = make_case(MoSConfig(r=3), (4,))
    token = leaf(case.x[0])
    grads = []
    for run in (case.replace(x=token.expand(4, -1)).ours, case.replace(x=token.expand(4, -1)).reference):
        grads.append(torch.autograd.grad(run().sum(), token)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


# gradcheck, which needs no reference


def _gradcheck(case):
    names = list(case.inputs)

    def run(*tensors):
        return case.replace(**dict(zip(names, tensors, strict=True))).ours()

    slope = max(gradient.abs().max().item() for gradient in case.gradients(case.ours()).values())
    assert torch.autograd.gradcheck(run, tuple(case.inputs.values()), eps=1e-7, atol=1e-6 * max(slope, 1), rtol=1e-6)


@geometries
@activations
def test_gradcheck(mapping, domain, activation):
    config = MoSConfig(
        r=2, spaces={"hyperbolic": 1, "spherical": 1, "euclidean": 1}, num_experts_per_tok=2,
        mapping=mapping, domain=domain, activation=activation, share_a=activation == "tanh",
        norm_topk_prob=mapping == "exp_log",
    )  # fmt: skip
    for own_router in (True, False):
        _gradcheck(make_case(config, (2,), 3, 3, kappa=(-0.7, 0.9, 0.0), norms=(0.5, 3.0), own_router=own_router))


@geometries
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_gradcheck_on_both_sides_of_every_guard(mapping, domain, activation):
    config = MoSConfig(
        r=2, spaces={"euclidean": 4}, num_experts_per_tok=4, mapping=mapping, domain=domain, activation=activation,
        boundary_eps=0.05,
    )  # fmt: skip
    for limit in limits_into(config):
        into = around(limit, step=0.02)
        _gradcheck(guard_case(config, [(a, math.copysign(0.2, a)) for a in into], d_in=3, d_out=3))
    back = around(limit_back(config), step=0.02)
    _gradcheck(guard_case(config, [(0.5, b) for b in back], d_in=3, d_out=3))


# the modules


def _reference_of(layer, x, gates=None, kappa=None):
    c = layer.config
    return reference.layer.mos_linear(
        x, layer.weight, layer.bias, layer.mos_lora_A, layer.mos_lora_B,
        (layer.curvature if kappa is None else kappa).to(x.dtype), gates=gates,
        router=layer.mos_router if gates is None else None, scaling=c.scaling,
        num_experts_per_tok=c.num_experts_per_tok, norm_topk_prob=c.norm_topk_prob, activation=c.activation,
        mapping=c.mapping, domain=c.domain, boundary_eps=c.boundary_eps,
    )  # fmt: skip


def _randomised(layer, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.mos_lora_B.normal_()
        layer.mos_curvature.normal_(std=1e-2)
        if layer.mos_router is not None:
            layer.mos_router.normal_()
    return layer


@pytest.mark.parametrize("trainable_base", [True, False])
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@geometries
def test_module_equals_the_reference(mapping, domain, scope, trainable_base):
    config = MoSConfig(r=3, router_scope=scope, mapping=mapping, domain=domain, length_unit=1.5, curvature_lr_ratio=7.0)
    layer = _randomised(MoSLinear(9, 5, config=config, dtype=torch.float64)).eval()
    layer.weight.requires_grad_(trainable_base)
    layer.bias.requires_grad_(trainable_base)
    x = leaf(normal(1, 2, 3, 9))
    gates = leaf(normal(2, 2, 3, 8).softmax(-1)) if scope == "ffn" else None
    trained = [x, *(p for p in layer.parameters() if p.requires_grad), *([gates] if scope == "ffn" else [])]
    y, truth = layer(x, gates), _reference_of(layer, x, gates)
    assert_results_close({"y": y}, {"y": truth}, OUTPUT)
    dy = normal(3, *y.shape)
    for ours, theirs in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(truth, trained, dy), strict=True):
        assert ours.dtype == theirs.dtype
        # the gradient of the fp32 offset is rounded to fp32
        tolerance = GRADIENT if ours.dtype == torch.float64 else 1e-6
        assert_results_close({"gradient": ours}, {"gradient": theirs}, tolerance)


# routing and its injected loss


@settings(max_examples=30)
@given(data=st.data(), seed=seeds, norm_topk_prob=st.booleans(), masked=st.sampled_from([None, "some", "all"]))
def test_router_equals_the_reference_with_its_loss(data, seed, norm_topk_prob, masked):
    E = data.draw(st.integers(1, 8))
    k = data.draw(st.integers(1, E))
    shape = data.draw(st.sampled_from([(0,), (1,), (6,), (2, 3)]))
    config = MoSConfig(spaces={"euclidean": E}, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    case = make_case(config, shape, 7, seed=seed, own_router=True)
    mask = None if masked is None else torch.zeros(shape, dtype=torch.bool)
    if masked == "some":
        mask = normal(seed, *shape) > 0
    coefficient = 0.37
    gates = mos_route(
        case.x, case.router, config=config, aux_weight=torch.tensor([coefficient], dtype=torch.float64),
        token_mask=mask, backend="eager",
    )  # fmt: skip
    logits = reference.routing.router_logits(case.x, case.router)
    truth = reference.routing.top_k_gates(logits, k, norm_topk_prob)
    loss = coefficient * reference.routing.load_balancing_loss(logits, k, mask)
    dgates, inputs = normal(1, *gates.shape), (case.x, case.router)
    ours = torch.autograd.grad(gates, inputs, dgates)
    theirs = torch.autograd.grad((truth * dgates).sum() + loss, inputs)
    names = ("x", "router")
    assert_results_close({"gates": gates}, {"gates": truth}, 1e-13)
    assert_results_close(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), 1e-11)


@settings(max_examples=30)
@given(
    case=cases(tokens=st.sampled_from([(1,), (6,), (2, 3)]), max_rank=3), kept=st.sampled_from([None, 0.0, 0.5, 1.0])
)
def test_linear_with_its_own_router_adds_the_gradient_of_its_loss(case, kept):
    if case.router is None:
        case = make_case(case.config, case.x.shape[:-1], 7, own_router=True)
    coefficient, tokens = 0.375, case.x.shape[:-1]
    mask = None if kept is None else torch.linspace(0, 1, tokens.numel()).reshape(tokens) < kept
    y = case.ours(aux_weight=torch.tensor([coefficient]), token_mask=mask)
    loss = reference.routing.load_balancing_loss(
        reference.routing.router_logits(case.x, case.router), case.config.num_experts_per_tok, mask
    )
    dy, truth = case.upstream(), case.reference()
    theirs = case.gradients((truth * dy).sum() + coefficient * loss, torch.ones(()).double())
    assert_results_close(case.gradients(y, dy), theirs, GRADIENT)


@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_the_loss_is_injected_in_training_mode_with_gradients_on_alone(scope):
    config = MoSConfig(r=2, router_scope=scope, router_aux_loss_coef=0.5)
    x = normal(0, 5, 6)
    if scope == "ffn":
        module = MoSRouter(6, config, dtype=torch.float64)
        router = module.weight
    else:
        module = _randomised(MoSLinear(6, 4, config=config, dtype=torch.float64))
        router = module.mos_router

    def gradient(training):
        module.train(training)
        y = module(x)
        return torch.autograd.grad(y, router, normal(1, *y.shape))[0]

    loss = reference.routing.load_balancing_loss(reference.routing.router_logits(x, router), config.num_experts_per_tok)
    (expected,) = torch.autograd.grad(0.5 * loss, router)
    torch.testing.assert_close(gradient(True) - gradient(False), expected, rtol=1e-10, atol=1e-14)
    module.mos_aux_weight.fill_(2.0)
    torch.testing.assert_close(gradient(True) - gradient(False), 4 * expected, rtol=1e-10, atol=1e-14)
    module.config = dataclasses.replace(config, router_aux_loss_coef=0.0)
    assert torch.equal(gradient(True), gradient(False))


# what is refused, before anything is computed


def _refusals():
    case = make_case(MoSConfig(r=3), (4,))
    x, gates = case.x.detach(), case.gates.detach()
    yield "width 5", case.replace(x=x[:, :5])
    yield "float32", case.replace(x=x.float())
    yield "gates have shape", case.replace(gates=gates[:, :3])
    yield "gates have shape", case.replace(gates=gates[:3])
    yield "no gates were passed", case.replace(gates=None)
    yield "A has shape", case.replace(A=case.A[:2])
    yield "B has shape", case.replace(B=case.B[:, :2])
    yield "kappa has shape", case.replace(kappa=case.kappa[:2])
    yield "router has shape", make_case(MoSConfig(r=3), (4,), own_router=True).replace(router=case.A)
    yield "is no backend", (case, {"backend": "cuda"})


@pytest.mark.parametrize("index", range(10))
def test_what_does_not_fit_is_refused(index):
    message, case = list(_refusals())[index]
    case, options = case if isinstance(case, tuple) else (case, {})
    with pytest.raises(ValueError, match=message):
        case.ours(**options)


def test_integer_input_is_refused():
    case = make_case(MoSConfig(r=3), (4,))
    with pytest.raises(ValueError, match="int64"):
        mos_linear(
            case.x.long(), case.weight, None, case.A, case.B, case.kappa, gates=case.gates, config=case.config
        )  # fmt: skip


def test_router_refuses_a_wrong_width_or_mask():
    config = MoSConfig()
    with pytest.raises(ValueError, match="width 5, the router reads 7"):
        mos_route(normal(0, 3, 5), normal(1, 8, 7), config=config)
    with pytest.raises(ValueError, match=r"token_mask has shape \(2,\)"):
        mos_route(normal(0, 3, 7), normal(1, 8, 7), config=config, token_mask=torch.ones(2, dtype=torch.bool))


def test_tensors_of_several_devices_are_refused():
    case = make_case(MoSConfig(r=3), (4,))
    for name in ("A", "B", "kappa", "gates", "weight"):
        with pytest.raises(ValueError, match=f"{name} is on meta and x on cpu"):
            case.replace(**{name: getattr(case, name).to("meta")}).ours()
    with pytest.raises(ValueError, match="router is on meta"):
        mos_route(normal(0, 3, 7), normal(1, 8, 7).to("meta"), config=case.config)


def test_second_derivatives_are_refused():
    case = make_case(MoSConfig(r=3), (4,))
    # with a constant dy nothing later would notice that the gradient has lost its own graph
    for loss in (case.ours().square().sum(), case.ours().sum()):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, case.x, create_graph=True)
