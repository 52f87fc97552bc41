"""Fine-tune a chat model on conversations with TRL's SFTTrainer, and answer a question with the saved adapter.

    pip install ".[trl]"
    python examples/sft_peft.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/Capybara

The data needs a column `messages`: a list of {"role": ..., "content": ...}.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mos_kernels.huggingface import MoSCallback, MoSPeftConfig


def train(options: argparse.Namespace) -> None:
    arguments = SFTConfig(
        output_dir=options.output, learning_rate=options.learning_rate, max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size, gradient_accumulation_steps=2, max_length=options.max_length,
        logging_steps=10, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(options.model),
        args=arguments,
        train_dataset=load_dataset(options.data, split="train").select_columns("messages"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=MoSPeftConfig(r=8, task_type="CAUSAL_LM"),  # the FFN linears of the model
    )
    MoSCallback.add_to(trainer)  # load balancing under gradient accumulation, and the logs of curvature and routing
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(options.output)  # the adapter, and the tokenizer with its chat template


def answer(options: argparse.Namespace) -> str:
    model = AutoPeftModelForCausalLM.from_pretrained(options.output)  # loads the base that the adapter names
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    chat = [{"role": "user", "content": options.question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.eval().generate(**inputs.to(model.device), max_new_tokens=options.max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a model's id or folder")
    parser.add_argument("--data", default="trl-lib/Capybara", help="a data set's id or folder")
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--question", default="What is a tree?")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    train(options)
    print(f"{options.question}\n{answer(options)}")


if __name__ == "__main__":
    main()
