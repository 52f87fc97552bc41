"""accelerate's own loop, launched by `accelerate launch` with a configuration file, for DDP and for FSDP2.

accelerate offers FSDP on accelerators only, whatever the configuration says. Here its state is told that the CPU is
one; then its own preparation, checkpoints and backward run as they do there.
"""

import copy
import os

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from tiny_models import MATRIX, layers_of
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from two_processes import adapted, assert_equal_gradients, gradients, halves, inputs, own_part, truth, whole

from mos_kernels.huggingface import load_adapter, mos_param_groups, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters, router_owners

every_family = pytest.mark.parametrize("family", MATRIX)


@pytest.fixture(scope="module")
def accelerator():
    accelerator = Accelerator(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the configuration file
    yield accelerator
    accelerator.end_training()


def prepared(accelerator, model):
    if accelerator.distributed_type == "FSDP":  # of this model, where the configuration file names a Llama's
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [type(layers_of(model)[0]).__name__]
    optimizer = torch.optim.AdamW(mos_param_groups(model, 1e-2, router_lr=1e-3))
    return accelerator.prepare(model, optimizer)


def test_the_wrapper_is_that_of_the_configuration(accelerator):
    model, _ = prepared(accelerator, adapted())
    parameters = adapter_parameters(accelerator.unwrap_model(model)).values()
    assert accelerator.num_processes == 2
    assert isinstance(model, DistributedDataParallel) != all(isinstance(p, DTensor) for p in parameters)
    assert (accelerator.distributed_type == "FSDP") == all(isinstance(p, DTensor) for p in parameters)


@every_family
def test_gradients_equal_those_of_one_process(accelerator, family):
    model, batch = adapted(family, router_aux_loss_coef=5.0), inputs(family=family)
    expected = truth(model, halves(batch), 5.0)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if "mos_" in name}
    model, _ = prepared(accelerator, model)
    accelerator.backward(model(**own_part(batch)).loss)
    model = accelerator.unwrap_model(model)
    assert_equal_gradients(gradients(model), expected)
    assert_close({name: model.get_buffer(name) for name in buffers}, buffers, rtol=0, atol=0)


@every_family
def test_training_equals_that_of_one_process(accelerator, family):
    """Three steps; load balancing is off, since one process would see it over the whole batch."""
    alone = adapted(family, router_aux_loss_coef=0.0)
    model, optimizer = prepared(accelerator, copy.deepcopy(alone))
    own_optimizer = torch.optim.AdamW(mos_param_groups(alone, 1e-2, router_lr=1e-3))
    for seed in range(3):
        accelerator.backward(model(**own_part(inputs(seed=seed, family=family))).loss)
        optimizer.step()
        optimizer.zero_grad()
        alone(**inputs(seed=seed, family=family)).loss.backward()
        own_optimizer.step()
        own_optimizer.zero_grad()
    found = adapter_parameters(accelerator.unwrap_model(model))
    for name, expected in adapter_parameters(alone).items():
        assert_close(whole(found[name]), expected.detach(), rtol=1e-4, atol=1e-4, msg=name)


@every_family
def test_a_checkpoint_of_accelerate_resumes(accelerator, shared_folder, family):
    model, optimizer = prepared(accelerator, adapted(family))

    def step(seed):
        accelerator.backward(model(**own_part(inputs(seed=seed, family=family))).loss)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    accelerator.save_state(str(shared_folder))
    step(1)
    expected = {name: whole(p) for name, p in model.named_parameters()}
    step(2)
    accelerator.load_state(str(shared_folder))
    step(1)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), expected[name]), name


@every_family
def test_adapter_files(accelerator, shared_folder, family):
    plain = adapted(family)
    model, _ = prepared(accelerator, copy.deepcopy(plain))
    if accelerator.distributed_type == "FSDP" or accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(model), shared_folder)
    accelerator.wait_for_everyone()
    other = adapted(family)
    with torch.no_grad():
        for parameter in adapter_parameters(other).values():
            parameter.zero_()
    load_adapter(other, shared_folder)
    assert_close(adapter_parameters(other), adapter_parameters(plain), rtol=0, atol=0)


@every_family
def test_accumulation(accelerator, family):
    model = adapted(family, router_aux_loss_coef=5.0)
    first, second = inputs(seed=1, family=family), inputs(seed=2, family=family)
    expected = truth(model, [*halves(first), *halves(second)], 5.0)
    model, _ = prepared(accelerator, model)
    for owner in router_owners(accelerator.unwrap_model(model)).values():
        owner.mos_aux_weight.fill_(owner.aux_coefficient / 2)
    with accelerator.no_sync(model):
        accelerator.backward(model(**own_part(first)).loss / 2)
    accelerator.backward(model(**own_part(second)).loss / 2)
    assert_equal_gradients(gradients(accelerator.unwrap_model(model)), expected)
