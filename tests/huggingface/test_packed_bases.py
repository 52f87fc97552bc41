"""GPTQ and AWQ checkpoints, as transformers loads them through gptqmodel; made by hand, since only the form matters."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import FAMILIES, ids, logits, mos
from torch import nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from mos_kernels import MoSLinear, MoSWrapped
from mos_kernels.huggingface import apply_mos, load_adapter, remove_mos, save_adapter

missing = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, which asks for a newer torch")

GROUP = 32
METHODS = {
    "gptq": (GPTQConfig(bits=4, backend="torch"), {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (
        AwqConfig(bits=4, group_size=GROUP, backend="torch_awq"),
        {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    ),
}


@pytest.fixture(scope="module", params=METHODS)
def checkpoint(request, tmp_path_factory):
    """(method, folder): a tiny Llama whose linears hold random numbers of four bits, eight in an int32."""
    kind, config, options = FAMILIES["llama"]
    torch.manual_seed(0)
    model = kind(config(**{**options, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}))
    tensors = model.half().state_dict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            tensors |= {f"{name}.{kind}": t for kind, t in _packed(module, request.param).items()}
            del tensors[f"{name}.weight"]
    folder = tmp_path_factory.mktemp(request.param)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": request.param, **METHODS[request.param][1]}
    (folder / "config.json").write_text(json.dumps(values))
    return request.param, folder


def _packed(linear: nn.Linear, method: str) -> dict[str, torch.Tensor]:
    d_in, d_out = linear.in_features, linear.out_features
    groups, shape = d_in // GROUP, (d_in // 8, d_out) if method == "gptq" else (d_in, d_out // 8)
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32),
        "qzeros": torch.full((groups, d_out // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(groups, d_out).mul(0.01).add(0.005).half(),
    }
    return tensors | ({"g_idx": (torch.arange(d_in) // GROUP).int()} if method == "gptq" else {})


def loaded(checkpoint) -> nn.Module:
    method, folder = checkpoint
    how = METHODS[method][0]  # a backend that can be trained through: others are for inference alone
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32, device_map="cpu")


def test_it_trains_and_its_files_go_through_both_doors(checkpoint, tmp_path):
    model = loaded(checkpoint)
    untouched, base = logits(model), type(model.model.layers[0].mlp.up_proj)
    assert not issubclass(base, nn.Linear) and untouched.isfinite().all()
    apply_mos(model, mos(model, init_lora_weights=True))
    assert isinstance(model.model.layers[0].mlp.up_proj, MoSWrapped)
    assert torch.equal(logits(model), untouched)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 20 and {p.dtype for p in trainable} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(trainable, 2e-2), []
    model.train()
    for _ in range(6):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model.eval())
    save_adapter(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(checkpoint), tmp_path)), expected)
    other = loaded(checkpoint)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    remove_mos(other)
    assert type(other.model.layers[0].mlp.up_proj) is base and torch.equal(logits(other), untouched)


def test_gradients_are_those_of_the_dense_layer_on_its_numbers(checkpoint):
    """Within half a unit in the last place of float16, in which AWQ's product is taken."""
    model = loaded(checkpoint)
    apply_mos(model, mos(model))
    layer = model.model.layers[0].mlp.up_proj.train()
    dense = nn.Linear(64, 128, bias=False)
    with torch.no_grad():
        dense.weight.copy_(layer.base_layer(torch.eye(64)).T)
    dense = MoSLinear.from_linear(dense, layer.config)
    dense.load_state_dict({n: t for n, t in layer.state_dict().items() if "mos_" in n}, strict=False)
    x, gates, found = torch.randn(5, 64), torch.rand(5, 8), []
    for adapted in (layer, dense):
        x = x.detach().requires_grad_()
        y = adapted(x, gates)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, adapted.mos_lora_A.grad, adapted.mos_lora_B.grad, adapted.mos_curvature.grad])
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).abs().max() <= torch.finfo(torch.float16).eps / 2 * truth.abs().max()
