"""The registered ops: schemas, fake implementations, autograd; one graph under torch.compile, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from strategies import normal

from mos_kernels import MoSConfig, MoSLinear, MoSRouter, MoSWrapped, ops
from mos_kernels.call import LinearTensors, Plan, RouteTensors, flattened

D_IN, D_OUT, E = 16, 12, 8


def layer_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return MoSLinear(D_IN, D_OUT, config=MoSConfig(r=2, init_lora_weights=False, **options), dtype=dtype)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scope", "activation"), [("linear", "identity"), ("ffn", "identity"), ("linear", "tanh")])
@pytest.mark.parametrize(("dropout_p", "base_dtype"), [(0.0, None), (0.5, None), (0.0, torch.float32)])
@pytest.mark.budget(6)
@pytest.mark.one_at_a_time("dtype", "scope", "activation", "dropout_p", "base_dtype")
def test_opcheck_of_the_linear(dtype, scope, activation, dropout_p, base_dtype):
    token_mask = normal(1, 3, 2) > 0 if activation == "tanh" else None
    layer = layer_of(dtype, router_scope=scope, activation=activation)
    x = normal(0, 3, 2, D_IN).to(dtype).requires_grad_()
    gates = normal(1, 3, 2, E).softmax(-1).float().requires_grad_() if scope == "ffn" else None
    kappa = layer.curvature.detach().requires_grad_()
    base = (layer.weight, layer.bias)
    if base_dtype is not None:
        base = (None, normal(2, 3, 2, D_OUT).to(base_dtype).requires_grad_())
    tensors = LinearTensors(
        x, *base, layer.mos_lora_A, layer.mos_lora_B, kappa, gates, layer.mos_router,
        layer.mos_aux_weight, torch.tensor([7]) if dropout_p else None, token_mask,
    )  # fmt: skip
    plan = Plan(layer.config, "triton", True, dropout_p)
    torch.library.opcheck(ops.linear_op, flattened(tensors, plan))
    without = flattened(tensors, plan._replace(differentiable=False))
    torch.library.opcheck(ops.linear_op, without, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [True, False])
def test_opcheck_of_the_router(dtype, mask):
    router = MoSRouter(D_IN, MoSConfig(r=2))
    x = normal(0, 3, 2, D_IN).to(dtype).requires_grad_()
    token_mask = normal(1, 3, 2) > 0 if mask else None
    tensors, plan = RouteTensors(x, router.weight, router.mos_aux_weight, token_mask), Plan(router.config, "triton")
    torch.library.opcheck(ops.route_op, flattened(tensors, plan))
    without = flattened(tensors, plan._replace(differentiable=False))
    torch.library.opcheck(ops.route_op, without, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiled_dropout_is_one_mask_forward_and_backward_and_another_at_each_call(backend, checkpointed):
    """y is linear in A where nothing is curved and W = 0: <A, dA> = <y, dy>, if backward drops what forward dropped."""
    torch._dynamo.reset()
    layer = layer_of(spaces={"euclidean": E}, lora_dropout=0.5)
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    x, gates = normal(0, 9, D_IN).float(), normal(1, 9, E).softmax(-1).float()

    def run(x):
        return layer(x, gates, backend=backend)

    def once(x):
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)

    twice = torch.compile(lambda x: (once(x), once(x)), fullgraph=True, backend="aot_eager")
    first, second = twice(x)
    assert not torch.allclose(first, second)
    dy = normal(2, *first.shape).float()
    (dA,) = torch.autograd.grad(first, layer.mos_lora_A, dy)
    torch.testing.assert_close((dA * layer.mos_lora_A).sum(), (dy * first).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("scope", "dtype", "activation", "wrapped"),
    [
        ("linear", torch.float32, "identity", False),
        pytest.param("ffn", torch.bfloat16, "identity", False, marks=pytest.mark.full),
        pytest.param("ffn", torch.float32, "gelu", False, marks=pytest.mark.full),
        pytest.param("linear", torch.float32, "identity", True, marks=pytest.mark.full),
    ],
)  # fmt: skip
@pytest.mark.budget(12)
def test_compiled_in_one_graph_with_the_same_numbers(scope, dtype, activation, wrapped):
    torch._dynamo.reset()
    layer = layer_of(dtype, router_scope=scope, activation=activation)
    if wrapped:
        layer = MoSWrapped(layer.to_linear(), layer.config)
    router = MoSRouter(D_IN, layer.config)
    modules = torch.nn.ModuleList([layer, router] if scope == "ffn" else [layer])

    def run(x):
        gates = router(x, backend="triton") if scope == "ffn" else None
        return layer(x, gates, backend="triton")

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for shape in ((2, 3), (5, 7), (4, 9), (3, 70)):
        x = normal(0, *shape, D_IN).to(dtype).requires_grad_()
        found = []
        for function in (run, compiled):
            modules.zero_grad()
            x.grad = None
            y = function(x)
            y.float().square().sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in modules.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) >= 5
        assert all(map(torch.equal, *found)), shape
    assert len(graphs) == 2, "one for the first sizes, and one for any"
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)
    assert len(graphs) == 3
