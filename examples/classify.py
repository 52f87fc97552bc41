"""Fine-tune a classifier with transformers' Trainer, without peft, and classify a sentence with the saved adapter.

    pip install ".[hf]" datasets
    python examples/classify.py --model MODEL --train-file demo/train.tsv --eval-file demo/test.tsv

The files are tables with the columns `sentence` and `label`, separated by tabs.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from mos_kernels import MoSConfig
from mos_kernels.huggingface import (
    MoSCallback,
    apply_mos,
    ffn_target_modules,
    load_adapter,
    routing_report,
    save_adapter,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a model's id or folder")
    parser.add_argument("--train-file", default="demo/train.tsv")
    parser.add_argument("--eval-file", default="demo/test.tsv")
    parser.add_argument("--output", default="runs/classify")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args(arguments)

    files = {"train": options.train_file, "eval": options.eval_file}
    data = load_dataset("csv", data_files=files, delimiter="\t")
    classes = sorted(set(data["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda row: {**tokenizer(row["sentence"]), "labels": classes.index(row["label"])},
                    remove_columns=["sentence", "label"])  # fmt: skip

    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes))
    print(apply_mos(model, MoSConfig(r=8, target_modules=ffn_target_modules(model))))
    model.classifier.requires_grad_(True)  # the new head is trained, and saved with the adapter

    training = TrainingArguments(
        options.output, learning_rate=options.learning_rate, num_train_epochs=options.epochs, save_strategy="no",
        per_device_train_batch_size=32, eval_strategy="epoch", logging_steps=20, report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model, training, train_dataset=data["train"], eval_dataset=data["eval"], processing_class=tokenizer,
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )  # fmt: skip
    MoSCallback.add_to(trainer)
    trainer.train()
    save_adapter(model, options.output)

    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes))
    load_adapter(model, options.output)
    sentence = "Tell me how birch is related to plant."
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        print(f"{sentence} -> {classes[model.eval()(**inputs).logits.argmax()]}")
    print(routing_report(model, **inputs))  # which experts its tokens used


if __name__ == "__main__":
    main()
