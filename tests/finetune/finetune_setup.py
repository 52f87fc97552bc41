"""Tiny models, a word-level tokenizer and a small data set on disk, and the command run in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from mos_kernels import finetune

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "mat",
    "tree",
    "house",
    "red",
    "green",
    "big",
    "small",
    "and",
    "or",
    "not",
    "yes",
    "no",
]


def save_tokenizer(folder: Path) -> int:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return len(specials + WORDS)


def save_bert(folder: Path) -> Path:
    vocab_size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    vocab_size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(label, sentence): whether the sentence speaks of a cat."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        picked = torch.randint(len(WORDS), (3 + i % 5,), generator=generator).tolist()
        words = [WORDS[j] for j in picked if WORDS[j] != "cat"] or ["the"]
        rows.append(("no", " ".join(words)) if i % 2 else ("yes", " ".join(["cat", *words])))
    return rows


def write_tsv(path: Path, rows, header: str = "label\tsentence") -> Path:
    path.write_text(header + "\n" + "".join("\t".join(row) + "\n" for row in rows))
    return path


def strings(*arguments) -> list[str]:
    return [str(argument) for argument in ("--use-cpu", "--quiet", *arguments)]


def run(*arguments) -> int:
    """The exit status of the command. Training is on the CPU."""
    return finetune.run(strings(*arguments))


class Killed(BaseException):
    """What no handler in the program catches."""


class KillAt(TrainerCallback):
    """Raises `Killed` after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def colours(path: Path) -> int:
    """How many colours a picture has: a blank one has a single one."""
    from matplotlib.image import imread

    return len({tuple(pixel) for row in imread(path)[::3, ::3, :3].round(2).tolist() for pixel in row})
