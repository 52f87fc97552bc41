"""DistributedDataParallel: gradients equal to one process, the load-balancing gradient included; transformers' Trainer.

Load balancing is over the tokens that one forward of one process sees; data parallelism averages it over the processes,
as it averages the task's gradient. In float64, where 1e-6 leaves rounding no part (the curvature is float32 always).
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tiny_models import MATRIX, ids
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from two_processes import adapted, assert_equal_gradients, gradients, halves, inputs, own_part, plain, truth, with_peft

from mos_kernels.huggingface import MoSCallback, load_adapter, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters, router_owners

pytestmark = pytest.mark.usefixtures("process_group")
every_family = pytest.mark.parametrize("family", MATRIX)


@pytest.mark.parametrize("scope", ["ffn", "linear"])
@every_family
def test_gradients_equal_those_of_one_process_on_the_whole_batch(family, scope):
    model = adapted(family, torch.float64, router_scope=scope, router_aux_loss_coef=0.0)
    batch = inputs(family=family)
    expected = truth(model, [batch])
    parallel = DistributedDataParallel(model)
    parallel(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)
    assert set(expected) == set(adapter_parameters(model))


@pytest.mark.parametrize("scope", ["ffn", "linear"])
@every_family
def test_load_balancing_is_averaged_over_the_processes(family, scope):
    model = adapted(family, torch.float64, router_scope=scope, router_aux_loss_coef=5.0)
    batch = inputs(family=family)
    expected = truth(model, halves(batch), 5.0)
    parallel = DistributedDataParallel(model)
    parallel(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)
    one_batch = truth(model, [batch], 5.0)  # f and P over all tokens: another loss
    router = next(name for name in expected if "mos_router" in name)
    assert not torch.allclose(one_batch[router], expected[router], rtol=1e-2, atol=0)


@every_family
def test_accumulation_in_a_loop_of_ones_own(family):
    model = adapted(family, torch.float64, router_aux_loss_coef=5.0)
    first, second = inputs(seed=1, family=family), inputs(seed=2, family=family)
    expected = truth(model, [*halves(first), *halves(second)], 5.0)
    parallel = DistributedDataParallel(model)
    for owner in router_owners(model).values():
        owner.mos_aux_weight.fill_(owner.aux_coefficient / 2)
    with parallel.no_sync():
        (parallel(**own_part(first)).loss / 2).backward()
    (parallel(**own_part(second)).loss / 2).backward()
    assert_equal_gradients(gradients(model), expected)


@every_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, family):
    model, batch = adapted(family, torch.float64, router_aux_loss_coef=5.0), inputs(family=family)
    expected = truth(model, halves(batch), 5.0)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    parallel = DistributedDataParallel(model)
    parallel(**own_part(batch)).loss.backward()
    assert_equal_gradients(gradients(model), expected)


@every_family
def test_processes_stay_equal_and_equal_to_one(family):
    model = adapted(family, torch.float64, router_aux_loss_coef=0.0)
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    for trained, run, part in ((model, parallel, own_part), (alone, alone, lambda batch: batch)):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            run(**part(inputs(seed=step, family=family))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter_parameters(model).items():
        assert_close(parameter, adapter_parameters(alone)[name], rtol=1e-5, atol=1e-7)
        copies = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(copies, parameter.detach())
        assert torch.equal(*copies)
        assert parameter.dtype == (torch.float32 if name.endswith("mos_curvature") else torch.float64)


@every_family
def test_save_and_load_through_the_wrapper(shared_folder, family):
    model = adapted(family)
    parallel = DistributedDataParallel(model)
    if dist.get_rank() == 0:
        save_adapter(parallel, shared_folder)
    dist.barrier()
    other = adapted(family)
    for parameter in adapter_parameters(other).values():
        parameter.data.zero_()
    load_adapter(DistributedDataParallel(other), shared_folder)
    assert_close(adapter_parameters(other), adapter_parameters(model), rtol=0, atol=0)


def trained(folder, samples, family, **options):
    """What training with plain SGD, which shows every factor on a gradient, moves the adapter by."""
    model = adapted(family, router_aux_loss_coef=5.0)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, use_cpu=True, max_grad_norm=0.0, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", save_strategy="no", logging_steps=1, num_train_epochs=1,
        **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    callback = MoSCallback()
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[callback], optimizers=(optimizer, None))
    trainer.train()
    before, after = adapter_parameters(adapted(family)), adapter_parameters(model)
    return trainer, {name: after[name].detach() - before[name].detach() for name in before}


@every_family
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.one_at_a_time("accumulation", "family")
def test_trainer_steps_by_the_mean_over_processes_and_accumulated_batches(tmp_path, accumulation, family):
    batches = [inputs(batch=1, seed=seed, family=family) for seed in range(2 * accumulation)]
    samples = [{name: value[0] for name, value in batch.items()} for batch in batches]
    trainer, moved = trained(tmp_path, samples, family, gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == 1 and isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    expected = {name: -0.5 * gradient for name, gradient in truth(adapted(family), batches, 5.0).items()}
    assert_equal_gradients(moved, expected, 1e-5)


@every_family
@pytest.mark.parametrize("make", [adapted, with_peft])
@pytest.mark.one_at_a_time("make", "family")
def test_trainer_resumes_and_its_adapter_is_saved(shared_folder, make, family, monkeypatch):
    """Four steps with dropout, and the last two again from the checkpoint: the same, bit for bit."""
    batches = [inputs(batch=1, seed=seed, family=family) for seed in range(8)]
    samples = [{name: value[0] for name, value in batch.items()} for batch in batches]
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # or transformers 5.0 hands torch.load a cpu:0
    arguments = TrainingArguments(
        output_dir=str(shared_folder / "run"), per_device_train_batch_size=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_steps=2, num_train_epochs=1, learning_rate=1e-2,
    )  # fmt: skip
    ended = []
    for checkpoint in (None, str(shared_folder / "run" / "checkpoint-2")):
        model = make(family, lora_dropout=0.2)
        trainer = Trainer(model, arguments, train_dataset=samples)
        MoSCallback.add_to(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4
        ended.append({name: p.detach() for name, p in model.named_parameters() if "mos_" in name})
    assert ended[0] and all(torch.equal(ended[1][name], value) for name, value in ended[0].items())
    if dist.get_rank() == 0:
        (model.save_pretrained if make is with_peft else partial(save_adapter, model))(shared_folder / "adapter")
    dist.barrier()
    own = plain(family)
    load_adapter(own, shared_folder / "adapter")
    model.eval(), own.eval()
    assert torch.equal(own(ids()).logits, model(ids()).logits)
