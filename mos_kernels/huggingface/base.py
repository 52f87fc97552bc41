"""Loading the base model of an adapter that is in a folder. The adapter's files say which model it is."""

from __future__ import annotations

import os
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import nn

from mos_kernels.huggingface.atomic import CONFIG_NAME, WEIGHTS_NAME
from mos_kernels.huggingface.files import HEAD_WEIGHTS, read_json, read_tensors, refuse_damaged

_BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_base(folder: str | os.PathLike, base: str | os.PathLike | None = None, **options) -> nn.Module:
    """The model that the adapter in `folder` was trained on, without the adapter.

    base: where the weights are. None: the model that the adapter's configuration names, or `folder` itself if it also
    holds a whole model; in the latter case transformers loads the adapter too, if peft is installed. The head gets as
    many classes as that of the adapter. options: of from_pretrained. Errors in the files as in `load_adapter`; also
    ValueError if no base is named, if it cannot be loaded, if transformers does not know its class, or if the weights
    are of another class.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter ({CONFIG_NAME}): name the folder that a save has written")
    refuse_damaged(folder)
    config = read_json(folder / CONFIG_NAME)
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    source = base or (folder if whole else config.get("base_model_name_or_path"))
    if not source:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model: say where it is")
    mapping, task = config.get("auto_mapping") or {}, config.get("task_type")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else mapping
    name = name or (_BY_TASK.get(task, "AutoModelForCausalLM") if isinstance(task, (str, type(None))) else task)
    if not isinstance(name, str) or not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{folder / CONFIG_NAME} is damaged: its base model is {source!r}, of the class {name!r}; save it again"
        )
    kind = getattr(transformers, name, None)
    if (base or not whole) and (Path(source) / CONFIG_NAME).is_file():
        raise ValueError(f"{source} holds an adapter itself, in {CONFIG_NAME}: name the base model without one")
    if kind is None:
        raise ValueError(f"the adapter in {folder} is of a {name}, which transformers does not have: load it by hand")
    tensors = read_tensors(folder / WEIGHTS_NAME)
    head = next((tensor for name, tensor in tensors.items() if f".{name}".endswith(HEAD_WEIGHTS)), None)
    if head is not None:
        options["num_labels"] = head.shape[0]
    wanted = getattr(kind, "config_class", None)  # from_pretrained would initialise the weights of another type
    try:
        found = None if wanted is None else transformers.AutoConfig.from_pretrained(source)
        if wanted is None or isinstance(found, wanted):
            return kind.from_pretrained(os.fspath(source), **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the base model {str(source)!r} of the adapter in {folder} cannot be loaded ({reason}): name the folder "
            "or the hub id where it is"
        ) from error
    raise ValueError(f"{source} is a {found.model_type} model, and the adapter in {folder} is of a {name}")


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier."""
    return type(model).__name__.endswith("ForSequenceClassification")
