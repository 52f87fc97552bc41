"""The modules: their parameters, casts, moves, saving, freezing, and the ways PyTorch runs them."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from everyday import full_but
from strategies import normal
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mos_kernels import MoSConfig, MoSConv1D, MoSLinear, MoSRouter
from mos_kernels.functional import mos_route
from mos_kernels.layer import ADAPTER_PARAMETERS, MoSLayer, MoSWrapped
from reference.per_expert import mos_linear_per_expert

LINEAR = {"router_scope": "linear"}


def layer_of(d_in=6, d_out=5, bias=True, dtype=None, seed=0, **options):
    """A layer whose adapter has an effect: B and θ are not 0."""
    torch.manual_seed(seed)
    config = MoSConfig(**{"r": 3, **LINEAR, **options})
    return trained(MoSLinear(d_in, d_out, bias, config=config, dtype=dtype))


def trained(layer):
    with torch.no_grad():
        layer.mos_lora_B.normal_()
        layer.mos_curvature.normal_(std=1e-2).mul_(1 / 3)  # not representable in 16 bits
    return layer


def tokens(d_in=6, dtype=torch.float32, seed=1, shape=(4,)):
    return normal(seed, *shape, d_in).to(dtype)


# construction


@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters(scope, share_a, bias):
    layer = MoSLinear(6, 5, bias, config=MoSConfig(r=3, router_scope=scope, share_a=share_a))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    expected = {"weight": (5, 6), "mos_lora_A": (3, 6) if share_a else (8, 3, 6), "mos_lora_B": (5, 8, 3)}
    expected |= (
        {"mos_curvature": (8,)}
        | ({"bias": (5,)} if bias else {})
        | ({"mos_router": (8, 6)} if scope == "linear" else {})
    )
    assert shapes == expected
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {name for name in expected if name.startswith("mos_")} <= set(ADAPTER_PARAMETERS)
    assert set(layer.state_dict()) == set(expected)  # no buffer is saved
    assert (layer.mos_router is None) == (scope == "ffn")
    assert isinstance(layer, nn.Linear) and isinstance(layer, MoSLayer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer = MoSLinear(6, 5, config=MoSConfig(**LINEAR), dtype=dtype)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.mos_lora_A.dtype == layer.mos_lora_B.dtype == layer.mos_router.dtype == narrow
    assert layer.mos_curvature.dtype == layer.curvature.dtype == layer.mos_aux_weight.dtype == torch.float32
    x = tokens(dtype=dtype)
    assert layer(x).dtype == dtype
    assert MoSRouter(6, MoSConfig())(x).dtype == narrow


def test_initial_values():
    torch.manual_seed(0)
    layer = MoSLinear(400, 5, config=MoSConfig(r=8, share_a=False, **LINEAR))
    assert (layer.mos_lora_B == 0).all() and (layer.mos_curvature == 0).all()
    assert layer.mos_lora_A.abs().max() <= 400**-0.5
    assert layer.mos_lora_A.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.05)
    assert layer.mos_router.std().item() == pytest.approx(0.02, rel=0.1)
    gaussian = MoSLinear(400, 5, config=MoSConfig(r=8, init_lora_weights="gaussian"))
    assert gaussian.mos_lora_A.std().item() == pytest.approx(1 / 8, rel=0.1) and (gaussian.mos_lora_B == 0).all()
    random = MoSLinear(40, 500, config=MoSConfig(r=8, init_lora_weights=False))
    assert random.mos_lora_B.std().item() == pytest.approx(8**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("unit", "squared"), [("sqrt_dim", 6.0), (3.0, 9.0), (1.0, 1.0)])
def test_curvature_at_the_start_and_as_it_is_trained(unit, squared):
    layer = MoSLinear(6, 5, config=MoSConfig(curvature_init=0.5, length_unit=unit, curvature_lr_ratio=7.0))
    signs = torch.tensor([-1.0, -1, -1, 1, 1, 1, 0, 0])
    assert_close(layer.curvature, 0.5 * signs / squared)
    with torch.no_grad():
        layer.mos_curvature.fill_(0.2)
    assert_close(layer.curvature, (0.5 * signs + 7.0 * 0.2 * signs.abs()) / squared)
    with pytest.raises(AttributeError):
        layer.curvature = torch.zeros(8)


@pytest.mark.parametrize("mapping", ["stereographic", "exp_log"])
@pytest.mark.parametrize("B", [1.0, 1e6, 1e12])
def test_euclidean_experts_stay_flat_and_take_no_gradient(mapping, B):
    layer = layer_of(curvature_init=1.0, mapping=mapping)
    with torch.no_grad():
        layer.mos_lora_B.mul_(B)
        layer.mos_curvature.fill_(1.0)
    layer(1e4 * tokens()).sum().backward()
    assert (layer.curvature[6:] == 0).all() and (layer.curvature[:6] != 0).all()
    assert (layer.mos_curvature.grad[6:] == 0).all()
    assert torch.isfinite(layer.mos_curvature.grad).all() and (layer.mos_curvature.grad[:6] != 0).any()


def test_fixed_curvature():
    layer = layer_of(learn_curvature=False)
    assert not layer.mos_curvature.requires_grad
    layer(tokens()).sum().backward()
    assert layer.mos_curvature.grad is None and layer.mos_lora_B.grad is not None


def test_from_linear_takes_over_weight_and_bias():
    for bias in (True, False):
        linear = nn.Linear(6, 5, bias).eval()
        layer = MoSLinear.from_linear(linear, MoSConfig())
        assert layer.weight is linear.weight and layer.bias is linear.bias
        assert not any(p.requires_grad for p in linear.parameters())
        assert (layer.in_features, layer.out_features, layer.training) == (6, 5, False)
        back = layer.to_linear()
        assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
        assert (back.in_features, back.out_features, back.training) == (6, 5, False)
        assert set(back.state_dict()) == set(linear.state_dict())


def test_from_linear_refuses_what_it_cannot_adapt():
    with pytest.raises(TypeError, match="Conv2d is no nn.Linear"):
        MoSLinear.from_linear(nn.Conv2d(3, 3, 1), MoSConfig())
    with pytest.raises(ValueError, match="has a MoS adapter already"):
        MoSLinear.from_linear(layer_of(), MoSConfig())
    with pytest.raises(TypeError, match="Linear is not transformers' Conv1D"):
        MoSConv1D.from_linear(nn.Linear(3, 3), MoSConfig())


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_from_linear_refuses_a_forward_or_hooks_that_it_would_lose():
    hooked, replaced, plain = nn.Linear(3, 3), nn.Linear(3, 3), type("Plain", (nn.Linear,), {})(3, 3)
    hooked.register_forward_hook(lambda linear, args, y: 2 * y)
    replaced.forward = lambda x: nn.Linear.forward(replaced, x) / 2
    for linear in (Tripled(3, 3), hooked, replaced):
        with pytest.raises(TypeError, match="has a forward or hooks of its own.* use MoSWrapped"):
            MoSLinear.from_linear(linear, MoSConfig(**LINEAR))
        assert linear.weight.requires_grad
        x = tokens(3)
        assert_close(MoSWrapped(linear, MoSConfig(**LINEAR))(x), linear(x))
    MoSLinear.from_linear(plain, MoSConfig(**LINEAR))


def test_meta_construction_then_to_empty_and_reset():
    config = MoSConfig(r=3, curvature_init=0.5, **LINEAR)
    layer = MoSLinear(6, 5, config=config, device="meta")
    router = MoSRouter(6, config, device="meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers(), *router.parameters(), *router.buffers()])
    for module in (layer.to_empty(device="cpu"), router.to_empty(device="cpu")):
        module.reset_adapter_parameters()
    nn.Linear.reset_parameters(layer)
    assert all(
        torch.isfinite(t).all()
        for t in [*layer.parameters(), *layer.buffers(), *router.parameters(), *router.buffers()]
    )
    assert_close(layer.curvature, MoSLinear(6, 5, config=config).curvature)
    assert layer.mos_curvature.dtype == torch.float32
    assert torch.isfinite(layer(tokens())).all() and torch.isfinite(router(tokens())).all()


def test_representation_names_what_matters():
    assert "r=3, experts=(3 hyperbolic, 3 spherical, 2 euclidean), k=4, router=linear" in repr(layer_of())


# curvature stays float32, value for value

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to dtype and device": lambda m: m.to("cpu", torch.float16),
    "there and back": lambda m: m.half().float(),
    "type": lambda m: m.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "parent": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_curvature_stays_float32_value_for_value(cast):
    layer = layer_of(curvature_max_grad_norm=3.0)
    theta, kappa, aux = (
        layer.mos_curvature.detach().clone(),
        layer.curvature.detach().clone(),
        layer.mos_aux_weight.clone(),
    )
    found = cast(layer)
    assert found.mos_curvature.dtype == torch.float32 and torch.equal(found.mos_curvature, theta)
    assert torch.equal(found.curvature, kappa) and found.curvature.dtype == torch.float32
    assert torch.equal(found.mos_aux_weight, aux) and found.mos_aux_weight.dtype == torch.float32
    assert isinstance(found.mos_curvature, nn.Parameter) and found.mos_curvature.requires_grad
    x = tokens(dtype=found.weight.dtype)
    found(x).sum().backward()
    assert found.mos_curvature.grad.dtype == torch.float32


def test_a_cast_keeps_the_curvature_gradient_usable():
    layer = layer_of()
    layer(tokens()).sum().backward()
    before = layer.mos_curvature.grad.clone()
    layer.to(torch.bfloat16)
    assert layer.mos_curvature.grad.dtype == torch.float32
    assert torch.equal(layer.mos_curvature.grad, before)
    torch.optim.AdamW([layer.mos_curvature]).step()


def test_router_keeps_its_factor_through_casts():
    router = MoSRouter(6, MoSConfig(router_aux_loss_coef=1 / 3))
    factor = router.mos_aux_weight.clone()
    assert torch.equal(router.half().mos_aux_weight, factor)
    assert router.weight.dtype == torch.float16


def test_torch_save_and_load():
    layer, buffer = layer_of(), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=False)
    assert torch.equal(found(tokens()), layer(tokens())) and found.config == layer.config
    other = layer_of(seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens()), layer(tokens())) and torch.equal(other.curvature, layer.curvature)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_own_their_parameters(how):
    layer = layer_of()
    found = CASTS[how](layer)
    assert torch.equal(found(tokens()), layer(tokens()))
    with torch.no_grad():
        found.mos_lora_B.zero_()
    assert not torch.equal(found(tokens()), layer(tokens()))


def test_a_whole_models_state_loads_into_the_model_without_adapters():
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    adapted = nn.Sequential(
        *(MoSLinear.from_linear(m, MoSConfig(**LINEAR)) if isinstance(m, nn.Linear) else m for m in plain)
    )
    fresh = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    missing, unexpected = fresh.load_state_dict(adapted.state_dict(), strict=False)
    assert not missing and all("mos_" in name for name in unexpected)
    assert torch.equal(fresh(tokens()), plain(tokens()))
    assert not adapted.load_state_dict(plain.state_dict(), strict=False).unexpected_keys


# curvature as a trained parameter


@pytest.mark.parametrize("ratio", [1.0, 30.0])
@pytest.mark.parametrize("unit", ["sqrt_dim", 1.0])
def test_an_adam_step_moves_curvature_by_its_own_learning_rate(ratio, unit):
    layer = MoSLinear(
        6, 5, config=MoSConfig(curvature_lr_ratio=ratio, length_unit=unit, init_lora_weights=False, **LINEAR)
    )
    before = layer.curvature.detach().clone() * layer.config.squared_length_unit(6)
    optimiser = torch.optim.Adam([layer.mos_curvature], lr=1e-3, eps=1e-30)
    layer(tokens(shape=(64,))).sum().backward()  # enough tokens for every expert to be used
    optimiser.step()
    moved = layer.curvature.detach() * layer.config.squared_length_unit(6) - before
    assert_close(moved.abs()[:6], torch.full((6,), 1e-3 * ratio), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bound", [1e-3, 1e6])
def test_curvature_gradient_is_bounded(bound):
    exact, bounded = layer_of(length_unit=1.0), layer_of(length_unit=1.0, curvature_max_grad_norm=bound)
    for layer in (exact, bounded):
        layer(tokens()).square().sum().backward()
    truth, found = exact.mos_curvature.grad, bounded.mos_curvature.grad
    assert found.norm() <= bound * (1 + 1e-6)
    if truth.norm() <= bound:
        assert torch.equal(found, truth)
    else:
        assert_close(found, truth * (bound / truth.norm()))
    assert torch.equal(exact.mos_lora_B.grad, bounded.mos_lora_B.grad)


def test_curvature_crosses_zero():
    layer = layer_of(curvature_init=0.01, curvature_lr_ratio=1.0)
    with torch.no_grad():
        layer.mos_curvature.copy_(0.02 * torch.tensor([1.0, 1, 1, -1, -1, -1, 0, 0]))
    assert (layer.curvature[:3] > 0).all() and (layer.curvature[3:6] < 0).all()
    assert torch.isfinite(layer(tokens())).all()


# inference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_freezing_for_inference_changes_no_number(dtype, activation):
    layer = layer_of(dtype=dtype, activation=activation, lora_dropout=0.5).eval()
    x = tokens(dtype=dtype)
    with torch.no_grad():
        before = layer(x)
        assert layer.freeze_for_inference() is layer and not layer.training
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)  # with gradients on, the parameters themselves
    layer(x).sum().backward()
    assert layer.mos_lora_B.grad is not None


def test_a_frozen_layer_copies_and_runs_under_autocast():
    layer = layer_of().freeze_for_inference()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(tokens()), layer(tokens()))
        assert torch.equal(pickle.loads(pickle.dumps(layer))(tokens()), layer(tokens()))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(tokens()).dtype == torch.bfloat16


def test_inference_mode():
    layer = layer_of()
    with torch.inference_mode():
        y = layer(tokens())
    assert_close(y, layer(tokens()).detach())


# Conv1D


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_conv1d_equals_the_linear_of_its_transposed_weight(activation):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)
    layer = trained(MoSConv1D.from_linear(conv1d, MoSConfig(r=3, activation=activation, **LINEAR)))
    assert layer.weight is conv1d.weight and layer.bias is conv1d.bias and not conv1d.weight.requires_grad
    assert (layer.nf, layer.nx, layer.in_features, layer.out_features) == (5, 6, 6, 5)
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.t())
        linear.bias.copy_(conv1d.bias)
    twin = MoSLinear.from_linear(linear, layer.config)
    twin.load_state_dict({name: value for name, value in layer.state_dict().items() if "mos_" in name}, strict=False)
    results = []
    for module in (layer, twin):
        module.weight.requires_grad_(True)
        module.bias.requires_grad_(True)
        x = tokens().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        gradients["weight"] = gradients["weight"].t() if module is layer else gradients["weight"]
        results.append({"y": y.detach(), "x": x.grad, **gradients})
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_conv1d_of_its_own_and_casts():
    layer = trained(MoSConv1D(5, 6, config=MoSConfig(r=3, **LINEAR)))
    theta = layer.mos_curvature.detach().clone()
    assert layer(tokens()).shape == (4, 5)
    assert torch.equal(layer.half().mos_curvature, theta)


# the ways PyTorch runs a module


def gradients_of(module, run, x):
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None},
    }


class Block(nn.Module):
    """Two linears that share a router."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        config = MoSConfig(r=3, **options)
        self.mos_router = MoSRouter(6, config)
        self.up = trained(MoSLinear(6, 9, config=config))
        self.down = trained(MoSLinear(9, 6, config=config))

    def forward(self, x):
        gates = self.mos_router(x)
        return self.down(self.up(x, gates).tanh(), gates)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "module", [lambda: layer_of(router_aux_loss_coef=0.5), lambda: Block(router_aux_loss_coef=0.5)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient(module, use_reentrant, dropout):
    module = module()
    for part in module.modules():
        if isinstance(part, MoSLayer):
            part.config = MoSConfig.from_dict({**part.config.to_dict(), "lora_dropout": dropout})
    torch.manual_seed(3)
    plain = gradients_of(module, module, tokens())
    torch.manual_seed(3)
    found = gradients_of(module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant), tokens())
    assert plain.keys() == found.keys() and any("router" in name for name in plain)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


def test_checkpointing_a_single_linear_within_a_block():
    block = Block(router_aux_loss_coef=0.5)
    plain = gradients_of(block, block, tokens())

    def run(x, use_reentrant):
        gates = checkpoint(block.mos_router, x, use_reentrant=use_reentrant)
        h = checkpoint(block.up, x, gates, use_reentrant=use_reentrant).tanh()
        return checkpoint(block.down, h, gates, use_reentrant=use_reentrant)

    for use_reentrant in (True, False):
        found = gradients_of(block, lambda x, kind=use_reentrant: run(x, kind), tokens())
        for name, value in plain.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_a_retained_graph_gives_the_same_gradients_again(activation):
    layer = layer_of(activation=activation, lora_dropout=0.3)
    y = layer(tokens())
    y.sum().backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    y.sum().backward()
    for name, value in once.items():
        assert torch.equal(layer.get_parameter(name).grad, 2 * value), name


def test_gradients_are_the_same_from_run_to_run():
    layer = layer_of()
    first, second = (gradients_of(layer, layer, tokens(shape=(50,))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_needs_a_gradient_gets_one():
    layer = layer_of()
    whole = gradients_of(layer, layer, tokens())
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    for name in trainable:
        for other in trainable:
            layer.get_parameter(other).requires_grad_(other == name)
        layer.zero_grad()
        layer(tokens()).square().sum().backward()
        assert torch.equal(layer.get_parameter(name).grad, whole[name]), name
        assert all(p.grad is None for n, p in layer.named_parameters() if n != name)


def test_trainable_base():
    layer = layer_of()
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(True)
    found = gradients_of(layer, layer, tokens())
    dy = 2 * found["y"]
    assert_close(found["weight"], dy.t() @ tokens())
    assert_close(found["bias"], dy.sum(0))


def test_a_tensor_changed_in_place_before_backward_is_noticed():
    layer, x = layer_of(), tokens()
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    layer, x = layer_of(), tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_with_zero_B_behaves_as_nn_linear(dtype, base):
    linear = nn.Linear(6, 5, dtype=base)
    layer = MoSLinear.from_linear(linear, MoSConfig(**LINEAR))
    linear.requires_grad_(True)
    found = []
    for module in (linear, layer):
        linear.zero_grad()
        x = tokens().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(x)
        y.float().sum().backward()
        found.append(
            {"y": y.detach(), "x": x.grad, "weight": linear.weight.grad.clone(), "bias": linear.bias.grad.clone()}
        )
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype, name
        tolerance = 4 * torch.finfo(dtype).eps
        assert_close(found[1][name], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_block_is_as_accurate_as_torchs(dtype):
    """The accuracy criterion, with PyTorch under the same autocast as the plain implementation."""
    block = Block(length_unit=4.0)
    with torch.no_grad():  # experts well inside the equator, where no rounding changes sides
        block.up.mos_lora_B.mul_(0.2)
        block.down.mos_lora_B.mul_(0.2)

    def plain_block(x):
        gates, h = block.mos_router(x), x
        for layer in (block.up, block.down):
            h = mos_linear_per_expert(
                h, layer.weight, layer.bias, layer.mos_lora_A, layer.mos_lora_B, layer.curvature,
                gates=gates, scaling=layer.config.scaling,
            )  # fmt: skip
            h = h.tanh() if layer is block.up else h
        return h

    def under_autocast(run):
        def call(x):
            with torch.autocast("cpu", dtype):
                return run(x)

        return call

    runs = {"truth": plain_block, "ours": under_autocast(block), "torch": under_autocast(plain_block)}
    draws = [tokens(shape=(64,), seed=seed) for seed in range(4)]
    results = {key: [gradients_of(block, run, x) for x in draws] for key, run in runs.items()}
    assert results["ours"][0]["y"].dtype == dtype
    for name in results["truth"][0]:
        assert name == "y" or results["ours"][0][name].dtype == torch.float32
        truth, ours, plain = (torch.cat([d[name].flatten().float() for d in results[key]]) for key in runs)
        error, torch_error = (ours - truth).abs().max().item(), (plain - truth).abs().max().item()
        assert error <= 2 * torch_error + 1e-6 * truth.abs().max().item(), (name, error, torch_error)


def test_float64_is_left_alone_by_autocast():
    layer = layer_of(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(tokens(dtype=torch.float64)), layer(tokens(dtype=torch.float64)))
        assert layer(tokens(dtype=torch.float64)).dtype == torch.float64


def test_two_threads_at_once():
    layer = layer_of(router_aux_loss_coef=0.5)
    inputs = [tokens(seed=seed, shape=(64,)) for seed in range(4)]
    expected = [torch.autograd.grad(layer(x).square().sum(), list(_trainable(layer))) for x in inputs]

    def work(x, truth):
        for _ in range(20):
            found = torch.autograd.grad(layer(x).square().sum(), list(_trainable(layer)))
            assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, inputs, expected))


def _trainable(module):
    return (p for p in module.parameters() if p.requires_grad)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("activation", full_but(("identity",), ["identity", "silu"]))
@pytest.mark.budget(10)
def test_compiled_in_one_graph_without_recompiling_over_lengths(activation):
    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    module = Block(router_aux_loss_coef=0.5, spaces={"hyperbolic": 1, "euclidean": 1}, num_experts_per_tok=1)
    module.up.config = dataclasses.replace(module.up.config, activation=activation)
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for length in (5, 12, 33):
        x = tokens(shape=(length,))
        torch._dynamo.mark_dynamic(x, 0)
        expected = gradients_of(module, module, tokens(shape=(length,)))
        module.zero_grad(set_to_none=True)
        y = compiled(x)
        y.square().sum().backward()
        assert_close(y.detach(), expected["y"], rtol=1e-6, atol=1e-6)
        for name, p in module.named_parameters():
            if p.grad is not None:
                assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert len(compiles) == 1


# logits and gates


def test_a_router_of_another_number_of_experts_is_refused():
    config = MoSConfig()
    with pytest.raises(ValueError, match="router has 5 rows, the configuration 8 experts"):
        mos_route(torch.randn(3, 12), torch.randn(5, 12), config=config)


def test_routing_logits_are_detached_and_float32():
    layer, router = layer_of(), MoSRouter(6, MoSConfig())
    x = tokens(shape=(2, 3))
    for owner, weight in ((layer, layer.mos_router), (router, router.weight)):
        logits = owner.routing_logits(x)
        assert logits.shape == (2, 3, 8) and not logits.requires_grad
        assert_close(logits, x @ weight.detach().t())
    with pytest.raises(ValueError, match="no router of its own"):
        layer_of(router_scope="ffn").routing_logits(x)


def test_gates_go_before_the_layers_own_router():
    layer, x = layer_of(), tokens()
    gates = torch.rand(4, 8)
    twin = layer_of(router_scope="ffn")
    twin.load_state_dict({n: v for n, v in layer.state_dict().items() if n != "mos_router"})
    assert torch.equal(layer(x, gates), twin(x, gates))
    layer(x, gates).sum().backward()
    assert layer.mos_router.grad is None


def test_bad_input_is_refused_with_the_remedy():
    layer = layer_of(router_scope="ffn")
    gates = torch.rand(4, 8)
    for message, call in (
        ("width 7.*in_features=6", lambda: layer(tokens(7), gates)),
        ("no gates were passed.*router_scope='linear'", lambda: layer(tokens())),
        (r"gates have shape \(4, 7\), x asks for \(4, 8\)", lambda: layer(tokens(), gates[:, :7])),
        (
            "x is torch.float64 and the weight is torch.float32.*autocast",
            lambda: layer(tokens(dtype=torch.float64), gates),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_layer_built_on_meta_and_loaded_is_the_layer_that_was_saved():
    saved = layer_of()
    nn.init.normal_(saved.mos_lora_B)
    with torch.device("meta"):
        moved, assigned = (MoSLinear(6, 5, config=saved.config) for _ in range(2))
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(saved.state_dict(), strict=True)
    assigned.load_state_dict(saved.state_dict(), strict=True, assign=True)
    x = tokens()
    for layer in (moved, assigned):
        assert torch.equal(layer.curvature, saved.curvature)
        assert torch.equal(layer.mos_aux_weight, saved.mos_aux_weight)
        assert torch.equal(layer(x), saved(x))


def test_a_curvature_loaded_in_bf16_is_kept_in_float32():
    layer = layer_of()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(half, assign=True)
    assert layer.mos_curvature.dtype == torch.float32


def test_a_failed_from_linear_leaves_the_linear_trainable():
    linear = nn.Linear(6, 5)
    with pytest.raises(TypeError, match="MoSConfig"):
        MoSLinear.from_linear(linear, {"r": 8})
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_what_is_no_dense_parameter_is_no_base_of_a_dense_layer():
    with pytest.raises(TypeError, match="parametris.*MoSWrapped"):
        MoSLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), MoSConfig())
    linear = nn.Linear(6, 5)
    linear.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="no dense parameter.*MoSWrapped"):
        MoSLinear.from_linear(linear, MoSConfig())
