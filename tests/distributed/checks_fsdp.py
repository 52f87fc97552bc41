"""FSDP2 (fully_shard): gradients equal to one process, dtypes, meta start, checkpoints, adapter files.

FSDP2 wants one dtype of the trainable parameters in a group, and the curvature is float32 always: so the checks are in
float32, and in float64 where the curvature is fixed.
"""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import MATRIX, ffn_of, ids, layers_of, mos, tiny
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from two_processes import (
    adapted,
    assert_equal_gradients,
    gradients,
    halves,
    inputs,
    own_part,
    truth,
    whole,
    with_peft,
)

from mos_kernels import layer as layer_module
from mos_kernels.huggingface import apply_mos, load_adapter, remove_mos, routing_report, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters, router_owners
from mos_kernels.layer import MoSLayer, MoSRouter

pytestmark = pytest.mark.usefixtures("process_group")
every_family = pytest.mark.parametrize("family", MATRIX)


def shard(model: nn.Module, ffn: bool = False, **options) -> nn.Module:
    """A group for each layer, or (ffn) for each FFN block within, and one for the rest."""
    for layer in layers_of(model.get_base_model() if isinstance(model, PeftModel) else model):
        for block in dict.fromkeys(module for module, _ in ffn_of(layer)) if ffn else ():
            fully_shard(block, **options)
        fully_shard(layer, **options)
    return fully_shard(model, **options)


every_wrapper = pytest.mark.parametrize("wrap", [shard, DistributedDataParallel])


def whole_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("ffn", [False, True], ids=["layers", "layers and FFN blocks"])
@pytest.mark.parametrize("scope", ["ffn", "linear"])
@every_family
@pytest.mark.one_at_a_time("family", "scope", "ffn")
def test_gradients_equal_those_of_one_process(family, scope, ffn):
    for coefficient, dtype in ((0.0, torch.float32), (5.0, torch.float32), (5.0, torch.float64)):
        curvature = {"learn_curvature": dtype == torch.float32}
        model = adapted(family, dtype, router_scope=scope, router_aux_loss_coef=coefficient, **curvature)
        batch = inputs(family=family)
        expected = truth(model, halves(batch) if coefficient else [batch], coefficient)
        shard(model, ffn)
        model(**own_part(batch)).loss.backward()
        found = gradients(model)
        assert_equal_gradients(found, expected)
        assert set(found) == {name for name, p in adapter_parameters(model).items() if p.requires_grad}


def test_every_adapter_parameter_is_sharded_and_the_forward_of_the_block_is_ours():
    model = adapted()
    forwards = {name: module.forward for name, module in model.named_modules() if hasattr(module, "mos_router")}
    shard(model, ffn=True)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.dim() > 0, name
    assert isinstance(model.model.layers[0].mlp, FSDPModule)
    blocks = [name for name in forwards if isinstance(model.get_submodule(name).mos_router, MoSRouter)]
    assert len(blocks) == 2
    seen = []
    model.model.layers[0].mlp.mos_router.register_forward_hook(lambda m, a, y: seen.append(type(m.weight)))
    model(**own_part(inputs()))
    assert all(model.get_submodule(name).forward is forwards[name] for name in blocks)
    assert len(seen) == 1 and seen[0] is not DTensor


@every_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, family):
    model, batch = adapted(family, router_aux_loss_coef=5.0), inputs(family=family)
    expected = truth(model, halves(batch), 5.0)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    shard(model)
    model(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)


def test_a_base_in_bfloat16_with_the_adapter_in_float32():
    """One group holds both: FSDP2 gathers each in its own dtype, and reduces the gradients in float32."""
    model, batch = adapted(dtype=torch.bfloat16, router_aux_loss_coef=0.0), inputs()
    expected = truth(model, halves(batch))
    shard(model)
    model(**own_part(batch)).loss.backward()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert_equal_gradients(gradients(model), expected)


def seen_by(layer: MoSLayer, run) -> tuple[torch.Tensor, torch.Tensor]:
    """θ and κ as the layer has them in forward."""
    seen, own = [], layer_module._Curvature.forward

    def forward(ctx, theta, *args):
        kappa = own(ctx, theta, *args)
        seen.append((theta.detach().clone(), kappa.detach().clone()))
        return kappa

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module._Curvature, "forward", staticmethod(forward))
        handle = layer.register_forward_pre_hook(lambda m, a: seen.clear())
        stop = layer.register_forward_hook(lambda m, a, y: patch.undo())
        run()
    handle.remove(), stop.remove()
    return seen[0]


def test_a_mixed_precision_policy_leaves_the_curvature_in_float32():
    """The trained θ is float32 and takes steps that bfloat16 would lose; forward rounds θ, and κ is float32 again."""
    model, batch = adapted(), inputs()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.mos_curvature.fill_(1.0).add_(1e-4)
    expected = whole(layer.mos_curvature)
    assert expected.dtype == torch.float32 and torch.all(expected != 1)
    theta, kappa = seen_by(layer, lambda: model(**own_part(batch)).loss.backward())
    assert theta.dtype == torch.bfloat16 and kappa.dtype == torch.float32
    offset, gain = layer.mos_curvature_map
    assert_close(kappa, offset + gain * theta.float(), rtol=0, atol=0)
    assert torch.equal(whole(layer.mos_curvature), expected)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


def test_adapter_groups_of_their_own_are_float32_in_forward_too():
    """The recipe for a policy that casts: shard what has an adapter first, without it, on a base in bfloat16."""
    model, batch = adapted(dtype=torch.bfloat16, router_aux_loss_coef=0.0), inputs()
    expected = truth(model, halves(batch), by_linears=True)
    for module in model.modules():
        if isinstance(module, (MoSLayer, MoSRouter)):
            fully_shard(module)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.mos_curvature.fill_(1e-4)
    theta, kappa = seen_by(layer, lambda: model(**own_part(batch)))
    assert theta.dtype == kappa.dtype == torch.float32
    assert_close(theta, torch.full_like(theta, 1e-4), rtol=0, atol=0)
    with torch.no_grad():
        layer.mos_curvature.zero_()
    model(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)


def test_started_on_the_meta_device_from_the_weights_of_the_first_process():
    whole_model = adapted(router_aux_loss_coef=5.0)
    expected = truth(whole_model, halves(inputs()), 5.0)
    state = whole_model.state_dict() if dist.get_rank() == 0 else {}

    with torch.device("meta"):
        model = copy.deepcopy(tiny()).to(torch.float32)
        apply_mos(model, mos(model, router_aux_loss_coef=5.0))
    assert all(t.is_meta for t in (*model.parameters(), model.model.layers[0].mlp.up_proj.mos_curvature_map))
    shard(model.train())
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    for name, buffer in whole_model.named_buffers():
        own = model.get_buffer(name)
        if "mos_" in name:
            assert_close(own, buffer, rtol=0, atol=0, msg=name)
        else:  # of the rotary embedding, which transformers forms when it loads a checkpoint
            own.copy_(buffer)
    model(**own_part(inputs())).loss.backward()
    assert_equal_gradients(gradients(model), expected)


def test_reset_after_a_meta_start_draws_sharded_parameters():
    with torch.device("meta"):
        model = tiny().to(torch.float32)
        apply_mos(model, mos(model, init_lora_weights=True))
    shard(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, (MoSLayer, MoSRouter)):
            module.reset_adapter_parameters()
    for name, value in whole_adapter(model).items():
        assert value.isfinite().all(), name
        assert bool(value.any()) == (not name.endswith(("mos_lora_B", "mos_curvature"))), name


@pytest.mark.parametrize("own_groups", [False, True], ids=["layers", "adapters and layers"])
def test_curvature_and_routing_are_read_off_a_sharded_model(own_groups):
    model = adapted()
    kappa = [m.curvature.detach() for m in model.modules() if isinstance(m, MoSLayer)]
    expected = routing_report(model, ids())
    for module in model.modules():
        if own_groups and isinstance(module, (MoSLayer, MoSRouter)):
            fully_shard(module)
    shard(model)
    found = [m.curvature.detach() for m in model.modules() if isinstance(m, MoSLayer)]
    assert_close(found, kappa, rtol=0, atol=0)
    assert [row["share"] for row in routing_report(model, ids())] == [row["share"] for row in expected]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds, family: str) -> None:
    for seed in seeds:
        model(**own_part(inputs(seed=seed, family=family))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@every_family
@every_wrapper
@pytest.mark.parametrize("make", [adapted, with_peft])
@pytest.mark.one_at_a_time("make", "wrap", "family")
def test_a_sharded_checkpoint_resumes_to_identical_states(shared_folder, make, wrap, family):
    model = wrap(make(family))
    optimizer = optimizer_of(model)
    steps(model, optimizer, [0, 1], family)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=shared_folder)
    steps(model, optimizer, [2, 3], family)

    again = wrap(make(family))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    resumed = optimizer_of(again)
    weights, moments = get_state_dict(again, resumed)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=shared_folder)
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=moments)
    steps(again, resumed, [2, 3], family)
    for (name, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(found), whole(expected)), name


@every_family
def test_adapter_files_are_those_of_one_process(shared_folder, family):
    plain = adapted(family)
    head = {"gemma": "model.norm", "bert": "classifier"}.get(family, "lm_head")
    plain.get_submodule(head).requires_grad_(True)
    names = {f"base_model.model.{name}" for name, p in plain.named_parameters() if p.requires_grad}
    model = shard(copy.deepcopy(plain))
    save_adapter(model, shared_folder / "sharded")
    files = sorted(path.name for path in (shared_folder / "sharded").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    description = json.loads((shared_folder / "sharded" / "adapter_config.json").read_text())
    assert description["auto_mapping"]["base_model_class"] == type(plain).__name__ != type(model).__name__
    tensors = load_file(shared_folder / "sharded" / "adapter_model.safetensors")
    assert set(tensors) == names
    for name, tensor in tensors.items():
        assert torch.equal(tensor, plain.get_parameter(name.removeprefix("base_model.model."))), name

    alone = tiny(family, torch.float32)  # one process opens it
    load_adapter(alone, shared_folder / "sharded")
    with torch.no_grad():
        expected = alone(ids()).logits
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
        load_adapter(model, shared_folder / "sharded", is_trainable=True)  # and a sharded model
        assert_close(model.eval()(ids()).logits, expected, rtol=1e-5, atol=1e-6)
    assert all(isinstance(p, DTensor) and p.requires_grad for p in adapter_parameters(model).values())


@pytest.mark.parametrize("sharded_first", [False, True])
def test_the_base_has_its_head_again_after_an_adapter_without_one(shared_folder, sharded_first):
    headless, model = adapted("bert"), adapted("bert")
    with_head = adapted("bert")
    with_head.classifier.requires_grad_(True)
    with torch.no_grad():
        with_head.classifier.weight.fill_(0.5)
    before = model.classifier.weight.detach().clone()
    if dist.get_rank() == 0:
        save_adapter(with_head, shared_folder / "head")
        save_adapter(headless, shared_folder / "none")
    dist.barrier()
    model = shard(model) if sharded_first else model
    load_adapter(model, shared_folder / "head")
    model = model if sharded_first else shard(model)
    assert torch.equal(model.classifier.weight.full_tensor(), with_head.classifier.weight)
    load_adapter(model, shared_folder / "none")
    assert torch.equal(model.classifier.weight.full_tensor(), before)


def test_before_fully_shard_or_not_at_all():
    model = shard(tiny(dtype=torch.float32))
    with pytest.raises(ValueError, match="before fully_shard"):
        apply_mos(model, mos(model))
    model = shard(adapted())
    with pytest.raises(ValueError, match="before fully_shard"):
        remove_mos(model)
    assert len(router_owners(model)) == 2


def test_fsdp1_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted()
    parallel = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="fully_shard"):
        save_adapter(parallel, tmp_path)
    with pytest.raises(ValueError, match="fully_shard"):
        apply_mos(parallel, mos(tiny()))


@every_family
@every_wrapper
def test_the_peft_method(wrap, family):
    """With load balancing off, as one process would see it over the whole batch."""
    model, batch = with_peft(family, router_aux_loss_coef=0.0), inputs(family=family)
    alone = copy.deepcopy(model)
    alone(**batch).loss.backward()
    expected = gradients(alone)
    parallel = wrap(model)
    parallel(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)
    assert any("mos_curvature" in name for name in expected)


def peft_loads_into_shards() -> bool:
    """Since 0.21.1 peft does, with a transformers that has DTensors in its tensor parallelism."""
    import peft.import_utils

    return getattr(peft.import_utils, "is_transformers_dtensor_tp", False)


@every_family
@every_wrapper
@pytest.mark.one_at_a_time("wrap", "family")
def test_files_of_the_peft_method(wrap, family, shared_folder):
    """peft's save_pretrained is given the tensors whole, and its load_adapter spreads those of a file."""
    plain = with_peft(family).eval()
    model = copy.deepcopy(plain)
    wrap(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(shared_folder, state_dict=state, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    own = tiny(family, torch.float32)
    load_adapter(own, shared_folder)
    again = PeftModel.from_pretrained(tiny(family, torch.float32), shared_folder)
    with torch.no_grad():
        expected = plain(ids()).logits
        assert torch.equal(again(ids()).logits, expected) and torch.equal(own(ids()).logits, expected)
        for name, parameter in model.named_parameters():
            if "mos_" in name:
                parameter.zero_()
        if wrap is shard and not peft_loads_into_shards():
            with pytest.raises(RuntimeError, match="DTensor"):
                model.load_adapter(shared_folder, "default", is_trainable=True)
            return
        model.load_adapter(shared_folder, "default", is_trainable=True)
    for (name, found), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(found), before) and found.requires_grad == before.requires_grad, name
        assert isinstance(found, DTensor) == (wrap is shard)
