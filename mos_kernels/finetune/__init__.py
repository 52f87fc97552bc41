"""`python -m mos_kernels finetune`: fine-tune a model on a text file with MoS, or with LoRA under equal settings.

    options -> data -> output folder -> tokenizer -> model -> adapter -> training -> adapter/, metrics, log, plots

in this order, so that what is wrong is said before anything slow begins. Two runs that differ in --method alone share
the head's start, the order of the data, the optimizer and every seed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from mos_kernels.config import MoSConfig
from mos_kernels.finetune import adalora, inputs, results
from mos_kernels.finetune import folder as folders
from mos_kernels.finetune import model as models
from mos_kernels.finetune import trainer as trainers
from mos_kernels.finetune.data import DataError
from mos_kernels.finetune.folder import FolderError
from mos_kernels.finetune.model import Method, ModelError
from mos_kernels.finetune.options import OptionError, adapter_config, add_adapter_arguments, given_options
from mos_kernels.huggingface.callback import mos_param_groups
from mos_kernels.run_report.log import FINETUNE_LOG, TRAINER_STATE, checkpoint_step


def add_arguments(parser: argparse.ArgumentParser, more_methods: Sequence[str] = ()) -> None:
    """Add the options of the command to `parser`. more_methods: names that --method takes besides its own."""
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
    training.add_argument("--group-by-length", action="store_true", help="batches of like lengths: less padding")
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
    running.add_argument("--no-plots", action="store_true", help="leave the plots out; log.jsonl holds what they show")
    running.add_argument("--quiet", action="store_true", help="no progress bar (as where stderr is no terminal)")
    add_adapter_arguments(parser, more_methods)


def run(
    args: argparse.Namespace,
    more_methods: Mapping[str, Method] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """The command. Returns 0, 2 after an error of the user's (said on stderr), or 130 when interrupted.

    more_methods: what --method takes besides its own, by name. callbacks: more of them for the Trainer.
    """
    try:
        _finetune(args, more_methods or {}, callbacks)
    except (OptionError, DataError, FolderError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _finetune(
    args: argparse.Namespace, more_methods: Mapping[str, Method], callbacks: Sequence[TrainerCallback]
) -> None:
    given = given_options(args)
    config = adapter_config(args.method, args.preset, args.num_experts, given, more_methods)
    _check_arguments(args)
    device = _device(args.device, args.dtype)
    train, evaluation, summary = inputs.read_data(args)
    settings = folders.run_settings(args, config, summary)
    checkpoint = folders.check_output(args, settings)
    if args.resume and (args.output / "metrics.json").is_file():
        print(f"{args.output} holds a complete run (metrics.json): nothing to resume")
        return
    inputs.print_data(summary)

    models.check_model_source(args.model)
    tokenizer, base_config = models.load_tokenizer(args.model)
    longest = models.longest_input(tokenizer, base_config)
    encoded, collator = inputs.encode(args, train, evaluation, summary, tokenizer, longest)
    model, head = models.load_model(
        args.model, summary.get("classes"), tokenizer, getattr(torch, args.dtype), args.seed
    )
    if args.method == "adalora":
        config = _with_rank_schedule(config, args, len(encoded["train"]))
    targets_given = "target_modules" in given
    model, names, config = models.add_adapter(model, args.method, config, targets_given, head, args.seed, more_methods)
    print(models.description(model, args.method, names))

    folders.open_output(args, settings, checkpoint)
    trainer = _trainer(args, device, model, config, encoded, collator, tokenizer, checkpoint, callbacks)
    if not trainer.run_log.entries:
        trainer.run_log.write({"step": 0, **_curvature_at_start(config, names)})
    _run_training(trainer, checkpoint)
    if trainer.outputs is None or "eval_loss" not in trainer.run_log.entries[-1]:  # not evaluated after the last step
        trainer.evaluate()

    models.save_trained_model(model, tokenizer, args.output / "adapter")
    results.write_results(args, trainer, config, names, settings, summary, evaluation)


def _check_arguments(args: argparse.Namespace) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise OptionError(message)

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
    hub = args.dataset is not None and not inputs.is_file_name(args.dataset)
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


def _device(name: str, dtype: str) -> str:
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise OptionError(f"--device {name} must be auto, cpu, cuda or mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name != "auto" and not there[name]:
        raise OptionError(f"--device {name}: torch {torch.__version__} finds no such device here; use auto or cpu")
    device = name if name != "auto" else next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if dtype == "float16" and device != "cuda":
        raise OptionError(f"--dtype float16 trains on CUDA only, and the device is {device}: use bfloat16 or float32")
    return device


def _trainer(args, device: str, model, config, encoded: dict, collator, tokenizer, checkpoint: Path | None, callbacks):
    arguments = _training_arguments(args, device)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would wrap the model in DataParallel
    model.to(arguments.device)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    is_classifier = args.task == "classification"
    score = trainers.classification_scores if is_classifier else trainers.causal_scores
    return trainers.FinetuneTrainer(
        model=model,
        args=arguments,
        run_log=trainers.RunLog(args.output / FINETUNE_LOG, checkpoint_step(checkpoint) if checkpoint else None),
        train_dataset=encoded["train"],
        eval_dataset=[example for part in encoded["evaluation"].values() for example in part],
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=trainers.scorer(score, {name: len(part) for name, part in encoded["evaluation"].items()}),
        preprocess_logits_for_metrics=trainers.first_logits if is_classifier else trainers.causal_sums,
        optimizers=(torch.optim.AdamW(mos_param_groups(model, args.learning_rate, args.weight_decay)), None),
        callbacks=list(callbacks),
        is_mos=isinstance(config, MoSConfig),
        is_classifier=is_classifier,
        rank_allocation=adalora.RankAllocation(model) if args.method == "adalora" else None,
    )


def _training_arguments(args: argparse.Namespace, device: str):
    rhythm = "steps" if args.eval_steps else "epoch"
    return trainers.training_arguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_ratio=args.warmup_ratio,
        lr_scheduler_type=args.lr_scheduler,
        per_device_train_batch_size=args.batch_size,
        group_by_length=args.group_by_length,
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


def _with_rank_schedule(config: dict, args: argparse.Namespace, rows: int) -> dict:
    batches = math.ceil(rows / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(batches / args.gradient_accumulation))
    try:
        return config | adalora.schedule(config["r"], steps)
    except ValueError as error:
        raise OptionError(error) from None


def _run_training(trainer, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # killed between the last checkpoint and the results
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def _curvature_at_start(config, names: list[str]) -> dict:
    if not isinstance(config, MoSConfig):
        return {}
    return {"curvature": {name: [config.curvature_init * sign for sign in config.curvature_signs] for name in names}}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty column name")
    return names


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
