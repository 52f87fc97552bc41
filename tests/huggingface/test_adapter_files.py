"""save_adapter and load_adapter: equal outputs, and files that do not fit leave the model as it was."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, ids, mos, snapshot, tiny
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured
from torch.testing import assert_close
from transformers import BertForSequenceClassification

from mos_kernels import MoSConfig
from mos_kernels.huggingface import (
    MoSCallback,
    MoSPeftConfig,
    apply_mos,
    export_lora,
    files,
    load_adapter,
    mos_param_groups,
    remove_mos,
    save_adapter,
)
from mos_kernels.huggingface import apply as apply_module

CONFIG, WEIGHTS = files.CONFIG_NAME, files.WEIGHTS_NAME


def saved(folder, family="llama", dtype=torch.float64, **options):
    """A model with an adapter, which is saved in `folder`."""
    model = tiny(family, dtype)
    apply_mos(model, mos(model, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mos_curvature" in name:
                parameter.normal_(std=0.01)
    save_adapter(model, folder)
    return model


def refused(model, folder, error=ValueError) -> str:
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    assert snapshot(model) == before
    return str(caught.value)


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"router_scope": "linear", "share_a": False, "rank_pattern": None}])
def test_a_fresh_model_with_the_adapter_is_the_same(tmp_path, family, options):
    model = saved(tmp_path, family, **options)
    fresh = tiny(family)
    names = load_adapter(fresh, tmp_path)
    assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)
    assert names == [name for name, module in model.named_modules() if hasattr(module, "mos_lora_A")]
    assert not any(p.requires_grad for p in fresh.parameters())
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, WEIGHTS, "README.md"])


def test_the_files_follow_pefts_convention(tmp_path):
    model = tiny()
    model.config._name_or_path = "someone/tiny-llama"
    apply_mos(model, mos(model, rank_pattern={"up_proj": 2}))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "MOSELORA" and config["base_model_name_or_path"] == "someone/tiny-llama"
    assert config["task_type"] is None and config["inference_mode"] is True and config["modules_to_save"] is None
    assert config["mos_kernels_version"]
    where = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert config["auto_mapping"] == where, "as peft without a task type: every AutoPeftModel opens it"
    fields = {name: config[name] for name in mos(model).to_dict()}
    assert MoSConfig.from_dict(fields) == mos(model, rank_pattern={"up_proj": 2})
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        block = "base_model.model.model.layers.1.mlp"
        expected = {f"{block}.mos_router.weight"} | {
            f"{block}.{linear}.mos_{part}"
            for linear in ("gate_proj", "up_proj", "down_proj")
            for part in ("lora_A", "lora_B", "curvature")
        }
        keys = list(file.keys())
        assert {key for key in keys if "layers.1" in key} == expected and len(keys) == 20
        assert file.get_slice(f"{block}.up_proj.mos_lora_A").get_shape() == [2, 32]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/tiny-llama\n")
    assert card.index("import mos_kernels.huggingface") < card.index("from transformers import LlamaForCausalLM")
    assert "model = LlamaForCausalLM.from_pretrained('someone/tiny-llama')" in card
    assert card.count("import mos_kernels.huggingface  # first") == 2 and "AutoPeftModel.from_pretrained" in card


def test_files_without_an_auto_mapping_and_with_a_task_type_open_too(tmp_path):
    """Those of the releases before, and peft's."""
    model = saved(tmp_path)
    for changes in ({"auto_mapping": None}, {"task_type": "CAUSAL_LM"}):
        reconfigure(tmp_path, **changes)
        fresh = tiny()
        load_adapter(fresh, tmp_path)
        assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)


def test_a_card_that_someone_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_router_of_a_linear_is_named_after_it(tmp_path):
    saved(tmp_path, "bert")
    assert "base_model.model.bert.encoder.layer.0.output.dense.mos_router" in load_file(tmp_path / WEIGHTS)


def test_trainable_flags(tmp_path):
    model = saved(tmp_path)
    fresh = tiny()
    load_adapter(fresh, tmp_path, is_trainable=True)
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    model = saved(tmp_path, learn_curvature=False)
    fresh = tiny()
    load_adapter(fresh, tmp_path, is_trainable=True)
    assert not any(p.requires_grad for name, p in fresh.named_parameters() if "curvature" in name)
    load_adapter(fresh, tmp_path)
    assert not any(p.requires_grad for p in fresh.parameters())


def test_other_trainable_modules_are_saved_whole(tmp_path):
    model = tiny("bert")
    apply_mos(model, mos(model))
    model.classifier.requires_grad_(True)
    model.bert.pooler.dense.bias.requires_grad_(True)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.bert.pooler.dense.bias.normal_()
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    fresh = tiny("bert", seed=0)
    load_adapter(fresh, tmp_path, is_trainable=True)
    assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)
    assert fresh.classifier.weight.requires_grad and fresh.classifier.bias.requires_grad
    load_adapter(fresh, tmp_path)
    assert not any(p.requires_grad for p in fresh.parameters())

    reconfigure(tmp_path, modules_to_save=["classifier", "no_such_head"])
    assert "2 unexpected (bert.pooler.dense.bias" in refused(tiny("bert"), tmp_path)
    reconfigure(tmp_path, modules_to_save=None)
    assert "4 unexpected" in refused(tiny("bert"), tmp_path)


def test_a_trained_base_weight_of_an_adapted_linear(tmp_path):
    model = tiny()
    apply_mos(model, mos(model))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(True).data.normal_()
    save_adapter(model, tmp_path)
    fresh = tiny()
    load_adapter(fresh, tmp_path, is_trainable=True)
    assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)
    assert fresh.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32, torch.float64])
def test_between_dtypes(tmp_path, source, target):
    model = saved(tmp_path, dtype=source)
    fresh = tiny(dtype=target)
    expected = {name: p.dtype for name, p in fresh.named_parameters()}
    load_adapter(fresh, tmp_path)
    values = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if "mos_" in name:
            narrow = torch.float32 if torch.float32 in (source, target) or source != target else parameter.dtype
            if "mos_curvature" in name:
                assert parameter.dtype == torch.float32
            assert_close(parameter.to(narrow), values[name].to(narrow), rtol=0, atol=0)
        else:
            assert parameter.dtype == expected[name]
    assert fresh(ids()).logits.isfinite().all()


def test_adapter_tensors_cast_to_half_precision_load_too(tmp_path):
    saved(tmp_path, dtype=torch.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    fresh = tiny(dtype=torch.float32)
    load_adapter(fresh, tmp_path)
    assert fresh.model.layers[0].mlp.up_proj.mos_lora_A.dtype == torch.float32


def test_loading_into_an_applied_adapter_only_copies(tmp_path):
    model = saved(tmp_path)
    fresh = tiny()
    apply_mos(fresh, mos(fresh))
    layer = fresh.model.layers[0].mlp.up_proj
    modules = {name: id(module) for name, module in fresh.named_modules()}
    fresh.eval()
    for module in fresh.modules():
        if hasattr(module, "freeze_for_inference"):
            module.freeze_for_inference()
    load_adapter(fresh, tmp_path, is_trainable=True)
    assert {name: id(module) for name, module in fresh.named_modules()} == modules
    with torch.no_grad():
        assert_close(fresh(ids()).logits, model(ids()).logits, rtol=0, atol=0)
    assert layer.mos_lora_A.requires_grad


def test_loading_into_another_adapter_is_refused(tmp_path):
    saved(tmp_path)
    other = tiny()
    apply_mos(other, mos(other, lora_alpha=3.0))
    message = refused(other, tmp_path)
    assert "lora_alpha=16.0 instead of 3.0" in message and "remove_mos(model) first" in message
    remove_mos(other)
    apply_mos(other, mos(other, target_modules=["up_proj", "down_proj"]))
    assert "unexpected" in refused(other, tmp_path)
    remove_mos(other)
    load_adapter(other, tmp_path)


def test_after_removal_the_base_is_as_it_was(tmp_path):
    saved(tmp_path)
    fresh = tiny()
    before = fresh(ids()).logits
    load_adapter(fresh, tmp_path)
    remove_mos(fresh)
    assert_close(fresh(ids()).logits, before, rtol=0, atol=0)


# files that do not fit


@settings(max_examples=25, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(tmp_path_factory, part):
    folder = tmp_path_factory.mktemp("truncated")
    saved(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(part * len(content))])
    assert "truncated or damaged" in refused(tiny(), folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", struct.pack("<Q", 1 << 60) + b"{}", b"{}" * 50])
def test_garbage_in_place_of_the_weights(tmp_path, content):
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert str(tmp_path / WEIGHTS) in refused(tiny(), tmp_path)


def test_another_architecture(tmp_path):
    saved(tmp_path, "gemma2")
    message = refused(tiny("gpt2"), tmp_path)
    assert "match nothing" in message and "c_proj" in message
    saved(tmp_path)
    reconfigure(tmp_path, r=5)
    message = refused(tiny(), tmp_path)
    assert "another architecture" in message and "12 of another shape" in message and "(4, 32)" in message
    saved(tmp_path)
    wider = type(tiny())(type(tiny().config)(**{**tiny().config.to_dict(), "intermediate_size": 96}))
    assert "mlp.down_proj.mos_lora_A (4, 64), the model asks for (4, 96)" in refused(wider, tmp_path)
    deeper = type(tiny())(type(tiny().config)(**{**tiny().config.to_dict(), "num_hidden_layers": 3}))
    assert "10 missing (model.layers.2.mlp" in refused(deeper, tmp_path)


def test_another_number_of_classes(tmp_path):
    model = tiny("bert")
    apply_mos(model, mos(model))
    model.classifier.requires_grad_(True)
    save_adapter(model, tmp_path)
    other = type(model)(type(model.config)(**{**model.config.to_dict(), "num_labels": model.config.num_labels + 1}))
    assert f"trained on, with num_labels={model.config.num_labels}" in refused(other, tmp_path)


def test_one_euclidean_expert_of_a_file_with_its_router_and_curvature(tmp_path):
    model = saved(tmp_path, spaces={"euclidean": 1}, num_experts_per_tok=1)

    def as_before(tensors):
        for name in [name for name in tensors if name.endswith("mos_lora_B")]:
            linear = name.removesuffix("mos_lora_B")
            tensors[linear + "mos_curvature"] = torch.ones(1)
            tensors[linear.rpartition("mlp.")[0] + "mlp.mos_router.weight"] = torch.ones(1, 32)

    rewrite(tmp_path, as_before)
    own = tiny()
    load_adapter(own, tmp_path)
    for opened in (own, PeftModel.from_pretrained(tiny(), tmp_path)):
        assert_close(opened(ids()).logits, model(ids()).logits)


def test_missing_and_unexpected_tensors(tmp_path):
    saved(tmp_path)
    name = "base_model.model.model.layers.0.mlp.mos_router.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name + "x": tensors.pop(name)}))
    message = refused(tiny(), tmp_path)
    assert "1 missing (model.layers.0.mlp.mos_router.weight)" in message
    assert "1 unexpected (model.layers.0.mlp.mos_router.weightx)" in message
    rewrite(tmp_path, lambda tensors: tensors.update({"stray": tensors.pop(name + "x")}))
    assert "'stray'" in refused(tiny(), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    saved(tmp_path)
    name = "base_model.model.model.layers.0.mlp.up_proj.mos_lora_B"
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    assert "not finite" in refused(tiny(), tmp_path)


def test_configurations_that_do_not_fit(tmp_path):
    saved(tmp_path)
    assert "no folder" in refused(tiny(), tmp_path / "nowhere", FileNotFoundError)
    reconfigure(tmp_path, num_experts_per_tok=9)
    assert "num_experts_per_tok=9 exceeds the 8 experts" in refused(tiny(), tmp_path)
    reconfigure(tmp_path, num_experts_per_tok=4, from_the_future=3)
    assert "unknown options ['from_the_future']" in refused(tiny(), tmp_path)
    reconfigure(tmp_path, from_the_future=None)
    load_adapter(tiny(), tmp_path)
    reconfigure(tmp_path, peft_type="LORA")
    assert "peft_type 'LORA'" in refused(tiny(), tmp_path)
    (tmp_path / CONFIG).write_text("[1]")
    assert "holds list where an object is expected" in refused(tiny(), tmp_path)
    (tmp_path / CONFIG).write_text('{"r": 8,')
    assert "not valid JSON" in refused(tiny(), tmp_path)
    (tmp_path / CONFIG).unlink()
    assert "the save was interrupted" in refused(tiny(), tmp_path, FileNotFoundError)


def test_pickles_are_not_read(tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    assert "pickles are never loaded" in refused(tiny(), tmp_path, FileNotFoundError)


def test_a_base_without_weights(tmp_path):
    model = saved(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert "meta device" in refused(empty, tmp_path)
    apply_mos(empty, mos(empty))
    assert "meta device" in refused(empty, tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(empty, tmp_path)


def test_a_failure_while_installing_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    saved(tmp_path)
    model = tiny()
    before = snapshot(model)
    original = torch.Tensor.to

    def failing(self, *args, **kwargs):
        if self.shape == (64, 8, 4):
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, tmp_path)
    monkeypatch.undo()
    after = snapshot(model)
    assert {key: after[key] for key in after if key != "modules"} == {
        key: before[key] for key in before if key != "modules"
    }


@pytest.mark.parametrize("stop_at", ["_replace", "add_router", "follow_attention_mask"])
def test_an_interrupt_while_installing_leaves_the_model_as_it_was(stop_at, monkeypatch):
    model = tiny()
    before, calls = snapshot(model), []
    original = getattr(apply_module, stop_at)

    def interrupted(*args):
        original(*args)
        calls.append(args)
        if len(calls) == 2 or stop_at == "follow_attention_mask":
            raise KeyboardInterrupt

    monkeypatch.setattr(apply_module, stop_at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_mos(model, mos(model))
    assert snapshot(model) == before


def test_a_folder_of_a_whole_model(tmp_path):
    model = tiny()
    apply_mos(model, mos(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds a whole model.*call save_adapter"):
        load_adapter(tiny(), tmp_path)


def test_saving_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="call apply_mos"):
        save_adapter(tiny(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    def refused_to_save(change, message: str, **options) -> None:
        model = tiny()
        apply_mos(model, mos(model, **options))
        change(model, model.model.layers[0].mlp.down_proj)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "adapter")
        assert list(tmp_path.iterdir()) == []

    pruned = r"'model.layers.0.mlp.down_proj.mos_lora_B' is no parameter now: if it is pruned or parametrised"
    refused_to_save(lambda model, down: l1_unstructured(down, "mos_lora_B", 0.5), pruned)
    refused_to_save(lambda model, down: register_parametrization(down, "mos_lora_B", torch.nn.Identity()), pruned)
    lost = "'lm_head' has lost its adapter: something has replaced the linear since apply_mos"
    on_head = {"target_modules": ["lm_head", "down_proj"]}

    def tie(model, down):
        model.model.layers[1].mlp.down_proj.mos_lora_B = down.mos_lora_B

    def share(model, down):
        model.model.layers[1].mlp = model.model.layers[0].mlp

    one = "'model.layers.1.mlp.down_proj.mos_lora_B' and 'model.layers.0.mlp.down_proj.mos_lora_B' are one tensor"
    refused_to_save(tie, one)
    refused_to_save(share, one.replace("down_proj.mos_lora_B", "gate_proj.mos_lora_A"))
    refused_to_save(lambda model, down: model.resize_token_embeddings(60), lost, **on_head)


@pytest.mark.parametrize("targets", [["lm_head", "down_proj"], "all-linear"])
def test_training_does_not_begin_where_a_linear_has_lost_its_adapter(targets, tmp_path):
    model = tiny()
    apply_mos(model, mos(model, target_modules=targets))
    lost = "'model.layers.1.mlp.down_proj' has lost its adapter: something has replaced the linear since apply_mos"
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(64, 32)
    with pytest.raises(ValueError, match=lost):
        mos_param_groups(model, 1e-3)
    with pytest.raises(ValueError, match=lost):
        MoSCallback().on_train_begin(None, None, None, model=model)
    with pytest.raises(ValueError, match=lost):
        save_adapter(model, tmp_path / "adapter")


def test_layers_that_were_taken_away_are_no_lost_adapters(tmp_path):
    model = tiny()
    apply_mos(model, mos(model))
    del model.model.layers[1]
    mos_param_groups(model, 1e-3)
    save_adapter(model, tmp_path)


def test_beside_a_lora_of_pefts_nothing_is_saved(tmp_path):
    model = tiny()
    apply_mos(model, mos(model))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has a peft adapter, at 'model.layers.0.self_attn.q_proj'.*unload it first"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes", [{"r": 10**30}, {"spaces": {"euclidean": 10**9}}, {"rank_pattern": {"up_proj": 10**30}}]
)
def test_sizes_that_nothing_has_are_refused_before_anything_is_built(tmp_path, changes):
    saved(tmp_path)
    reconfigure(tmp_path, **changes)
    assert str(tmp_path) in refused(tiny(), tmp_path)


@pytest.mark.parametrize("how, count", [("own", 2), ("export", 1), ("peft", 1)])
def test_the_code_of_a_classifiers_card_loads_it(how, count, tmp_path):
    """With more classes than the two that a base starts with."""
    tiny("bert", torch.float32).bert.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    folder = tmp_path / "adapter"
    if how == "peft":
        targets = mos(model).target_modules
        model = get_peft_model(model, MoSPeftConfig(r=2, task_type="SEQ_CLS", target_modules=targets))
        model.save_pretrained(folder)
    else:
        apply_mos(model, mos(model))
        model.classifier.requires_grad_(True)
        export_lora(model, [ids()], folder) if how == "export" else save_adapter(model, folder)
    blocks = [b for b in (folder / "README.md").read_text().split("```")[1::2] if "this folder" in b]
    assert len(blocks) == count
    for block in blocks:
        names = {}
        code = block.removeprefix("python").replace("this folder", str(folder)).replace("=...", "=5")
        exec(code, names)
        assert names["model"](ids()).logits.shape == (2, 5)
