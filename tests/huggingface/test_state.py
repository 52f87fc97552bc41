"""What is trained beside an adapter of apply_mos: kept by every save, taken back with the adapter."""

import copy
import io
import warnings

import pytest
import torch
from tiny_models import ids, mos, tiny
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from mos_kernels.huggingface import apply_mos, load_adapter, mos_param_groups, remove_mos, save_adapter
from mos_kernels.huggingface.state import adapter_state

pytestmark = pytest.mark.filterwarnings("error:tensors of the base were trained in place")
same = {"rtol": 0, "atol": 0}


def logits(model):
    return model(ids()).logits.detach()


def adapted(head=True, seed=1):
    """A BERT with a classifier: the adapter and, with `head`, the classifier stand for trained ones."""
    model = tiny("bert")
    apply_mos(model, mos(model))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mos_lora_B" in name:
                parameter.normal_(std=0.1)
        if head:
            model.classifier.requires_grad_(True)
            model.classifier.weight.normal_()
            model.bert.pooler.dense.bias.requires_grad_(True)
            model.bert.pooler.dense.bias.normal_()
    return model


def opened(folder, **options):
    model = tiny("bert")
    load_adapter(model, folder, **options)
    return model


@pytest.fixture
def folders(tmp_path):
    """Folders of an adapter with a head and of one without, and the logits of each on the base."""
    with_head, without = adapted(), adapted(head=False, seed=2)
    save_adapter(with_head, tmp_path / "head")
    save_adapter(without, tmp_path / "none")
    return tmp_path / "head", logits(with_head), tmp_path / "none", logits(without)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_and_saved_again(folders, tmp_path, is_trainable):
    folder, expected, _, _ = folders
    save_adapter(opened(folder, is_trainable=is_trainable), tmp_path / "again")
    assert_close(logits(opened(tmp_path / "again")), expected, **same)


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
def test_a_frozen_copy_saves_the_head(tmp_path, copied):
    model = adapted()
    twin = copied(model).requires_grad_(False)
    del model
    save_adapter(twin, tmp_path)
    assert_close(logits(opened(tmp_path)), logits(twin), **same)
    assert adapter_state(twin)._model() is twin


@pytest.mark.parametrize("seen", [logits, lambda model: mos_param_groups(model, 1e-3)])
def test_trained_then_frozen_then_saved(tmp_path, seen):
    model = adapted()
    seen(model)
    model.requires_grad_(False)
    save_adapter(model, tmp_path)
    assert_close(logits(opened(tmp_path)), logits(model), **same)


def test_a_forward_without_gradients_notes_nothing(tmp_path):
    model = adapted()
    with torch.no_grad():
        model(ids())
    model.requires_grad_(False)
    assert adapter_state(model).modules_to_save() == []


@pytest.mark.parametrize("copied", [lambda model: model, by_deepcopy, by_pickle])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_second_adapter_does_not_keep_the_head_of_the_first(folders, tmp_path, is_trainable, copied):
    folder, _, other, expected = folders
    model = copied(opened(folder, is_trainable=is_trainable))
    load_adapter(model, other, is_trainable=is_trainable)
    assert_close(logits(model), expected, **same)
    assert not model.classifier.weight.requires_grad
    save_adapter(model, tmp_path / "again")
    assert_close(logits(opened(tmp_path / "again")), expected, **same)
    load_adapter(model, folder)
    load_adapter(model, folder)
    remove_mos(model)
    assert_close(logits(model), logits(tiny("bert")), **same)


@pytest.mark.parametrize("copied", [lambda model: model, by_deepcopy, by_pickle])
def test_the_base_has_its_own_head_again_without_the_adapter(folders, copied):
    folder, expected, _, _ = folders
    model = opened(folder, is_trainable=True)
    twin = copied(model)
    assert_close(logits(twin), expected, **same)
    remove_mos(twin)
    assert_close(logits(twin), logits(tiny("bert")), **same)
    assert not twin._forward_pre_hooks and adapter_state(twin) is None


def test_only_what_was_replaced_is_kept(folders):
    folder, _, other, _ = folders
    model = opened(folder)
    kept = adapter_state(model).before
    assert {name.rpartition(".")[0] for name in kept} == {"classifier", "bert.pooler.dense"}
    assert all(tensor.device.type == "cpu" for tensor in kept.values())
    twin = copy.deepcopy(model)
    assert adapter_state(twin).before["classifier.weight"] is kept["classifier.weight"], "copies share it"
    load_adapter(model, other)
    assert adapter_state(model).before == {} and adapter_state(twin).before


def test_what_trained_on_after_loading_goes_back_too(folders):
    model = opened(folders[0], is_trainable=True)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)  # which the file has as the base
    remove_mos(model)
    assert_close(logits(model), logits(tiny("bert")), **same)


def test_what_was_trained_in_place_is_said_to_stay(folders):
    _, _, other, _ = folders
    model = adapted()
    trained = model.classifier.weight.clone()
    logits(model)
    with pytest.warns(UserWarning, match="trained in place.*bert.pooler.dense.bias.*3 tensors.*load the base anew"):
        load_adapter(model, other)
    assert_close(model.classifier.weight, trained, **same)
    with pytest.warns(UserWarning, match="left as they are"):
        remove_mos(model)
    assert_close(model.classifier.weight, trained, **same)


def test_a_warning_that_is_an_error_does_not_stop_the_removal():
    model = adapted()
    model.train()(ids(), labels=torch.tensor([0, 1])).loss.backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="tensors of the base were trained in place")
        with pytest.raises(UserWarning):
            remove_mos(model)
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks
    apply_mos(model, mos(model))


def test_an_adapter_after_one_that_was_removed_from_a_part():
    model = tiny()
    expected = logits(model)
    apply_mos(model, mos(model))
    remove_mos(model.model.layers[0])
    assert not torch.equal(logits(model), expected)
    remove_mos(model.model)
    assert torch.equal(logits(model), expected)
    apply_mos(model, mos(model))
    remove_mos(model)
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks


def test_a_head_of_another_size_by_now_stays(folders):
    model = opened(folders[0])
    model.classifier = torch.nn.Linear(32, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="classifier"):
        remove_mos(model)
    assert model.classifier.out_features == 5


def test_a_head_on_the_meta_device_is_refused(folders):
    model = tiny("bert")
    model.classifier.to_empty(device="meta")
    with pytest.raises(ValueError, match="'classifier.weight' is on the meta device"):
        load_adapter(model, folders[0])
    assert adapter_state(model) is None


def test_a_parameter_of_the_model_itself_cannot_be_named(tmp_path):
    model = tiny("bert")
    model.scale = torch.nn.Parameter(torch.ones(1))
    apply_mos(model, mos(model))
    model.scale.requires_grad_(True)
    with pytest.raises(ValueError, match="'scale'.*belongs to no submodule"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
def test_a_copy_of_a_part_does_not_take_the_model_along(copied):
    model = tiny()
    apply_mos(model, mos(model))
    block = model.model.layers[0].mlp
    original, is_copied = LlamaForCausalLM.__setstate__, []
    LlamaForCausalLM.__setstate__ = lambda self, state: (is_copied.append(self), original(self, state))
    try:
        twin = copied(block)
        del model
        again = copied(block)
    finally:
        del LlamaForCausalLM.__setstate__
    assert not is_copied
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for part in (twin, again):
        assert_close(part(x), block(x), **same)


def test_hooks_that_come_after_a_pickle_take_no_ones_place():
    model = by_pickle(adapted())
    there = dict(model._forward_pre_hooks)
    number = max(there)
    assert model.register_forward_pre_hook(lambda *_: None).id > number
    assert there.items() <= model._forward_pre_hooks.items()
