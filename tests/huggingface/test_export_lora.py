"""export_lora: the best LoRA by a dense solution, exact where there is an exact one, through both doors, merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft_setup import peft_model
from tiny_models import FAMILIES, MATRIX, ids, mos, snapshot, tiny
from torch import nn
from torch.nn.functional import kl_div
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from mos_kernels import MoSConfig, MoSLinear
from mos_kernels.functional import mos_linear
from mos_kernels.huggingface import MoSPeftConfig, apply_mos, export_lora, load_adapter, save_adapter
from mos_kernels.huggingface.lora_fit import LinearFit
from mos_kernels.huggingface.modules import active_names, mos_adapters

FLAT = {"spaces": {"euclidean": 4}, "num_experts_per_tok": 4}


def batches(count: int = 5, batch: int = 2, length: int = 7) -> list[dict]:
    return [{"input_ids": ids(seed, batch, length)} for seed in range(count)]


def adapted(family: str = "llama", dtype=torch.float64, **options) -> nn.Module:
    model = tiny(family, dtype)
    torch.manual_seed(1)
    apply_mos(model, mos(model, **options))
    return model


def steady(model: nn.Module) -> nn.Module:
    """The model with routers at 0: every token has the same gates."""
    for name, parameter in model.named_parameters():
        if "mos_router" in name:
            parameter.data.zero_()
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def product(folder) -> dict[str, torch.Tensor]:
    """B A of each linear in an exported folder, float64."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def close(a: torch.Tensor, b: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()) + 1e-12)


# exact where it can be


@pytest.mark.parametrize("family", [*MATRIX, "phi3", "gpt2"])
@pytest.mark.parametrize("scope", ["ffn", "linear"])
def test_euclidean_experts_with_steady_gates_come_out_exact_and_merge(family, scope, tmp_path):
    model = steady(adapted(family, router_scope=scope, **FLAT))
    wanted = outputs(model)
    report = export_lora(model, batches(), tmp_path / "lora", rank=4)
    assert report.error < 1e-6 and report.kl < 1e-12 and report.agreement == 1
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path / "lora")
    assert (outputs(tiny(family)) - wanted).abs().max() > 1e-3
    close(outputs(loaded), wanted, 1e-9)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(tiny(family))
    close(outputs(merged), wanted, 1e-9)


def test_it_is_exact_off_the_calibration_data_and_with_an_A_each(tmp_path):
    model = steady(adapted(share_a=False, **FLAT))
    one = [{"input_ids": ids(3, 1, 2)}]  # two tokens, where the linears read 32 and 64 numbers
    export_lora(model, one, tmp_path / "lora", rank=16, ridge=1e-2)
    close(outputs(PeftModel.from_pretrained(tiny(), tmp_path / "lora")), outputs(model), 1e-8)


def test_an_adapter_that_adds_nothing_is_said(tmp_path):
    model = adapted(init_lora_weights=True)
    report = export_lora(model, batches(2), tmp_path / "lora")
    assert set(report.linears.values()) == {None} and report.error == 0 and report.kl == 0
    assert "adds nothing at 6 of the linears" in str(report)
    close(outputs(PeftModel.from_pretrained(tiny(), tmp_path / "lora")), outputs(model), 1e-12)


# the best there is


class One(nn.Module):
    """A linear with an adapter, by itself."""

    def __init__(self, config: MoSConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = MoSLinear(d_in, d_out, config=config, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def addition(layer, x, gates=None) -> torch.Tensor:
    """Δ of a layer on x."""
    zeros = x.new_zeros(*x.shape[:-1], layer.mos_lora_B.shape[0])
    return mos_linear(
        x, None, None, layer.mos_lora_A, layer.mos_lora_B, layer.curvature, config=layer.config, base_output=zeros,
        gates=gates, router=layer.mos_router if gates is None else None, inference=True,
    )  # fmt: skip


def dense_solution(x: torch.Tensor, delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best M (d_out, d_in) of that rank for delta ≈ x Mᵀ by least squares: whitened by C's symmetric root."""
    full = torch.linalg.lstsq(x, delta, driver="gelsd").solution.T
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = values.clamp(min=0).sqrt()
    U, S, Vh = torch.linalg.svd(full @ (vectors * root) @ vectors.T, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank] @ (vectors / root) @ vectors.T


def test_statistics_of_float32_inputs_are_float64_sums():
    """In float32 the squares of large inputs lose what the fit needs."""
    layer = MoSLinear(5, 3, config=MoSConfig(r=2, init_lora_weights=False, router_scope="linear"))
    fit = LinearFit("linear", layer, layer, None)
    parts = [1e3 + torch.randn(400, 5) for _ in range(20)]
    with torch.no_grad():
        for part in parts:
            fit.add(part, None)
    x = torch.cat(parts).double()
    assert fit.C.dtype == fit.D.dtype == fit.gates.dtype == torch.float64 and fit.tokens == 8000
    torch.testing.assert_close(fit.C, x.T @ x, rtol=1e-13, atol=0)
    torch.testing.assert_close(fit.gates.sum(), torch.tensor(8000.0, dtype=torch.float64), rtol=1e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 9), d_out=st.integers(1, 9), rank=st.integers(1, 10), seed=st.integers(0, 99),
    share_a=st.booleans(), activation=st.sampled_from(["identity", "gelu"]),
    sizes=st.lists(st.integers(1, 40), max_size=4),
)  # fmt: skip
def test_it_is_the_dense_solution_in_float64(d_in, d_out, rank, seed, share_a, activation, sizes, tmp_path_factory):
    torch.manual_seed(seed)
    config = MoSConfig(
        r=3, router_scope="linear", init_lora_weights=False, share_a=share_a, activation=activation,
        target_modules=["linear"],
    )  # fmt: skip
    model = One(config, d_in, d_out).eval()
    data = [torch.randn(size, d_in, dtype=torch.float64) for size in [*sizes, 30]]
    folder = tmp_path_factory.mktemp("export") / "lora"
    report = export_lora(model, data, folder, rank=rank, ridge=1e-14)
    x = torch.cat(data)
    with torch.no_grad():
        delta = addition(model.linear, x)
        best = dense_solution(x, delta, rank)
    found = product(folder)["linear"]
    close(found, best, 1e-5)
    error = (delta - x @ best.T).norm() / delta.norm()
    assert math.isclose(report.linears["linear"], error, rel_tol=1e-6, abs_tol=1e-6)
    assert report.tokens == len(x) and torch.linalg.matrix_rank(found) <= rank


def test_layer_after_layer_is_the_dense_solution_on_what_the_export_before_gives(tmp_path):
    model = adapted()
    data = batches(12)
    report = export_lora(model, data, tmp_path / "lora", rank=3, at_once=1, ridge=1e-12)
    order = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    assert report.passes == 6 and list(report.linears) == order
    found, student = product(tmp_path / "lora"), copy.deepcopy(model)
    for name in order:
        layer, seen = student.get_submodule(name), []
        handle = layer.register_forward_hook(
            lambda layer, args, kwargs, y, seen=seen: seen.append((args[0], (*args, kwargs.get("gates"))[1])),
            with_kwargs=True,
        )
        with torch.no_grad():
            for batch in data:
                student(**batch)
            handle.remove()
            x = torch.cat([x.flatten(0, -2) for x, _ in seen])
            delta = addition(layer, x, torch.cat([gates.flatten(0, -2) for _, gates in seen]))
            best = dense_solution(x, delta, 3)
            close(found[name], best, 1e-5)
            layer.mos_lora_B.zero_()  # from here on this linear is the export's
            layer.weight += best


def test_all_at_once_sees_no_export(tmp_path):
    model = adapted()
    one = export_lora(model, batches(12), tmp_path / "one", rank=3, at_once=1)
    all_ = export_lora(model, batches(12), tmp_path / "all", rank=3, at_once=6)
    assert (one.passes, all_.passes) == (6, 1)
    first, second = product(tmp_path / "one"), product(tmp_path / "all")
    close(first["model.layers.0.mlp.up_proj"], second["model.layers.0.mlp.up_proj"], 1e-12)
    down = "model.layers.1.mlp.down_proj"
    assert (first[down] - second[down]).abs().max() > 1e-6


def test_a_pass_stops_at_the_last_linear_that_it_needs(tmp_path):
    model, data, calls = adapted(), batches(12), [0, 0]

    def count(layer, *_):
        calls[layer.self_attn.layer_idx] += 1

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count)
    export_lora(model, data, tmp_path / "lora", rank=3, at_once=1)
    assert calls[0] - calls[1] == 3 * len(data)  # the passes for the three linears of the first layer


def test_by_default_a_pass_fits_a_tenth_of_the_linears(tmp_path):
    kind, config, options = FAMILIES["llama"]
    model = kind(config(**{**options, "num_hidden_layers": 7})).double()
    apply_mos(model, mos(model))
    report = export_lora(model, batches(1), tmp_path / "lora", rank=1)
    assert len(report.linears) == 21 and report.passes == 7  # three in each


# what it does not depend on


def test_batches_of_any_size_and_padding_on_any_side(tmp_path):
    model = adapted()
    whole = [{"input_ids": ids(0, 6, 5)}]
    export_lora(model, whole, tmp_path / "whole", rank=3)
    parts = [{"input_ids": row[None]} for row in ids(0, 6, 5)]
    export_lora(model, parts, tmp_path / "parts", rank=3)
    padded = []
    for side in (0, 1):
        rows, pad = ids(0, 6, 5)[3 * side : 3 * side + 3], torch.zeros(3, 2, dtype=torch.long)
        tokens = torch.cat([rows, pad] if side else [pad, rows], 1)
        mask = torch.cat([torch.ones_like(rows), pad] if side else [pad, torch.ones_like(rows)], 1)
        padded.append({"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    report = export_lora(model, padded, tmp_path / "padded", rank=3)
    assert report.tokens == 30 and report.positions == 24
    for name, wanted in product(tmp_path / "whole").items():
        close(product(tmp_path / "parts")[name], wanted, 1e-7)
        close(product(tmp_path / "padded")[name], wanted, 1e-7)


def with_ffns(model, *names: str) -> nn.Module:
    torch.manual_seed(1)
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=list(names)))
    return model


@pytest.mark.parametrize("targets", [["wi_0", "wi_1", "wo"], "all-linear"])
def test_an_encoder_and_a_decoder_have_padding_of_their_own(targets, tmp_path):
    """Also where both are padded to one length, so that either mask would fit."""
    torch.manual_seed(0)
    options = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**options, dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    model = model.double().eval()
    torch.manual_seed(1)
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=targets))
    source, target, parts, padded = ids(0, 2, 6), ids(1, 2, 6), [], {}
    for name, tokens, lengths in (("", source, (4, 6)), ("decoder_", target, (6, 3))):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        padded |= {f"{name}input_ids": tokens.masked_fill(~mask, 0), f"{name}attention_mask": mask.long()}
        parts.append([row[None, :length] for row, length in zip(tokens, lengths, strict=True)])
    alone = [{"input_ids": x, "decoder_input_ids": y} for x, y in zip(*parts, strict=True)]
    for name, data in (("padded", [padded]), ("alone", alone)):
        report = export_lora(model, data, tmp_path / name, rank=3)
        assert report.tokens == 10 and report.positions == 9
    for name, wanted in product(tmp_path / "alone").items():
        close(product(tmp_path / "padded")[name], wanted, 1e-6)


def test_padding_is_left_out_where_ffns_get_the_tokens_in_rows(tmp_path):
    torch.manual_seed(0)
    options = {"vocab_size": 48, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**options, num_attention_heads=2, max_position_embeddings=32, dropout=0.0))
    model = with_ffns(model.double().eval(), "fc1", "fc2")
    lengths = torch.tensor([4, 6])
    mask = torch.arange(6) < lengths[:, None]
    alone = [{"input_ids": row[None, :length]} for row, length in zip(ids(0, 2, 6), lengths, strict=True)]
    padded = [{"input_ids": ids(0, 2, 6), "attention_mask": mask.long()}]
    for name, data in (("padded", padded), ("alone", alone)):
        assert export_lora(model, data, tmp_path / name, rank=3).tokens == 10
    for name, wanted in product(tmp_path / "alone").items():
        close(product(tmp_path / "padded")[name], wanted, 1e-6)


@pytest.mark.parametrize("family", MATRIX)
def test_both_doors_give_the_same_and_leave_the_model_alone(family, tmp_path):
    model = adapted(family).train()
    save_adapter(model, tmp_path / "mos")
    by_peft = PeftModel.from_pretrained(tiny(family), tmp_path / "mos")
    data = [{**batch, "labels": torch.arange(2) if family == "bert" else batch["input_ids"]} for batch in batches(3)]
    before = snapshot(model), snapshot(by_peft)
    reports = [export_lora(m, data, tmp_path / f"{i}" / "lora", rank=3) for i, m in enumerate((model, by_peft))]
    assert (snapshot(model), snapshot(by_peft)) == before
    assert reports[0].linears.keys() == reports[1].linears.keys()
    for name, wanted in product(tmp_path / "0" / "lora").items():
        close(product(tmp_path / "1" / "lora")[name], wanted, 1e-9)
    config = [json.loads((tmp_path / f"{i}" / "lora" / "adapter_config.json").read_text()) for i in (0, 1)]
    assert config[0]["target_modules"] == config[1]["target_modules"] and config[0]["r"] == 3
    assert math.isclose(reports[0].kl, reports[1].kl, rel_tol=1e-6, abs_tol=1e-12) and reports[0].loss is not None


def test_a_model_that_was_frozen_for_inference_stays_so(tmp_path):
    model = adapted()
    for layer in mos_adapters(model).values():
        layer.freeze_for_inference()
    export_lora(model, batches(2), tmp_path / "lora")
    assert all(layer._kept is not None for layer in mos_adapters(model).values())


# the folder


def test_a_trained_head_goes_with_it(tmp_path):
    model = adapted("bert")
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.classifier.weight.normal_()
    export_lora(model, batches(), tmp_path / "lora", rank=16)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "lora")
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, model.classifier.weight)

    by_peft = peft_model("bert", modules_to_save=["classifier"])
    export_lora(by_peft, batches(), tmp_path / "second", rank=16)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / "second")
    own = by_peft.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(again.base_model.model.classifier.modules_to_save["default"].weight, own)


@pytest.mark.parametrize("trained", ["classifier", "classifier.out_proj", None])
@pytest.mark.parametrize("by_peft", [False, True])
def test_a_head_of_several_layers_is_exported_whole(trained, by_peft, tmp_path):
    """peft copies all of it for the adapter."""
    torch.manual_seed(0)
    options = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = RobertaConfig(**options, num_attention_heads=2, max_position_embeddings=32)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")

    def base():
        return RobertaForSequenceClassification.from_pretrained(tmp_path / "base").eval()

    model = base()
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=["query", "dense"],
                               exclude_modules=["classifier.dense"], **FLAT))  # fmt: skip
    if trained:
        model.get_submodule(trained).requires_grad_(True)
    with torch.no_grad():
        model.classifier.out_proj.weight.normal_()
    steady(model)
    if by_peft and trained == "classifier":
        save_adapter(model, tmp_path / "mos")
        model = PeftModel.from_pretrained(base(), tmp_path / "mos")
    export_lora(model, batches(), tmp_path / "lora", rank=8)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    close(outputs(loaded), outputs(model), 1e-5)
    close(outputs(loaded.merge_and_unload()), outputs(model), 1e-5)


@pytest.mark.parametrize(
    "family, targets, trained, message",
    [
        ("roberta", ["dense"], None, "'classifier.dense' has an adapter, and 'classifier', which was trained or is"),
        ("distilbert", "all-linear", None, "'pre_classifier' has an adapter, and 'classifier'"),
        ("llama", ["up_proj"], "model.layers.0.mlp", "'model.layers.0.mlp.up_proj', which was trained"),
        ("llama", ["up_proj"], "model.layers.0.mlp.up_proj.bias", "or keep its weight and bias frozen"),
    ],
)
def test_a_linear_inside_what_is_exported_whole_is_refused(family, targets, trained, message, tmp_path):
    """peft would copy the module, and drop the LoRA of the copy."""
    torch.manual_seed(0)
    if family == "roberta":
        kind, config = RobertaForSequenceClassification, RobertaConfig(hidden_size=16, num_attention_heads=2)
    elif family == "distilbert":
        kind, config = DistilBertForSequenceClassification, DistilBertConfig(dim=16, hidden_dim=32, n_heads=2)
    else:
        kind, config = LlamaForCausalLM, LlamaConfig(hidden_size=16, num_attention_heads=2, mlp_bias=True)
    for name in ("num_hidden_layers", "intermediate_size", "vocab_size"):
        setattr(config, name, {"num_hidden_layers": 1, "vocab_size": 48}.get(name, 32))
    model = kind(config)
    apply_mos(model, MoSConfig(r=2, target_modules=targets))
    if trained is not None:
        owner, _, name = trained.rpartition(".")
        getattr(model.get_submodule(owner), name).requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        export_lora(model, batches(1), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_part_is_exported_with_what_was_trained_there(tmp_path):
    model = tiny()
    torch.manual_seed(1)
    apply_mos(model.model, mos(model, **FLAT))
    steady(model).lm_head.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight.normal_()
    export_lora(model, batches(), tmp_path / "lora", rank=4)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora")
    close(outputs(loaded), outputs(model), 1e-9)
    model.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match="is on model alone: if other parts .*not exported .lm_head.weight"):
        export_lora(model, batches(1), tmp_path / "second", rank=4)


def test_a_tied_head_is_said(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
                         vocab_size=48, tie_word_embeddings=True)  # fmt: skip
    for by_peft in (False, True):
        model = LlamaForCausalLM(config)
        options = {"r": 2, "target_modules": ["up_proj", "lm_head"], "init_lora_weights": False}
        if by_peft:
            model = get_peft_model(model, MoSPeftConfig(**options))
        else:
            apply_mos(model, MoSConfig(**options))
        report = export_lora(model, batches(1), tmp_path / f"{by_peft}")
        assert report.tied == ("lm_head",) and "lm_head shares its weight with another module" in str(report)
        assert "lm_head shares its weight" in (tmp_path / f"{by_peft}" / "README.md").read_text()


def test_prompts_beside_the_adapter_are_refused(tmp_path):
    model = get_peft_model(adapted(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="has a PromptTuningConfig too, which no LoRA can hold"):
        export_lora(model, batches(1), tmp_path / "lora")


def test_a_model_that_transformers_gave_its_adapter(tmp_path):
    """Without asking for the latest peft, as transformers' own active_adapters() does."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapted()
    save_adapter(model, tmp_path / "mos")
    served = type(model).from_pretrained(tmp_path / "base", dtype=torch.float64)
    served.load_adapter(str(tmp_path / "mos"))
    assert active_names(served) == ["default"]
    reports = [export_lora(m, batches(2), tmp_path / f"{i}", rank=3) for i, m in enumerate((model, served))]
    assert reports[0].linears.keys() == reports[1].linears.keys()
    for name, wanted in product(tmp_path / "0").items():
        close(product(tmp_path / "1")[name], wanted, 1e-9)


def test_the_card_of_a_model_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6))
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=["0"]))
    assert export_lora(model, [torch.randn(9, 4)], tmp_path / "lora").tokens == 9
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "base = ...  # the Sequential that the adapter was trained on" in card
    assert "from transformers" not in card


def test_a_model_of_other_inputs_than_tokens_gets_no_task_and_runs(tmp_path):
    """peft's class for encoder-decoders would pass input_ids on."""
    torch.manual_seed(0)
    options = {"vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
               "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4,
               "max_source_positions": 10, "max_target_positions": 20, "pad_token_id": 1, "bos_token_id": 0,
               "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**options)).eval()
    base = copy.deepcopy(model)
    labels = torch.tensor([[5, 6, 7, 2, -100], [5, 6, 2, -100, -100]])
    data = {"input_features": torch.randn(2, 4, 20), "labels": labels}
    report = export_lora(with_ffns(model, "fc1", "fc2"), [data], tmp_path / "lora", rank=2)
    assert report.tokens == 20 and report.positions == 7
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    with torch.no_grad():
        assert math.isclose(loaded(**data).loss, report.loss[1], rel_tol=1e-5)


def test_only_some_linears_are_named_in_full(tmp_path):
    model = tiny()
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=["layers.1.mlp.up_proj"]))
    export_lora(model, batches(2), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert len(PeftModel.from_pretrained(tiny(), tmp_path / "lora").base_model.targeted_module_names) == 1


def test_the_report_is_what_the_two_models_show_and_the_card_has_it(tmp_path):
    model = adapted()
    labels = ids(9).clone()
    labels[0, :4] = -100
    data = [{"input_ids": ids(9), "labels": labels}]
    report = export_lora(model, batches(), tmp_path / "lora", evaluation_batches=data)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora")
    with torch.no_grad():
        ours, theirs = model(**data[0]), loaded(**data[0])
    kept = labels[:, 1:] != -100
    p, q = (output.logits[:, :-1][kept].log_softmax(-1) for output in (ours, theirs))
    assert math.isclose(report.kl, kl_div(q, p, reduction="batchmean", log_target=True), rel_tol=1e-4)
    assert report.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean() and report.positions == kept.sum() == 9
    assert math.isclose(report.loss[0], ours.loss, rel_tol=1e-6) and math.isclose(
        report.loss[1], theirs.loss, rel_tol=1e-5
    )
    assert report.accuracy[0] == (p.argmax(-1) == labels[:, 1:][kept]).double().mean()
    parameters = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert report.parameters == (sum(p.numel() for n, p in model.named_parameters() if "mos_" in n), parameters)
    assert abs(parameters - report.parameters[0]) < parameters / report.rank
    card = (tmp_path / "lora" / "README.md").read_text()
    assert all(line in card for line in report.summary() + report.table()) and "AutoModel" not in card


def test_a_batch_without_a_label_that_counts_changes_no_loss(tmp_path):
    model, data = adapted(), [{"input_ids": ids(9), "labels": ids(9)}]
    report = export_lora(model, batches(), tmp_path / "lora", evaluation_batches=data)
    ignored = {"input_ids": ids(8), "labels": torch.full_like(ids(8), -100)}
    more = export_lora(model, batches(), tmp_path / "more", evaluation_batches=[ignored, *data])
    assert (more.loss, more.kl, more.accuracy, more.positions) == (report.loss, report.kl, report.accuracy, 12)
    assert export_lora(model, batches(), tmp_path / "none", evaluation_batches=[ignored]).loss is None


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bfloat16_base(family, tmp_path):
    model = adapted(family, torch.bfloat16)
    report = export_lora(model, batches(12), tmp_path / "lora", rank=16)
    assert report.error < 0.5
    loaded = PeftModel.from_pretrained(tiny(family, torch.bfloat16), tmp_path / "lora")
    exact = steady(adapted(family, torch.bfloat16, **FLAT))
    report = export_lora(exact, batches(12), tmp_path / "exact", rank=4)
    assert report.error < 1e-5 and loaded is not None


# bad input


class ReadOnce:
    """As a stream is: not an iterator itself, but of one."""

    def __init__(self):
        self.rest = iter([{"input_ids": ids()}])

    def __iter__(self):
        return self.rest


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"at_once": 0}, "at_once=0"),
        ({"ridge": 0.0}, "ridge=0.0 must be a positive number"),
        ({"ridge": math.nan}, "ridge=nan"),
        ({"calibration_batches": []}, "no calibration batches"),
        ({"calibration_batches": iter([{"input_ids": ids()}])}, "is an iterator, and several passes"),
        ({"calibration_batches": {"input_ids": ids()}}, "pass a list of batches"),
        ({"calibration_batches": ids()}, "pass a list of batches"),
        ({"calibration_batches": [{"input_ids": ids(), "attention_mask": torch.zeros(2, 7)}]}, "no token of"),
        ({"calibration_batches": [ids()[:, :0]]}, "a batch holds no tokens .shape .2, 0..: leave it out"),
        ({"calibration_batches": [*batches(1), ids()[:0]]}, "a batch holds no tokens .shape .0, 7."),
        ({"calibration_batches": [{}]}, "a batch holds no tokens .no tensor."),
        ({"calibration_batches": [{"input_ids": [[3, 4]]}]}, "holds no tensor .input_ids: list.: pass tensors"),
        ({"calibration_batches": [{"input_ids": ids()[0]}]}, "shape .7,.: make it .batch, sequence."),
        ({"calibration_batches": [ids()[0]]}, "shape .7,.: make it .batch, sequence."),
        ({"ridge": 1e-30}, "ridge=1e-30 is too small for the 14 tokens that reached"),
        ({"calibration_batches": ReadOnce()}, "were empty when read again"),
        ({"evaluation_batches": [ids()[:0]]}, "a batch holds no tokens"),
        ({"calibration_batches": [(ids(),)]}, "a batch is a tuple: make it a dictionary"),
        ({"evaluation_batches": iter([])}, "evaluation_batches is an iterator"),
        ({"evaluation_batches": []}, "there are no evaluation_batches"),
        ({"model": tiny()}, "LlamaForCausalLM has no active MoS adapter, put one on"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_written(change, message, tmp_path):
    arguments = {"model": adapted(), "calibration_batches": batches(1), "folder": tmp_path / "lora", **change}
    before = snapshot(arguments["model"])
    with pytest.raises(ValueError, match=message):
        export_lora(**arguments)
    assert snapshot(arguments["model"]) == before and list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "file").write_text("mine")
    model = adapted()
    export_lora(model, batches(1), tmp_path / "lora", rank=1)
    for name in ("lora", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there already"):
            export_lora(model, batches(1), tmp_path / name, rank=1)
    with pytest.raises(NotADirectoryError, match="file is a file"):
        export_lora(model, batches(1), tmp_path / "file" / "lora", rank=1)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_stays_the_same_one(tmp_path, monkeypatch):
    """It may be a link, a mount or the current folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    number = (tmp_path / "folder").stat().st_ino
    export_lora(adapted(), batches(1), tmp_path / "link", rank=1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder").stat().st_ino == number
    assert len(list((tmp_path / "folder").iterdir())) == 3
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    export_lora(adapted(), batches(1), ".", rank=1)
    assert (tmp_path / "current" / "adapter_config.json").is_file()


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_that_another_process_is_writing_is_refused(empty, tmp_path):
    """Locks are of an open file, so a second export in this process stands for one in another process."""
    folder, model = tmp_path / "new" / "lora", adapted()
    if empty:
        folder.mkdir(parents=True)
    seen = []

    class Batches(list):
        def __iter__(self):
            if not seen:
                seen.append(len(list(tmp_path.iterdir())))
                with pytest.raises(FileExistsError, match="another process is writing .*lora: in a job of several"):
                    export_lora(model, batches(1), folder, rank=1)
                export_lora(model, batches(1), tmp_path / "other", rank=1)
            return super().__iter__()

    export_lora(model, Batches(batches(1)), folder, rank=1)
    assert seen == [1] and sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]
    assert len(list(folder.iterdir())) == 3


def test_what_a_killed_export_left_is_not_taken(tmp_path):
    (tmp_path / ".lora.new").mkdir()
    (tmp_path / ".lora.new" / "README.md").write_text("the card of another")
    export_lora(adapted(), batches(1), tmp_path / "lora", rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert "A LoRA exported" in (tmp_path / "lora" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="lora cannot be written .*Permission denied.*: name another folder"):
        export_lora(adapted(), [{"no": ids()}], tmp_path / "lora")


def test_values_that_are_not_finite_are_refused(tmp_path):
    model = adapted()
    with torch.no_grad():
        mos_adapters(model)["model.layers.1.mlp.up_proj"].mos_lora_B[0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="at 'model.layers.1.mlp.up_proj' are not finite"):
        export_lora(model, batches(1), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_the_data_does_not_use_is_refused(tmp_path):
    model = adapted()
    model.spare = copy.deepcopy(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="reached 'spare.gate_proj'"):
        export_lora(model, batches(1), tmp_path / "lora")


def test_a_linear_in_two_places_is_refused(tmp_path):
    model = adapted()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    with pytest.raises(ValueError, match="'model.layers.0.mlp.up_proj' is one linear in 2 places"):
        export_lora(model, batches(1), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_of_pefts_adapters_the_active_one(tmp_path):
    model = peft_model()
    torch.manual_seed(5)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    export_lora(model, batches(2), tmp_path / "second", rank=3)
    model.set_adapter("default")
    export_lora(model, batches(2), tmp_path / "first", rank=3)
    names = list(product(tmp_path / "first"))
    assert (product(tmp_path / "first")[names[0]] - product(tmp_path / "second")[names[0]]).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="several active adapters, .'default', 'second'.: choose one"):
        export_lora(model, batches(2), tmp_path / "both")
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        export_lora(model, batches(2), tmp_path / "none")


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_two_adapters_on_different_linears_with_what_comes_with_either(order, tmp_path):
    model = peft_model(target_modules=["up_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", dataclasses.replace(model.peft_config["default"], target_modules=["down_proj"],
                                                    modules_to_save=None))  # fmt: skip
    model.base_model.set_adapter(order)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.normal_()
    assert len(export_lora(model, batches(1), tmp_path / "lora", rank=1).linears) == 4
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora")
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, head)


def test_peft_says_where_to_go_when_it_cannot_merge():
    with pytest.raises(NotImplementedError, match="export_lora"):
        peft_model().merge_and_unload()


def test_a_head_that_was_loaded_goes_with_it(tmp_path):
    model = adapted("bert")
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.classifier.weight.normal_()
    save_adapter(model, tmp_path / "mos")
    again = tiny("bert")
    load_adapter(again, tmp_path / "mos")
    export_lora(again, batches(2), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "lora")
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, model.classifier.weight)
