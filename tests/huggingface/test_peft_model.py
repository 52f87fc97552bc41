"""The peft method on whole models: what peft promises of a tuner, and that its files and apply_mos's are the same."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_setup import FAMILIES, SCOPES, config, in_file, peft_model
from tiny_models import DECODERS, batch, first_linear, ids, layers_of, logits, mos, snapshot, tiny
from torch import nn

from mos_kernels import MoSConfig, MoSRouter
from mos_kernels.huggingface import (
    MoSPeftConfig,
    activated_parameters,
    apply_mos,
    ffn_target_modules,
    load_adapter,
    mos_param_groups,
    remove_mos,
    routing_report,
    save_adapter,
)
from mos_kernels.huggingface.modules import mos_adapters, router_owners
from mos_kernels.huggingface.peft.layer import MoSPeftLayer, MoSPeftRouter

every_family = pytest.mark.parametrize("family", FAMILIES)
both_scopes = pytest.mark.parametrize("scope", SCOPES)


def layers(model: nn.Module) -> dict[str, MoSPeftLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoSPeftLayer)}


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Values that no start has, in every adapter parameter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mos_" in name:
                parameter.copy_(torch.randn(parameter.shape) * (0.01 if "curvature" in name else 0.3))


# the two doors


@every_family
@both_scopes
def test_files_of_either_door_open_in_the_other(family, scope, tmp_path):
    by_peft = peft_model(family, router_scope=scope)
    randomise(by_peft)
    expected = logits(by_peft)
    assert (expected - logits(tiny(family))).abs().max() > 1e-3
    by_peft.save_pretrained(tmp_path / "peft")
    plain = tiny(family)
    load_adapter(plain, tmp_path / "peft")
    assert torch.equal(logits(plain), expected)

    save_adapter(plain, tmp_path / "own")
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(tiny(family), tmp_path / "own", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again), expected)
        assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


@every_family
@both_scopes
def test_gradients_are_those_of_apply_mos(family, scope, tmp_path):
    """Load balancing included, whose coefficient is divided by the number of routers in both."""
    by_peft = peft_model(family, router_scope=scope, router_aux_loss_coef=0.5, curvature_lr_ratio=1.0)
    by_peft.save_pretrained(tmp_path)
    own = tiny(family)
    load_adapter(own, tmp_path, is_trainable=True)
    assert len(router_owners(own)) == len(router_owners(by_peft)) > 0
    found = []
    for model in (by_peft, own):
        model.train()
        model(ids()).logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "mos_" in n}
        found.append({in_file(name): grad for name, grad in grads.items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-12, msg=name)


WHERE_IN_DECODERS = [
    {"target_modules": "all-linear"}, {"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.mlp.down_proj"]},
    {"target_modules": ["down_proj"]}, {"target_modules": r".*layers\.0\.mlp\.(up|gate)_proj"},
    {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 3.0}}, {"share_a": False},
    {"target_modules": ["q_proj", "up_proj", "gate_proj"], "activation": "silu"},
]  # fmt: skip
WHERE_IN_BERT = [
    {"target_modules": "all-linear"}, {"target_modules": ["intermediate.dense"], "layers_to_transform": [1]},
    {"exclude_modules": ["layer.0.output.dense"]},
    {"target_modules": ["intermediate.dense"]}, {"target_modules": r".*layer\.0\.(intermediate|output)\.dense"},
    {"rank_pattern": {"intermediate.dense": 2}, "alpha_pattern": {"layer.0.output.dense": 3.0}}, {"share_a": False},
    {"target_modules": ["query", "intermediate.dense"], "activation": "silu"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, options) for f in FAMILIES for options in (WHERE_IN_BERT if f == "bert" else WHERE_IN_DECODERS)],
    ids=str,
)
def test_options_of_where_choose_what_apply_mos_does(family, options, tmp_path):
    by_peft = peft_model(family, **options)
    own = tiny(family)
    wanted = mos(own, **options)
    assert sorted(layers(by_peft.base_model.model)) == sorted(apply_mos(own, wanted))
    owners = {name.replace(".default", "").replace(".mos_adapter", "") for name in router_owners(by_peft)}
    assert {name.removeprefix("base_model.model.") for name in owners} == set(router_owners(own))
    remove_mos(own)
    by_peft.save_pretrained(tmp_path)
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(by_peft))
    again = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert torch.equal(logits(again), logits(by_peft))


@pytest.mark.parametrize(
    ("family", "module"), [("llama", "lm_head"), ("qwen2", "lm_head"), ("gemma", "model.norm"), ("bert", "pooler")]
)
def test_modules_to_save_go_through_both_doors(family, module, tmp_path):
    """Not Gemma's lm_head, which is its embedding."""
    model = peft_model(family, modules_to_save=[module])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    own = tiny(family)
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model)) and not torch.equal(logits(own), logits(tiny(family)))
    save_adapter(own.train(), tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(family), tmp_path)), logits(model))


@every_family
def test_auto_classes_and_the_card(family, tmp_path):
    auto = AutoPeftModelForSequenceClassification if family == "bert" else AutoPeftModelForCausalLM
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(auto._target_class.from_pretrained(tmp_path / "base"), config(family))
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("import mos_kernels.huggingface  # first") == 1 and "cannot be merged" in card
    assert "Rank 4, " in card and " used by a token" in card
    again = auto.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["AutoPeftModel", "of the task"])
def test_auto_classes_open_what_save_adapter_wrote(name, family, tmp_path):
    if name == "of the task":
        name = "AutoPeftModelForSequenceClassification" if family == "bert" else "AutoPeftModelForCausalLM"
    tiny(family).save_pretrained(tmp_path / "base")
    model = type(tiny(family)).from_pretrained(tmp_path / "base").eval()
    apply_mos(model, MoSConfig(r=4, init_lora_weights=False, target_modules=ffn_target_modules(model)))
    if family == "bert":
        model.classifier.requires_grad_(True)
        with torch.no_grad():
            model.classifier.weight.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    again = getattr(peft, name).from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again, PeftModel) and type(again.base_model.model) is type(model)


# several adapters


def two_adapters(family: str = "llama", **options) -> PeftModel:
    """`default` on the FFN and `other`, of another rank, on its linears that widen and an attention projection.

    On BERT without a task, whose head peft would save with each adapter: of those only one can be active.
    """
    task = {"task_type": None} if family == "bert" else {}
    model = peft_model(family, **task, **options)
    torch.manual_seed(1)
    targets = ["query", "intermediate.dense"] if family == "bert" else ["q_proj", "up_proj", "gate_proj"]
    model.add_adapter("other", config(family, **task, r=2, target_modules=targets, num_experts_per_tok=2))
    randomise(model)
    return model.eval()


@every_family
def test_adapters_are_added_set_disabled_and_deleted(family, tmp_path):
    base, model = logits(tiny(family)), two_adapters(family)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second) and not torch.equal(first, second)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".other." in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "other", second)):
        own = tiny(family)
        load_adapter(own, folder)
        assert torch.equal(logits(own), expected)
    assert "mos_kernels" in (tmp_path / "other" / "README.md").read_text()

    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and torch.equal(logits(model), second)
    assert not any("default" in name for name, _ in model.named_parameters())
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model), base) and not any(
        "mos_" in name for name, _ in model.named_parameters()
    )
    model.add_adapter("default", config(family))
    model.set_adapter("default")
    assert not torch.equal(logits(model), base)


@every_family
def test_two_active_adapters_are_both_added(family):
    """In BERT, whose FFN is no block, each linear has routers of its own."""
    model = two_adapters(family)
    block = getattr(layers_of(model.base_model.model)[0], "intermediate" if family == "bert" else "mlp")
    layer, x = getattr(block, "dense" if family == "bert" else "up_proj"), torch.randn(3, 32, dtype=torch.float64)

    def adapted(names):
        model.base_model.set_adapter(names)
        gates = () if family == "bert" else (block.mos_router(x),)
        return layer(x, *gates) - layer.base_layer(x)

    both = adapted(["default", "other"])
    torch.testing.assert_close(both, adapted("default") + adapted("other"))
    assert len(router_owners(model)) == 2 + 2, "those of the active one: two blocks (or linears), two q_proj"
    model.base_model.set_adapter(["default", "other"])
    counts = (8, 8) if family == "bert" else (6, 12)
    assert (len(router_owners(model)), len(mos_adapters(model))) == counts
    logits(model)


def test_a_dense_base_and_one_adapter_are_one_operation():
    model = peft_model()
    up = model.base_model.model.model.layers[0].mlp.up_proj
    up.base_layer.forward = None  # never called
    del up.base_layer.forward
    calls = []
    type(up.base_layer).forward, forward = lambda *_: calls.append(1), type(up.base_layer).forward
    try:
        up(torch.randn(2, 32, dtype=torch.float64), {"default": torch.rand(2, 8)})
    finally:
        type(up.base_layer).forward = forward
    assert not calls
    y = up(torch.randn(2, 32, dtype=torch.float64), {"default": torch.rand(2, 8)})
    assert type(y.grad_fn).__name__ == "_MoSLinearBackward"


def test_the_second_adapter_leaves_the_first_ones_router_trainable_or_not():
    model = peft_model()
    model.add_adapter("other", config())
    by_name = dict(model.named_parameters())
    assert all(p.requires_grad == (".default." in name) for name, p in by_name.items() if "mos_" in name)
    model.set_adapter("other")
    assert by_name["base_model.model.model.layers.0.mlp.mos_router.other.weight"].requires_grad
    assert not by_name["base_model.model.model.layers.0.mlp.mos_router.default.weight"].requires_grad


@pytest.mark.parametrize("learn_curvature", [True, False])
def test_fixed_curvature_takes_no_gradient(learn_curvature):
    model = peft_model(learn_curvature=learn_curvature)
    model.base_model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    flags = {p.requires_grad for name, p in model.named_parameters() if "mos_curvature" in name}
    assert flags == {learn_curvature}
    assert all(p.requires_grad for name, p in model.named_parameters() if "mos_lora" in name or "mos_router" in name)


def test_the_default_targets_are_what_the_options_leave():
    assert config().target_modules is None
    assert len(layers(peft_model(exclude_modules=["down_proj"]))) == 4
    assert len(layers(peft_model(layers_to_transform=[1]))) == 3


# transformers' own doors


@pytest.fixture
def any_peft_version(monkeypatch):
    """transformers 5.24 asks for a later peft than there is; for what it then does, this one will do."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)


def needs_names_of(family: str) -> None:
    """transformers 5.0 strips no other prefix than "base_model.model.model.", and misses a LoRA of a BERT as well."""
    import transformers.integrations.peft as integration

    if family == "bert" and hasattr(integration, "_build_peft_weight_mapping"):
        pytest.skip("transformers' own load_adapter finds no tensor of a BERT: its rules are those of 5.0")


@every_family
@both_scopes
def test_transformers_own_methods(family, scope, tmp_path, any_peft_version):
    needs_names_of(family)
    saved = peft_model(family, router_scope=scope, task_type=None)
    randomise(saved)
    saved.save_pretrained(tmp_path)
    expected = logits(saved)
    model = tiny(family)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), expected)
    model.add_adapter(config(family, router_scope=scope), "second")
    model.set_adapter("second")
    assert not torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny(family)))
    model.enable_adapters()
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert {in_file(name) for name in model.state_dict()} == {in_file(name) for name in saved.state_dict()}


@every_family
def test_an_adapter_from_transformers_is_saved_and_comes_back(family, tmp_path, any_peft_version):
    model = tiny(family)
    model.add_adapter(config(family))
    randomise(model)
    model.save_pretrained(tmp_path)
    own = tiny(family)
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model))


def test_injected_by_the_names_in_a_state_dict(tmp_path):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = peft_model()
    state = get_peft_model_state_dict(saved)
    model = inject_adapter_in_model(config(), tiny(), state_dict=state)
    set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), logits(saved))
    partial = {name: tensor for name, tensor in state.items() if "layers.0" in name}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        inject_adapter_in_model(config(), tiny(), state_dict=partial)


# dtypes


def curvatures(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if "mos_curvature" in name]


@every_family
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_curvature_stays_float32_on_a_bfloat16_base(family, autocast, low_cpu_mem_usage, tmp_path):
    base, options = tiny(family, torch.bfloat16), config(family, task_type=None)
    model = get_peft_model(base, options, autocast_adapter_dtype=autocast)
    randomise(model)
    values = [c.detach().clone() for c in curvatures(model)]
    wide = {p.dtype for n, p in model.named_parameters() if "mos_lora" in n or "mos_router" in n}
    assert wide == {torch.float32 if autocast else torch.bfloat16}
    model.half().bfloat16()
    assert all(c.dtype == torch.float32 and torch.equal(c, v) for c, v in zip(curvatures(model), values, strict=True))
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        tiny(family, torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert all(c.dtype == torch.float32 and torch.equal(c, v) for c, v in zip(curvatures(again), values, strict=True))
    saved, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in saved.items() if "mos_" in name)
    needs_names_of(family)
    by_transformers = tiny(family, torch.bfloat16)
    by_transformers.load_adapter(tmp_path)
    loaded = curvatures(by_transformers)
    assert all(c.dtype == torch.float32 and torch.equal(c, v) for c, v in zip(loaded, values, strict=True))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("door", ["peft", "own"])
def test_trls_cast_of_everything_trainable_is_undone_before_training(door, family):
    """TRL assigns to .data, under QLoRA, past every hook; the trainer's model.train() comes after it."""
    if door == "peft":
        model = peft_model(family, dtype=torch.float32)
    else:
        model = tiny(family, torch.float32)
        apply_mos(model, MoSConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(mos_param_groups(model, lr=1e-3))
    model.train()
    assert all(c.dtype == torch.float32 for c in curvatures(model))
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert all(c.grad.dtype == torch.float32 for c in curvatures(model))


def test_a_cast_of_one_adapter_alone():
    layer = next(iter(layers(peft_model(dtype=torch.float32)).values()))
    layer.mos_adapter["default"].half()
    assert layer.mos_curvature["default"].dtype == torch.float32
    assert layer.mos_lora_A["default"].dtype == torch.float16


# what cannot be


@every_family
def test_merging_is_refused_with_the_reason_and_unloading_works(family):
    model, plain = peft_model(family), tiny(family)
    before = logits(model)
    layer = next(iter(layers(model).values()))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match="cannot be merged.*depends on the token"):
            merge()
    assert torch.equal(logits(model), before)
    base = model.unload()
    assert torch.equal(logits(base), logits(plain)) and snapshot(base)["types"] == snapshot(plain)["types"]
    assert all(vars(module).get("forward") is None for module in base.modules())
    assert torch.equal(logits(get_peft_model(base, config(family))), logits(base))


def test_mixed_batches_are_refused():
    model = two_adapters()
    with pytest.raises(ValueError, match="adapter_names"):
        model(ids(), adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=ids(), adapter_names=["default", "other"], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "match nothing"),
        ({"target_modules": ["up_proj", "nothing"]}, "nothing.*match nothing"),
        ({"layers_to_transform": [5]}, "layers_to_transform"),
        ({"target_modules": ["embed_tokens"]}, "no linear"),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_it_changes(options, message):
    model = tiny()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, config(**options))
    assert snapshot(model) == before
    adapted = peft_model()
    expected, before = logits(adapted), snapshot(adapted)
    with pytest.raises((ValueError, TypeError), match=message):
        adapted.add_adapter("other", config(**options))
    assert snapshot(adapted) == before and list(adapted.peft_config) == ["default"]
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("name", ["x.y", "weight", "keys", "training"])
def test_a_name_that_no_module_can_have_is_refused_before_the_model_changes(name):
    adapted = peft_model()
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="cannot be the name of a torch module: choose another name"):
        adapted.add_adapter(name, config())
    assert snapshot(adapted) == before and list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("place", ["router_owners", "follow_attention_mask"])
def test_an_error_on_the_way_takes_the_adapter_off(place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("on the way")

    model = tiny()
    before = snapshot(model)
    monkeypatch.setattr(f"mos_kernels.huggingface.peft.model.{place}", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        get_peft_model(model, config(modules_to_save=["lm_head"]))
    after = snapshot(model)
    kept = ("types", "modules", "attributes", "hooks", "state", "requires_grad")
    assert all(after[key] == before[key] for key in kept)
    assert torch.equal(logits(model), logits(tiny()))
    monkeypatch.undo()
    adapted = peft_model(target_modules=["gate_proj", "down_proj"])
    expected, types = logits(adapted), snapshot(adapted)["types"]
    monkeypatch.setattr(f"mos_kernels.huggingface.peft.model.{place}", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        adapted.add_adapter(
            "other", config(target_modules=["gate_proj", "up_proj", "q_proj"], modules_to_save=["lm_head"])
        )
    assert snapshot(adapted)["types"] == types and torch.equal(logits(adapted), expected)


def test_adapters_of_other_doors_and_methods_are_refused():
    from peft import LoraConfig

    own = tiny()
    apply_mos(own, MoSConfig())
    with pytest.raises(ValueError, match="remove_mos"):
        get_peft_model(own, config())
    with pytest.raises(ValueError, match="another peft method"):
        inject_adapter_in_model(config(), inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), tiny()))
    with pytest.raises(ValueError, match="peft"):
        apply_mos(peft_model(), MoSConfig())
    with pytest.raises(ValueError, match="unload"):
        remove_mos(peft_model())
    with pytest.raises(ValueError, match="save_pretrained"):
        save_adapter(peft_model(), "nowhere")


# what looks at a model


def test_reports_counts_and_groups():
    model, own = peft_model(), tiny()
    apply_mos(own, MoSConfig(r=4))
    assert activated_parameters(model) == activated_parameters(own)
    report = routing_report(model, ids())
    assert [entry["tokens"] for entry in report] == [14, 14]
    groups = {group["name"]: len(group["params"]) for group in mos_param_groups(model, lr=1e-3)}
    assert groups == {"lora": 12, "router": 2, "curvature": 6}
    model.add_adapter("other", config(r=16))
    assert activated_parameters(model) == activated_parameters(own), "those of the active adapter"
    status = model.get_model_status()
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "other"]
    model.print_trainable_parameters()


@every_family
def test_the_callback_in_a_trainer(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    from mos_kernels.huggingface import MoSCallback

    model = peft_model(family, dtype=torch.float32, router_aux_loss_coef=0.5)
    adapters, routers = len(mos_adapters(model)), len(router_owners(model))
    tokens = batch(family, batch=8)
    data = [{name: values[i] for name, values in tokens.items()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    callback = MoSCallback.add_to(trainer)
    weights = []
    owner = next(iter(router_owners(model).values()))
    owner.register_forward_pre_hook(lambda module, _: weights.append(module.mos_aux_weight.item()))
    trainer.train()
    assert set(weights) == {0.5 / routers / 2} and owner.mos_aux_weight.item() == 0.5 / routers
    assert (adapters, routers) == ((4, 4) if family == "bert" else (6, 2))
    logged = trainer.state.log_history[0]
    assert {"mos/curvature/hyperbolic_mean", "mos/share/euclidean", "mos/entropy"} <= logged.keys()
    assert len(callback.history[0]["curvature"]) == adapters and len(callback.history[0]["share"]) == routers
    again = PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(again), logits(model.eval()))


# torch's ways


@every_family
def test_copies_and_pickles(family):
    model = two_adapters(family)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), logits(model))
        with torch.no_grad():
            for layer in layers(other).values():
                for adapter in layer.mos_adapter.values():
                    adapter.mos_lora_B.zero_()
        assert torch.equal(logits(other), logits(tiny(family))) and not torch.equal(logits(other), logits(model))


@every_family
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant, family):
    found = []
    for checkpointing in (False, True):
        model = peft_model(family, router_aux_loss_coef=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**batch(family)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None for g in found[1].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def replica(module: nn.Module) -> nn.Module:
    """As DataParallel's on another device: new modules throughout, here with every parameter doubled."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            copied.__dict__[name] = 2 * parameter.detach()
    copied._parameters = {name: None for name, parameter in module._parameters.items() if parameter is None}
    return copied


@every_family
def test_a_data_parallel_replica_uses_its_own_parameters(family):
    model = peft_model(family, dtype=torch.float64, learn_curvature=False, router_scope="linear")
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
        before = layer(x)
        torch.testing.assert_close(replica(layer)(x), expected(x))
        assert torch.equal(layer(x), before)


@every_family
@pytest.mark.budget(8)
def test_a_block_compiles_in_one_graph_for_any_length(family):
    torch._dynamo.reset()
    block = layers_of(two_adapters(family, dtype=torch.float32).base_model.model)[0]
    block = block.intermediate if family == "bert" else block.mlp
    graphs = []
    compiled = torch.compile(block, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for length in (3, 5, 9, 17, 33):
        x = torch.randn(2, length, 32)
        y = compiled(x)
        hooks = [module.register_forward_hook(lambda *_: None) for module in block.children()]  # linear by linear too
        torch.testing.assert_close(y, block(x))
        for hook in hooks:
            hook.remove()
    assert len(graphs) == 2, "one for the first length, and one for any"


def test_frozen_for_inference_and_thawed():
    model = peft_model()
    expected = logits(model)
    for layer in layers(model).values():
        layer.freeze_for_inference()
    assert all(adapter._kept is not None for adapter in mos_adapters(model).values())
    assert torch.equal(logits(model), expected)
    frozen = {name: adapter._kept for name, adapter in mos_adapters(model).items()}
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), expected)
    assert all(adapter._kept is not frozen[name] for name, adapter in mos_adapters(model).items())


@every_family
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "parametrised", "packed", "torchao int8"])
def test_bases_that_are_no_dense_parameter(kind, family, tmp_path):
    from test_bases import model_on

    model = get_peft_model(model_on(kind, family), config(family, init_lora_weights=True)).eval()
    up = first_linear(model.base_model.model)
    model.train()  # first: bitsandbytes on a CPU packs 4-bit weights in eval mode, and is not differentiable after it
    model(**batch(family)).loss.backward()
    assert up.mos_lora_B["default"].grad.abs().max() > 0
    torch.testing.assert_close(logits(model.eval()), logits(model_on(kind, family)))
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_on(kind, family), tmp_path)
    own = model_on(kind, family)
    load_adapter(own, tmp_path)
    assert torch.equal(logits(again), logits(own))
    if "4-bit" in kind:  # saving made bitsandbytes pack the weights anew, which rounds
        torch.testing.assert_close(logits(own), logits(model), rtol=0.02, atol=0.005)
    else:
        assert torch.equal(logits(own), logits(model))
    base = model.unload()
    assert first_linear(base) is up.base_layer


def test_conv1d(tmp_path):
    model = peft_model("gpt2")
    model.save_pretrained(tmp_path)
    own = tiny("gpt2")
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model)) and len(layers(model)) == 4


@every_family
@pytest.mark.parametrize("preload", [None, ["MoSPeftLayer"]])
def test_offloaded_parameters_are_there_when_they_are_needed(preload, family):
    from accelerate import cpu_offload

    model = peft_model(family)
    expected = logits(model)
    cpu_offload(model, torch.device("cpu"), preload_module_classes=preload)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "mos_" in name)
    torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-14)  # the base runs by itself


def test_offloading_an_adapter_of_transformers_takes_the_parameters_own_names(tmp_path):
    from accelerate import cpu_offload

    peft_model().save_pretrained(tmp_path)
    model = tiny()
    model.load_adapter(tmp_path)
    expected = logits(model.eval())
    cpu_offload(model, torch.device("cpu"), state_dict=dict([*model.named_parameters(), *model.named_buffers()]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-14)


def test_nothing_of_the_size_of_x_is_kept_but_x_itself():
    """peft's own layers cast x to the adapter's float32: a copy of the largest tensor."""
    model = get_peft_model(tiny(dtype=torch.bfloat16), config(router_scope="linear"))
    layer = next(iter(layers(model).values()))
    x = torch.randn(11, 32, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert all(t is x or t.shape[-1] != 32 or t.shape[0] != 11 for t in kept) and any(t is x for t in kept)


def test_every_trained_parameter_gets_a_gradient_at_every_step():
    """DDP waits for one of each."""
    model = peft_model().train()
    model(ids()[:1, :1]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_base_with_accelerates_hook_runs_through_it():
    from accelerate import dispatch_model

    model = peft_model()
    expected = logits(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(logits(model), expected)


# registration


def test_the_type_is_registered_once():
    from mos_kernels.huggingface.peft.config import MOSELORA, _add_peft_type

    assert PeftType("MOSELORA") is PeftType.MOSELORA is PeftType["MOSELORA"] is MOSELORA is _add_peft_type("MOSELORA")
    assert list(PeftType).count(MOSELORA) == 1 and MOSELORA == "MOSELORA"
    assert isinstance(MoSRouter(4, MoSConfig()), MoSRouter) and issubclass(MoSPeftRouter, nn.ModuleDict)


@pytest.mark.budget(15)
def test_without_peft_and_in_a_process_that_loads(tmp_path):
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoPeftModelForCausalLM._target_class.from_pretrained(tmp_path / "base")
    get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    code = f"""
import sys
import mos_kernels
assert not {{'peft', 'transformers'}} & sys.modules.keys()
sys.modules['peft'] = None
import mos_kernels.huggingface as hf
assert hf.apply_mos and hf.load_adapter
for name in ('MoSPeftConfig', 'MoSPeftModel'):
    try:
        getattr(hf, name)
    except ImportError as error:
        print(error)
del sys.modules['peft']
from peft import AutoPeftModelForCausalLM
try:
    AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
except (ValueError, KeyError) as error:
    print('MOSELORA' in str(error))
del sys.modules['mos_kernels.huggingface']
import mos_kernels.huggingface
AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
print('loaded')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs = 'needs peft 0.21 or later: pip install "peft>=0.21"'
    assert done.stdout.splitlines() == [f"MoSPeftConfig {needs}", f"MoSPeftModel {needs}", "True", "loaded"]


# configuration


def test_its_fields_are_those_of_mos_config():
    ours = {name: value for name, value in MoSPeftConfig().to_dict().items()}
    for name, value in MoSConfig().to_dict().items():
        if name != "target_modules":
            assert ours[name] == value, name
    assert ours["target_modules"] is None
    assert MoSPeftConfig(target_modules=["a"], r=3).to_mos_config() == MoSConfig(target_modules=["a"], r=3)


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"num_experts_per_tok": 9}, {"spaces": {"flat": 1}}, {"mapping": "none"}, {"unheard_of": 1}]
)
def test_bad_values_and_unknown_options(options):
    with pytest.raises(TypeError if "unheard_of" in options else ValueError, match=next(iter(options))):
        MoSPeftConfig(**options)


def test_peft_given_the_other_configuration_names_its_own():
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(AttributeError, match=r"give get_peft_model a MoSPeftConfig .* or call apply_mos"):
        get_peft_model(model, MoSConfig())
    assert snapshot(model) == before
    with pytest.raises(AttributeError, match="'MoSConfig' object has no attribute 'alpha'"):
        getattr(MoSConfig(), "alpha")  # noqa: B009


def test_a_configuration_goes_through_its_file(tmp_path):
    before = config(target_modules={"b", "a"}, spaces={"spherical": 2, "hyperbolic": 1}, num_experts_per_tok=2)
    before.save_pretrained(tmp_path)
    after = MoSPeftConfig.from_pretrained(tmp_path)
    assert after.to_mos_config() == before.to_mos_config() and after.spaces == {"hyperbolic": 1, "spherical": 2}


def test_an_adapter_that_cannot_be_put_on_leaves_parameters_trainable(monkeypatch):
    model = tiny()
    before = snapshot(model)
    monkeypatch.setattr("mos_kernels.huggingface.peft.model.follow_attention_mask", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inject_adapter_in_model(config(), model)
    assert snapshot(model)["requires_grad"] == before["requires_grad"]


def test_apply_mos_inside_a_peft_model_says_to_unload():
    base = peft_model().base_model.model
    before = snapshot(base)
    with pytest.raises(ValueError, match="has a peft adapter, at .*unload it first"):
        apply_mos(base, MoSConfig(target_modules=["q_proj"]))
    assert snapshot(base) == before
