"""Adapter files that are damaged, hostile or foreign, through peft's door: refused, nothing executed, nothing changed.

peft reads the configuration through MoSPeftConfig before it touches the model, and the tensors through the tuner after
it has put the adapter on; what the files alone show is refused at the first, what the model has to say at the second,
where the adapter is taken off again.
"""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from peft_setup import FAMILIES, SCOPES, config, logits, peft_model
from safetensors.torch import load_file, save_file
from tiny_models import mos, snapshot, tiny

from mos_kernels.huggingface import apply_mos, load_adapter, save_adapter

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
        found.pop(UP + name)
        if tensor is not None:
            found[UP + name] = tensor
    save_file(found, folder / WEIGHTS)


def reconfigure(folder, **values) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **values}))


def state_of(model) -> dict:
    """All of the model that a refusal must leave alone; of a PeftModel, its adapters too."""
    tuner = getattr(model, "base_model", None)
    of_peft = (list(model.peft_config), list(model.active_adapters)) if isinstance(model, PeftModel) else tuner
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    found = snapshot(model)
    forwards = {name: (f.func, f.args) if isinstance(f, partial) else f for name, f in found.pop("forwards").items()}
    return {**found, "forwards": forwards, "of peft": of_peft, "hooks": hooks}


def refused(folder, error=ValueError, family="llama", **options) -> str:
    """The message of both of peft's ways to load, and that no model changed."""
    plain, adapted = tiny(family), peft_model(family, seed=1, **options)
    plain.get_input_embeddings().requires_grad_(False)
    before, expected = (state_of(plain), state_of(adapted)), (logits(plain), logits(adapted))
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(plain, folder)
    with pytest.raises(error) as again:
        adapted.load_adapter(folder, "other")
    assert (state_of(plain), state_of(adapted)) == before
    assert all(map(torch.equal, (logits(plain), logits(adapted)), expected))
    assert str(caught.value).replace("'default'", "'other'").replace(".default", ".other") == str(again.value)
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


def test_files_of_the_hub_are_read_before_the_model_is_touched(folder, tmp_path, monkeypatch):
    """In the form of the hub's cache: truncated, as a pickle, and whole."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--someone--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("cache"))
    weights = cached / "snapshots" / ("0" * 40) / WEIGHTS
    content, plain = weights.read_bytes(), tiny()
    before = state_of(plain)

    def load():
        return PeftModel.from_pretrained(plain, "someone/adapter", cache_dir=tmp_path / "cache")

    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load()
    weights.unlink()
    (weights.parent / "adapter_model.bin").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="pickles are never loaded"):
        load()
    assert state_of(plain) == before
    weights.write_bytes(content)
    assert torch.equal(logits(load()), logits(peft_model()))


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


# what only the model shows: nothing is loaded, and the adapter that peft has put on by then is taken off


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("problem", ["of another shape", "missing", "unexpected", "head"])
def test_tensors_that_do_not_fit_the_model(tmp_path, family, scope, problem):
    head = {"bert": "classifier"}.get(family, "lm_head")
    options = {"router_scope": scope, "modules_to_save": [head]}
    peft_model(family, **options).save_pretrained(tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    name = next(name for name in found if name.endswith("mos_lora_A"))
    if problem == "of another shape":
        found[name] = found[name][:, 1:].contiguous()
    elif problem == "missing":
        del found[name]
    elif problem == "unexpected":
        found[name.replace("mos_lora_A", "mos_lora_C")] = torch.zeros(8, 32)
    else:
        name = next(name for name in found if name.endswith(f"{head}.weight"))
        found[name] = found[name][1:].contiguous()
        problem = "of another shape"
    save_file(found, tmp_path / WEIGHTS)
    part = name.removeprefix("base_model.model.").removesuffix(".weight").replace("mos_lora_A", "")
    message = refused(tmp_path, family=family, **options)
    assert f"tensors are {problem}, such as" in message and part in message
    with pytest.raises(ValueError):
        load_adapter(tiny(family), tmp_path)


def test_a_model_loads_an_adapter_after_one_was_refused(folder, tmp_path):
    plain, adapted = tiny(), peft_model(seed=1)
    content = (folder / WEIGHTS).read_bytes()
    rewrite(folder, mos_lora_B=torch.zeros(63, 8, 4))
    with pytest.raises(ValueError, match="of another shape"):
        PeftModel.from_pretrained(plain, folder)
    with pytest.raises(ValueError, match="of another shape"):
        adapted.load_adapter(folder, "other")
    (folder / WEIGHTS).write_bytes(content)
    expected = logits(peft_model())
    assert torch.equal(logits(PeftModel.from_pretrained(plain, folder)), expected)
    adapted.load_adapter(folder, "other")
    adapted.set_adapter("other")
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("used", [False, True])
def test_an_adapter_that_was_there_before_stays_with_its_values(folder, used):
    """Loaded into again, as a Trainer does; or started from a file's options alone, and used."""
    adapted = PeftModel.from_pretrained(tiny(), folder, is_trainable=True)
    if used:
        adapted = get_peft_model(tiny(), config().__class__.from_pretrained(folder))
        logits(adapted)
    before, expected = state_of(adapted), logits(adapted)
    rewrite(folder, mos_lora_B=torch.zeros(63, 8, 4))
    with pytest.raises(ValueError, match="of another shape"):
        adapted.load_adapter(folder, "default", is_trainable=True)
    assert state_of(adapted) == before and torch.equal(logits(adapted), expected)


def test_a_checkpoint_that_is_not_finite_does_not_reach_the_adapter_in_training(folder):
    """As a Trainer resumes: load_adapter under the name of the adapter that is there."""
    adapted = peft_model(seed=1)
    expected = logits(adapted)
    rewrite(folder, mos_lora_B=B + torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        adapted.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(adapted), expected)


AUTO = {"bert": (AutoPeftModelForSequenceClassification, AutoPeftModel)}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_open_what_save_adapter_wrote(tmp_path, family):
    tiny(family).save_pretrained(tmp_path / "base")
    model = type(tiny(family)).from_pretrained(tmp_path / "base").eval()
    apply_mos(model, mos(model))
    if family == "bert":
        model.classifier.requires_grad_(True)  # for a class of a task peft wants the head in the file
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    for auto in AUTO.get(family, (AutoPeftModelForCausalLM, AutoPeftModel)):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter").eval()), expected)
