"""apply_mos and what follows it on bases whose weight is no dense parameter: quantised, parametrised, custom."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, MATRIX, batch, ffn_of, first_linear, ids, layers_of, logits, mos
from torch import nn

from mos_kernels import MoSLinear, MoSWrapped
from mos_kernels.huggingface import (
    activated_parameters,
    apply_mos,
    load_adapter,
    remove_mos,
    routing_report,
    save_adapter,
)

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # whole blocks of 64 for bitsandbytes


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _four_bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    has_bias = linear.bias is not None
    base = Linear4bit(linear.in_features, linear.out_features, has_bias, torch.float32, quant_type="nf4")
    base.load_state_dict(linear.state_dict())
    return base.to("cpu")


def _eight_bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    has_bias = linear.bias is not None
    base = Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
    base.load_state_dict(linear.state_dict())
    return base.to("cpu")


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def _float8(linear: nn.Linear) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(nn.Sequential(linear), config=Float8LinearConfig(emulate=True))[0]


def _custom(linear: nn.Linear) -> nn.Module:
    base = Doubling(linear.in_features, linear.out_features, bias=linear.bias is not None)
    base.load_state_dict(linear.state_dict())
    return base


class Packed(nn.Module):
    """As GPTQ's and AWQ's linears: no weight, whole numbers and scales in buffers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        y = nn.functional.linear(x, self.qweight.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


BASES = {
    "packed": Packed,
    "bitsandbytes 4-bit": _four_bit,
    "bitsandbytes 8-bit": _eight_bit,
    "torchao int8": _torchao,
    "torchao float8": _float8,
    "parametrised": nn.utils.parametrizations.weight_norm,
    "custom": _custom,
}
BOUNDS = {"bitsandbytes 8-bit": 0.05, "torchao float8": 0.05}  # these round x and dy too
every_base = pytest.mark.parametrize("kind", BASES)
every_family = pytest.mark.parametrize("family", MATRIX)


def model_on(kind: str, family: str = "llama", seed: int = 0) -> nn.Module:
    """A tiny model without dropout whose FFN linears are of this kind."""
    cls, config, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = cls(config(**{**options, **WIDTHS}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in layers_of(model):
        for owner, name in ffn_of(layer):
            setattr(owner, name, BASES[kind](getattr(owner, name)))
    return model.eval()


@every_base
@every_family
def test_an_adapter_at_its_start_changes_nothing_and_comes_off(kind, family):
    model = model_on(kind, family)
    before, bases = logits(model), [m for m in model.modules() if type(m) is type(first_linear(model))]
    names = list(model_on(kind, family).state_dict())
    count = sum(p.numel() for p in model_on("custom", family).parameters())
    applied = apply_mos(model, mos(model, init_lora_weights=True))
    assert len(applied) == (4 if family == "bert" else 6)
    assert ("one router per block" in applied.report()) == (family != "bert")
    assert isinstance(first_linear(model), MoSWrapped)
    assert torch.equal(logits(model), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "mos_" not in name)
    if kind not in ("parametrised", "packed"):
        assert activated_parameters(model).base == count
    assert remove_mos(model) == list(applied)
    assert [m for m in model.modules() if type(m) is type(bases[0])] == bases
    assert torch.equal(logits(model), before)
    apply_mos(model, mos(model))  # and a state dict, which makes bitsandbytes pack 4-bit weights anew
    assert [name for name in model.state_dict() if "mos_" not in name] == names


@every_base
@every_family
def test_gradients_are_those_of_base_plus_adapter(kind, family):
    """Against the dense layer on the numbers that the base computes with, but for the base's own rounding."""
    model = model_on(kind, family)
    apply_mos(model, mos(model))
    layer = first_linear(model).train()  # bitsandbytes computes otherwise in eval mode on a CPU
    x = torch.randn(5, 64, requires_grad=True)
    gates = torch.rand(5, 8)
    dense = nn.Linear(64, 128)
    with torch.no_grad():
        dense.bias.copy_(layer.base_layer(torch.zeros(1, 64))[0])
        dense.weight.copy_(layer.base_layer(torch.eye(64)).T - dense.bias[:, None])
    dense = MoSLinear.from_linear(dense, layer.config)
    dense.load_state_dict({n: t for n, t in layer.state_dict().items() if "mos_" in n}, strict=False)
    found = []
    for adapted in (layer, dense):
        x.grad = None
        y = adapted(x, gates)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, adapted.mos_lora_A.grad, adapted.mos_lora_B.grad, adapted.mos_curvature.grad])
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).abs().max() <= BOUNDS.get(kind, 1e-4) * truth.abs().max()


@every_base
@every_family
def test_it_trains_and_reports_and_files_go_around(kind, family, tmp_path):
    model = model_on(kind, family)
    apply_mos(model, mos(model))
    model.train()
    model(**batch(family)).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
    with torch.no_grad():
        for parameter in trainable.values():
            parameter -= 0.1 * parameter.grad
    model.eval()
    expected = logits(model)
    assert len(routing_report(model, ids())) == (4 if family == "bert" else 2)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    save_adapter(model, tmp_path)
    other = model_on(kind, family)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)


def test_a_parametrised_base_in_a_checkpoint_of_the_whole_model():
    model = model_on("parametrised")
    apply_mos(model, mos(model))
    state = model.state_dict()
    plain = model_on("parametrised", seed=1)
    report = plain.load_state_dict(state, strict=False)
    assert not report.missing_keys and all("mos_" in name for name in report.unexpected_keys)
    again = model_on("parametrised", seed=1)
    apply_mos(again, mos(again))
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit"])
def test_a_quantised_base_in_bfloat16_with_the_adapter_in_float32(kind):
    model = model_on(kind)
    apply_mos(model, mos(model))
    layer = model.model.layers[0].mlp.up_proj
    x, gates = torch.randn(3, 64, dtype=torch.bfloat16), torch.rand(3, 8)
    assert layer(x, gates).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float(), gates).dtype == layer.base_layer(x.float()).dtype
    assert layer.mos_lora_A.dtype == torch.float32


def test_a_dispatched_base_keeps_its_hook():
    from accelerate import dispatch_model

    model = model_on("custom")
    expected = logits(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    apply_mos(model, mos(model, init_lora_weights=True))
    layer = model.model.layers[0].mlp.up_proj
    assert layer._hf_hook is not layer.base_layer._hf_hook
    assert torch.equal(logits(model), expected)
    remove_mos(model)
    assert torch.equal(logits(model), expected)
