"""What docs/serving.md says works: a test for each claim, on tiny models."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
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

from mos_kernels.huggingface import MoSPeftConfig, apply_mos, export_lora, load_adapter, save_adapter

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
SHORT, LONG = [8, 9], [4, 5, 6, 7, 11, 12]
NEVER = {"eos_token_id": VOCABULARY - 1, "suppress_tokens": [VOCABULARY - 1]}
RELEASE = Version(transformers.__version__).release
ABSENT = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]  # of transformers[serving]


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


def generated(model, ids: list[int], **settings) -> list[int]:
    """The tokens that the model writes after `ids`, greedily."""
    return model.generate(input_ids=torch.tensor([ids]), **GREEDY, **NEVER, **settings)[0, len(ids) :].tolist()


def with_adapter(base: Path, adapter: Path, whole: Path) -> Path:
    """`whole`: the folder of the base model with the adapter's files in it, as the page says."""
    shutil.copytree(base, whole)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, whole)
    return whole


def as_the_server_loads(folder: Path):
    """Model and tokenizer, by `transformers serve`'s loader; without its time-out, whose thread outlives the test."""
    if RELEASE < (5, 5):
        pytest.skip("before transformers 5.5 the server has no loader of its own")
    from transformers.cli.serving.model_manager import ModelManager

    manager = ModelManager(device="cpu", dtype="float32", model_timeout=-1)
    return manager.load_model_and_processor(str(folder))


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


@pytest.mark.parametrize("door", ["plain", "peft", "export"])
def test_pipeline_of_text_alone_and_batched(place, door):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    if door == "plain":
        load_adapter(model, place / "mos")
    else:
        model = PeftModel.from_pretrained(model, place / ("mos" if door == "peft" else "lora"))
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


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="before transformers 5.4 it has no size to be given"
)
@pytest.mark.parametrize("name", ["mos", "lora"])
def test_continuous_batching(place, name):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / name).eval()
    settings = GenerationConfig(**GREEDY, **NEVER)
    size = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else most of the free memory
    found = model.generate_batch([LONG, SHORT], generation_config=settings, continuous_batching_config=size)
    wanted = [generated(model, ids) for ids in (LONG, SHORT)]
    assert [result.generated_tokens for result in found.values()] == wanted


@pytest.mark.parametrize("name", ["mos", "lora"])
def test_a_folder_opens_through_auto_model(place, name):
    model = AutoModelForCausalLM.from_pretrained(place / name)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    own = PeftModel.from_pretrained(base, place / name)
    assert torch.equal(logits(model), logits(own))


def test_a_whole_model_that_was_saved_with_an_adapter_is_read_as_the_base(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    load_adapter(model, place / "mos")
    model.save_pretrained(tmp_path / "whole")
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(place / "base")))
    assert "model.layers.0.mlp.up_proj.mos_lora_A" in report["unexpected_keys"]


@pytest.mark.parametrize("name", ["mos", "lora"])
def test_transformers_serve_loads_an_adapter_inside_its_bases_folder(place, name, tmp_path):
    whole = with_adapter(place / "base", place / name, tmp_path / "whole")
    model, tokenizer = as_the_server_loads(whole)
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / name)
    assert torch.equal(logits(model), logits(wanted)) and tokenizer("w4").input_ids == [4]


@pytest.fixture(scope="module")
def merged(place):
    """The folder of the base model into which the export is merged, as the page says; its logits before merging."""
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "lora").eval()
    wanted = logits(lora)
    lora.merge_and_unload().save_pretrained(place / "merged")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(place / "merged")
    return place / "merged", wanted


def test_transformers_serve_loads_the_merged_export(merged):
    folder, wanted = merged
    model, _ = as_the_server_loads(folder)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_the_merged_export_quantises(merged):
    from bitsandbytes.nn import Linear8bitLt

    folder, wanted = merged
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    assert sum(isinstance(module, Linear8bitLt) for module in model.modules()) == 14
    assert (logits(model) - wanted).norm() < 0.05 * wanted.norm()


SERVE = "import mos_kernels.huggingface; from transformers.cli.transformers import main; main()"  # as the page has it
START = 300
"""Seconds within which the server must answer; a quiet machine needs ten."""


@contextlib.contextmanager
def served(folder: Path, log: Path, program: str):
    """`transformers serve FOLDER` in a process of its own, on a port that the system chose; its address. It is ended
    in any case."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", program, "serve", str(folder), "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        since = time.monotonic()
        while not (running := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, f"the server ended with {server.returncode}: {log.read_text()[-2000:]}"
            assert time.monotonic() - since < START, f"no answer within {START} s: {log.read_text()[-2000:]}"
            time.sleep(0.5)
        yield running[1]
    finally:
        server.kill()
        server.wait()


def post(address: str, body: dict) -> dict:
    """The answer to a request that goes to this machine whatever proxies the environment names."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.full
@pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: pip install transformers[serving]")
@pytest.mark.parametrize("name", ["mos", "lora", "merged"])
def test_transformers_serve_answers_over_http(place, merged, name, tmp_path):
    if RELEASE < (5, 6):
        pytest.skip("before transformers 5.6 the server has no /v1/completions")
    prompt, model = [8, 4, 5, 6, 7], AutoModelForCausalLM.from_pretrained(place / "base")
    plain = generated(model, prompt)
    model = PeftModel.from_pretrained(model, place / ("mos" if name == "mos" else "lora"))
    wanted = generated(model, prompt)
    if name == "merged":
        whole = Path(shutil.copytree(merged[0], tmp_path / "whole"))
    else:
        whole = with_adapter(place / "base", place / name, tmp_path / "whole")
    GenerationConfig(do_sample=False, pad_token_id=0, **NEVER).save_pretrained(whole)
    program = SERVE if name == "mos" else SERVE.partition(";")[2].strip()  # what was exported needs no import
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    body = {"model": str(whole), "prompt": tokenizer.decode(prompt), "max_tokens": 5, "temperature": 0}
    with served(whole, tmp_path / "log", program) as address:
        answer = post(f"{address}/v1/completions", body)
    assert answer["choices"][0]["text"].split() == tokenizer.decode(wanted, skip_special_tokens=True).split()
    assert wanted != plain


def test_the_exported_folder_is_what_servers_document(place):
    """vLLM and SGLang: peft's names, one rank, no bias, module names without paths, plain tensors lora_A and lora_B."""
    from safetensors.torch import load_file

    config = json.loads((place / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 16 and config["bias"] == "none"
    assert not any(config.get(name) for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora"))
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    tensors = load_file(place / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 12 and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (16, 32) and tensors[f"{name}.lora_B.weight"].shape == (64, 16)


def test_the_card_of_an_adapter_says_what_servers_would_do_to_it(place):
    card = (place / "mos" / "README.md").read_text()
    assert "vLLM may leave it" in card and "export_lora" in card


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
