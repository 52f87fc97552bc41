"""Other methods put over a model that has an adapter of apply_mos: said, and nothing unreadable written."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import ids, logits, mos, tiny

from mos_kernels.huggingface import apply_mos, export_lora, load_adapter, save_adapter

LORA = {"r": 2, "task_type": "CAUSAL_LM"}
ON_Q = LoraConfig(**LORA, target_modules=["q_proj"])
OVER = {
    "a LoRA on other linears": lambda model: get_peft_model(model, ON_Q),
    "a LoRA on the same linears": lambda model: get_peft_model(model, LoraConfig(**LORA, target_modules="all-linear")),
    "IA3": lambda model: get_peft_model(
        model, IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"], task_type="CAUSAL_LM")
    ),
    "transformers' add_adapter": lambda model: (
        model.add_adapter(LoraConfig(**LORA, target_modules=["q_proj"])) or model
    ),
}


def own(tmp_path=None):
    model = tiny(dtype=torch.float32)
    apply_mos(model, mos(model))
    if tmp_path is not None:
        save_adapter(model, tmp_path)
        model = tiny(dtype=torch.float32)
        load_adapter(model, tmp_path)
    return model


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("over", OVER)
def test_another_method_over_it_is_refused_in_training_and_in_saving(over, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    base = own(tmp_path / "before" if loaded else None)
    expected = logits(base)
    model = OVER[over](base).train()
    for _ in range(2):
        with pytest.raises(ValueError, match="peft adapter.*over the adapter of apply_mos.*unload"):
            model(ids(), labels=ids())
    for one in (model, base):
        with pytest.raises(ValueError, match="peft adapter.*unload it first"):
            save_adapter(one, tmp_path / "after")
        with pytest.raises(ValueError, match="peft adapter.*unload it first"):
            export_lora(one, [ids()], tmp_path / "after")
    assert not (tmp_path / "after").exists()
    torch.testing.assert_close(logits(model.eval()), expected)  # both start by changing nothing, or as they were
    if "transformers" not in over:
        model = model.unload()
        model.train()(ids(), labels=ids())
        save_adapter(model, tmp_path / "after")
        again = tiny(dtype=torch.float32)
        load_adapter(again, tmp_path / "after")
        assert torch.equal(logits(again), expected)


def test_an_adapter_that_something_froze_is_said_once():
    model = get_peft_model(own(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).train()
    with pytest.warns(UserWarning, match="takes no part in this training"):
        model(ids(), labels=ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids(), labels=ids())


def test_an_adapter_loaded_for_inference_is_not(tmp_path):
    model = own(tmp_path).train()
    model.lm_head.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids(), labels=ids())


def test_an_adapter_frozen_in_a_part_is_not():
    model = own().train()
    model.model.layers[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids(), labels=ids())
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="takes no part in this training"):
        model(ids(), labels=ids())
