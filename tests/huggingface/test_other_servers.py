"""The exported LoRA in vLLM and llama.cpp: greedy tokens are those of peft. An adapter itself: what they do with it.

Neither belongs to the tests' environment: vLLM pins its own torch and transformers, and llama.cpp's converters come
with its sources only. These tests are skipped without them:

    VLLM_PYTHON    the Python of an environment with vLLM
    LLAMA_CPP      the folder of llama.cpp's sources; pip install llama-cpp-python gguf sentencepiece
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import mos
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mos_kernels.huggingface import apply_mos, export_lora, load_adapter, save_adapter

pytestmark = pytest.mark.full

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
LLAMA_CPP = os.environ.get("LLAMA_CPP")
ABSENT = [name for name in ("llama_cpp", "gguf", "sentencepiece") if find_spec(name) is None]
needs_vllm = pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON does not name a Python that has vLLM")
needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP or bool(ABSENT),
    reason=f"{', '.join(ABSENT)} not installed" if ABSENT else "LLAMA_CPP does not name the folder of its sources",
)

PROMPT, NEW = [1, 20, 25, 30, 40], 16


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of bytes and letters, of the kind that a Llama has; the size of its vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama with heads as wide as vLLM asks for, its adapter, the LoRA exported from that, and it merged."""
    folder = tmp_path_factory.mktemp("others")
    size = save_tokenizer(folder / "base")
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    apply_mos(model, mos(model))
    save_adapter(model, folder / "mos")
    export_lora(model, [{"input_ids": torch.randint(3, size, (4, 32))} for _ in range(8)], folder / "lora", rank=16)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora")
    merged.merge_and_unload().save_pretrained(folder / "merged")
    save_tokenizer(folder / "merged")
    return folder


def peft_says(place: Path, adapter: str | None) -> tuple[list[int], torch.Tensor]:
    """The tokens after PROMPT, greedily, and the logits of the first, of the base or with an adapter."""
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, place / adapter)
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        tokens = model.generate(input_ids=prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return tokens[0, len(PROMPT) :].tolist(), model(prompt).logits[0, -1]


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, lora, prompt, new, options = json.loads(sys.argv[1])
    llm = LLM(model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, **options)
    how = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    request = None if lora is None else LoRARequest("lora", 1, lora)
    (answer,) = llm.generate({"prompt_token_ids": prompt}, how, lora_request=request)
    print("TOKENS", json.dumps(list(answer.outputs[0].token_ids)))
"""


def vllm(tmp_path: Path, model: Path, lora: Path | None = None, **options) -> list[int] | str:
    """The tokens that vLLM writes after PROMPT, or what it printed if it failed."""
    if lora is not None:
        options |= {"enable_lora": True, "max_lora_rank": 16}
    program = tmp_path / "program.py"
    program.write_text(VLLM)
    given = json.dumps([str(model), None if lora is None else str(lora), PROMPT, NEW, options])
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    run = subprocess.run(
        [VLLM_PYTHON, str(program), given], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    found = [line for line in run.stdout.splitlines() if "TOKENS" in line]
    return json.loads(found[0].partition("TOKENS")[2]) if found else run.stdout + run.stderr


@needs_vllm
@pytest.mark.parametrize("merged", [False, True])
def test_vllm_answers_as_the_export(place, merged, tmp_path):
    wanted, _ = peft_says(place, "lora")
    found = vllm(tmp_path, place / "merged") if merged else vllm(tmp_path, place / "base", place / "lora")
    assert found == wanted and wanted != peft_says(place, None)[0]


def whole(place: Path, folder: Path, **how) -> Path:
    """The folder of the base with the adapter's files in it."""
    AutoModelForCausalLM.from_pretrained(place / "base").save_pretrained(folder, **how)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "mos" / name, folder)
    return folder


@needs_vllm
@pytest.mark.parametrize("form", ["a LoRA", "a whole model", "beside the base"])
def test_vllm_refuses_an_adapter_itself(place, form, tmp_path):
    if form == "a LoRA":
        assert "is unsupported LoRA weight" in vllm(tmp_path, place / "base", place / "mos")
    elif form == "a whole model":
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        load_adapter(model, place / "mos")
        model.save_pretrained(tmp_path / "whole")
        assert "no module or parameter named 'layers.0.mlp.down_proj.mos_" in vllm(tmp_path, tmp_path / "whole")
    else:
        assert "no module or parameter named 'base_model'" in vllm(tmp_path, whole(place, tmp_path / "whole"))


@needs_vllm
@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_vllm_leaves_out_an_adapter_inside_a_base_of_several_files(place, implementation, tmp_path):
    base, _ = peft_says(place, None)
    folder = whole(place, tmp_path / "whole", max_shard_size="100KB")
    assert vllm(tmp_path, folder, model_impl=implementation) == base != peft_says(place, "mos")[0]


def convert(script: str, *arguments: object) -> None:
    run = subprocess.run(
        [sys.executable, str(Path(LLAMA_CPP) / script), *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


@needs_llama_cpp
@pytest.mark.parametrize("merged", [False, True])
def test_llama_cpp_answers_as_the_export(place, merged, tmp_path):
    from llama_cpp import GGML_TYPE_F32, Llama

    wanted, logits = peft_says(place, "lora")
    model, lora = tmp_path / "model.gguf", None if merged else tmp_path / "lora.gguf"
    source = place / ("merged" if merged else "base")
    convert("convert_hf_to_gguf.py", source, "--outtype", "f32", "--outfile", model)
    if lora is not None:
        convert("convert_lora_to_gguf.py", place / "lora", "--base", place / "base", "--outfile", lora)
    llm = Llama(
        str(model), lora_path=None if lora is None else str(lora), n_ctx=256, n_threads=1, logits_all=True,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    llm.eval(PROMPT)
    assert (torch.tensor(llm.scores[len(PROMPT) - 1]) - logits).abs().max() < 1e-4 * logits.abs().max()
    llm.reset()
    found = [token for token, _ in zip(llm.generate(PROMPT, top_k=1, repeat_penalty=1.0), range(NEW), strict=False)]
    assert found == wanted and wanted != peft_says(place, None)[0]
