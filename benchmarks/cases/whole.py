"""A gated FFN and a whole model, in training and in decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import providers, qwen2
from benchmarks.cases.linear import FORWARD_BACKWARD, OURS, PEFT, checks_of, setting_of
from benchmarks.gate import check_decoding, check_ffn, tokens_of
from benchmarks.measure import rotated, rotation
from benchmarks.providers import LAYERS
from benchmarks.suite import Check, Context, Group, Made, Shared, Variant

WHOLE = (providers.FROZEN, *PEFT, providers.FUSED_8, *OURS)
FFNS = (
    providers.FROZEN, providers.LIGER, providers.SWIGLU, providers.LORA_MLP, *PEFT, providers.LILY, providers.EAGER,
    providers.EAGER_APART, providers.TRITON, providers.TRITON_APART,
)  # fmt: skip
OURS_AS_LINEARS = {
    providers.EAGER: providers.EAGER, providers.EAGER_APART: providers.EAGER,
    providers.TRITON: providers.TRITON, providers.TRITON_APART: providers.TRITON,
}  # fmt: skip


def _offered(names: Iterable[str], context: Context) -> list[str]:
    """Those of the names that are arms of their own here."""

    def offered(name: str) -> bool:
        if name == providers.LIGER:
            return context.cuda
        known = LAYERS.get(OURS_AS_LINEARS.get(name, name))
        return known is None or known.offered(context.dtype, context.device)

    return [name for name in names if offered(name)]


def _backend(name: str) -> str:
    return "triton" if OURS_AS_LINEARS.get(name) == providers.TRITON else "eager"


def _variants(
    context: Context, names: Iterable[str], make: Callable[[str], Made], work: tuple[int, int], hidden: int,
    intermediate: int, tokens: int, decoding: bool = False,
) -> dict[str, Variant]:  # fmt: skip
    """A variant for each name, timed where its linears are right in both directions of an FFN. work: bytes, FLOP.

    And where its FFN is: in forward and backward, and with `decoding` frozen and on few tokens. The packages' own
    layers are taken as they are.
    """
    settings = [setting_of(context, *widths, tokens) for widths in ((hidden, intermediate), (intermediate, hidden))]

    def checks(name: str) -> list[Check]:
        ours = LAYERS[OURS_AS_LINEARS[name]].ours if name in OURS_AS_LINEARS else None
        found = [check for setting in settings for check in checks_of(setting, ours)]
        if ours is not None or name in (providers.SWIGLU, providers.LORA_MLP):
            run = functools.partial(check_ffn, settings[0], name)
            found.append(Check(("ffn", hidden, intermediate, tokens_of(settings[0]), context.dtype, name), name, run))
        if decoding and ours is not None:
            run = functools.partial(check_decoding, settings[0], name)
            found.append(Check(("decoding", hidden, intermediate, context.dtype, name), f"{name}, decoding", run))
        return found

    return {name: Variant(functools.partial(make, name), *work, checks=checks(name)) for name in names}


TUNED = f"{FORWARD_BACKWARD}, settings found"


def ffn(context: Context, hidden: int, intermediate: int, tokens: int, step: str = FORWARD_BACKWARD) -> Group:
    """A gated FFN with its router, forward and backward. What it saves is counted with x, which it may have to keep."""
    size, options = context.dtype.itemsize, {"device": context.device, "dtype": context.dtype}

    def draw() -> tuple:
        count = rotation(context.device, 2 * tokens * hidden * size)
        x = rotated(lambda: torch.randn(tokens, hidden, **options).requires_grad_(), count)
        return *x, rotated(lambda: torch.randn(tokens, hidden, **options), count)[0]

    inputs = Shared(draw)

    def make(name: str) -> Made:
        block = _ffn_block(context, hidden, intermediate)
        trained = qwen2.adapt(block, name, setting_of(context, hidden, intermediate, tokens).config())
        x, _, dy = inputs()

        def call() -> tuple:
            tokens = x()
            return torch.autograd.grad(block(tokens), [tokens, *trained], dy())

        return Made(call, lambda: block(x()), [*block.parameters(), *block.buffers()])

    moved = 2 * size * (3 * hidden * intermediate + tokens * (2 * hidden + 6 * intermediate))
    flop = 12 * tokens * hidden * intermediate
    return Group(
        "ffn", step, {"d_in": hidden, "d_out": intermediate, "tokens": tokens},
        _variants(context, _offered(FFNS, context), make, (moved, flop), hidden, intermediate, tokens),
        providers.FROZEN, weigh=True, shared=[inputs],
    )  # fmt: skip


def _ffn_block(context: Context, hidden: int, intermediate: int) -> nn.Module:
    block = qwen2.FFN(hidden, intermediate).to(context.device, context.dtype).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def decode(context: Context, hidden: int, intermediate: int, tokens: int, layers: int = 2) -> Group:
    """A gated FFN on few tokens, frozen for inference; blocks in turn, so that no cache holds the weights."""
    x = Shared(lambda: torch.randn(tokens, hidden, device=context.device, dtype=context.dtype))

    def make(name: str) -> Made:
        blocks = [_ffn_block(context, hidden, intermediate) for _ in range(layers)]
        for block in blocks:
            qwen2.adapt(block, name, setting_of(context, hidden, intermediate, tokens).config())
            block.eval()
            qwen2.freeze(block, _backend(name))

        def call() -> None:
            with torch.no_grad():
                for block in blocks:
                    block(x())

        return Made(call)

    names = _offered((*WHOLE, *OURS_AS_LINEARS), context)
    size = context.dtype.itemsize
    moved = layers * size * (3 * hidden * intermediate + tokens * (2 * hidden + 6 * intermediate))
    flop = 6 * layers * tokens * hidden * intermediate
    shape = {"d_in": hidden, "d_out": intermediate, "tokens": tokens, "layers": layers}
    return Group(
        "decode", "forward of FFNs", shape,
        _variants(context, names, make, (moved, flop), hidden, intermediate, tokens, decoding=True),
        providers.FROZEN, clock="graph", repeats=4, shared=[x],
    )  # fmt: skip


def _model_work(shape: qwen2.Shape, batch: int, length: int, size: int) -> tuple[int, int]:
    """Bytes of all weights once, and FLOP of the products with them, forward; attention itself is left out."""
    narrow = shape.kv_heads * (shape.hidden // shape.heads)
    weights = shape.layers * shape.hidden * (2 * shape.hidden + 2 * narrow + 3 * shape.intermediate)
    weights += shape.vocabulary * shape.hidden
    return size * weights, 2 * batch * length * weights


def training(context: Context, shape: qwen2.Shape, batch: int, length: int) -> Group:
    """A training step: forward, loss in the model's dtype, backward, AdamW; the frozen model's backward is dx alone."""
    ids = Shared(lambda: torch.randint(0, shape.vocabulary, (4, batch, length + 1), device=context.device))

    def make(name: str) -> Made:
        model = qwen2.build(shape, context.device, context.dtype)
        trained = qwen2.adapt(model, name, setting_of(context, shape.hidden, shape.intermediate, 1).config())
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
        count = iter(range(1 << 62))

        def call() -> None:
            tokens = ids()[next(count) % 4]
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return Made(call)

    moved, flop = _model_work(shape, batch, length, context.dtype.itemsize)
    fields = {"layers": shape.layers, "tokens": batch * length, "batch": batch, "length": length}
    names = [name for name in _offered(WHOLE, context) if context.tiny or not context.cuda or name != providers.EAGER]
    return Group(
        "model", "training step", fields,
        _variants(context, names, make, (2 * moved, 2 * flop), shape.hidden, shape.intermediate, batch * length),
        providers.FROZEN, weigh=context.cuda, shared=[ids],
    )  # fmt: skip


def decoding(context: Context, shape: qwen2.Shape, batch: int, length: int) -> Group:
    """One token for each of `batch` sequences, against a cache of `length` positions."""
    ids = Shared(lambda: torch.randint(0, shape.vocabulary, (batch, 1), device=context.device))

    def make(name: str) -> Made:
        model = qwen2.build(shape, context.device, context.dtype)
        qwen2.adapt(model, name, setting_of(context, shape.hidden, shape.intermediate, 1).config())
        model.eval()
        qwen2.freeze(model, _backend(name))
        caches = model.caches(batch, length)

        def call() -> Tensor:
            with torch.no_grad():
                return model(ids(), caches)

        return Made(call)

    moved, flop = _model_work(shape, batch, 1, context.dtype.itemsize)
    fields = {"layers": shape.layers, "tokens": batch, "batch": batch, "length": length}
    names = [
        n
        for n in _offered(WHOLE, context)
        if n in (providers.FROZEN, providers.PEFT_8_AS_BASE, providers.PEFT_8, *OURS)
    ]
    if context.cuda:
        names = [n for n in names if n not in (providers.EAGER, providers.PEFT_8)]
    return Group(
        "model", "decoding", fields,
        _variants(context, names, make, (moved, flop), shape.hidden, shape.intermediate, batch, decoding=True),
        providers.FROZEN, clock="graph", shared=[ids],
    )  # fmt: skip
