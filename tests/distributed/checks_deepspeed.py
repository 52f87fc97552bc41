"""DeepSpeed ZeRO-3, where every parameter is empty until its module runs: training, adapter files, what is refused."""

import copy

import deepspeed
import pytest
import torch
import torch.distributed as dist
from tiny_models import ids, mos, tiny
from torch.testing import assert_close
from two_processes import adapted, halves, inputs, own_part, truth

from mos_kernels.huggingface import apply_mos, load_adapter, remove_mos, routing_report, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters
from mos_kernels.layer import MoSLayer
from mos_kernels.sharded import gathered

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 100_000,  # gigabytes by default
        "stage3_prefetch_bucket_size": 100_000,
        "sub_group_size": 100_000,
    },
    "zero_allow_untested_optimizer": True,
}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    deepspeed.init_distributed("gloo")
    yield
    dist.destroy_process_group()


def engine_of(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]


def step(engine, batch) -> None:
    engine.backward(engine(**own_part(batch)).loss)
    engine.step()


@pytest.mark.parametrize("scope", ["ffn", "linear"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_step_is_that_of_one_process(family, scope):
    model = adapted(family, router_scope=scope, router_aux_loss_coef=5.0)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    moves = truth(model, halves(inputs()), 5.0)
    engine = engine_of(model)
    assert all(p.numel() == 0 for p in model.parameters())
    step(engine, inputs())
    after = gathered(adapter_parameters(model))
    assert_close(after, {name: before[name] - 0.5 * moves[name] for name in before}, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_a_base_that_is_partitioned_already():
    plain = tiny("qwen2", torch.float32)
    partitioned = copy.deepcopy(plain)
    deepspeed.zero.Init(module=partitioned, config_dict_or_path=CONFIG)
    assert partitioned.model.layers[0].mlp.up_proj.weight.numel() == 0
    for model in (plain, partitioned):
        torch.manual_seed(0)
        apply_mos(model, mos(model, router_aux_loss_coef=5.0))
        model.train()
    before = {name: p.detach().clone() for name, p in adapter_parameters(plain).items()}
    moves = truth(plain, halves(inputs()), 5.0)
    step(engine_of(partitioned), inputs())
    after = gathered(adapter_parameters(partitioned))
    assert_close(after, {name: before[name] - 0.5 * moves[name] for name in before}, rtol=1e-5, atol=1e-6)


def test_adapter_files_and_what_is_read_off_the_engine(shared_folder):
    plain = adapted()
    engine = engine_of(copy.deepcopy(plain))
    save_adapter(engine, shared_folder)
    other = adapted()
    with torch.no_grad():
        for parameter in adapter_parameters(other).values():
            parameter.zero_()
    load_adapter(other, shared_folder)
    assert_close(adapter_parameters(other), adapter_parameters(plain), rtol=0, atol=0)
    with pytest.raises(ValueError, match="before deepspeed.initialize"):
        load_adapter(engine, shared_folder)
    with pytest.raises(ValueError, match="before deepspeed.initialize"):
        remove_mos(engine.module)
    shares = [row["share"] for row in routing_report(engine.module, ids())]
    assert shares == [row["share"] for row in routing_report(plain, ids())]
    for found, expected in zip(engine.module.modules(), plain.modules(), strict=True):
        if isinstance(expected, MoSLayer):
            assert_close(found.curvature, expected.curvature, rtol=0, atol=0)
