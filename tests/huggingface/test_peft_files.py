"""Adapter files that are damaged, hostile or foreign, through peft's door: refused, nothing executed, nothing changed.

peft reads the configuration through MoSPeftConfig before it touches the model, and the tensors through the tuner after
it has put the adapter on; what the files alone show is refused at the first, what the model has to say at the second.
"""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft_setup import config, logits, peft_model
from safetensors.torch import load_file, save_file
from tiny_models import snapshot, tiny

from mos_kernels.huggingface import load_adapter

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


# what only the model shows: nothing is loaded, and the adapter that peft has put on by then can be taken off


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mos_lora_A": torch.zeros(4, 31)}, "of another shape, such as .*up_proj.mos_lora_A.other"),
        ({"mos_lora_B": torch.zeros(63, 8, 4)}, "of another shape"),
        ({"mos_lora_A": None}, "missing, such as .*up_proj.mos_lora_A.other"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_the_model(folder, tensors, message):
    rewrite(folder, **tensors)
    adapted = peft_model(seed=1)
    expected, before = logits(adapted), {name: p.clone() for name, p in adapted.named_parameters()}
    with pytest.raises(ValueError, match=message):
        adapted.load_adapter(folder, "other")
    assert torch.equal(logits(adapted), expected)
    adapted.delete_adapter("other")
    after = dict(adapted.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match=message.replace(".other", ".default")):
        PeftModel.from_pretrained(tiny(), folder)
    with pytest.raises(ValueError):
        load_adapter(tiny(), folder)


def test_a_foreign_tensor_is_refused(folder):
    found = load_file(folder / WEIGHTS)
    save_file({**found, UP + "mos_router": torch.zeros(8, 32)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="unexpected, such as .*up_proj.mos_router"):
        PeftModel.from_pretrained(tiny(), folder)


def test_a_checkpoint_that_is_not_finite_does_not_reach_the_adapter_in_training(folder):
    """As a Trainer resumes: load_adapter under the name of the adapter that is there."""
    adapted = peft_model(seed=1)
    expected = logits(adapted)
    rewrite(folder, mos_lora_B=B + torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        adapted.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(adapted), expected)
