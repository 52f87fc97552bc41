"""Liger's kernels beside an adapter: it replaces the forward of FFN blocks, which the adapter computes itself."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, ids, mos, tiny
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from mos_kernels.huggingface import MoSCallback, MoSPeftConfig, apply_mos, files, load_adapter, remove_mos, save_adapter
from mos_kernels.huggingface.blocks import recognise

liger = pytest.importorskip("liger_kernel.transformers")

MLP = {"llama": "LlamaMLP", "qwen2": "Qwen2MLP", "gemma": "GemmaMLP", "phi3": "Phi3MLP"}
ONLY_FFN = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": False}
"""Liger's other kernels need a GPU."""


@pytest.fixture(autouse=True)
def classes_are_restored(monkeypatch):
    for family, name in MLP.items():
        monkeypatch.setattr(modeling(family), name, getattr(modeling(family), name))


def modeling(family: str):
    return importlib.import_module(FAMILIES[family][0].__module__)


def with_liger(model: nn.Module) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    liger._apply_liger_kernel_to_instance(model=inner, **ONLY_FFN)
    return model


def adapted(model: nn.Module, door: str = "apply_mos") -> nn.Module:
    torch.manual_seed(1)
    if door == "apply_mos":
        apply_mos(model, mos(model))
        return model
    config = mos(model)
    return get_peft_model(model, MoSPeftConfig(r=4, init_lora_weights=False, target_modules=config.target_modules))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("door", ["apply_mos", "peft"])
@pytest.mark.parametrize("family", MLP)
def test_the_callback_puts_the_forwards_back(family, door):
    plain, model = adapted(tiny(family), door), with_liger(adapted(tiny(family), door))
    with pytest.raises(ValueError, match=r"no gates were passed.*as Liger does: MoSCallback.add_to\(trainer\)"):
        model(ids())
    MoSCallback.add_to(SimpleNamespace(model=model, callback_handler=SimpleNamespace(callbacks=[])))
    assert torch.equal(logits(model), logits(plain))


def hooked(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, AlignDevicesHook("cpu"))
    return model


def with_custom_linears(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).__class__ = Custom
    return model


class Custom(nn.Linear):
    """A linear that an adapter wraps, as it does a quantised one."""


@pytest.mark.parametrize("change", [hooked, with_custom_linears])
@pytest.mark.parametrize("order", ["adapter, Liger", "Liger, adapter"])
@pytest.mark.parametrize("door", ["apply_mos", "peft"])
def test_blocks_with_hooks_and_other_linears(change, order, door):
    base, plain = logits(change(tiny())), adapted(change(tiny()), door)
    if order == "adapter, Liger":
        model = with_liger(adapted(change(tiny()), door))
        MoSCallback.add_to(SimpleNamespace(model=model, callback_handler=SimpleNamespace(callbacks=[])))
    else:
        model = adapted(with_liger(change(tiny())), door)
    assert_close(logits(model), logits(plain))
    if door == "apply_mos":
        remove_mos(model)
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("door", ["apply_mos", "peft"])
@pytest.mark.parametrize("family", MLP)
def test_an_adapter_on_ligers_blocks_is_the_same(family, door):
    plain = adapted(tiny(family), door)
    on_instance = adapted(with_liger(tiny(family)), door)
    on_class = adapted(tiny(family), door)  # with_liger has replaced the class
    assert type(on_class.get_submodule(next(n for n, _ in on_class.named_modules() if n.endswith("mlp")))) in (
        liger.LigerSwiGLUMLP, liger.LigerGEGLUMLP, liger.LigerPhi3SwiGLUMLP,
    )  # fmt: skip
    for model in (on_instance, on_class):
        assert_close(logits(model), logits(plain))
        assert model.state_dict().keys() == plain.state_dict().keys()


def test_files_fit_with_and_without_liger_and_the_adapter_comes_off(tmp_path):
    plain, base = adapted(tiny()), logits(tiny())
    save_adapter(plain, tmp_path / "plain")
    model = with_liger(tiny())
    load_adapter(model, tmp_path / "plain")
    assert torch.equal(logits(model), logits(plain))
    save_adapter(model, tmp_path / "again")
    one, two = (load_file(tmp_path / name / files.WEIGHTS_NAME) for name in ("plain", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    remove_mos(model)
    assert torch.equal(logits(model), base)


def test_training_with_use_liger_kernel(tmp_path):
    def trained(**options) -> dict[str, torch.Tensor]:
        model = adapted(tiny(dtype=torch.float32))
        args = TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", learning_rate=0.1, **options
        )
        rows = [{"input_ids": row, "labels": row} for row in ids(batch=8)]
        trainer = Trainer(model, args, train_dataset=rows)
        MoSCallback.add_to(trainer, MoSCallback(history_file=None))
        trainer.train()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    plain, by_liger = trained(), trained(use_liger_kernel=True, liger_kernel_config=ONLY_FFN)
    assert plain.keys() == by_liger.keys()
    for name, parameter in plain.items():
        assert torch.equal(parameter, by_liger[name])


def test_a_forward_of_ligers_that_is_not_known_has_no_form():
    block = with_liger(tiny()).model.layers[0].mlp
    assert recognise(block).phi == "silu"

    class LigerOtherMLP(nn.Module):
        def forward(self, x):
            return x

    LigerOtherMLP.forward.__qualname__, LigerOtherMLP.forward.__module__ = "LigerOtherMLP.forward", "liger_kernel.x"
    vars(block)["forward"] = LigerOtherMLP.forward.__get__(block)
    assert recognise(block) is None
