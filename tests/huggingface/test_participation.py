"""What of an adapter takes no part in a model: found, named, and all as it was afterwards; doctor --model."""

from __future__ import annotations

import pytest
import torch
from peft_setup import peft_model
from tiny_models import MATRIX, batch, ids, mos, snapshot, tiny
from torch.nn.functional import linear

from mos_kernels.__main__ import main
from mos_kernels.huggingface import apply_mos, idle_tensors, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters


def adapted(family: str = "llama", **options):
    model = tiny(family)
    torch.manual_seed(0)
    apply_mos(model, mos(model, **options))
    return model


@pytest.mark.parametrize("family", MATRIX)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_all_of_a_trained_adapter_takes_part(family, scope):
    model = adapted(family, router_scope=scope).train()
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert idle_tensors(model, **batch(family, length=12)) == []
    assert snapshot(model) == before
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert idle_tensors(peft_model(family, router_scope=scope), **batch(family, length=12)) == []


@pytest.mark.parametrize(
    "options", [{"spaces": {"euclidean": 4}}, {"spaces": {"euclidean": 1}, "num_experts_per_tok": 1},
                {"spaces": {"spherical": 1}, "num_experts_per_tok": 1}, {"share_a": False}]
)  # fmt: skip
def test_what_has_no_gradient_by_nature_is_not_listed(options):
    assert idle_tensors(adapted(**options), input_ids=ids(length=30)) == []


def test_an_adapter_at_its_start_is_said_once_a_linear():
    model = adapted(init_lora_weights=True)
    found = idle_tensors(model, input_ids=ids())
    assert len(found) == 6 and {why for _, why in found} == {"adds nothing: B is zero, as before training"}


def test_a_linear_that_is_read_past_its_forward_is_named():
    model = adapted()
    mlp = model.model.layers[0].mlp
    down = mlp.down_proj
    mlp.forward = lambda x: linear(torch.relu(mlp.up_proj(x, mlp.mos_router(x))), down.weight)
    found = dict(idle_tensors(model, input_ids=ids(length=30)))
    assert set(found) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"}
    assert all(why.startswith("never ran") for why in found.values())


def test_a_tensor_without_gradient_is_named():
    model = adapted()
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda layer, args, y: y.detach())
    found = dict(idle_tensors(model, input_ids=ids(length=30)))
    name = "model.layers.1.mlp.up_proj"
    assert found == {f"{name}.{p}": "got no gradient" for p in ("mos_lora_A", "mos_lora_B", "mos_curvature")}


def test_without_an_adapter():
    with pytest.raises(ValueError, match="has no active MoS adapter"):
        idle_tensors(tiny(), input_ids=ids())


def test_the_command(tmp_path, capsys):
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    apply_mos(model, mos(model))
    save_adapter(model, tmp_path / "mos")
    assert main(["doctor", "--model", str(tmp_path / "mos")]) == 0
    assert "take part" in capsys.readouterr().out
    base.save_pretrained(tmp_path / "whole")  # an adapter inside its base's folder, as transformers serve reads it
    save_adapter(model, tmp_path / "whole")
    assert main(["doctor", "--model", str(tmp_path / "whole")]) == 0
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.mos_lora_B.zero_()
    save_adapter(model, tmp_path / "mos")
    assert main(["doctor", "--model", str(tmp_path / "mos"), "--base", str(tmp_path / "base")]) == 1
    assert "model.layers.0.mlp.up_proj: adds nothing" in capsys.readouterr().out
    assert main(["doctor", "--model", str(tmp_path / "mos"), "--base", str(tmp_path / "whole")]) == 2
    assert "holds an adapter itself" in capsys.readouterr().out
    assert main(["doctor", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().out
