"""What autograd and its users do with the layer: frozen inputs, repeated and checkpointed backward, threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import compare, results
from strategies import make_case
from torch.utils.checkpoint import checkpoint

from mos_kernels import MoSConfig, MoSLinear, MoSRouter
from mos_kernels.backends import triton as backend
from mos_kernels.backends.triton import launch

LINEAR = MoSConfig(r=3, router_scope="linear", num_experts_per_tok=2, spaces={"hyperbolic": 2, "spherical": 1})


def linear_case(activation="identity", own_router=True, tokens=(9,)):
    config = MoSConfig(**{**LINEAR.to_dict(), "activation": activation})
    return make_case(config, tokens, d_in=18, d_out=13, own_router=own_router).to(torch.float32)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("own_router", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.one_at_a_time("activation", "own_router", "dropout_p")
def test_each_gradient_alone_and_nothing_else_is_written(activation, own_router, dropout_p):
    case = linear_case(activation, own_router)
    dy = case.upstream(torch.float32)
    everything = results(case, dy, "triton", dropout_p=dropout_p)
    for wanted in (*case.inputs, None):
        values = {name: t.detach().requires_grad_(name == wanted) for name, t in case.inputs.items()}
        before = {name: t.detach().clone() for name, t in values.items()}
        found = results(case.replace(**values), dy, "triton", dropout_p=dropout_p)
        assert found.keys() == {"y", wanted} - {None}
        assert all(torch.equal(value, everything[name]) or name == "y" for name, value in found.items()), wanted
        torch.testing.assert_close(found["y"], everything["y"], rtol=1e-5, atol=1e-6)  # without a backward, in splits
        assert all(torch.equal(t.detach(), before[name]) for name, t in values.items())


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("tokens", [(40,), (150,)])
def test_gradients_are_bitwise_the_same_from_run_to_run(activation, tokens):
    case = linear_case(activation, tokens=tokens)
    dy = case.upstream(torch.float32)
    first, second = (results(case, dy, "triton", aux_weight=0.1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_a_graph_that_is_retained_gives_the_same_twice(activation):
    case = linear_case(activation)
    y, dy = case.ours("triton"), case.upstream(torch.float32)
    inputs = list(case.inputs.values())
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(map(torch.equal, first, second))


def test_two_forwards_before_their_backwards():
    cases = [linear_case(), linear_case(tokens=(70,))]
    alone = [case.results(case.ours("triton"), case.upstream(torch.float32)) for case in cases]
    outputs = [case.ours("triton") for case in cases]
    for case, y, truth in zip(reversed(cases), reversed(outputs), reversed(alone), strict=True):
        found = case.results(y, case.upstream(torch.float32))
        assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_factor_changed_between_forward_and_backward_is_noticed(name):
    """A step of an optimizer there: z and G, which forward left, are of the B before it."""
    case = linear_case()
    y = case.ours("triton")
    with torch.no_grad():
        case.inputs[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    case = linear_case()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(case.ours("triton").sum(), case.x, create_graph=True)


def ffn(scope: str):
    """A function of x and the modules that it runs, on the kernels."""
    torch.manual_seed(0)
    config = MoSConfig(r=2, router_scope=scope, init_lora_weights=False, curvature_lr_ratio=1.0)
    up, router = MoSLinear(14, 11, config=config), MoSRouter(14, config)
    if scope == "linear":
        return lambda x: up(x, backend="triton").tanh(), torch.nn.ModuleList([up])
    return lambda x: up(x, router(x, backend="triton"), backend="triton").tanh(), torch.nn.ModuleList([up, router])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(use_reentrant, scope, dropout_p):
    block, modules = ffn(scope)
    for module in modules:
        module.config = MoSConfig(**{**module.config.to_dict(), "lora_dropout": dropout_p})
    x = torch.randn(10, 14, requires_grad=True)
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        modules.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in modules.parameters() if p.requires_grad)])
    assert all(g is not None and g.abs().max() > 0 for g in found[0])
    assert all(map(torch.equal, *found))


def test_gradients_that_nobody_asks_for():
    """Of an output that is not used; and of gates whose linear is frozen."""
    block, modules = ffn("ffn")
    x = torch.randn(6, 14, requires_grad=True)
    block(x)
    (x * 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0)) and all(p.grad is None for p in modules.parameters())
    for parameter in modules[0].parameters():
        parameter.requires_grad_(False)
    block(x).sum().backward()
    assert modules[1].weight.grad.abs().max() > 0 and modules[0].mos_lora_A.grad is None


def test_two_threads_do_not_meet(monkeypatch):
    """Launches take turns, as Triton's interpreter needs; everything around them runs side by side."""
    run, turn = launch.launch, threading.Lock()

    def one_at_a_time(*args, **constants):
        with turn:
            run(*args, **constants)

    monkeypatch.setattr(launch, "launch", one_at_a_time)
    cases = [linear_case(activation, tokens=(20,)) for activation in ("identity", "tanh")]
    expected = [results(case, case.upstream(torch.float32), "triton") for case in cases]

    def work(case, truth):
        for _ in range(3):
            found = results(case, case.upstream(torch.float32), "triton")
            assert all(torch.equal(found[name], truth[name]) for name in truth)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, cases, expected))


def test_autocast_runs_in_its_dtype():
    case = linear_case()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours("triton")
    assert y.dtype == torch.bfloat16
    narrow = case.to(torch.bfloat16)
    assert torch.equal(y, narrow.ours("triton"))
    assert all(g.dtype == torch.float32 for g in case.gradients(y).values())


@pytest.mark.parametrize("own_router", [True, False])
def test_the_papers_formula_itself(own_router):
    """Against reference/ token by token, not by way of the eager backend."""
    for mapping, activation in (("stereographic", "identity"), ("exp_log", "identity"), ("stereographic", "gelu")):
        config = MoSConfig(r=3, mapping=mapping, activation=activation, num_experts_per_tok=3)
        case = make_case(config, (4,), d_in=9, d_out=10, own_router=own_router).to(torch.float32)
        dy, wide = case.upstream(torch.float32), case.to(torch.float64)
        by_torch = case.results(case.reference(), dy)
        assert not compare(results(case, dy, "triton"), by_torch, wide.results(wide.reference(), dy.double()))


def test_float64_and_a_cpu_without_the_interpreter_are_refused(monkeypatch):
    case = linear_case()
    with pytest.raises(ValueError, match="float64"):
        case.to(torch.float64).ours("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        case.ours("triton")


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_a_rank_beyond_one_tile_is_refused(activation):
    config = MoSConfig(r=129, activation=activation)
    with pytest.raises(ValueError, match="r=129 exceeds 128.*eager"):
        make_case(config, (2,)).to(torch.float32).ours("triton")


def test_no_kernel_uses_atomics():
    sources = list(Path(backend.__file__).parent.glob("*.py"))
    assert len(sources) >= 8
    assert not [path.name for path in sources if "atomic" in path.read_text()]
