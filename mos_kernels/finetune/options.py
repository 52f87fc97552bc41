"""The options of `python -m mos_kernels finetune`: its own, the Trainer's, and one for each field of MoSConfig."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments

from mos_kernels.config import MoSConfig

LORA_FIELDS = tuple(name for name in MoSConfig.__dataclass_fields__ if name in LoraConfig.__dataclass_fields__)
"""The fields of MoSConfig that peft's LoraConfig has too, with the same meaning."""

DEFAULTS = {
    "learning_rate": 3e-4, "num_train_epochs": 3.0, "weight_decay": 0.01, "warmup_steps": 0.1, "seed": 0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "logging_steps": 10, "save_total_limit": 2,
    "logging_nan_inf_filter": False, "report_to": "none", "eval_strategy": None, "save_strategy": None,
    "save_steps": None, "bf16": False, "gradient_checkpointing": None, "max_length": None,
}  # fmt: skip
"""Defaults that differ from the Trainer's: the paper's values, and a checkpoint at every evaluation."""


def ratio(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise ValueError  # from 1 on, warmup_steps is a number of steps
    return value


ALIASES = {
    "--output": ("output_dir", str), "--epochs": ("num_train_epochs", float), "--warmup-ratio": ("warmup_steps", ratio),
    "--batch-size": ("per_device_train_batch_size", int), "--eval-batch-size": ("per_device_eval_batch_size", int),
    "--gradient-accumulation": ("gradient_accumulation_steps", int), "--lr-scheduler": ("lr_scheduler_type", str),
}  # fmt: skip
_GROUPED = ("train_sampling_strategy", "group_by_length")
if "group_by_length" in TrainingArguments.__dataclass_fields__:  # of transformers 5.0
    _GROUPED = ("group_by_length", True)
FLAGS = {"--group-by-length": _GROUPED, "--quiet": ("disable_tqdm", True)}

_CURVED_ONLY = (
    "curvature_init", "length_unit", "learn_curvature", "curvature_lr_ratio", "curvature_max_grad_norm", "mapping",
    "domain", "boundary_eps",
)  # fmt: skip
_POSITIVE = (
    "num_train_epochs", "learning_rate", "logging_steps", "eval_steps", "save_steps", "max_length", "eval_size",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
)  # fmt: skip


_FIXED = {
    "do_train": False, "do_eval": False, "do_predict": False, "eval_packing": False, "batch_eval_metrics": False,
    "prediction_loss_only": False, "fp16_full_eval": False, "bf16_full_eval": False, "eval_do_concat_batches": True,
    "remove_unused_columns": True, "label_names": ["labels"],
}  # fmt: skip
"""Arguments of the Trainer, of which the command needs this value. The full evals would cast what is saved."""


class FinetuneError(ValueError):
    """Options, data, a model or a folder cannot be used. The message says what is wrong, where, and what to do."""


class Method(NamedTuple):
    """A method of the caller, beside those of the command.

    fields: the fields of MoSConfig that it takes; target_modules must be one of them. config: a function (values,
    steps) -> the peft configuration for get_peft_model. The values are those of the fields, and peft's modules_to_save
    and task_type. steps is the number of optimizer steps of the run.
    """

    fields: tuple[str, ...]
    config: Callable


LORA = {"lora": Method(LORA_FIELDS, None), "dora": Method(LORA_FIELDS, None)}
MOS = {"mos": MoSConfig, "hydralora": MoSConfig.hydralora, "mixture_of_lora": MoSConfig.mixture_of_lora}


def _option(text: str, default=None, **more):
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class Options:
    """The command's own options."""

    model: str = dataclasses.field(metadata={"help": "a local folder, or a model id on the Hugging Face hub"})
    task: Literal["classification", "causal-lm"] = _option("causal-lm has TRL's SFT options too", "classification")
    dataset: str | None = _option("a file, a folder, or a dataset id on the Hugging Face hub")
    dataset_config: str | None = _option("configuration of the hub dataset")
    train_split: str | None = _option("split of the folder or hub dataset to train on (train if not given)")
    eval_split: str | None = _option("split of the folder or hub dataset to evaluate on")
    train_file: list[str] | None = _option("TSV (no quoting), CSV, JSON, JSONL or Parquet", action="extend")
    eval_file: list[str] | None = _option("metrics for each of these files, and for all together", action="extend")
    eval_size: float | None = _option("without evaluation data: share (0.3) or number (300) of rows to set aside")
    split_seed: int | None = _option("seed of the split of --eval-size (0 if not given)")
    column_names: str | None = _option("columns of TSV and CSV files without a header row", metavar="A,B,...")
    text_column: list[str] | None = _option("column of the text; two are a pair (causal-lm: found if not given)")
    label_column: str | None = _option("column of the class, for classification")
    target_column: str | None = _option("column of the completion, for causal-lm; --text-column is the prompt")
    separator: str | None = _option("between prompt and completion (a newline if not given)")
    rename_label: list[str] | None = _option("count the label OLD as NEW", metavar="OLD=NEW", action="extend")
    max_length: int | None = _option("of a row, in tokens (the model's, at most 512, if not given)")
    max_new_tokens: int = _option("causal-lm: most tokens of a generated answer; 0: no answers", 64)
    dtype: Literal["float32", "bfloat16", "float16"] = _option("of the base; 16 bits train under autocast", "float32")
    resume: bool = _option("continue from the last complete checkpoint in --output", False)
    overwrite: bool = _option("replace an earlier run in --output", False)
    no_plots: bool = _option("write no report page; `python -m mos_kernels report` writes it later", False)
    method: str = _option("mos, hydralora, mixture_of_lora, lora, dora; frozen: the head only; full: all", "mos")
    preset: Literal["paper"] | None = _option("paper: the settings printed in the paper, for --method mos")
    num_experts: int | None = _option("number of experts of hydralora and mixture_of_lora (8 if not given)")

    _argument_group_name = "model, data and run"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)  # None tells nothing


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise FinetuneError(message if len(message) < 500 else f"{message[:500]}…")


def parse(argv: Sequence[str], methods: Mapping[str, Method]) -> tuple[Options, TrainingArguments, object, bool]:
    """(options, TrainingArguments or TRL's SFTConfig, configuration of the adapter, whether target_modules was given).

    The configuration is a MoSConfig, a dict of the fields of another method, or None for frozen and full. Bad values,
    and options that would have no effect, raise `FinetuneError`.
    """
    argv, arguments_of, flags = [str(argument) for argument in argv], TrainingArguments, {"default": argparse.SUPPRESS}
    task = _Parser(add_help=False, allow_abbrev=False)
    task.add_argument("--task")
    if task.parse_known_args(argv)[0].task == "causal-lm":
        from trl import SFTConfig as arguments_of
    parser = _Parser(
        (Options, arguments_of), prog="python -m mos_kernels finetune", allow_abbrev=False, conflict_handler="resolve",
        usage="%(prog)s --model MODEL --output FOLDER --train-file FILE --eval-file FILE [options]",
        description="Fine-tune a transformers model on text, with a Mixture-of-Space adapter or a baseline. First come "
        f"the options of {arguments_of.__name__}; this command's own are at the end, under 'model, data and run' and "
        "'MoSConfig'.", formatter_class=_Help,
    )  # fmt: skip
    parser.set_defaults(**DEFAULTS)
    for flag, (name, kind) in ALIASES.items():
        parser.add_argument(flag, dest=name, type=kind, help=f"the same as --{name}", **flags)
    for flag, (name, value) in FLAGS.items():
        text = f"the same as --{name} {value}"
        parser.add_argument(flag, dest=name, action="store_const", const=value, help=text, **flags)
    _add_adapter_arguments(parser)
    found = vars(parser.parse_args(argv))
    given = {f.name: _value(f.name, found.pop(f.name)) for f in dataclasses.fields(MoSConfig) if f.name in found}
    options = Options(**{f.name: found[f.name] for f in dataclasses.fields(Options)})
    _check(options, found)
    try:
        config = _adapter_config(options, given, {**LORA, **methods})
        values = {f.name: found[f.name] for f in dataclasses.fields(arguments_of) if f.init and f.name in found}
        arguments = arguments_of(**_completed(options, values))
    except (ValueError, TypeError) as error:
        raise FinetuneError(error) from None
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and arguments.world_size == 1:  # transformers looks for a GPU, and finds none
        raise FinetuneError(
            f"each of the {processes} processes would train on all rows by itself: on CPUs give --use_cpu"
        )
    return options, arguments, config, "target_modules" in given


def _completed(options: Options, values: dict) -> dict:
    """The arguments of the Trainer, with those filled in that depend on others."""
    values["eval_strategy"] = values["eval_strategy"] or ("steps" if values["eval_steps"] else "epoch")
    values["save_strategy"] = values["save_strategy"] or ("steps" if values["save_steps"] else values["eval_strategy"])
    values["save_steps"] = values["save_steps"] or values["eval_steps"] or 500
    values["bf16"] = values["bf16"] or options.dtype == "bfloat16"
    values["fp16"] = values["fp16"] or options.dtype == "float16"
    if values["fp16"] and (values["use_cpu"] or not torch.cuda.is_available()):
        raise FinetuneError("float16 trains on CUDA only, and the device is another: use bfloat16 or float32")
    values["data_seed"] = values["seed"] if values["data_seed"] is None else values["data_seed"]
    values["dataloader_pin_memory"] &= torch.cuda.is_available() and not values["use_cpu"]
    values["label_names"] = values["label_names"] or ["labels"]
    if values["greater_is_better"] is None and (values["metric_for_best_model"] or "").endswith("perplexity"):
        values["greater_is_better"] = False
    if values["ddp_find_unused_parameters"] is None and options.method != "full":  # a step uses all of them
        values["ddp_find_unused_parameters"] = False
    if "eval_packing" in values:  # predictions.jsonl and exact_match need each row by itself
        values["eval_packing"] = values["eval_packing"] or False
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if values.get(name):
            values[f"{name}_kwargs"] = values[f"{name}_kwargs"] or {"use_reentrant": False}
    return values


def _check(options: Options, found: Mapping) -> None:
    def need(condition, message: str) -> None:
        if not condition:
            raise FinetuneError(message)

    for name, value in found.items():
        need(not isinstance(value, float) or math.isfinite(value), f"{_flag(name)} {value} must be a finite number")
        if name in _POSITIVE and value is not None:
            need(value > 0, f"{_flag(name)} {value:g} must be positive")
        if name.endswith("seed") and value is not None:
            need(0 <= value < 2**32, f"{_flag(name)} {value} must be in [0, 2^32)")
    for name in ("weight_decay", "max_grad_norm", "warmup_steps", "max_new_tokens"):
        need(found[name] >= 0, f"{_flag(name)} {found[name]:g} must be 0 or positive")
    need(found["max_steps"] == -1 or found["max_steps"] > 0, f"--max-steps {found['max_steps']} must be positive")
    for name in ("eval", "save"):
        steps, strategy = found[f"{name}_steps"], found[f"{name}_strategy"]
        remedy = f"--{name}-steps has no effect with --{name}-strategy {strategy}: drop one of them"
        need(steps is None or strategy in (None, "steps"), remedy)
    for name, known in (
        ("torch_compile_mode", torch._inductor.list_mode_options()),
        ("torch_compile_backend", torch.compiler.list_backends(exclude_tags=())),
    ):
        found_in = found[name] is None or found[name] in known
        need(found_in, f"{_flag(name)} {found[name]!r} is none of {', '.join(known)}")
    for name in ("adam_beta1", "adam_beta2"):
        need(0 <= found[name] < 1, f"{_flag(name)} {found[name]:g} must be from 0 to below 1")
    for name, asked in _FIXED.items():
        alone = f"{_flag(name)}: the command trains, and evaluates each row by itself, with the weights as they are"
        need(found.get(name, asked) == asked or found[name] is None, f"{alone}: drop it")
    size = options.eval_size
    need(
        size is None or size < 1 or size == int(size),
        f"--eval-size {size} is neither a share below 1 nor a whole number",
    )
    need(found["output_dir"], "give --output, the folder for the adapter, metrics, log and report")
    need(not (options.resume and options.overwrite), "--resume and --overwrite exclude each other")
    need(bool(options.dataset) != bool(options.train_file), "give the training data: either --dataset or --train-file")
    sources = [name for name in ("eval_file", "eval_split", "eval_size") if getattr(options, name) is not None]
    need(len(sources) < 2, f"{_flag(*sources)} exclude each other")
    need(sources, "give --eval-file, --eval-split (with --dataset) or --eval-size (training rows to set aside)")
    is_lm, columns = options.task == "causal-lm", options.text_column
    need(is_lm or (columns and options.label_column), "give --text-column and --label-column")
    need(not is_lm or options.method != "frozen", "--method frozen trains a head, and a causal language model has none")
    for name, has_effect, remedy in (
        ("dataset_config", options.dataset, "give --dataset"), ("train_split", options.dataset, "give --dataset"),
        ("eval_split", options.dataset, "give --dataset"), ("split_seed", options.eval_size, "give --eval-size"),
        ("target_column", is_lm and columns, "it is for causal-lm, with --text-column as the prompt"),
        ("separator", options.target_column, "give --target-column"), ("label_column", not is_lm, "drop it"),
        ("rename_label", not is_lm, "drop it"), ("preset", options.method == "mos", "give --method mos"),
        ("num_experts", options.method in ("hydralora", "mixture_of_lora"), "give --spaces NAME=N,..."),
    ):  # fmt: skip
        need(has_effect or getattr(options, name) is None, f"{_flag(name)} has no effect here: {remedy}")


def _flag(*names: str) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


# the adapter


def _adapter_config(options: Options, given: Mapping, methods: Mapping[str, Method]) -> MoSConfig | dict | None:
    if options.method in ("frozen", "full"):
        _refuse(given, "which trains no adapter")
        return None
    if options.method in methods:
        fields = methods[options.method].fields
        _refuse([name for name in given if name not in fields], f"which takes {_flag(*fields)} alone")
        config = MoSConfig(**given)  # for its checks
        return {name: getattr(config, name) for name in fields if name != "target_modules" or name in given}
    if options.method not in MOS:
        raise FinetuneError(f"--method {options.method} is none of frozen, full, {', '.join((*MOS, *methods))}")
    experts = {} if options.num_experts is None else {"num_experts": options.num_experts}
    config = (MoSConfig.paper if options.preset else MOS[options.method])(**given, **experts)
    if set(config.spaces) == {"euclidean"}:
        _refuse([name for name in _CURVED_ONLY if name in given], "where every expert is Euclidean")
    elif not config.learn_curvature:
        unused = ("curvature_lr_ratio", "curvature_max_grad_norm")
        _refuse([name for name in unused if name in given], "where the curvature is not learned")
    if config.mapping == "exp_log" and "domain" in given:
        _refuse(["domain"], "where the exponential map is defined everywhere")
    return config


def _refuse(names, why: str) -> None:
    if names:
        raise FinetuneError(f"{_flag(*names)}: no effect with this method, {why}: drop the option")


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("MoSConfig", "lora and dora take those that peft's LoraConfig has too")
    helps = re.findall(r"^ {8}(\w+): ((?:.+\n?)(?: {12}.+\n?)*)", MoSConfig.__doc__, re.MULTILINE)
    defaults = MoSConfig().to_dict() | {"target_modules": "the FFN linears of the model"}
    texts = {
        name: f"{' '.join(text.split()).rstrip('.')} (default: {defaults[name]})".replace("%", "%%")
        for name, text in helps
    }
    for name, hint in typing.get_type_hints(MoSConfig).items():
        if name in MoSConfig.__dataclass_fields__:
            several = any(typing.get_origin(part) in (Sequence, Mapping) for part in (hint, *typing.get_args(hint)))
            kind = {"action": argparse.BooleanOptionalAction} if hint is bool else {"nargs": "+" if several else None}
            flags = dict.fromkeys((f"--{name}", _flag(name)))
            group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=texts[name], **kind)


def _value(name: str, texts):
    """The value of an adapter's option. Unless it is a name, it is read as JSON, so that MoSConfig checks its type."""
    if not isinstance(texts, list):
        return _scalar(texts) if isinstance(texts, str) else texts
    if name == "spaces_pattern":
        text, example = " ".join(texts), json.dumps({"q_proj|v_proj": {"euclidean": 1}})
        with contextlib.suppress(ValueError):
            return json.loads(text)
        raise FinetuneError(f"{_flag(name)} {text!r} is not JSON such as {example}")
    if name in ("spaces", "rank_pattern", "alpha_pattern"):
        return _mapping(name, ",".join(texts))
    if name in ("target_modules", "exclude_modules", "layers_pattern"):
        # a single plain name becomes a list of one name ending; all-linear and regular expressions stay strings
        is_pattern = texts == ["all-linear"] or (len(texts) == 1 and not re.fullmatch(r"[\w.\-]+", texts[0]))
        return texts[0] if is_pattern else texts
    values = [_scalar(text) for text in texts]  # layers_to_transform
    return None if values == [None] else values


def _mapping(name: str, text: str) -> dict:
    """{"hyperbolic": 3} or hyperbolic=3,spherical=3. A name given twice is an error."""
    pairs = [(key.strip(), _scalar(value)) for key, _, value in (item.rpartition("=") for item in text.split(","))]
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            pairs = json.loads(text, object_pairs_hook=list)
    if not all(key and isinstance(value, (int, float)) for key, value in pairs) or len(dict(pairs)) < len(pairs):
        raise FinetuneError(f"{_flag(name)} {text!r} is not NAME=NUMBER,... with each name once, or the same as JSON")
    return dict(pairs)


def _scalar(text: str):
    """JSON, or as Python spells it: True, None, .1; otherwise the text itself."""
    spelled = {"true": "true", "false": "false", "null": "null", "none": "null"}.get(text.lower(), text)
    for read in (json.loads, float):
        with contextlib.suppress(ValueError):
            return read(spelled)
    return text
