"""transformers' Trainer with FSDP2, switched on by TrainingArguments alone, on a plain model and on a peft model.

Behind it is accelerate, which offers FSDP on accelerators only: its state is told that the CPU is one, as in
checks_accelerate.py, and everything after that is Trainer's own.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from peft import PeftModel
from peft_setup import in_file
from tiny_models import MATRIX, ids, layers_of
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from two_processes import adapted, assert_equal_gradients, inputs, plain, truth, whole, with_peft

from mos_kernels.huggingface import MoSCallback, load_adapter, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters

pytestmark = pytest.mark.usefixtures("process_group")
every_family = pytest.mark.parametrize("family", MATRIX)
COEFFICIENT, LR = 5.0, 0.5


class OnCPU(Trainer):
    def create_accelerator_and_postprocess(self):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def batches_for(family, count):
    return [inputs(batch=1, seed=seed, family=family) for seed in range(count)]


def trainer_for(model, folder, batches, **options):
    samples = [{name: value[0] for name, value in batch.items()} for batch in batches]
    layer = type(layers_of(getattr(model, "get_base_model", lambda: model)())[0]).__name__
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, use_cpu=True, max_grad_norm=0.0, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", logging_steps=1, fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [layer]},
        **{"save_strategy": "no", "optim": "sgd", "learning_rate": LR, "num_train_epochs": 1, **options},
    )  # fmt: skip
    trainer = OnCPU(model, arguments, train_dataset=samples)
    MoSCallback.add_to(trainer)
    return trainer


@every_family
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_by_the_mean_over_processes_and_accumulated_batches(shared_folder, family, accumulation):
    model, batches = adapted(family, router_aux_loss_coef=COEFFICIENT), batches_for(family, 2 * accumulation)
    expected = {name: -LR * gradient for name, gradient in truth(model, batches, COEFFICIENT).items()}
    before = {name: whole(p) for name, p in adapter_parameters(model).items()}
    trainer = trainer_for(model, shared_folder, batches, gradient_accumulation_steps=accumulation)
    trainer.train()
    after = adapter_parameters(trainer.model)
    assert trainer.state.global_step == 1 and all(isinstance(p, DTensor) for p in after.values())
    assert_equal_gradients({name: whole(after[name]) - before[name] for name in before}, expected, 1e-5)
    (logged,) = [entry for entry in trainer.state.log_history if "mos/entropy" in entry]
    assert logged["mos/share/max"] > 0


@every_family
def test_with_peft_the_step_is_the_same(shared_folder, family):
    model, batches = with_peft(family, router_aux_loss_coef=COEFFICIENT), batches_for(family, 2)
    model.save_pretrained(shared_folder / f"start{dist.get_rank()}")
    own = plain(family)
    load_adapter(own, shared_folder / f"start{dist.get_rank()}", is_trainable=True)
    trainers = [trainer_for(m, shared_folder / "run", batches) for m in (own, model)]
    for trainer in trainers:
        trainer.train()
    expected = {name: whole(p) for name, p in adapter_parameters(trainers[0].model).items()}
    trained = {n: whole(p) for n, p in trainers[1].model.named_parameters() if "mos_" in n}
    found = {in_file(name): value for name, value in trained.items()}
    assert_close(found, expected, rtol=1e-6, atol=1e-7)


@every_family
@pytest.mark.parametrize("make", [adapted, with_peft])
def test_its_files_and_resuming_from_its_checkpoint(shared_folder, make, family):
    """Four steps with dropout, and the last two again from the checkpoint: the same, bit for bit."""
    batches = batches_for(family, 8)
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    ended = []
    for checkpoint in (None, str(shared_folder / "run" / "checkpoint-2")):
        trainer = trainer_for(make(family, lora_dropout=0.2), shared_folder / "run", batches, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4
        ended.append({name: whole(p) for name, p in trainer.model.named_parameters() if "mos_" in name})
    assert ended[0] and all(torch.equal(ended[1][name], value) for name, value in ended[0].items())

    adapter = shared_folder / "adapter"
    if make is with_peft:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # or 5.0 writes none
        trainer.save_model(str(adapter))
    else:
        save_adapter(trainer.model, adapter)
    dist.barrier()
    model = plain(family)
    if make is with_peft:
        model = PeftModel.from_pretrained(model, adapter)
    else:
        load_adapter(model, adapter)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in ended[0].items())
    assert model.eval()(ids()).logits.isfinite().all()
