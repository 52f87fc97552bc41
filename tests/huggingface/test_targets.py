"""Which linears are targets, and the errors for what is not there, with the model as it was."""

import ast
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, snapshot, tiny
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config, T5Model

from mos_kernels import MoSConfig
from mos_kernels.huggingface import apply_mos, ffn_target_modules, remove_mos
from mos_kernels.huggingface.targets import find_targets, is_target


def refused(model, error=ValueError, **options) -> str:
    """The message with which apply_mos refuses; the model must be as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        apply_mos(model, MoSConfig(**options))
    assert snapshot(model) == before
    return str(caught.value)


def names(model, **options):
    return [target.name for target in find_targets(model, MoSConfig(**options))]


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_target_modules_are_there(family):
    model = tiny(family)
    found = names(model, target_modules=ffn_target_modules(model))
    per_layer = {"bert": 2, "gpt2": 2, "phi": 2, "gpt_neox": 2, "phi3": 2}.get(family, 3)
    assert len(found) == 2 * per_layer and not any("attn" in name or "attention" in name for name in found)


def test_t5_has_one_or_two_input_linears():
    options = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    for kind, inputs in (("relu", ["wi"]), ("gated-gelu", ["wi_0", "wi_1"])):
        model = T5Model(T5Config(**options, feed_forward_proj=kind))
        assert ffn_target_modules(model) == [*inputs, "wo"]
        assert len(names(model, target_modules=ffn_target_modules(model))) == 2 * (len(inputs) + 1)


def test_unknown_model_types_are_named():
    with pytest.raises(ValueError, match="model type None.*\\['0'\\]"):
        ffn_target_modules(nn.Sequential(nn.Linear(2, 2)))


def test_a_string_is_a_regular_expression_and_a_message_says_so():
    message = refused(tiny(), target_modules="gate_proj")
    assert "target_modules 'gate_proj' match nothing" in message and "regular expression for the whole name" in message


def test_target_that_matches_nothing_lists_what_there_is():
    message = refused(tiny("bert"))
    assert "['gate_proj', 'up_proj', 'down_proj'] match nothing in BertForSequenceClassification" in message
    assert "['query', 'key', 'value', 'dense', 'classifier']" in message
    assert "bert model use target_modules='" in message
    advice = ast.literal_eval(re.search("use target_modules=('.*')", message)[1])
    apply_mos(tiny("bert"), MoSConfig(target_modules=advice))


def test_every_entry_must_match():
    message = refused(tiny(), target_modules=["down_proj", "dwon_proj"])
    assert "['dwon_proj'] match nothing" in message
    assert "use target_modules=['gate_proj', 'up_proj', 'down_proj']" in message
    refused(tiny(), target_modules=r".*\.no_such")
    refused(nn.Sequential(nn.ReLU()), target_modules="all-linear")


def test_names_match_at_dots_only():
    assert "['proj'] match nothing" in refused(tiny(), target_modules=["proj"])
    assert names(tiny(), target_modules=["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


def test_filters_that_leave_nothing_are_named():
    assert "exclude_modules=['down_proj']" in refused(
        tiny(), target_modules=["down_proj"], exclude_modules=["down_proj"]
    )
    message = refused(tiny(), target_modules=["down_proj"], layers_to_transform=[0, 5])
    assert "layers [5]" in message and "[0, 1]" in message
    assert "layers_pattern='blocks'" in refused(
        tiny(), target_modules=["down_proj"], layers_to_transform=0, layers_pattern="blocks"
    )
    assert "give a list" in refused(tiny(), target_modules="all-linear", layers_to_transform=0)


def test_layers_and_exclusions():
    assert names(tiny(), target_modules=["down_proj"], layers_to_transform=1) == ["model.layers.1.mlp.down_proj"]
    assert names(tiny(), target_modules=["down_proj"], layers_to_transform=[0], layers_pattern="layers") == [
        "model.layers.0.mlp.down_proj"
    ]
    found = names(tiny(), target_modules="all-linear", exclude_modules=["q_proj", "layers.0.self_attn.o_proj"])
    assert len(found) == 11
    found = names(tiny(), target_modules="all-linear", exclude_modules=r".*self_attn.*")
    assert len(found) == 6
    for exclude in (["q_proj", "q_porj"], r".*q_porj"):
        with pytest.warns(UserWarning, match=r"exclude_modules=.*q_porj'\]? matches nothing in LlamaForCausalLM"):
            names(tiny(), target_modules="all-linear", exclude_modules=exclude)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target(field):
    assert "'q_proj'" in refused(tiny(), **{field: {"q_proj": 2}})


def moe(kind):
    options = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 32, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**options, num_local_experts=4))
    # layer 0 is dense: its linears match, and must not hide that layer 1's experts do not
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**options, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[0])
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_3d_experts(kind):
    model = moe(kind)
    message = refused(model)
    parameter = model.model.layers[1].mlp.experts.down_proj
    assert "experts.down_proj', a 3-D parameter of shape" in message and str(tuple(parameter.shape)) in message
    assert "nn.Linear and Conv1D" in message
    applied = apply_mos(model, MoSConfig(target_modules="all-linear"))
    assert not any("experts" in name for name in applied)
    model(torch.arange(6).view(1, 6))


def test_modules_of_other_types():
    model = tiny()
    message = refused(model, TypeError, target_modules=["embed_tokens", "down_proj"])
    assert "'model.embed_tokens', a torch.nn.modules.sparse.Embedding, no linear" in message
    assert "exclude_modules=['embed_tokens']" in message
    refused(nn.Sequential(nn.MultiheadAttention(8, 2)), TypeError, target_modules="all-linear")


def test_hooks_are_not_lost():
    model = tiny()
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert "'model.layers.0.mlp.up_proj' has hooks" in refused(model)
    handle.remove()
    apply_mos(model, MoSConfig())


def test_a_second_adapter():
    model = tiny()
    apply_mos(model, MoSConfig())
    assert "remove_mos(model) first" in refused(model)
    remove_mos(model)
    apply_mos(model, MoSConfig())


def test_a_peft_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    assert "unload it first" in refused(model)
    assert "unload it first" in refused(model.base_model.model)


def test_not_a_configuration_and_a_bare_linear():
    with pytest.raises(TypeError, match="MoSConfig"):
        apply_mos(tiny(), {"r": 8})
    assert "from_linear" in refused(nn.Linear(2, 2), target_modules="all-linear")


def test_a_failure_while_building_leaves_the_model_as_it_was(monkeypatch):
    from mos_kernels import MoSLinear

    model, calls = tiny(), []
    original = MoSLinear._add_adapter

    def failing(self, config):
        calls.append(self)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        original(self, config)

    monkeypatch.setattr(MoSLinear, "_add_adapter", failing)
    refused(model, torch.OutOfMemoryError)


segment = st.sampled_from(["a", "b", "layers", "h", "0", "1", "12", "x_a"])
path = st.lists(segment, min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(
    name=path,
    targets=st.one_of(st.lists(path, min_size=1, max_size=3), st.sampled_from([r".*a", r"a\.\d+\.b", r"(a|b).*"])),
    exclude=st.one_of(st.none(), st.lists(path, min_size=1, max_size=2), st.just(r".*b")),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), min_size=1, max_size=2)),
    pattern=st.one_of(st.none(), st.sampled_from(["layers", "h"]), st.just(["h", "layers"])),
)
def test_names_are_matched_as_peft_does(name, targets, exclude, layers, pattern):
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    from peft import LoraConfig

    if isinstance(targets, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    options = {"target_modules": targets, "exclude_modules": exclude}
    listed = [layers] if isinstance(layers, int) else layers  # peft 0.20 takes a bare 0 for none
    lora = LoraConfig(**options, layers_to_transform=listed, layers_pattern=pattern)
    theirs = tuners_utils.check_target_module_exists(lora, name)
    theirs = bool(theirs) and not isinstance(theirs, tuners_utils._ExcludedModule)
    ours = MoSConfig(**options, layers_to_transform=layers, layers_pattern=pattern)
    assert is_target(ours, name) == theirs
