"""torch.export and ONNX; and what refuses a layer in a sentence instead of an assertion of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mos_kernels import MoSConfig, MoSLinear, MoSRouter

KINDS = [
    {}, {"mapping": "exp_log"}, {"activation": "silu"}, {"domain": "raw"}, {"share_a": False},
    {"norm_topk_prob": False}, {"r": 80},
]  # fmt: skip


def layer_of(**options) -> MoSLinear:
    torch.manual_seed(0)
    spaces = {"hyperbolic": 2, "spherical": 1, "euclidean": 1}
    config = {"r": 4, "spaces": spaces, "num_experts_per_tok": 2, "router_scope": "linear", "init_lora_weights": False}
    return MoSLinear(16, 12, config=MoSConfig(**{**config, **options})).eval()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_exported_layer_computes_the_same_for_any_number_of_tokens(options):
    layer, x = layer_of(**options), torch.randn(5, 16)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
        for tokens in (x, torch.randn(7, 16)):
            torch.testing.assert_close(program.module()(tokens), layer(tokens))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("sort" in name or "copysign" in name for name in names), "ONNX has no such operation"


def test_ties_go_to_the_lower_index_when_exported_too():
    layer = layer_of()
    layer.mos_router.data[2] = layer.mos_router.data[0]
    layer.mos_router.data[3] = layer.mos_router.data[1] = layer.mos_router.data[0] * 0.9
    x = torch.randn(64, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_onnx(options):
    pytest.importorskip("onnxscript", reason="ONNX export needs the packages onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="running an ONNX file needs the package onnxruntime")
    layer, x = layer_of(**options), torch.randn(5, 16)
    with torch.no_grad():
        program = torch.onnx.export(
            layer, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("tokens")},)
        )
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        for tokens in (x, torch.randn(7, 16)):
            (y,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), layer(tokens), rtol=1e-5, atol=1e-5)


def forward_mode(module, x):
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))


REFUSED = {
    "torch.jit.trace": lambda module, x: torch.jit.trace(module, (x,)),
    "torch.jit.script": lambda module, x: torch.jit.script(nn.Sequential(module)),
    "torch.fx.symbolic_trace": lambda module, x: torch.fx.symbolic_trace(module),
    "vmap": lambda module, x: torch.vmap(module)(x),
    "grad": lambda module, x: torch.func.grad(lambda x: module(x).sum())(x),
    "vjp": lambda module, x: torch.func.vjp(module, x),
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (x,)),
    "(jvp)": forward_mode,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("module", ["layer", "router"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_says_so(name, module, gradients):
    layer = layer_of()
    module = layer if module == "layer" else MoSRouter(16, layer.config)
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="does not support") as error:
        REFUSED[name](module, torch.randn(3, 16))
    assert name in str(error.value) and "torch.export.export" in str(error.value)


def test_a_forward_beside_someone_elses_tangents_runs():
    layer, x = layer_of(), torch.randn(3, 16)
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(x, x)
        assert torch.equal(layer(x), layer_of()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"activation": "silu"}, {"mapping": "exp_log"}], ids=str)
def test_the_meta_device(options, training):
    layer = layer_of(**options).to("meta").train(training)
    x = torch.randn(2, 5, 16, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 5, 12) and y.is_meta
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.mos_lora_B.grad.shape == layer.mos_lora_B.shape
    with torch.no_grad():
        assert layer(x).is_meta and MoSRouter(16, layer.config, device="meta")(x).shape == (2, 5, 4)
