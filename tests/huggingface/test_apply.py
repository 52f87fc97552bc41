"""apply_mos and remove_mos on every family of models."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from everyday import full_but
from peft_setup import peft_model
from tiny_models import FAMILIES, ids, mos, snapshot, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from mos_kernels import MoSConfig, MoSConv1D, MoSLinear, MoSRouter
from mos_kernels.huggingface import (
    MoSPeftConfig,
    activated_parameters,
    apply_mos,
    export_lora,
    ffn_target_modules,
    idle_tensors,
    load_adapter,
    remove_mos,
    save_adapter,
)
from mos_kernels.layer import MoSLayer, MoSWrapped

HAND_WRITTEN = {
    "llama": lambda b, x, g: b.down_proj(b.act_fn(b.gate_proj(x, g)) * b.up_proj(x, g), g),
    "phi3": lambda b, x, g: _phi3(b, x, g),
    "gpt2": lambda b, x, g: b.dropout(b.c_proj(b.act(b.c_fc(x, g)), g)),
    "phi": lambda b, x, g: b.fc2(b.activation_fn(b.fc1(x, g)), g),
    "gpt_neox": lambda b, x, g: b.dense_4h_to_h(b.act(b.dense_h_to_4h(x, g)), g),
}
for _family in ("qwen2", "qwen3", "mistral", "gemma", "gemma2"):
    HAND_WRITTEN[_family] = HAND_WRITTEN["llama"]


def _phi3(block, x, gates):
    gate, up = block.gate_up_proj(x, gates).chunk(2, dim=-1)
    return block.down_proj(block.activation_fn(gate) * up, gates)


def blocks(model):
    return [module for module in model.modules() if "mos_router" in module._modules]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_model_computes_what_it_did(family):
    model = tiny(family)
    before = model(ids()).logits
    names = apply_mos(model, mos(model, init_lora_weights=True))
    assert names and all(isinstance(model.get_submodule(name), MoSLayer) for name in names)
    assert_close(model(ids()).logits, before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_adapter_is_frozen(family):
    model = tiny(family)
    apply_mos(model, mos(model))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(f"mos_{part}" in name for part in ("lora", "router", "curvature")), name
    assert not model.training and not any(module.training for module in model.modules())


def test_fixed_curvature_stays_frozen():
    model = tiny()
    apply_mos(model, mos(model, learn_curvature=False))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "mos_curvature" in name)


@pytest.mark.parametrize("family", HAND_WRITTEN)
def test_a_block_passes_its_routers_gates_to_each_linear(family):
    model = tiny(family)
    applied = apply_mos(model, mos(model))
    assert len(blocks(model)) == 2 and len(applied) == 2 * len(ffn_target_modules(model))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for block in blocks(model):
        assert_close(block(x), HAND_WRITTEN[family](block, x, block.mos_router(x)), rtol=1e-12, atol=1e-12)
        gates = block.mos_router(x)
        block.mos_router.weight.data.neg_()
        assert not torch.allclose(gates, block.mos_router(x))
        assert not torch.allclose(block(x), HAND_WRITTEN[family](block, x, gates), rtol=1e-9)


def test_bert_has_no_block_and_the_report_says_so():
    model = tiny("bert")
    applied = apply_mos(model, mos(model))
    assert not blocks(model) and len(applied) == 4
    assert all(model.get_submodule(name).mos_router is not None for name in applied)
    for text in ("4 linears, 4 routers", "bert.encoder.layer.*.output.dense (2)", "BertOutput is no FFN block"):
        assert text in applied.report() and text in str(applied)


def test_the_report_says_which_blocks_are_one_operation():
    model = tiny()
    assert "; one operation\n" in apply_mos(model, mos(model)).report() + "\n"
    for other, changes in (("llama", {"lora_dropout": 0.1}), ("gpt_neox", {})):
        model = tiny(other)
        report = apply_mos(model, mos(model, **changes)).report()
        assert ("(linear by linear in training, where it has dropout)" in report) == bool(changes), report


def test_the_report_names_a_head_that_stays_frozen():
    model = tiny("bert")
    says = "classifier is frozen: classifier.requires_grad_(True) trains it"
    assert says in apply_mos(model, mos(model)).report()
    assert not any(p.requires_grad for p in model.classifier.parameters())
    llama = tiny()
    assert "is frozen" not in apply_mos(llama, mos(llama)).report()


def test_reports_of_blocks_and_of_linears_outside_of_them():
    model = tiny()
    report = apply_mos(model, mos(model, target_modules=["q_proj", "up_proj", "down_proj"])).report()
    assert "model.layers.*.mlp (2): one router per block, for up_proj, down_proj" in report
    assert "model.layers.*.self_attn.q_proj (2): a router of its own: LlamaAttention is no FFN block" in report
    assert isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)
    model(ids())


def test_a_single_target_in_a_block_has_its_own_router():
    model = tiny()
    before = tiny()(ids()).logits
    applied = apply_mos(model, mos(model, target_modules=["down_proj"]))
    assert not blocks(model) and "the only target in LlamaMLP" in applied.report()
    assert not torch.allclose(model(ids()).logits, before)


def test_router_scope_linear():
    model = tiny()
    applied = apply_mos(model, mos(model, router_scope="linear"))
    assert not blocks(model) and "6 routers" in applied.report()


@pytest.mark.parametrize("scope, routers", [("ffn", 2), ("linear", 6)])
def test_the_load_balancing_weight_is_averaged_over_routers(scope, routers):
    model = tiny()
    apply_mos(model, mos(model, router_scope=scope, router_aux_loss_coef=0.6))
    weights = [buffer for name, buffer in model.named_buffers() if name.endswith("mos_aux_weight")]
    assert len(weights) == routers
    assert_close(torch.cat(weights), torch.full((routers,), 0.6 / routers))


@pytest.mark.parametrize("dtype, expected", [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_dtypes_of_the_adapter(dtype, expected):
    model = tiny(dtype=getattr(torch, dtype))
    apply_mos(model, mos(model))
    for name, parameter in model.named_parameters():
        if "mos_lora" in name or "mos_router" in name:
            assert parameter.dtype == getattr(torch, expected), name
    assert model(ids()).logits.isfinite().all()


def test_rank_and_alpha_patterns():
    model = tiny()
    config = mos(model, rank_pattern={"down_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"gate_proj": 5.0})
    apply_mos(model, config)
    first, second = (layer.mlp for layer in model.model.layers)
    assert first.down_proj.mos_lora_A.shape == (2, 64) and second.up_proj.mos_lora_A.shape == (6, 32)
    assert first.up_proj.mos_lora_A.shape == (4, 32) and first.gate_proj.config.lora_alpha == 5.0


def test_all_linear_leaves_out_the_head():
    causal, classifier = tiny("llama"), tiny("bert")
    names = apply_mos(causal, mos(causal, target_modules="all-linear"))
    assert len(names) == 14 and "lm_head" not in names and len(blocks(causal)) == 2
    names = apply_mos(classifier, mos(classifier, target_modules="all-linear"))
    assert len(names) == 13 and "classifier" not in names and "bert.pooler.dense" in names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_remove_restores_the_model(family, scope):
    model = tiny(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before, logits = snapshot(model), model(ids()).logits
    applied = apply_mos(model, mos(model, router_scope=scope))
    assert not torch.allclose(model(ids()).logits, logits)
    assert remove_mos(model) == applied
    after = snapshot(model)
    assert [after[key] for key in ("types", "state", "requires_grad", "training", "forwards")] == [
        before[key] for key in ("types", "state", "requires_grad", "training", "forwards")
    ]
    assert after["attributes"] == before["attributes"]
    assert_close(model(ids()).logits, logits, rtol=0, atol=0)
    apply_mos(model, mos(model))


def test_remove_without_an_adapter():
    with pytest.raises(ValueError, match="no MoS adapter"):
        remove_mos(tiny())


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"router_scope": "linear"}, {"spaces": {"euclidean": 1}, "num_experts_per_tok": 1}]
)
@pytest.mark.parametrize("runs_before", [False, True])
def test_a_linear_that_was_replaced_is_named(by_peft, options, runs_before, tmp_path):
    """Whether or not it has the gates of its block, with and without gradients, and before an export."""
    model = peft_model(**options) if by_peft else tiny()
    if not by_peft:
        apply_mos(model, mos(model, **options))
    if runs_before:
        model(ids())
    model.get_submodule("base_model.model" if by_peft else "").model.layers[0].mlp.up_proj = nn.Linear(32, 64).double()
    lost = "'model.layers.0.mlp.up_proj' has lost its adapter: something has replaced the linear"
    for _ in range(2):
        with pytest.raises(ValueError, match=lost):
            model(ids())
        with pytest.raises(ValueError, match=lost), torch.no_grad():
            model(ids())
        with pytest.raises(ValueError, match=lost):
            model.generate(input_ids=ids(), max_new_tokens=1)
    for check in (lambda: idle_tensors(model, input_ids=ids()), lambda: export_lora(model, [ids()], tmp_path / "lora")):
        with pytest.raises(ValueError, match=lost):
            check()
    assert not (tmp_path / "lora").exists()


def test_a_block_names_a_linear_that_was_replaced():
    """Where the forward of the whole model is not what runs."""
    model = peft_model().base_model.model
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 64, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="'up_proj' of a LlamaMLP has lost its adapter: something has replaced"):
        model(ids())


@pytest.mark.parametrize("by_peft", [False, True])
def test_a_module_around_an_adapted_linear_is_no_loss(by_peft):
    """Nor is one that torch.compile or checkpointing puts there, a copy, or a model without the adapter."""
    model = peft_model() if by_peft else tiny()
    if not by_peft:
        apply_mos(model, mos(model))
    expected = model(ids()).logits
    assert_close(copy.deepcopy(model)(ids()).logits, expected, rtol=0, atol=0)
    layer = model.get_submodule("base_model.model" if by_peft else "").model.layers[0]
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
    layer.mlp = checkpoint_wrapper(layer.mlp)
    assert_close(model(ids()).logits, expected, rtol=0, atol=0)
    assert_close(copy.deepcopy(model)(ids()).logits, expected, rtol=0, atol=0)
    if by_peft:
        layer.mlp = layer.mlp._checkpoint_wrapped_module
        model.unload()
        assert not torch.equal(model(ids()).logits, expected)


def test_a_model_runs_after_a_second_adapter_failed(monkeypatch):
    model = peft_model()
    expected = model(ids()).logits
    with monkeypatch.context() as patch:
        patch.setattr(type(model.base_model), "_add_router", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.add_adapter("second", MoSPeftConfig(target_modules=["q_proj", "up_proj", "down_proj"]))
    assert_close(model(ids()).logits, expected, rtol=0, atol=0)


def test_the_linears_that_run_through_a_module_of_ones_own():
    model = tiny()
    torch.manual_seed(0)
    apply_mos(model, mos(model, router_scope="linear"))
    expected, mlp = model(ids()).logits, model.model.layers[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    assert_close(model(ids()).logits, expected, rtol=0, atol=0)
    assert idle_tensors(model, input_ids=ids(length=20)) == []


@pytest.mark.parametrize("hooked", [False, True])
def test_a_linear_keeps_a_forward_of_its_own(hooked):
    """Also inside the hook by which accelerate moves inputs to a device."""
    model = tiny()
    down = model.model.layers[0].mlp.down_proj
    own = down.forward
    down.forward = lambda x: own(x) / 2
    if hooked:
        add_hook_to_module(down, AlignDevicesHook(execution_device="cpu"))
    expected = model(ids()).logits
    applied = apply_mos(model, mos(model, init_lora_weights=True))
    assert type(model.model.layers[0].mlp.down_proj) is MoSWrapped
    assert type(model.model.layers[1].mlp.down_proj) is MoSLinear
    assert_close(model(ids()).logits, expected)
    assert "linear by linear, since a base is quantised or wrapped" in applied.report()
    remove_mos(model)
    assert model.model.layers[0].mlp.down_proj is down and torch.equal(model(ids()).logits, expected)


def test_a_linear_at_two_names_is_replaced_once_and_routes_by_itself():
    model = tiny()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    applied = apply_mos(model, mos(model))
    assert second.up_proj is first.up_proj and isinstance(first.up_proj, MoSLinear)
    assert len(applied) == 5 and first.up_proj.mos_router is not None and len(blocks(model)) == 2
    assert "shared between model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in applied.report()
    model(ids())
    remove_mos(model)
    assert second.up_proj is first.up_proj and type(first.up_proj) is nn.Linear


def test_a_block_at_two_names_has_one_router():
    model = tiny()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before = model(ids()).logits
    applied = apply_mos(model, mos(model, init_lora_weights=True))
    assert len(applied) == 3 and len(blocks(model)) == 1 and "1 routers" in applied.report()
    assert_close(model(ids()).logits, before, rtol=0, atol=1e-13)


def test_tied_embeddings_stay_tied():
    model = tiny("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    apply_mos(model, mos(model, target_modules=["lm_head", "down_proj"]))
    assert isinstance(model.lm_head, MoSLinear) and model.lm_head.weight is model.model.embed_tokens.weight
    remove_mos(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_qwen2_1_5b_activates_1_3088_percent():
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.tie_weights()
    apply_mos(model, MoSConfig())
    count = activated_parameters(model)
    assert count.base == 1_543_714_304
    per_block = 8 * (1536 + 1536 + 8960) + 4 * 8 * (8960 + 8960 + 1536) + 8 * 1536
    assert count.activated == 28 * (per_block + 3 * 4)  # and the curvature of 4 experts of 3 linears
    assert round(count.percent, 4) == 1.3088
    assert all(parameter.is_meta for parameter in model.parameters())


def test_activated_parameters_of_other_settings():
    model = tiny()
    apply_mos(model, mos(model, share_a=False, num_experts_per_tok=8, router_scope="linear"))
    count = activated_parameters(model)
    own = sum(p.numel() for name, p in model.named_parameters() if "mos_" in name)
    assert count.activated == count.adapter == own
    assert count.base == sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_copy_is_equal_and_uses_its_own_parts(family, copied):
    model = tiny(family)
    apply_mos(model, mos(model))
    before = model(ids()).logits
    other = copied(model)
    assert_close(other(ids()).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(other(ids()).logits, before, rtol=0, atol=0)
    remove_mos(other)


def test_torch_save_of_the_whole_model(tmp_path):
    model = tiny()
    apply_mos(model, mos(model))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_close(loaded(ids()).logits, model(ids()).logits, rtol=0, atol=0)


def test_a_data_parallel_replica_uses_its_own_parts():
    model = tiny()
    apply_mos(model, mos(model))
    block = model.model.layers[0].mlp
    replica = block._replicate_for_data_parallel()
    for name, child in block._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    x = torch.randn(3, 32, dtype=torch.float64)
    before = block(x)
    block.down_proj.weight.data.zero_()
    assert_close(replica(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", full_but(("llama",), ["llama", "phi3", "gpt2"]))
@pytest.mark.budget(12)
def test_a_block_compiles_to_one_graph(family):
    model = tiny(family, torch.float32)
    apply_mos(model, mos(model))
    block = blocks(model)[0].train()
    x, other = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for tokens in (x, other):
        assert_close(compiled(tokens), block(tokens))
    gradients = []
    for run in (block, compiled):
        block.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters() if p.requires_grad])
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)  # as one operation, and compiled linear by linear


def test_two_threads_at_once():
    model = tiny()
    apply_mos(model, mos(model))
    inputs = [ids(seed, length=5 + seed) for seed in range(2)]
    with torch.no_grad():
        expected = [model(x).logits for x in inputs]

    @torch.no_grad()
    def run(x, wanted):
        for _ in range(20):
            assert torch.equal(model(x).logits, wanted)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, inputs, expected))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = tiny(family)
    apply_mos(model, mos(model))
    prompt = ids(length=4)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, output_logits=True, return_dict_in_generate=True, **options)
    plain = model.generate(prompt, use_cache=False, output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_accelerate_cpu_offload(family):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny(family)
    applied = apply_mos(model, mos(model))
    before = model(ids()).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(applied[0]).weight.is_meta
    assert_close(model(ids()).logits, before, rtol=0, atol=1e-14)  # its blocks are called linear by linear
    with pytest.raises(ValueError, match="offloads the weights.*remove_hook_from_submodules"):
        remove_mos(model)
    assert_close(model(ids()).logits, before, rtol=0, atol=1e-14)  # its blocks are called linear by linear
    remove_hook_from_submodules(model)
    remove_mos(model)


def test_dispatched_models_keep_their_hooks():
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny()
    plain = tiny()
    apply_mos(plain, mos(plain))
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    apply_mos(model, mos(model))
    values = {name: tensor for name, tensor in plain.state_dict().items() if "mos_" in name}
    model.load_state_dict(values, strict=False)
    assert_close(model(ids()).logits, plain(ids()).logits, rtol=0, atol=0)
    remove_mos(model)
    remove_hook_from_submodules(model)
    assert_close(model(ids()).logits, tiny()(ids()).logits, rtol=0, atol=0)


def test_a_model_checkpoint_reloads_without_the_adapter(tmp_path):
    model = tiny(dtype=torch.float32)
    apply_mos(model, mos(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    base = tiny(dtype=torch.float32)
    assert_close(loaded.eval()(ids()).logits, base(ids()).logits, rtol=0, atol=0)


def test_conv1d_and_linear_types():
    model = tiny("gpt2")
    applied = apply_mos(model, mos(model))
    assert all(isinstance(model.get_submodule(name), MoSConv1D) for name in applied)
    assert isinstance(model.transformer.h[0].attn.c_proj, Conv1D)
    assert isinstance(model.transformer.h[0].mlp.mos_router, MoSRouter)


@pytest.mark.parametrize("door", ["apply_mos", "load_adapter"])
def test_wrappers_that_would_not_see_the_adapter_are_refused(tmp_path, door):
    model, adapted = tiny(), tiny()
    apply_mos(adapted, mos(adapted))
    save_adapter(adapted, tmp_path)
    parallel = nn.DataParallel(model)
    wrappers = [parallel, nn.DataParallel(torch.compile(model)), torch.compile(parallel)]
    before = snapshot(model)
    for wrapped in wrappers:
        with pytest.raises(ValueError, match="in DataParallel: put the adapter on the model itself"):
            apply_mos(wrapped, mos(model)) if door == "apply_mos" else load_adapter(wrapped, tmp_path)
    assert snapshot(model) == before
    load_adapter(nn.DataParallel(adapted), tmp_path)  # whose adapter is there


def test_a_compiled_model_is_adapted_inside_its_wrapper(tmp_path):
    model = tiny()
    compiled = torch.compile(model)
    names = apply_mos(compiled, mos(model))
    assert names[0] == "model.layers.0.mlp.gate_proj" and isinstance(model.get_submodule(names[0]), MoSLinear)
    save_adapter(compiled, tmp_path)
    load_adapter(tiny(), tmp_path)
    assert remove_mos(compiled)
