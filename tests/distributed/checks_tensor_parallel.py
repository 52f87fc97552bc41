"""Tensor parallelism: an adapted linear is refused, clearly; adapters beside tensor-parallel attention work."""

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_models import ids, mos, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from two_processes import adapted, assert_equal_gradients, gradients, inputs, truth

from mos_kernels.huggingface import apply_mos
from mos_kernels.huggingface.modules import adapter_parameters

pytestmark = pytest.mark.usefixtures("process_group")
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj"), ("o_proj",)


def split(model, columns, rows, block: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
    for layer in model.model.layers:
        parallelize_module(getattr(layer, block), mesh, plan)


def test_a_tensor_parallel_linear_is_refused_before_anything_changes():
    model = tiny(dtype=torch.float32)
    split(model, ("gate_proj", "up_proj"), ("down_proj",), "mlp")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="gate_proj.*DTensor.*out of the tensor-parallel plan"):
        apply_mos(model, mos(model))
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_splitting_an_adapted_linear_is_an_error_in_its_forward():
    model = adapted()
    split(model, ("gate_proj", "up_proj"), ("down_proj",), "mlp")
    with pytest.raises(ValueError, match="tensor-parallel"):
        model(**inputs())


def test_a_model_that_transformers_loads_with_its_tensor_parallel_plan(shared_folder):
    if dist.get_rank() == 0:
        tiny(dtype=torch.float32).save_pretrained(shared_folder)
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(shared_folder, tp_plan="auto")
    with pytest.raises(ValueError, match="gate_proj.*out of the tensor-parallel plan"):
        apply_mos(model, mos(model))


def test_adapters_beside_tensor_parallel_attention():
    model, batch = adapted(router_aux_loss_coef=5.0), inputs()
    expected, alone = truth(model, [batch], 5.0), copy.deepcopy(model)
    split(model, COLUMNS, ROWS, "self_attn")
    assert_close(model(ids()).logits, alone(ids()).logits, rtol=1e-5, atol=1e-6)
    model(**batch).loss.backward()
    assert_equal_gradients({n: g for n, g in gradients(model).items() if n in adapter_parameters(model)}, expected)
