"""Where the code of the pages finds what it names: the models, data and adapters are small ones, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_setup import save_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
MODELS = ("base", "Qwen/Qwen2.5-0.5B-Instruct")
DATA = "trl-lib/Capybara"
ROWS = 4


def prepare(folder: Path) -> None:
    """Put the models and the data set of the pages into a folder, under the names that the pages have for them."""
    for name in MODELS:
        save_llama(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder / name)
    lora = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "lora")
    save_chat(folder / DATA)


def save_chat(folder: Path) -> Path:
    """A data set of conversations."""
    turns = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on the mat"}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join([json.dumps({"messages": turns, "source": "made up"})] * ROWS))
    return folder
