"""`python -m mos_kernels export-lora`: from a saved adapter and a text file to a peft LoRA folder; bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from finetune_setup import save_bert, save_llama, save_tokenizer, sentences, write_tsv
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mos_kernels import MoSConfig
from mos_kernels.__main__ import main
from mos_kernels.huggingface import apply_mos, ffn_target_modules, save_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama and a tiny BERT with a head of two classes, an adapter of each, and rows."""
    folder = tmp_path_factory.mktemp("export")
    save_llama(folder / "llama")
    save_bert(folder / "bert")
    options = {"vocab_size": save_tokenizer(folder / "t5"), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    options |= {"num_heads": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(**options)).save_pretrained(folder / "t5")
    for base, name, kind, options in (
        ("llama", "llama", AutoModelForCausalLM, {}),
        ("bert", "bert", AutoModelForSequenceClassification, {"num_labels": 2}),
        ("bert", "bert-tokens", AutoModelForTokenClassification, {"num_labels": 3}),
        ("bert", "bert-plain", AutoModel, {}),
        ("t5", "t5", T5ForConditionalGeneration, {}),
    ):
        model = kind.from_pretrained(folder / base, **options)
        torch.manual_seed(0)
        config = MoSConfig(r=2, init_lora_weights=False, target_modules=ffn_target_modules(model))
        apply_mos(model, config)
        if name == "bert":
            model.classifier.requires_grad_(True)
        save_adapter(model, folder / f"{name}-mos")
    write_tsv(folder / "rows.tsv", sentences(30))
    return folder


def command(place, name: str, output, **options) -> int:
    given = {
        "model": place / name, "adapter": place / f"{name}-mos", "output": output, "data_file": place / "rows.tsv",
        "text_column": "sentence", "device": "cpu", **options,
    }  # fmt: skip
    arguments = []
    for option, value in given.items():
        values = value if isinstance(value, list) else [value]
        arguments += [] if value is None else [f"--{option.replace('_', '-')}", *map(str, values)]
    return main(["export-lora", *arguments])


def test_of_a_decoder(place, tmp_path, capsys):
    assert command(place, "llama", tmp_path / "lora", rank=2, batch_size=7, target_column="label") == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 2 on 6 linears" in printed and "loss" in printed and "PeftModel.from_pretrained" in printed
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 2)
    assert config["base_model_name_or_path"] == str(place / "llama")


def test_of_an_encoder_and_decoder(place, tmp_path, capsys):
    """The encoder reads the text, and the decoder writes the completion; what pads that is no token."""
    rows = [("the cat", "yes no"), ("a dog sat on the mat", "no")]
    write_tsv(tmp_path / "rows.tsv", rows, "source\tanswer")
    options = {"data_file": tmp_path / "rows.tsv", "text_column": "source"}
    assert command(place, "t5", tmp_path / "lora", rank=2, target_column="answer", **options) == 0
    printed = capsys.readouterr().out
    assert "fitted on 12 tokens" in printed  # of the encoder's first linear: (2 + 6) and two marks a row
    assert "over 7 predictions" in printed  # 2 + 1, and two marks each
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert command(place, "t5", tmp_path / "none", **options) == 2
    assert "an encoder-decoder writes a completion: name --target-column" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_of_a_classifier_whose_base_names_no_padding(place, tmp_path, capsys):
    """finetune gives it the tokenizer's: so the report is of the same last tokens."""
    config = AutoConfig.from_pretrained(place / "llama", pad_token_id=None, num_labels=2)
    shutil.copytree(place / "llama", tmp_path / "base")
    config.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False))
    model.score.requires_grad_(True)
    save_adapter(model, place / "llama-classes-mos")
    options = {"model": tmp_path / "base", "label_column": "label", "classes": ["no", "yes"], "rank": 2}
    assert command(place, "llama-classes", tmp_path / "lora", **options, batch_size=8) == 0
    batched = capsys.readouterr().out
    assert command(place, "llama-classes", tmp_path / "alone", **options, batch_size=1) == 0
    alone = capsys.readouterr().out
    line = next(line for line in batched.splitlines() if line.startswith("accuracy"))
    assert line.split(",")[0] in alone


def test_rows_are_cut_at_the_positions_that_a_roberta_has(place, tmp_path):
    """Its positions start after the padding index."""
    vocab_size = save_tokenizer(tmp_path / "roberta")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=vocab_size, max_position_embeddings=20, pad_token_id=1, **options)
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "roberta")
    apply_mos(model, MoSConfig(r=2, init_lora_weights=False, target_modules=ffn_target_modules(model)))
    save_adapter(model, place / "roberta-mos")
    write_tsv(tmp_path / "long.tsv", [("no", "the cat " * 30)])
    options = {"model": tmp_path / "roberta", "data_file": tmp_path / "long.tsv", "rank": 1}
    assert command(place, "roberta", tmp_path / "lora", **options) == 0


def test_of_a_model_that_reads_no_text(place, tmp_path, capsys):
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    apply_mos(model, MoSConfig(r=2, target_modules="all-linear"))
    save_adapter(model, place / "vit-mos")
    assert command(place, "vit", tmp_path / "lora", model=tmp_path / "vit") == 2
    said = capsys.readouterr().err
    assert "a ViTForImageClassification reads pixel_values, and the rows are text: call mos_kernels.h" in said


@pytest.mark.parametrize("name", ["bert-tokens", "bert-plain"])
def test_of_a_model_whose_labels_no_row_has(name, place, tmp_path, capsys):
    options = {"model": place / "bert", "rank": 2}
    assert command(place, name, tmp_path / "lora", **options) == 0
    assert "no loss" in capsys.readouterr().out
    assert command(place, name, tmp_path / "none", **options, label_column="label") == 2
    assert "--label-column does not go with a Bert" in capsys.readouterr().err


TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{ ' ' + m.content }}{% endfor %}{% if add_generation_prompt %} and{% endif %}"""


@pytest.mark.parametrize(
    "row, tokens, predictions",
    [
        ({"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}, 3, 2),
        ({"prompt": [{"role": "user", "content": "the cat"}], "completion": [{"role": "assistant", "content": "sat"}]},
         None, None),
        ({"prompt": "the cat", "completion": "sat"}, 5, 2),
        ({"text": "the cat"}, 4, 3),
    ],
)  # fmt: skip
def test_the_forms_of_data_for_a_decoder(row, tokens, predictions, place, tmp_path, capsys):
    model = with_template(place, tmp_path, TEMPLATE)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    status = command(
        place, "llama", tmp_path / "lora", model=model, data_file=tmp_path / "rows.jsonl", text_column=None
    )
    said = capsys.readouterr()
    if tokens is None:  # the template writes "and" before an answer, and here it is not there
        assert status == 2 and "is not the beginning of both columns" in said.err
    else:
        assert status == 0 and f"fitted on {tokens} tokens" in said.out and f"over {predictions} pred" in said.out


def test_messages_that_follow_a_prompt_of_messages(place, tmp_path, capsys):
    start = "{{ 'a ' if m.role == 'user' else 'the ' }}{{ m.content }} "
    asks = "{% if add_generation_prompt %}the{% endif %}"
    model = with_template(place, tmp_path, f"{{% for m in messages %}}{start}{{% endfor %}}{asks}")
    row = {"ask": [{"role": "user", "content": "cat"}], "say": [{"role": "assistant", "content": "sat on"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = {"model": model, "data_file": tmp_path / "rows.jsonl", "text_column": "ask", "target_column": "say"}
    assert command(place, "llama", tmp_path / "lora", **options) == 0
    printed = capsys.readouterr().out
    assert "fitted on 5 tokens" in printed and "over 2 predictions" in printed  # "a cat the" asks for "sat on"


def test_a_template_that_refuses_says_so(place, tmp_path, capsys):
    row = {"messages": [{"role": "system", "content": "the"}, {"role": "user", "content": "cat"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = {"model": with_template(place, tmp_path, TEMPLATE), "data_file": tmp_path / "rows.jsonl"}
    assert command(place, "llama", tmp_path / "lora", **options, text_column=None) == 2
    assert "line 1: the messages do not go through the chat template: no system" in capsys.readouterr().err


@pytest.mark.parametrize("messages", [[], "hello", None])
def test_messages_that_are_none_say_so(messages, place, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert command(place, "llama", tmp_path / "lora", data_file=tmp_path / "rows.jsonl", text_column=None) == 2
    assert "line 1: column 'messages' holds no list of messages" in capsys.readouterr().err


def test_a_label_that_is_none_is_said_as_in_finetune(place, tmp_path, capsys):
    write_tsv(tmp_path / "rows.tsv", [("yes", "the cat"), ("", "a dog")])
    options = {"data_file": tmp_path / "rows.tsv", "label_column": "label"}
    assert command(place, "bert", tmp_path / "lora", **options) == 2
    assert "line 3: column 'label' holds '', which is no class label" in capsys.readouterr().err


def with_template(place, tmp_path, template: str):
    """The folder of the Llama, its tokenizer with this chat template."""
    model = tmp_path / "chat"
    shutil.copytree(place / "llama", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    return model


def test_of_a_classifier_with_its_head_and_fewer_rows(place, tmp_path, capsys):
    write_tsv(tmp_path / "more.tsv", sentences(9, seed=1))
    options = {"label_column": "label", "classes": ["no", "yes"], "rows": 12, "eval_file": tmp_path / "more.tsv"}
    assert command(place, "bert", tmp_path / "lora", **options) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "over 9 predictions" in printed
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]
    assert command(place, "bert", tmp_path / "without") == 0
    assert "no loss: the batches have no labels" in capsys.readouterr().out


def test_the_order_of_the_classes_is_the_adapters(place, tmp_path, capsys):
    """That of --classes, or of the metrics.json beside the adapter, or of labels 0 to n-1; else it is an error."""
    shutil.copytree(place / "bert-mos", tmp_path / "run" / "adapter")
    found, rows = {}, [row for i, row in enumerate(sentences(30)) if i % 4]  # of two classes, not equally many
    write_tsv(tmp_path / "some.tsv", rows)

    def accuracy(name: str, **options) -> str:
        options = {"data_file": tmp_path / "some.tsv", "label_column": "label", **options}
        options["adapter"] = tmp_path / "run" / "adapter"
        assert command(place, "bert", tmp_path / name, **options) == 0
        lines = capsys.readouterr().out.splitlines()
        found[name] = next(line for line in lines if line.startswith("classes, in the order of"))
        return next(line.split()[1] for line in lines if line.startswith("accuracy"))

    assert command(place, "bert", tmp_path / "unknown", adapter=tmp_path / "run" / "adapter", label_column="label") == 2
    assert "name them in the order of the model's logits: --classes A B …" in capsys.readouterr().err
    one, other = accuracy("one", classes=["no", "yes"]), accuracy("other", classes=["yes", "no"])
    assert float(one) == pytest.approx(1 - float(other), abs=1e-3) and one != other
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"data": {"classes": ["yes", "no"]}}))
    assert accuracy("beside") == other and accuracy("given", classes=["no", "yes"]) == one
    assert found["beside"].endswith(": yes, no")
    write_tsv(tmp_path / "numbers.tsv", [(str(["no", "yes"].index(label)), text) for label, text in rows])
    (tmp_path / "run" / "metrics.json").unlink()
    assert accuracy("numbers", data_file=tmp_path / "numbers.tsv") == one
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"data": {"classes": ["yes"]}}))
    assert command(place, "bert", tmp_path / "fewer", adapter=tmp_path / "run" / "adapter", label_column="label") == 2
    assert "is for 2 classes, and 1 are known (yes)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llama", {"rank": 0}, "rank=0"),
        ("llama", {"rows": 0}, "--rows 0 must be at least 1"),
        ("llama", {"device": "gpu7"}, "--device gpu7 cannot be used: "),
        ("llama", {"separator": " "}, "--separator has no effect here: give --target-column"),
        ("llama", {"adapter": "nowhere"}, "nowhere"),
        ("llama", {"data_file": "nowhere.tsv"}, "nowhere.tsv: no such file"),
        ("llama", {"text_column": "words"}, "there is no column 'words'"),
        ("llama", {"label_column": "label"}, "--label-column does not go with a LlamaForCausalLM"),
        ("bert", {"target_column": "label"}, "--target-column does not go with a BertForSequenceClassification"),
        ("bert", {"label_column": "sentence"}, "the adapter is for 2 classes. For the accuracy, name them"),
        ("bert", {"label_column": "label", "classes": ["yes"]}, "is for 2 classes, and 1 are known (yes)"),
        ("bert", {"label_column": "label", "classes": ["yes", "yes"]}, "is for 2 classes, and 2 are known (yes, yes)"),
        ("bert", {"label_column": "label", "classes": ["yes", "on"]}, "'no' is none of the adapter's: yes, on"),
        ("bert", {"classes": ["yes", "no"]}, "--classes has no effect here: give --label-column"),
        ("llama", {"model": "./nowhere"}, "nowhere"),
        ("llama", {"max_length": 0}, "--max-length 0 must be at least 1"),
        ("llama", {"eval_file": "nowhere.tsv"}, "nowhere.tsv: no such file"),
        ("bert", {"model": "other"}, "llama"),
    ],
)  # fmt: skip
def test_bad_input_is_said_and_nothing_is_written(place, name, options, message, tmp_path, capsys):
    if options.get("model") == "other":
        options = {"model": place / "llama"}
    assert command(place, name, tmp_path / "lora", **options) == 2
    assert "error: " in (error := capsys.readouterr().err) and message in error
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rows_without_text_are_no_data(place, name, tmp_path, capsys):
    (tmp_path / "rows.tsv").write_text("label\tsentence\nyes\t\nno\t \n")
    assert command(place, name, tmp_path / "lora", data_file=tmp_path / "rows.tsv") == 2
    assert "rows.tsv, line 2 and all other rows hold special tokens alone: is --text-col" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_an_output_that_is_there_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("mine")
    assert command(place, "llama", tmp_path / "lora") == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "lora" / "mine").read_text() == "mine"
