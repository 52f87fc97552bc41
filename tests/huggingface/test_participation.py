"""What of an adapter takes no part in a model: found, named, and all as it was afterwards; doctor --model."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from peft_setup import peft_model
from tiny_models import MATRIX, batch, ids, mos, snapshot, tiny
from torch.nn.functional import linear

from mos_kernels.__main__ import main
from mos_kernels.huggingface import apply_mos, idle_tensors, save_adapter
from mos_kernels.huggingface.modules import adapter_parameters, mos_adapters


def adapted(family: str = "llama", **options):
    model = tiny(family)
    torch.manual_seed(0)
    apply_mos(model, mos(model, **options))
    return model


@pytest.mark.parametrize("family", MATRIX)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_all_of_a_trained_adapter_takes_part(family, scope):
    model = adapted(family, router_scope=scope).train()
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert idle_tensors(model, **batch(family, length=12)) == []
    assert snapshot(model) == before
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert idle_tensors(peft_model(family, router_scope=scope), **batch(family, length=12)) == []


@pytest.mark.parametrize(
    "options", [{"spaces": {"euclidean": 4}}, {"spaces": {"euclidean": 1}, "num_experts_per_tok": 1},
                {"spaces": {"spherical": 1}, "num_experts_per_tok": 1}, {"share_a": False},
                {"num_experts_per_tok": 1}, {"num_experts_per_tok": 1, "router_scope": "linear"}]
)  # fmt: skip
def test_what_has_no_gradient_by_nature_is_not_listed(options):
    assert idle_tensors(adapted(**options), input_ids=ids(length=30)) == []


def test_an_adapter_at_its_start_is_said_once_a_linear():
    model = adapted(init_lora_weights=True)
    found = idle_tensors(model, input_ids=ids())
    assert len(found) == 6 and {why for _, why in found} == {"adds nothing: B is zero, as before training"}


def test_curved_experts_that_add_nothing_yet_have_no_gradient_of_curvature():
    """As after start_from_lora."""
    model = adapted()
    for layer in mos_adapters(model).values():
        with torch.no_grad():
            layer.mos_lora_B[:, [sign != 0 for sign in layer.config.curvature_signs]] = 0
    assert idle_tensors(model, input_ids=ids(length=30)) == []


def test_a_large_vocabulary_in_float16():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_SMALL, "vocab_size": 50_000, "num_key_value_heads": 2})
    model = transformers.LlamaForCausalLM(config).half()
    apply_mos(model, mos(model))
    for name, parameter in adapter_parameters(model).items():
        parameter.data.mul_(0.01 if "lora_B" in name else 1.0)
    assert idle_tensors(model, input_ids=ids(length=30)) == []


def test_a_linear_that_is_read_past_its_forward_is_named():
    model = adapted()
    mlp = model.model.layers[0].mlp
    down = mlp.down_proj
    mlp.forward = lambda x: linear(torch.relu(mlp.up_proj(x, mlp.mos_router(x))), down.weight)
    found = dict(idle_tensors(model, input_ids=ids(length=30)))
    assert set(found) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"}
    assert all(why.startswith("never ran") for why in found.values())


def test_a_tensor_without_gradient_is_named():
    model = adapted()
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda layer, args, y: y.detach())
    found = dict(idle_tensors(model, input_ids=ids(length=30)))
    name = "model.layers.1.mlp.up_proj"
    assert found == {f"{name}.{p}": "got no gradient" for p in ("mos_lora_A", "mos_lora_B", "mos_curvature")}


def test_outputs_in_a_tuple_and_a_loss_of_no_label():
    model = adapted()
    assert idle_tensors(model, input_ids=ids(length=30), return_dict=False) == []
    before = snapshot(model.train())
    with pytest.raises(ValueError, match="the loss is nan: give inputs with labels"):
        idle_tensors(model, input_ids=ids(), labels=torch.full_like(ids(), -100))
    assert snapshot(model) == before


def test_a_router_that_weighs_a_single_expert_of_several_has_a_gradient():
    assert idle_tensors(adapted(num_experts_per_tok=1, norm_topk_prob=False), input_ids=ids(length=30)) == []


_SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_BART = {"vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
         "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    "kind, config, targets, status",
    [
        ("LlamaForSequenceClassification", "LlamaConfig", None, 0),  # without a token for padding
        ("BertForSequenceClassification", "BertConfig", None, 0),
        ("BartForSequenceClassification", "BartConfig", ["fc1", "fc2"], 0),  # asks for an end of the sequence
        ("BartForConditionalGeneration", "BartConfig", ["fc1", "fc2"], 0),
        ("BertForMultipleChoice", "BertConfig", None, 2),
        ("ViTForImageClassification", "ViTConfig", "all-linear", 2),
    ],
)
def test_the_command_for_other_kinds_of_model(kind, config, targets, status, tmp_path, capsys):
    options = dict(_BART if config == "BartConfig" else _SMALL, pad_token_id=None if kind.startswith("Llama") else 1)
    options |= {"max_position_embeddings": 8} if config == "BertConfig" else {}
    options |= {"image_size": 8, "patch_size": 4} if config == "ViTConfig" else {}
    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, config)(**options)).save_pretrained(tmp_path / "base")
    model = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    apply_mos(model, mos(model, **({} if targets is None else {"target_modules": targets})))
    save_adapter(model, tmp_path / "mos")
    assert main(["doctor", "--model", str(tmp_path / "mos")]) == status
    message = "take part" if status == 0 else f"idle_tensors(model, **batch) with a batch of a {kind}"
    assert message in capsys.readouterr().out


def test_without_an_adapter():
    with pytest.raises(ValueError, match="has no active MoS adapter"):
        idle_tensors(tiny(), input_ids=ids())


def test_under_inference_mode():
    model = adapted()
    before = snapshot(model)
    with torch.inference_mode():
        assert idle_tensors(model, **batch("llama", length=12)) == []  # the batch is made here too
        of_inference = adapted()
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="was made under torch.inference_mode.* load the model and its adapter"):
        idle_tensors(of_inference, input_ids=ids())


def test_on_the_meta_device():
    with torch.device("meta"):
        model = adapted()
    with pytest.raises(ValueError, match="is on the meta device: load the base"):
        idle_tensors(model, input_ids=ids().to("meta"))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"base_model_name_or_path": "/home/of/another"},
            "base model '/home/of/another' of the adapter in .* cannot be",
        ),
        ({"base_model_name_or_path": "cut"}, r"cut' of the adapter in .* cannot be loaded \(Error while deserializing"),
        ({"base_model_name_or_path": 3}, "adapter_config.json is damaged: its base model is 3"),
        ({"auto_mapping": ["LlamaForCausalLM"]}, r"is damaged: .* of the class \['LlamaForCausalLM'\]"),
        ({"auto_mapping": {"base_model_class": 3}}, "is damaged: .* of the class 3"),
        ({"auto_mapping": None, "task_type": ["CAUSAL_LM"]}, r"is damaged: .* of the class \['CAUSAL_LM'\]"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_said(change, message, tmp_path, capsys):
    for name in ("base", "cut"):
        tiny(dtype=torch.float32).save_pretrained(tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    apply_mos(model, mos(model))
    save_adapter(model, tmp_path / "mos")
    path = tmp_path / "mos" / "adapter_config.json"
    change = {k: str(tmp_path / "cut") if v == "cut" else v for k, v in change.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["doctor", "--model", str(tmp_path / "mos")]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("error: ") and re.search(message, printed)


def test_the_command(tmp_path, capsys):
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    apply_mos(model, mos(model))
    save_adapter(model, tmp_path / "mos")
    assert main(["doctor", "--model", str(tmp_path / "mos")]) == 0
    assert "take part" in capsys.readouterr().out
    base.save_pretrained(tmp_path / "whole")  # an adapter inside its base's folder, as transformers serve reads it
    save_adapter(model, tmp_path / "whole")
    assert main(["doctor", "--model", str(tmp_path / "whole")]) == 0
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.mos_lora_B.zero_()
    save_adapter(model, tmp_path / "mos")
    assert main(["doctor", "--model", str(tmp_path / "mos"), "--base", str(tmp_path / "base")]) == 1
    assert "model.layers.0.mlp.up_proj: adds nothing" in capsys.readouterr().out
    assert main(["doctor", "--model", str(tmp_path / "mos"), "--base", str(tmp_path / "whole")]) == 2
    assert "holds an adapter itself" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "--base", str(tmp_path / "base")])
    assert "--base has no effect here: give --model" in capsys.readouterr().err
    assert main(["doctor", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().out
