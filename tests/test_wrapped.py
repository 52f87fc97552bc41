"""A base that is no dense product: its output and the adapter in one operation, and the layer that holds it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from strategies import assert_results_close, make_case, normal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mos_kernels import MoSConfig, MoSLinear, MoSWrapped
from mos_kernels.functional import mos_linear

ACTIVATIONS = ("identity", "silu")
CONFIG = MoSConfig(r=3, router_scope="linear", init_lora_weights=False)
both_activations = pytest.mark.parametrize("activation", ACTIVATIONS)


class Doubling(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def wrapped_case(activation="identity", **options):
    config = MoSConfig(**{**CONFIG.to_dict(), "activation": activation})
    return make_case(config, (2, 5), d_in=9, d_out=300, own_router=True, **options)


@both_activations
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_may_have_another_dtype_than_x(dtype, base_dtype, activation):
    case = wrapped_case(activation).to(dtype).wrapped(base_dtype)
    y = case.ours()
    assert y.dtype == base_dtype
    found = case.results(y, case.upstream(base_dtype))
    assert found["base_output"].dtype == base_dtype and found["x"].dtype == dtype
    wide = case.to(torch.float64, torch.float64)
    truth = wide.results(wide.reference(), case.upstream(base_dtype).double())
    narrow = torch.bfloat16 in (dtype, base_dtype)
    assert_results_close(found, truth, 0.03 if narrow else 2e-5)


@both_activations
def test_the_gradient_of_the_base_is_that_of_the_output(activation):
    case = wrapped_case(activation).wrapped()
    dy = case.upstream()
    (found,) = torch.autograd.grad(case.ours(), case.base_output, dy)
    assert torch.equal(found, dy)


def test_under_autocast_the_adapter_runs_in_its_dtype_and_the_base_in_its_own():
    case = wrapped_case().to(torch.float32).wrapped()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours()
    assert y.dtype == torch.float32
    narrow = case.replace(x=case.x.detach().bfloat16().requires_grad_())
    assert torch.equal(y, narrow.ours())


class _Wide(TorchDispatchMode):
    """Operators that make a tensor of as many numbers as the output has."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.unpoisoned
def test_nothing_as_wide_as_the_output_is_formed_beside_it_or_kept():
    case = wrapped_case().to(torch.float32).wrapped()
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keeping, _Wide(case.base_output.numel()) as forward:
        y = case.ours()
    assert [name for name in forward.names if name not in ("view", "_unsafe_view", "alias")] == ["addmm"]
    assert all(t.numel() < y.numel() or t is case.B for t in kept)


def test_the_base_is_given_in_one_way():
    case = wrapped_case()
    wrapped = case.wrapped()
    both = case.replace(base_output=wrapped.base_output)
    neither = wrapped.replace(base_output=None)
    for wrong in (both, neither, wrapped.replace(bias=case.bias)):
        with pytest.raises(ValueError, match="one of the two"):
            wrong.ours()
    with pytest.raises(ValueError, match="base_output has shape"):
        wrapped.replace(base_output=wrapped.base_output[..., :-1]).ours()
    with pytest.raises(ValueError, match="float64"):
        wrapped.replace(base_output=wrapped.base_output.float()).ours()
    with pytest.raises(ValueError, match="float64"):
        wrapped.replace(base_output=wrapped.base_output.long()).ours()


# the layer


def pair(kind=MoSWrapped, dtype=torch.float64):
    """The dense layer and a wrapped one of the same numbers."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 12, dtype=dtype)
    dense = MoSLinear.from_linear(copy.deepcopy(linear), CONFIG)
    wrapped = kind(linear, CONFIG)
    wrapped.load_state_dict(dense.state_dict())
    return dense, wrapped


def test_it_computes_what_the_dense_layer_does():
    dense, wrapped = pair()
    x = normal(0, 4, 9).requires_grad_()
    found = []
    for layer in (dense, wrapped):
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        found.append({"y": y.detach(), "x": x.grad, **grads})
    assert_results_close(found[1], found[0], 1e-12)
    assert sorted(found[0]) == ["mos_curvature", "mos_lora_A", "mos_lora_B", "mos_router", "x", "y"]


def test_its_state_has_the_names_of_the_dense_layer():
    dense, wrapped = pair()
    assert list(dense.state_dict()) == sorted(wrapped.state_dict(), key=list(dense.state_dict()).index)
    model = nn.Sequential(wrapped)
    assert "0.weight" in model.state_dict() and not any("base_layer" in name for name in model.state_dict())
    model.load_state_dict(nn.Sequential(dense).state_dict())
    report = model.load_state_dict({"0.weight": dense.weight, "0.foreign": dense.bias}, strict=False)
    assert "0.base_layer.foreign" in report.unexpected_keys and "0.base_layer.bias" in report.missing_keys
    nn.Sequential(wrapped.to_linear()).load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "mos_" not in name}
    )


def test_a_base_with_a_forward_of_its_own():
    base = Doubling(5, 6)
    layer = MoSWrapped(base, MoSConfig(r=2, router_scope="linear"))
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.to_linear() is base and not any(p.requires_grad for p in base.parameters())
    assert layer.weight is base.weight and layer.bias is base.bias


def test_copies_pickles_and_casts():
    _, wrapped = pair(dtype=torch.float32)
    x = torch.randn(3, 9)
    buffer = io.BytesIO()
    torch.save(wrapped, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(wrapped), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), wrapped(x)) and other.base_layer is not wrapped.base_layer
    half = copy.deepcopy(wrapped).bfloat16()
    assert half.mos_curvature.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_for_inference():
    _, wrapped = pair(dtype=torch.float32)
    x = torch.randn(3, 9)
    with torch.no_grad():
        expected = wrapped(x)
        wrapped.freeze_for_inference()
        assert wrapped._kept is not None and torch.equal(wrapped(x), expected)


def test_what_is_no_linear_is_refused():
    with pytest.raises(TypeError, match="Identity has no in_features"):
        MoSWrapped(nn.Identity(), CONFIG)
    dense, wrapped = pair()
    for adapted in (dense, wrapped):
        with pytest.raises(ValueError, match="already"):
            MoSWrapped(adapted, CONFIG)


def test_the_operation_takes_the_output_of_another_adapter():
    """Two adapters on one base: each is one operation, and the second adds to the first."""
    torch.manual_seed(0)
    first, second = (MoSWrapped(nn.Linear(5, 6), CONFIG) for _ in range(2))
    x, base = torch.randn(4, 5), torch.randn(4, 6)

    def add(layer, output):
        return mos_linear(
            x, None, None, layer.mos_lora_A, layer.mos_lora_B, layer.curvature,
            config=CONFIG, base_output=output, router=layer.mos_router,
        )  # fmt: skip

    zero = torch.zeros_like(base)
    torch.testing.assert_close(add(second, add(first, base)), base + add(first, zero) + add(second, zero))
