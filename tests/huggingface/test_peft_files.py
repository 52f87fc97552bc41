"""Adapter files that are damaged, hostile or foreign, through peft's door: refused, nothing executed, nothing changed.

peft reads the configuration through MoSPeftConfig before it touches the model, and asks the tuner to put the adapter on
before it reads the tensors: what the files alone show is refused at the first, what the model has to say at the second.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil

import pytest
import torch
import transformers.integrations.peft
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_setup import config, peft_model
from safetensors.torch import load_file, save_file
from tiny_models import aligned, ids, logits, mos, snapshot, tiny
from transformers import AutoModel, AutoModelForCausalLM, DistilBertConfig, DistilBertForSequenceClassification

from mos_kernels import MoSConfig
from mos_kernels.huggingface import MoSPeftConfig, apply_mos, load_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.fixture
def folder(tmp_path):
    peft_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **tensors) -> None:
    """Replace tensors of the first up_proj; None takes one out."""
    found = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        found.pop(UP + name, None)
        if tensor is not None:
            found[UP + name] = tensor
    save_file(found, folder / WEIGHTS)


def reconfigure(folder, **values) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **values}))


def refused(folder, error=ValueError) -> str:
    """The message of both of peft's ways to load, and that no model changed."""
    plain, adapted = tiny(), peft_model()
    before = snapshot(plain), snapshot(adapted)
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(plain, folder)
    with pytest.raises(error) as again:
        adapted.load_adapter(folder, "other")
    assert (snapshot(plain), snapshot(adapted)) == before and list(adapted.peft_config) == ["default"]
    assert str(caught.value) == str(again.value)
    return str(caught.value)


B = torch.zeros(64, 8, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mos_lora_B": B + torch.nan}, "not finite"),
        ({"mos_lora_B": B - torch.inf}, "not finite"),
        ({"mos_curvature": torch.full((8,), 1e300, dtype=torch.float64)}, "not finite"),
        ({"mos_lora_B": B[:, :7].contiguous()}, "up_proj.mos_lora_B has shape"),
        ({"mos_lora_A": torch.zeros(3, 32)}, "r=4"),
        ({"mos_curvature": torch.zeros(1, 8)}, "up_proj.mos_curvature has shape"),
        ({"mos_lora_B": B.int()}, "torch.int32"),
    ],
    ids=str,
)
def test_tensors_that_the_files_alone_show_to_be_wrong(folder, tensors, message):
    rewrite(folder, **tensors)
    assert message in refused(folder)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights(folder, part):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(part * len(content))])
    assert "truncated or damaged" in refused(folder)


def test_a_pickle_is_not_read(folder):
    class Payload:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    assert "pickles are never loaded" in refused(folder, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="pickles are never loaded"):
        load_adapter(tiny(), folder)
    tiny(dtype=torch.float32).save_pretrained(folder / "base")
    reconfigure(folder, base_model_name_or_path=str(folder / "base"))
    with pytest.raises(FileNotFoundError, match="pickles are never loaded"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    assert "truncated or damaged" in refused(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds"), ({"r": -1}, "r=-1"),
        ({"r": 10**9}, "r=1000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha"), ({"spaces": {"flat": 3}}, "unknown geometries"),
        ({"from_the_future": 3}, "from_the_future"), ({"target_modules": "("}, "regular expression"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations(folder, values, message):
    reconfigure(folder, **values)
    assert message in refused(folder)


def test_a_configuration_that_is_no_json(folder):
    (folder / CONFIG).write_text('{"peft_type": "MOSELORA", ')
    refused(folder)


def test_the_weights_may_come_later_and_options_that_are_off_are_nothing(folder):
    reconfigure(folder, from_the_future=None)
    PeftModel.from_pretrained(tiny(), folder)
    (folder / WEIGHTS).unlink()
    assert config().__class__.from_pretrained(folder).r == 4


# every kind of damage, through every door


def head(folder, tensor) -> None:
    change(folder, **{HEAD: tensor})


def change(folder, **tensors) -> None:
    """Replace or add tensors; None takes one out."""
    found = load_file(folder / WEIGHTS)
    found |= {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / WEIGHTS)


def another(folder, **options) -> None:
    """The files of a model with other numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(**{**tiny().config.to_dict(), **options})).double()
    get_peft_model(other, config(modules_to_save=["lm_head"])).save_pretrained(folder)


def truncate(folder, part: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(part * len(content))])


def pickled(folder, name: str) -> None:
    class Payload:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload()))


PREFIX, HEAD = "base_model.model.", "lm_head.weight"
DAMAGE = {
    "cut off at the start": (lambda folder: truncate(folder, 0), "truncated or damaged"),
    "cut off in the header": (lambda folder: truncate(folder, 0.01), "truncated or damaged"),
    "cut off at the end": (lambda folder: truncate(folder, 0.999), "truncated or damaged"),
    "a pickle": (lambda folder: pickled(folder, "adapter_model.bin"), "pickles are never loaded"),
    "a pickle by the other name": (lambda folder: pickled(folder, WEIGHTS), "truncated or damaged"),
    "NaN": (lambda folder: rewrite(folder, mos_lora_B=B + torch.nan), "not finite"),
    "infinite in float32": (
        lambda folder: change(folder, **{ROUTER: torch.full((8, 32), 1e300, dtype=torch.float64)}),
        "finite",
    ),
    "NaN in the head": (lambda folder: head(folder, torch.full((48, 32), torch.nan)), "not finite"),
    "integers": (lambda folder: rewrite(folder, mos_lora_B=B.int()), "torch.int32"),
    "another rank": (lambda folder: reconfigure(folder, r=3), "r=3|of another shape"),
    "a tensor of another shape": (lambda folder: rewrite(folder, mos_lora_A=torch.zeros(4, 31)), "of another shape"),
    "a router of another shape": (lambda folder: change(folder, **{ROUTER: torch.zeros(8, 31)}), "of another shape"),
    "a head of another shape": (lambda folder: head(folder, torch.zeros(47, 32)), "of another shape"),
    "a tensor too few": (lambda folder: rewrite(folder, mos_lora_A=None), "1 missing"),
    "a router too few": (lambda folder: change(folder, **{ROUTER: None}), "1 missing"),
    "no head": (lambda folder: head(folder, None), "1 missing"),
    "a tensor too many": (lambda folder: rewrite(folder, mos_router=torch.zeros(8, 32)), "1 unexpected"),
    "a weight of the base": (lambda folder: change(folder, **{BASE: torch.zeros(32, 32)}), "1 unexpected"),
    "a wider model's": (lambda folder: another(folder, intermediate_size=96), "of another shape"),
    "a deeper model's": (lambda folder: another(folder, num_hidden_layers=3), "unexpected"),
    "a shallower model's": (lambda folder: another(folder, num_hidden_layers=1), "missing"),
    "another adapter's head": (
        lambda folder: change(folder, **{"lm_head.modules_to_save.default.weight": torch.zeros(48, 32)}),
        "1 unexpected",
    ),
    "the base's head": (
        lambda folder: change(folder, **{"lm_head.original_module.weight": torch.zeros(48, 32)}),
        "1 unexpected",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "the adapter has no weights"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text('{"peft_type": "MOSELORA", '), "property name|JSON"),
    "an option of the future": (lambda folder: reconfigure(folder, from_the_future=3), "from_the_future"),
}
ROUTER, BASE = "model.layers.0.mlp.mos_router.weight", "model.layers.0.self_attn.q_proj.weight"


def on_the_hub(folder) -> dict:
    """How to open the files as those of a repository that was downloaded."""
    cache = folder.parent / "cache" / "models--someone--adapter"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    return {"model_id": "someone/adapter", "cache_dir": str(cache.parent)}


def with_a_head() -> PeftModel:
    return peft_model(seed=1, modules_to_save=["lm_head"])


def own_adapter(folder):
    model = tiny()
    apply_mos(model, MoSConfig(r=4, init_lora_weights=False))
    return model


DOORS = {
    "load_adapter": (tiny, load_adapter),
    "load_adapter on one that is there": (lambda: own_adapter(None), load_adapter),
    "PeftModel.from_pretrained": (tiny, PeftModel.from_pretrained),
    "in little memory": (tiny, lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)),
    "to train on": (tiny, lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True)),
    "with its configuration": (
        tiny,
        lambda model, folder: PeftModel.from_pretrained(
            model, folder, config=MoSPeftConfig.from_pretrained(folder)
        ),
    ),
    "from the Hub": (tiny, lambda model, folder: PeftModel.from_pretrained(model, **on_the_hub(folder))),
    "PeftModel.load_adapter": (peft_model, lambda model, folder: model.load_adapter(folder, "other")),
    "beside another head": (with_a_head, lambda model, folder: model.load_adapter(folder, "other", is_trainable=True)),
    "from the Hub, beside": (
        peft_model,
        lambda model, folder: model.load_adapter(**on_the_hub(folder), adapter_name="other"),
    ),
    "transformers' load_adapter with its configuration": (
        tiny,
        lambda model, folder: model.load_adapter(folder, peft_config=MoSPeftConfig.from_pretrained(folder)),
    ),
    "into a base that was wrapped before": (
        lambda: peft_model().base_model.model,
        lambda model, folder: PeftModel.from_pretrained(model, folder, adapter_name="other"),
    ),
}  # fmt: skip


@pytest.fixture
def with_head(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    peft_model(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def state_of(model) -> dict:
    adapters = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None
    return {**snapshot(model), "adapters": list(adapters), "active": active}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.one_at_a_time("door", "damage")
def test_damaged_files_are_refused_and_the_model_is_what_it_was(with_head, door, damage):
    build, load = DOORS[door]
    spoil, message = DAMAGE[damage]
    spoil(with_head)
    model = build()
    expected, before = logits(model), state_of(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(model, with_head)
    assert state_of(model) == before
    assert torch.equal(logits(model), expected)
    assert not (with_head / "executed").exists()


@pytest.mark.parametrize("door", DOORS)
def test_the_same_files_undamaged_open(with_head, door):
    build, load = DOORS[door]
    model = build()
    if "one that is there" in door:
        reconfigure(with_head, target_modules=["gate_proj", "up_proj", "down_proj"])
    loaded = load(model, with_head)
    loaded = loaded if isinstance(loaded, PeftModel) else model
    if isinstance(loaded, PeftModel) and "other" in loaded.peft_config:
        loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(peft_model(modules_to_save=["lm_head"])))


# transformers' own doors: an adapter may go on a model that names its parts otherwise, or lacks some of them


TRANSFORMERS = {
    "load_adapter": lambda model, folder: model.load_adapter(folder),
    "to train on": lambda model, folder: model.load_adapter(folder, "other", is_trainable=True),
    "from the Hub": lambda model, folder: model.load_adapter(
        "someone/adapter", adapter_kwargs={"cache_dir": on_the_hub(folder)["cache_dir"]}
    ),
}


ITS_OWN = {
    "cut off at the end": "incomplete|header",
    "a pickle": "No such file",
    "a pickle by the other name": "header",
    "no JSON": "Expecting property name",
}


@pytest.mark.parametrize("damage", ITS_OWN)
def test_transformers_refuses_what_it_refuses_of_any_method_and_executes_nothing(with_head, damage):
    """It checks no more than for a LoRA, and may raise with the adapter on."""
    DAMAGE[damage][0](with_head)
    with pytest.raises(Exception, match=ITS_OWN[damage]):
        tiny().load_adapter(with_head)
    assert not (with_head / "executed").exists()


@pytest.mark.parametrize("door", TRANSFORMERS)
def test_transformers_opens_the_same_files_undamaged(with_head, door):
    model = tiny()
    TRANSFORMERS[door](model, with_head)
    assert torch.equal(logits(model.eval()), logits(peft_model(modules_to_save=["lm_head"])))


@pytest.fixture
def saved(tmp_path):
    """The folders of a base and of an adapter, and the adapted model."""
    tiny("llama", torch.float32).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()).eval()
    model.save_pretrained(tmp_path / "causal")
    return tmp_path / "base", tmp_path / "causal", model


def test_from_pretrained_of_an_adapters_folder(saved):
    """It opens the base that the folder names, and then has it load the adapter."""
    _, adapter, model = saved
    opened = AutoModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits(opened), logits(model))
    assert PeftConfig.from_pretrained(adapter).base_model_name_or_path


needs_new_names = pytest.mark.skipif(
    hasattr(transformers.integrations.peft, "_build_peft_weight_mapping"),
    reason=f"transformers {transformers.__version__} finds the tensors of an adapter by fewer names",
)


@needs_new_names
def test_a_model_with_a_head_and_one_without_open_each_others_adapters(saved, tmp_path):
    base, adapter, model = saved

    def hidden(model):
        with torch.no_grad():
            return aligned(model)(ids()).last_hidden_state

    bare = AutoModel.from_pretrained(base)
    bare.load_adapter(adapter)
    assert torch.equal(hidden(AutoModel.from_pretrained(adapter)), hidden(model.base_model.model.model))
    assert torch.equal(hidden(bare), hidden(model.base_model.model.model))
    by_peft = get_peft_model(AutoModel.from_pretrained(base), config(task_type=None))
    by_peft.save_pretrained(tmp_path / "bare")
    with_a_head = AutoModelForCausalLM.from_pretrained(base)
    with_a_head.load_adapter(tmp_path / "bare")
    assert torch.equal(hidden(with_a_head.model), hidden(by_peft.base_model.model))


@needs_new_names
def test_what_transformers_can_be_told_about_names_and_sizes(saved, with_head):
    _, adapter, model = saved
    old = {name.replace("model.layers", "old.layers"): value for name, value in load_file(adapter / WEIGHTS).items()}
    save_file(old, adapter / WEIGHTS)
    opened = AutoModelForCausalLM.from_pretrained(adapter, key_mapping={r"old\.layers": "model.layers"})
    assert torch.equal(logits(opened), logits(model))
    head(with_head, torch.zeros(47, 32))
    other = tiny()
    assert other.load_adapter(with_head, ignore_mismatched_sizes=True).mismatched_keys


def test_a_configuration_alone_is_good_for_any_model(saved):
    base, adapter, _ = saved
    (adapter / WEIGHTS).unlink()
    inject_adapter_in_model(PeftConfig.from_pretrained(adapter), tiny())
    assert PeftModel(tiny(), PeftConfig.from_pretrained(adapter)).active_adapter == "default"


# an adapter that was there before stays on, with its values


EXISTING = ("NaN", "NaN in the head", "a tensor of another shape", "a tensor too few", "a tensor too many",
            "a weight of the base", "a deeper model's")  # fmt: skip


@pytest.mark.parametrize("damage", EXISTING)
@pytest.mark.parametrize("door", ["load_adapter", "set_peft_model_state_dict"])
@pytest.mark.one_at_a_time("door", "damage")
def test_an_adapter_that_was_there_stays_on_with_its_values(with_head, door, damage):
    """As where a Trainer resumes, or loads the best model at the end."""
    DAMAGE[damage][0](with_head)
    model = with_a_head()
    expected, before = logits(model), state_of(model)
    with pytest.raises(ValueError, match="not finite|of another architecture.*tensors: "):
        if door == "load_adapter":
            model.load_adapter(with_head, "default", is_trainable=True)
        else:
            set_peft_model_state_dict(model, load_file(with_head / WEIGHTS))
    assert state_of(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("put_on", ["get_peft_model", "changed"])
def test_a_configuration_from_a_file_is_good_for_an_adapter_of_its_own(with_head, put_on):
    """On a model that the file's weights would not fit."""
    another(with_head, intermediate_size=96)
    read = MoSPeftConfig.from_pretrained(with_head)
    if put_on == "get_peft_model":
        model = get_peft_model(tiny(), read)
    else:
        model = inject_adapter_in_model(dataclasses.replace(read, inference_mode=False), tiny())
    assert model.get_submodule(f"{'base_model.model.' * (put_on == 'get_peft_model')}model.layers.0.mlp.up_proj")


def test_a_head_of_another_size_is_left_out_where_that_is_asked_for(with_head):
    head(with_head, torch.zeros(47, 32))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(tiny(), with_head, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, tiny().lm_head.weight)


def test_tensors_may_be_renamed_where_that_is_asked_for(with_head):
    found = load_file(with_head / WEIGHTS)
    save_file({name.replace("model.layers", "old.layers"): t for name, t in found.items()}, with_head / WEIGHTS)
    own = dataclasses.replace(MoSPeftConfig.from_pretrained(with_head))
    model = PeftModel.from_pretrained(tiny(), with_head, config=own, key_mapping={r"^old\.": "model."})
    assert torch.equal(logits(model), logits(peft_model(modules_to_save=["lm_head"])))


def test_embeddings_beside_the_adapter_of_a_resized_vocabulary(tmp_path):
    def resized():
        model = tiny()
        model.resize_token_embeddings(60)
        return model

    model = get_peft_model(resized(), config()).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path)), logits(model))
    base = tiny()
    before = state_of(base)
    with pytest.raises(ValueError, match="embed_tokens.weight"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_a_head_opens_through_every_door(tmp_path):
    """peft saves the head's own weights with it."""
    model = peft_model(target_modules=["lm_head", "down_proj"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    opened = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(opened), logits(model))
    opened.load_adapter(tmp_path, "again")
    opened.set_adapter("again")
    assert torch.equal(logits(opened), logits(model))
    plain = tiny()
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    load_adapter(plain, tmp_path)  # now onto an equal adapter
    load_adapter(tiny(dtype=torch.bfloat16), tmp_path)  # the same weights, rounded
    other = tiny()
    other.lm_head.weight.data.mul_(2)
    before = state_of(other)
    with pytest.raises(ValueError, match="'lm_head.base_layer.weight', the weights of the base that it was trained on"):
        load_adapter(other, tmp_path)
    assert state_of(other) == before


def distilbert():
    """`classifier` is the end of its pre_classifier, too."""
    torch.manual_seed(0)
    options = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 48}
    return DistilBertForSequenceClassification(DistilBertConfig(**options)).double().eval()


def test_a_head_that_peft_names_by_the_end_of_a_word(tmp_path):
    model = get_peft_model(distilbert(), config("bert")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    own = distilbert()
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model)) and not torch.equal(logits(own), logits(distilbert()))


def test_a_checkpoint_that_is_not_finite_does_not_reach_the_adapter_in_training(folder):
    """As a Trainer resumes: load_adapter under the name of the adapter that is there."""
    adapted = peft_model(seed=1)
    expected = logits(adapted)
    rewrite(folder, mos_lora_B=B + torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        adapted.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(adapted), expected)


def test_a_head_that_save_adapter_wrote_and_peft_names_by_the_end_of_a_word(tmp_path):
    own = distilbert()
    apply_mos(own, mos(own))
    own.classifier.requires_grad_(True)
    with torch.no_grad():
        own.classifier.weight.add_(0.1)
    save_adapter(own, tmp_path)
    for opened in (distilbert(), PeftModel.from_pretrained(distilbert(), tmp_path).eval()):
        if not isinstance(opened, PeftModel):
            load_adapter(opened, tmp_path)
        assert torch.equal(logits(opened), logits(own))


@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_a_head_tied_to_the_embeddings(tmp_path, head):
    """What apply_mos trains stays tied and goes through both doors; what peft untied opens with peft alone."""
    own = tiny("gemma")
    apply_mos(own, mos(own))
    own.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        own.lm_head.weight.mul_(1.1)
    save_adapter(own, tmp_path / "own")
    again = tiny("gemma")
    load_adapter(again, tmp_path / "own")
    assert torch.equal(logits(again), logits(own)) and again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("gemma"), tmp_path / "own").eval()), logits(own))

    untied = peft_model("gemma", modules_to_save=[head])
    with torch.no_grad():
        next(p for name, p in untied.named_parameters() if "modules_to_save" in name).mul_(1.1)
    untied.save_pretrained(tmp_path / "peft")
    plain = tiny("gemma")
    before = snapshot(plain)
    with pytest.raises(ValueError, match="tied to .* tie_word_embeddings=False"):
        load_adapter(plain, tmp_path / "peft")
    assert snapshot(plain) == before
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "peft").eval()), logits(untied))


@pytest.mark.parametrize("name", ["mlp", "layers", "0", "mos_router"])
def test_a_name_of_a_module_is_no_name_for_an_adapter(name):
    model = tiny()
    before = state_of(model)
    with pytest.raises(ValueError, match="choose another name"):
        get_peft_model(model, config(), adapter_name=name)
    assert state_of(model) == before


def test_biases_stay_frozen():
    assert MoSPeftConfig(bias="none").r == 8 and "bias" not in MoSPeftConfig(bias="none").to_dict()
    with pytest.raises(ValueError, match="bias='all'.*stay frozen"):
        MoSPeftConfig(bias="all")
