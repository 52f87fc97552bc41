"""`python -m mos_kernels finetune`: fine-tune a model on text with MoS, or with LoRA and others under equal settings.

    options -> data -> output folder -> tokenizer, model -> get_peft_model -> Trainer or SFTTrainer
    -> adapter/, predictions.jsonl, metrics.json, report.html

In this order, mistakes are reported before anything slow begins. Two runs that differ only in --method have the same
initial head, order of the data, optimizer and seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers.trainer_callback import PrinterCallback

from mos_kernels.config import MoSConfig
from mos_kernels.finetune import results, training
from mos_kernels.finetune.data import most_tokens, read_data
from mos_kernels.finetune.options import FinetuneError, Method, Options, parse
from mos_kernels.huggingface import MoSCallback, MoSPeftConfig, ffn_target_modules
from mos_kernels.run_report.log import FINETUNE_LOG, TRAINER_STATE, checkpoint_step

__all__ = ["FinetuneError", "Method", "finetune", "run"]

_HUB_ERRORS = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled)


def run(argv: Sequence[str]) -> int:
    """Run the command; errors go to stderr.

    Returns 0, 1 if the run failed, 2 for a mistake of the user, or 130 if it was interrupted.
    """
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if os.environ.get("RANK", "0") != "0":  # only the first of torchrun's processes prints
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            finetune(argv)
    except (FinetuneError, FloatingPointError, ImportError, OSError, SafetensorError, HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)  # ImportError: an option needs a package that is not installed
        return 2 if isinstance(error, (FinetuneError, ImportError)) else 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def finetune(argv: Sequence[str], methods: Mapping[str, Method] | None = None, callbacks: Sequence = ()) -> None:
    """Make one run. argv: the options of the command.

    methods: further methods for --method, by name. callbacks: further callbacks for the Trainer. Raises `FinetuneError`
    for a mistake of the user, and FloatingPointError if a loss or a parameter is not finite.
    """
    options, arguments, config, targets_given = parse(argv, methods or {})
    if arguments.disable_tqdm or not sys.stderr.isatty():
        arguments.disable_tqdm = True
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    train, evaluation, summary = read_data(options)
    settings = results.run_settings(options, arguments, config, summary)
    checkpoint = results.check_output(options, arguments, settings)
    if options.resume and Path(arguments.output_dir, "metrics.json").is_file():
        print(f"{arguments.output_dir} holds a complete run (metrics.json): nothing to resume")
        return
    results.print_data(summary)
    try:
        tokenizer, summary["max_length"] = _load_tokenizer(options)
        model, head = _load_model(options, summary.get("classes"), tokenizer, arguments.seed)
        if not targets_given and config is not None:
            found = {"target_modules": ffn_target_modules(model)}
            config = dataclasses.replace(config, **found) if isinstance(config, MoSConfig) else {**config, **found}
        rows = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        steps = max(arguments.max_steps, 0) or math.ceil(arguments.num_train_epochs * math.ceil(len(train) / rows))
        model, names = _add_adapter(model, options.method, config, head, arguments.seed, methods or {}, steps)
        counts, where = results.parameter_counts(model, head), f" on {len(names)} linears" if names else ""
        print(f"model: {options.method}{where} trains {counts['trained']:,} parameters of {counts['total']:,}")
        trainer = _trainer(options, arguments, model, tokenizer, train, evaluation, summary, list(callbacks))
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(arguments.output_dir).rmdir()  # if it is empty
        if isinstance(error, _HUB_ERRORS) and arguments.push_to_hub:
            remedy = "log in by `hf auth login`, check --hub_model_id and the network, or drop the option"
            raise FinetuneError(f"--push_to_hub: {str(error).strip()}: {remedy}") from error
        if isinstance(error, RuntimeError) and "to be installed" in str(error):  # transformers', for --report_to
            raise FinetuneError(f"--report_to: {error}") from error
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, FinetuneError):
            raise FinetuneError(error) from error  # options that peft or the Trainer does not accept
        raise
    PartialState().wait_for_everyone()  # until each process has read the folder, nothing in it may change
    with arguments.main_process_first():
        results.open_output(options, arguments, settings, checkpoint)
    mos, first = None, {}
    if isinstance(config, MoSConfig):
        mos = MoSCallback.add_to(trainer, MoSCallback(history_file=None))
        own = {name: config.for_module(name) for name in names}
        start = {n: [c.curvature_init * sign for sign in c.curvature_signs] for n, c in own.items() if not c.is_lora}
        first = {"curvature": start}
    step = checkpoint_step(checkpoint) if checkpoint else None
    path = Path(arguments.output_dir, FINETUNE_LOG) if arguments.should_save else None
    log = training.RunLog(path, first, mos, step)
    trainer.add_callback(log)
    _train(trainer, checkpoint)
    if trainer.outputs is None or "eval_loss" not in log.entries[-1]:  # not evaluated after the last step
        trainer.evaluate()
    results.write_results(options, trainer, config, names, head, settings, summary, log)


def _train(trainer, checkpoint: Path | None) -> None:
    state = transformers.TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)) if checkpoint else None
    if state is None or state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    else:  # killed between the last checkpoint and the results
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def _load_tokenizer(options: Options):
    """The tokenizer, which gets a padding token, and the length in tokens at which rows are cut."""
    path = Path(options.model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FinetuneError(f"--model {path}: the folder holds no config.json, so it is no transformers model")
    if not path.is_dir() and (path.is_absolute() or options.model.startswith((".", "~")) or path.exists()):
        raise FinetuneError(f"--model {path}: no such folder; give a transformers model's, or a hub id (owner/name)")
    config = _load(options.model, transformers.AutoConfig.from_pretrained)
    tokenizer = _load(options.model, transformers.AutoTokenizer.from_pretrained)
    if tokenizer.eos_token is None and (options.task == "causal-lm" or tokenizer.pad_token is None):
        raise FinetuneError(f"--model {options.model}: the tokenizer has no end-of-sequence token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = most_tokens(config, tokenizer)
    if (options.max_length or 0) > longest:
        raise FinetuneError(
            f"--max-length {options.max_length} exceeds the {longest} tokens that {options.model} takes"
        )
    return tokenizer, options.max_length or min(512, longest)


def _load_model(options: Options, classes: list[str] | None, tokenizer, seed: int):
    """(model, head): a sequence classifier for `classes`, or a causal language model for None.

    head: the names of the modules that a classifier trains besides its adapter. These are the modules outside the base
    model, and those whose weights are not in the checkpoint. The seed determines their initial values.
    """
    transformers.set_seed(seed)
    settings = {"dtype": getattr(torch, options.dtype), "output_loading_info": True}
    if classes is None:
        model, info = _load(options.model, transformers.AutoModelForCausalLM.from_pretrained, **settings)
        if info["missing_keys"]:
            raise FinetuneError(
                f"--model {options.model} is no causal language model: it has no weights for "
                f"{sorted(info['missing_keys'])[:4]}; give another, or --task classification"
            )
        return model, []
    settings |= {"problem_type": "single_label_classification", "ignore_mismatched_sizes": True}
    settings |= {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
    settings |= {"label2id": {name: i for i, name in enumerate(classes)}}
    model, info = _load(options.model, transformers.AutoModelForSequenceClassification.from_pretrained, **settings)
    base = getattr(model, model.base_model_prefix, None)
    head = [name for name, child in model.named_children() if child is not base and list(child.parameters())]
    absent = {key.rpartition(".")[0] for key in info["missing_keys"]}
    head += sorted(name for name in absent if not any(f"{name}.".startswith(f"{part}.") for part in head))
    if base is None or not head:
        raise FinetuneError(f"--model {options.model}: {type(model).__name__} has no head of its own to train")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, head


def _load(source: str, load, **settings):
    logging, before = transformers.utils.logging, transformers.utils.logging.get_verbosity()
    logging.set_verbosity_error()  # no warning about the new head, which is expected
    try:
        found = load(source, **settings)
    except (OSError, ValueError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        advice = "" if Path(source).is_dir() else "; without the Hugging Face hub, give --model a local folder"
        raise FinetuneError(f"--model {source} cannot be loaded: {message}{advice}") from error
    finally:
        logging.set_verbosity(before)
    if getattr(found[0] if isinstance(found, tuple) else found, "peft_config", None):
        raise FinetuneError(
            f"--model {source} holds an adapter too (adapter_config.json), which the new one would replace: give the "
            "base model without it"
        )
    return found


def _add_adapter(model, method: str, config, head: list[str], seed: int, methods: Mapping[str, Method], steps: int):
    """(model with its adapter, names of the adapted linears). All parameters but those of adapter and head are frozen.

    Trained parameters are float32, whatever the dtype of the base.
    """
    transformers.set_seed(seed)  # so that the initial adapter does not depend on the random numbers of the head
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or f".{name}".startswith(tuple(f".{part}." for part in head)))
    else:
        whole = {"modules_to_save": list(head) or None, "task_type": "SEQ_CLS" if head else "CAUSAL_LM"}
        own = config.to_dict() if isinstance(config, MoSConfig) else config
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if v is not None} | whole
        if isinstance(config, MoSConfig):
            made = MoSPeftConfig(**own)
        elif method in methods:
            made = methods[method].config(own, steps)
        else:
            made = LoraConfig(**own, use_dora=method == "dora")
        model = get_peft_model(model, made)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model, list(getattr(model.base_model, "targeted_module_names", ()))


def _trainer(options: Options, arguments, model, tokenizer, train, evaluation, summary: dict, callbacks: list):
    parts = [part.add_column("file", [name] * len(part)) for name, part in evaluation.items()]
    held_out, length = datasets.concatenate_datasets(parts), summary["max_length"]
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer would wrap the model in DataParallel; for several GPUs use torchrun
    common = {"model": model, "args": arguments, "processing_class": tokenizer, "callbacks": callbacks}
    if options.task == "classification":

        def encode(batch):
            texts = batch["text"]
            columns = list(map(list, zip(*texts, strict=True))) if isinstance(texts[0], list) else [texts]
            return tokenizer(*columns, truncation=True, max_length=length)

        train, held_out = (part.map(encode, batched=True, keep_in_memory=True) for part in (train, held_out))
        if empty := [row["text"] for part in (train, held_out) for row in part if not row["input_ids"]]:
            raise FinetuneError(f"{len(empty):,} rows have no tokens: their text is {empty[0]!r}: remove them")
        trainer = training.ClassifierTrainer(
            **common, train_dataset=train, eval_dataset=held_out,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
        )  # fmt: skip
        score = training.classification_scores
    else:
        arguments.max_length, before = length, (len(train), len(held_out))
        try:
            trainer = training.causal_trainer()(**common, train_dataset=train, eval_dataset=held_out)
        except Exception as error:  # of many types: from jinja (templates), TRL (loss masks, packing), the tokenizer
            raise FinetuneError(f"the data cannot be prepared: {type(error).__name__}: {error}") from error
        for name in ("train_dataset", "eval_dataset"):  # TRL leaves out rows without labels; the first has no loss
            part = getattr(trainer, name)
            if any(len(row) < 2 for row in part["input_ids"]):
                setattr(trainer, name, part.filter(lambda row: len(row["input_ids"]) > 1, keep_in_memory=True))
        lost = 0 if arguments.packing else before[0] - len(trainer.train_dataset)
        lost += before[1] - len(trainer.eval_dataset)
        if lost:
            print(f"note: {lost:,} rows have nothing to learn in their first {length} tokens (--max-length): left out")
        if not len(trainer.train_dataset) or not len(trainer.eval_dataset):
            raise FinetuneError("no row is left: raise --max-length")
        score = training.causal_scores
    scores = training.SCORES[options.task]
    known = [*scores, *(f"{file}/{name}" for file in evaluation for name in scores if len(evaluation) > 1)]
    if (best := arguments.metric_for_best_model) and best.removeprefix("eval_") not in known:
        raise FinetuneError(f"--metric_for_best_model {best} is none of {', '.join(known)}")
    rows = [ids for part in (trainer.train_dataset, trainer.eval_dataset) for ids in part["input_ids"]]
    full = sum(len(ids) >= length for ids in rows)
    if full and not getattr(arguments, "packing", False):
        print(f"note: {full:,} rows are cut at {length} tokens (--max-length), or just as long")
    trainer.compute_metrics = training.scorer(score, trainer.eval_dataset["file"])
    trainer.remove_callback(PrinterCallback)  # RunLog prints instead
    return trainer
