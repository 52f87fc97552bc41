"""Bases as transformers and accelerate load them: quantised, in bfloat16, offloaded, split by a device_map."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, MATRIX, batch, ffn_of, ids, layers_of, logits, mos
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from mos_kernels import MoSWrapped
from mos_kernels.huggingface import (
    apply_mos,
    load_adapter,
    mos_param_groups,
    remove_mos,
    routing_report,
    save_adapter,
)
from mos_kernels.huggingface.modules import adapter_parameters
from mos_kernels.layer import MoSLayer

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
SPLIT_BERT = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "cpu",
    "bert.encoder.layer.1": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}


def _torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


LOADS = {
    "float32": lambda folder: {"dtype": torch.float32},
    "bfloat16": lambda folder: {"dtype": torch.bfloat16},
    "bitsandbytes nf4": lambda folder: {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "classifier"],
        ),
        "dtype": torch.bfloat16,
    },
    "bitsandbytes int8": lambda folder: {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "torchao int8": lambda folder: {"quantization_config": _torchao_int8(), "dtype": torch.bfloat16},
    "disk": lambda folder: {
        "device_map": SPLIT_BERT if family_of(folder) == "bert" else SPLIT,
        "offload_folder": folder / "offload",
        "dtype": torch.float32,
    },
}


@pytest.fixture(scope="module", params=MATRIX)
def checkpoint(request, tmp_path_factory):
    """A folder that is named after the family."""
    kind, config, options = FAMILIES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    widths = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # whole blocks of 64 for bitsandbytes
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if request.param == "bert" else {}
    kind(config(**{**options, **widths, **dropout})).save_pretrained(folder)
    return folder


def family_of(folder) -> str:
    return folder.name.rstrip("0123456789")


def loaded(how: str, folder) -> nn.Module:
    auto = AutoModelForSequenceClassification if family_of(folder) == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(folder, **LOADS[how](folder))


@pytest.mark.parametrize("how", LOADS)
def test_it_trains_and_its_files_go_around(how, checkpoint, tmp_path):
    untouched, model = logits(loaded(how, checkpoint).eval()), loaded(how, checkpoint)
    apply_mos(model, mos(model, init_lora_weights=True))
    adapter = adapter_parameters(model)
    assert len(adapter) == (16 if family_of(checkpoint) == "bert" else 20)
    assert {(p.dtype, p.device.type) for p in adapter.values()} == {(torch.float32, "cpu")}

    optimizer, losses = torch.optim.AdamW(mos_param_groups(model, 2e-2)), []
    model.train()  # before any eval mode, in which bitsandbytes packs 4-bit weights on a CPU, for inference alone
    for _ in range(6):
        loss = model(**batch(family_of(checkpoint))).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    expected = logits(model.eval())
    routers = 4 if family_of(checkpoint) == "bert" else 2
    assert not torch.equal(expected, untouched) and len(routing_report(model, ids())) == routers
    save_adapter(model, tmp_path)
    other = loaded(how, checkpoint)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    remove_mos(other)
    assert torch.equal(logits(other), untouched)
    apply_mos(other, mos(other, init_lora_weights=True))
    assert torch.equal(logits(other), untouched)


@pytest.mark.parametrize("how", LOADS)
def test_gradients_are_those_of_base_plus_adapter(how, checkpoint):
    """Autograd through base(x) + adapter(x), the adapter alone in float32; within the base's own rounding.

    Errors are measured against the largest value of each tensor.
    """
    torch.manual_seed(0)
    model = loaded(how, checkpoint)
    ends = ("gate_proj", "down_proj", "intermediate.dense", ".output.dense")
    bases = {n: m for n, m in model.named_modules() if n.endswith(ends) and "attention" not in n}
    assert len(bases) == 4
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    runs = {name: (base, torch.randn(5, base.in_features, dtype=dtype)) for name, base in bases.items()}
    outputs = {name: base.train()(x).detach().float() for name, (base, x) in runs.items()}
    apply_mos(model, mos(model))
    tolerance = 1e-5 if dtype == torch.float32 and "int8" not in how else 2e-2
    for name, (_, x) in runs.items():
        layer, gates = model.get_submodule(name).train(), torch.rand(5, 8)
        assert isinstance(layer, MoSLayer)
        x = x.requires_grad_()
        y = layer(x, gates)
        upstream = torch.randn_like(y)
        y.backward(upstream)

        A, B = (p.detach().clone().requires_grad_() for p in (layer.mos_lora_A, layer.mos_lora_B))
        kappa, wide = layer.curvature.detach().requires_grad_(), x.detach().float()
        h = 2 / (1 + kappa[:, None] * wide.square().sum(-1)).clamp(min=1e-3).t()[..., None] * (wide @ A.t())[:, None]
        u = torch.einsum("oer,ter->teo", B, h)
        e = 1 / (1 + (1 - kappa * u.square().sum(-1)).clamp(min=1e-3).sqrt())
        adapter = layer.config.scaling * torch.einsum("te,te,teo->to", gates, e, u)
        composed = outputs[name] + adapter.detach()
        assert (y.detach().float() - composed).abs().max() <= tolerance * composed.abs().max()
        adapter.backward(upstream.float())
        theta = kappa.grad * layer.mos_curvature_map[1]
        for found, expected in ((layer.mos_lora_A, A.grad), (layer.mos_lora_B, B.grad), (layer.mos_curvature, theta)):
            error = (found.grad - expected).abs().max()
            assert error <= tolerance * expected.abs().max(), (name, error, expected.abs().max())


def test_an_offloaded_linear_stays_offloaded_beneath_its_adapter(checkpoint):
    model = loaded("disk", checkpoint)
    plain = loaded("float32", checkpoint)
    for each in (model, plain):
        torch.manual_seed(1)
        apply_mos(each, mos(each))
    resident, split = (getattr(*ffn_of(layer)[0]) for layer in layers_of(model))
    assert isinstance(split, MoSWrapped) and not isinstance(resident, MoSWrapped)
    assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
    assert split.base_layer.weight.is_meta and not split.mos_lora_A.is_meta
    for each in (model, plain):
        each.train()(**batch(family_of(checkpoint))).loss.backward()
    for (name, found), expected in zip(
        adapter_parameters(model).items(), adapter_parameters(plain).values(), strict=True
    ):
        assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapter_after_cpu_offload(checkpoint):
    from accelerate import cpu_offload

    plain, model = loaded("float32", checkpoint), loaded("float32", checkpoint)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for each in (model, plain):
        torch.manual_seed(1)
        apply_mos(each, mos(each))
    assert all(not p.is_meta for p in adapter_parameters(model).values())
    assert all(p.is_meta for name, p in model.named_parameters() if "mos_" not in name)
    assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
