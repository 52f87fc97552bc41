"""What docs/serving.md says works: a test for each claim, on tiny models."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import DECODERS, VOCABULARY, mos, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils.import_utils import is_serve_available

from mos_kernels.huggingface import MoSPeftConfig, apply_mos, export_lora, load_adapter, save_adapter

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
SHORT, LONG = [8, 9], [4, 5, 6, 7, 11, 12]
NEVER = {"eos_token_id": VOCABULARY - 1, "suppress_tokens": [VOCABULARY - 1]}


def adapted(family: str = "llama", dtype=torch.float32):
    model = tiny(family, dtype)
    torch.manual_seed(0)
    apply_mos(model, mos(model))
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model with its tokenizer, its adapter, and the LoRA exported from that, in folders."""
    folder = tmp_path_factory.mktemp("serving")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", unk_token="w1", eos_token="w2", model_max_length=64
    ).save_pretrained(folder / "base")
    tiny(dtype=torch.float32).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(0)
    apply_mos(model, mos(model))
    save_adapter(model, folder / "mos")
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (4, 9))} for _ in range(8)]
    export_lora(model, batches, folder / "lora", rank=16)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([LONG])).logits


@pytest.mark.parametrize("family", DECODERS)
def test_generate_alone_and_in_a_batch_padded_on_the_left(family):
    model = adapted(family, torch.float64)
    alone = [model.generate(torch.tensor([ids]), **GREEDY, **NEVER)[0, len(ids) :] for ids in (SHORT, LONG)]
    pad = len(LONG) - len(SHORT)
    batch, mask = torch.tensor([[0] * pad + SHORT, LONG]), torch.tensor([[0] * pad + [1] * len(SHORT), [1] * len(LONG)])
    together = model.generate(batch, attention_mask=mask, **GREEDY, **NEVER)[:, len(LONG) :]
    assert torch.equal(together, torch.stack(alone))
    beams = model.generate(torch.tensor([LONG]), num_beams=3, **GREEDY)
    assert beams.shape[0] == 1
    static = model.generate(torch.tensor([LONG]), cache_implementation="static", **GREEDY, **NEVER)
    assert torch.equal(static[0, len(LONG) :], alone[1])


@pytest.mark.parametrize("door", ["plain", "peft"])
def test_pipeline_of_text_alone_and_batched(place, door):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    if door == "peft":
        model = PeftModel.from_pretrained(model, place / "mos")
    else:
        load_adapter(model, place / "mos")
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(place / "base"))
    texts = ["w8 w9", "w4 w5 w6 w7 w11 w12"]
    alone = [generate(text, **GREEDY, **NEVER) for text in texts]
    generate.tokenizer.padding_side = "left"
    assert generate(texts, batch_size=2, **GREEDY, **NEVER) == alone


def test_pipeline_of_a_classifier_batched_and_padded_on_the_right(place, tmp_path):
    tiny("bert", torch.float32).save_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    apply_mos(model, mos(model))
    classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer)
    texts = ["w8 w9", "w4 w5 w6 w7 w11 w12"]
    together = classify(texts, batch_size=2)
    for text, found in zip(texts, together, strict=True):
        (alone,) = classify(text)
        assert alone["label"] == found["label"] and abs(alone["score"] - found["score"]) < 1e-5


@pytest.mark.full
def test_continuous_batching():
    model = adapted()
    settings = GenerationConfig(**GREEDY, eos_token_id=-1)
    found = model.generate_batch([LONG, SHORT], generation_config=settings)
    wanted = [model.generate(torch.tensor([ids]), **GREEDY, eos_token_id=-1)[0, len(ids) :] for ids in (LONG, SHORT)]
    assert [result.generated_tokens for result in found.values()] == [tokens.tolist() for tokens in wanted]


@pytest.mark.parametrize("name", ["mos", "lora"])
def test_a_folder_opens_through_auto_model(place, name):
    model = AutoModelForCausalLM.from_pretrained(place / name)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    own = PeftModel.from_pretrained(base, place / name)
    assert torch.equal(logits(model), logits(own))


@pytest.mark.parametrize("name", ["mos", "lora"])
def test_transformers_serve_loads_an_adapter_inside_its_bases_folder(place, name, tmp_path):
    from transformers.cli.serving.model_manager import ModelManager

    whole = tmp_path / "whole"
    shutil.copytree(place / "base", whole)
    for file in (place / name).iterdir():
        shutil.copy(file, whole)
    model, tokenizer = ModelManager(device="cpu", dtype="float32").load_model_and_processor(str(whole))
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / name)
    assert torch.equal(logits(model), logits(wanted)) and tokenizer("w4").input_ids == [4]


SERVE = "import mos_kernels.huggingface; from transformers.cli.transformers import main; main()"  # as the page has it


@contextlib.contextmanager
def served(folder: Path, log: Path, program: str):
    """`transformers serve FOLDER` in a process of its own; its address, once it answers."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "serve", str(folder), "--device", "cpu", "--dtype", "float32", "--port",
             str(port)], stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(1)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.full
@pytest.mark.skipif(not is_serve_available(), reason="the server needs pip install transformers[serving]")
@pytest.mark.parametrize("name", ["mos", "lora", "merged"])
def test_transformers_serve_answers_over_http(place, name, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(place / "base", whole)
    prompt = "w8 w4 w5 w6 w7"
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    ids = torch.tensor([tokenizer(prompt).input_ids])
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    plain = model.generate(ids, **GREEDY, **NEVER)[0, ids.shape[1] :]
    model = PeftModel.from_pretrained(model, place / ("mos" if name == "mos" else "lora"))
    wanted = model.generate(input_ids=ids, **GREEDY, **NEVER)[0, ids.shape[1] :]
    if name == "merged":
        model.merge_and_unload().save_pretrained(whole)
    else:
        for file in (place / name).iterdir():
            shutil.copy(file, whole)
    GenerationConfig(do_sample=False, pad_token_id=0, **NEVER).save_pretrained(whole)
    program = SERVE if name == "mos" else SERVE.partition(";")[2].strip()  # what was exported needs no import
    body = {"model": str(whole), "prompt": prompt, "max_tokens": 5, "temperature": 0}
    with served(whole, tmp_path / "log", program) as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=120))
    assert answer["choices"][0]["text"].split() == tokenizer.decode(wanted, skip_special_tokens=True).split()
    assert not torch.equal(wanted, plain)


def test_transformers_serve_loads_the_merged_export(place, tmp_path):
    from transformers.cli.serving.model_manager import ModelManager

    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "lora")
    wanted = logits(lora)
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "merged")
    model, _ = ModelManager(device="cpu", dtype="float32").load_model_and_processor(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_the_exported_folder_is_what_servers_document(place):
    """vLLM and SGLang: peft's names, one rank, no bias, module names without paths, plain tensors lora_A and lora_B."""
    from safetensors.torch import load_file

    config = json.loads((place / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 16 and config["bias"] == "none"
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"] and not config["modules_to_save"]
    tensors = load_file(place / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 12 and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (16, 32) and tensors[f"{name}.lora_B.weight"].shape == (64, 16)


def test_the_card_of_an_adapter_says_what_servers_would_do_to_it(place):
    card = (place / "mos" / "README.md").read_text()
    assert "vLLM" in card and "export_lora" in card


def test_what_a_server_would_drop_is_found():
    """vLLM's transformers backend puts its own linears in place of nn.Linear: of a MoSLinear the base would be left."""
    from mos_kernels.huggingface import idle_tensors

    model = adapted()
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x, *gates: torch.nn.functional.linear(x, linear.weight)
    found = dict(idle_tensors(model, input_ids=torch.tensor([LONG])))
    assert {name.rpartition(".")[0] for name in found} == {"model.layers.0.mlp.up_proj"}


def test_a_peft_model_generates_with_and_without_its_adapter(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    plain = base.generate(torch.tensor([LONG]), **GREEDY, **NEVER)
    model = PeftModel.from_pretrained(base, place / "mos")
    assert isinstance(model.peft_config["default"], MoSPeftConfig)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=torch.tensor([LONG]), **GREEDY, **NEVER), plain)
