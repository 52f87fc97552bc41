"""`python -m mos_kernels finetune`: fine-tune a model on a text file with MoS, or with LoRA under equal settings.

    options -> data -> output folder -> tokenizer -> model -> adapter -> train -> adapter/, metrics.json, predictions.jsonl, log.jsonl, plots

in this order, so that what is wrong is said before anything slow begins. Two runs that differ in --method alone share
the head's start, the order of the data, the optimizer and every seed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

from mos_kernels.config import MoSConfig
from mos_kernels.huggingface import data
from mos_kernels.huggingface.data import DataError
from mos_kernels.huggingface.finetune_options import OptionError, adapter_config, add_adapter_arguments, given_options

OWN_FILES = (
    "settings.json",
    "metrics.json",
    "log.jsonl",
    "predictions.jsonl",
    "loss.png",
    "curvature.png",
    "routing.png",
)
"""What a run writes into its folder, besides adapter/ and checkpoint-*/: what --overwrite may remove."""

NOT_RESUMED = ("output", "resume", "overwrite", "quiet", "device", "save_total_limit")
"""Settings that may differ between a run and its resumption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`."""
    parser.description = "Fine-tune a transformers model on text, with a Mixture-of-Space adapter or a baseline."
    what = parser.add_argument_group("model and task")
    what.add_argument("--model", required=True, help="a local folder, or a model id on the Hugging Face hub")
    what.add_argument("--task", choices=("classification", "causal-lm"), default="classification")
    what.add_argument("--output", required=True, type=Path, help="folder for the adapter, metrics, log and plots")

    source = parser.add_argument_group("data", "TSV (no quoting), CSV, JSONL or JSON (a list of objects), or the hub")
    source.add_argument("--dataset", help="a file, or a dataset id on the Hugging Face hub")
    source.add_argument("--dataset-config", help="configuration of the hub dataset")
    source.add_argument("--train-split", help="split of the hub dataset (default train)")
    source.add_argument("--eval-split", help="split of the hub dataset to evaluate on (default: see --eval-size)")
    source.add_argument("--train-file", nargs="+", action="extend", type=Path, help="one file or several")
    source.add_argument("--eval-file", nargs="+", action="extend", type=Path, help="evaluated one by one, and pooled")
    source.add_argument(
        "--eval-size", type=float, help="without evaluation data: share (0.3) or rows (300) to set aside"
    )
    source.add_argument("--split-seed", type=int, help="seed of that stratified split alone (default 0)")
    source.add_argument("--column-names", type=_names, metavar="A,B,...", help="columns of files without a header row")
    source.add_argument("--text-column", nargs="+", required=True, help="two are read as a pair, see --text-join")
    source.add_argument("--text-join", choices=("pair", "space"), help="several text columns (default pair for two)")
    source.add_argument("--label-column", help="the class, for classification")
    source.add_argument("--target-column", help="the completion to learn, for causal-lm (default: learn all the text)")
    source.add_argument("--separator", help="between prompt and completion (default a newline)")
    source.add_argument("--rename-label", nargs="+", metavar="OLD=NEW", help="count the label OLD as NEW")
    source.add_argument("--max-length", type=int, help="in tokens (default: the model's, at most 512)")

    training = parser.add_argument_group(
        "training", "the defaults are the paper's, and transformers' where it is silent"
    )
    training.add_argument("--epochs", type=float, default=3.0, help="default 3")
    training.add_argument("--max-steps", type=int, help="stop after this many optimizer steps instead")
    training.add_argument("--learning-rate", type=float, default=3e-4, help="default 3e-4")
    training.add_argument("--weight-decay", type=float, default=0.01, help="default 0.01; none on biases and curvature")
    training.add_argument("--warmup-ratio", type=float, default=0.1, help="share of the steps (default 0.1)")
    training.add_argument("--lr-scheduler", choices=("linear", "cosine", "constant_with_warmup"), default="linear")
    training.add_argument("--batch-size", type=int, default=32, help="default 32")
    training.add_argument("--eval-batch-size", type=int, default=64, help="default 64")
    training.add_argument("--gradient-accumulation", type=int, default=1, help="batches a step (default 1)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, to save memory")
    training.add_argument("--max-grad-norm", type=float, default=1.0, help="clip the global norm (default 1; 0: never)")
    training.add_argument("--seed", type=int, default=0, help="of head, adapter, data order and dropout (default 0)")
    training.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")

    running = parser.add_argument_group("running")
    running.add_argument("--eval-steps", type=int, help="evaluate and checkpoint every N steps (default: every epoch)")
    running.add_argument("--logging-steps", type=int, default=10, help="default 10")
    running.add_argument("--save-total-limit", type=int, default=2, help="checkpoints to keep (default 2)")
    running.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    running.add_argument("--overwrite", action="store_true", help="replace an earlier run in --output")
    running.add_argument("--quiet", action="store_true", help="no progress bar (as where stderr is no terminal)")
    add_adapter_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0, 2 after an error of the user's (said on stderr), or 130 when interrupted."""
    try:
        _finetune(args)
    except (OptionError, DataError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


class UsageError(ValueError):
    """What the user can put right, found anywhere before training starts."""


def _finetune(args: argparse.Namespace) -> None:
    given = given_options(args)
    try:
        config = adapter_config(args.method, args.preset, args.num_experts, given)
    except OptionError:
        raise
    except ValueError as error:  # MoSConfig's own checks
        raise UsageError(error) from None
    _check_arguments(args)
    train, evaluation, summary = read_data(args)
    settings = _settings(args, config, summary)
    checkpoint = _prepare_output(args, settings)
    if args.resume and (args.output / "metrics.json").is_file():
        print(f"{args.output} holds a complete run (metrics.json): nothing to resume")
        return
    _print_data(summary)
    _train(args, config, given, train, evaluation, summary, settings, checkpoint)


def _check_arguments(args: argparse.Namespace) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(message)

    for name in ("batch_size", "eval_batch_size", "gradient_accumulation", "logging_steps", "save_total_limit"):
        need(getattr(args, name) >= 1, f"{_flag(name)} {getattr(args, name)} must be at least 1")
    for name in ("max_steps", "eval_steps", "max_length"):
        value = getattr(args, name)
        need(value is None or value >= 1, f"{_flag(name)} {value} must be at least 1")
    need(args.epochs > 0, f"--epochs {args.epochs:g} must be positive")
    need(args.learning_rate > 0, f"--learning-rate {args.learning_rate:g} must be positive")
    need(0 <= args.warmup_ratio < 1, f"--warmup-ratio {args.warmup_ratio:g} must be in [0, 1)")
    for name in ("weight_decay", "max_grad_norm", "seed"):
        need(getattr(args, name) >= 0, f"{_flag(name)} {getattr(args, name):g} must be 0 or positive")

    sources = bool(args.dataset) + bool(args.train_file)
    need(sources == 1, "give the training data with either --dataset or --train-file")
    hub = args.dataset is not None and not _is_file_name(args.dataset)
    for name in ("dataset_config", "train_split", "eval_split"):
        need(hub or getattr(args, name) is None, f"{_flag(name)} is for a dataset on the hub, and the data is a file")
    need(not hub or args.column_names is None, "--column-names is for TSV and CSV files, and the dataset is on the hub")
    evaluations = [f for f in ("eval_file", "eval_split", "eval_size") if getattr(args, f) is not None]
    need(
        len(evaluations) == 1,
        f"{' and '.join(map(_flag, evaluations))} exclude each other" if evaluations else "give --eval-file"
        + (", --eval-split" if hub else "") + " or --eval-size (a share or a number of training rows to set aside)",
    )  # fmt: skip
    need(
        args.split_seed is None or args.eval_size is not None, "--split-seed has no effect without --eval-size: drop it"
    )

    several = len(args.text_column) > 1
    need(several or args.text_join is None, "--text-join has no effect with a single --text-column: drop it")
    if args.task == "classification":
        need(args.label_column is not None, "--task classification needs --label-column")
        for name in ("target_column", "separator"):
            need(getattr(args, name) is None, f"{_flag(name)} is for --task causal-lm: drop it")
        need(args.text_join != "pair" or len(args.text_column) == 2, "--text-join pair needs exactly two text columns")
    else:
        for name in ("label_column", "rename_label"):
            need(getattr(args, name) is None, f"{_flag(name)} is for --task classification: drop it")
        need(args.text_join != "pair", "--text-join pair is for --task classification: use space")
        need(
            args.method != "frozen",
            "--method frozen trains the head alone, and a causal language model has none to train",
        )
        need(args.target_column or args.separator is None, "--separator has no effect without --target-column: drop it")


# data


def read_data(args: argparse.Namespace) -> tuple[dict, dict[str, dict], dict]:
    """Read, check and split: (train, evaluation by file name, summary for metrics.json). Loads no model.

    train and each evaluation: {"texts": [tuple, ...], "targets": [str, ...] or None}.
    """
    files: list[Path] = []

    def read(paths) -> list[dict]:
        files.extend(paths)
        return [row for path in paths for row in data.read_rows(path, args.column_names)]

    if args.train_file or _is_file_name(args.dataset):
        train_rows, train_name = read(args.train_file or [Path(args.dataset)]), "the training data"
    else:
        train_rows = data.read_hub(args.dataset, args.dataset_config, args.train_split or "train")
        train_name = args.dataset
    if args.train_file and len(args.train_file) == 1 or not args.train_file:
        train_name = str(args.train_file[0] if args.train_file else args.dataset)
    evaluation_rows = {}
    if args.eval_file:
        for path, name in zip(args.eval_file, _distinct_names(args.eval_file), strict=True):
            evaluation_rows[name] = read([path])
    elif args.eval_split:
        evaluation_rows[args.eval_split] = data.read_hub(args.dataset, args.dataset_config, args.eval_split)

    rename = _renames(args.rename_label, train_rows, args.label_column)
    train = _examples(args, train_rows, train_name, rename)
    evaluation = {name: _examples(args, rows, name, rename) for name, rows in evaluation_rows.items()}
    if args.eval_size is not None:
        strata = train["targets"] if args.task == "classification" else ["all"] * len(train_rows)
        kept, held_out = data.stratified_split(strata, args.eval_size, args.split_seed or 0)
        evaluation = {"held_out": _subset(train, held_out)}
        train = _subset(train, kept)

    summary: dict = {"files": {str(path): data.file_digest(path) for path in files}}
    summary["train_rows"] = len(train["texts"])
    summary["eval_rows"] = {name: len(part["texts"]) for name, part in evaluation.items()}
    if args.task == "classification":
        summary["classes"] = data.class_names(
            train["targets"], {name: part["targets"] for name, part in evaluation.items()}
        )
        summary["train_rows_of_class"] = dict(sorted(Counter(train["targets"]).items()))
        summary["eval_rows_of_class"] = dict(
            sorted(Counter(t for part in evaluation.values() for t in part["targets"]).items())
        )
    seen = set(train["texts"])
    summary["eval_rows_also_in_train"] = sum(text in seen for part in evaluation.values() for text in part["texts"])
    return train, evaluation, summary


def _examples(args: argparse.Namespace, rows: list[dict], source: str, rename: dict[str, str]) -> dict:
    texts = data.texts(rows, args.text_column, source)
    if args.task == "classification":
        return {"texts": texts, "targets": data.labels(rows, args.label_column, source, rename)}
    targets = [t for (t,) in data.texts(rows, [args.target_column], source)] if args.target_column else None
    return {"texts": texts, "targets": targets}


def _subset(part: dict, indices: list[int]) -> dict:
    return {key: None if values is None else [values[i] for i in indices] for key, values in part.items()}


def _renames(options: list[str] | None, rows: list[dict], column: str) -> dict[str, str]:
    renames = {}
    for option in options or ():
        old, sign, new = option.partition("=")
        if not sign or not old or not new:
            raise UsageError(f"--rename-label {option!r} is not OLD=NEW")
        if all(str(row.get(column)) != old for row in rows):
            found = sorted({str(row.get(column)) for row in rows})
            raise UsageError(
                f"--rename-label {option!r}: no training row has the label {old!r}; the labels are {found[:20]}"
            )
        renames[old] = new
    return renames


def _distinct_names(paths: list[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]
    if len(set(names)) < len(names):
        raise UsageError(f"--eval-file names the same file twice: {', '.join(map(str, paths))}")
    return [name.replace("/", "_") for name in names]


def _is_file_name(name: str | None) -> bool:
    return bool(name) and (Path(name).suffix in data.SUFFIXES or Path(name).is_file() or name.startswith((".", "/")))


def _print_data(summary: dict) -> None:
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["eval_rows"].items())
    print(f"data: {summary['train_rows']:,} rows to train on; to evaluate on: {rows}")
    if "classes" in summary:
        counts = summary["train_rows_of_class"]
        print("classes: " + ", ".join(f"{name} ({counts[name]:,})" for name in summary["classes"]))
        rare = [name for name, count in counts.items() if count < 5]
        if rare:
            print(
                f"note: fewer than 5 training rows of {rare}; another spelling can be merged with --rename-label OLD=NEW"
            )
    if summary["eval_rows_also_in_train"]:
        print(
            f"note: {summary['eval_rows_also_in_train']} evaluation rows have a text that is also in the training data"
        )


# output folder


def _settings(args: argparse.Namespace, config, summary: dict) -> dict:
    """Every setting of the run in JSON types: the options, the adapter's configuration, the digests of the data."""
    options = {name: value for name, value in vars(args).items() if not callable(value) and name != "command"}
    for field in given_options(args):
        options.pop(field)
    options = {name: value for name, value in options.items() if name not in MoSConfig.__dataclass_fields__}
    adapter = config.to_dict() if isinstance(config, MoSConfig) else config
    settings = {**options, "adapter": adapter, "data_files": summary["files"]}
    return json.loads(json.dumps(settings, default=str))


def _prepare_output(args: argparse.Namespace, settings: dict) -> Path | None:
    """Make the output folder ready; the checkpoint to resume from, or None. Removes nothing that no run has written."""
    from mos_kernels.huggingface.finetune_trainer import last_complete_checkpoint, remove_checkpoints_after, write_text

    folder = args.output
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    checkpoint = None
    if folder.is_dir() and any(folder.iterdir()):
        earlier = _earlier_settings(folder)
        if args.resume:
            if earlier is None:
                raise UsageError(
                    f"--resume: {folder} holds no run (settings.json): name the folder of the interrupted run"
                )
            _require_equal_settings(earlier, settings)
            checkpoint = last_complete_checkpoint(folder)
            step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
            if not (folder / "metrics.json").is_file():
                remove_checkpoints_after(folder, step)
            return checkpoint
        if not args.overwrite:
            raise UsageError(f"--output {folder} is not empty: name another folder, or add --resume or --overwrite")
        if earlier is None:
            raise UsageError(
                f"--overwrite: {folder} was not written by this command (no settings.json): name another folder"
            )
        for path in folder.iterdir():
            if path.name in OWN_FILES:
                path.unlink()
            elif path.is_dir() and (path.name == "adapter" or path.name.startswith("checkpoint-")):
                shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    return None


def _earlier_settings(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "settings.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _require_equal_settings(earlier: dict, settings: dict) -> None:
    names = sorted((set(earlier) | set(settings)) - set(NOT_RESUMED))
    changed = [
        f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}"
        for name in names
        if earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise UsageError(
            f"--resume goes on with the same settings, and these differ: {'; '.join(changed)}. Give the earlier ones, or "
            "start anew with --overwrite"
        )


# training


def _train(args, config, given, train, evaluation, summary, settings, checkpoint) -> None:
    import torch
    import transformers

    from mos_kernels.huggingface import finetune_model as models
    from mos_kernels.huggingface import finetune_trainer as trainers
    from mos_kernels.huggingface.training import mos_param_groups

    try:
        device = _device(args.device, args.dtype)
        models.check_model_source(args.model)
        tokenizer, base_config = models.load_tokenizer(args.model)
        encoded, collator, truncated = _encode(
            args, train, evaluation, summary, tokenizer, models.longest_input(tokenizer, base_config)
        )
        summary["rows_cut_at_max_length"] = truncated
        if truncated:
            print(f"note: {truncated} rows are longer than --max-length and were cut")
        model, head = models.load_model(
            args.model, summary.get("classes"), tokenizer, getattr(torch, args.dtype), args.seed
        )
        model, names, config = models.add_adapter(
            model, args.method, config, "target_modules" in given, head, args.seed
        )
    except (models.ModelError, TypeError, ValueError) as error:
        raise error if isinstance(error, DataError) else UsageError(error) from error

    counts = models.parameter_counts(model)
    print(
        f"model: {type(getattr(model, 'base_model', model)).__name__}, {counts['total']:,} parameters; {args.method} on {len(names)} linears "
        f"trains {counts['adapter']:,} ({100 * counts['adapter'] / counts['total']:.2f}%) and a head of {counts['head']:,}"
    )
    is_mos = isinstance(config, MoSConfig)
    arguments = _training_arguments(args, device)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would wrap the model in DataParallel
    model.to(arguments.device)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    run_log = trainers.RunLog(args.output / "log.jsonl", _step(checkpoint) if checkpoint else None)
    classification = args.task == "classification"
    parts = {name: len(examples) for name, examples in encoded["evaluation"].items()}
    trainer = trainers.FinetuneTrainer(
        model=model,
        args=arguments,
        run_log=run_log,
        train_dataset=encoded["train"],
        eval_dataset=[example for part in encoded["evaluation"].values() for example in part],
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=trainers.scorer(
            trainers.classification_scores if classification else trainers.causal_scores, parts
        ),
        preprocess_logits_for_metrics=trainers.first_logits if classification else trainers.causal_sums,
        optimizers=(torch.optim.AdamW(mos_param_groups(model, args.learning_rate, args.weight_decay)), None),
        is_mos=is_mos,
        is_classifier=classification,
    )
    if not run_log.entries:
        at_start = [config.curvature_init * sign for sign in config.curvature_signs] if is_mos else []
        run_log.write({"step": 0, **({"curvature": dict.fromkeys(names, at_start)} if is_mos else {})})
    _run_training(trainer, checkpoint)
    if trainer.routing is None or "eval_loss" not in run_log.entries[-1]:  # no evaluation after the last step, here
        trainer.evaluate()

    models.save_trained_model(model, args.method, tokenizer, args.output / "adapter")
    trainers.write_text(
        args.output / "predictions.jsonl", _predictions(evaluation, summary.get("classes"), trainer.outputs)
    )
    plots = _plot(args, run_log.entries, config, trainer.routing)
    evaluations = trainers.evaluations(run_log.entries)
    evaluating = sum(entry.get("eval_runtime", 0.0) for entry in run_log.entries)
    metrics = {
        "final": evaluations[-1],
        "evaluations": evaluations,
        "settings": {
            **settings,
            "adapter": config.to_dict() if is_mos else config,
            "max_length": encoded["max_length"],
        },
        "data": summary,
        "parameters": counts,
        "linears": names,
        "steps": trainer.state.global_step,
        "seconds": {"total": round(run_log.seconds, 3), "evaluation": round(evaluating, 3)},
        "memory": _peak_memory(arguments.device),
        "routing": trainer.routing,
        "versions": _versions(transformers, torch),
        "machine": {
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
    }
    trainers.write_text(args.output / "metrics.json", json.dumps(metrics, indent=2, default=str) + "\n")
    _print_result(args, metrics, plots)


def _device(name: str, dtype: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"--device {name} must be auto, cpu, cuda or mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name != "auto" and not there[name]:
        raise UsageError(f"--device {name}: torch {torch.__version__} finds no such device here; use auto or cpu")
    device = name if name != "auto" else next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if dtype == "float16" and device != "cuda":
        raise UsageError(f"--dtype float16 trains on CUDA only, and the device is {device}: use bfloat16 or float32")
    return device


def _encode(args, train, evaluation, summary, tokenizer, longest: int):
    """Tokenise: ({"train", "evaluation", "max_length"}, the collator, how many rows were cut)."""
    from transformers import DataCollatorWithPadding

    if args.max_length is not None and args.max_length > longest:
        raise UsageError(f"--max-length {args.max_length} exceeds the {longest} tokens that {args.model} takes")
    max_length = args.max_length or min(512, longest)
    truncated = 0

    def encode(part: dict) -> list[dict]:
        nonlocal truncated
        if args.task == "classification":
            index = {name: i for i, name in enumerate(summary["classes"])}
            pair = len(args.text_column) == 2 and args.text_join != "space"
            targets = [index[target] for target in part["targets"]]
            examples, cut = data.encode_classification(tokenizer, part["texts"], targets, max_length, pair)
        else:
            prompts = [" ".join(text) for text in part["texts"]]
            separator = "\n" if args.separator is None else args.separator
            examples, cut = data.encode_causal(tokenizer, prompts, part["targets"], max_length, separator)
        truncated += cut
        return examples

    encoded = {"train": encode(train), "evaluation": {name: encode(part) for name, part in evaluation.items()}}
    encoded["max_length"] = max_length
    collator = (
        DataCollatorWithPadding(tokenizer)
        if args.task == "classification"
        else data.CausalCollator(tokenizer.pad_token_id)
    )
    return encoded, collator, truncated


def _training_arguments(args: argparse.Namespace, device: str):
    from mos_kernels.huggingface.finetune_trainer import training_arguments

    rhythm = "steps" if args.eval_steps else "epoch"
    return training_arguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_ratio=args.warmup_ratio,
        lr_scheduler_type=args.lr_scheduler,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        data_seed=args.seed,
        bf16=args.dtype == "bfloat16",
        fp16=args.dtype == "float16",
        eval_strategy=rhythm,
        save_strategy=rhythm,
        eval_steps=args.eval_steps,
        save_steps=args.eval_steps or 500,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,
        save_total_limit=args.save_total_limit,
        label_names=["labels"],
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=args.quiet or not sys.stderr.isatty(),
        report_to="none",
    )


def _run_training(trainer, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    from transformers.trainer_callback import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # killed between the last checkpoint and the results
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# results


def _peak_memory(device) -> dict[str, float]:
    import torch

    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = {"peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.type == "cuda":
        memory["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory


def _versions(transformers, torch) -> dict[str, str]:
    import mos_kernels

    versions = {"mos_kernels": mos_kernels.__version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("peft", "accelerate", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _plot(args, entries: list[dict], config, routing: dict) -> list[Path]:
    from mos_kernels.huggingface import plots

    title = f"{args.method} on {Path(args.model).name}, {args.task}, seed {args.seed}"
    written = [args.output / "loss.png"]
    plots.plot_loss(entries, written[0], title)
    if isinstance(config, MoSConfig):
        if set(config.spaces) != {"euclidean"}:
            written.append(args.output / "curvature.png")
            plots.plot_curvature(entries, config.expert_spaces, written[-1], f"curvature of each expert: {title}")
        written.append(args.output / "routing.png")
        k = config.num_experts_per_tok
        shares = {name: [k * share for share in summary["share"]] for name, summary in routing.items() if summary}
        plots.plot_routing(
            shares, config.expert_spaces, written[-1], f"share of tokens that each expert serves: {title}"
        )
    return written


def _predictions(evaluation: dict[str, dict], classes: list[str] | None, outputs) -> str:
    """A JSON line for each evaluation row, in order: its text, its target, and what the model made of it."""
    rows = [
        {"file": name, "text": text if len(text) > 1 else text[0], "target": target}
        for name, part in evaluation.items()
        for text, target in zip(part["texts"], part["targets"] or [None] * len(part["texts"]), strict=True)
    ]
    for row, output in zip(rows, outputs, strict=True):
        if classes is not None:
            row |= {"predicted": classes[int(output.argmax())], "logits": output.tolist()}
        else:
            row |= {"loss": float(output[0] / output[1]), "tokens": int(output[1]), "exact_match": bool(output[2])}
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _print_result(args: argparse.Namespace, metrics: dict, plots: list[Path]) -> None:
    final = metrics["final"]
    rows = {"pooled" if "files" in final else next(iter(metrics["data"]["eval_rows"])): final, **final.get("files", {})}
    names = [name for name, value in final.items() if isinstance(value, float) and name not in ("epoch", "seconds")]
    width = max(map(len, rows))
    print(f"\n{'evaluation':<{max(width, 10)}}  " + "  ".join(f"{name.replace('_', ' '):>20}" for name in names))
    for row, values in rows.items():
        print(f"{row:<{max(width, 10)}}  " + "  ".join(f"{values[name]:>20.4f}" for name in names))
    seconds = metrics["seconds"]
    print(f"{metrics['steps']} steps in {seconds['total']:.0f} s, {seconds['evaluation']:.0f} s of them evaluating")
    print(
        "written: "
        + ", ".join(
            map(str, [args.output / "adapter", args.output / "metrics.json", args.output / "log.jsonl", *plots])
        )
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty column name")
    return names


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
