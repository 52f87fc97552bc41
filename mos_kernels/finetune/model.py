"""The model of a fine-tuning run: loaded, given its adapter, counted, saved. The same head for every method."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from mos_kernels.config import MoSConfig
from mos_kernels.finetune.trainer import TRAINED, trained_parameters
from mos_kernels.huggingface.apply import activated_parameters, adapter_state, apply_mos
from mos_kernels.huggingface.files import save_adapter
from mos_kernels.huggingface.targets import ffn_target_modules
from mos_kernels.layer import ADAPTER_PARAMETERS


class ModelError(ValueError):
    """The model cannot be used as asked."""


class Method(NamedTuple):
    """A method of the caller's own, beside those of the command.

    fields: the fields of `MoSConfig` that it takes, target_modules among them. add: (model, config of these fields) ->
    names of the linears adapted, in place. Its parameters have "lora_" in their names.
    """

    fields: tuple[str, ...]
    add: Callable[[nn.Module, dict], list[str]]


def check_model_source(source: str) -> None:
    """Raise `ModelError` where `source` reads as a folder and is none that holds a model."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source}: the folder holds no config.json, so it is no transformers model")
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.exists():
        raise ModelError(f"{source}: no such folder; give a folder with a transformers model, or a hub id (owner/name)")


def load_tokenizer(source: str):
    """The tokenizer, with a padding token, and the model's config."""
    config = _from_hub_or_folder(source, AutoConfig.from_pretrained, source)
    tokenizer = _from_hub_or_folder(source, AutoTokenizer.from_pretrained, source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{source}: the tokenizer has neither a padding nor an end-of-sequence token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, config


def longest_input(tokenizer, config) -> int:
    """The number of tokens that model and tokenizer take at most."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**30
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # positions start behind the padding index
        positions -= (config.pad_token_id or 0) + 1
    return min(positions, tokenizer.model_max_length)


def load_model(source: str, classes: Sequence[str] | None, tokenizer, dtype: torch.dtype, seed: int):
    """(model, head): a sequence classifier for `classes`, or a causal language model for None.

    head: names of the modules outside the base model, and of those whose weights the checkpoint lacks: what a
    classifier trains besides its adapter. The seed fixes their start.
    """
    set_seed(seed)
    settings = {"dtype": dtype, "output_loading_info": True}
    if classes is None:
        model, info = _from_hub_or_folder(source, AutoModelForCausalLM.from_pretrained, source, **settings)
        if info["missing_keys"]:
            raise ModelError(
                f"{source} is no causal language model: it has no weights for {sorted(info['missing_keys'])[:4]}; give "
                "another --model, or --task classification"
            )
        return model, []
    settings |= {
        "num_labels": len(classes),
        "problem_type": "single_label_classification",
        "ignore_mismatched_sizes": True,
    }
    settings |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    model, info = _from_hub_or_folder(source, AutoModelForSequenceClassification.from_pretrained, source, **settings)
    base = getattr(model, model.base_model_prefix, None)
    head = [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]
    absent = {key.rpartition(".")[0] for key in info["missing_keys"]}
    head += sorted(name for name in absent if not any(name == part or name.startswith(part + ".") for part in head))
    if base is None or not head:
        raise ModelError(f"{source}: {type(model).__name__} has no head of its own to train")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, head


def _from_hub_or_folder(source: str, load, *args, **kwargs):
    logging, before = transformers.utils.logging, transformers.utils.logging.get_verbosity()
    shows_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # that the head is new is what is wanted
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        advice = "" if Path(source).is_dir() else "; without the Hugging Face hub, give --model a local folder"
        raise ModelError(f"--model {source} cannot be loaded: {message}{advice}") from error
    finally:
        logging.set_verbosity(before)
        if shows_bars:
            logging.enable_progress_bar()


def add_adapter(
    model: nn.Module,
    method: str,
    config: MoSConfig | dict | None,
    targets_given: bool,
    head: Sequence[str],
    seed: int,
    more_methods: Mapping[str, Method] | None = None,
):
    """(model, names, config): the model with its adapter, everything but adapter and head frozen.

    names: the linears adapted. config: as it was used, with the model's own FFN linears as target_modules unless they
    were given. Trained parameters are float32, whatever the base is. What the model does not have raises `ModelError`.
    """
    try:
        return _add_adapter(model, method, config, targets_given, head, seed, more_methods or {})
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ModelError) else ModelError(error) from error


def _add_adapter(model, method, config, targets_given, head, seed, more_methods):
    set_seed(seed)  # the adapter's start does not depend on what the head drew
    if isinstance(config, MoSConfig):
        config = config if targets_given else dataclasses.replace(config, target_modules=ffn_target_modules(model))
        names = list(apply_mos(model, config))
        _train(model, head)
    elif method == "frozen":
        model.requires_grad_(False)
        names = []
        _train(model, head)
    else:
        config = config if targets_given else {**config, "target_modules": ffn_target_modules(model)}
        if method in more_methods:
            model.requires_grad_(False)
            names = more_methods[method].add(model, config)
            _train(model, head)
        else:
            model, names = _add_lora(model, method, config, head)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model, names, config


def _train(model: nn.Module, head: Sequence[str]) -> None:
    for name in head:
        model.get_submodule(name).requires_grad_(True)


def _add_lora(model: nn.Module, method: str, config: dict, head: Sequence[str]):
    try:
        from peft import AdaLoraConfig, LoraConfig, get_peft_model
    except ImportError:
        raise ModelError(f"--method {method} needs peft: pip install peft") from None
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    settings |= {"modules_to_save": list(head) or None, "task_type": "SEQ_CLS" if head else "CAUSAL_LM"}
    if method == "adalora":
        lora = AdaLoraConfig(**{name: value for name, value in settings.items() if name != "r"})
    else:
        patterns = {name: settings.pop(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        lora = LoraConfig(**settings, **patterns, use_dora=method == "dora")
    model = get_peft_model(model, lora)
    return model, list(model.base_model.targeted_module_names)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters: adapter, head, trained (their sum), total (base included, the copies that peft keeps of a head not).

    For MoS also activated: those of the adapter that one token uses.
    """
    adapter = head = total = 0
    for name, parameter in model.named_parameters():
        copy = ".original_module." in name
        total += 0 if copy else parameter.numel()
        if parameter.requires_grad:
            if any(part in name for part in (*ADAPTER_PARAMETERS, "lora_")):
                adapter += parameter.numel()
            else:
                head += parameter.numel()
    counts = {"adapter": adapter, "head": head, "trained": adapter + head, "total": total}
    return counts | ({"activated": activated_parameters(model).activated} if adapter_state(model) else {})


def description(model: nn.Module, method: str, names: Sequence[str]) -> str:
    """One line: what is trained, and how much of the model that is."""
    counts, base = parameter_counts(model), getattr(model, "get_base_model", lambda: model)()
    adapter = f"{method} on {len(names)} linears trains {counts['adapter']:,}" if names else "trained are 0 of them"
    share = 100 * counts["adapter"] / counts["total"]
    head = f" and a head of {counts['head']:,}" if counts["head"] else ""
    return f"model: {type(base).__name__}, {counts['total']:,} parameters; {adapter} ({share:.2f}%){head}"


def save_trained_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """The adapter with its head, and the tokenizer, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_state(model):
        save_adapter(model, folder)
    elif hasattr(model, "peft_config"):
        model.save_pretrained(folder)
    else:
        save_file(trained_parameters(model), folder / TRAINED)
    tokenizer.save_pretrained(folder)
