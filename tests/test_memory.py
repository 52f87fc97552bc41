"""What one linear keeps for backward, byte for byte: beyond x and the parameters only rank-sized numbers a token."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import normal

from mos_kernels import MoSConfig, MoSLinear, MoSRouter

T, D_IN, D_OUT, R, E = 40, 50, 70, 3, 8
FLOAT = 4
ONCE = FLOAT * (E * R * R + 4 * E)


def saved_bytes(run, *owned: torch.Tensor) -> int:
    """Bytes that `run` saves for backward in storages other than those of `owned`, each storage once."""
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    for tensor in owned:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    assert all(tensor.numel() < T * D_OUT and D_OUT not in tensor.shape for _, tensor in found.values())
    del y
    return sum(size for size, _ in found.values())


def assert_saves(run, x: torch.Tensor, bytes_a_token: int, *owned: torch.Tensor) -> None:
    """`run` on x saves exactly so much a token, and G, κ and the like, rank-sized, once."""
    once = saved_bytes(lambda: run(x), x, *owned) - T * bytes_a_token
    assert 0 <= once <= ONCE
    twice = torch.cat([x, x]).detach().requires_grad_()
    assert saved_bytes(lambda: run(twice), twice, *owned) == 2 * T * bytes_a_token + once


def state(module):
    return [*module.parameters(), *module.buffers()]


def layer_and_x(dtype=torch.float32, shape=(T, D_IN), **options):
    torch.manual_seed(0)
    layer = MoSLinear(D_IN, D_OUT, config=MoSConfig(r=R, init_lora_weights=False, **options), dtype=dtype)
    return layer, normal(0, *shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("activation", ["identity", "tanh", "silu", "gelu"])
@pytest.mark.parametrize("mapping", ["stereographic", "exp_log"])
def test_a_linear_with_its_own_router(dtype, share_a, activation, mapping):
    options = {"share_a": share_a, "activation": activation, "mapping": mapping}
    layer, x = layer_and_x(dtype, router_scope="linear", **options)
    projected = R if share_a else E * R
    assert_saves(layer, x, FLOAT * (projected + 1 + E), *state(layer))


def test_a_linear_given_its_gates_keeps_the_callers_own():
    layer, x = layer_and_x()
    gates = normal(1, 2 * T, E).softmax(-1).float().requires_grad_()
    assert_saves(lambda x: layer(x, gates[: len(x)]), x, FLOAT * (R + 1), gates, *state(layer))


@pytest.mark.parametrize("share_a", [True, False])
def test_a_linear_and_its_router_keep_what_the_design_promises(share_a):
    layer, x = layer_and_x(share_a=share_a)
    router = MoSRouter(D_IN, layer.config)
    promised = FLOAT * ((R if share_a else E * R) + 1 + 2 * E)
    assert_saves(lambda x: layer(x, router(x)), x, promised, *state(layer), *state(router))


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_dropout_adds_one_bit_an_element(activation):
    layer, x = layer_and_x(router_scope="linear", lora_dropout=0.3, activation=activation)
    assert_saves(layer, x, FLOAT * (R + 1 + E) + math.ceil(D_IN / 8), *state(layer))
    layer.eval()
    assert_saves(layer, x, FLOAT * (R + 1 + E), *state(layer))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(T, -1),
        lambda x: x.reshape(4, T // 4, D_IN).transpose(0, 1),
    ],
    ids=["transposed", "expanded", "batches"],
)
def test_strided_tokens_are_not_copied(strided):
    layer, x = layer_and_x(router_scope="linear")
    x = strided(x.detach()).requires_grad_()
    assert not x.is_contiguous()
    found = saved_bytes(lambda: layer(x), x, *state(layer))
    assert 0 <= found - T * FLOAT * (R + 1 + E) <= ONCE


@pytest.mark.parametrize("learn_curvature", [True, False])
def test_a_trainable_base_and_bounded_curvature_add_nothing(learn_curvature):
    layer, x = layer_and_x(router_scope="linear", learn_curvature=learn_curvature, curvature_max_grad_norm=1.0)
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(True)
    assert_saves(layer, x, FLOAT * (R + 1 + E), *state(layer))


def test_nothing_is_saved_without_gradients():
    layer, x = layer_and_x(router_scope="linear")
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x)) == 0
