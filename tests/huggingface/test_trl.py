"""TRL's SFTTrainer and DPOTrainer on models with an adapter: the injected gradient, and what else must hold."""

import math

import pytest
import torch
from balance import adapted, assert_injected, balance_gradients, batches_seen, values
from finetune_setup import WORDS, save_tokenizer
from tiny_models import DECODERS, logits, tiny

pytest.importorskip("trl")
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from mos_kernels.huggingface import MoSCallback, MoSPeftConfig, last_complete_checkpoint, load_adapter, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters, router_owners

LR = 0.5
every_decoder = pytest.mark.parametrize("family", DECODERS)
"""BERT has no generation, which both trainers are for."""
COMMON = {
    "use_cpu": True, "max_grad_norm": 0.0, "report_to": [], "disable_tqdm": True, "lr_scheduler_type": "constant",
    "learning_rate": LR, "logging_steps": 1, "save_strategy": "no", "optim": "sgd", "dataset_num_proc": None,
    "per_device_train_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def sentence(i, words):
    return " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(words))


def sft(folder, tokenizer, model, rows, peft_config=None, **options):
    data = Dataset.from_dict({"prompt": [sentence(i, 2 + i % 3) for i in range(rows)],
                              "completion": [" " + sentence(i + 50, 1 + i % 5) for i in range(rows)]})  # fmt: skip
    config = SFTConfig(output_dir=str(folder), max_length=32, **{**COMMON, **options})
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    MoSCallback.add_to(trainer)
    return trainer


def dpo(folder, tokenizer, model, reference, rows, peft_config=None, **options):
    data = Dataset.from_dict({"prompt": [sentence(i, 2 + i % 3) for i in range(rows)],
                              "chosen": [" " + sentence(i + 50, 1 + i % 5) for i in range(rows)],
                              "rejected": [" " + sentence(i + 90, 1 + i % 3) for i in range(rows)]})  # fmt: skip
    config = DPOConfig(output_dir=str(folder), max_length=32, **{**COMMON, **options})
    trainer = DPOTrainer(
        model, reference, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )
    MoSCallback.add_to(trainer)
    return trainer


CASES = pytest.mark.parametrize(
    ("accumulation", "checkpointing", "bf16"),
    [(1, None, False), (2, {"use_reentrant": False}, False), (4, {"use_reentrant": True}, True)],
)


def options_of(accumulation, checkpointing, bf16):
    return {"gradient_accumulation_steps": accumulation, "bf16": bf16, "max_steps": 1,
            "gradient_checkpointing": checkpointing is not None,
            "gradient_checkpointing_kwargs": checkpointing}  # fmt: skip


def one_step(make, accumulation, bf16, family):
    """The adapter after one step with and without load balancing, and the batches of that step."""
    after, seen = [], []
    for coefficient in (5.0, 0.0):
        model = adapted(coefficient, family)
        seen = batches_seen(model)
        make(model).train()
        assert len(seen) == accumulation
        after.append(values(model))
    assert all((batch["attention_mask"] == 0).any() for batch in seen), "a batch without padding shows nothing"
    batches = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in seen]
    expected = balance_gradients(batches, bf16, family)
    return after, expected


@CASES
@every_decoder
def test_sft_injects_the_gradient_of_the_real_tokens(tmp_path, tokenizer, accumulation, checkpointing, bf16, family):
    options = options_of(accumulation, checkpointing, bf16)
    after, expected = one_step(
        lambda model: sft(tmp_path, tokenizer, model, 2 * accumulation, **options), accumulation, bf16, family
    )
    assert_injected(*after, expected, LR, bf16)


@CASES
@every_decoder
def test_dpo_injects_it_and_the_reference_disturbs_nothing(
    tmp_path, tokenizer, accumulation, checkpointing, bf16, family
):
    """The reference is an adapted model too, whose forward comes between the policy's and its backward."""
    options = options_of(accumulation, checkpointing, bf16)
    reference = adapted(5.0, family)
    before = values(reference)
    after, expected = one_step(
        lambda model: dpo(tmp_path, tokenizer, model, reference, 2 * accumulation, **options),
        accumulation,
        bf16,
        family,
    )
    assert_injected(*after, expected, LR, bf16)
    assert all(torch.equal(before[name], value) for name, value in values(reference).items())
    assert all(p.grad is None for p in reference.parameters())


@every_decoder
def test_dpo_against_the_frozen_base(tmp_path, tokenizer, family):
    trainer = dpo(tmp_path, tokenizer, adapted(family=family), tiny(family, torch.float32), 4, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all("mos/entropy" in entry and entry["loss"] > 0 for entry in logs)


@pytest.mark.parametrize(("make", "accumulation"), [(sft, 2), (lambda *a, **o: dpo(*a[:3], None, *a[3:], **o), 4)])
@every_decoder
def test_with_peft_the_same_is_injected(tmp_path, tokenizer, make, accumulation, family):
    """For DPO the reference is the model with its adapter disabled."""
    after = []
    for coefficient in (5.0, 0.0):
        save_adapter(adapted(coefficient, family), tmp_path / "start")
        model = PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path / "start", is_trainable=True)
        seen = batches_seen(model.get_base_model())
        options = options_of(accumulation, None, False)
        trainer = make(tmp_path / "run", tokenizer, model, 2 * accumulation, **options)
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "end")
        end = tiny(family, torch.float32)
        load_adapter(end, tmp_path / "end")
        after.append(values(end))
    policy = [batch for batch in seen if "attention_mask" in batch]
    batches = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in policy]
    expected = balance_gradients(batches, family=family)
    assert len(policy) == accumulation
    assert_injected(*after, expected, LR, False)


@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_the_reference_of_dpo_is_the_adapter_as_it_was(tmp_path, tokenizer, scope):
    """Given a PeftModel and no reference, TRL copies its adapter: the first loss is ln 2, whatever it has learned."""
    save_adapter(adapted(router_scope=scope), tmp_path / "start")
    model = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "start", is_trainable=True)
    trainer = dpo(tmp_path / "run", tokenizer, model, None, 2, max_steps=1)
    model = trainer.model.eval()
    outputs = {}
    for name in ("ref", "default"):
        model.set_adapter(name)
        outputs[name] = logits(model)
    assert torch.equal(outputs["ref"], outputs["default"])
    assert not torch.equal(outputs["ref"], logits(model.unload()))


def test_the_first_loss_of_dpo_is_ln_2(tmp_path, tokenizer):
    save_adapter(adapted(), tmp_path / "start")
    model = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "start", is_trainable=True)
    trainer = dpo(tmp_path / "run", tokenizer, model, None, 2, max_steps=1)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("make", [sft, lambda *a, **o: dpo(*a[:3], None, *a[3:], **o)], ids=["sft", "dpo"])
@every_decoder
def test_peft_config_is_the_one_line(tmp_path, tokenizer, make, family):
    config = MoSPeftConfig(r=4, task_type="CAUSAL_LM")
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "bf16": True, "max_steps": 2}
    trainer = make(tmp_path / "run", tokenizer, tiny(family, torch.float32), 4, peft_config=config, **options)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    curvature = [p for name, p in trainer.model.named_parameters() if "mos_curvature" in name]
    assert curvature and all(p.dtype == torch.float32 and p.isfinite().all() for p in curvature)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all("mos/share/max" in entry for entry in logs)
    trainer.save_model(tmp_path / "adapter")
    load_adapter(tiny(family, torch.float32), tmp_path / "adapter")


def test_packed_sequences_count_every_token(tmp_path, tokenizer):
    options = {"packing": True, "padding_free": False, "packing_strategy": "wrapped", "max_steps": 1}
    model = adapted()
    seen, routed = batches_seen(model), []
    for owner in router_owners(model).values():
        owner.register_forward_hook(lambda owner, args, _: routed.append(owner.token_mask.of(args[0])))
    sft(tmp_path, tokenizer, model, 20, **options).train()
    assert len(seen) == 1 and all(mask is None or mask.all() for mask in routed)


@every_decoder
def test_sft_keeps_curvature_in_float32_logs_and_resumes(tmp_path, tokenizer, family):
    """With bf16=True, TRL's default; the resumed run ends where the uninterrupted one does."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "bf16": True, "max_steps": 4, "save_strategy": "steps",
               "save_steps": 2}  # fmt: skip
    whole = sft(tmp_path / "whole", tokenizer, adapted(family=family, lora_dropout=0.1), 8, **options)
    for name, parameter in adapter_parameters(whole.model).items():
        if "mos_curvature" in name:
            parameter.data = parameter.data.bfloat16()  # as QLoRA scripts do
    whole.train()
    curvature = [p for name, p in adapter_parameters(whole.model).items() if "mos_curvature" in name]
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in curvature)
    assert all("mos/share/max" in entry for entry in whole.state.log_history if "loss" in entry)

    resumed = sft(tmp_path / "whole", tokenizer, adapted(family=family, lora_dropout=0.1), 8, **options)
    resumed.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path / "whole").with_name("checkpoint-2")))
    ours, theirs = values(resumed.model), values(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
