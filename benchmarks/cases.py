"""What is measured: a function for each kind of group, and the plan, in the order of importance.

layer       a whole adapted linear, forward and backward, with its memory: every provider
steps       shrink, bridge, expand and so on alone, in each direction, beside the base products
branch      the adapter without its base product: the algebra against the kernels
order       the base product before or after the adapter
ffn         a gated FFN, forward and backward
decode      a gated FFN for 1 to 64 tokens, frozen for inference
model       Qwen2-1.5B's shape: a training step, and decoding
dimension   the paper's Figure 3a: conversion over the embedding dimension, alone and with the linear
depth       the paper's Figure 3b: conversion over the number of layers
tokens, experts, rank, width    growth
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import maps, providers, qwen2
from benchmarks.gate import TOKENS, check_layer
from benchmarks.measure import rotated, rotation
from benchmarks.providers import BRANCHES, LAYERS, Arm, Base, Setting
from benchmarks.suite import Context, Group, Made, Shared, Variant, checked_once
from mos_kernels.backends import load_backend

QWEN2 = ((1536, 8960), (8960, 1536))
LLAMA3 = ((4096, 14336), (14336, 4096))
TINY = (40, 56)

FORWARD_BACKWARD, FORWARD = "forward+backward", "forward"

PEFT = (providers.PEFT_8, providers.PEFT_8_AS_BASE)
OURS = (providers.EAGER, providers.TRITON)
EVERY_LAYER = (
    providers.FROZEN, *PEFT, providers.PEFT_64, providers.PEFT_64_AS_BASE, providers.FUSED_8, providers.HYDRA,
    providers.MIXTURE, providers.PRINTED, providers.TIDIED, providers.EXP_LOG, providers.GEOOPT,
    providers.EXP_LOG_EAGER, providers.EXP_LOG_TRITON, *OURS, providers.EAGER_OWN, providers.TRITON_OWN,
    providers.EXP_LOG_COMPILED, providers.EAGER_COMPILED,
)  # fmt: skip
EVERY_BRANCH = (
    providers.LORA_BRANCH, providers.PRINTED, providers.TIDIED, providers.EXP_LOG, providers.COLLAPSED, *OURS,
    providers.COLLAPSED_COMPILED,
)  # fmt: skip


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
    yield steps(context, *TINY, 20)
    yield branch(context, *TINY, 20)
    yield order(context, *TINY, 20)
    shape = qwen2.Shape(hidden=40, intermediate=56, layers=1, heads=4, kv_heads=2, vocabulary=64)
    yield ffn(context, *TINY, 20)
    yield decode(context, *TINY, 3)
    yield training(context, shape, batch=1, length=16)
    yield decoding(context, shape, batch=2, length=8)
    yield dimension(context, 40, 20)
    yield dimension(context, 40, 20, linear=True)
    yield depth(context, 2, 40, 20)
    yield growth(context, "tokens", *TINY, 1)
    yield growth(context, "experts", *TINY, 20)
    yield growth(context, "width", 37, 53, 20)


def _gpu_plan(context: Context) -> Iterator[Group]:
    T, full = 8192, context.full
    for widths in (*QWEN2, *LLAMA3):
        cheap = [name for name in EVERY_LAYER if not LAYERS[name].compiled or widths == QWEN2[0] or full]
        yield layer(context, *widths, T, names=cheap)
    for widths in (*QWEN2, *LLAMA3):
        yield steps(context, *widths, T)
    for tokens in (1, 4, 16, 64):
        yield decode(context, 1536, 8960, tokens)
    yield branch(context, *QWEN2[0], T)
    yield training(context, qwen2.Shape(), batch=4, length=2048)
    yield ffn(context, 1536, 8960, T)
    for batch in (1, 8, 64):
        yield decoding(context, qwen2.Shape(), batch=batch, length=512)
    for d in (256, 1024, 4096, 16384) if not full else (256, 512, 1024, 2048, 4096, 8192, 16384):
        yield dimension(context, d, T)
    for layers in (1, 8, 64) if not full else (1, 2, 4, 8, 16, 32, 64):
        yield depth(context, layers, 1536, T)
    for tokens in (1, 64, 1024, 8192, 65536) if not full else [4**i for i in range(9)]:
        yield growth(context, "tokens", *QWEN2[0], tokens)
    for experts in (1, 8, 16, 64) if not full else (1, 2, 4, 8, 16, 32, 64):
        yield growth(context, "experts", *QWEN2[0], T, experts=experts)
    for rank in (1, 8, 32, 128) if not full else (1, 2, 4, 8, 16, 32, 64, 128):
        yield growth(context, "rank", *QWEN2[0], T, rank=rank)
    for widths in ((1537, 8961), (1531, 8963), (1544, 8968), QWEN2[0]):
        yield growth(context, "width", *widths, T)
    for widths in (*QWEN2[1:], *LLAMA3):
        yield branch(context, *widths, T)
    for widths in (*QWEN2, *LLAMA3):
        yield order(context, *widths, T)
    for d in (1024, 4096) if not full else (256, 512, 1024, 2048, 4096, 8192, 16384):
        yield dimension(context, d, T, linear=True)
    if full:
        for batch in (1, 4, 16):
            yield training(context, qwen2.Shape(), batch=batch, length=512)
        for batch in (2, 4, 16, 32):
            yield decoding(context, qwen2.Shape(), batch=batch, length=512)


def _cpu_plan(context: Context) -> Iterator[Group]:
    T, full = 512, context.full
    reduced = qwen2.Shape(layers=2, vocabulary=4096)
    for widths in QWEN2:
        cheap = [name for name in EVERY_LAYER if not LAYERS[name].compiled or widths == QWEN2[0] or full]
        yield layer(context, *widths, T, names=cheap)
    for d in (256, 1024, 4096, 16384) if not full else (256, 512, 1024, 2048, 4096, 8192, 16384):
        yield dimension(context, d, 128)
    for layers in (1, 8, 64) if not full else (1, 2, 4, 8, 16, 32, 64):
        yield depth(context, layers, 1536, 64)
    yield ffn(context, 1536, 8960, 128)
    yield training(context, reduced, batch=1, length=128)
    yield branch(context, *QWEN2[0], T)
    for widths in QWEN2:
        yield steps(context, *widths, T)
    for tokens in (1, 64, 1024, 8192, 65536) if not full else [4**i for i in range(9)]:
        yield growth(context, "tokens", 256, 512, tokens)
    for experts in (1, 8, 16, 64) if not full else (1, 2, 4, 8, 16, 32, 64):
        yield growth(context, "experts", 1536, 2048, T, experts=experts)
    for rank in (1, 8, 32, 128) if not full else (1, 2, 4, 8, 16, 32, 64, 128):
        yield growth(context, "rank", 1536, 2048, T, rank=rank)
    for widths in ((1537, 2049), (1531, 2053), (1544, 2056), (1536, 2048)):
        yield growth(context, "width", *widths, T)
    for d in (256, 1024, 4096):
        yield dimension(context, d, 128, linear=True)
    for tokens in (1, 16, 64):
        yield decode(context, 1536, 8960, tokens)
    for batch in (1, 8):
        yield decoding(context, reduced, batch=batch, length=128)
    yield order(context, *QWEN2[0], T)


# one linear


class Inputs:
    """x and dy of one setting, rotated through more than the cache, and the factors that all providers share."""

    def __init__(self, setting: Setting):
        self.setting, self.base = setting, Base(setting)
        size, options = setting.dtype.itemsize, {"device": setting.device, "dtype": setting.dtype}
        count = rotation(setting.device, setting.tokens * (setting.d_in + setting.d_out) * size)
        self.x, self._x = rotated(lambda: torch.randn(setting.tokens, setting.d_in, **options).requires_grad_(), count)
        self.dy, _ = rotated(lambda: torch.randn(setting.tokens, setting.d_out, **options), count)

    def training(self, arm: Arm) -> Made:
        """Forward and backward; gradients of x and of what the arm trains, none of them accumulated."""
        gates = self.base.gates

        def forward() -> Tensor:
            return arm.forward(self.x(), gates)

        def call() -> tuple:
            x = self.x()
            return torch.autograd.grad(arm.forward(x, gates), [x, *arm.trained], self.dy())

        weights = [t for t in (self.base.linear.weight, self.base.linear.bias, gates) if t is not None]
        return Made(call, forward, [*self._x, *weights, *arm.trained])

    def inference(self, arm: Arm) -> Made:
        def call() -> Tensor:
            with torch.no_grad():
                return arm.forward(self.x(), self.base.gates)

        return Made(call)


def _setting(context: Context, d_in: int, d_out: int, tokens: int, **options) -> Setting:
    if context.tiny:
        options = {"experts": 3, "rank": 2, "active": 2, **options}
    return Setting(d_in, d_out, tokens, context.dtype, context.device, **options)


def _shape(s: Setting) -> dict[str, int]:
    return {"d_in": s.d_in, "d_out": s.d_out, "tokens": s.tokens, "experts": s.experts, "rank": s.rank}


def _frozen_work(s: Setting, backward: bool) -> tuple[int, int]:
    """Bytes and FLOP of the frozen linear: what every provider has to do at least."""
    wide_in, wide_out = s.tokens * s.d_in, s.tokens * s.d_out
    moved, flop = s.d_in * s.d_out + wide_in + wide_out, 2 * s.tokens * s.d_in * s.d_out
    times = 2 if backward else 1
    return times * moved * s.dtype.itemsize, times * flop


def _gates(context: Context, setting: Setting, mappings=("stereographic",), own_router: bool = False) -> list[Callable]:
    """The checks of our backends at a setting: of Triton where it can run, else of eager."""
    triton = providers.why_no_triton(context.device) is None
    found = []
    for backend in ("eager", "triton") if triton else ("eager",):
        for mapping in mappings:
            for own in (False, True) if own_router else (False,):
                check = functools.partial(check_layer, setting, backend, mapping, own, 20 if context.tiny else TOKENS)
                narrow = (setting.d_in, setting.d_out, setting.experts, setting.rank, setting.dtype)
                found.append(checked_once((*narrow, backend, mapping, own), check))
    return found


def _linear_group(context, kind, step, setting, names, table=LAYERS, weigh=False, gates=None, **shape) -> Group:
    inputs, backward = Shared(lambda: Inputs(setting)), step == FORWARD_BACKWARD
    moved, flop = _frozen_work(setting, backward)
    variants = {}
    for name in names:
        provider = table[name]
        if not provider.offered(setting.dtype, setting.device):
            continue

        def make(provider=provider) -> Made:
            arm = provider.make(inputs().base)
            return inputs().training(arm) if backward else inputs().inference(arm)

        variants[name] = Variant(make, moved, flop, provider.compiled)
    base = names[0] if names[0] in (providers.FROZEN, providers.LORA_BRANCH) else None
    gates = _gates(context, setting) if gates is None else gates
    return Group(kind, step, {**_shape(setting), **shape}, variants, base, weigh=weigh, gates=gates, shared=[inputs])


def layer(context: Context, d_in: int, d_out: int, tokens: int, names=EVERY_LAYER) -> Group:
    setting = _setting(context, d_in, d_out, tokens)
    gates = _gates(context, setting, ("stereographic", "exp_log"), own_router=True)
    return _linear_group(context, "layer", FORWARD_BACKWARD, setting, names, weigh=True, gates=gates)


def branch(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    setting = _setting(context, d_in, d_out, tokens)
    group = _linear_group(context, "branch", FORWARD_BACKWARD, setting, EVERY_BRANCH, BRANCHES, weigh=True)
    size, rank = setting.dtype.itemsize, setting.experts * setting.rank
    for variant in group.variants.values():  # read x twice, write dx; write y, read dy
        variant.moved = (3 * tokens * d_in + 2 * tokens * d_out) * size
        variant.flop = 6 * tokens * (d_in * setting.rank + d_out * rank)
    return group


def growth(context: Context, kind: str, d_in: int, d_out: int, tokens: int, **options) -> Group:
    setting = _setting(context, d_in, d_out, tokens, **options)
    ours = providers.TRITON if context.cuda else providers.EAGER
    names = [providers.FROZEN, providers.PEFT_8, providers.FUSED_8, ours]
    if context.cuda:
        names.insert(2, providers.PEFT_8_AS_BASE)
    if context.tiny:
        names.append(providers.TRITON)
    return _linear_group(context, kind, FORWARD_BACKWARD, setting, names)


# the steps alone


class Steps:
    """What flows between the steps of one setting, for a backend."""

    def __init__(self, setting: Setting, backend: str):
        self.inputs, self.run = Inputs(setting), load_backend(backend)
        base, config = self.inputs.base, self.inputs.base.config
        self.config, self.kappa, self.gates = config, base.kappa.detach(), base.gates.detach()
        self.A, self.B, self.router = base.A.detach(), base.B.detach(), base.router.detach()
        self.weight, self.bias = base.linear.weight, base.linear.bias
        run = self.run
        with torch.no_grad():
            self.p, self.n, _ = run.shrink(self.inputs.x(), self.A, None, None, True)
            self.logits = run.routing_logits(self.inputs.x(), self.router)
            self.prepared = run.prepare(self.B, setting.dtype, config)
            self.z, self.bridged = run.bridge(self.p, self.n, self.gates, False, self.kappa, self.prepared, config)
            self.dz, self.dB = run.expand_backward(self.inputs.dy(), self.z, self.prepared, True)
            self.d = run.bridge_backward(
                self.dz, self.bridged, self.p, self.n, self.gates, False, self.kappa, self.prepared, None, config
            )

    def calls(self) -> dict[str, Callable[[], object]]:
        run, config, x, dy = self.run, self.config, self.inputs.x, self.inputs.dy
        dtype, weight, bias = self.inputs.setting.dtype, self.weight, self.bias
        routed = (self.p, self.n, self.gates, False, self.kappa, self.prepared)
        planes = None if self.dB is None else self.dB.clone()
        return {
            "base forward": lambda: F.linear(x(), weight, bias),
            "base backward": lambda: dy() @ weight,
            "shrink": lambda: run.shrink(x(), self.A, None, None, True),
            "shrink with router": lambda: run.shrink(x(), self.A, self.router, None, True),
            "route": lambda: run.route(run.routing_logits(x(), self.router), config),
            "prepare": lambda: run.prepare(self.B, dtype, config),
            "bridge": lambda: run.bridge(*routed, config),
            "expand": lambda: run.expand(self.z, self.prepared, bias, dtype),
            "expand by addmm": lambda: torch.addmm(bias, self.z.to(dtype), self.prepared.B.flatten(1).t()),
            "expand backward": lambda: run.expand_backward(dy(), self.z, self.prepared, True),
            "bridge backward": lambda: run.bridge_backward(
                self.dz, self.bridged, *routed[:3], False, self.kappa, self.prepared, None, config
            ),
            "norm gradient": lambda: run.add_norm_gradient(planes, self.B, self.d.M),
            "shrink backward": lambda: run.shrink_backward(
                x(), self.A, None, self.d.p, self.d.n, None, None, (True, True, False)
            ),
        }


def _step_work(s: Setting) -> dict[str, tuple[int, int]]:
    """The least bytes and the FLOP of each step (PyTorch's copies and casts are not among them)."""
    size, T, R, E, r = s.dtype.itemsize, s.tokens, s.experts * s.rank, s.experts, s.rank
    x, y, W, A, B = T * s.d_in * size, T * s.d_out * size, s.d_in * s.d_out * size, 4 * r * s.d_in, s.d_out * R
    narrow = 4 * T * (r + 1 + E)
    product = 2 * T * s.d_in * s.d_out
    return {
        "base forward": (x + W + y, product), "base backward": (x + W + y, product),
        "shrink": (x + A + 4 * T * (r + 1), 2 * T * s.d_in * (r + 1)),
        "shrink with router": (x + A + 4 * E * s.d_in + narrow, 2 * T * s.d_in * (r + 1 + E)),
        "route": (x + 4 * E * s.d_in + 4 * T * E, 2 * T * s.d_in * E),
        "prepare": ((4 + size) * B, 2 * s.d_out * R * r),
        "bridge": (narrow + size * T * R, 4 * T * R * r),
        "expand": (size * (T * R + B) + y, 2 * T * R * s.d_out),
        "expand by addmm": (size * (T * R + B) + y, 2 * T * R * s.d_out),
        "expand backward": (y + size * (T * R + B) + 4 * (T * R + B), 4 * T * R * s.d_out),
        "bridge backward": (4 * T * R + 2 * narrow, 8 * T * R * r),
        "norm gradient": (12 * B, 2 * s.d_out * R * r),
        "shrink backward": (2 * x + 2 * A + 4 * T * (r + 1), 4 * T * s.d_in * r),
    }  # fmt: skip


def steps(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    """One variant a step: ratios are to the base's forward product."""
    setting = _setting(context, d_in, d_out, tokens)
    triton = providers.why_no_triton(context.device) is None
    backend = "triton" if triton else "eager"
    state = Shared(lambda: Steps(setting, backend))
    variants = {}
    for name, (moved, flop) in _step_work(setting).items():

        def make(name=name) -> Made:
            call = state().calls()[name]

            def alone() -> object:
                with torch.no_grad():
                    return call()

            return Made(alone)

        variants[name] = Variant(make, moved, flop, step=f"{name}, {backend}")
    return Group(
        "steps", "alone", _shape(setting), variants, base="base forward", clock="graph", repeats=8,
        gates=_gates(context, setting), shared=[state],
    )  # fmt: skip


def order(context: Context, d_in: int, d_out: int, tokens: int) -> Group:
    """Forward with the base product after or before the adapter's, each expand by the kernel or by the library."""
    setting = _setting(context, d_in, d_out, tokens)
    triton = providers.why_no_triton(context.device) is None
    state = Shared(lambda: Steps(setting, "triton" if triton else "eager"))

    def adapter(s: Steps, x: Tensor) -> Tensor:
        p, n, _ = s.run.shrink(x, s.A, None, None, True)
        return s.run.bridge(p, n, s.gates, False, s.kappa, s.prepared, s.config)[0]

    def frozen(s: Steps) -> Tensor:
        return F.linear(s.inputs.x(), s.weight, s.bias)

    def adapter_first(s: Steps) -> Tensor:
        x = s.inputs.x()
        return s.run.expand(adapter(s, x), s.prepared, s.bias, x.dtype).addmm_(x, s.weight.t())

    def adapter_first_addmm(s: Steps) -> Tensor:
        x = s.inputs.x()
        return torch.addmm(s.bias, adapter(s, x).to(x.dtype), s.prepared.B.flatten(1).t()).addmm_(x, s.weight.t())

    def base_first(s: Steps) -> Tensor:
        x = s.inputs.x()
        return torch.addmm(s.bias, x, s.weight.t()).addmm_(adapter(s, x).to(x.dtype), s.prepared.B.flatten(1).t())

    runs = {
        providers.FROZEN: frozen, "adapter first": adapter_first,
        "adapter first, expand by addmm": adapter_first_addmm, "base first": base_first,
    }  # fmt: skip
    moved, flop = _frozen_work(setting, backward=False)

    def make(run) -> Made:
        def call() -> Tensor:
            with torch.no_grad():
                return run(state())

        return Made(call)

    variants = {name: Variant(functools.partial(make, run), moved, flop) for name, run in runs.items()}
    return Group(
        "order", FORWARD, _shape(setting), variants,
        providers.FROZEN, clock="graph", repeats=4, gates=_gates(context, setting), shared=[state],
    )  # fmt: skip


# an FFN and a whole model

WHOLE = (providers.FROZEN, *PEFT, providers.FUSED_8, *OURS)


def _whole_names(context: Context) -> list[str]:
    return [name for name in WHOLE if LAYERS[name].offered(context.dtype, context.device)]


def _backend(name: str) -> str:
    return "triton" if name == providers.TRITON else "eager"


def _ffn_gates(context: Context, hidden: int, intermediate: int) -> list[Callable]:
    found = []
    for widths in ((hidden, intermediate), (intermediate, hidden)):
        found += _gates(context, _setting(context, *widths, 64))
    return found


def ffn(context: Context, hidden: int, intermediate: int, tokens: int) -> Group:
    """A gated FFN with its router, forward and backward."""
    size, options = context.dtype.itemsize, {"device": context.device, "dtype": context.dtype}

    def draw() -> tuple:
        count = rotation(context.device, 2 * tokens * hidden * size)
        x = rotated(lambda: torch.randn(tokens, hidden, **options).requires_grad_(), count)
        return *x, rotated(lambda: torch.randn(tokens, hidden, **options), count)[0]

    inputs = Shared(draw)

    def make(name: str) -> Made:
        block = _ffn_block(context, hidden, intermediate)
        trained = qwen2.adapt(block, name, _setting(context, hidden, intermediate, tokens).config())
        x, xs, dy = inputs()

        def call() -> tuple:
            tokens = x()
            return torch.autograd.grad(block(tokens), [tokens, *trained], dy())

        return Made(call, lambda: block(x()), [*xs, *block.parameters()])

    moved = 2 * size * (3 * hidden * intermediate + tokens * (2 * hidden + 6 * intermediate))
    flop = 12 * tokens * hidden * intermediate
    return Group(
        "ffn", FORWARD_BACKWARD, {"d_in": hidden, "d_out": intermediate, "tokens": tokens},
        {name: Variant(functools.partial(make, name), moved, flop) for name in _whole_names(context)},
        providers.FROZEN, weigh=True, gates=_ffn_gates(context, hidden, intermediate), shared=[inputs],
    )  # fmt: skip


def _ffn_block(context: Context, hidden: int, intermediate: int) -> nn.Module:
    block = qwen2.FFN(hidden, intermediate).to(context.device, context.dtype).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def decode(context: Context, hidden: int, intermediate: int, tokens: int) -> Group:
    """A gated FFN on few tokens, frozen for inference; two blocks in turn, so that the L2 does not hold the weights."""
    x = Shared(lambda: torch.randn(tokens, hidden, device=context.device, dtype=context.dtype))

    def make(name: str) -> Made:
        blocks = [_ffn_block(context, hidden, intermediate) for _ in range(2)]
        for block in blocks:
            qwen2.adapt(block, name, _setting(context, hidden, intermediate, tokens).config())
            block.eval()
            qwen2.freeze(block, _backend(name))

        def call() -> None:
            with torch.no_grad():
                for block in blocks:
                    block(x())

        return Made(call)

    size = context.dtype.itemsize
    moved = 2 * size * (3 * hidden * intermediate + tokens * (2 * hidden + 6 * intermediate))
    flop = 12 * tokens * hidden * intermediate
    return Group(
        "decode", "forward of two FFNs", {"d_in": hidden, "d_out": intermediate, "tokens": tokens},
        {name: Variant(functools.partial(make, name), moved, flop) for name in _whole_names(context)},
        providers.FROZEN, clock="graph", repeats=4, gates=_ffn_gates(context, hidden, intermediate), shared=[x],
    )  # fmt: skip


def _model_work(shape: qwen2.Shape, batch: int, length: int, size: int) -> tuple[int, int]:
    """Bytes of all weights once, and FLOP of the products with them, forward; attention itself is left out."""
    narrow = shape.kv_heads * (shape.hidden // shape.heads)
    weights = shape.layers * shape.hidden * (2 * shape.hidden + 2 * narrow + 3 * shape.intermediate)
    weights += shape.vocabulary * shape.hidden
    return size * weights, 2 * batch * length * weights


def training(context: Context, shape: qwen2.Shape, batch: int, length: int) -> Group:
    """A training step: forward, loss, backward, AdamW on the adapter. The frozen model's backward is dx alone."""
    ids = Shared(lambda: torch.randint(0, shape.vocabulary, (4, batch, length + 1), device=context.device))

    def make(name: str) -> Made:
        model = qwen2.build(shape, context.device, context.dtype)
        trained = qwen2.adapt(model, name, _setting(context, shape.hidden, shape.intermediate, 1).config())
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
        count = iter(range(1 << 62))

        def call() -> None:
            tokens = ids()[next(count) % 4]
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return Made(call)

    moved, flop = _model_work(shape, batch, length, context.dtype.itemsize)
    fields = {"layers": shape.layers, "tokens": batch * length, "batch": batch, "length": length}
    names = [name for name in _whole_names(context) if context.tiny or not context.cuda or name != providers.EAGER]
    return Group(
        "model", "training step", fields,
        {name: Variant(functools.partial(make, name), 2 * moved, 2 * flop) for name in names},
        providers.FROZEN, weigh=context.cuda, gates=_ffn_gates(context, shape.hidden, shape.intermediate), shared=[ids],
    )  # fmt: skip


def decoding(context: Context, shape: qwen2.Shape, batch: int, length: int) -> Group:
    """One token for each of `batch` sequences, against a cache of `length` positions."""
    ids = Shared(lambda: torch.randint(0, shape.vocabulary, (batch, 1), device=context.device))

    def make(name: str) -> Made:
        model = qwen2.build(shape, context.device, context.dtype)
        qwen2.adapt(model, name, _setting(context, shape.hidden, shape.intermediate, 1).config())
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
        n for n in _whole_names(context) if n in (providers.FROZEN, providers.PEFT_8_AS_BASE, providers.PEFT_8, *OURS)
    ]
    if context.cuda:
        names = [n for n in names if n not in (providers.EAGER, providers.PEFT_8)]
    return Group(
        "model", "decoding", fields, {n: Variant(functools.partial(make, n), moved, flop) for n in names},
        providers.FROZEN, clock="graph", gates=_ffn_gates(context, shape.hidden, shape.intermediate),
        shared=[ids],
    )  # fmt: skip


# the paper's Figure 3

CONVERSIONS = {  # provider -> (mapping, compiled)
    "stereographic, eager": ("stereographic", False),
    "exp/log, eager": ("exp/log", False),
    "exp/log, geoopt (fp64 inside)": ("exp/log, geoopt (fp64 inside)", False),
    "stereographic, compiled": ("stereographic", True),
    "exp/log, compiled": ("exp/log", True),
}
FUSED = {  # provider -> (mapping, backend)
    "stereographic, our eager": ("stereographic", "eager"),
    "exp/log, our eager": ("exp_log", "eager"),
    "stereographic, our Triton": ("stereographic", "triton"),
    "exp/log, our Triton": ("exp_log", "triton"),
}
BASE_CONVERSION = "stereographic, eager"


class Conversion:
    """x (T, d), and what a mixture's experts need to take it into their spaces and back."""

    def __init__(self, setting: Setting):
        self.setting = setting
        options = {"device": setting.device, "dtype": setting.dtype}
        count = rotation(setting.device, setting.tokens * setting.d_in * setting.dtype.itemsize)
        self.x, _ = rotated(lambda: torch.randn(setting.tokens, setting.d_in, **options), count)
        self.config = setting.config()
        signs = torch.tensor(self.config.curvature_signs, device=setting.device)
        self.kappa = signs * 0.3 / setting.d_in
        self.A = torch.randn(setting.rank, setting.d_in, device=setting.device).mul_(setting.d_in**-0.5)
        self.B = torch.randn(64, setting.experts, setting.rank, device=setting.device).mul_(0.1)
        self.gates = torch.rand(setting.tokens, setting.experts, device=setting.device).softmax(-1)

    def full_width(self, mapping: str, compile_it: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
        kappa, signs = self.kappa, self.config.curvature_signs

        def convert(x: Tensor) -> tuple[Tensor, ...]:
            return maps.convert(x, kappa, signs, mapping)

        return providers.compiled(convert) if compile_it else convert

    def in_rank_space(self, mapping: str, backend: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What the same conversion costs us: ‖x‖² and A x in one pass, then λ, q and e for every expert."""
        run, config = load_backend(backend), self.setting.config(mapping)
        prepared = run.prepare(self.B, self.setting.dtype, config)

        def convert(x: Tensor) -> tuple[Tensor, ...]:
            p, n, _ = run.shrink(x, self.A, None, None, True)
            return (run.bridge(p, n, self.gates, False, self.kappa, prepared, config)[0],)

        return convert

    def of(self, name: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return self.full_width(*CONVERSIONS[name]) if name in CONVERSIONS else self.in_rank_space(*FUSED[name])


def _conversion_work(s: Setting, layers: int = 1) -> tuple[int, int]:
    """Read x, and write the output of every curved expert: the least of a full-width conversion."""
    curved = sum(sign != 0 for sign in s.config().curvature_signs)
    numbers = s.tokens * s.d_in
    return layers * (1 + curved) * numbers * s.dtype.itemsize, layers * curved * 8 * numbers


def _conversion_group(context: Context, kind: str, setting: Setting, repeated: int = 1, **shape) -> Group:
    state = Shared(lambda: Conversion(setting))
    moved, flop = _conversion_work(setting, repeated)

    def make(name: str) -> Made:
        convert = state().of(name)

        def call() -> None:
            with torch.no_grad():
                x = state().x()
                for _ in range(repeated):
                    outputs = convert(x)
                    x = outputs[0] if outputs[0].shape == x.shape else x

        return Made(call)

    variants = {}
    for name in (*CONVERSIONS, *FUSED):
        rank_space = name in FUSED
        if rank_space and FUSED[name][1] == "triton" and providers.why_no_triton(context.device):
            continue
        work = (
            (repeated * setting.tokens * setting.d_in * setting.dtype.itemsize, None) if rank_space else (moved, flop)
        )
        compiled = name in CONVERSIONS and CONVERSIONS[name][1]
        variants[name] = Variant(functools.partial(make, name), *work, compiled=compiled)
    return Group(
        kind, "conversion", {"d_in": setting.d_in, "tokens": setting.tokens, "experts": setting.experts, **shape},
        variants, BASE_CONVERSION, gates=_gates(context, setting, ("stereographic", "exp_log")), shared=[state],
    )  # fmt: skip


LINEAR_CONVERSIONS = (
    providers.FROZEN, providers.MAPPED, providers.EXP_LOG, providers.GEOOPT, providers.EAGER, providers.EXP_LOG_EAGER,
    providers.TRITON, providers.EXP_LOG_TRITON, providers.MAPPED_COMPILED, providers.EXP_LOG_COMPILED,
)  # fmt: skip


def dimension(context: Context, d: int, tokens: int, linear: bool = False) -> Group:
    """Forward over the embedding dimension: the conversion alone, or the whole adapted linear d -> d around it."""
    setting = _setting(context, d, d, tokens)
    if not linear:
        return _conversion_group(context, "dimension", setting)
    gates = _gates(context, setting, ("stereographic", "exp_log"))
    return _linear_group(context, "dimension", "with the linear", setting, LINEAR_CONVERSIONS, gates=gates)


def depth(context: Context, layers: int, d: int, tokens: int) -> Group:
    """Forward through the conversions of so many layers, one after the other."""
    return _conversion_group(context, "depth", _setting(context, d, d, tokens), layers, layers=layers)
