"""What is measured: a function for each kind of group, and the plan, in the order of importance.

order       the base product before or after the adapter
ffn         a gated FFN, forward and backward, with its memory and launches; and again with the settings that tune found
tune        launch settings found for this GPU (GPU alone)
layer       a whole adapted linear, forward and backward, with its memory: every provider but the compiled
lora        one Euclidean expert, a LoRA, against one fused by hand; "lora, a token" without a backward
compiled    what torch.compile makes of three forms of it, which takes a minute a form
graph       the layer in a CUDA graph: what is left of its time without Python's share (GPU alone)
steps       shrink, bridge, expand and so on alone, in each direction, beside the base products
branch      the adapter without its base product: the algebra against the kernels
decode      a gated FFN for 1 to 64 tokens, frozen for inference
model       Qwen2-1.5B's shape: a training step, and decoding
dimension   the paper's Figure 3a: conversion over the embedding dimension, alone and with the linear
depth       the paper's Figure 3b: conversion over the number of layers
tokens, experts, rank, width    growth
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from benchmarks import providers, qwen2
from benchmarks.cases.figure3 import depth, dimension
from benchmarks.cases.linear import branch, compiled, graph, growth, layer, lora
from benchmarks.cases.steps import order, steps
from benchmarks.cases.tuning import tuning
from benchmarks.cases.whole import TUNED, decode, decoding, ffn, training
from benchmarks.suite import Context, Group
from benchmarks.targets import LLAMA3, QWEN2

TINY = (40, 56)
DIMENSIONS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def plan(context: Context) -> Iterator[Group]:
    """Every group of a run, the most important first."""
    if context.tiny:
        yield from _tiny_plan(context)
    elif context.cuda:
        yield from _gpu_plan(context)
    else:
        yield from _cpu_plan(context)


def _tiny_plan(context: Context) -> Iterator[Group]:
    yield layer(context, *TINY, 20)
    yield lora(context, *TINY, 20)
    yield lora(context, *TINY, 1)
    yield compiled(context, *TINY, 20)
    yield steps(context, *TINY, 20)
    yield graph(context, *TINY, 20)
    yield branch(context, *TINY, 20)
    yield order(context, *TINY, 20)
    shape = qwen2.Shape(hidden=40, intermediate=56, layers=1, heads=4, kv_heads=2, vocabulary=64)
    yield ffn(context, *TINY, 20)
    if providers.why_no_triton(context.device) is None:
        yield tuning(context, (TINY, TINY[::-1]), 80)
        yield ffn(context, *TINY, 20, step=TUNED)
    yield decode(context, *TINY, 3)
    yield training(context, shape, batch=1, length=20)
    yield decoding(context, shape, batch=3, length=8)
    yield dimension(context, 40, 20)
    yield dimension(context, 40, 20, linear=True)
    yield depth(context, 2, 40, 20)
    yield growth(context, "tokens", *TINY, 1)
    yield growth(context, "experts", *TINY, 20)
    yield growth(context, "width", 37, 53, 20)


def _gpu_plan(context: Context) -> Iterator[Group]:
    T, full = 8192, context.full
    ffns = [(*widths, tokens) for widths in (QWEN2[0], LLAMA3[0]) for tokens in (T, 2048)]
    for widths in (*QWEN2, *LLAMA3):
        yield order(context, *widths, T)
    for widths in (*QWEN2, *LLAMA3):
        yield steps(context, *widths, T)
    for shape in ffns:
        yield ffn(context, *shape)
    for tokens in (1, 4, 16, 64) if full else (1, 16, 64):
        yield decode(context, 1536, 8960, tokens)
    if providers.why_no_triton(context.device) is None:
        yield tuning(context)
        for shape in ffns:
            yield ffn(context, *shape, step=TUNED)
    yield training(context, qwen2.Shape(layers=28 if _memory(context) > 120e9 else 14), batch=4, length=2048)
    for widths in (*QWEN2, *LLAMA3):
        yield layer(context, *widths, T)
    yield lora(context, 1536, 1536, T)
    yield branch(context, *QWEN2[0], T)
    for widths in (*QWEN2, *LLAMA3):
        yield graph(context, *widths, T)
    for tokens in [4**i for i in range(7)] + [8192, 16384, 65536] if full else (1, 1024, 8192, 65536):
        yield growth(context, "tokens", *QWEN2[0], tokens)
    for widths in ((1537, 8961), (1531, 8963), (1544, 8968), QWEN2[0]) if full else ((1537, 8961), QWEN2[0]):
        yield growth(context, "width", *widths, T)
    for d in DIMENSIONS if full else (256, 4096, 16384):
        yield dimension(context, d, T)
    yield compiled(context, *QWEN2[0], T)
    for layers in DEPTHS if full else (1, 8, 64):
        yield depth(context, layers, 1536, T)
    for batch in (1, 2, 4, 8, 16, 32, 64) if full else (1, 64):
        yield decoding(context, qwen2.Shape(), batch=batch, length=512)
    for experts in EXPERTS if full else (1, 8, 64):
        yield growth(context, "experts", *QWEN2[0], T, experts=experts)
    for rank in RANKS if full else (1, 8, 128):
        yield growth(context, "rank", *QWEN2[0], T, rank=rank)
    for d in DIMENSIONS if full else (1024, 4096):
        yield dimension(context, d, T, linear=True)
    for widths in (*QWEN2[1:], *LLAMA3):
        yield branch(context, *widths, T)
    if full:
        for widths in (*QWEN2[1:], *LLAMA3):
            yield compiled(context, *widths, T)
        for batch in (1, 4, 16):
            yield training(context, qwen2.Shape(), batch=batch, length=512)


def _memory(context: Context) -> float:
    return torch.cuda.get_device_properties(context.device).total_memory if torch.cuda.is_available() else math.inf


def _cpu_plan(context: Context) -> Iterator[Group]:
    T, full = 512, context.full
    reduced = qwen2.Shape(layers=2, vocabulary=4096)
    yield ffn(context, 1536, 8960, T)
    yield decode(context, 576, 1536, 1, layers=30)
    for widths in QWEN2:
        yield layer(context, *widths, T)
    for tokens in (T, 1):
        for width in (576, 1536):  # of SmolLM2's and of Qwen2's attention
            yield lora(context, width, width, tokens)
    for d in DIMENSIONS if full else (256, 1024, 4096, 16384):
        yield dimension(context, d, 128)
    for layers in DEPTHS if full else (1, 8, 64):
        yield depth(context, layers, 1536, 64)
    yield training(context, reduced, batch=1, length=128)
    yield branch(context, *QWEN2[0], T)
    for widths in QWEN2:
        yield steps(context, *widths, T)
    for tokens in [4**i for i in range(9)] if full else (1, 64, 1024, 8192, 65536):
        yield growth(context, "tokens", 256, 512, tokens)
    for experts in EXPERTS if full else (1, 8, 64):
        yield growth(context, "experts", 1536, 2048, T, experts=experts)
    for rank in RANKS if full else (1, 8, 128):
        yield growth(context, "rank", 1536, 2048, T, rank=rank)
    for widths in ((1537, 2049), (1531, 2053), (1544, 2056), (1536, 2048)):
        yield growth(context, "width", *widths, T)
    yield compiled(context, *QWEN2[0], T)
    for d in DIMENSIONS[:5] if full else (256, 1024, 4096):
        yield dimension(context, d, 128, linear=True)
    for tokens in (1, 16, 64):
        yield decode(context, 1536, 8960, tokens)
    for batch in (1, 8):
        yield decoding(context, reduced, batch=batch, length=128)
    yield order(context, *QWEN2[0], T)
