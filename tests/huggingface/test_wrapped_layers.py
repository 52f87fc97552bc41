"""Layers inside torch.compile(layer) or checkpoint_wrapper(layer): the adapter is that of the layers without it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import ids, mos, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mos_kernels.huggingface import (
    MoSPeftConfig,
    apply_mos,
    export_lora,
    files,
    load_adapter,
    remove_mos,
    save_adapter,
    start_from_lora,
)
from mos_kernels.huggingface.history import curvature_logs, dimensionless_curvature, routing_logs
from mos_kernels.huggingface.modules import adapter_parameters
from mos_kernels.huggingface.routing_report import measured_routing

OPTIONS = {
    "exclude_modules": ["model.layers.0.mlp.up_proj"],
    "rank_pattern": {"model.layers.1.mlp.down_proj": 2},
    "layers_to_transform": [0, 1],
}


def wrapped(model: nn.Module) -> nn.Module:
    """The model, its first layer compiled and its second one checkpointed."""
    layers = model.model.layers
    layers[0], layers[1] = torch.compile(layers[0], backend="eager"), checkpoint_wrapper(layers[1])
    return model


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    apply_mos(model, mos(model, **OPTIONS))
    model.model.norm.requires_grad_(True)
    return model


def same_tensors(folder, other) -> bool:
    one, two = (load_file(where / files.WEIGHTS_NAME) for where in (folder, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("change", [lambda: wrapped(adapted(tiny())), lambda: adapted(wrapped(tiny()))])
def test_the_files_are_those_of_plain_layers_and_fit_both(tmp_path, change):
    plain, model = adapted(tiny()), change()
    assert adapter_parameters(model).keys() == adapter_parameters(plain).keys()
    save_adapter(plain, tmp_path / "plain")
    save_adapter(model, tmp_path / "wrapped")
    assert same_tensors(tmp_path / "plain", tmp_path / "wrapped")

    for fresh in (tiny(), wrapped(tiny())):
        assert load_adapter(fresh, tmp_path / "wrapped") == remove_mos(adapted(tiny()))
        assert torch.equal(logits(fresh), logits(plain))
        assert remove_mos(fresh) == remove_mos(adapted(tiny()))
        assert torch.equal(logits(fresh), logits(tiny()))


def test_parameters_that_were_trainable_before_are_trainable_again():
    model = tiny()
    model.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    apply_mos(model, mos(model))
    wrapped(model)
    remove_mos(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3
    assert all(name.startswith("model.layers.0._orig_mod.mlp.") for name in trainable)


@pytest.mark.parametrize("first", ["adapter", "layers"])
def test_through_peft_the_files_are_the_same(tmp_path, first):
    def made() -> PeftModel:
        torch.manual_seed(1)
        targets = ["gate_proj", "up_proj", "down_proj"]
        return get_peft_model(base, MoSPeftConfig(r=4, init_lora_weights=False, target_modules=targets))

    base = tiny()
    plain = made()
    plain.save_pretrained(tmp_path / "plain")
    base = wrapped(tiny()) if first == "layers" else tiny()
    model = made()
    if first == "adapter":
        wrapped(base)
    model.save_pretrained(tmp_path / "wrapped")
    assert same_tensors(tmp_path / "plain", tmp_path / "wrapped")
    for fresh in (tiny(), wrapped(tiny())):
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "wrapped")), logits(plain))


def test_logs_have_the_names_of_plain_layers():
    def logged(model: nn.Module) -> tuple:
        with measured_routing(model) as statistics:
            model(ids())
        curvature = dimensionless_curvature(model)
        summaries = {name: one.summary() for name, one in statistics.items()}
        return curvature, curvature_logs(model, curvature), summaries, routing_logs(model, summaries)

    assert logged(wrapped(adapted(tiny()))) == logged(adapted(tiny()))


def test_from_and_to_a_lora(tmp_path):
    torch.manual_seed(1)
    lora = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    plain, model = tiny(), wrapped(tiny())
    for one in (plain, model):
        torch.manual_seed(1)  # curved experts are drawn
        start_from_lora(one, tmp_path / "lora")
    save_adapter(plain, tmp_path / "plain")
    save_adapter(model, tmp_path / "wrapped")
    assert same_tensors(tmp_path / "plain", tmp_path / "wrapped")

    batches = [{"input_ids": ids(seed)} for seed in range(3)]
    export_lora(plain, batches, tmp_path / "from_plain")
    export_lora(model, batches, tmp_path / "from_wrapped")
    assert same_tensors(tmp_path / "from_plain", tmp_path / "from_wrapped")
