"""A decoder of Qwen2's architecture and parameter names, with random weights, and the adapters to put on its FFNs.

Plain PyTorch: a decoding step is one token a sequence against a full key-value cache at a fixed position, so it waits
for nothing and fits a CUDA graph. The tests hold it against transformers' Qwen2ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mos_kernels
from benchmarks import providers, swiglu
from benchmarks.providers import FusedLoRA
from mos_kernels import MoSConfig, MoSLinear, MoSRouter, ops
from mos_kernels.backends import selected_backend
from mos_kernels.ffn import FFNForm, as_one


@dataclass(frozen=True)
class Shape:
    """Qwen2-1.5B."""

    hidden: int = 1536
    intermediate: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    vocabulary: int = 151936
    rope_theta: float = 1e6
    eps: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


LINEARS = ("gate_proj", "up_proj", "down_proj")
FORM = FFNForm(LINEARS[:2], False, ("act_fn",), (), LINEARS[2], (), LINEARS)


class FFN(nn.Module):
    """down(silu(gate(x)) · up(x)), as transformers' LlamaMLP; with a router, its gates go to all three linears.

    together: with a router, as one operation where it can be, as in the blocks that apply_mos adapts. node: what else
    computes the block, from the block and x, than its linears one by one.
    """

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = nn.SiLU()
        self.mos_router: MoSRouter | None = None
        self.node: Callable[[FFN, Tensor], Tensor] | None = None
        self.backend, self.together = "auto", True

    def forward(self, x: Tensor) -> Tensor:
        if self.node is not None:
            return self.node(self, x)
        if self.mos_router is None:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        one = as_one(self, FORM, x, self.backend) if self.together else None
        if one is not None:
            return ops.ffn(*one)
        gates = self.mos_router(x, backend=self.backend)
        gate, up = (linear(x, gates, self.backend) for linear in (self.gate_proj, self.up_proj))
        return self.down_proj(self.act_fn(gate) * up, gates, self.backend)


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    """A context in which calls that choose no backend have this one."""
    before = selected_backend()
    mos_kernels.set_backend(backend)
    try:
        yield
    finally:
        mos_kernels.set_backend(before)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.width = shape, shape.hidden // shape.heads
        narrow = shape.kv_heads * self.width
        self.q_proj = nn.Linear(shape.hidden, shape.hidden)
        self.k_proj, self.v_proj = nn.Linear(shape.hidden, narrow), nn.Linear(shape.hidden, narrow)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor] | None) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.width)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:  # the last position is this token's
            keys, values = cache
            keys[:, :, -1:], values[:, :, -1:] = k, v
            k, v = keys, values
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotate(t: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return t * cosine + torch.cat([-second, first], -1) * sine


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = FFN(shape.hidden, shape.intermediate)

    def forward(self, x: Tensor, rotation, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.eps)


class Qwen2(nn.Module):
    """tokens (B, L) -> logits (B, L, vocabulary); the head shares the embedding's weight."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.model = shape, Decoder(shape)

    def rotation(self, start: int, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        width = self.shape.hidden // self.shape.heads
        frequencies = self.shape.rope_theta ** (
            -torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        )
        angles = torch.outer(torch.arange(start, start + length, device=x.device, dtype=torch.float32), frequencies)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def hidden(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        x = self.model.embed_tokens(tokens)
        if torch.is_grad_enabled():
            x = x.detach().requires_grad_()  # so that the frozen model has a backward too: dx alone, the floor
        start = 0 if caches is None else caches[0][0].shape[2] - 1
        rotation = self.rotation(start, tokens.shape[1], x)
        for i, block in enumerate(self.model.layers):
            x = block(x, rotation, None if caches is None else caches[i])
        return self.model.norm(x)

    def forward(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        return self.hidden(tokens, caches) @ self.model.embed_tokens.weight.t()

    def caches(self, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Random keys and values of `length` positions for every layer."""
        weight, shape = self.model.embed_tokens.weight, self.shape
        size = (batch, shape.kv_heads, length, shape.hidden // shape.heads)
        return [
            tuple(torch.randn(size, device=weight.device, dtype=weight.dtype) for _ in range(2))
            for _ in range(shape.layers)
        ]


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """The frozen model with random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen2(shape)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


# adapters on every FFN under a module

APART = (providers.EAGER_APART, providers.TRITON_APART)


def adapt(module: nn.Module, provider: str, config: MoSConfig) -> list[nn.Parameter]:
    """Put the provider's adapter on gate, up and down projection of every FFN, in place; what is trained then."""
    blocks = [m for m in module.modules() if isinstance(m, FFN)]
    if provider == providers.FROZEN:
        return []
    if provider in (providers.EAGER, providers.TRITON, *APART):
        for block in blocks:
            block.together = provider not in APART
        backend = "eager" if provider in (providers.EAGER, providers.EAGER_APART) else "triton"
        return _adapt_mos(blocks, backend, config)
    if provider in (providers.SWIGLU, providers.LIGER):
        fused = _liger() if provider == providers.LIGER else swiglu.SwiGLU.apply
        for block in blocks:
            block.node = lambda block, x: block.down_proj(fused(block.gate_proj(x), block.up_proj(x)))
        return []
    if provider == providers.LORA_MLP:
        return [p for block in blocks for p in _adapt_lora_mlp(block)]
    if provider == providers.FUSED_8:
        return [p for block in blocks for name in LINEARS for p in _adapt_fused(block, name)]
    if provider in (providers.PEFT_8, providers.PEFT_8_AS_BASE, providers.LILY):
        return _adapt_peft(module, provider)
    raise ValueError(f"{provider!r} has no form for a whole FFN")


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _adapt_lora_mlp(block: FFN) -> list[nn.Parameter]:
    block.lora = nn.ParameterList()
    for name in LINEARS:
        weight = getattr(block, name).weight
        for shape in ((8, weight.shape[1]), (weight.shape[0], 8)):
            block.lora.append(torch.randn(shape, device=weight.device, dtype=weight.dtype).mul_(0.02))

    def node(block: FFN, x: Tensor) -> Tensor:
        weights = [getattr(block, name).weight for name in LINEARS]
        return swiglu.LoRAMLP.apply(x.reshape(-1, x.shape[-1]), *weights, 2.0, *block.lora).view(x.shape)

    block.node = node
    return list(block.lora)


def _adapt_mos(blocks: list[FFN], backend: str, config: MoSConfig) -> list[nn.Parameter]:
    trained = []
    for block in blocks:
        block.backend = backend
        block.mos_router = MoSRouter(block.gate_proj.in_features, config, device=block.gate_proj.weight.device)
        for name in LINEARS:
            layer = MoSLinear.from_linear(getattr(block, name), config)
            nn.init.normal_(layer.mos_lora_B, std=0.02)
            setattr(block, name, layer)
        trained += [p for p in block.parameters() if p.requires_grad]
    return trained


class FusedLoRALinear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        for name, shape in (("A", (8, linear.in_features)), ("B", (linear.out_features, 8))):
            drawn = torch.randn(shape, device=linear.weight.device, dtype=linear.weight.dtype).mul_(0.02)
            setattr(self, name, nn.Parameter(drawn))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = FusedLoRA.apply(flat, self.linear.weight, self.linear.bias, self.A, self.B, 2.0)
        return y.view(*x.shape[:-1], -1)


def _adapt_fused(block: FFN, name: str) -> list[nn.Parameter]:
    layer = FusedLoRALinear(getattr(block, name))
    setattr(block, name, layer)
    return [layer.A, layer.B]


def _adapt_peft(module: nn.Module, provider: str) -> list[nn.Parameter]:
    import peft

    if provider == providers.LILY:
        options = peft.LilyConfig(r=8, stride_A=1, num_B=2, target_modules=list(LINEARS))
    else:
        options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEARS))
    peft.inject_adapter_in_model(options, module)
    trained = []
    for name, parameter in module.named_parameters():
        if not ("lora_" in name or "lily_" in name):
            continue
        if provider == providers.PEFT_8:
            parameter.data = parameter.data.float()
        nn.init.normal_(parameter, std=0.02)
        trained.append(parameter.requires_grad_())
    return trained


def freeze(module: nn.Module, backend: str) -> None:
    """`freeze_for_inference` on every adapted linear, for a given backend."""
    with chosen(backend):
        for layer in module.modules():
            if isinstance(layer, MoSLinear):
                layer.freeze_for_inference()
