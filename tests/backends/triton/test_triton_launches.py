"""How many kernels a layer launches, what it keeps for backward, and that a token does not depend on its neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from cases import compare
from operators import Computed
from strategies import leaf, make_case, normal

from mos_kernels import MoSConfig, MoSLinear, MoSRouter, MoSWrapped, set_backend
from mos_kernels.backends.triton import launch

T, D_IN, D_OUT, R, E = 40, 50, 70, 3, 8


def layer_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return MoSLinear(D_IN, D_OUT, config=MoSConfig(r=R, init_lora_weights=False, **options), dtype=dtype)


def tokens_of(T, dtype=torch.float32):
    return normal(0, T, D_IN).to(dtype).requires_grad_()


# launches

FORWARD = ["gram", "shrink", "bridge", "expand"]
BACKWARD = ["expand_backward", "load", "bridge_backward", "bridge_reduce", "norm_gradient", "shrink_backward"]
ACTIVATED = ["shrink", "curve", "activated_norm", "coefficients", "activated_expand"]


def test_launches_of_a_linear_with_its_own_router(launched):
    y = layer_of(router_scope="linear")(tokens_of(T), backend="triton")
    assert launched == FORWARD
    launched.clear()
    y.sum().backward()
    assert launched == BACKWARD


def test_a_base_that_runs_by_itself_costs_no_launch(launched):
    layer = MoSWrapped(layer_of().to_linear(), MoSConfig(r=R, router_scope="linear"))
    y = layer(tokens_of(T), backend="triton")
    assert launched == FORWARD
    y.sum().backward()
    assert launched == FORWARD + BACKWARD


def test_launches_of_a_block(launched):
    layer, x = layer_of(), tokens_of(T)
    router = MoSRouter(D_IN, layer.config)
    y = layer(x, router(x, backend="triton"), backend="triton")
    assert launched == ["shrink", "route", *FORWARD]
    launched.clear()
    y.sum().backward()
    assert launched == [
        "expand_backward", "bridge_backward", "bridge_reduce", "norm_gradient", "shrink_backward",
        "load", "route_backward", "shrink_backward",
    ]  # fmt: skip


@pytest.mark.parametrize(("T", "r"), [(65, R), (T, 17)])
def test_many_tokens_or_columns_cost_a_launch_more(launched, T, r):
    layer = MoSLinear(D_IN, D_OUT, config=MoSConfig(r=r, router_scope="linear")).eval()
    with torch.no_grad():
        layer(tokens_of(T), backend="triton")
    assert launched == ["gram", "shrink", "bridge", "expand"]


def test_launches_with_an_activation(launched):
    y = layer_of(router_scope="linear", activation="silu")(tokens_of(T), backend="triton")
    assert launched == ACTIVATED
    launched.clear()
    y.sum().backward()
    assert launched == [
        "curve", "activated_norm", "load", "coefficients", "activated_input", "activated_weight", "uncurve",
        "shrink_backward",
    ]  # fmt: skip


def test_frozen_inputs_launch_less(launched):
    layer = layer_of(router_scope="linear").requires_grad_(False)
    layer(tokens_of(T), backend="triton").sum().backward()
    assert launched[len(FORWARD) :] == ["expand_backward", "bridge_backward", "bridge_reduce", "shrink_backward"]


def test_no_tokens_launch_next_to_nothing(launched):
    y = layer_of(router_scope="linear")(tokens_of(0), backend="triton")
    y.sum().backward()
    assert set(launched) <= {"gram", "load", "bridge_reduce", "norm_gradient", "shrink_backward"}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("T", [1, 64])
def test_a_frozen_layer_decodes_in_two_launches_and_the_base_product(monkeypatch, dtype, scope, T):
    set_backend("triton")
    launched = []
    layer = layer_of(dtype, router_scope=scope).freeze_for_inference()
    x = tokens_of(T, dtype).detach()
    gates = None if scope == "linear" else normal(1, T, E).softmax(-1).float()
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))  # not run
    with torch.no_grad(), Computed() as computed:
        layer(x, gates)
    assert launched == ["shrink_kernel", "bridge_expand_kernel"]
    assert computed.names == ["addmm_"]


def casts(monkeypatch) -> list[bool]:
    """Of every launch of shrink from now on, which are not run, whether it casts A and the router."""
    found = []

    def note(kernel, *_, **constants):
        if kernel.fn.__name__ == "shrink_kernel":
            found.append(not constants["STACKED"])

    monkeypatch.setattr(launch, "launch", note)
    return found


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_a_linear_casts_its_factors_in_the_launch_of_the_gram_matrix(monkeypatch, dtype, scope, training):
    layer = layer_of(dtype, router_scope=scope).train(training)
    gates = None if scope == "linear" else normal(1, T, E).softmax(-1).float()
    cast = casts(monkeypatch)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            layer(tokens_of(T, dtype), gates, backend="triton")
    assert cast == [False] * 2


@pytest.mark.unpoisoned
def test_no_launch_is_added_to_cast_the_factors(monkeypatch):
    """With an activation there is no Gram matrix; what dropout drops is not read beside the stack."""
    cast = casts(monkeypatch)
    for options, expected in (({"activation": "silu"}, True), ({"lora_dropout": 0.5}, True), ({}, False)):
        layer_of(torch.bfloat16, router_scope="linear", **options)(tokens_of(T, torch.bfloat16), backend="triton")
        assert cast.pop() == expected
    factors_as_x = layer_of(torch.bfloat16, activation="silu").to(torch.bfloat16)
    factors_as_x(tokens_of(T, torch.bfloat16), normal(1, T, E).softmax(-1).float(), backend="triton")
    assert not cast.pop()


@pytest.mark.parametrize("name", ["mos_router", "mos_lora_A"])
def test_a_change_of_what_is_kept_is_seen(name):
    layer, x = layer_of(router_scope="linear").eval(), tokens_of(T).detach()
    with torch.no_grad():
        before = layer(x, backend="triton")
        getattr(layer, name).neg_()
        after = layer(x, backend="triton")
        layer._kept = None
        assert torch.equal(after, layer(x, backend="triton")) and not torch.equal(after, before)
        layer.freeze_for_inference()
        gates = normal(1, T, E).softmax(-1).float()
        given = layer(x, gates, backend="triton")  # beside a stack that has its router
        layer.mos_router.neg_()
        torch.testing.assert_close(layer(x, gates, backend="triton"), given)


# the decode path computes the same

CASES = [("identity", "linear"), ("identity", "ffn"), ("gelu", "linear")]


@pytest.mark.shipped_settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "scope"), CASES)
@pytest.mark.parametrize("T", [1, 33, 65])
@pytest.mark.one_at_a_time("dtype", "activation", "scope", "T")
def test_without_gradients_and_frozen_the_output_is_as_right(dtype, activation, scope, T):
    """Parts of d_in that the bridge adds up (SPLITS > 1), and what freeze_for_inference computed ahead."""
    set_backend("triton")
    layer = layer_of(dtype, router_scope=scope, activation=activation, share_a=activation == "identity")
    with torch.no_grad():
        if scope == "linear":
            layer.mos_router.copy_(layer.mos_router.bfloat16())
        layer.mos_lora_B.copy_(layer.mos_lora_B.to(dtype))
    layer.eval()
    x = tokens_of(T, dtype).detach()
    gates = None if scope == "linear" else normal(1, T, E).softmax(-1).float()
    wide = layer_of(torch.float64, router_scope=scope, activation=activation, share_a=activation == "identity")
    wide.load_state_dict(layer.state_dict())
    with torch.no_grad():
        truth = wide(x.double(), None if gates is None else gates.double(), backend="eager")
        by_torch = layer(x, gates, backend="eager")
        split = layer(x, gates)
        frozen = layer.freeze_for_inference()(x, gates)
    whole = layer(x.requires_grad_(), gates).detach()
    for y in (split, frozen, whole):
        assert not compare({"y": y}, {"y": by_torch}, {"y": truth})
    assert torch.equal(split, frozen)


@pytest.mark.shipped_settings
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("training", "gradients", "T", "split"), [
    (False, False, 64, True), (False, False, 65, False), (False, True, 64, False), (True, False, 64, False),
])  # fmt: skip
def test_decoding_splits_d_in(training, gradients, T, split, frozen, monkeypatch):
    """In training mode a backward may follow a forward without gradients: checkpointing runs it again."""
    layer = layer_of(router_scope="linear")
    router = MoSRouter(D_IN, layer.config)
    if frozen:
        layer.freeze_for_inference()
    for module in (layer, router):
        module.train(training)
    splits, run = [], launch.launch

    def counted(kernel, grid, *arguments, **constants):
        if kernel.fn.__name__ == "shrink_kernel":
            splits.append(grid[1])
        run(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", counted)
    with torch.set_grad_enabled(gradients):
        layer(tokens_of(T), backend="triton")
        router(tokens_of(T), backend="triton")
    stored = launch.stored_settings("shrink", torch.device("cpu"), 64)["SPLITS"]
    assert stored > 1 and splits == [stored if split else 1] * 2


@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "identity"), (torch.bfloat16, "silu")])
@pytest.mark.parametrize("own_router", [True, False])
@pytest.mark.parametrize("counts", [(64, 1, 17), (150, 65, 97)])
@pytest.mark.budget(10)
@pytest.mark.one_at_a_time("dtype", "own_router", "counts")
def test_a_token_does_not_depend_on_the_others(dtype, activation, own_router, counts, monkeypatch):
    """Bitwise, within a launch bucket. W = 0 and the interpreter multiplies by einsum: BLAS lacks the property."""
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: numpy.einsum("ij,jk->ik", a, b, dtype=dtype))
    scope = "linear" if own_router else "ffn"
    config = MoSConfig(r=R, activation=activation, router_scope=scope)
    case = make_case(config, (counts[0],), D_IN, D_OUT, own_router=own_router, margin=-1.0).to(dtype)
    case = case.replace(weight=leaf(torch.zeros_like(case.weight)))
    dy = case.upstream(dtype)
    whole = case.results(case.ours("triton"), dy)
    with torch.no_grad():
        decoded = case.ours("triton")
    for count in counts[1:]:
        which = torch.randperm(counts[0], generator=torch.Generator().manual_seed(count))[:count]
        part = case.replace(x=leaf(case.x.detach()[which]))
        part = part if own_router else part.replace(gates=leaf(case.gates.detach()[which]))
        found = part.results(part.ours("triton"), dy[which])
        for name in ("y", "x") if own_router else ("y", "x", "gates"):
            assert torch.equal(found[name], whole[name][which]), name
        with torch.no_grad():
            assert torch.equal(part.ours("triton"), decoded[which])


# what is kept for backward


def saved_bytes(run, x, *modules) -> int:
    """Bytes saved for backward in storages other than x's and the modules', each storage once."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)
    for tensor in [x, *(t for m in modules for t in [*m.parameters(), *m.buffers()])]:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    assert all(D_OUT not in tensor.shape for tensor in found.values())
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def bytes_a_token(run, dtype, *modules) -> tuple[int, int]:
    """What a token costs, and what a call costs."""
    once, twice = (saved_bytes(run, tokens_of(count, dtype), *modules) for count in (T, 2 * T))
    return (twice - once) // T, 2 * once - twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_bytes_kept_for_backward(dtype, share_a, activation, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)  # the sizes alone count
    parts = 1 if dtype == torch.float32 else 2
    rank = R if share_a else E * R
    options = {"share_a": share_a, "activation": activation}
    layer = layer_of(dtype, router_scope="linear", **options)
    gram, z = (E * R * R, E * R * dtype.itemsize) if activation == "identity" else (0, 0)
    a_token, once = bytes_a_token(lambda x: layer(x, backend="triton"), dtype, layer)
    assert a_token == 4 * (rank + 1 + parts * E) + z and once == 4 * (E + gram)  # p, n, logits, z; κ and G
    dropping = layer_of(dtype, router_scope="linear", lora_dropout=0.3, **options)
    assert bytes_a_token(lambda x: dropping(x, backend="triton"), dtype, dropping) == (a_token, once + 8)
    layer, router = layer_of(dtype, **options), MoSRouter(D_IN, MoSConfig(r=R))
    a_token, once = bytes_a_token(
        lambda x: layer(x, router(x, backend="triton"), backend="triton"), dtype, layer, router
    )  # fmt: skip
    assert a_token == 4 * (rank + 1 + E + parts * E) + z  # p, n, gates, the router's logits, z
    assert once == 4 * (E + gram)
    with torch.no_grad():
        assert saved_bytes(lambda x: layer(x, router(x, backend="triton"), backend="triton"), tokens_of(T, dtype)) == 0


def test_the_page_says_what_the_defaults_keep(monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    layer = MoSLinear(D_IN, D_OUT, config=MoSConfig(router_scope="linear"), dtype=torch.bfloat16)
    a_token, _ = bytes_a_token(lambda x: layer(x, backend="triton"), torch.bfloat16, layer)
    page = (Path(__file__).parents[3] / "docs" / "mathematics.md").read_text()
    assert f"Together that is {a_token} bytes a token at the defaults in bfloat16." in " ".join(page.split())
