"""A trained LoRA becomes the Euclidean experts of a mixture that computes the same, proven in float64."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import ids, logits, snapshot, tiny
from torch import nn

from mos_kernels import MoSConfig, MoSRouter
from mos_kernels.huggingface import load_adapter, save_adapter, start_from_lora
from mos_kernels.huggingface.from_lora import expert_groups
from mos_kernels.layer import MoSLayer

FFN = ["gate_proj", "up_proj", "down_proj"]


def lora_model(family: str = "llama", **options) -> PeftModel:
    """A tiny model with a LoRA of random values."""
    torch.manual_seed(3)
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    model = get_peft_model(tiny(family), LoraConfig(**{"r": 4, "target_modules": FFN, "task_type": task, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def layers(model: nn.Module) -> dict[str, MoSLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoSLayer)}


DRAWN = range(30)


def drawn(seed: int) -> tuple[dict, MoSConfig]:
    """Options of a LoRA, and a configuration that it can become."""
    rng = random.Random(seed)
    euclidean = rng.randint(1, 4)
    curved = euclidean * rng.randint(0, 3)
    hyperbolic = rng.randint(0, curved)
    size = (curved + euclidean) // euclidean
    k = size * rng.randint(1, euclidean)
    r = rng.choice([1, 3, 4])
    lora = {
        "r": r, "lora_alpha": rng.choice([1, 7, 16]), "use_rslora": rng.random() < 0.5,
        "target_modules": rng.choice([FFN, ["q_proj", "up_proj"], ["down_proj"]]),
        "rank_pattern": rng.choice([{}, {"layers.0.mlp.up_proj": 2}]),
        "alpha_pattern": rng.choice([{}, {"up_proj": 5}]),
    }  # fmt: skip
    config = MoSConfig(
        r=r + rng.choice([0, 0, 3]) if r > 1 else 4, lora_alpha=rng.choice([2.0, 16.0]), use_rslora=rng.random() < 0.5,
        spaces={"hyperbolic": hyperbolic, "spherical": curved - hyperbolic, "euclidean": euclidean},
        num_experts_per_tok=k, norm_topk_prob=k < curved + euclidean or rng.random() < 0.5,
        router_scope=rng.choice(["ffn", "linear"]), share_a=rng.random() < 0.6,
        mapping=rng.choice(["stereographic", "exp_log"]), domain=rng.choice(["ball", "raw"]),
        target_modules=rng.choice([lora["target_modules"], [*FFN, "q_proj", "v_proj"]]),
    )  # fmt: skip
    return lora, config


@pytest.mark.parametrize("seed", DRAWN)
def test_the_function_is_the_same_in_float64(seed, tmp_path):
    options, config = drawn(seed)
    lora = lora_model(**options)
    model = tiny()
    if seed % 2:
        lora.save_pretrained(tmp_path)
    start_from_lora(model, tmp_path if seed % 2 else lora, config)
    expected = logits(lora)
    assert (expected - logits(tiny())).abs().max() > 1e-3
    assert (logits(model) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (logits(model.train()) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_drawn_cases_reach_every_kind():
    found = [drawn(seed) for seed in DRAWN]
    assert {config.num_experts_per_tok < config.num_experts for _, config in found} == {True, False}
    assert {(config.share_a, config.router_scope) for _, config in found} == {
        (share, scope) for share in (True, False) for scope in ("ffn", "linear")
    }
    assert {config.mapping for _, config in found} == {"stereographic", "exp_log"}
    assert {set(config.spaces) == {"euclidean"} for _, config in found} == {True, False}
    assert {config.norm_topk_prob for _, config in found} == {options["use_rslora"] for options, _ in found}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "bert", "gpt2"])
def test_the_default_configuration_takes_the_loras_rank_and_linears(family, tmp_path):
    targets = {"gpt2": ["c_fc", "mlp.c_proj"], "bert": r".*\.(intermediate|output)\.dense"}.get(family, FFN)
    pattern = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}
    if family in ("gpt2", "bert"):
        pattern = {"rank_pattern": {"intermediate.dense": 2}} if family == "bert" else {}
    lora = lora_model(family, target_modules=targets, lora_dropout=0.1, fan_in_fan_out=family == "gpt2", **pattern)
    lora.save_pretrained(tmp_path)
    model = tiny(family)
    applied = start_from_lora(model, tmp_path)
    assert (logits(model) - logits(lora)).abs().max() <= 1e-12 * logits(lora).abs().max()
    config = next(iter(layers(model).values())).config
    assert config.lora_dropout == 0.1 and config.num_experts == 8
    assert ("one router per block" in applied.report()) == (family != "bert")
    save_adapter(model, tmp_path / "mixture")
    again = tiny(family)
    load_adapter(again, tmp_path / "mixture")
    assert torch.equal(logits(again), logits(model))


def test_curved_experts_start_at_zero_and_no_two_experts_stay_copies(tmp_path):
    lora = lora_model()
    model = tiny()
    start_from_lora(model, lora)
    layer = model.model.layers[0].mlp.up_proj
    curved = torch.tensor([space != "euclidean" for space in layer.config.expert_spaces])
    assert not layer.mos_lora_B[:, curved].any() and layer.mos_lora_B[:, ~curved].any()
    rows = model.model.layers[0].mlp.mos_router.weight
    assert len(rows.unique(dim=0)) == 2 and expert_groups(layer.config) == [0, 1, 0, 1, 0, 1, 0, 1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):  # the router learns of the curved experts once they have an output
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        assert layer.mos_lora_B[:, curved].any()
    for tensor in (layer.mos_lora_B.transpose(0, 1).flatten(1), rows):
        assert len(tensor.unique(dim=0)) == 8, "all experts differ"


def test_modules_trained_with_the_lora_come_along(tmp_path):
    lora = lora_model("bert", target_modules=["intermediate.dense"])
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    lora.save_pretrained(tmp_path)
    for source in (lora, tmp_path):
        model = tiny("bert")
        start_from_lora(model, source)
        assert (logits(model) - logits(lora)).abs().max() <= 1e-12 * logits(lora).abs().max()
        assert model.classifier.weight.requires_grad and not model.bert.pooler.dense.weight.requires_grad


def test_a_head_that_peft_untied_is_refused_where_the_model_ties_it(tmp_path):
    lora = get_peft_model(tiny("gemma"), LoraConfig(r=4, target_modules=FFN, modules_to_save=["lm_head"]))
    with torch.no_grad():
        lora.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    model = tiny("gemma")
    before = snapshot(model)
    with pytest.raises(ValueError, match="tied to"):
        start_from_lora(model, lora)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"spaces": {"hyperbolic": 2}, "num_experts_per_tok": 1}, "no Euclidean"),
        ({"activation": "silu"}, "activation"),
        ({"num_experts_per_tok": 3}, "whole groups"),
        ({"spaces": {"hyperbolic": 1, "euclidean": 2}, "num_experts_per_tok": 2}, "whole groups"),
        ({"norm_topk_prob": False}, "renormalise"),
        ({"r": 3}, "rank 4.*r=3"),
        ({"target_modules": ["up_proj"]}, "target_modules does not name"),
        ({"init_lora_weights": False}, "init_lora_weights"),
    ],
)
def test_what_would_not_be_the_same_is_refused(config, message):
    model, lora = tiny(), lora_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        start_from_lora(model, lora, MoSConfig(**{"r": 4, **config}))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"layer_replication": [(1, 2), (0, 1)]}, "layer_replication"),
    ],
)
def test_loras_that_are_more_than_b_a_are_refused(options, message, tmp_path):
    lora = get_peft_model(tiny(dtype=torch.float32), LoraConfig(r=4, target_modules=FFN, **options))
    lora.save_pretrained(tmp_path)
    for source in (lora, tmp_path):
        with pytest.raises(ValueError, match=message):
            start_from_lora(tiny(), source)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_lora_on_a_head_starts_where_the_head_is_the_same(tmp_path):
    """peft saves the head's own weights with it."""
    lora = lora_model(target_modules=["lm_head", "down_proj"])
    lora.save_pretrained(tmp_path)
    for source in (lora, tmp_path):
        model = tiny()
        start_from_lora(model, source)
        torch.testing.assert_close(logits(model), logits(lora), rtol=1e-12, atol=1e-12)
        other = tiny()
        other.lm_head.weight.data.mul_(2)
        with pytest.raises(ValueError, match="weights of the base that it was trained on, and this model has others"):
            start_from_lora(other, source)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    lora_model().save_pretrained(tmp_path)
    model = tiny()
    before = snapshot(model)
    weights = tmp_path / "adapter_model.safetensors"
    good = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file itself is rewritten below
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def refused(error=ValueError) -> str:
        with pytest.raises(error) as caught:
            start_from_lora(model, tmp_path)
        assert snapshot(model) == before
        return str(caught.value)

    first = next(name for name in good if "lora_A" in name)
    save_file({**good, first: torch.full_like(good[first], torch.nan)}, weights)
    assert "not finite" in refused()
    save_file({**good, first: good[first][:, :-1].contiguous()}, weights)
    assert "reads 63" in refused()
    save_file({**good, first: good[first][0].contiguous()}, weights)
    assert "are not A (r, d_in)" in refused()
    save_file({**good, "base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    assert "no LoRA of a linear" in refused()
    save_file({n: t for n, t in good.items() if "lora_B" not in n}, weights)
    assert "are not A (r, d_in)" in refused()
    weights.write_bytes(b"\x80\x04" + weights.read_bytes()[:100])
    assert "damaged" in refused()
    save_file(good, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "only a LoRA" in refused()
    (tmp_path / "adapter_config.json").write_text("{")
    assert "valid JSON" in refused()
    (tmp_path / "adapter_config.json").unlink()
    refused(FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights.rename(tmp_path / "adapter_model.bin")
    assert "pickles are never loaded" in refused(FileNotFoundError)


def test_adapted_models_and_absent_adapters_are_refused():
    lora = lora_model()
    with pytest.raises(ValueError, match="adapter already"):
        start_from_lora(lora.get_base_model(), lora)
    with pytest.raises(ValueError, match=r"no peft adapter 'other'; it has \['default'\]"):
        start_from_lora(tiny(), lora, adapter_name="other")
    with torch.device("meta"):
        on_meta = tiny()
    with pytest.raises(ValueError, match="meta"):
        start_from_lora(on_meta, lora)
    assert not any(isinstance(module, MoSRouter) for module in on_meta.modules())
