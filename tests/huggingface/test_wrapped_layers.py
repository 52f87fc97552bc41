"""Layers inside torch.compile(layer) or checkpoint_wrapper(layer): the adapter is that of the layers without it."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_models import ids, mos, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Trainer, TrainingArguments

from mos_kernels.huggingface import (
    MoSCallback,
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


TARGETS = {
    "endings": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "full names": {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "down_proj"]},
    "regular expression": {"target_modules": r"model\.layers\.\d\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "without one": {"target_modules": ["up_proj"], "exclude_modules": ["model.layers.0.mlp.up_proj"]},
    "one layer": {"layers_to_transform": [1]},
}


def through_peft(base: nn.Module, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, MoSPeftConfig(r=4, init_lora_weights=False, **options))


@pytest.mark.parametrize("first", ["adapter", "layers"])
@pytest.mark.parametrize("where", TARGETS)
def test_through_peft_the_files_are_the_same(tmp_path, first, where):
    plain = through_peft(tiny(), **TARGETS[where])
    plain.save_pretrained(tmp_path / "plain")
    base = wrapped(tiny()) if first == "layers" else tiny()
    model = through_peft(base, **TARGETS[where])
    if first == "adapter":
        wrapped(base)
    model.save_pretrained(tmp_path / "wrapped")
    assert same_tensors(tmp_path / "plain", tmp_path / "wrapped")
    for fresh in (tiny(), wrapped(tiny())):
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "wrapped")), logits(plain))


def test_through_peft_the_default_linears_of_bert_are_found():
    model = tiny("bert")
    model.bert.encoder.layer[0] = checkpoint_wrapper(model.bert.encoder.layer[0])
    through_peft(model)
    assert adapter_parameters(model).keys() == adapter_parameters(through_peft(tiny("bert")).base_model.model).keys()


def test_through_peft_a_head_and_saved_modules_go_around(tmp_path):
    compiled = torch.compile(through_peft(tiny("bert"), task_type="SEQ_CLS"), backend="eager")
    found = get_peft_model_state_dict(compiled)
    assert any("classifier" in name for name in found)
    set_peft_model_state_dict(compiled, found)

    model = tiny()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    adapter = through_peft(model, modules_to_save=["input_layernorm"])
    adapter.save_pretrained(tmp_path)
    adapter.load_adapter(tmp_path, "again")


def test_names_with_the_wrappers_are_taken_too():
    model = wrapped(tiny())
    names = [name for name, _ in model.named_modules() if name.endswith("up_proj")]
    assert apply_mos(model, mos(model, target_modules=names)) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    remove_mos(model)
    expression = r"model\.layers\.0\._orig_mod\.mlp\.up_proj"
    assert apply_mos(model, mos(model, target_modules=expression)) == ["model.layers.0.mlp.up_proj"]


def test_what_was_measured_is_logged_after_another_adapter_is_active():
    model = through_peft(tiny())
    model.add_adapter("other", model.peft_config["default"])
    with measured_routing(model) as statistics:
        model(ids())
    curvature, summaries = dimensionless_curvature(model), {name: s.summary() for name, s in statistics.items()}
    before = curvature_logs(model, curvature), routing_logs(model, summaries)
    model.set_adapter("other")
    assert (curvature_logs(model, curvature), routing_logs(model, summaries)) == before


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

    live = lora.get_base_model().model.layers
    live[0] = torch.compile(live[0], backend="eager")
    model = tiny()
    torch.manual_seed(1)
    start_from_lora(model, lora)
    assert torch.equal(logits(model), logits(plain))

    batches = [{"input_ids": ids(seed)} for seed in range(3)]
    export_lora(plain, batches, tmp_path / "from_plain")
    export_lora(model, batches, tmp_path / "from_wrapped")
    assert same_tensors(tmp_path / "from_plain", tmp_path / "from_wrapped")


def test_a_compiled_layer_that_is_checkpointed_trains_while_it_is_measured(tmp_path):
    model = adapted(tiny(dtype=torch.float32))
    for i, layer in enumerate(model.model.layers):
        layer.compile(backend="aot_eager")
        model.model.layers[i] = checkpoint_wrapper(layer)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, learning_rate=0.1
    )
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids(batch=8)])
    callback = MoSCallback.add_to(trainer)
    trainer.train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in adapter_parameters(model).items())
    assert callback.history[0]["share"]
