"""Several adapters of the peft method on one model: their names, what trains, and their configurations."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft_setup import SCOPES, config, peft_model
from tiny_models import logits, tiny

from mos_kernels import MoSConfig
from mos_kernels.huggingface import MoSPeftConfig, load_adapter
from mos_kernels.huggingface.peft.layer import MoSPeftLayer

FFN = ["gate_proj", "up_proj", "down_proj"]


def perturb(model) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.01 if "curvature" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


# names


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_who_looks_for_an_adapter_by_its_name_between_dots_finds_all_of_it(family, scope):
    """So TRL makes the reference of DPO, KTO, GRPO and RLOO out of the adapter that is trained."""
    model = peft_model(family, router_scope=scope)
    perturb(model)
    trained = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)
    with model.disable_adapter():
        assert not torch.equal(logits(model), trained)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_state_dict_with_the_adapters_name_last_loads(scope):
    """As version 0.1 named parameters in a checkpoint of the whole model."""
    model, other = peft_model(seed=1, router_scope=scope), peft_model(seed=2, router_scope=scope)
    named = {}
    for name, tensor in model.state_dict().items():
        before, found, parameter = name.partition(".mos_adapter.default.")
        named[f"{before}.{parameter}.default" if found else name] = tensor
    other.load_state_dict(named)
    assert torch.equal(logits(other), logits(model)) and not any(".mos_lora_A." in name for name in model.state_dict())


# what trains: as with a LoRA, whatever is done in whatever order


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind, options in (("mos", config()), ("lora", LoraConfig(r=2, target_modules=FFN, task_type="CAUSAL_LM"))):
        made[kind] = tmp_path_factory.mktemp(kind)
        get_peft_model(tiny(), options).save_pretrained(made[kind])
    return made


def configuration(kind: str, frozen: bool):
    task = {"task_type": "CAUSAL_LM", "inference_mode": frozen}
    return config(**task) if kind == "mos" else LoraConfig(r=2, target_modules=FFN, **task)


class ByPeft:
    def __init__(self, kind, folder, frozen, load):
        self.kind, self.folder = kind, folder
        if load:
            self.model = PeftModel.from_pretrained(tiny(), folder, "a", is_trainable=not frozen)
        else:
            self.model = get_peft_model(tiny(), configuration(kind, frozen), "a")

    def add(self, name, frozen):
        self.model.add_adapter(name, configuration(self.kind, frozen))

    def load(self, name, frozen):
        self.model.load_adapter(self.folder, name, is_trainable=not frozen)

    def set(self, name, frozen):
        self.model.set_adapter(name, inference_mode=frozen)

    def train(self, name, frozen):
        self.model.set_requires_grad(name, not frozen)

    def several(self, name, frozen):
        self.model.base_model.set_adapter(list(self.model.peft_config), inference_mode=frozen)

    def enable(self, name, frozen):
        (self.model.disable_adapter_layers if frozen else self.model.enable_adapter_layers)()

    def delete(self, name, frozen):
        self.model.delete_adapter(name)


class ByTransformers(ByPeft):
    def __init__(self, kind, folder, frozen, load):
        self.kind, self.folder, self.model = kind, folder, tiny()
        (self.load if load else self.add)("a", frozen)

    def add(self, name, frozen):
        self.model.add_adapter(configuration(self.kind, frozen), name)

    def set(self, name, frozen):
        self.model.set_adapter(name)

    def train(self, name, frozen):
        from peft.functional import set_requires_grad

        set_requires_grad(self.model, name, not frozen)

    def several(self, name, frozen):
        self.model.set_adapter(list(self.model.peft_config))

    def enable(self, name, frozen):
        (self.model.disable_adapters if frozen else self.model.enable_adapters)()


def trainable(model, kind: str) -> dict[tuple[str, str], bool]:
    """Whether the parameters of an adapter train, by its name and the block that they are in."""
    found: dict[tuple[str, str], set[bool]] = {}
    for name, parameter in model.named_parameters():
        if "mos_" in name or "lora_" in name:
            (adapter,) = {"a", "b", "c"}.intersection(name.split("."))
            found.setdefault((adapter, name[: name.index(".mlp.")]), set()).add(parameter.requires_grad)
        else:
            assert not parameter.requires_grad, name
    assert all(len(flags) == 1 for flags in found.values()), f"{kind}: a block's parameters do not agree"
    return {key: flags.pop() for key, flags in found.items()}


@contextmanager
def any_peft_version():
    """transformers 5.24 asks for a later peft than there is; for what it then does, this one will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        yield


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "load", "set", "train", "several", "enable", "delete"]),
        st.sampled_from("abc"),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", [ByPeft, ByTransformers])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frozen=st.booleans(), load=st.booleans(), steps=STEPS)
def test_what_trains_is_what_trains_of_a_lora(folders, door, frozen, load, steps):
    with any_peft_version():
        twins = {kind: door(kind, folder, frozen, load) for kind, folder in folders.items()}
        for step, name, flag in steps:
            there = list(twins["lora"].model.peft_config)
            if (name in there) == (step in ("add", "load")) or (step == "delete" and len(there) == 1):
                continue
            for twin in twins.values():
                getattr(twin, step)(name, flag)
            ours, theirs = (trainable(twins[kind].model, kind) for kind in ("mos", "lora"))
            assert ours == theirs, (step, name, flag)
            active = [twin.model.active_adapters for twin in twins.values()]
            assert len({str(names() if callable(names) else names) for names in active}) == 1


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("options", [{"learn_curvature": False}, {"spaces": {"euclidean": 4}}])
def test_a_curvature_that_cannot_change_does_not_train(options, is_trainable, tmp_path):
    model = peft_model(**options)
    model.save_pretrained(tmp_path)
    model.add_adapter("b", config(**options))
    model.set_adapter("b")
    model.set_requires_grad(["default", "b"])
    by_transformers, lora = tiny(), tiny()
    by_transformers.load_adapter(tmp_path, is_trainable=is_trainable)
    get_peft_model(tiny(), LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path / "lora")
    lora.load_adapter(tmp_path / "lora", is_trainable=is_trainable)  # of transformers 5.0 it trains in any case
    trains = any(p.requires_grad for name, p in lora.named_parameters() if "lora_" in name)
    for one, train in ((model, True), (by_transformers, trains)):
        parameters = {name: p.requires_grad for name, p in one.named_parameters() if "mos_" in name}
        assert not any(flag for name, flag in parameters.items() if "curvature" in name)
        assert {flag for name, flag in parameters.items() if "curvature" not in name} == {train}


# configurations


@pytest.mark.parametrize("fate", ["deleted", "overwritten", "there"])
@pytest.mark.parametrize("make", [lambda c: c, copy.deepcopy, dataclasses.replace], ids=["it", "deepcopy", "replace"])
def test_a_loaded_adapters_configuration_serves_for_another_adapter(fate, make, tmp_path):
    folder = tmp_path / "adapter"
    peft_model().save_pretrained(folder)
    model = PeftModel.from_pretrained(tiny(), folder, is_trainable=True)
    if fate != "there":
        shutil.rmtree(folder)
    if fate == "overwritten":
        peft_model(r=2).save_pretrained(folder)
    model.add_adapter("ref", make(model.peft_config["default"]))
    assert model.peft_config["ref"].r == 4 and model.peft_config["default"].read_from is None


def test_a_configuration_that_was_read_serves_when_its_folder_is_gone(tmp_path):
    folder = tmp_path / "adapter"
    peft_model().save_pretrained(folder)
    read = MoSPeftConfig.from_pretrained(folder)
    shutil.rmtree(folder)
    model = inject_adapter_in_model(read, tiny())
    assert any("mos_" in name for name in model.state_dict())


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, {"r": 3}])
def test_a_configuration_alone_is_saved_and_read(options, tmp_path):
    MoSPeftConfig(**options).save_pretrained(tmp_path)
    assert MoSPeftConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path) == MoSPeftConfig(**options)


@pytest.mark.parametrize("preset, options", [("paper", {}), ("hydralora", {"num_experts": 3}), ("mixture_of_lora", {}),
                                             ("mixture_of_lora", {"num_experts": 2, "r": 4})])  # fmt: skip
def test_the_presets_are_those_of_a_mos_config(preset, options):
    made = getattr(MoSPeftConfig, preset)(**options, task_type="CAUSAL_LM")
    assert made.to_mos_config() == getattr(MoSConfig, preset)(**options) and made.task_type == "CAUSAL_LM"
    assert made.target_modules is None


@pytest.mark.parametrize("part", ["mlp", "mlp.up_proj"])
def test_a_module_at_two_names_is_saved_once_and_loads(part, tmp_path):
    def shared():
        model = tiny()
        first, second = model.model.layers
        model.model.layers[1].set_submodule(part, first.get_submodule(part))
        return model

    model = get_peft_model(shared(), config(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(shared(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "default")
    own = shared()
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model))


def test_adapters_cannot_be_added_up():
    model = peft_model()
    with pytest.raises(NotImplementedError, match="cannot be added up.*export_lora"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


def test_an_unknown_option_of_a_file_is_refused_unless_it_is_off(tmp_path):
    MoSPeftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    for value in (None, 3):
        path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": value}))
        with pytest.raises(ValueError, match="from_the_future") if value else nullcontext():
            MoSPeftConfig.from_pretrained(tmp_path)


def test_a_card_has_the_packages_tag_once_and_what_peft_writes(tmp_path, caplog):
    model = peft_model()
    model.add_adapter("b", config())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "b" / "README.md").data.tags == ["mos-kernels"]  # where peft writes none
    assert not [record for record in caplog.records if "metadata block" in record.message]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags.count("mos-kernels") == 1 and "transformers" in card.data.tags
    assert card.data.library_name == "peft" and card.text.count("import mos_kernels.huggingface") == 1


# where: what peft does, and what it says


@pytest.mark.parametrize("taken", [{"exclude_modules": ["up_proj"]}, {"modules_to_save": ["up_proj"]}])
def test_a_target_may_be_taken_back_by_another_option(taken, tmp_path):
    model = peft_model(target_modules=["down_proj", "up_proj"], **taken)
    assert {name.rpartition(".")[2] for name, _ in adapted(model)} == {"down_proj"}
    model.save_pretrained(tmp_path)
    for opened in (tiny(), PeftModel.from_pretrained(tiny(), tmp_path)):
        if not isinstance(opened, PeftModel):
            load_adapter(opened, tmp_path)
        assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": r".*\.nothing"},
        {"target_modules": ["up_proj"], "exclude_modules": ["up_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["up_proj"]},
    ],
)
def test_no_match_is_pefts_own_error(options):
    with pytest.raises(NoMatchingPeftModuleError, match="match nothing"):
        peft_model(**options)


def test_layers_of_a_bert_are_chosen_without_target_modules(tmp_path):
    model = peft_model("bert", layers_to_transform=[1])
    names = {name for name, _ in adapted(model.base_model.model)}
    assert names == {f"bert.encoder.layer.1.{part}.dense" for part in ("intermediate", "output")}
    model.save_pretrained(tmp_path)
    own = tiny("bert")
    load_adapter(own, tmp_path)
    assert torch.equal(logits(own), logits(model))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_state_dict_says_where_and_peft_says_if_the_configuration_differs(compiled):
    """torch.compile's wrapper puts `_orig_mod.` before every name."""
    saved = get_peft_model_state_dict(peft_model(target_modules=["up_proj", "down_proj"]))
    model = torch.compile(tiny()) if compiled else tiny()
    with pytest.warns(RuntimeWarning, match="inconsistency was discovered"):
        inject_adapter_in_model(config(target_modules=["q_proj", "up_proj"]), model, state_dict=saved)
    inner = model._orig_mod if compiled else model
    assert {name.rpartition(".")[2] for name, _ in adapted(inner)} == {"up_proj", "down_proj"}
    set_peft_model_state_dict(inner, saved)
    expected = logits(peft_model(target_modules=["up_proj", "down_proj"]))
    assert torch.equal(logits(inner), expected)


def test_a_compiled_model_gets_an_adapter_and_its_file_is_that_of_a_plain_one(tmp_path):
    model = get_peft_model(torch.compile(tiny()), config(target_modules="all-linear"))
    assert not any("_orig_mod" in name for name in model.peft_config["default"].target_modules)


def test_pefts_helpers_do_what_they_can_or_say_why_not():
    model = peft_model()
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass


def adapted(model) -> list:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoSPeftLayer)]
